"""The passes of a role over a prompt with an image, and what ``AutoModelForCausalLM`` makes of a multimodal folder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from patcher.verify.programs import stock_passes as passes
    from patcher.verify.programs.stock_forward import Forward
    from patcher.verify.programs.stock_images import ImagePrompt, image_prompt, takes_images
    from patcher.verify.programs.stock_passes import Hook
else:
    import stock_passes as passes
    from stock_forward import Forward
    from stock_images import image_prompt, takes_images

IMAGE = "image "
"""What the names of these passes begin with."""
PADDING = 4
"""Tokens before the prompt, in a batch with a longer text."""
TEXT_TOKENS = 6
"""Before the image, and behind it, where no processor makes the prompt."""


class ImageForward(Forward):
    """Passes over one prompt, whose image goes with every batch."""

    def __init__(self, forward: Forward, prompt: ImagePrompt) -> None:
        super().__init__(forward.model, forward.blocks, [prompt.ids], forward.vectors, device=forward.device)
        self.prompt = prompt

    def forward(self, hooks: Iterable[Hook], ids: Any, positions: list[int] | None = None, **options: Any) -> Any:
        keywords = self.prompt.keywords(ids.tolist(), self.device)
        return super().forward(hooks, ids, positions, **keywords, **options)


class ImageRun:
    """What a role does with an image.

    Args:
        role: a loaded :class:`stock_roles.Role`; its facts gain ``image``, its tensors those of the passes.
    """

    def __init__(self, role: Any) -> None:
        self.role = role
        self.facts: dict[str, Any] = {"taken": takes_images(role.model)}
        role.facts["image"] = self.facts
        self.forward: ImageForward | None = None

    def first(self, name: str) -> None:
        """Find a prompt that the class runs, by a pass without hooks."""
        if not self.facts["taken"]:
            return
        role, ids = self.role, self.role.ids
        rows = [ids[0][:TEXT_TOKENS], ids[1 % len(ids)][: TEXT_TOKENS + 1]]

        def run(prompt: ImagePrompt) -> torch.Tensor:
            forward = ImageForward(role.forward, prompt)
            forward.run(passes.Pass(name, (0,), whole=True))
            self.forward = forward
            return forward.tensors[f"{name}/0"][None]

        texts = [text[:24] for text in role.facts.get("texts", ["A text.", "Another."])]
        prompt, why = image_prompt(
            role.model,
            role.job["folder"],
            [texts[0], texts[1 % len(texts)]],
            rows,
            run,
            trust_remote_code=role.job["trust_remote_code"],
        )
        if prompt is None:
            self.forward, self.facts["why"] = None, why
            return
        self.facts |= {"by": prompt.by, "why": prompt.why, "ids": prompt.ids, "positions": len(prompt.ids)}
        for key, value in prompt.pixels.items():
            role.tensors[f"{IMAGE}given/{key}"] = value.cpu().contiguous()

    def run(self, one: passes.Pass) -> None:
        if self.forward is not None:
            self.forward.run(one)

    def left_padding(self) -> None:
        if self.forward is None:
            return
        role, prompt = self.role, self.forward.prompt
        width = PADDING + len(prompt.ids)
        joined = [token for ids in role.ids for token in ids]
        other = (joined * (width // len(joined) + 1))[:width]
        batch = torch.tensor([[joined[-1]] * PADDING + prompt.ids, other])
        mask = torch.ones_like(batch)
        mask[0, :PADDING] = 0
        name = f"{IMAGE}left_padding"
        with role.skipping(name):
            last = list(range(width - passes.LAST, width))
            output = self.forward.forward(role.hooks, batch, last, attention_mask=mask.to(role.job["device"]))
            role.tensors[name] = torch.log_softmax(output.logits.float(), dim=-1).cpu().contiguous()

    def greedy(self) -> None:
        if self.forward is not None:
            keywords = self.forward.prompt.keywords([self.forward.prompt.ids], role_device(self.role))
            self.role.greedy(self.forward.prompt.ids, f"{IMAGE}greedy", **keywords)

    def finish(self) -> None:
        if self.forward is not None:
            self.role.tensors |= {IMAGE + name: value for name, value in self.forward.tensors.items()}
            self.forward = None

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """While open, the class makes features of an image once: no hook and no edit changes them."""
        holders = [module for module in self.role.model.modules() if hasattr(module, "get_image_features")]
        for module in holders:
            module.get_image_features = _remembering(module.get_image_features)
        try:
            yield
        finally:
            for module in holders:
                del module.get_image_features


def role_device(role: Any) -> str:
    return str(role.job["device"])


def _remembering(function: Any) -> Any:
    kept: list[tuple[torch.Tensor, Any]] = []

    @functools.wraps(function)
    def features(*given: Any, **named: Any) -> Any:
        pixels = given[0] if given else named.get("pixel_values")
        for known, made in kept:
            if isinstance(pixels, torch.Tensor) and known.shape == pixels.shape and torch.equal(known, pixels):
                return made
        made = function(*given, **named)
        if isinstance(pixels, torch.Tensor):
            kept[:] = [(pixels.detach().clone(), made)]
        return made

    return features


def causal_class(folder: str, whole: str) -> tuple[str, Any]:
    """What ``AutoModelForCausalLM`` loads of a multimodal folder (``whole``, ``text``, ``refuses``); its class, or why.

    Args:
        whole: name of the class that the folder was loaded as.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        try:
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map="meta")
        except Exception as error:
            return "refuses", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return "refuses", ""
    return ("whole" if found.__name__ == whole else "text"), found.__name__
