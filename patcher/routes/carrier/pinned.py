"""Experts that are too narrow for all coordinates share them: the k that every token uses hold a k-th each.

For that every token must use experts of known contents with one known weight. Two ways are tried, on a stand-in with
the real number of experts, of selected ones and of their groups:

1. a bias that only counts in the selection chooses the first k, while the router's zeros weigh all of them alike;
2. without one, 2k experts make two teams of equal contents. The rows of the router are +u for one and -u for the
   other, so each token uses one team or the other, whose members weigh the same.

In the second way a token is divided between the teams if u is at right angles to its residual up to what fp32 rounds
off. Of residuals in random directions this is one in 10^8; then all experts tie, and most selections take the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from patcher.routes.carrier.fills import Fill, gain
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.probe import Form, form_of, proven, quadratic, unclamped
from patcher.routes.carrier.trial import InsertionTrial

_BIAS, _SIZE = 8.0, 8.0
"""What is added to the selected experts' scores, which are at most 1; and the size of u."""


def find_pinned(
    trial: InsertionTrial, shapes: Mapping[str, tuple[int, ...]], hidden: int, selected: int
) -> Iterator[Form]:
    """Every content of the inserted block in which experts share the coordinates, proven on the stand-in.

    Args:
        trial: the extended stand-in, with all experts.
        shapes: of the real model's block, by name.
        hidden: width of the real residual stream.
        selected: how many experts a token uses.
    """
    plain_neutral = neutral_fills(trial)
    for sink in [name for name, tensor in trial.parameters.items() if tensor.ndim == 3]:
        experts, *shape = trial.parameters[sink].shape
        parent = sink.rpartition(".")[0]
        beside = [name for name in trial.parameters if name.startswith(parent + ".") and name != sink]
        for transposed in (False, True):
            rows, inner = shape[::-1] if transposed else shape
            if rows != trial.hidden or not _fits(shapes.get(sink, ()), hidden, selected, transposed=transposed):
                continue
            if shapes[sink][0] != experts:
                continue
            for fills, right in quadratic(trial, beside, inner):
                for holders, router in _selections(trial, shapes, parent, experts, selected):
                    # Some experts hand on what they get; a token must not be sent to one of them.
                    neutral = plain_neutral or neutral_fills(trial, router)
                    if neutral is None:
                        continue
                    plain = Fill("carrier", right=right, transposed=transposed, factor=gain(right, trial.hidden))
                    held = {
                        name: replace(fill, shares=selected, holders=holders)
                        for name, fill in {**fills, sink: plain}.items()
                    }
                    contents = {**neutral, **held, **router}
                    form = form_of(trial, contents, sink, held[sink], "norm", sink)
                    form = form and unclamped(trial, form, hidden)
                    if form is not None and (found := proven(trial, form)) is not None:
                        yield found


def _fits(shape: tuple[int, ...], hidden: int, selected: int, *, transposed: bool) -> bool:
    """Whether a share of the coordinates has two neurons each in a real expert."""
    return len(shape) == 3 and -(-hidden // selected) <= shape[-2 if transposed else -1] // 2


def _selections(
    trial: InsertionTrial, shapes: Mapping[str, tuple[int, ...]], parent: str, experts: int, selected: int
) -> Iterator[tuple[int, dict[str, Fill]]]:
    """How many experts hold anything, and what makes every token use a full set of them."""
    around = parent.rpartition(".")[0]
    near = {
        name: tuple(tensor.shape)
        for name, tensor in trial.parameters.items()
        if name.startswith(around) and not name.startswith(parent + ".")
    }
    for name, shape in near.items():
        if (
            name.endswith("bias")
            and shape == shapes.get(name)
            and shape[-1] >= experts
            and shape[-1] == trial.parameters[name].numel()
        ):
            yield selected, {name: Fill("pinned", _BIAS, holders=selected)}
    for name, shape in near.items():
        if shape == (experts, trial.hidden) and 2 * selected <= experts:
            yield 2 * selected, {name: Fill("opposed", _SIZE, shares=selected)}
