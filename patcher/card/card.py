"""The model card of a patched folder: Hub metadata, and a body generated from ``steering.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.card import effects, measured, sections, texts
from patcher.card import written as writing
from patcher.card.values import hub_id, table
from patcher.errors import InputError
from patcher.patched.schema import Manifest
from patcher.publish.privacy import sanitised_manifest
from patcher.recipe.yaml_lines import parse_yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def render_card(
    manifest: Manifest,
    base_card: str | None,
    base_license_files: Sequence[str] = (),
    *,
    pictures: Sequence[str] = (),
) -> str:
    """The ``README.md`` of a patched folder.

    Args:
        manifest: the content of ``steering.json``; fields that are not there are left out of the card.
        base_card: the base's own ``README.md``; only its licence and languages are taken over.
        base_license_files: names of the licence files that were copied from the base.
        pictures: files beside the card that show the effect.

    Returns:
        Markdown with a metadata block, without local paths and tokens.
    """
    clean = sanitised_manifest(manifest.as_json())
    inherited = _front_matter(base_card or "")
    parts = [
        f"---\n{_metadata(clean, inherited, base_license_files)}\n---",
        sections.introduction(clean),
        sections.edits(clean),
        measured.fit(clean),
        writing.written(clean),
        sections.loading(clean),
        measured.verification(clean),
        measured.remote(clean),
        sections.evaluation(clean),
        effects.side_effects(clean),
        effects.tasks(clean),
        effects.shown(pictures),
        effects.completions(clean),
        effects.choice(clean),
        sections.stacks(clean),
        writing.taking_out(clean),
        texts.LIMITS,
        sections.licence(inherited, base_license_files),
        sections.notes(clean),
        sections.citations(clean),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(manifest: Mapping[str, Any], inherited: Mapping[str, Any], license_files: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    base, route = table(manifest, "base"), table(manifest, "route")
    model = hub_id(base)
    tags = ["steering-vector", "activation-steering", "patch-model"]
    if route.get("name"):
        # On its own, "embedding" would list the copy among embedding models.
        tags.append(f"patch-model-{str(route['name']).replace('_', '-')}")
    data = ModelCardData(
        base_model=model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        language=_strings(inherited.get("language")),
        license=_strings(inherited.get("license")),  # type: ignore[arg-type]  # a list is allowed by the Hub
        license_name=_text(inherited.get("license_name")),
        license_link=_license_link(_text(inherited.get("license_link")), model, license_files),
        base_model_relation="finetune" if model else None,
    )
    return data.to_yaml()


def _license_link(link: str | None, model: str | None, license_files: Sequence[str]) -> str | None:
    """A link that still leads somewhere from the copy's repository."""
    if link is None or "://" in link:
        return link
    name = link.removeprefix("./")
    if name in license_files:
        return name
    return f"https://huggingface.co/{model}/blob/main/{name}" if model else None


def _front_matter(card: str) -> Mapping[str, Any]:
    match = _FRONT_MATTER.match(card.removeprefix("\ufeff"))
    if match is None:
        return {}
    try:
        data = parse_yaml(match.group(1), "README.md").value
    except InputError:
        # Someone else's card; a block that cannot be read has nothing to hand on.
        return {}
    return data if isinstance(data, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _strings(value: Any) -> str | list[str] | None:
    if isinstance(value, list):
        return [str(item) for item in value if isinstance(item, str)] or None
    # YAML reads the language code of Norwegian as false.
    return "no" if value is False else _text(value)
