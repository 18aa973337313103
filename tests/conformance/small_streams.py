"""Every text causal LM of the installed transformers with embeddings of RMS 0.02, as real ones have: what a default
build chooses at the first block, in the middle and at the last, and whether the copy is the hook.

``python tests/conformance/small_streams.py`` runs those whose default route is a carrier, prints a line for each, and
writes docs/small-streams.json; ``--all`` runs every class, ``--only ernie4_5 olmo`` some of them, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "docs" / "architectures.json"
RESULTS = ROOT / "docs" / "small-streams.json"
COMMAND = "python tests/conformance/small_streams.py"
EMBEDDING_RMS = 0.02


@dataclass(frozen=True)
class Outcome:
    """One layer of one class.

    Attributes:
        place: ``first``, ``middle`` or ``last``.
        status: ``exact``, ``refused``, ``wrong`` (the copy is not what the hook is) or ``failed``.
        route: what the build would write; with the config keys that a carrier's content needs.
        reason: of a refusal or a failure, in words.
        difference: largest difference of a log-probability from the hook.
        effect: largest difference that the hook makes.
        constant: what was predicted, as ``steering.json`` records it.
    """

    model_type: str
    place: str
    layer: int
    status: str
    route: str = ""
    reason: str = ""
    difference: float | None = None
    effect: float | None = None
    constant: dict[str, Any] | None = None


def outcome(model_type: str, place: str) -> Outcome:
    """Build as the recipe of a user would, up to the copy; then compare it with a hook on the base."""
    from support.default_configs import default_config
    from support.small_stream_builds import built
    from support.tiny_models import default_checkpoint

    from patcher.architectures.config_keys import block_count
    from patcher.errors import PatchModelError

    count = block_count(default_config(model_type))
    layer = {"first": 0, "middle": count // 2, "last": count - 1}[place]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            stand_in = default_checkpoint(scratch / "base", model_type, layer, embedding_rms=EMBEDDING_RMS)
        except Exception as error:
            return Outcome(model_type, place, layer, "failed", reason=f"no tiny model: {str(error)[:200]}")
        try:
            found = built(scratch, stand_in)
        except PatchModelError as error:
            problem = error.problems[0]
            status = "refused" if error.code in ("no_route", "exact") else "failed"
            return Outcome(
                model_type, place, stand_in, status, reason=_of_carrier(str(problem.found or problem.message))
            )
        except Exception as error:
            return Outcome(model_type, place, stand_in, "failed", reason=f"{type(error).__name__}: {str(error)[:200]}")
    flags = [key for key, value in found.plan.config_changes.items() if "bias" in key and value is True]
    constant = None if found.plan.constant is None else found.plan.constant.as_json()
    route = " + ".join([found.plan.route, *flags])
    status = "exact" if found.passes else "wrong"
    return Outcome(model_type, place, stand_in, status, route, found.why, found.difference, found.effect, constant)


def _of_carrier(reasons: str) -> str:
    """Of the reasons against every route, the one against the carrier."""
    return (reasons.partition("carrier: ")[2] or reasons).partition("; rank_one: ")[0][:500]


def names_of_carriers() -> list[str]:
    """The classes whose default route is a carrier, by the table of all."""
    known = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))["architectures"]
    return [record["model_type"] for record in known if record["runs"][0]["route"] == "carrier"]


def outcomes(names: list[str]) -> Iterator[Outcome]:
    for name in names:
        for place in ("first", "middle", "last"):
            found = outcome(name, place)
            numbers = "" if found.difference is None else f" {found.difference:.1e} of {found.effect:.2g}"
            worst = "" if found.constant is None else f" predicted {found.constant['worst']}"
            print(f"{name} {place}: {found.status} {found.route}{numbers}{worst} {found.reason}", flush=True)
            yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types; writes nothing")
    parser.add_argument("--all", action="store_true", help="also the classes whose default route has no constant")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.all:
        from all_architectures import model_types

        names = model_types()
    else:
        names = options.only or names_of_carriers()
    found = list(outcomes(names))
    print(dict(Counter(each.status for each in found)))
    if not options.only:
        lines = ",\n".join(f"    {json.dumps(asdict(each))}" for each in found)
        command = f"{COMMAND} --all" if options.all else COMMAND
        head = json.dumps({"command": command, "embedding_rms": EMBEDDING_RMS}, indent=2)[:-2]
        options.results.write_text(f'{head},\n  "outcomes": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
