"""The model card of a manifest that a test wrote as a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patcher.card import card
from patcher.patched.schema import Manifest


def render_card(manifest: Mapping[str, Any], *args: Any, **options: Any) -> str:
    return card.render_card(Manifest.model_validate(manifest), *args, **options)
