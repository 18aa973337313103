"""What a file says of its vector, held against what the recipe asks: refused, or told where the recipe is explicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from patcher.architectures.installed import multimodal_models, text_models
from patcher.errors import InputError
from patcher.vectors.files.asked import Asked, SteeredModel
from patcher.vectors.files.choosing import Chosen, after, words_of
from patcher.vectors.files.claims import (
    Claim,
    Claims,
    claims_of,
    layers_of,
    place_of_path,
    same_model,
    words_beside,
)
from patcher.vectors.files.contents import Contents
from patcher.vectors.files.gguf_file import KIND as GGUF
from patcher.vectors.files.layouts import Part
from patcher.vectors.files.places import Place

_BESIDE_DECODERS = ("cfg.json", "config.json", "hyperparams.json")
"""Where SAELens, sparsify, dictionary_learning and Llama Scope say what a sparse autoencoder is of."""

_REFUSAL = "direction_metadata.json"
"""Beside the `direction.pt` of https://github.com/andyrdt/refusal_direction: {pos, layer}, of what enters the block."""

_SAME_KIND = {
    "mistral": "llama",
    "mixtral": "llama",
    "internlm3": "llama",
    "gptbigcode": "starcoder",
    "phi": "phi2",
    "olmo3": "olmo2",
    "glm": "chatglm",
    "cohere": "commandr",
    "bamba": "granitehybrid",
    "granitemoehybrid": "granitehybrid",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "glm4moelite": "deepseek2",
    "falconmamba": "mamba",
    "jetmoe": "llama",
}
"""transformers' name of an architecture -> llama.cpp's, where they differ by more than punctuation."""

Refuse = Callable[[str, Claim, str], str]


def checked(
    path: Path, contents: Contents, chosen: Chosen, part: Part, asked: Asked, layer: int, model: SteeredModel
) -> list[str]:
    """Notes on what the file says besides; what contradicts the recipe is refused unless the recipe names the tensor.

    Raises:
        InputError: it is of another layer, of another point of the model, of another architecture, or names a
            coefficient that the recipe does not speak of.
    """
    is_decoder = chosen.decoder or part.kind == "feature"
    claims = _all_claims(path, contents, is_decoder)
    where = f"{path}: {chosen.name}" if chosen.name else str(path)

    def refuse(message: str, claim: Claim, remedy: str) -> str:
        if asked.tensor is not None:
            return f"{message}: {claim.words}; `tensor` names it, so it is used all the same"
        if chosen.name:
            remedy = f"{remedy}, or name it to use it all the same: `tensor: {chosen.name}`" if remedy else (
                f"to use it all the same, name it: `tensor: {chosen.name}`"
            )  # fmt: skip
        elif not remedy:
            remedy = "save the bare tensor, if it is right all the same"
        raise InputError(message, where=where, found=claim.words, remedy=remedy)

    notes = list(_of_place(claims, chosen, part, layer, model.blocks, is_decoder, refuse))
    notes += _of_model(claims, contents.kind == GGUF, model, refuse)
    notes += _of_coefficient(claims, asked, where)
    if contents.is_ours and asked.coefficient not in (None, 1):
        notes.append(
            f"the file holds the vector times its coefficient, which is multiplied by {asked.coefficient:g} again"
        )
    if claims.normalised is not None and is_decoder:
        notes.append(f"the autoencoder reads normalised activations ({claims.normalised.words}): the coefficient is "
                     "not in units of its features")  # fmt: skip
    return notes + _of_names(path, chosen, part, layer)


def _all_claims(path: Path, contents: Contents, is_decoder: bool) -> Claims:
    claims = claims_of(contents.words, path.name)
    if not is_decoder:
        return claims
    words, name = words_beside(path, _BESIDE_DECODERS)
    beside = claims_of(words, name)
    beside = replace(beside, coefficient=None, kind=None)  # of the autoencoder's training, and of its class
    merged = {key: own or getattr(beside, key) for key, own in vars(claims).items()}
    claims = replace(claims, **merged)
    named = (
        None
        if claims.place is not None and claims.place.value.layer is not None
        else place_of_path(path.absolute().parent)
    )
    if claims.place is None:
        return replace(claims, place=named)
    if named is not None and not claims.place.value.elsewhere:
        # Such as sparsify's, whose folder has the layer.
        return replace(claims, place=Claim(named.words, replace(named.value, elsewhere=named.value.elsewhere)))
    return claims


