"""The oldest version of each stack that a route was run in.

``oldest.json`` holds, for the class that reads a copy, the oldest version that was run with such a copy and computed
what the hook computes. ``slot`` stands for the class's own bias, ``loads`` for weights that any version of the class
reads. Some older versions were tried as well: docs/stacks.md says what they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

OLDEST = Path(__file__).with_name("oldest.json")


def oldest_versions(architecture: str, stacks: Mapping[str, str], *, own_bias: bool) -> dict[str, str]:
    """Stack -> version, of those in ``stacks`` (name -> native, backend or no) that were run with such a copy.

    A class that was measured with its bias also loads without it, so that version holds for other copies as well.

    Args:
        architecture: the class that reads the copy.
        own_bias: whether the copy uses the class's own bias.
    """
    measured = json.loads(OLDEST.read_text(encoding="utf-8")).get(architecture, {})
    known = measured.get("slot", {})
    if not own_bias:
        known = measured.get("loads", known)
    return {stack: version for stack, version in known.items() if stacks.get(stack, "no") != "no"}
