"""What people give as a model that is none: each is named, by names of files and small JSON, before torch is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patcher.architectures.installed import text_models
from patcher.architectures.registry import excluded
from patcher.checkpoint.given import not_a_checkpoint, refuse_other_heads, require_checkpoint
from patcher.checkpoint.listing import Listing
from patcher.checkpoint.source import locate_model
from patcher.disk.lfs import is_pointer
from patcher.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4976698672\n"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def made(folder: Path, files: dict[str, object]) -> Path:
    """A folder of files: JSON for a mapping or a list, else the text."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def refusal(place: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        locate_model(str(place), recipe_folder=Path.cwd())
    return caught.value


KINDS: dict[str, tuple[dict[str, object], str, str]] = {
    "an adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "me/base"}, "adapter_model.safetensors": ""},
        "this is a PEFT adapter",
        "give it as `adapter:`, and its base (me/base) as `model`",
    ),
    "an adapter with its tokenizer and its training": (
        {
            "adapter_config.json": {},
            "adapter_model.bin": "",
            "tokenizer.json": {},
            "trainer_state.json": {},
            "optimizer.pt": "",
        },
        "this is a PEFT adapter",
        "give it as `adapter:`, and its base as `model`",
    ),
    "GGUF": (
        {"model-Q4_K_M.gguf": "GGUF", "config.json": LLAMA},
        "holds GGUF files",
        "patch-model gguf model-Q4_K_M.gguf",
    ),
    "a trainer's folder": (
        {
            "checkpoint-500/config.json": LLAMA,
            "checkpoint-1500/config.json": LLAMA,
            "checkpoint-1000/adapter_config.json": {},
            "tokenizer.json": {},
        },
        "holds 3 of them",
        "/checkpoint-1500",
    ),
    "a folder of the Hub's cache": (
        {"refs/main": "abc", "snapshots/0123abc/config.json": LLAMA, "blobs/x": ""},
        "holds one",
        "/snapshots/0123abc",
    ),
    "Meta's format": (
        {"params.json": {}, "consolidated.00.pth": "", "tokenizer.model": ""},
        "original format",
        "in the form of transformers",
    ),
    "Mistral's format": ({"params.json": {}, "consolidated.safetensors": ""}, "original format", "transformers"),
    "FSDP": (
        {"config.json": LLAMA, "pytorch_model_fsdp_0/.metadata": "", "pytorch_model_fsdp_0/__0_0.distcp": ""},
        "state of a training run",
        "in the form of transformers",
    ),
    "DeepSpeed": (
        {"global_step100/mp_rank_00_model_states.pt": "", "latest": "x", "zero_to_fp32.py": "", "config.json": LLAMA},
        "state of a training run",
        "in the form of transformers",
    ),
    "a run of verl, whose inner folder holds a config alone": (
        {"model_world_size_2_rank_0.pt": "", "huggingface/config.json": LLAMA},
        "state of a training run",
        "in the form of transformers",
    ),
    "Megatron": (
        {"latest_checkpointed_iteration.txt": "100", "iter_0000100/mp_rank_00/model_optim_rng.pt": ""},
        "state of a training run",
        "in the form of transformers",
    ),
    "NeMo 2": (
        {"weights/__0_0.distcp": "", "context/model.yaml": ""},
        "state of a training run",
        "in the form of transformers",
    ),
    "accelerate": (
        {"model.safetensors": "x", "optimizer.bin": "", "random_states_0.pkl": ""},
        "config.json is missing",
        "beside the weights",
    ),
    "a pipeline": ({"model_index.json": {}, "unet/config.json": {}}, "diffusers", "causal LM"),
    "sentence-transformers": (
        {"modules.json": [], "0_Transformer/x.txt": "", "config_sentence_transformers.json": {}},
        "sentence-transformers",
        "in the form of transformers",
    ),
    "ONNX": ({"config.json": LLAMA, "onnx/model.onnx": ""}, "ONNX alone", "transformers"),
    "TensorFlow": ({"config.json": LLAMA, "tf_model.h5": ""}, "TensorFlow alone", "transformers"),
    "Flax": ({"config.json": LLAMA, "flax_model.msgpack": ""}, "Flax alone", "transformers"),
    "a half download": (
        {"config.json": LLAMA, "model.safetensors.crdownload": ""},
        "has not come to its end",
        "download the checkpoint again",
    ),
    "no index": (
        {"config.json": LLAMA, "model-00001-of-00002.safetensors": "", "model-00002-of-00002.safetensors": ""},
        "model.safetensors.index.json is missing",
        "download model.safetensors.index.json",
    ),
    "another name": (
        {"config.json": LLAMA, "pytorch_model.safetensors": ""},
        "no weights have the name",
        "name it model.safetensors",
    ),
    "a tokenizer": (
        {"tokenizer.json": {}, "tokenizer_config.json": {}, "README.md": "x"},
        "a tokenizer alone",
        "give the folder of the model",
    ),
    "quantised MLX": (
        {"config.json": {**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, "model.safetensors": "x"},
        "MLX",
        "the version of this model that it was made from",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, kind: str) -> None:
    files, message, remedy = KINDS[kind]
    problem = refusal(made(tmp_path / "given", files)).problems[0]
    assert message in problem.message
    assert remedy in str(problem.remedy)


@pytest.mark.parametrize("kind", ["an adapter", "GGUF", "a trainer's folder", "Meta's format", "ONNX", "another name"])
def test_a_repository_is_named_in_the_same_words(tmp_path: Path, kind: str) -> None:
    files, message, _remedy = KINDS[kind]
    made(tmp_path, {name: content for name, content in files.items() if "/" not in name and name.endswith(".json")})
    found = not_a_checkpoint(Listing.of_paths(files, tmp_path, "model: me/model"))
    assert found is not None
    assert message in found.problems[0].message


@pytest.mark.parametrize(
    "beside",
    [
        ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"],
        ["global_step100/x", "zero_to_fp32.py", "latest"],
        ["model-Q8_0.gguf", "onnx/model.onnx", "tf_model.h5", "consolidated.safetensors", "params.json"],
        ["checkpoint-500/config.json", "adapter_config.json", "adapter_model.safetensors"],
        ["modules.json", "original/params.json"],
    ],
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_whole_checkpoint_is_one_whatever_lies_beside_it(tmp_path: Path, weights: str, beside: list[str]) -> None:
    content = {"weight_map": {"tensor": "model-1.safetensors"}} if weights.endswith(".json") else "x"
    made(tmp_path, {"config.json": LLAMA, weights: content, "model-1.safetensors": "x", **dict.fromkeys(beside, "x")})
    require_checkpoint(tmp_path, "model")


@pytest.mark.parametrize("half", ["", ".incomplete", ".crdownload", ".part"])
def test_shards_that_the_index_names_are_missing(tmp_path: Path, half: str) -> None:
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": {f"tensor.{name}": name for name in shards}}
    made(tmp_path, {"config.json": LLAMA, "model.safetensors.index.json": index, shards[0]: "x", shards[1]: "x"})
    if half:
        made(tmp_path, {shards[2] + half: "x"})
    problem = refusal(tmp_path).problems[0]
    assert problem.message == "a weight file is missing"
    assert str(problem.where).endswith(shards[2])
    assert (half in str(problem.found)) if half else problem.found is None
    (tmp_path / shards[1]).unlink()
    assert refusal(tmp_path).problems[0].message == "2 weight files that the index names are missing"
    made(tmp_path, dict.fromkeys(shards, "x"))
    require_checkpoint(tmp_path, "model")


def test_an_empty_folder_and_one_without_weights(tmp_path: Path) -> None:
    assert refusal(tmp_path).problems[0].message == "config.json is missing"
    made(tmp_path, {"config.json": LLAMA})
    assert "no weights that transformers would load" in refusal(tmp_path).problems[0].message


def test_what_a_remedy_names_is_taken(tmp_path: Path) -> None:
    files = {"checkpoint-9/config.json": LLAMA, "checkpoint-9/model.safetensors": "x", "checkpoint-10/config.json": {}}
    made(tmp_path, {**files, "checkpoint-10/model.safetensors": "x"})
    named = str(refusal(tmp_path).problems[0].remedy).rpartition(" ")[2]
    assert Path(named) == tmp_path / "checkpoint-10"
    require_checkpoint(Path(named), "model")
    odd = made(tmp_path / "odd", {"config.json": LLAMA, "pytorch_model.safetensors": "x"})
    refusal(odd)
    (odd / "pytorch_model.safetensors").rename(odd / "model.safetensors")
    require_checkpoint(odd, "model")


@pytest.mark.parametrize("name", ["epoch=1-step=10.ckpt", "hf_model_0001_0.pt", "full_model.bin"])
def test_a_pickle_of_another_name_gets_the_name_of_stock_loaders(tmp_path: Path, name: str) -> None:
    made(tmp_path, {"config.json": LLAMA, name: "x"})
    for given in (tmp_path, tmp_path / name):
        assert "name it pytorch_model.bin" in str(refusal(given).problems[0].remedy)
    (tmp_path / name).rename(tmp_path / "pytorch_model.bin")
    require_checkpoint(tmp_path, "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_copy_of_a_cache_without_what_its_links_name(tmp_path: Path, name: str) -> None:
    made(tmp_path / "blobs", {"config.json": LLAMA, "model.safetensors": "x", "tokenizer.json": {}})
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    shutil.copytree(snapshot, tmp_path / "whole")  # as cp -rL
    (tmp_path / "blobs" / name).unlink()
    problem = refusal(snapshot).problems[0]
    assert problem.message == "this is a link to a file that is not there"
    assert str(problem.where).endswith(name)
    require_checkpoint(tmp_path / "whole", "model")


def test_weights_without_a_config_are_taken_once_it_is_beside_them(tmp_path: Path) -> None:
    made(tmp_path, {"model.safetensors": "x"})
    assert "beside the weights" in str(refusal(tmp_path).problems[0].remedy)
    made(tmp_path, {"config.json": LLAMA})
    require_checkpoint(tmp_path, "model")


@pytest.mark.parametrize(
    ("file", "message", "remedy"),
    [
        ("m/model-Q4.gguf", "this is a GGUF file", "patch-model gguf model-Q4.gguf steered.gguf --from BUILT"),
        ("m/model.safetensors", "one file of a checkpoint", "give its folder: "),
        ("m/config.json", "one file of a checkpoint", "give its folder: "),
        ("alone/weights.safetensors", "a file of weights alone", "config.json and the tokenizer"),
        ("alone/model.ckpt", "a file of weights alone", "config.json and the tokenizer"),
        ("a/adapter_model.safetensors", "one file of an adapter", "give its folder: "),
        ("alone/model.zip", "an archive", "unpack it"),
        ("alone/notes.txt", "not a folder", "a Hub id"),
    ],
)
def test_a_file_is_no_model(tmp_path: Path, file: str, message: str, remedy: str) -> None:
    made(tmp_path, {"m/config.json": LLAMA, "m/model.safetensors": "x", "a/adapter_config.json": {}})
    made(tmp_path, {file: (tmp_path / file).read_text() if (tmp_path / file).exists() else "GGUF"[: "gguf" in file]})
    problem = refusal(tmp_path / file).problems[0]
    assert message in problem.message
    assert remedy in str(problem.remedy)
    if "its folder" in remedy and file.startswith("m/"):
        require_checkpoint(Path(str(problem.remedy).removeprefix("give its folder: ")), "model")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "tokenizer.json", "tokenizer.model", "config.json", "model-00001-of-00002.safetensors"],
)
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    made(tmp_path, {"config.json": LLAMA, "model.safetensors": "x"})
    before = (tmp_path / name).read_text() if (tmp_path / name).exists() else "{}"
    made(tmp_path, {name: POINTER})
    assert is_pointer(tmp_path / name)
    problem = refusal(tmp_path).problems[0]
    assert "Git LFS pointer" in problem.message
    assert name in f"{problem.where} {problem.found}"
    assert "git lfs pull" in str(problem.remedy)
    made(tmp_path, {name: before})  # which is what it does
    require_checkpoint(tmp_path, "model")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForSequenceClassification", "classifier or a reward model"),
        ("Qwen2ForTokenClassification", "classifier or a reward model"),
        ("InternLM2ForRewardModel", "classifier or a reward model"),
        ("Qwen2ForProcessRewardModel", "classifier or a reward model"),
        ("LlamaForQuestionAnswering", "chooses answers"),
        ("BertForMaskedLM", "an encoder"),
        ("T5EncoderModel", "an encoder"),
        ("LlamaForCausalLMEagle3", "a draft model"),
        ("DeepSeekMTPModel", "a draft model"),
    ],
)
def test_a_model_for_something_else_is_named(tmp_path: Path, architecture: str, kind: str) -> None:
    made(tmp_path, {"config.json": {**LLAMA, "architectures": [architecture]}, "model.safetensors": "x"})
    problem = refusal(tmp_path).problems[0]
    assert kind in problem.message
    assert architecture in str(problem.found)


