"""Reading ``steering.json`` with care for what is not there, and putting values into Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def table(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """``value[key]`` if that is a mapping, else an empty one."""
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def rows(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The mappings in the list ``value[key]``."""
    found = value.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def strings(value: Mapping[str, Any], key: str) -> list[str]:
    """The strings in the list ``value[key]``."""
    found = value.get(key)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def numbers(value: Mapping[str, Any], key: str) -> list[float]:
    """The numbers in ``value[key]``, a list or one number."""
    found = value.get(key)
    return [item for item in (found if isinstance(found, list) else [found]) if _is_number(item)]


def ratio(over: Any, under: Any) -> float | None:
    """A quotient, if both are numbers and there is one."""
    return over / under if _is_number(over) and _is_number(under) and under else None


def hub_id(base: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub, if it came from there."""
    model = base.get("model")
    return str(model).partition("@")[0] if base.get("hub") and model else None


def grid(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    kept = [column for column in range(len(head)) if any(line[column] not in (None, "–") for line in lines)]
    marks = ["---"] * len(kept)
    body = [[_cell(line[column]) for column in kept] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [[head[column] for column in kept], marks, *body])


def number(value: Any) -> str:
    """A number as people read it; a dash where there is none."""
    if not _is_number(value):
        return "–" if value is None else str(value)
    return f"{value:.1e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4g}"


def percent(value: Any) -> str:
    """A share in per cent; a dash where there is no number."""
    if not _is_number(value):
        return "–"
    if 0 < abs(value) < 1e-3:
        return "under 0.1 %"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.1f} %"


def counted(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[Any]) -> str:
    """``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def inserted_blocks(route: Mapping[str, Any]) -> dict[int, int]:
    """Layer of the base -> the block of the copy that was inserted after it; empty where none was."""
    moved = {int(layer): block for layer, block in table(route, "copy_layers").items() if isinstance(block, int)}
    return {layer: block for layer, block in sorted(moved.items()) if block != layer}


def has_new_config(route: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` was written anew: the base's is then kept whole."""
    return bool(table(route, "config_before").keys() - table(route, "config_changes").keys())


def base_class(route: Mapping[str, Any]) -> str:
    """The class of the base, of a route that writes ``config.json`` anew."""
    before = table(route, "config_before")
    named = strings(before, "architectures")
    return f"`{named[0]}`" if named else f"the model type `{before.get('model_type')}`"


def is_fitted(route: Mapping[str, Any]) -> bool:
    """Whether the copy only approximates the hook."""
    return route.get("exact") is False


def remote_code(manifest: Mapping[str, Any]) -> bool:
    """Whether the base brings code of its own."""
    return table(table(manifest, "recipe"), "resolved").get("trust_remote_code") is True


def vectors_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The vectors as the recipe describes them."""
    return rows(table(table(manifest, "recipe"), "resolved"), "vectors")


def is_single_pair(vector: Mapping[str, Any]) -> bool:
    """Whether this is ActAdd's case: the difference of one pair of whole texts."""
    pairs = vector.get("pairs")
    if not isinstance(pairs, list) or len(pairs) != 1 or not isinstance(pairs[0], Mapping):
        return False
    return vector.get("method", "mean_difference") == "mean_difference" and not pairs[0].get("prompt")
