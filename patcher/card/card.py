"""The model card of a patched folder: Hub metadata, and a body generated from ``steering.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.card.markdown import card_template, paragraphs
from patcher.card.written import base_class, cited, is_broadcast, loading_lines, other_tensors, said_of_templates
from patcher.errors import InputError
from patcher.patched.evaluation import Evaluation
from patcher.patched.schema import Patch
from patcher.publish.privacy import publishable
from patcher.recipe.yaml_lines import parse_yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def render_card(
    manifest: Patch,
    base_card: str | None,
    base_license_files: Sequence[str] = (),
    *,
    pictures: Sequence[str] = (),
) -> str:
    """The ``README.md`` of a patched folder; its words are in ``card.md.jinja``.

    Args:
        manifest: the folder's, or the part of it that is of one patch; what is not there is left out of the card.
        base_card: the base's own ``README.md``; only its licence and languages are taken over.
        base_license_files: names of the licence files that were copied from the base.
        pictures: files beside the card that show the effect.

    Returns:
        Markdown with a metadata block, without local paths and tokens.
    """
    patch = publishable(manifest)
    inherited = _front_matter(base_card or "")
    push = patch.resolved.get("push")
    repository = str((push.get("repo") if isinstance(push, Mapping) else None) or "OWNER/THIS-REPOSITORY")
    body = card_template().render(
        {name: getattr(patch, name) for name in Patch.model_fields},
        evaluation=patch.evaluation or Evaluation(),
        remote_code=patch.remote_code,
        repository=repository,
        loading=loading_lines(manifest, repository) if patch.route.wraps else [],
        base_class=base_class(patch.route),
        others=other_tensors(patch.route),
        broadcast=is_broadcast(patch),
        said_of_pairs=[*patch.said_of_pairs, *said_of_templates(patch)],
        cited=cited(patch),
        pictures=pictures,
        licence=inherited.get("license_name") or inherited.get("license"),
        licence_files=base_license_files,
    )
    return f"---\n{_metadata(patch, inherited, base_license_files)}\n---\n\n{paragraphs(body)}\n"


def _metadata(patch: Patch, inherited: Mapping[str, Any], license_files: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    model = patch.base.hub_id
    tags = ["steering-vector", "activation-steering", "patch-model"]
    if patch.route.name:
        # On its own, "embedding" would list the copy among embedding models.
        tags.append(f"patch-model-{patch.route.name.replace('_', '-')}")
    data = ModelCardData(
        base_model=model,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if patch.route.wraps else "text-generation",
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
