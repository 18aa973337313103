"""What a person sees at the end of a build: short tables, and two lines that load the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patcher.build.result import BuildResult
from patcher.build.texts import NOT_DRAWN
from patcher.card.written import loading_lines
from patcher.cli.seconds import seconds_line
from patcher.cli.tables import console_for, empty_table
from patcher.evaluate.guard import beyond_guard
from patcher.patched.evaluation import Evaluation, Guard
from patcher.patched.route import Fit, RecordedRoute
from patcher.patched.schema import Patch, Remote, Verification
from patcher.report.pictures.drawing import can_draw
from patcher.routes.in_words import constant_in_words, route_in_words

NUMBERS = ("max_abs_logprob_diff", "tolerance", "steering_effect", "vector_rel_error")
_COLOURS = {"passed": "green", "truncated": "green", "structural": "yellow", "not_checked": "yellow"}
COLUMNS = ("max |Δ log-prob|", "tolerance", "effect", "residual error")


def print_build(result: BuildResult, *, to_stderr: bool, linked: bool = False) -> None:
    """The report of a finished build."""
    console = console_for(to_stderr=to_stderr)
    print_patch(result.patch, console)
    if result.output is None:
        remote = result.patch.remote or Remote()
        console.print(
            f"of the base, {len(remote.downloaded)} of {remote.weight_files} weight files were needed here: "
            f"{size_of(remote.bytes_downloaded or 0)} of {size_of(remote.bytes_of_weights or 0)}",
            markup=False,
        )
    if linked:
        count = result.placed["files"].get("hard_link", {"count": 0})["count"]
        why = f" ({result.placed['not_linked']})" if result.placed["not_linked"] else ""
        console.print(f"hard links to the base's files: {count}{why}", markup=False)
    seconds = seconds_line(result.timings, result.timing_parts)
    console.print(f"[dim]{seconds}; peak memory {result.peak_rss_bytes / 2**20:.0f} MiB; "
                  f"{result.bytes_written / 2**20:.1f} MiB written[/]", soft_wrap=True)  # fmt: skip
    if result.output is not None:
        _print_folder(result.output, result.patch, console)
    if result.push:
        how = f"method {result.push['method']}, {result.push['bytes_uploaded']:,} bytes uploaded"
        nowhere = "; no folder was written here" if result.output is None else ""
        console.print(f"published: [bold]{result.push['url']}[/] ({how}){nowhere}", soft_wrap=True)


def _print_folder(folder: Path, patch: Patch, console: Console) -> None:
    console.print(f"\nwritten: [bold]{folder}[/]", soft_wrap=True)
    console.print("load it:")
    for line in loading_lines(patch, str(folder)):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if patch.evaluation is not None and not can_draw():
        console.print(f"note: {NOT_DRAWN}", markup=False)


def size_of(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def print_patch(patch: Patch, console: Console) -> None:
    """What was written, and how it compares: the route, the edits, the proof, the effect, notes."""
    route = patch.route
    console.print(
        f"[bold]route[/] {route.name} ({'exact' if route.exact else 'fitted'}, "
        f"run-time cost: {route.cost}) in {route.architecture}"
    )
    for line in said_of_route(route):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(_edit_table(patch))
    for line in patch.said_of_pairs:
        console.print(line, markup=False)
    if route.fit:
        console.print(_fit(route.fit))
    print_verification(patch.verification, console)
    if patch.evaluation:
        _print_evaluation(patch.evaluation, console)
    for note in (*route.warnings, *route.advice, *patch.notes):
        console.print(f"note: {note}", markup=False)


def said_of_route(route: RecordedRoute) -> list[str]:
    """What its constant is off by, what would be next, and what was tried first, a line each."""
    lines = [f"constant: {constant_in_words(route.constant)}"] if route.exact and route.name else []
    after = route.next_best
    if after is not None:
        shown = route_in_words(after.name, after.cost, after.stacks, after.constant, exact=after.exact)
        lines.append(f"next best: {shown}")
    lines += [f"tried first: {failed.said}" for failed in route.failed_before]
    return lines


def print_verification(
    entries: Sequence[Verification],
    console: Console | None = None,
    *,
    to_stderr: bool = False,
    every_check: bool = False,
) -> None:
    """One line a stack, and all checks if asked."""
    console = console or console_for(to_stderr=to_stderr)
    # A fitted copy is held to its share of the KL divergence, not to the tolerance.
    fitted = any(entry.kl_share is not None for entry in entries)
    table = empty_table("verified in", "", *COLUMNS, *(["KL share (limit)"] if fitted else []))
    for entry in entries:
        numbers = {key: _shown(getattr(entry, key)) for key in NUMBERS}
        share = entry.kl_share
        if share is not None:
            numbers["tolerance"] = "-"
        table.add_row(
            f"{entry.stack} {entry.version or ''}",
            f"[{_COLOURS.get(entry.status, 'red')}]{entry.status.replace('_', ' ')}[/]",
            *numbers.values(),
            *([f"{_shown(share)} ({_shown(_limit(entry, 'KL of the fit'))})"] if share is not None else []),
        )
        images = entry.images
        if images is not None and images.checked:
            table.add_row("  with an image", "", *(_shown(getattr(images, key)) for key in NUMBERS[:3]), "-")
    console.print(table)
    for entry in entries:
        if entry.images is not None and not entry.images.checked:
            console.print(f"not checked with an image: {entry.images.why}", markup=False, soft_wrap=True)
        if entry.note:
            remedy = f" ({entry.remedy})" if entry.remedy else ""
            console.print(f"{entry.stack}: {entry.note}{remedy}", markup=False, soft_wrap=True)
    if not every_check:
        unmade = [check for entry in entries for check in entry.checks if check.passed is None]
        unmade = [check for check in unmade if check.name != "image prompt"]
        if unmade:
            console.print(
                "not applicable: " + "; ".join(f"{check.name} ({check.note})" for check in unmade),
                markup=False,
                style="dim",
            )
        return
    words = {True: "[green]passed[/]", False: "[red]failed[/]", None: "not made"}
    for entry in entries:
        checks = empty_table(f"check in {entry.stack}", "result", "value", "limit", "")
        for check in entry.checks:
            value, limit = _shown(check.value), _shown(check.limit)
            checks.add_row(check.name, words[check.passed], value, limit, escape(check.note))
        if entry.checks:
            console.print(checks)


def _limit(entry: Verification, name: str) -> float | None:
    return next((check.limit for check in entry.checks if check.name == name), None)


def _fit(fit: Fit) -> Table:
    """What the fit is off by on held-out calibration text."""
    table = empty_table("fit, layer", "mean error", "95 % below", "cosine", "tokens", "held out", "KL ratio")
    for layer, found in fit.layers.items():
        table.add_row(
            layer,
            f"{found.error_mean:.1%}",
            f"{found.error_p95:.1%}",
            _shown(found.cosine),
            str(found.tokens),
            str(found.held_out_tokens),
            _shown(fit.ratio),
        )
    return table


def _edit_table(patch: Patch) -> Table:
    """One line an edit: where it is, and how large beside the residual stream."""
    table = empty_table("vector", "layer", "coefficient", "norm", "residual norm", "ratio", "stored error")
    for edit in patch.edits:
        layer, residual = edit.layer, edit.residual_norm
        place = patch.route.in_copy(layer)
        table.add_row(
            edit.name,
            str(layer) if place == layer else f"{layer} ({place} in the copy)",
            f"{edit.coefficient:g}",
            _shown(edit.norm),
            _shown(residual),
            f"{edit.norm / residual:.0%}" if residual and edit.norm else "-",
            _shown(edit.stored_rel_error),
        )
    return table


def _print_evaluation(evaluation: Evaluation, console: Console) -> None:
    table = empty_table("measured effect", "base", "steered", "negative", "random", "")
    for result in evaluation.per_vector:
        table.add_row(
            f"{result.vector}: {str(result.measure).replace('_', ' ')}, {result.items}",
            f"{result.base:.3f}",
            f"{result.steered:.3f}",
            "-" if result.negative is None else f"{result.negative:.3f}",
            f"{min(result.controls):.3f} to {max(result.controls):.3f}" if result.controls else "-",
            _beyond(result.distinguishable),
        )
    if evaluation.per_vector:
        console.print(table)
    for result in evaluation.per_vector:
        if None not in (result.shift, result.shift_low, result.shift_high):
            interval = f"{result.shift_low:+.3f} to {result.shift_high:+.3f}"
            console.print(f"{result.vector}: the shift is {result.shift:+.3f} (95 % interval {interval})")
    _print_separation(evaluation, console)
    for result in evaluation.per_vector:
        for note in result.notes:
            console.print(f"[yellow]warning[/] vector {result.vector}: {note}")
    for name, values in (evaluation.perplexity or {}).items():
        console.print(f"perplexity, {name.replace('_', '-')} text: {values.base:.2f} -> {values.steered:.2f}")
    if evaluation.guard:
        _print_guard(evaluation.guard, console)
    for result in evaluation.per_vector:
        if result.prompting:
            alone, both = result.prompting.alone, result.prompting.steered
            console.print(f"{result.vector}, system prompt alone: {alone:.3f}, with steering: {both:.3f}")
    if evaluation.lm_eval:
        tasks = empty_table("lm-eval task", "metric", "base", "copy")
        for row in evaluation.lm_eval:
            tasks.add_row(row.task, row.metric, _shown(row.base), _shown(row.patched))
        console.print(tasks)
    if evaluation.generations:
        completions = empty_table("prompt", "base", "steered")
        for entry in evaluation.generations:
            texts = {variant.name: " ".join(variant.text.split()) for variant in entry.variants}
            completions.add_row(*(escape(text) for text in (entry.prompt, texts["base"], texts["steered"])))
        console.print(completions)


def _beyond(distinguishable: bool | None) -> str:
    words = {True: "[green]beyond random[/]", False: "[red]not beyond random[/]", None: "[yellow]not compared[/]"}
    return words[distinguishable]


def _print_separation(evaluation: Evaluation, console: Console) -> None:
    table = empty_table("held-out texts of two lists", "layer", "d'", "random", "ordered", "random", "")
    for result in evaluation.per_vector:
        for found in result.separation:
            table.add_row(
                f"{result.vector}: {found.positives} positives, {found.negatives} negatives",
                str(found.layer),
                _shown(found.d_prime),
                f"up to {_shown(found.random_d_prime)}",
                f"{found.auc:.0%}",
                f"up to {found.random_auc:.0%}",
                {True: "[green]beyond random[/]", False: "[red]not beyond random[/]", None: "too few to tell"}[
                    found.beyond_random
                ],
            )
    if table.row_count:
        console.print(table)
        console.print("that the lists lie apart along the vector does not say that adding it steers")


def _print_guard(guard: Guard, console: Console) -> None:
    limit = "" if guard.kl_limit is None else f" (guard {guard.kl_limit:g})"
    console.print(
        f"neutral text: KL {guard.kl:.3g} nats a token{limit}, "
        f"perplexity {guard.perplexity.base:.2f} -> {guard.perplexity.steered:.2f}"
    )
    if not guard.within:
        console.print(f"[yellow]warning[/] {beyond_guard(guard)}")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}"
