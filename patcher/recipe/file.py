"""A recipe and the file that it was read from: the YAML, ``--set``, and errors that point at the line.

Unknown keys are refused with a suggestion, and all that is wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from patcher.errors import InputError, Problem
from patcher.errors.misspelt import closest
from patcher.recipe.schema import Recipe
from patcher.recipe.yaml_lines import YamlDocument, parse_yaml

Read = TypeVar("Read")

_MOST_PROBLEMS = 30
_MOST_ERRORS = 500


class RecipeError(InputError):
    """The recipe cannot be used as it is; every problem names file, line, key and remedy."""

    default_code = "recipe"


@dataclass(frozen=True)
class LoadedRecipe:
    """What a build is made from.

    Attributes:
        recipe: the keys: those of the file, with what the command line changed.
        text: of the file, verbatim.
        path: of the file.
        read: what was read for it, by what it was read from; see :meth:`once`.
    """

    recipe: Recipe
    text: str
    path: Path
    read: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """What paths in the recipe are relative to."""
        return self.path.parent

    def file(self, given: str) -> Path:
        """Where a path that the recipe gives is; ``~`` is the user's home."""
        return self.folder / Path(given).expanduser()

    def require_vector_files(self) -> None:
        """Look whether the vector files are there; what is in them takes torch to read.

        Raises:
            InputError: one is not.
        """
        for spec in self.recipe.vectors:
            if spec.file is not None and not self.file(spec.file).exists():
                raise no_vector_file(self.file(spec.file))

    def once(self, key: Hashable, read: Callable[[], Read]) -> Read:
        """What ``read`` gives, which is asked for ``key`` only the first time; it must not be changed."""
        if key not in self.read:
            self.read[key] = read()
        found: Read = self.read[key]
        return found

    def place(self, key: str) -> str:
        """How an error names a key: ``recipe.yaml: vectors.0``."""
        return f"{self.path.name}: {key}"

    def changed(self, **keys: Any) -> LoadedRecipe:
        """The same file with other values of some keys; they are not validated."""
        return replace(self, recipe=self.recipe.model_copy(update=keys))


def no_vector_file(path: Path) -> InputError:
    """The refusal of a vector file that is not there."""
    remedy = "check the spelling; paths are relative to the recipe's folder"
    return InputError("there is no such vector file", where=str(path), remedy=remedy)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` strings; dotted keys reach inside (``vectors.0.coefficient=2``), values are YAML.

    Raises:
        RecipeError: with every problem that was found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "there is no such recipe",
            where=str(path),
            remedy="check the path, or write one with: patch-model demo",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError("the recipe cannot be read as UTF-8 text", where=str(path), found=error) from None
    document = parse_yaml(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError(
            "a recipe is a mapping of keys to values",
            where=str(path),
            found="nothing" if document.value is None else type(document.value).__name__,
            remedy="start from: patch-model demo",
        )
    for override in overrides:
        _apply_override(document, override)
    return LoadedRecipe(validate_recipe(document), text, path)


def validate_recipe(document: YamlDocument) -> Recipe:
    """Validate parsed YAML; see :func:`load_recipe`."""
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        problems = _problems(error, document)
        raise RecipeError("the recipe is not valid", problems=problems) from None


def _apply_override(document: YamlDocument, override: str) -> None:
    key, separator, raw = override.partition("=")
    where = f"--set {override}"
    path = key.strip().split(".")
    if not separator or not all(path):
        raise InputError("--set takes key=value", where=where, remedy="for example: --set vectors.0.coefficient=2")
    value = parse_yaml(raw, where).value
    node: Any = document.value
    marked: tuple[int | str, ...] = ()
    for depth, part in enumerate(path):
        step: int | str = part
        if isinstance(node, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
                raise InputError(
                    f"{'.'.join(path[:depth])} is a list of {len(node)}",
                    where=where,
                    found=part,
                    remedy=f"use an index from 0 to {len(node) - 1}" if node else "set the whole list",
                )
            step = int(part)
        elif not isinstance(node, dict):
            raise InputError(f"{'.'.join(path[:depth])} has no keys of its own", where=where, found=repr(node))
        marked = (*marked, step)
        if depth == len(path) - 1:
            node[step] = value
        else:
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node = node[step]
    document.mark(marked, where)


def _problems(error: ValidationError, document: YamlDocument) -> list[Problem]:
    problems: dict[tuple[str | None, str], Problem] = {}
    errors = error.errors(include_url=False)[:_MOST_ERRORS]
    paths = [document.known_prefix(item["loc"]) for item in errors]
    around = {path[:length] for path in paths for length in range(len(path))}
    for item, path in zip(errors, paths, strict=True):
        key = ".".join(str(part) for part in path)
        kind, message, found, remedy = item["type"], item["msg"], _shown(item.get("input")), None
        own = kind in ("extra_forbidden", "missing") or (kind == "value_error" and isinstance(item["input"], dict))
        if not own and path in around:
            # A union that took a list, and found something wrong inside: that it is no text is not the news.
            continue
        if kind == "extra_forbidden":
            unknown = str(item["loc"][-1])
            message, found = f"unknown key `{unknown}`", None
            remedy = _did_you_mean(unknown, item["loc"][:-1])
        elif kind == "missing":
            missing = str(item["loc"][-1])
            message, found = f"`{missing}` is required", None
            remedy = f"add `{missing}:`"
        elif own:
            message, found = message.removeprefix("Value error, "), None
        elif kind == "model_type":
            message = f"`{key}`: must be a mapping of keys to values"
        else:
            message = f"`{key}`: {message.removeprefix('Value error, ')}"
        if kind == "literal_error" and isinstance(item["input"], str):
            expected = item["ctx"]["expected"].replace(" or ", ",").split(",")
            remedy = _closest(item["input"], [option.strip(" '") for option in expected])
        where = document.where(path)
        # A union reports once per branch; one line per key, with all that would be allowed, is enough.
        merged = problems.get((where, key))
        if merged is not None and not own:
            text = message.split(": ", 1)[-1]
            if text not in merged.message:
                problems[(where, key)] = Problem(
                    f"{merged.message}; or {text[:1].lower()}{text[1:]}",
                    where,
                    merged.found,
                    merged.remedy or remedy,
                )
            continue
        slot = (where, key) if merged is None else (where, f"{key}#{len(problems)}")
        problems[slot] = Problem(message, where, found, remedy)
    found_problems = list(problems.values())
    if len(found_problems) > _MOST_PROBLEMS:
        return [*found_problems[:_MOST_PROBLEMS], Problem("there are more problems, which are not listed")]
    return found_problems


def _shown(value: Any) -> str | None:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _closest(word: str, options: list[str]) -> str | None:
    match = closest(word, options)
    return f"did you mean `{match}`?" if match else None


def _did_you_mean(unknown: str, location: tuple[int | str, ...]) -> str:
    fields = _fields_at(location)
    return _closest(unknown, fields) or "known keys here: " + ", ".join(fields)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that a validator's location lies in; what names no key there is a branch of a union."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        section = section if field is None else _section_in(field.annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type is, or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
