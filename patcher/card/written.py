"""The sections of the model card on what the route wrote, and how to undo it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.card import texts
from patcher.card.values import (
    base_class,
    counted,
    grid,
    has_new_config,
    hub_id,
    inserted_blocks,
    is_fitted,
    listed,
    number,
    remote_code,
    rows,
    strings,
    table,
)

_TENSORS_SHOWN = 8
_LONG = 80


def what_changed(route: Mapping[str, Any]) -> str:
    """Which weights are not those of the base, in a sentence or two."""
    blocks = inserted_blocks(route)
    if has_new_config(route):
        count = len(table(route, "derived"))
        rewritten = f"{counted(count, 'tensor')} {_was(count)} rewritten for the new class; " if count else ""
        them = ("it and " if count == 1 else "them and ") if count else ""
        named = {"architecture": route.get("architecture"), "base_class": base_class(route)}
        return texts.RELABELLED.format(rewritten=rewritten, them=them, **named)
    if blocks:
        more = "one more block adds it" if len(blocks) == 1 else f"{len(blocks)} more blocks add them"
        return texts.INSERTED.format(blocks=more) + (f" {texts.DRAFTS}" if strings(route, "dropped") else "")
    if is_fitted(route):
        count = len(rows(route, "tensors"))
        return texts.FITTED.format(tensors=counted(count, "weight tensor"), have="has" if count == 1 else "have")
    untied = table(route, "config_changes").get("tie_word_embeddings") is False
    return texts.UNTIED if untied else texts.UNCHANGED


def written(manifest: Mapping[str, Any]) -> str:
    route = table(manifest, "route")
    if not route:
        return ""
    sentence = texts.ROUTE.format(
        name=route.get("name"),
        exact="fitted, not exact" if is_fitted(route) else "exact",
        cost=route.get("cost") or "not stated",
        architecture=route.get("architecture"),
        code="no code beyond the base's own" if remote_code(manifest) else "no custom code",
    )
    carriers = _carriers(manifest, route)
    return "\n\n".join(["## What was written", sentence, *carriers, *_others(route), *_moved(route), *_files(route)])


def _carriers(manifest: Mapping[str, Any], route: Mapping[str, Any]) -> list[str]:
    tensors = rows(route, "tensors")
    if not tensors:
        return []
    steered = {edit.get("layer") for edit in rows(manifest, "edits")}
    # A flag creates a bias in every block; those of the edited ones say something.
    ordered = sorted(tensors, key=lambda tensor: tensor.get("layer") not in steered)
    shown = [
        (
            f"`{tensor.get('name')}`",
            _change(tensor),
            number(tensor["factor"]) if tensor.get("factor") not in (None, 1) else None,
            tensor.get("dtype"),
            " × ".join(str(size) for size in tensor.get("shape") or []) or None,
        )
        for tensor in ordered[:_TENSORS_SHOWN]
    ]
    parts = [grid(("tensor", "change", "residual gain per unit", "dtype", "shape"), shown)]
    if len(tensors) > len(shown):
        parts.append(f"… and {len(tensors) - len(shown)} more, listed in `steering.json`.")
    return parts


def _change(tensor: Mapping[str, Any]) -> str:
    """How a tensor holds the vector."""
    kind, shape = str(tensor.get("kind")), tensor.get("shape") or []
    created = kind == "created"
    if tensor.get("outer"):
        over = ", divided by the norm's weight," if tensor.get("spread") else ""
        if created:
            return f"created: outer product of the vector{over} and a row of constants"
        return f"the outer product of the vector{over} and a fitted row was added to it"
    if kind == "added":
        return "the vector was added to every row" if len(shape) > 1 else "the vector was added to it"
    if created and str(tensor.get("name")).endswith("weight") and len(shape) == 1:
        return "created: a norm's weight, which holds the vector"
    return kind


def _others(route: Mapping[str, Any]) -> list[str]:
    """Tensors that carry no vector."""
    zeros, derived = table(route, "zeros"), table(route, "derived")
    names, count = strings(zeros, "names"), int(zeros.get("count") or 0)
    parts = []
    blocks = inserted_blocks(route)
    if blocks:
        prefixes = _inserted_prefixes(route, blocks)
        inside = [name for name in names if name.startswith(prefixes)]
        others = [name for name in derived if name.startswith(prefixes)]
        total = len(inside) + len(others)
        are = "is" if len(blocks) == 1 else "are"
        parts.append(texts.INSIDE.format(blocks=_numbered(blocks), are=are, total=total, zeros=len(inside)))
        count -= len(inside)
        derived = {name: holds for name, holds in derived.items() if name not in others}
    if count > 0:
        new = has_new_config(route)
        config = "the new class expects" if new else "the changed configuration makes the class expect"
        where = " in other blocks" if blocks else ""
        parts.append(texts.ZEROS.format(tensors=counted(count, "tensor"), where=where, config=config))
    return [*parts, *_derived(derived)]


def _derived(derived: Mapping[str, Any]) -> list[str]:
    """Tensors that are made of the base's, those that are made in the same way in one line."""
    ways: dict[str, list[tuple[str, str]]] = {}
    for name, holds in derived.items():
        way = re.sub(r"`[^`]*`", "", str(holds))
        ways.setdefault(way, []).append((name, str(holds)))
    if not ways:
        return []
    lines = [(f"`{group[0][0]}`", group[0][1], _more(len(group))) for group in list(ways.values())[:_TENSORS_SHOWN]]
    count = len(derived)
    parts = [f"{counted(count, 'other tensor')} {_was(count)} made:"]
    parts.append(grid(("tensor", "holds", "made in the same way"), lines))
    return [*parts, "All are listed in `steering.json`."] if count > len(lines) else parts


