"""Which stock class computes what another computes, and has a place for the vector? All pairs, tried by machine.

For every class whose default route pays a layer, is fitted or is none, a tiny random model is mapped to every class
that has a slot: config fields by name, tensors by the part that they play, and the logits are compared.
``python tests/conformance/relabel_search.py`` writes docs/relabel_search.json; with ``--only mixtral`` it prints.

A small difference is a lead for a row of relabels.json, no more: sizes, guards and names on disk are looked at by hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from support.class_parts import parts_of, slot_flags
from support.default_configs import default_config
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import causal_lm_from_config, quiet_transformers
from patcher.architectures.shrink import VOCABULARY, shrink_config

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "relabel_search.json"
PAGE = ROOT / "docs" / "routes-tried.md"
START, END = "<!-- pairs: made by the search -->\n", "<!-- end of pairs -->\n"
RECORDED = ROOT / "docs" / "architectures.json"
LAYER, CLOSE = 2, 1e-4
FAILURES = (Exception,)
"""Classes fail in all ways on configs that were not made for them."""

SYNONYMS = (
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_epsilon"),
    ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "activation"),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k"),
    ("routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_routed_scaling_factor"),
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    ("final_logit_softcapping", "logits_soft_cap"),
    ("moe_intermediate_size", "intermediate_size"),
    ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
)
"""Fields that mean the same in different classes."""

SWITCH = re.compile(r"parallel|norm_topk|qk_norm|qk_layernorm|use_post_norm|scale|alibi|rotary|rope")
"""Switches of a target that its source's config may not decide."""


@dataclass(frozen=True)
class Pair:
    """What became of one pair.

    Attributes:
        difference: of the logits, over the largest; the best of all variants. None: it was not built.
        variant: how the tensors were laid out.
        why: where it was not built: which tensor of the source has no place, or what the class said.
    """

    source: str
    target: str
    difference: float | None
    variant: str = ""
    why: str = ""


def sources() -> list[str]:
    """The types whose recorded default choice is not exact and free."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))["architectures"]
    return [each["model_type"] for each in found if each["runs"][0]["cost"] != "none" or not _exact(each["runs"][0])]


def targets() -> list[str]:
    """The types with a bias of their own, or one that a flag creates; encoders in the shape of decoders left out."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))["architectures"]
    runs = {each["model_type"]: [each["runs"][0], *([each["free"]] if each["free"] else [])] for each in found}
    skipped = {each["model_type"] for each in found if each["decoder_set"]} - {"gpt_neox"}
    return [
        name
        for name, its in runs.items()
        if name not in skipped and any(_exact(run) and run["route"] in ("native", "flag", "parallel") for run in its)
    ]


def _exact(run: Mapping[str, Any]) -> bool:
    return bool(run["status"] == "exact")


class Source:
    """A tiny random model of one type, in parts, and its logits."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.config, _ = shrink_config(default_config(model_type), LAYER)
        self.model = _model(self.config)
        _randomise(self.model)
        self.ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
        self.parts = parts_of(self.model, Architecture(self.config).blocks, self.ids)
        self.logits = _logits(self.model, self.ids)


def places_in(to: str) -> set[str]:
    """The parts that a class has under its default config or with one of its switches turned, of any block."""
    found: set[str] = set()
    ids = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(5))
    plain = shrink_config(default_config(to), LAYER)[0]
    switches = [name for name, value in vars(plain).items() if isinstance(value, bool) and SWITCH.search(name)]
    for change in ({}, *({name: not getattr(plain, name)} for name in switches)):
        try:
            config, _ = shrink_config(default_config(to), LAYER)
            for name, value in {**slot_flags(to), **change}.items():
                setattr(config, name, value)
            parts = parts_of(_model(config), Architecture(config).blocks, ids)
        except FAILURES:
            continue
        found |= {part for _, part in parts.whole}
    return found


def try_pair(source: Source, to: str, places: set[str]) -> Pair:
    """Map one tiny model to one class, in every layout, until one computes the same."""
    best: tuple[float, str] | None = None
    why = ""
    parts = {part for _, part in source.parts.whole} - {"head.weight"}
    if lost := sorted(parts - places):
        return Pair(source.model_type, to, None, "", f"no place for {', '.join(f'`{part}`' for part in lost[:2])}")
    for flags in _flag_variants(source, to):
        try:
            config = _target_config(source, to, flags)
            model = _model(config)
            parts = parts_of(model, Architecture(config).blocks, source.ids)
        except FAILURES as error:
            why = why or f"its class refuses the config: {_line(error)}"
            continue
        lost = source.parts.without_place_in(parts)
        if lost:
            why = why or f"no place for {lost}"
            continue
        for variant in source.parts.variants(parts):
            try:
                source.parts.write_to(parts, variant)
                difference = _apart(source.logits, _logits(model, source.ids))
            except FAILURES as error:
                why = why or _line(error)
                continue
            name = ", ".join([*variant, *(f"{key}={value}" for key, value in flags.items())])
            if best is None or difference < best[0]:
                best = (difference, name)
            if best[0] <= CLOSE:
                return Pair(source.model_type, to, *best)
    return Pair(source.model_type, to, None, "", why) if best is None else Pair(source.model_type, to, *best)


def _flag_variants(source: Source, to: str) -> Iterator[dict[str, Any]]:
    """The target's switches that the source's config does not decide: as they are, then each one turned."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    yield {}
    plain = vars(CONFIG_MAPPING[to]())
    slots = slot_flags(to)
    for name, value in plain.items():
        if isinstance(value, bool) and SWITCH.search(name) and name not in slots and name not in vars(source.config):
            yield {name: not value}


