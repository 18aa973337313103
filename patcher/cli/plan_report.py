"""What a person sees of ``--dry-run``: the route, the vectors, and what would be written."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.build.planning import BuildPlan
from patcher.build.remote_planning import RemoteBuildPlan
from patcher.cli.report import size_of
from patcher.cli.tables import console_for, empty_table
from patcher.routes.in_words import constant_in_words, route_in_words
from patcher.routes.plan import Plan, TensorWrite
from patcher.vectors.both_lists import Texts


def print_plan(planned: BuildPlan) -> None:
    """The report of ``--dry-run``."""
    console = console_for()
    plan = planned.plan
    console.print(f"[bold]model[/] {planned.source.name}: {plan.architecture}, "
                  f"{planned.architecture.block_count} blocks, hidden {planned.architecture.hidden}")  # fmt: skip
    kind = "exact" if plan.exact else "fitted"
    console.print(f"[bold]route[/] {plan.route} ({kind}, run-time cost: {plan.cost}): {plan.reason}", soft_wrap=True)
    for name, text in said_of_plan(plan):
        console.print(f"  {name}: {text}", markup=False, soft_wrap=True)
    if plan.architecture != planned.architecture.class_name:
        console.print(f"  the copy is loaded as {plan.architecture}", markup=False)
    table = empty_table("vector", "method", "layer", "read at", "coefficient", "scale", "pairs", "held out")
    for entry in planned.prepared:
        for layer in entry.layers:
            spec = entry.spec
            table.add_row(
                spec.name,
                spec.method,
                str(layer),
                "file" if spec.method == "file" else str(entry.read_layers[layer]),
                f"{spec.factor:g}",
                str(spec.scale),
                _counted(entry.pair_count, None if entry.lists is None else entry.lists.used),
                _counted(entry.held_out_count, None if entry.lists is None else entry.lists.held_out),
            )
    console.print(table)
    for entry in planned.prepared:
        used, held_out = entry.pair_count, entry.held_out_count
        if held_out:
            console.print(
                f"  `{entry.spec.name}` is made of {used} of {used + held_out} {'texts' if entry.lists else 'pairs'}"
                + (", and after the measure of all of them (`refit`)" if entry.spec.refit else ""),
                markup=False,
            )
    for line in written_by(plan):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    stacks = ", ".join(f"{stack} {support}" for stack, support in plan.stacks.items())
    console.print(f"  read by: {stacks}")
    for note in (*plan.warnings, *plan.advice, *planned.notes):
        console.print(f"note: {note}", markup=False)
    console.print(f"would write: [bold]{planned.output}[/]", soft_wrap=True)
    if isinstance(planned, RemoteBuildPlan):
        found = planned.download
        console.print(
            f"on the Hub, with no folder here; {len(found['files'])} of {found['of_files']} weight files would be "
            f"downloaded: {size_of(found['bytes'])} of {size_of(found['of_bytes'])}",
            markup=False,
            soft_wrap=True,
        )


def said_of_plan(plan: Plan) -> list[tuple[str, str]]:
    """What the constant of an exact route is off by, and what would be next."""
    after = plan.next_best
    shown = (
        "none"
        if after is None
        else route_in_words(after.route, after.cost, after.stacks, after.constant, exact=after.exact)
    )
    constant = [("constant", constant_in_words(plan.constant))] if plan.exact else []
    streams = [("streams", f"{plan.streams} residual streams: the vector is read of their mean and added to each")]
    return [*constant, *(streams if plan.streams > 1 else []), ("next best", shown)]


def _counted(pairs: int, texts: Texts | None) -> str:
    return str(pairs) if texts is None else f"{len(texts.positive)} and {len(texts.negative)} texts"


def written_by(plan: Plan) -> list[str]:
    """What a plan writes, a line each; long lists are counted."""
    lines = []
    for tensor in plan.carriers[:8]:
        verb = "add to" if tensor.kind == "added" else "create"
        lines.append(f"{verb} {tensor.name} {list(tensor.shape)} {tensor.dtype}")
    if len(plan.carriers) > 8:
        lines.append(f"... and {len(plan.carriers) - 8} more that hold the vector")
    rest = [tensor for tensor in plan.tensors if tensor.layer is None]
    zeros = sum(tensor.make is None for tensor in rest)
    if zeros:
        lines.append(f"create {zeros} tensor{'s' * (zeros > 1)} of zeros that the class demands")
    if len(rest) > zeros:
        lines.append(f"create {len(rest) - zeros} others, such as {rest_example(rest)}")
    if plan.renamed:
        old, new = next(iter(plan.renamed.items()))
        lines.append(f"rename {len(plan.renamed)} tensors, such as {old} to {new}")
    for name, order in plan.grown.items():
        more = len(order.order) - order.stored
        slices, blocks = ("a slice", "block") if more == 1 else (f"{more} slices", "blocks")
        lines.append(f"widen {name} by {slices} of zeros for the inserted {blocks}")
    if plan.dropped:
        lines.append(f"leave out or replace {len(plan.dropped)} of the base's, such as {min(plan.dropped)}")
    if plan.config is not None:
        lines.append(f"write config.json anew, model_type {plan.config.get('model_type')}")
    for key, value in plan.config_changes.items():
        shown = str(value)
        lines.append(f"config.json: {key} = {shown if len(shown) <= 80 else shown[:77] + '...'}")
    lines += [f"tokenizer_config.json: {key} = {value}" for key, value in plan.tokenizer_changes.items()]
    return lines


def rest_example(rest: Sequence[TensorWrite]) -> str:
    first = next(tensor for tensor in rest if tensor.make is not None)
    return f"{first.name} ({first.holds})"
