"""Texts that finished folders are compared on. No recipe uses them."""

PROBES: tuple[str, ...] = (
    "The ferry leaves the harbour at six, and by the time the lighthouse is out of sight the kitchen is open.",
    "In 1871 the committee measured the river twice: 412 metres in spring, 388 in a dry August.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "She asked him, quietly, whether the piano in the back room had ever been in tune, or played.",
    "Water boils at a lower temperature in the mountains because the air above it weighs less there",
    "1. Wash the rice. 2. Heat the oil. 3. Add the onions, and stir.",
)
PROBE_TOKENS = 12
"""To how many tokens they are cut where stock transformers alone runs them, so that one batch takes them all."""