def _moved(route: Mapping[str, Any]) -> list[str]:
    parts = []
    renamed, dropped = table(route, "renamed"), strings(route, "dropped")
    blocks = inserted_blocks(route)
    if renamed:
        old, new = next(iter(renamed.items()))
        text, one = texts.RENUMBERED if blocks else texts.RENAMED, len(renamed) == 1
        it = "it" if len(blocks) == 1 else "the first of them"
        words = {"have": "has" if one else "have", "were": _was(len(renamed)), "it": it}
        parts.append(text.format(tensors=counted(len(renamed), "tensor"), old=old, new=new, **words))
    sources = " ".join(str(holds) for holds in table(route, "derived").values())
    replaced = [name for name in dropped if f"`{name}`" in sources]
    lost = [name for name in dropped if name not in replaced]
    for text, names in ((texts.REPLACED, replaced), (texts.LEFT_OUT, lost)):
        if names:
            are = "is" if len(names) == 1 else "are"
            parts.append(text.format(tensors=counted(len(names), "tensor"), are=are, name=names[0]))
    return parts


def _files(route: Mapping[str, Any]) -> list[str]:
    parts = []
    changes = table(route, "config_changes")
    if has_new_config(route):
        parts.append(texts.NEW_CONFIG.format(architecture=route.get("architecture"), base_class=base_class(route)))
    elif changes:
        parts.append(f"Changed in `config.json`: {_settings(changes)}.")
    else:
        parts.append("`config.json` is the base's.")
    if table(route, "tokenizer_changes"):
        parts.append(texts.TOKENIZER.format(changes=_settings(table(route, "tokenizer_changes"))))
    return parts


def taking_out(manifest: Mapping[str, Any]) -> str:
    base, route = table(manifest, "base"), table(manifest, "route")
    merged = " with the adapter merged" if base.get("adapter") else ""
    hub = hub_id(base)
    link = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{base.get('model') or 'the base'}`"
    if has_new_config(route) and strings(route, "dropped"):
        tensors = [f"`{tensor.get('name')}`" for tensor in rows(route, "tensors")]
        off = f"set {listed(tensors)} to zero" if len(tensors) <= _TENSORS_SHOWN else "set the created biases to zero"
        how = texts.NO_WAY_BACK.format(merged=merged, base=link, off=off)
    else:
        unaltered = texts.UNALTERED.format(base=f"at {link}") if hub else ""
        how = texts.STEPS.format(merged=merged, steps=_steps(route), unaltered=unaltered).rstrip()
    return texts.TAKING_OUT.format(gains=_held(route), how=how)


def _held(route: Mapping[str, Any]) -> str:
    """What the vectors in ``steering.safetensors`` are."""
    if route.get("residual") == "centred":
        return "as the base's residual stream would gain it; the copy's gains it less its mean"
    if is_fitted(route):
        return "as the residual stream should gain it, and the other factors of what was added (`right/`, `spread/`)"
    return "exactly as the residual stream gains it"


def _steps(route: Mapping[str, Any]) -> str:
    tensors, blocks = rows(route, "tensors"), inserted_blocks(route)
    created = table(route, "zeros").get("count") or table(route, "derived")
    steps = []
    if any(tensor.get("original") for tensor in tensors):
        steps.append("write back the original values of the changed tensors, kept in that file under `original/`")
    if blocks:
        steps.append(f"remove {_numbered(blocks).lower()}")
        if _outside(route, blocks):
            steps.append("delete the tensors of zeros that were created in other blocks (`route.zeros`)")
    elif created or any(tensor.get("kind") == "created" and not tensor.get("original") for tensor in tensors):
        steps.append("delete the created tensors")
    if table(route, "renamed"):
        back = ", so that later blocks move back" if blocks else ""
        steps.append(f"give the renamed tensors their old names{back} (`route.renamed`)")
    if strings(route, "dropped"):
        steps.append("take the tensors that were left out from the base")
    if has_new_config(route):
        steps.append("put the base's `config.json` back")
    elif table(route, "config_changes"):
        steps.append("undo the changes of `config.json` (`route.config_before`)")
    if table(route, "tokenizer_changes"):
        steps.append("take `tokenizer_config.json` from the base")
    return "; ".join(steps) or "see `steering.json` for what was changed"


def _outside(route: Mapping[str, Any], blocks: Mapping[int, int]) -> bool:
    """Whether tensors were created in blocks that are the base's."""
    prefixes = _inserted_prefixes(route, blocks)
    return any(not name.startswith(prefixes) for name in strings(table(route, "zeros"), "names"))


def _inserted_prefixes(route: Mapping[str, Any], blocks: Mapping[int, int]) -> tuple[str, ...]:
    """How the names of the inserted blocks' tensors begin in the files."""
    found = set()
    for tensor in rows(route, "tensors"):
        block = f".{blocks.get(int(tensor.get('layer') or 0))}."
        front, middle, _ = str(tensor.get("name")).partition(block)
        if middle:
            found.add(front + middle)
    return tuple(sorted(found))


def _numbered(blocks: Mapping[int, int]) -> str:
    return f"Block{'s' if len(blocks) > 1 else ''} {listed(list(blocks.values()))}"


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(_setting(key, value) for key, value in changes.items())


def _setting(key: str, value: Any) -> str:
    if value is None:
        return f"`{key}` removed"
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) > _LONG and isinstance(value, Sequence):
        return f"`{key}` (now {len(value)} entries)"
    return f"`{key}: {shown}`"


def _more(count: int) -> str | None:
    return f"{count - 1} more" if count > 1 else None


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
