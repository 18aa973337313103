"""Whether a base is complete: no checkpoint that stock software loads whole is refused, and each that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import gpt2, llama, load, save
from support.default_configs import TEXT_TYPES, default_config
from support.quantised_models import METHODS, quantise
from support.tiny_models import tiny_checkpoint
from transformers import AutoModelForCausalLM

from patcher.architectures.loading import stock_loading
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.checkpoint.bin_files import convert_bin
from patcher.checkpoint.completeness import Reading, require_complete, stored_in
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.stored_names import write_renamed
from patcher.errors import InputError

Tensors = dict[str, torch.Tensor]
QUICK = ["llama", "gpt2", "mixtral", "gemma4_text", "deepseek_v3", "gpt_oss", "bloom", "bart", "opt"]


def read(folder: Path) -> Reading:
    return require_complete(CheckpointFolder(folder), str(folder))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def restate(folder: Path, **keys: Any) -> Path:
    stated = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def refusal(folder: Path) -> Mapping[str, Any]:
    with pytest.raises(InputError) as caught:
        read(folder)
    problem = caught.value.problems[0]
    return {"code": caught.value.code, **problem.as_json(), "all": str(caught.value)}


@pytest.mark.slow_but(*QUICK)
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_no_class_is_refused_as_it_is_saved(tmp_path: Path, model_type: str) -> None:
    full = default_config(model_type)
    config, _layer = shrink_config(full, 1)
    if hasattr(config, "decoder_vocab_size"):  # not shrunk with the other
        config.decoder_vocab_size = config.vocab_size
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
        config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("one", "shards", "bin"):
        config, (stored, _nests) = read_config(tmp_path / name), stored_in(CheckpointFolder(tmp_path / name))
        found = stock_loading(config, stored)
        assert found is not None
        assert (found.missing, found.mismatched, found.unread) == ((), (), ()), name
    # What is looked at is really looked at: without its embedding, a checkpoint is not whole.
    held = model.state_dict()
    embedding = model.get_input_embeddings().weight.data_ptr()
    tied = [name for name in stored if held[name].data_ptr() == embedding]
    lacking = stock_loading(config, {name: stored[name] for name in stored if name not in tied})
    assert lacking is not None
    assert set(tied) & set(lacking.missing)


@pytest.mark.slow_but("*-gpt2", "*-mixtral")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "falcon", "opt", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "student.net.", "the class's own"]
)
def test_a_prefix_of_any_class_is_stripped(tmp_path: Path, model_type: str, prefix: str) -> None:
    config, _layer = shrink_config(default_config(model_type), 1)
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    if prefix == "the class's own":  # which stock transformers forgives
        prefix = f"{model.base_model_prefix}."
    rewrite(tmp_path, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    reading = read(tmp_path)
    assert reading.stripped
    assert all(text in prefix for text in reading.stripped)
    assert f"`{reading.stripped[0]}`" in reading.notes[0]
    target = write_renamed(CheckpointFolder(tmp_path), tmp_path / "renamed", reading.stripped)
    after = load_file(target.path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", [*METHODS])
def test_no_quantised_checkpoint_is_refused_and_its_head_is_missed(tmp_path: Path, method: str) -> None:
    released = "openai--gpt-oss-20b" if method == "mxfp4" else "meta-llama--Llama-3.1-8B-Instruct"
    tiny_checkpoint(tmp_path / "base", released, tokenizer=False, hidden_size=64, intermediate_size=64)
    quantise(tmp_path / "base", method)
    assert read(tmp_path / "base") == Reading()
    rewrite(tmp_path / "base", without("lm_head.weight"))
    assert "`lm_head.weight`" in refusal(tmp_path / "base")["message"]


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_is_read_as_it_is(tmp_path: Path, tied: bool, sharded: bool) -> None:
    assert read(save(llama(tie_word_embeddings=tied), tmp_path, sharded=sharded)) == Reading()


def test_a_head_that_is_not_tied_is_missed(tmp_path: Path) -> None:
    folder = rewrite(save(llama(), tmp_path), without("lm_head.weight"))
    found = refusal(folder)
    assert found["code"] == "incomplete"
    assert "does not store `lm_head.weight`" in found["message"]
    assert "at every load" in found["message"]
    # The remedy, for a model whose head is its embedding.
    assert "tie_word_embeddings: true" in found["remedy"]
    assert read(restate(folder, tie_word_embeddings=True)) == Reading()


def test_a_tensor_inside_is_missed_and_a_whole_copy_mends_it(tmp_path: Path) -> None:
    folder, name = save(llama(), tmp_path), "model.layers.1.mlp.up_proj.weight"
    before = load_file(folder / "model.safetensors")
    found = refusal(rewrite(folder, without(name)))
    assert f"`{name}`" in found["message"]
    assert "transformers" not in found["remedy"]
    assert "get the whole checkpoint" in found["remedy"]
    assert read(rewrite(folder, lambda _tensors: before)) == Reading()


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    layer = "model.layers.1."
    folder = rewrite(
        save(llama(), tmp_path), lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(layer)}
    )
    assert "and 6 more" in refusal(folder)["message"]


def test_a_bare_model_lacks_its_head(tmp_path: Path) -> None:
    folder = restate(rewrite(save(llama(), tmp_path), without("lm_head.weight")), architectures=["LlamaModel"])
    found = refusal(folder)
    assert "LlamaModel" in found["found"]
    assert "without an output head" in found["remedy"]
    # Where the head is the embedding, nothing is missing.
    assert read(restate(folder, tie_word_embeddings=True)) == Reading()


def test_names_without_the_base_models_prefix_stay_as_they_are(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path)
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    assert read(folder) == Reading()
    load(folder)


def test_a_doubled_prefix_is_stripped_though_stock_transformers_reads_it(tmp_path: Path) -> None:
    """Other stacks do not, and the copy is for them as well."""
    folder = save(llama(), tmp_path)
    rewrite(folder, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()})
    load(folder)
    assert read(folder).stripped == ("model.",)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_told(tmp_path: Path) -> None:
    """Stock transformers uses what is stored, vLLM the embedding."""
    folder = restate(save(llama(), tmp_path), tie_word_embeddings=True)
    (note,) = read(folder).notes
    assert "`tie_word_embeddings: true`, and the stored `lm_head.weight` is not `model.embed_tokens.weight`" in note
    # What the note says to do.
    assert read(restate(folder, tie_word_embeddings=False)) == Reading()
    # A head that is stored though it is the embedding is none of its own.
    restate(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert read(folder) == Reading()


def test_modules_that_were_compiled_one_by_one(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    rewrite(
        folder,
        lambda tensors: {
            "module." + name.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._orig_mod."): t
            for name, t in tensors.items()
        },
    )
    reading = read(folder)
    assert reading.stripped == ("_orig_mod.", "module.")
    load(write_renamed(CheckpointFolder(folder), tmp_path / "renamed", reading.stripped).path)


def test_a_compiled_model_without_its_head_lacks_it(tmp_path: Path) -> None:
    folder = rewrite(save(llama(), tmp_path), without("lm_head.weight"))
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    found = refusal(folder)
    assert "does not store `lm_head.weight`" in found["message"]
    assert "without `_orig_mod.`" in found["found"]


def test_what_is_beside_the_prefixed_model_is_told(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    rewrite(
        folder,
        lambda tensors: {
            **{f"pretrained_model.{name}": tensor for name, tensor in tensors.items()},
            "v_head.summary.weight": torch.zeros(1, 32),
        },
    )
    reading = read(folder)
    assert reading.stripped == ("pretrained_model.",)
    assert "`v_head.summary.weight`" in reading.notes[1]


def test_two_models_in_one_checkpoint_are_not_chosen_from(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    rewrite(
        folder,
        lambda tensors: {
            f"{whose}.{name}": tensor.clone() for whose in ("teacher", "student") for name, tensor in tensors.items()
        },
    )
    found = refusal(folder)
    assert {"`teacher.`", "`student.`"} <= set(found["found"].replace(",", " ").split())
    rewrite(
        folder,
        lambda tensors: {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")},
    )
    assert read(folder) == Reading()


def test_names_of_another_program_are_shown(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    rewrite(
        folder,
        lambda tensors: {
            name.replace("model.layers", "decoder.blocks").replace("self_attn", "mixer").replace("mlp", "ffn"): tensor
            for name, tensor in tensors.items()
        },
    )
    found = refusal(folder)
    assert "not those of LlamaForCausalLM" in found["message"]
    assert "decoder.blocks.0" in found["found"]


def test_an_unmerged_adapter_is_named_and_a_merged_one_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = save(llama(), tmp_path / "base")
    tuned = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    tensors = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found = refusal(base)
    assert found["code"] == "unmerged"
    assert "lora_A" in found["found"] or "base_layer" in found["found"]
    assert "merge_and_unload" in found["remedy"]
    with quiet_transformers():
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert read(tmp_path / "merged") == Reading()


def more_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:3]])


def test_a_stale_vocabulary_size(tmp_path: Path) -> None:
    folder, names = save(llama(), tmp_path), ("lm_head.weight", "model.embed_tokens.weight")
    rewrite(folder, lambda tensors: {k: more_rows(v) if k in names else v for k, v in tensors.items()})
    found = refusal(folder)
    assert found["code"] == "shapes"
    assert "`model.embed_tokens.weight` has 67 rows, and config.json says vocab_size 64" in found["message"]
    assert "`lm_head.weight`" in found["message"]
    assert "set vocab_size to 67" in found["remedy"]
    assert read(restate(folder, vocab_size=67)) == Reading()


def test_a_head_with_more_rows_than_the_embedding_gets_no_advice_on_the_config(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    rewrite(folder, lambda tensors: {k: more_rows(v) if k == "lm_head.weight" else v for k, v in tensors.items()})
    for size in (64, 67):  # with neither do both fit
        assert "vocab_size to" not in refusal(restate(folder, vocab_size=size))["remedy"]


def test_norms_under_the_names_of_tensorflow_are_not_taken_for_a_missing_head(tmp_path: Path) -> None:
    config, _layer = shrink_config(default_config("gpt2"), 1)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {k.replace("ln_1.weight", "ln_1.gamma"): v for k, v in tensors.items()})
    found = refusal(tmp_path)
    assert "ln_1.gamma" in found["found"]
    assert "head" not in found["remedy"]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_plain_weights_whose_config_says_that_they_are_quantised_are_told(tmp_path: Path, method: str) -> None:
    folder = restate(save(llama(), tmp_path), quantization_config={"quant_method": method, "bits": 4})
    (note,) = read(folder).notes
    assert f"quantised ({method}), and none is stored so" in note
    stated = json.loads((folder / "config.json").read_text())
    del stated["quantization_config"]  # which is what it says
    (folder / "config.json").write_text(json.dumps(stated))
    assert read(folder) == Reading()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_whose_config_does_not_say_so_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, name = save(llama(), tmp_path), "model.layers.0.mlp.up_proj.weight"
    before = load_file(folder / "model.safetensors")
    scales = {f"{name}_scale_inv": torch.ones(1)}
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name].to(dtype), **scales})
    found = refusal(folder)
    assert f"stores `{name}` quantised" in found["message"]
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if dtype != torch.int8:  # which is what the remedy brings back
        read(restate(folder, quantization_config=stated))
        restate(folder, quantization_config=None)
        rewrite(folder, lambda tensors: {**before, name: tensors[name]})
        assert read(folder) == Reading()  # a plain cast, which stock loaders undo


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("intermediate_size", 40, "config.json says intermediate_size 40"),
        ("num_key_value_heads", 4, "has 16 rows, and"),
        ("hidden_size", 64, "config.json says hidden_size 64"),
        ("vocab_size", 60, "config.json says vocab_size 60"),
    ],
)
def test_a_config_of_other_sizes(tmp_path: Path, key: str, value: int, said: str) -> None:
    folder = save(llama(), tmp_path)
    before = (folder / "config.json").read_text()
    found = refusal(restate(folder, **{key: value}))
    assert said in found["message"]
    if key != "vocab_size":
        assert "the config.json that was saved with these weights" in found["remedy"]
    (folder / "config.json").write_text(before)
    assert read(folder) == Reading()


def test_a_config_that_asks_for_more(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    before = (folder / "config.json").read_text()
    found = refusal(restate(folder, attention_bias=True))
    assert "self_attn.k_proj.bias" in found["message"]
    assert "the config.json that was saved with these weights" in found["remedy"]
    (folder / "config.json").write_text(before)
    assert read(folder) == Reading()


def test_more_layers_than_the_config_says_are_told(tmp_path: Path) -> None:
    folder = restate(save(llama(), tmp_path), num_hidden_layers=1)
    (note,) = read(folder).notes
    assert "do not read" in note
    assert "model.layers.1." in note
    assert "model.layers.2." in refusal(restate(folder, num_hidden_layers=3))["message"]


def test_an_expert_is_missing(tmp_path: Path) -> None:
    config, _layer = shrink_config(default_config("mixtral"), 1)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "experts" in name]
    before = load_file(tmp_path / "model.safetensors")
    assert f"does not store `{names[-1]}`" in refusal(rewrite(tmp_path, without(names[-1])))["message"]
    assert read(rewrite(tmp_path, lambda _tensors: before)) == Reading()


def test_parts_that_other_processes_hold_are_empty(tmp_path: Path) -> None:
    folder, name = save(llama(), tmp_path), "model.embed_tokens.weight"
    found = refusal(rewrite(folder, lambda tensors: {**tensors, name: torch.zeros(0)}))
    assert f"stores `{name}` without any number" in found["message"]
    assert "vocab_size" not in found["all"]
    assert "no tensor" in refusal(rewrite(folder, lambda _tensors: {}))["message"]


def test_masks_of_earlier_releases_are_no_news(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path)
    mask = torch.ones(1, 1, 64, 64).tril()
    rewrite(folder, lambda tensors: {**tensors, "transformer.h.0.attn.bias": mask})
    assert read(folder) == Reading()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_by_their_names(tmp_path: Path, zipped: bool) -> None:
    folder = save(llama(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert read(folder) == Reading()
    kept = without("lm_head.weight")(tensors)
    torch.save(kept, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "`lm_head.weight`" in refusal(folder)["message"]


@pytest.mark.parametrize("nest", ["state_dict", "model", "module", "model_state_dict"])
def test_a_training_frameworks_pickle_is_read_from_inside(tmp_path: Path, nest: str) -> None:
    folder = save(llama(), tmp_path)
    tensors = {f"net.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, nest: tensors, "optimizer": {"lr": 0.1}}, folder / "pytorch_model.bin")
    reading = read(folder)
    assert reading.stripped == (f"{nest}.", "net.")
    converted = convert_bin(CheckpointFolder(folder), tmp_path / "converted")
    load(write_renamed(converted, tmp_path / "renamed", reading.stripped).path)


def test_a_state_dict_alone_is_what_a_pickle_should_hold(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"weights": tensors, "step": 3}, folder / "pytorch_model.bin")
    assert "state dict alone" in refusal(folder)["remedy"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert read(folder) == Reading()
