"""What the report says of a copy that takes images."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from patcher.cli.report import print_verification
from patcher.patched.schema import Verification


def shown(images: dict[str, Any], checks: list[dict[str, Any]]) -> str:
    entry = {"stack": "transformers", "version": "5.24.0", "status": "passed", "passed": True, "images": images}
    text = io.StringIO()
    entries = [Verification.model_validate({**entry, "checks": checks})]
    print_verification(entries, console=Console(file=text, width=200))
    return text.getvalue()


def test_the_numbers_with_an_image_have_a_row() -> None:
    made = {"checked": True, "by": "its own processor", "positions": 45}
    text = shown({**made, "max_abs_logprob_diff": 9.5e-07, "tolerance": 1e-4, "steering_effect": 0.99}, [])
    row = next(line for line in text.splitlines() if "with an image" in line)
    assert "9.5e-07" in row and "0.99" in row


def test_why_none_was_run_is_said_and_not_called_inapplicable() -> None:
    why = "random pixel values: nothing fits this class"
    text = shown({"checked": False, "why": why}, [{"name": "image prompt", "passed": None, "note": why}])
    assert f"not checked with an image: {why}" in text and "not applicable" not in text
