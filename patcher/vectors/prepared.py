"""What is known of a recipe's vector before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.pair import ContrastPair, TokenisedPair, TokenisedSide
from patcher.recipe.vector import VectorSpec
from patcher.vectors.both_lists import NO_TEXTS, BothLists, sides_of, texts_as_pairs
from patcher.vectors.files.reading import VectorFile
from patcher.vectors.layers import resolve_read_layer
from patcher.vectors.lists import PreparedLists
from patcher.vectors.persona_questions import AskedQuestions


@dataclass(frozen=True)
class PreparedVector:
    """A vector's inputs, read and checked before any model is loaded.

    Attributes:
        spec: the recipe's entry, with the day that a chat template writes into prompts (``template_date``).
        where: what errors call it.
        file: of method ``file``, where its vectors are.
        layers: where it is added.
        read_layers: layer -> where it is read.
        pairs: the tokenised pairs that the vector is made of.
        used: the same, as they were read.
        held_out: the pairs that were kept out of it.
        rest: with `refit`, these tokenised: the final vector is made of them as well.
        lists: in place of pairs, two lists without partners.
        notes: what the user should know.
        asked: of method ``persona``, the questions whose answers will be the pairs; None once they are there.
        records: of method ``persona``, every response, for the file beside the vector.
        images: reads pairs with images for the model.
    """

    spec: VectorSpec
    where: str
    layers: tuple[int, ...]
    read_layers: Mapping[int, int]
    file: VectorFile | None = None
    pairs: tuple[TokenisedPair, ...] = ()
    used: tuple[ContrastPair, ...] = ()
    held_out: tuple[ContrastPair, ...] = ()
    rest: tuple[TokenisedPair, ...] = ()
    lists: PreparedLists | None = None
    notes: tuple[str, ...] = ()
    asked: AskedQuestions | None = None
    records: tuple[dict[str, Any], ...] = ()
    images: ImagePrompts | None = None

    def at_layers(self, layers: Sequence[int], block_count: int) -> PreparedVector:
        """The same at other layers, each read where the recipe's ``read_layer`` says, else there."""
        reads = {layer: resolve_read_layer(self.spec, layer, block_count, self.where) for layer in layers}
        return replace(self, layers=tuple(layers), read_layers=reads)

    @property
    def made_of(self) -> Sequence[ContrastPair]:
        """What the vector is made of: pairs, or the questions to which the model has yet to write them, or texts."""
        if self.lists is not None:
            return texts_as_pairs(self.lists.used)
        return [pair.question for pair in self.asked.used] if self.asked else self.used

    @property
    def kept_out(self) -> Sequence[ContrastPair]:
        """What was kept out of it, likewise."""
        return [pair.question for pair in self.asked.held_out] if self.asked else self.held_out

    @property
    def sides(self) -> BothLists[TokenisedSide]:
        """What is read for the vector: positive and negative sides of the pairs in one order, or the two lists."""
        if self.lists is not None:
            return self.lists.sides
        return sides_of(self.pairs)

    @property
    def rest_sides(self) -> BothLists[TokenisedSide]:
        """With `refit`, what the final vector is made of besides."""
        return sides_of(self.rest) if self.lists is None else self.lists.tokenised(self.lists.rest)

    def without_refit(self) -> PreparedVector:
        """The same whose final vector is the measured one."""
        return replace(self, rest=(), lists=self.lists and replace(self.lists, rest=NO_TEXTS))

    @property
    def pair_count(self) -> int:
        """How many pairs the vector is made of, those that the model has yet to write included."""
        if self.lists is not None:
            return len(self.lists.used)
        return len(self.pairs) + (len(self.asked.used) * self.spec.generate.samples if self.asked else 0)

    @property
    def image_count(self) -> int:
        """How many of the pairs that the vector is made of have an image; with `refit`, of all."""
        return sum(pair.image is not None for pair in (*self.used, *(self.held_out if self.rest else ())))

    @property
    def held_out_count(self) -> int:
        """How many pairs are kept out of it, those that the model has yet to write included."""
        if self.lists is not None:
            return len(self.lists.held_out)
        return len(self.held_out) + (len(self.asked.held_out) if self.asked else 0)
