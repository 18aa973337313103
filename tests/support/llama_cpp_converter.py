"""llama.cpp's stock converter, for checkpoints whose tokenizer no release has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patcher.stacks.environments import Environment


def with_tiny_tokenizers(found: Environment, place: Path) -> Environment:
    """The stock converter, told which pre-tokenizer a BPE has: it knows released ones only, by a hash of their ids."""
    script = place / "convert.py"
    script.write_text(
        "import runpy, sys\n"
        f"real = {str(found.converter)!r}\n"
        f"sys.path[:0] = [{str(found.converter.parent)!r}, {str(found.converter.parent / 'gguf-py')!r}]\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        # Tiny models have no blocks that draft tokens; the converter looks for Qwen's.
        "import conversion.qwen as qwen\n"
        "getattr(qwen, '_QwenMtpMixin', object).no_mtp = True\n"
        "sys.argv[0] = real\n"
        "runpy.run_path(real, run_name='__main__')\n",
        encoding="utf-8",
    )
    return replace(found, converter=script)
