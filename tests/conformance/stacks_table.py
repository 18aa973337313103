"""The measured table of docs/stacks.md: ``python tests/conformance/stacks_table.py`` writes it again (ten minutes)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.llama_cpp_converter import with_tiny_tokenizers
from support.stack_models import CASES
from support.stack_runs import Ran, process_of, run_all
from test_llama_cpp import NAMES as IN_LLAMA_CPP
from test_vllm import NAMES as IN_VLLM

from patcher.stacks.environments import Environment, find
from patcher.verify.llama_cpp_stack import llama_cpp_process

PAGE = Path(__file__).parents[2] / "docs" / "stacks.md"
FIRST = "| architecture |"
HEAD = (
    f"{FIRST} route | class of the copy | effect | vLLM | own error | read by | llama.cpp | own error |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(name: str, vllm: Ran, llama_cpp: Ran) -> str:
    case, cells = CASES[name], []
    effect = 0.0
    for ran in (vllm, llama_cpp):
        if f"{name}-copy" not in ran.runs or ran.runs[f"{name}-copy"].error is not None:
            cells += ["not run", "–"] if ran is llama_cpp else ["not run", "–", "–"]
            continue
        result = ran.compared(name)
        effect = result.steering_effect
        cells += [f"{result.max_abs_logprob_diff:.1e}", f"{result.own_error:.1e}"]
        if ran is vllm:
            reader = ran.runs[f"{name}-copy"].facts["class"]
            cells.append("its Transformers backend" if reader.startswith("Transformers") else "its own class")
    return f"| {name} | `{case.route}` | {case.reader} | {effect:.2g} | " + " | ".join(cells) + " |"


def main() -> None:
    found = find("llama.cpp")
    assert isinstance(found, Environment), found
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        vllm = run_all(place / "vllm", [*IN_VLLM, "phi", "nemotron"], (), process_of("vllm"))
        place.joinpath("llama.cpp").mkdir()
        converter = with_tiny_tokenizers(found, place)
        llama_cpp = run_all(place / "llama.cpp", IN_LLAMA_CPP, (), llama_cpp_process(converter))
    lines = [HEAD, *(row(name, vllm, llama_cpp) for name in CASES)]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    kept = [line for line in page if not _of_the_table(line)]
    place_of = next(number for number, line in enumerate(page) if line.startswith((FIRST, "@TABLE@")))
    kept[place_of:place_of] = lines
    PAGE.write_text("\n".join(kept) + "\n", encoding="utf-8")


def _of_the_table(line: str) -> bool:
    return line.startswith((FIRST, "@TABLE@", *(f"| {name} |" for name in CASES))) or line.count(" --- ") == 9


if __name__ == "__main__":
    main()
