"""What the workers share: the turns, and the file of results. It imports nothing that a stack might not have."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def take_turns(generate: Mapping[str, Callable[[], int]], request: Mapping[str, Any]) -> dict[str, list[float]]:
    """New tokens a second of every variant, ``repeats`` times; each turn begins with another one.

    Raises:
        RuntimeError: a variant made fewer tokens than were asked for.
    """
    found: dict[str, list[float]] = {name: [] for name in generate}
    order = list(generate)
    for name in order:
        generate[name]()
    for _ in range(request["repeats"]):
        for name in order:
            start = time.perf_counter()
            made = generate[name]()
            found[name].append(made / (time.perf_counter() - start))
            if made != request["tokens"]:
                raise RuntimeError(f"{name} made {made} tokens instead of {request['tokens']}")
        order.append(order.pop(0))
    return found


def write(request: Mapping[str, Any], about: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write what is known so far."""
    Path(request["results"]).write_text(json.dumps({"about": about, "routes": results}), encoding="utf-8")


def tried(measure: Callable[[], dict[str, list[float]]]) -> dict[str, Any]:
    """``{"rates": ...}``, or why there are none: a stack stops a model in exceptions of many kinds."""
    try:
        return {"rates": measure()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
