"""Images of contrast pairs: files beside the recipe or the data set, or bytes in a data set."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patcher.disk.lfs import refuse_pointer
from patcher.errors import InputError, MissingExtraError, OutsideError
from patcher.errors.causes import cause_of
from patcher.pairs.problems import RowProblem, shown

_BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftyp(?:avif|avis|heic|mif1)",
    re.DOTALL,
)
_ON_THE_WEB = re.compile(r"(?:https?|data|s3|hf):", re.IGNORECASE)
_AN_IMAGE = "give a PNG, JPEG, WebP, GIF, BMP or TIFF file"


@dataclass(frozen=True)
class PairImage:
    """The image that both sides of a pair are about; looked at, and not decoded yet.

    Attributes:
        place: the file, or how errors name an image that has none.
        data: its bytes, where a data set holds them; None: they are in the file.
    """

    place: Path | str
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its bytes.

        Raises:
            OutsideError: the file cannot be read.
        """
        return hashlib.sha256(self._bytes()).hexdigest()

    def opened(self) -> Any:
        """The image as stock software sees it: a PIL image, turned as its camera says, in RGB.

        Raises:
            InputError: it is not the whole of an image, or another one than when it was first read.
            OutsideError: the file cannot be read.
            MissingExtraError: Pillow is not installed.
        """
        require_pillow()
        from PIL import Image
        from transformers.image_utils import load_image

        data = self._bytes()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise InputError("this image was changed while it was in use", where=str(self.place), remedy="start again")
        try:
            return load_image(Image.open(io.BytesIO(data)))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            message = "this image cannot be opened: it is damaged, or not an image"
            raise InputError(message, where=str(self.place), found=cause_of(error), remedy=_AN_IMAGE) from None

    def _bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        try:
            return Path(self.place).read_bytes()
        except OSError as error:
            place = str(self.place)
            raise OutsideError("the image cannot be read", where=place, found=error.strerror or error) from None


def image_of(value: Any, folder: Path | None, what: str, origin: str) -> PairImage | None:
    """The image that a pair names or holds; None where it has none.

    Args:
        value: a path; bytes; ``{bytes, path}``, as data sets hold images; a PIL image; or a list of one of these.
        folder: what paths are relative to; None: a path leads nowhere.
        what: the key or column, for errors.
        origin: of the pair.

    Raises:
        RowProblem: there is no such file, or it is no image.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        if len(value) > 1:
            message, remedy = f"{what} holds {len(value)} images, and a pair has one", "name one of them in `columns`"
            raise RowProblem(message, origin, None, f"{remedy}: `{what.strip('`')}.0`")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        path = value.get("path")
        if isinstance(path, str) and Path(path).is_absolute():
            # Where a library has put a file of the data set.
            folder = Path(path).parent
        value = value.get("bytes") or path
    if value is None or value == "" or value == b"" or value != value:
        return None
    if isinstance(value, str):
        return _of_file(value, folder, what, origin)
    if isinstance(value, bytes | bytearray):
        _require_image(bytes(value), what, origin, shown(bytes(value[:16])))
        return PairImage(f"{origin}: {what}", bytes(value))
    if hasattr(value, "save") and hasattr(value, "tobytes"):
        file = io.BytesIO()
        value.save(file, format="PNG")
        return PairImage(f"{origin}: {what}", file.getvalue())
    raise RowProblem(f"{what} is no image", origin, f"{type(value).__name__}: {shown(value)}", _AN_IMAGE)


def _of_file(given: str, folder: Path | None, what: str, origin: str) -> PairImage:
    if _ON_THE_WEB.match(given):
        message = f"{what} is an address, and images are read from files"
        raise RowProblem(message, origin, shown(given), "download the image, and give its path")
    if folder is None:
        message = f"{what} is a path, and a data set of the Hub has no folder here that it could lead to"
        remedy = "download the data set with its images, and give the path of its file"
        raise RowProblem(message, origin, shown(given), remedy)
    try:
        path = folder / Path(given).expanduser()
        refuse_pointer(path)
        with path.open("rb") as file:
            _require_image(file.read(64), what, origin, str(path), path)
    except (FileNotFoundError, NotADirectoryError):
        found, remedy = str(folder / given), "check the spelling; paths are relative to the file that names them"
        raise RowProblem("there is no such image", origin, found, remedy) from None
    except IsADirectoryError:
        raise RowProblem(f"{what} is a folder, not an image", origin, shown(given), "name one of its files") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise RowProblem(f"{what} cannot be read", origin, cause_of(error)) from None
    return PairImage(path)


def _require_image(beginning: bytes, what: str, origin: str, found: str, path: Path | None = None) -> None:
    """By its first bytes; Pillow knows more kinds."""
    if _BEGINNINGS.match(beginning):
        return
    if has_pillow():
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(beginning) if path is None else path):
                return
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            pass
    raise RowProblem(f"{what} is no image", origin, found if beginning else f"{found}, which is empty", _AN_IMAGE)


def has_pillow() -> bool:
    """Whether images can be opened."""
    return importlib.util.find_spec("PIL") is not None


def require_pillow() -> None:
    """Refuse to go on without what opens images.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    if not has_pillow():
        raise MissingExtraError("pillow", "images", "reading contrast pairs with images")