def _of_place(
    claims: Claims, chosen: Chosen, part: Part, layer: int, blocks: int, is_decoder: bool, refuse: Refuse
) -> Iterator[str]:
    one = part.kind in ("vector", "feature")
    if claims.heads is not None:
        yield refuse("the file says that its vectors are of attention heads", claims.heads, "")
    if claims.transcoder is not None and is_decoder:
        yield refuse("this is a transcoder, whose decoder writes an MLP's output", claims.transcoder, "")
    if claims.place is not None:
        place: Place = claims.place.value
        if place.elsewhere:
            yield refuse(f"the file says that it is of {words_of(place)}", claims.place, "")
        elif place.layer is not None and place.layer != layer and one and not chosen.of_layer:
            yield refuse(
                f"the file says that it is of {words_of(place)}, and the recipe adds it {after(layer)}",
                claims.place,
                _at(place.layer),
            )
        elif place.layer is not None and one:
            yield f"that is the layer which the file names ({claims.place.words})"
            return
    if (
        claims.layer is not None
        and one
        and not chosen.of_layer
        and (claims.place is None or claims.place.value.layer is None)
    ):
        layers = layers_of(claims.layer, blocks)
        if layer not in layers:
            told = ", ".join(map(str, layers))
            yield refuse(
                f"the file says that it is of layer {told}, and the recipe adds it {after(layer)}",
                claims.layer,
                _at(layers[0]) if len(layers) == 1 else "",
            )
        return
    if is_decoder and claims.place is None and claims.layer is None:
        yield f"nothing beside the file says which layer the autoencoder is of: {after(layer)} is the recipe's word"


def _at(layer: int) -> str:
    return "set `before_layer: 0`" if layer < 0 else f"set `layer: {layer}`"


def _of_model(claims: Claims, is_gguf: bool, model: SteeredModel, refuse: Refuse) -> Iterator[str]:
    if claims.kind is not None and model.kinds:
        told = _bare_kind(str(claims.kind.value))
        if told and not is_gguf and told not in map(_bare_kind, (*text_models(), *multimodal_models())):
            yield f"the file says {claims.kind.words}, which is no architecture that is known here"
        elif told and told not in {_bare_kind(name) for name in model.kinds}:
            yield refuse(
                f"the file says that it was made for another architecture than {' or '.join(model.kinds)}",
                claims.kind,
                "use a file that was made for this model",
            )
    if claims.model is not None and model.names and not same_model(str(claims.model.value), model.names):
        yield f"the file says which model it was made for ({claims.model.words}); this one is {model.names[0]}"


def _bare_kind(name: str) -> str:
    bare = "".join(letter for letter in name.lower().removesuffix("_text") if letter.isalnum())
    return _SAME_KIND.get(bare, bare)


def _of_coefficient(claims: Claims, asked: Asked, where: str) -> Iterator[str]:
    if claims.coefficient is None:
        return
    told = float(claims.coefficient.value)
    if told == 0 or not math.isfinite(told):
        return
    if asked.coefficient is None and told != 1:
        raise InputError(
            "the file names a coefficient, and the recipe none",
            where=where,
            found=claims.coefficient.words,
            remedy=f"write `coefficient: {told:g}` to follow it, or `coefficient: 1` for the vector as it is stored",
        )
    if asked.coefficient is not None and told != asked.coefficient:
        yield f"the file says {claims.coefficient.words}, and the recipe's coefficient is used"


def _of_names(path: Path, chosen: Chosen, part: Part, layer: int) -> list[str]:
    """Notes on the names of the file and of what lies beside it, which are too weak to refuse anything."""
    if part.kind not in ("vector", "feature") or chosen.of_layer:
        return []
    words, name = words_beside(path, (_REFUSAL,))
    if name and isinstance(words.get("layer"), int) and words["layer"] - 1 != layer:
        return [f"{name} says layer {words['layer']}, what enters that block: `before_layer: {words['layer']}`"]
    named = place_of_path(Path(path.stem))
    if named is not None and named.value.layer != layer and named.value.layer is not None:
        return [f"the file's name speaks of layer {named.value.layer}, and the vector is added {after(layer)}"]
    return []
