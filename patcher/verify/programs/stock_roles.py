"""The two roles of a verification: the base under plain forward hooks, and the finished folder under none."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from patcher.verify.programs import stock_passes as passes
    from patcher.verify.programs.stock_forward import Forward, Start
    from patcher.verify.programs.stock_image_runs import ImageRun, causal_class
    from patcher.verify.programs.stock_model import (
        blocks_in,
        differing_before,
        foreign_hooks,
        held_times,
        load,
        own_dtype,
    )
else:
    import stock_passes as passes
    from stock_forward import Forward, Start
    from stock_image_runs import ImageRun, causal_class
    from stock_model import blocks_in, differing_before, foreign_hooks, held_times, load, own_dtype

WHOLE = 4
"""A probe is cut to a multiple of so many tokens, so that probes go through the model side by side."""
CUT_AWAY = 4
"""Tokens that the left padding stands for."""


class Role:
    """One folder, loaded once in fp32 and run under the passes of its role.

    Attributes:
        tensors: what was measured, see :class:`stock_passes.Pass`.
        facts: what else is known; JSON.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import transformers

        self.job = job
        self.tensors: dict[str, torch.Tensor] = {}
        self.facts: dict[str, Any] = {"version": transformers.__version__, "torch": torch.__version__, "skipped": {}}
        self.facts |= {"began": time.time(), "role": job["role"]}
        self.layers: dict[str, int] = {key: places[job["role"]] for key, places in job["layers"].items()}
        self.vectors: Mapping[str, torch.Tensor] = {}
        self.hooks: tuple[passes.Hook, ...] = ()
        self.model: Any = None

    def load(self) -> None:
        self.model = load(self.job, "float32", self.facts)
        self.hooked = set(foreign_hooks(self.model))
        self.ids = self.tokenise()
        self.facts["ids"] = self.ids
        self.lengths = [len(ids) for ids in self.ids]
        self.forward = self.over(self.model)
        self.config = self.model.config
        self.image = ImageRun(self)

    def over(self, model: Any) -> Forward:
        return Forward(model, blocks_in(model, self.job["blocks"]), self.ids, self.vectors, device=self.job["device"])

    def tokenise(self) -> list[list[int]]:
        if self.job["ids"]:
            return self.job["ids"]  # type: ignore[no-any-return]
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            self.job["folder"], trust_remote_code=self.job["trust_remote_code"], local_files_only=True
        )
        rows = {text: cut(tokenizer(text)["input_ids"], self.job["max_tokens"]) for text in self.job["texts"]}
        # A tokenizer may know more tokens than the model; no stock software runs a text that holds one of them.
        count = self.embeddings()
        kept = {text: ids for text, ids in rows.items() if count is None or all(0 <= token < count for token in ids)}
        if not kept:
            raise ValueError(
                f"every probe holds a token that is none of the {count} which the model has embeddings for"
            )
        self.facts["texts"] = list(kept)
        return list(kept.values())

    def embeddings(self) -> int | None:
        try:
            table = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return getattr(table, "num_embeddings", None)

    def measure(self) -> None:
        """Run the passes of the role, all in fp32."""
        raise NotImplementedError

    def left_padding(self) -> None:
        short = passes.shortest(self.lengths)
        width = self.lengths[short]
        padded = self.ids[short][: max(1, width - CUT_AWAY)]
        other = self.ids[(short + 1) % len(self.ids)][:width]
        batch = torch.tensor([[padded[-1]] * (width - len(padded)) + padded, other])
        mask = torch.ones_like(batch)
        mask[0, : width - len(padded)] = 0
        with self.skipping("left_padding"):
            # What a class gives at the padding itself means nothing.
            last = list(range(width - min(passes.LAST, len(padded)), width))
            logits = self.forward.forward(self.hooks, batch, last, attention_mask=mask.to(self.job["device"])).logits
            self.tensors["left_padding"] = torch.log_softmax(logits.float(), dim=-1).cpu().contiguous()

    def greedy(self, prompt: Sequence[int] = (), name: str = "greedy", **keywords: Any) -> None:
        """Decode with a cache behind the first probe, or behind another prompt."""
        ids = torch.tensor([list(prompt) or self.ids[0]], device=self.job["device"])
        with self.forward.hooked(self.hooks), self.skipping(name), torch.no_grad():
            result = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **keywords,
                max_new_tokens=self.job["greedy_tokens"],
                do_sample=False,
                num_beams=1,
                use_cache=True,
                repetition_penalty=1.0,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            self.facts[name] = result.sequences[0, ids.shape[1] :].tolist()
            logits = torch.stack([step[0].float() for step in result.logits])
            self.tensors[name] = torch.log_softmax(logits, dim=-1).cpu().contiguous()

    def long_prompt(self) -> None:
        length = self.job["long_tokens"]
        if not length:
            return
        joined = [token for ids in self.ids for token in ids]
        ids = torch.tensor([(joined * (length // len(joined) + 1))[:length]])
        with self.skipping("long_prompt"):
            logits = self.forward.forward(self.hooks, ids, list(range(length - 8, length))).logits[0]
            self.tensors["long_prompt"] = torch.log_softmax(logits.float(), dim=-1).cpu().contiguous()

    def with_image(self, first: str, *ran: passes.Pass) -> None:
        """A prompt with an image: all positions of the given passes, left padding, decoding with a cache."""
        with self.image.once():
            self.image.first(first)
            for one in ran:
                with contextlib.nullcontext() if one.factor == 1.0 else self.times(one.factor):
                    self.image.run(one)
            self.image.left_padding()
            self.image.greedy()
        self.image.finish()

    def times(self, factor: float) -> Any:
        """While open, the folder's own tensors hold the vector so many times."""
        raise NotImplementedError

    def own_dtype(self) -> None:
        """The same in the dtype in which the folder is stored; the model in fp32 is spent."""
        if self.job["own_dtype"]:
            with self.skipping("own_dtype"):
                model, self.model = self.model, None
                self.finish_counting()
                del self.forward
                model = own_dtype(self.job, model, self.facts)
                forward = self.over(model)
                forward.run(passes.own_dtype_pass(self.hooks, self.lengths))
                self.tensors |= forward.tensors
        self.model = None

    def finish_counting(self) -> None:
        self.facts["counted"] = self.forward.counted
        self.facts["residual_read"] = self.forward.read_by
        self.tensors |= self.forward.tensors

    def write(self) -> None:
        """What was found goes to the files that the job names, each whole or not at all."""
        if "counted" not in self.facts:
            self.finish_counting()
        path = self.job["result"]
        save_file(self.tensors, path + ".safetensors")
        self.facts["ended"] = time.time()
        with open(path + ".json.part", "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(self.facts, file)
        os.replace(path + ".json.part", path + ".json")  # noqa: PTH105

    @contextlib.contextmanager
    def skipping(self, name: str) -> Iterator[None]:
        """A measurement that this class cannot make is reported, never silently passed."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.facts["skipped"][name] = said[0][:300]


class Reference(Role):
    """The base: without any vector, and with what the folder's file stores added by a hook."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.vectors = load_file(job["vectors"])

    def measure(self) -> None:
        blocks = self.forward.block_count
        first = min(self.layers.values())
        self.hooks = passes.all_hooks(self.layers)
        self.start: Start | None = Start(first) if first > 0 and self.job["offload"] is None else None
        base, hook, again, *below = passes.reference_passes(self.layers, self.lengths, blocks)
        self.forward.run(base, record=self.start)
        if self.start is not None and self.start.refused:
            self.start = None
        self.from_start(hook)
        self.forward.run(again)
        short = again.probes[0]
        if self.start is not None and self.apart(f"hook/{short}", f"hook_again/{short}") > self.job["start_limit"]:
            # A class whose blocks hand on more than the residual stream, in a way of its own.
            self.start = None
            self.forward.run(hook)
        for one in below:
            self.from_start(one)
        self.amplify = self.facts["amplify"] = self.choose_amplification()
        self.left_padding()
        self.greedy()
        self.long_prompt()
        self.with_image("base", *passes.reference_image_passes(self.layers, blocks, self.amplify))

    def from_start(self, one: passes.Pass) -> None:
        try:
            self.forward.run(one, self.start)
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            if self.start is None or isinstance(error, torch.OutOfMemoryError):
                raise
            self.start = None
            self.forward.run(one)

    def choose_amplification(self) -> float:
        def measure(factor: float) -> float:
            loud, *rest = passes.amplified_reference(self.layers, self.lengths, factor)
            self.from_start(loud)
            self.louder = rest
            return self.effect("hook_amplified")

        factor = passes.choose_factor(self.effect("hook"), self.share(), measure)
        if factor > 1:
            for one in self.louder:
                self.from_start(one)
        return factor

    def effect(self, name: str) -> float:
        """The largest difference of a log-probability that a pass makes."""
        return max(self.apart(f"base/{number}", f"{name}/{number}") for number in range(len(self.ids)))

    def share(self) -> float:
        """The length of the shortest vector beside the residual stream's."""
        found = self.forward.tensors
        return min(
            float(self.vectors[key].norm()) / float(found[f"residual/base/{key}/0"].norm(dim=-1).median())
            for key in self.vectors
        )

    def apart(self, first: str, second: str) -> float:
        found = self.forward.tensors
        return float((found[first] - found[second]).abs().nan_to_num(1e9).max())


class Candidate(Role):
    """The finished folder. It is never given the vectors as the hook has them, only what its own tensors hold."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.held = load_file(job["slot_file"])
        self.start: Start | None = None

    def share(self, reference: Reference) -> None:
        """Start from the base's residual stream where base and copy are the same before the first edited block."""
        foreign = self.hooked - reference.hooked
        if foreign:
            raise RuntimeError(f"something is hooked to {min(foreign)} of the copy as it is loaded")
        why = "no block lies before the edit, or passes of this class cannot start at one"
        if reference.start is not None:
            why = differing_before(
                reference.model, self.model, self.job["blocks"], reference.start.block, self.job["config_changes"]
            )
            if self.ids != reference.ids:
                why = "the probes differ"
        if not why:
            self.start = reference.start
        self.facts["whole_because"] = why

    def measure(self) -> None:
        try:
            self.run_all(self.start)
            if self.start is not None:
                self.forward.run(passes.whole_candidate(self.lengths))
                self.facts["shared"] = self.start.block
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            if self.start is None or isinstance(error, torch.OutOfMemoryError):
                raise
            self.facts["whole_because"] = str(error)[:300]
            self.run_all(None)
        self.left_padding()
        self.greedy()
        self.long_prompt()
        self.with_image("candidate", *passes.candidate_image_passes(float(self.job["amplify"])))

    def causal_lm(self) -> None:
        """What ``AutoModelForCausalLM`` makes of a multimodal folder; where that is the text part alone, its passes."""
        if getattr(self.config, "text_config", None) is None or self.job["trust_remote_code"]:
            return
        does, said = causal_class(self.job["folder"], self.facts["class"])
        self.facts["causal_lm"] = {"does": does, "said": said}
        if does == "text" and self.job["offload"] is None:
            from transformers import AutoModelForCausalLM

            with self.skipping("causal_lm"):
                model = AutoModelForCausalLM.from_pretrained(
                    self.job["folder"], local_files_only=True, dtype=torch.float32
                )
                forward = Forward(
                    model.eval().to(self.job["device"]),
                    blocks_in(model, ""),
                    self.ids,
                    self.vectors,
                    device=self.job["device"],
                )
                forward.run(passes.Pass("causal_lm", tuple(range(len(self.ids)))))
                self.tensors |= forward.tensors

    def run_all(self, start: Start | None) -> None:
        self.facts["amplify"] = float(self.job["amplify"])
        for one in passes.candidate_passes(self.layers, self.lengths, float(self.job["amplify"])):
            times = contextlib.nullcontext() if one.factor == 1.0 else self.times(one.factor)
            with times:
                self.forward.run(one, start)

    def times(self, factor: float) -> Any:
        return held_times(self.model, self.job["slots"], self.held, factor)


def cut(ids: Any, most: int) -> list[int]:
    """The first tokens of a probe: a multiple of 4, fewer only where there are fewer."""
    found = list(ids)[:most]
    return found[: len(found) - len(found) % WHOLE] if len(found) > WHOLE else found


def run(jobs: list[dict[str, Any]]) -> None:
    """Run one role, or the reference and then the candidate side by side."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    roles = [(Reference if job["role"] == "reference" else Candidate)(job) for job in jobs]
    roles[0].load()
    reference = roles[0]
    reference.measure()
    if len(roles) == 1:
        reference.own_dtype()
        if isinstance(reference, Candidate):
            reference.causal_lm()
        reference.write()
        return
    assert isinstance(reference, Reference)
    candidate = roles[1]
    assert isinstance(candidate, Candidate)
    candidate.job["amplify"] = reference.amplify
    candidate.load()
    candidate.share(reference)
    reference.own_dtype()
    reference.write()
    candidate.measure()
    candidate.own_dtype()
    candidate.causal_lm()
    candidate.write()