def test_no_causal_lm_is_taken_for_something_else() -> None:
    for name, class_name in text_models().items():
        if name not in excluded():
            refuse_other_heads({"architectures": [class_name]}, "config.json")
    for stated in (None, [], "LlamaForCausalLM", [3], ["LlamaModel"], ["Qwen3NextForCausalLM"]):
        refuse_other_heads({"architectures": stated}, "config.json")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/me/model", "me/model"),
        ("https://huggingface.co/me/model/", "me/model"),
        ("huggingface.co/me/model/tree/main", "me/model"),
        ("https://huggingface.co/me/model/tree/v1.0", "me/model@v1.0"),
        ("https://huggingface.co/me/model/blob/main/config.json", "me/model"),
        ("https://huggingface.co/me/model?library=transformers", "me/model"),
        ("https://huggingface.co/me/model/discussions/3", "me/model"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("hf://me/model", "me/model"),
        ("https://hf.co/me/model", "me/model"),
    ],
)
def test_the_address_of_a_page_names_its_model(address: str, name: str) -> None:
    problem = refusal(Path(address)) if "//" not in address else _refused(address)
    assert str(problem.problems[0].remedy).endswith(f": {name}")
    assert locate_model(name, recipe_folder=Path.cwd()) == (name.partition("@")[0], name.partition("@")[2] or None)


def _refused(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        locate_model(text, recipe_folder=Path.cwd())
    return caught.value


@pytest.mark.parametrize("text", ["https://huggingface.co/datasets/me/x", "https://example.com/me/model"])
def test_other_addresses_name_none(text: str) -> None:
    assert "owner/name" in str(_refused(text).problems[0].remedy)


def test_a_model_is_looked_at_before_torch_is_imported(tmp_path: Path) -> None:
    made(tmp_path, {"adapter/adapter_config.json": {}})
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'adapter'}\nvectors: [{{name: a, layer: 1, pairs: [{{positive: a, negative: b}}]}}]\n"
    )
    code = (
        "import sys\nfrom patcher.cli import main\n"
        "try:\n    main([sys.argv[1]])\nexcept SystemExit as done:\n    print(done.code, 'torch' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["2", "False"]
    assert "PEFT adapter" in ran.stderr
