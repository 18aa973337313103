"""The sections of the model card on what was measured of the copy: how well a fit fits, and the verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patcher.card import texts
from patcher.card.values import counted, grid, is_fitted, listed, number, percent, rows, strings, table

_FILES_SHOWN = 12
_TOKENS = {"tokens": "tokens", "held_out": "held_out_tokens"}


def approximation(route: Mapping[str, Any]) -> str:
    """For the introduction: by how much a fitted route is off."""
    fit = table(route, "fit")
    text = texts.APPROXIMATE
    if fit.get("error_mean") is not None:
        text += texts.APPROXIMATE_ERROR.format(mean=percent(fit["error_mean"]), p95=percent(fit.get("error_p95")))
    if fit.get("ratio") is not None:
        text += texts.APPROXIMATE_KL.format(ratio=percent(fit["ratio"]))
    return text + "."


def fit(manifest: Mapping[str, Any]) -> str:
    found = table(table(manifest, "route"), "fit")
    if not found:
        return ""
    layers = {name: layer for name, layer in table(found, "layers").items() if isinstance(layer, Mapping)}
    lines = [
        (
            name,
            percent(layer.get("error_mean")),
            percent(layer.get("error_p95")),
            number(layer.get("cosine")),
            percent(layer.get("mean")),
        )
        for name, layer in (layers or {"all": found}).items()
    ]
    head = ("block", "mean error", "95 % of tokens below", "mean cosine with the vector", "along the vector")
    own = found.get("sampled_tokens")
    sampled = f" (of both together, the model wrote {own:,} itself)" if own else ""
    numbers = {name: f"{int(found.get(key) or 0):,}" for name, key in _TOKENS.items()}
    parts = ["## How well it fits", grid(head, lines), texts.FIT.format(sampled=sampled, **numbers)]
    if found.get("ratio") is not None:
        kl = {"fit": number(found.get("kl_hook_fit")), "base": number(found.get("kl_hook_base"))}
        ratio = number(found["ratio"])
        parts.append(texts.FIT_KL.format(tokens=f"{int(found.get('kl_tokens') or 0):,}", ratio=ratio, **kl))
    without = sum(int(layer.get("unfitted_experts") or 0) for layer in layers.values())
    if without:
        parts.append(texts.UNFITTED.format(experts=counted(without, "routed expert")))
    return "\n\n".join(parts)


def verification(manifest: Mapping[str, Any]) -> str:
    route = table(manifest, "route")
    fitted = is_fitted(route)
    lines = [
        (
            check.get("stack"),
            check.get("version"),
            status(check),
            check.get("dtype"),
            number(check.get("max_abs_logprob_diff")),
            None if fitted else number(check.get("tolerance")),
            number(check.get("noise_floor")),
            number(check.get("own_error")),
            number(check.get("steering_effect")),
            number(check.get("vector_rel_error")),
        )
        for check in rows(manifest, "verification")
    ]
    if not lines:
        return texts.UNVERIFIED
    head = (
        *("stack", "version", "status", "dtype", "max Δ log-prob", "limit", "noise floor", "own error", "effect"),
        "vector error",
    )
    parts = ["## Verification", grid(head, lines), _how(manifest)]
    if any(check.get("own_error") is not None for check in rows(manifest, "verification")):
        parts.append(texts.OWN_ERROR)
    if fitted:
        parts.append(texts.NO_LIMIT)
    if route.get("residual") == "centred":
        parts.append(texts.CENTRED)
    for check in rows(manifest, "verification"):
        parts += _checks(check)
    not_run = [
        f"- {check.get('stack')}: {item.get('name')}" + (f" ({item['note']})" if item.get("note") else "")
        for check in rows(manifest, "verification")
        for item in rows(check, "checks")
        if item.get("passed") is None
    ] + [
        f"- {check.get('stack')}: {check['note']}"
        for check in rows(manifest, "verification")
        if check.get("status") == "not_checked" and check.get("note")
    ]
    return "\n\n".join([*parts, "Not checked:\n\n" + "\n".join(not_run)] if not_run else parts)


def _how(manifest: Mapping[str, Any]) -> str:
    """How the copy was checked: whole, or what of it was there when it was made on the Hub."""
    ends = {str(check.get("status")): check for check in rows(manifest, "verification")}
    if "truncated" in ends:
        count = counted(int(ends["truncated"].get("blocks") or 0), "block")
        return f"{texts.FIRST_BLOCKS.format(blocks=count)} {texts.TERMS}"
    return texts.STRUCTURAL if "structural" in ends else f"{texts.WHOLE} {texts.TERMS}"


def remote(manifest: Mapping[str, Any]) -> str:
    """Of a copy that was made on the Hub: what of the base's weights was downloaded for it."""
    found = table(manifest, "remote")
    if not found:
        return ""
    files = rows(found, "downloaded")
    sizes = {
        "bytes": f"{int(found.get('bytes_downloaded') or 0):,}",
        "total": f"{int(found.get('bytes_of_weights') or 0):,}",
        "files": len(files),
        "count": counted(int(found.get("weight_files") or 0), "weight file"),
    }
    parts = ["## Made on the Hub", texts.REMOTE.format(**sizes) if files else texts.REMOTE_NOTHING.format(**sizes)]
    if files:
        shown = ", ".join(f"`{file.get('name')}`" for file in files[:_FILES_SHOWN])
        more = f" and {len(files) - _FILES_SHOWN} more, listed in `steering.json`" if len(files) > _FILES_SHOWN else ""
        parts.append(f"Downloaded: {shown}{more}.")
    if changed := strings(found, "changed"):
        parts.append(texts.REMOTE_CHANGED.format(files=listed([f"`{name}`" for name in changed])))
    return "\n\n".join(parts)


def _checks(entry: Mapping[str, Any]) -> list[str]:
    """Every check with a number, in words."""
    lines = [
        (
            _words(str(item.get("name"))),
            number(item["value"]),
            number(item.get("limit")),
            None if item.get("passed") else "**failed**",
        )
        for item in rows(entry, "checks")
        if item.get("passed") is not None and item.get("value") is not None
    ]
    if not lines:
        return []
    return [f"Every number that {entry.get('stack')} was held to:", grid(("what", "value", "limit", ""), lines)]


def _words(name: str) -> str:
    plain, bracket, rest = name.partition(" (")
    return texts.CHECKS.get(plain, plain).replace("own dtype", f"own dtype{bracket}{rest}")


def status(check: Mapping[str, Any]) -> str:
    """How a stack's verification ended, in words."""
    found = str(check.get("status") or "not_checked")
    return texts.STATUS.get(found, found)
