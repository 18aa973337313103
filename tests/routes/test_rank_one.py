"""The rank-one route: where it goes, what it fits, and that the model then does what the report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import TEXTS, VOCABULARY, default_checkpoint, tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from patcher.architectures.analysis import Architecture
from patcher.capture.forward import run_blocks, steering_hooks
from patcher.checkpoint.folder import CheckpointFolder
from patcher.errors import InputError
from patcher.routes.plan import NotApplicable
from patcher.routes.rank_one import route as rank_one
from patcher.routes.rank_one.calibration import calibration_tokens
from patcher.routes.rank_one.collect import batches, fit_layers
from patcher.routes.rank_one.divergence import edited, kl_report
from patcher.routes.rank_one.experts import expert_inputs, watch_routing
from patcher.routes.rank_one.norm import NormResponse, norm_spread
from patcher.routes.rank_one.ridge import ConstantFit
from patcher.routes.rank_one.sites import find_site


class Loaded:
    def __init__(self, folder: Path, layer: int) -> None:
        self.folder, self.layer = folder, layer
        self.texts = [f"{index} {text}" for index, text in enumerate(TEXTS * 40)]
        self.architecture = Architecture(AutoConfig.from_pretrained(folder))
        self.checkpoint = CheckpointFolder(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def vector(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(self.architecture.hidden, generator=torch.Generator().manual_seed(seed))

    def rows(self, count: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (count, 24), generator=generator).tolist()

    def fit(self, *layers: int, tokens: int = 4000):
        chosen = layers or (self.layer,)
        plan = rank_one.plan(self.architecture, chosen, self.checkpoint)
        vectors = {layer: self.vector(layer) for layer in chosen}
        done = rank_one.fit(
            plan,
            self.model,
            self.tokenizer,
            self.texts,
            architecture=self.architecture,
            vectors=vectors,
            tokens=tokens,
            progress=lambda _line: None,
        )
        return done, vectors


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if name not in made:
            folder = tmp_path_factory.mktemp("rank-one") / "base"
            layer = tiny_checkpoint(folder, name) if "--" in name else default_checkpoint(folder, name)
            made[name] = Loaded(folder, layer)
        return made[name]

    return load


# (model, suffix of the names on disk, how many tensors, transposed, gain)
SITES = [
    ("qwen3", "mlp.down_proj.weight", 1, False, "constant"),
    ("gpt2", "mlp.c_proj.weight", 1, True, "constant"),
    ("openai-community--gpt2", "mlp.c_proj.weight", 1, True, "constant"),
    ("EleutherAI--gpt-j-6b", "mlp.fc_out.weight", 1, False, "constant"),
    ("granite", "mlp.down_proj.weight", 1, False, "constant"),
    ("openbmb--MiniCPM3-4B", "mlp.down_proj.weight", 1, False, "constant"),
    ("mixtral", ".w2.weight", 4, False, "constant"),
    ("olmoe", ".down_proj.weight", 4, False, "constant"),
    ("glm4_moe", "mlp.shared_experts.down_proj.weight", 1, False, "constant"),
    ("qwen2_moe", "mlp.shared_expert.down_proj.weight", 1, False, "token"),
]


@pytest.mark.parametrize(("name", "suffix", "count", "transposed", "gain"), SITES, ids=[case[0] for case in SITES])
def test_the_plan_names_the_last_weight_of_the_mlp_as_it_is_stored(
    loaded, name: str, suffix: str, count: int, transposed: bool, gain: str
) -> None:
    base = loaded(name)
    plan = rank_one.plan(base.architecture, [base.layer], base.checkpoint)
    assert not plan.exact
    assert plan.cost == "none"
    assert plan.stacks["transformers"] == "native"
    assert len(plan.tensors) == count == len(plan.carriers)
    assert find_site(base.architecture, base.layer).gain == gain
    for write in plan.tensors:
        info = base.checkpoint.tensors[write.name]
        assert write.name.endswith(suffix)
        assert write.kind == "added"
        assert write.right is None
        assert write.transposed is transposed
        assert (write.shape, write.dtype) == (info.shape, info.dtype)
    assert [write.index for write in plan.tensors] == (list(range(count)) if count > 1 else [None])
    by_class = rank_one.plan(base.architecture, [base.layer], None)
    assert [write.parameter for write in by_class.tensors] == [write.parameter for write in plan.tensors]


@pytest.mark.slow_but("gpt2", "qwen3", "EleutherAI--gpt-j-6b", "mixtral")
@pytest.mark.parametrize("name", [case[0] for case in SITES])
def test_the_edited_model_gains_what_the_report_says(loaded, name: str) -> None:
    base = loaded(name)
    plan, vectors = base.fit()
    report, vector = plan.fit, vectors[base.layer]
    assert report["tokens"] > 1000
    assert report["held_out_tokens"] > 50
    assert 0 <= report["error_mean"] <= report["error_p95"]
    assert report["error_mean"] < 0.8
    assert report["ratio"] < 0.5
    assert report["mean"] == pytest.approx(1, abs=0.35)
    # The residual stream itself, read after the block, on the texts that were held out.
    site = find_site(base.architecture, base.layer)
    held_out = calibration_tokens(
        base.texts, base.model, base.tokenizer, limit=4000, width=site.width, seed=0, progress=lambda _line: None
    ).held_out
    errors = []
    for inputs, mask in batches(held_out):
        before = run_blocks(base.model, plan.blocks, [base.layer], inputs)[base.layer][mask]
        with edited(base.model, plan, vectors):
            after = run_blocks(base.model, plan.blocks, [base.layer], inputs)[base.layer][mask]
        errors.append((after - before - vector).norm(dim=-1) / vector.norm())
    assert len(torch.cat(errors)) == report["held_out_tokens"]
    assert float(torch.cat(errors).mean()) == pytest.approx(report["error_mean"], rel=1e-2, abs=1e-3)
    assert float(torch.cat(errors).quantile(0.95)) == pytest.approx(report["error_p95"], rel=1e-2, abs=1e-3)


def test_the_weights_are_as_they_were_after_the_fit(loaded) -> None:
    base = loaded("mixtral")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    base.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())


def test_the_weights_are_as_they_were_after_an_error(loaded) -> None:
    base = loaded("qwen3")
    plan, vectors = base.fit()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), edited(base.model, plan, vectors):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def test_a_fit_is_reproducible(loaded) -> None:
    base = loaded("qwen3")
    (one, _), (two, _) = base.fit(), base.fit()
    assert torch.equal(one.tensors[0].right, two.tensors[0].right)
    assert one.fit == two.fit


def test_the_kl_report_tells_a_good_fit_from_a_bad_one(loaded) -> None:
    base = loaded("gpt2")
    plan, vectors = base.fit()
    rows = base.rows(20, seed=4)
    good = kl_report(plan, base.model, vectors, rows)
    assert good["ratio"] < 0.02
    assert good["kl_tokens"] == 20 * 24

    def changed(scale: float) -> float:
        right = plan.tensors[0].right * scale
        return kl_report(replace(plan, tensors=(replace(plan.tensors[0], right=right),)), base.model, vectors, rows)[
            "ratio"
        ]

    assert changed(0.0) == pytest.approx(1, abs=1e-3)
    assert changed(-1.0) > 1.5
    assert changed(0.5) > 10 * abs(good["ratio"])
    assert kl_report(plan, base.model, {base.layer: torch.zeros(base.architecture.hidden)}, rows)["ratio"] is None


def test_several_layers_are_fitted_as_the_later_ones_see_the_earlier(loaded) -> None:
    base = loaded("qwen3")
    plan, vectors = base.fit(0, 2)
    assert [write.layer for write in plan.tensors] == [0, 2]
    assert set(plan.fit["layers"]) == {"0", "2"}
    assert plan.fit["error_mean"] == max(entry["error_mean"] for entry in plan.fit["layers"].values())
    site = find_site(base.architecture, 2)
    rows, held = base.rows(200, seed=1), base.rows(20, seed=2)
    together = fit_layers(base.model, plan.blocks, {0: site, 2: site}, vectors, rows, held)
    seen = []
    block = base.model.get_submodule(f"{plan.blocks}.2.{site.module}")
    handle = block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].reshape(-1, site.width)))
    with steering_hooks(base.model, plan.blocks, {0: vectors[0]}), torch.no_grad():
        base.model(input_ids=torch.tensor(rows))
        base.model(input_ids=torch.tensor(held))
    handle.remove()
    expected = ConstantFit(site.width)
    expected.update(seen[0])
    expected.update(seen[1], held_out=True)
    found = held_gain = seen[1].double() @ together[2].right.double()
    held_gain = seen[1].double() @ expected.solve(exact_mean=True).right.double()
    assert torch.allclose(found, held_gain, atol=1e-3)


def test_routed_experts_are_seen_with_their_tokens_and_weights(loaded) -> None:
    base = loaded("mixtral")
    module = base.model.get_submodule(f"model.layers.{base.layer}.mlp.experts")
    calls, outputs = [], []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with watch_routing(module, calls), torch.no_grad():
        base.model(input_ids=torch.tensor(base.rows(2, seed=3)))
    handle.remove()
    total = torch.zeros_like(outputs[0])
    for expert in range(module.down_proj.shape[0]):
        inputs = expert_inputs(module, module.down_proj, calls[0], expert, module.down_proj.shape[2])
        part = inputs.activations @ module.down_proj[expert].T * inputs.weights[:, None]
        total.index_add_(0, inputs.tokens, part.detach())
    assert torch.allclose(total, outputs[0], atol=1e-4)


def test_an_expert_that_no_token_went_to_is_counted(loaded) -> None:
    base = loaded("mixtral")
    site = find_site(base.architecture, base.layer)
    with torch.no_grad():
        gate = base.model.get_submodule(f"model.layers.{base.layer}.mlp.gate").weight
        saved = gate.clone()
        gate.zero_()
    try:
        vectors = {base.layer: base.vector()}
        found = fit_layers(
            base.model, "model.layers", {base.layer: site}, vectors, base.rows(40, seed=1), base.rows(8, seed=2)
        )[base.layer]
    finally:
        with torch.no_grad():
            gate.copy_(saved)
    assert found.unfitted_experts == 2
    assert int((found.right.abs().amax(dim=-1) == 0).sum()) == 2
    assert found.report()["unfitted_experts"] == 2


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4"])
def test_after_a_norm_the_linear_edit_is_better_than_the_naive_one(loaded, name: str) -> None:
    base = loaded(name)
    site = find_site(base.architecture, base.layer)
    assert site.gain == "norm"
    blocks, layer, vector = base.architecture.blocks, base.layer, base.vector()
    vectors, train, held = {layer: vector}, base.rows(250, seed=1), base.rows(30, seed=2)
    found = fit_layers(base.model, blocks, {layer: site}, vectors, train, held)[layer]
    norm = base.model.get_submodule(f"{blocks}.{layer}.{site.norm}")
    left = vector * norm_spread(norm, len(vector)) / site.factor
    measured = _effect(base, site, left, found.right, vector, held)
    report = found.report()
    assert measured["error"] == pytest.approx(report["error_mean"], abs=0.02)
    assert measured["cosine"] == pytest.approx(report["cosine"], abs=0.02)
    naive = fit_layers(base.model, blocks, {layer: replace(site, gain="constant", norm=None)}, vectors, train, held)
    assert measured["error"] < _effect(base, site, vector, naive[layer].right, vector, held)["error"]


def _effect(base: Loaded, site, left: torch.Tensor, right: torch.Tensor, vector: torch.Tensor, rows) -> dict:
    blocks, layer = base.architecture.blocks, base.layer
    parameter = base.model.get_parameter(f"{blocks}.{layer}.{site.parameter}")
    inputs, _mask = {"input_ids": torch.tensor(rows)}, None
    before = run_blocks(base.model, blocks, [layer], inputs)[layer]
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(torch.outer(left, right))
        after = run_blocks(base.model, blocks, [layer], inputs)[layer]
        parameter.copy_(saved)
    gain = (after - before).reshape(-1, len(vector))
    cosine = torch.nn.functional.cosine_similarity(gain, vector[None], dim=-1)
    return {"error": float((gain - vector).norm(dim=-1).mean() / vector.norm()), "cosine": float(cosine.mean())}


def test_the_best_amount_before_a_norm_is_the_best() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)

    generator = torch.Generator().manual_seed(2)
    norm, vector = Norm(), 0.5 * torch.randn(32, generator=generator)
    assert torch.allclose(norm_spread(norm, 32), 1 / (1 + norm.weight.detach()), atol=1e-4)
    response = NormResponse(norm, vector, 1.0)
    before = torch.randn(50, 32, generator=generator) * torch.logspace(-1, 1, 50)[:, None]
    amounts, weights = response.best_amounts(before)

    def errors(scaled: torch.Tensor) -> torch.Tensor:
        return (response.gain(before, scaled) - vector).norm(dim=-1)

    best = errors(amounts)
    for scale in (0.7, 0.9, 1.1, 1.4):
        assert bool((errors(amounts * scale) >= best - 1e-4).all())
    assert bool((weights > 0).all())


def test_a_norm_with_zeros_is_refused() -> None:
    norm = torch.nn.LayerNorm(8)
    with torch.no_grad():
        norm.weight[3] = 0
    with pytest.raises(InputError, match="weights of zero"):
        norm_spread(norm, 8)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_plan_after_a_norm_carries_the_norms_weight(loaded, name: str) -> None:
    base = loaded(name)
    plan, vectors = base.fit()
    assert plan.tensors[0].spread is not None
    inputs = {"input_ids": torch.tensor(base.rows(20, seed=3))}
    before = run_blocks(base.model, plan.blocks, [base.layer], inputs)[base.layer]
    with edited(base.model, plan, vectors):
        after = run_blocks(base.model, plan.blocks, [base.layer], inputs)[base.layer]
    error = (after - before - vectors[base.layer]).norm(dim=-1).mean() / vectors[base.layer].norm()
    assert float(error) < 2 * plan.fit["error_mean"]


def test_half_precision_is_rounded_as_it_is_stored(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "Qwen--Qwen3-8B", dtype=torch.bfloat16)
    base = Loaded(tmp_path / "base", layer)
    base.model.float()
    plan, vectors = base.fit()
    assert plan.tensors[0].dtype == "BF16"
    with edited(base.model, plan, vectors):
        weight = base.model.get_parameter(plan.tensors[0].parameter)
        assert torch.equal(weight, weight.bfloat16().float())


def test_experts_in_one_tensor_on_disk_are_refused(loaded) -> None:
    base = loaded("granitemoe")
    with pytest.raises(NotApplicable, match="one tensor for all experts"):
        rank_one.plan(base.architecture, [base.layer], base.checkpoint)


def test_the_embedding_is_refused(loaded) -> None:
    base = loaded("qwen3")
    with pytest.raises(NotApplicable, match="no MLP"):
        rank_one.plan(base.architecture, [-1], base.checkpoint)


def test_a_quantised_weight_is_refused(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded("qwen3")
    name = f"model.layers.{base.layer}.mlp.down_proj.weight"
    stored = {**base.checkpoint.tensors, name: replace(base.checkpoint.tensors[name], dtype="I8")}
    checkpoint = CheckpointFolder(base.folder)
    monkeypatch.setattr(checkpoint, "tensors", stored)
    with pytest.raises(NotApplicable, match="stored as I8"):
        rank_one.plan(base.architecture, [base.layer], checkpoint)


def test_an_attention_output_does_not_pass_for_the_mlps(loaded) -> None:
    base = loaded("qwen3")
    prefix = f"model.layers.{base.layer}.mlp."
    base_parameters = base.architecture.parameters
    architecture = Architecture(AutoConfig.from_pretrained(base.folder))
    architecture.parameters = {name: shape for name, shape in base_parameters.items() if not name.startswith(prefix)}
    with pytest.raises(NotApplicable, match=r"`self_attn\.o_proj\.weight` adds does not reach"):
        find_site(architecture, base.layer)
