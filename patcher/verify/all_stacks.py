"""Verification in any of the stock stacks: one hook reference, one entry of ``verification`` a stack."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patcher.architectures.config_keys import stated_positions
from patcher.architectures.decoder import decoder_part
from patcher.checkpoint.folder import CheckpointFolder
from patcher.disk.json_files import read_json_object
from patcher.errors import OutsideError
from patcher.patched.schema import Patch
from patcher.patched.stored import read_stored
from patcher.stacks.environments import Environment, Missing, find
from patcher.stacks.names import LLAMA_CPP, TRANSFORMERS, VLLM
from patcher.verify.checks import Comparison
from patcher.verify.comparison import Run, noise_floor
from patcher.verify.llama_cpp_stack import llama_cpp_process
from patcher.verify.stack_comparison import Expected, StackComparison, compare_in_stack
from patcher.verify.stack_jobs import MOST_TOKENS, Process, StackJob, StackRun, run_jobs
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import GREEDY_TOKENS, run_reference, verify_in_transformers
from patcher.verify.vllm_stack import vllm_process

ONE_PROCESS_BYTES = 2 << 30
REFERENCE = "the base with a forward hook in transformers, adding the vector that the file stores"
FITTED_REFERENCE = "the same folder in transformers, whose fit is held against the hook there"


PROCESSES: Mapping[str, Callable[[Environment], Process]] = {VLLM: vllm_process, LLAMA_CPP: llama_cpp_process}
"""Stack -> how its process is started; a new stack is one module, one runner and one entry."""


def verify_in_stacks(
    stacks: Sequence[str],
    folder: Path,
    base: Path,
    patch: Patch,
    terms: VerifyTerms,
    *,
    places: Mapping[str, str] | None = None,
    after_transformers: Callable[[Mapping[str, Any]], None] = lambda _entry: None,
) -> list[dict[str, Any]]:
    """Verify a folder in each of the stacks.

    Args:
        stacks: names; what is not installed gets an entry ``not_checked``.
        folder: the finished folder.
        base: the base checkpoint, adapter merged.
        patch: its ``edits`` and ``route`` say what is where.
        places: stack -> where it is installed, if not where the tool looks.
        after_transformers: called with the entry of transformers before any other stack is run.

    Returns:
        Entries as in ``steering.json``'s ``verification``, in the order of ``stacks``.

    Raises:
        InputError: a path that was given for a stack does not hold it.
        OutsideError: the memory or stock software failed in a way that says nothing of the folder.
    """
    found = {stack: find(stack, (places or {}).get(stack)) for stack in stacks}
    kept: list[Run] = []
    entries: dict[str, dict[str, Any]] = {}
    exact = patch.route.exact
    others = [where for stack, where in found.items() if stack != TRANSFORMERS and isinstance(where, Environment)]
    if TRANSFORMERS in found or (others and not exact):
        keep = (lambda *runs: kept.extend(runs)) if others else None
        entry = verify_in_transformers(folder, base, patch, terms, keep=keep)
        entries[TRANSFORMERS] = entry
        after_transformers(entry)
    if others and not kept:
        terms.say("the base under a hook, in transformers")
        kept.append(run_reference(folder, base, patch, terms))
    for stack, where in found.items():
        if stack == TRANSFORMERS:
            continue
        if isinstance(where, Missing):
            entries[stack] = not_checked(stack, None, f"not installed: {where.why}", where.remedy)
        elif not exact and len(kept) < 2:
            entries[stack] = not_checked(
                stack, where.version, "transformers cannot run the folder, so nothing is known"
            )
        else:
            terms.say(f"verifying: {stack}")
            entries[stack] = _in_stack(where, folder, base, patch, kept, terms)
    return [entries[stack] for stack in stacks]


def _in_stack(
    where: Environment, folder: Path, base: Path, patch: Patch, kept: Sequence[Run], terms: VerifyTerms
) -> dict[str, Any]:
    exact = patch.route.exact
    texts: list[str] = kept[0].facts.get("texts", [])
    ids, expected = _expected(kept, exact=exact, from_texts=bool(texts))
    positions = stated_positions(decoder_part(read_json_object(base / "config.json")))
    top = min(MOST_TOKENS, expected.plain[0].shape[-1])
    jobs = [
        StackJob(label, str(place.resolve()), ids, ids[0], GREEDY_TOKENS, texts, top, positions)
        for label, place in (("base", base), ("copy", folder))
    ]
    process = PROCESSES[where.stack](where)
    runs: dict[str, StackRun] = {}
    with tempfile.TemporaryDirectory(prefix="patch-model-verify-", dir=terms.scratch) as name:
        # Two large models in a row need not fit into one process: not every stack gives back all memory.
        together = _fp32_bytes(folder) <= ONE_PROCESS_BYTES
        for number, batch in enumerate([jobs] if together else [[job] for job in jobs]):
            place = Path(name) / str(number)
            runs |= run_jobs(process, batch, place, trust_remote_code=terms.trust_remote_code, say=terms.say)
    run, of_base = runs["copy"], runs["base"]
    hidden = [
        (str(folder.resolve()), "DIR"),
        (str(base.resolve()), "BASE"),
        (str(where.python.parent.parent), "ENVIRONMENT"),
        (name, "SCRATCH"),
    ]
    if run.error is not None and of_base.error is not None:
        note = f"it runs neither the folder nor the base: {_without_paths(run.error, hidden)}"
        return not_checked(where.stack, run.version, note, detail=run.detail)
    off = max(layer.rel_error for layer in read_stored(folder, patch).values())
    result = compare_in_stack(run, of_base, expected, tolerance=terms.spec.tolerance, stored_error=off)
    entry = _entry(where, run, result, exact=exact)
    for check in entry["checks"]:
        check["note"] = _without_paths(check["note"], hidden)
    if of_base.error is not None:
        entry["note"] = f"the base itself does not run there: {_without_paths(of_base.error, hidden)}"
    return entry


def _expected(kept: Sequence[Run], *, exact: bool, from_texts: bool) -> tuple[list[list[int]], Expected]:
    reference = kept[0]
    ids = [list(row) for row in reference.facts["ids"]]
    count = range(len(ids))
    truth, label = (reference, "hook") if exact else (kept[1], "candidate")
    return ids, Expected(
        plain=[reference.tensors[f"base/{number}"] for number in count],
        steered=[truth.tensors[f"{label}/{number}"] for number in count],
        noise_floor=noise_floor(reference, len(ids)),
        greedy=truth.facts.get("greedy", ()),
        greedy_logprobs=truth.tensors.get("greedy"),
        text_ids=ids if from_texts else (),
    )


def _entry(where: Environment, run: StackRun, result: StackComparison, *, exact: bool) -> dict[str, Any]:
    status = ("not_checked" if result.blind else "passed") if result.passed else "failed"
    reference = REFERENCE if exact else FITTED_REFERENCE
    return result.entry(where.stack, run.version, status, reference, detail=run.detail, note=result.blind)


def not_checked(stack: str, version: str | None, why: str, remedy: str = "", *, detail: str = "") -> dict[str, Any]:
    """The entry of a stack that was not run, or could not be."""
    return Comparison().entry(stack, version, "not_checked", None, detail=detail, note=why, remedy=remedy)


def require_installed(stacks: Sequence[str], where: str) -> None:
    """Refuse before any work what could not be verified after it.

    Raises:
        OutsideError: a stack is not installed.
        InputError: a variable names a path that does not hold it.
    """
    for stack in stacks:
        found = find(stack)
        if isinstance(found, Missing):
            raise OutsideError(
                f"{stack} is not installed", where=where, found=found.why, remedy=found.remedy, code="no_stack"
            )


def _without_paths(text: str, hidden: Sequence[tuple[str, str]]) -> str:
    for path, word in hidden:
        text = text.replace(path, word)
    return text


def _fp32_bytes(folder: Path) -> int:
    return 4 * sum(math.prod(info.shape) for info in CheckpointFolder(folder).tensors.values())