def _target_config(source: Source, to: str, flags: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given, config_class = vars(source.config), CONFIG_MAPPING[to]
    small = vars(shrink_config(default_config(to), LAYER)[0])
    # Its own names first; what the source's class calls otherwise is looked up by its aliases.
    aliases = getattr(source.config, "attribute_map", None) or {}
    values: dict[str, Any] = {}
    for name in small:
        if name.startswith("_") or name in ("model_type", "architectures", "transformers_version", "attribute_map"):
            continue
        names = [name, *(other for group in SYNONYMS if name in group for other in group)]
        found = next((other for other in (*names, *(aliases.get(n, n) for n in names)) if other in given), None)
        values[name] = given[found] if found is not None else small[name]
    values |= source.parts.structure(values) | slot_flags(to) | dict(flags)
    values.pop("dtype", None)
    with quiet_transformers():
        return config_class(**{key: value for key, value in values.items() if value is not None})


def _model(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return causal_lm_from_config(config).float().eval()


def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in {id(value): value for value in model.state_dict().values() if value.is_floating_point()}.values():
            spread = 0.1 if tensor.ndim < 2 else 1.5 / max(tensor.shape[-1], 1) ** 0.5
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator))


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), quiet_transformers():
        return model(input_ids=ids, use_cache=False).logits.float()


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Over the largest; a factor of all logits is no difference, as it goes into the head or the last norm."""
    scale = float((one * other).sum() / (other * other).sum().clamp_min(1e-12))
    found = float((one - scale * other).abs().max()) / max(float(one.abs().max()), 1e-12)
    return found if found == found else float("inf")


def _line(error: BaseException) -> str:
    problems = getattr(error, "problems", None)
    text = str(problems[0].found or error) if problems else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[-1].strip()[:120]


def _places(name: str) -> tuple[str, set[str]]:
    torch.set_num_threads(1)
    return name, places_in(name)


def _search(job: tuple[str, Mapping[str, set[str]]]) -> list[Pair]:
    torch.set_num_threads(1)
    name, others = job
    try:
        source = Source(name)
    except FAILURES as error:
        return [Pair(name, "", None, "", f"no tiny model of it in parts: {_line(error)}")]
    return [try_pair(source, other, places) for other, places in others.items() if other != name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these sources; prints, and writes nothing")
    parser.add_argument("--to", nargs="+", metavar="TYPE", help="these targets")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    start, pairs = time.monotonic(), []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "patcher.architectures.analysis"])
    with context.Pool(options.processes) as pool:
        places = dict(pool.imap(_places, options.to or targets()))
        print(f"{len(places)} targets looked at ({time.monotonic() - start:.0f} s)", flush=True)
        jobs = [(name, places) for name in options.only or sources()]
        for found in pool.imap_unordered(_search, jobs):
            pairs += found
            built = sorted((pair for pair in found if pair.difference is not None), key=_difference)
            print(
                f"{found[0].source}: {len(built)} of {len(found)} built ({time.monotonic() - start:.0f} s)", flush=True
            )
            for pair in built[:3]:
                print(f"    {pair.target} {pair.difference:.1e} ({pair.variant})", flush=True)
            if options.only and options.to:
                for pair in found:
                    print(f"    {pair}", flush=True)
    if not options.only and not options.to:
        from all_architectures import versions

        table = _table(pairs)
        if options.results == RESULTS:
            before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
            PAGE.write_text(before + START + table + END + rest.partition(END)[2], encoding="utf-8")
        head = {"versions": versions(), "seconds": round(time.monotonic() - start)}
        options.results.write_text(_as_json(pairs, head), encoding="utf-8")
    return 0


def _table(pairs: list[Pair]) -> str:
    """One line a source: how many targets could be built, and which was closest, or what has no place anywhere."""
    lines = [
        "",
        "| source | built | closest target | off by | how, or what has no place in most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for source in sorted({pair.source for pair in pairs}):
        own = [pair for pair in pairs if pair.source == source]
        built = sorted((pair for pair in own if pair.difference is not None), key=_difference)
        if built:
            best = f"`{built[0].target}` | {built[0].difference:.0e} | {built[0].variant}"
        else:
            reasons = [pair.why for pair in own]
            best = f"– | – | {min(reasons, key=_commonplace)}"
        lines.append(f"| `{source}` | {len(built)} of {len(own)} | {best} |")
    return "\n".join([*lines, "", ""])


def _commonplace(why: str) -> tuple[int, int]:
    """How little a reason says of the source itself: classes without experts have no place for any expert."""
    parts = ("experts_", "gate.weight", "down.weight", "up.weight", "k.weight", "q.weight", "embedding.weight")
    return sum(f"`{part}" in why for part in parts) + ("no place" not in why), len(why)


def _as_json(pairs: list[Pair], head: dict[str, Any]) -> str:
    """One line a source: target -> [difference, layout], and why -> the targets that were not built."""
    lines = []
    for source in sorted({pair.source for pair in pairs}):
        own = sorted((pair for pair in pairs if pair.source == source), key=lambda pair: pair.target)
        built = {pair.target: [pair.difference, pair.variant] for pair in own if pair.difference is not None}
        lost: dict[str, list[str]] = {}
        for pair in own:
            if pair.difference is None:
                lost.setdefault(pair.why, []).append(pair.target)
        lines.append(f'    "{source}": {json.dumps({"built": built, "not_built": lost})}')
    joined = ",\n".join(lines)
    return f'{json.dumps(head, indent=2)[:-2]},\n  "sources": {{\n{joined}\n  }}\n}}\n'


def _difference(pair: Pair) -> float:
    return float("inf") if pair.difference is None else pair.difference


if __name__ == "__main__":
    sys.exit(main())
