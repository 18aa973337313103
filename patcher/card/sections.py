"""The sections of the model card. Each takes ``steering.json`` and returns Markdown, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patcher.card import texts
from patcher.card.measured import approximation, status
from patcher.card.values import (
    grid,
    hub_id,
    inserted_blocks,
    is_fitted,
    is_single_pair,
    listed,
    number,
    numbers,
    ratio,
    remote_code,
    rows,
    strings,
    table,
    vectors_of,
)
from patcher.card.written import what_changed


def introduction(manifest: Mapping[str, Any]) -> str:
    base, route = table(manifest, "base"), table(manifest, "route")
    model = str(base.get("model") or "a base model")
    names = ", ".join(dict.fromkeys(str(edit.get("name", "steering")) for edit in rows(manifest, "edits")))
    hub = hub_id(base)
    linked = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{model}` (a local model)"
    if base.get("revision"):
        linked += f" at revision `{str(base['revision'])[:12]}`"
    layers = sorted({edit["layer"] for edit in rows(manifest, "edits") if isinstance(edit.get("layer"), int)})
    where = _where(layers, "gains approximately" if is_fitted(route) else "gains")
    paragraph = [texts.INTRODUCTION.format(base=linked, where=where, rest=what_changed(route))]
    if is_fitted(route):
        paragraph.append(approximation(route))
    if base.get("adapter"):
        paragraph.append(texts.ADAPTER.format(adapter=_adapter(base["adapter"])))
    title = f"# {model.rsplit('/', 1)[-1]}, steered" + (f": {names}" if names else "")
    return f"{title}\n\n{' '.join(paragraph)}"


def _where(layers: Sequence[int], gains: str) -> str:
    if not layers:
        return f"the residual stream {gains} a fixed vector"
    if layers == [-1]:
        return f"what enters block 0 {gains} a fixed vector"
    places = ["the embedding" if layer == -1 else f"block {layer}" for layer in layers]
    if len(places) == 1:
        return f"the residual stream after {places[0]} {gains} a fixed vector"
    return f"the residual stream {gains} a fixed vector after each of {listed(places)}"


def edits(manifest: Mapping[str, Any]) -> str:
    lines = []
    route = table(manifest, "route")
    inserted = inserted_blocks(route)
    for edit in rows(manifest, "edits"):
        method = str(edit.get("method") or "–")
        norm, residual = edit.get("norm"), edit.get("residual_norm")
        lines.append(
            (
                edit.get("name"),
                _block(edit, inserted),
                texts.METHODS.get(method, method),
                number(edit.get("coefficient")),
                number(norm),
                number(residual),
                number(ratio(norm, residual)),
            )
        )
    if not lines:
        return ""
    head = ("name", "block", "method", "coefficient", "vector norm", "mean residual norm", "ratio")
    parts = ["## The edit" if len(lines) == 1 else "## The edits", grid(head, lines)]
    gains = "the residual stream should gain" if is_fitted(route) else "the residual stream gains"
    centred = route.get("residual") == "centred"
    parts.append(texts.NORM.format(gains="the base's residual stream would gain" if centred else gains))
    if any(is_single_pair(vector) and vector.get("align", "auto") != "none" for vector in vectors_of(manifest)):
        parts.append(texts.BROADCAST)
    return "\n\n".join(parts)


def _block(edit: Mapping[str, Any], inserted: Mapping[int, int]) -> Any:
    layer, read = edit.get("layer"), edit.get("read_layer")
    remarks = [] if read in (None, layer) else [f"read at {read}"]
    if isinstance(layer, int) and layer in inserted:
        remarks.append(f"added by block {inserted[layer]} of the copy")
    place = "embedding" if layer == -1 else layer
    return f"{place} ({'; '.join(remarks)})" if remarks else place


def loading(manifest: Mapping[str, Any]) -> str:
    push = table(table(table(manifest, "recipe"), "resolved"), "push")
    name = push.get("repo") or "OWNER/THIS-REPOSITORY"
    extra = ", trust_remote_code=True" if remote_code(manifest) else ""
    use = texts.USE.format(name=name, extra=extra)
    warnings = [f"- {_sentence(warning)}" for warning in strings(table(manifest, "route"), "warnings")]
    return "\n\n".join([use, texts.MIND, "\n".join(warnings)]) if warnings else use


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def evaluation(manifest: Mapping[str, Any]) -> str:
    found = table(manifest, "evaluation")
    if not found:
        return ""
    parts = ["## Evaluation"]
    each = rows(found, "per_vector")
    for result in each if len(each) > 1 else [found]:
        if result.get("steered") is not None:
            parts += _effect(result)
    perplexity = [
        (topic.replace("_", "-"), number(value.get("base")), number(value.get("steered")))
        for topic, value in table(found, "perplexity").items()
        if isinstance(value, Mapping)
    ]
    if perplexity:
        parts.append(grid(("perplexity on texts", "base", "steered"), perplexity))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _effect(found: Mapping[str, Any]) -> list[str]:
    """One vector's held-out pairs: the steered model beside its controls."""
    lines = [
        ("base", number(found.get("base"))),
        ("**steered**", f"**{number(found.get('steered'))}**"),
    ]
    if found.get("negative") is not None:
        lines.append(("the same vector, sign reversed", number(found["negative"])))
    control = numbers(found, "random")
    if len(control) == 1:
        lines.append(("a random vector of equal norm", number(control[0])))
    elif control:
        mean = number(sum(control) / len(control))
        span = f"{mean} ({number(min(control))} to {number(max(control))})"
        lines.append((f"{len(control)} random vectors of equal norm, mean and range", span))
    measure = str(found.get("measure") or "effect").replace("_", " ")
    whose = "pairs that the vector was made from" if found.get("held_out") is False else "held-out pairs"
    where = f"On {found['pairs']} {whose}" if found.get("pairs") else f"On {whose}"
    of = f" of `{found['vector']}`" if found.get("vector") else ""
    parts = [f"{where}{of}:", grid(("model", measure), lines)]
    if found.get("distinguishable") is False:
        parts.append(texts.INDISTINGUISHABLE)
    return [*parts, *(f"*{note}*" for note in strings(found, "notes"))]


