"""The quickstart's demonstration: a tiny language model, its contrast pairs and its recipe.

Everything here is made by this package: the text by `grammar`, the model by `python -m tools.demo.train`.
"""

from pathlib import Path


def demo_folder() -> Path:
    """Return the folder that holds the demonstration's `model`, `pairs.jsonl` and `quickstart.yaml`."""
    return Path(__file__).parent
