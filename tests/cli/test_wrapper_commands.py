"""Every command on a decoder inside a multimodal wrapper: what is read, copied, said, and given back."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import hashes
from support.command_line import Run, runner
from support.gguf_models import write_model
from support.patched_folders import back, patch, vector_of
from support.tiny_models import PAIRS, write_recipe
from support.tiny_wrappers import TEXT_BEFORE, wrapper_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.capture.batches import Batch, padded
from patcher.capture.model import load_causal_lm, load_tokenizer
from patcher.capture.reader import reader_in_memory
from patcher.capture.streaming.model import StreamedModel
from patcher.card.card import render_card
from patcher.card.written import loading_lines
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.folder import PROCESSOR_FILES, CheckpointFolder
from patcher.checkpoint.prepare import PreparedBase, read_config
from patcher.errors import InputError
from patcher.export import export_folder
from patcher.export.edits import read_edits
from patcher.gguf.edits import edits_of_folder
from patcher.pairs.pair import TokenisedSide
from patcher.patched.reading import read_manifest

LAYER = 1
ROUTES = {"llava": "flag", "gemma3": "carrier", "mistral3": "relabel", "qwen2_5_vl": "carrier"}
"""Families whose decoders have other names on disk, and the route that a build takes."""
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a family a base in shards, in bf16, whose processor holds the chat template; and a copy of it."""
    place = tmp_path_factory.mktemp("wrappers")

    @functools.cache
    def folders(name: str) -> tuple[Path, Path]:
        wrapper_checkpoint(place / name, name, sharded=True, dtype=torch.bfloat16, template="processor")
        manifest, _ = patch(place / name, place / f"{name}-out", {LAYER: vector_of(64, 1)})
        assert manifest["route"]["name"] == ROUTES[name]
        return place / name, place / f"{name}-out"

    return folders


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ROUTES)
def test_the_files_of_the_processor_travel_and_come_back(made: Made, tmp_path: Path, name: str) -> None:
    base, copy = made(name)
    wanted = {*PROCESSOR_FILES, "chat_template.json"} & {item.name for item in base.iterdir()}
    assert "preprocessor_config.json" in wanted and "chat_template.json" in wanted
    assert all((copy / file).read_bytes() == (base / file).read_bytes() for file in wanted)
    back(copy, tmp_path / "back")
    before, after = hashes(base), hashes(tmp_path / "back")
    assert before == after


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ROUTES)
def test_the_base_of_an_export_is_the_whole(made: Made, name: str) -> None:
    base, found = Architecture(read_config(made(name)[0])), read_edits(made(name)[1]).architecture()
    assert (found.class_name, found.blocks, found.block_count) == (base.class_name, base.blocks, base.block_count)
    assert found.parameters == base.parameters and found.auto_class == base.auto_class
    assert len(edits_of_folder(made(name)[1], 64, base.block_count)) == 1
    with pytest.raises(InputError, match="not as many blocks"):
        edits_of_folder(made(name)[1], 64, base.block_count + 1)


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_adapter_steers_the_stock_wrapper_as_a_hook_does(made: Made, tmp_path: Path, name: str) -> None:
    result = export_folder(made(name)[1], "peft", tmp_path / "adapter")
    names: dict[str, Any] = {}
    exec("\n".join(result.use), names)
    assert type(names["base"]).__name__ == Architecture(read_config(made(name)[0])).class_name
    ids = torch.tensor([TEXT_BEFORE])
    plain = transformers.AutoModelForImageTextToText.from_pretrained(made(name)[0]).eval()
    vector = vector_of(64, 1).to(plain.dtype)
    block = plain.get_submodule(Architecture(read_config(made(name)[0])).blocks)[LAYER]
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        block.register_forward_hook(
            lambda _module, _inputs, output: (
                (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
            )
        )
        hooked, tuned = plain(input_ids=ids).logits, names["model"].eval()(input_ids=ids).logits
    assert (hooked - tuned).abs().max() < 0.05 * (hooked - before).abs().max()


@pytest.mark.slow
def test_the_other_formats_are_of_the_decoder(made: Made, tmp_path: Path) -> None:
    for format in ("vector", "control-vector"):
        result = export_folder(made("gemma3")[1], format, tmp_path / format)
        assert result.layers == {LAYER: ["love"]}
    with pytest.raises(InputError, match="a norm follows the MLP"):
        export_folder(made("gemma3")[1], "peft", tmp_path / "peft")


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_lines_on_the_card_load_the_whole(made: Made, name: str) -> None:
    folder = made(name)[1]
    manifest = read_manifest(folder)
    lines, names = loading_lines(manifest, str(folder)), dict[str, Any]()
    exec("\n".join(lines), names)
    assert type(names["model"]).__name__ == manifest.route.architecture
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    inputs = names["processor"].apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert names["model"](**inputs).logits.shape[1] > 5
    card = render_card(manifest, None)
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText, AutoProcessor" in card
    assert 'pipeline("text-generation"' not in card
    no_processor = [file for file in manifest.base.files or [] if file.name not in PROCESSOR_FILES]
    lines = loading_lines(manifest.with_parts(base={"model": "x", "files": [f.as_json() for f in no_processor]}), "x")
    assert lines[-1] == 'tokenizer = AutoTokenizer.from_pretrained("x")'


def test_a_tokenizer_without_a_template_has_that_of_its_processor(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("llava")[0], tmp_path / "base"))
    held = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    found = load_tokenizer(folder)
    assert (found.chat_template, found.template_file) == (held, "chat_template.json")
    (folder / "chat_template.json").unlink()
    assert load_tokenizer(folder).chat_template is None
    content = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**content, "chat_template": held}))
    assert load_tokenizer(folder).template_file == "processor_config.json"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(folder).chat_template == "{{ messages[0].content }}"


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ROUTES)
def test_of_a_wrapper_nothing_is_loaded_that_texts_do_not_pass_through(made: Made, tmp_path: Path, name: str) -> None:
    folder = made(name)[0]
    checkpoint, architecture = CheckpointFolder(folder), Architecture(read_config(folder))
    needed = tensors_for_blocks(checkpoint.tensors, block_names(architecture), LAYER)
    inside = {key for key in checkpoint.tensors if "vis" in key.split(".layers.")[0].split(".blocks.")[0]}
    assert inside and not inside & needed, "no shard of the towers is asked for"

    model, _ = load_causal_lm(folder, dtype=torch.float32)
    absent = {key for key, parameter in model.named_parameters() if parameter.is_meta}
    assert absent and all(any(key.startswith(tower) for tower in architecture.towers) for key in absent)
    base = PreparedBase(checkpoint, folder, None)
    assert architecture.unread == sum(model.get_parameter(key).numel() for key in absent) > 0
    assert base.loaded_count(architecture) == base.parameter_count - architecture.unread

    streamed = StreamedModel(
        checkpoint, architecture.config, architecture.blocks, dtype=torch.float32, memory=1 << 28, scratch=tmp_path
    )
    hidden: list[torch.Tensor] = []
    batch = Batch(padded([TEXT_BEFORE], "right", 0)[0], ())
    streamed.run([batch], [LAYER], lambda _layer, _batch, found: hidden.append(found.clone()))
    assert streamed.bytes_read <= sum(checkpoint.tensors[key].size for key in needed)
    with torch.no_grad():
        stock = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        wanted = stock(input_ids=torch.tensor([TEXT_BEFORE]), output_hidden_states=True).hidden_states[LAYER + 1]
    assert (hidden[0][:, : len(TEXT_BEFORE)] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_gguf_file_of_a_tower_is_refused_in_words(made: Made, tmp_path: Path, run: Run) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.add_tensor("v.blk.0.ffn_down.weight", np.zeros((32, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    write_model(tmp_path / "text.gguf", "mistral3", blocks=4)
    for file, said in (("mmproj.gguf", "no text decoder"), ("text.gguf", "does not fit this GGUF model")):
        code, _, err = run("gguf", tmp_path / file, tmp_path / "out.gguf", "--from", made("llava")[1])
        assert code == 2 and said in err, err


@pytest.mark.slow_but("llava")
@pytest.mark.parametrize("name", ROUTES)
def test_prompts_that_share_what_they_begin_with_are_read_as_a_hook_on_the_stock_wrapper_does(
    made: Made, name: str
) -> None:
    model, _ = load_causal_lm(made(name)[0], dtype=torch.float32)
    architecture = Architecture(read_config(made(name)[0]))
    rows = [(*TEXT_BEFORE * 3, 90 + number, 91) for number in range(6)]
    sides = [TokenisedSide(row, tuple(range(len(row))), len(row) - 2) for row in rows]
    (read,) = reader_in_memory(model, architecture).read([(sides, [0, LAYER])])
    stock = transformers.AutoModelForImageTextToText.from_pretrained(made(name)[0], dtype=torch.float32).eval()
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer in (0, LAYER):
        stock.get_submodule(architecture.blocks)[layer].register_forward_hook(keep(layer))
    with torch.no_grad():
        stock(input_ids=torch.tensor(rows))
    for layer in (0, LAYER):
        wanted = seen[layer].mean(dim=1)
        assert (read[layer].read - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_a_build_and_what_follows(made: Made, tmp_path: Path, run: Run) -> None:
    pairs = [{"prompt": "How?", "positive": side["positive"], "negative": side["negative"]} for side in PAIRS]
    vectors = {}
    for mode in ("memory", "stream"):
        recipe = write_recipe(
            tmp_path / f"{mode}.yaml", made("llava")[0], LAYER, tmp_path / mode,
            vector={"pairs": pairs, "position": "mean"}, capture={"mode": mode}, evaluate={"prompts": ["Hello"]},
        )  # fmt: skip
        code, out, said = run(recipe, "--json", "--no-cache")
        assert code == 0, said
        built = json.loads(out)["manifest"]
        assert [entry["status"] for entry in built["verification"]] == ["passed"]
        assert built["route"]["loader"] == "AutoModelForImageTextToText"
        assert any("that of the processor is used (chat_template.json)" in note for note in built["notes"])
        vectors[mode] = load_file(tmp_path / mode / "steering.safetensors")[f"love.layer.{LAYER}"]
    assert (vectors["memory"] - vectors["stream"]).norm() < 1e-5 * vectors["memory"].norm()

    code, out, said = run("verify", tmp_path / "memory", "--json")
    assert code == 0 and all(check["passed"] is not False for check in json.loads(out)["checks"]), said
    code, _, said = run("reproduce", tmp_path / "memory")
    assert code == 0 and "byte for byte the same" in said
    code, out, said = run("chat", tmp_path / "memory", "--prompt", "Hello", "--max-tokens", 3, "--baked", "--json")
    assert code == 0 and len(json.loads(out)["answers"]) == 1 and "that of the processor is used" in said
    code, _, said = run("chat", tmp_path / "memory.yaml", "--prompt", "Hello", "--max-tokens", 3)
    assert code == 0, said
    code, out, _ = run("diff", made("llava")[0], tmp_path / "memory")
    assert "text_config.mlp_bias = true" in out