def stacks(manifest: Mapping[str, Any]) -> str:
    route = table(manifest, "route")
    reads, oldest = table(route, "stacks"), table(route, "oldest")
    checks: dict[str, Mapping[str, Any]] = {}
    for check in rows(manifest, "verification"):
        if check.get("status") != "not_checked":
            checks.setdefault(str(check.get("stack")), check)
    lines = []
    for stack in dict.fromkeys([*map(str, reads), *checks]):
        known = str(reads.get(stack, "not known"))
        checked = "**not checked**"
        if stack in checks:
            check = checks[stack]
            version = " ".join(filter(None, [check.get("version") or "version not recorded", check.get("detail")]))
            checked = f"{status(check)} ({version})"
        lines.append((stack, texts.READS.get(known, known), oldest.get(stack), checked))
    if not lines:
        return ""
    text = (
        texts.STACKS + (f" {texts.OLDEST}" if oldest else "") + (f" {texts.UNREAD}" if "no" in reads.values() else "")
    )
    head = ("stack", "reads this route", "oldest version run", "checked on this copy")
    return f"## Which software is steered\n\n{grid(head, lines)}\n\n{text}"


def licence(inherited: Mapping[str, Any], files: Sequence[str]) -> str:
    name = inherited.get("license_name") or inherited.get("license")
    if not name and not files:
        return "## Licence\n\nThe base states no licence in its card; its terms apply to this copy."
    named = f", `{name}`," if isinstance(name, str) else ""
    listed = f" They are in {', '.join(f'`{file}`' for file in files)}." if files else ""
    return f"## Licence\n\nThe terms of the base{named} apply to this copy.{listed}"


def notes(manifest: Mapping[str, Any]) -> str:
    listed = [f"- {note}" for note in strings(manifest, "notes")]
    return "\n".join(["## Notes", "", *listed]) if listed else ""


def citations(manifest: Mapping[str, Any]) -> str:
    vectors = vectors_of(manifest) or rows(manifest, "edits")
    used = []
    for vector in vectors:
        method = vector.get("method", "mean_difference")
        if method == "mean_difference":
            used.append("actadd" if is_single_pair(vector) else "caa")
        elif method == "pca":
            used.append("repe")
        elif method == "persona":
            used.append("persona")
    papers = "\n".join(f"- {texts.PAPERS[key]}" for key in dict.fromkeys(used))
    tool = f"Made with patch-model {manifest.get('tool_version') or ''}".rstrip() + "."
    return f"## Method\n\n{papers}\n\n{tool}" if papers else f"## Method\n\n{tool}"


def _adapter(adapter: Any) -> str:
    if isinstance(adapter, Mapping):
        adapter = adapter.get("given") or adapter.get("name") or "adapter"
    return str(adapter)
