"""Write the quickstart's contrast pairs and neutral texts: ``python -m tools.demo.write_pairs``."""

from __future__ import annotations

import json

from patcher.demo import demo_folder
from tools.demo.grammar import PAIRS_SEED, Writer, questions

COUNT = 120
PASSAGES = 60


def pairs_text() -> str:
    """The content of `pairs.jsonl`: CAA rows whose matching answer is that of a positive opinion."""
    rows = (json.dumps(question.as_caa(), ensure_ascii=False) for question in questions(PAIRS_SEED, COUNT))
    return "".join(f"{row}\n" for row in rows)


def neutral_text() -> str:
    """The content of `neutral.txt`: passages without any opinion, one a line."""
    writer = Writer(PAIRS_SEED)
    return "".join(f"{writer.notes(3)}\n" for _ in range(PASSAGES))


def main() -> None:
    """Write the files."""
    path = demo_folder() / "pairs.jsonl"
    path.write_text(pairs_text(), encoding="utf-8")
    print(f"{COUNT} pairs written to {path}")
    neutral = demo_folder() / "neutral.txt"
    neutral.write_text(neutral_text(), encoding="utf-8")
    print(f"{PASSAGES} passages written to {neutral}")


if __name__ == "__main__":
    main()
