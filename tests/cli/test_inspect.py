"""``patch-model inspect``: a folder, a Hub id, a name, or every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Run, runner
from support.hub_server import HubServer
from support.tiny_models import default_checkpoint, released_config, tiny_checkpoint, tiny_config

from patcher.architectures.installed import language_models, model_type_of, near_types, text_models
from patcher.architectures.registry import rows
from patcher.routes import all_architectures, inspection

ROUTES = ["native", "flag", "relabel", "parallel", "embedding", "carrier", "rank_one"]
STACKS = {"transformers", "vllm", "llama.cpp"}

CONFIGURATION = """
from transformers import LlamaConfig
class PlainConfig(LlamaConfig):
    model_type = "plain_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_plain import PlainConfig
class PlainForCausalLM(LlamaForCausalLM):
    config_class = PlainConfig
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "inspect")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama's config.json."""
    return tiny_config("meta-llama--Llama-3.2-1B", tmp_path_factory.mktemp("config"))[0]


@pytest.fixture
def hub() -> Iterator[Any]:
    with HubServer() as server:
        yield server


def test_it_loads_nothing_heavy_before_it_runs() -> None:
    program = (
        "import sys\nfrom patcher.cli import main\n"
        "try:\n    main(['inspect', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'rich', 'huggingface_hub') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--all" in finished.stdout and finished.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", ["llama", "LlamaForCausalLM", "Llama"])
def test_a_name(run: Run, name: str) -> None:
    code, out, _ = run(name, "--json")
    found = json.loads(out)
    assert code == 0 and found["architecture"] == "LlamaForCausalLM" and found["chosen"] == "flag"
    assert [route["name"] for route in found["routes"]] == ROUTES
    for route in found["routes"]:
        assert {"name", "exact", "cost", "stacks", "why_not"} <= set(route) and set(route["stacks"]) == STACKS
        assert bool(route["why_not"]) == (route["stacks"]["transformers"] == "no")
    assert [route["name"] for route in found["routes"] if not route["exact"]] == ["rank_one"]
    assert found["plan"]["config_changes"] == {"mlp_bias": True} and found["why_none"] is None


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [("LlamaForCausalLM", "llama"), ("DeepseekV3ForCausalLM", "deepseek_v3"), ("Glm4MoeForCausalLM", "glm4_moe")],
)
def test_a_class_that_several_types_share_is_the_one_that_it_is_named_after(class_name: str, model_type: str) -> None:
    assert sum(name == class_name for name in text_models().values()) > 1
    assert model_type_of(class_name) == model_type


def test_what_a_person_sees(run: Run) -> None:
    code, out, err = run("llama")
    assert code == 0 and "looking at" in err
    for words in ("run-time cost", "vLLM", "llama.cpp", "one more layer in 32", "chosen", "mlp_bias = True"):
        assert words in out
    assert "model.layers.12.mlp.down_proj.bias" in out, "what would be written"
    assert "native    the class creates no bias" in out, "why another does not apply, without the layer again"
    assert "…" not in out and max(map(len, out.splitlines())) <= 118


def test_a_folder_with_and_without_weights(run: Run, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny", "meta-llama--Llama-3.2-1B", tokenizer=False)
    code, out, _ = run(tmp_path / "tiny", "--json")
    found = json.loads(out)
    assert code == 0 and found["chosen"] == "flag" and found["blocks"] == 4 and found["layers"] == [1]
    (tmp_path / "tiny" / "model.safetensors").unlink()
    code, out, _ = run(tmp_path / "tiny", "--json", "--layer", 2, "--layer", 0)
    assert code == 0 and json.loads(out)["layers"] == [2, 0]


def test_a_folder_comes_before_a_name(
    run: Run, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    assert json.loads(run("gpt2", "--json")[1])["architecture"] == "LlamaForCausalLM"


@pytest.mark.slow
def test_options_change_the_choice(run: Run, config: dict[str, Any], tmp_path: Path) -> None:
    config = {**config, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def found(*options: object) -> dict[str, Any]:
        code, out, err = run(tmp_path, "--json", *options)
        assert code == 0, err
        return json.loads(out)

    assert found("--layer", -1)["chosen"] == "embedding"
    assert found("--prefer", "free")["chosen"] == "relabel"
    only = found("--targets", "llama.cpp,vllm")
    assert only["chosen"] == "carrier"
    assert "llama.cpp does not read it" in next(r["why_not"] for r in only["routes"] if r["name"] == "relabel")
    refused = found("--route", "rank_one")
    assert refused["chosen"] is None and "--no-exact" in refused["why_none"]["remedy"]
    assert found("--route", "rank_one", "--no-exact")["chosen"] == "rank_one"


def test_no_route_is_an_answer(run: Run) -> None:
    code, out, _ = run("llama", "--json", "--route", "native")
    found = json.loads(out)
    assert code == 0 and found["chosen"] is None and found["plan"] is None and found["why_none"]["message"]
    code, out, _ = run("llama", "--route", "native")
    assert code == 0 and "no route" in out and "do not apply" in out


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "give a MODEL, or --all"),
    "both": (["llama", "--all"], "give a MODEL, or --all"),
    "no such folder": (["./nowhere"], "no such model folder"),
    "neither": (["a / b"], "an architecture such as qwen3"),
    "too long": (["x" * 5000], "not a usable path"),
    "a part of a wrapper": (["qwen3_vl_text"], "part of qwen3_vl"),
    "no causal LM": (["t5"], "not a text causal LM"),
    "no such layer": (["llama", "--layer", "32"], "use 0 to 31, or -1 for the embedding"),
    "no such route": (["llama", "--route", "magic"], "known routes"),
    "no such stack": (["llama", "--targets", "vllm,lama"], "`lama`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_message(run: Run, name: str) -> None:
    arguments, expected = WRONG[name]
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and expected in err and "Traceback" not in err
    code, out, _ = run(*arguments, "--json")
    error = json.loads(out)["error"]
    assert code == 2 and {"code", "message", "where", "found", "remedy"} <= set(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 0}, "0 blocks"),
        ({"hidden_size": 0}, "hidden 0"),
        ({"num_attention_heads": 0}, "does not understand"),
        ({"model_type": "nope"}, "nope"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised"),
    ],
)
def test_a_config_that_makes_no_model(
    run: Run, config: dict[str, Any], tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    code, out, err = run(tmp_path)
    assert code == 2 and out == "" and expected in err


@pytest.mark.slow
def test_a_multimodal_config(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released_config("google--gemma-3-4b-it")))
    code, out, err = run(tmp_path)
    assert code == 0 and "Gemma3ForConditionalGeneration" in out + err and "carrier" in out + err


def test_code_of_the_models_own(
    run: Run, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, text in _remote(config).items():
        (folder / name).write_bytes(text)
    code, out, err = run(folder)
    assert code == 2 and out == "" and "code of its own" in err and "--trust-remote-code" in err
    assert not (tmp_path / "modules").exists()
    code, out, err = run(folder, "--trust-remote-code", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["architecture"] == "PlainForCausalLM" and found["chosen"] == "flag"


@pytest.mark.slow
def test_a_hub_model_is_its_config_alone(hub: Any, config: dict[str, Any], tmp_path: Path) -> None:
    files = {"model.safetensors": b"weights", "README.md": b"# Base", "tokenizer.json": b"{}"}
    hub.add_repo("me/base", {"config.json": json.dumps(config).encode(), **files})
    done = _inspect(hub, tmp_path, "me/base@main", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "me/base@main" and found["chosen"] == "flag"
    assert hub.requests and all(request.endswith("/config.json") for request in hub.requests), hub.requests
    assert [path.name for path in (tmp_path / "home").rglob("snapshots/*/*")] == ["config.json"]


@pytest.mark.slow
def test_a_hub_models_code_is_fetched_only_if_trusted(hub: Any, config: dict[str, Any], tmp_path: Path) -> None:
    hub.add_repo("me/plain", {**_remote(config), "model.safetensors": b"weights"})
    done = _inspect(hub, tmp_path, "me/plain", "--trust-remote-code", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "PlainForCausalLM"
    assert not any(".safetensors" in request for request in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "fault", "code", "words"),
    [
        ("me/nowhere", None, 2, "me/nowhere"),
        ("lama", None, 2, "or give an architecture: llama"),
        ("me/base", 403, 3, "no right"),
    ],
)
def test_the_hub_says_no(hub: Any, tmp_path: Path, model: str, fault: int | None, code: int, words: str) -> None:
    if fault is not None:
        hub.fail("config.json", status=fault, message="not today")
    done = _inspect(hub, tmp_path, model, "--json")
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout)["error"]["remedy"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers of an exact type, a fitted one, one without a route and one that cannot even be looked at."""
    found = inspection.default_config
    monkeypatch.setattr(inspection, "language_models", lambda: ("gpt2", "mpt", "opt", "reformer"))

    def default_config(name: str) -> Any:
        if name == "opt":
            raise ZeroDivisionError("a class of another release")
        return found(name)

    monkeypatch.setattr(inspection, "default_config", default_config)


@pytest.mark.slow
def test_all(run: Run, few: None) -> None:
    code, out, err = run("--all")
    assert code == 0 and err == "looking at every architecture\n"
    assert "could not be looked at" in out and "a class of another release" in out
    assert "4 architectures: 1 exact, of which 1 at no run-time cost; 1 only fitted; 2 without a route" in out
    assert "read by: transformers 2" in out and max(map(len, out.splitlines())) <= 118

    code, out, _ = run("--all", "--json")
    found = {one["model"]: one for one in json.loads(out)["architectures"]}
    assert code == 0 and list(found) == ["gpt2", "mpt", "opt", "reformer"]
    assert found["gpt2"]["chosen"] == "native" and [route["name"] for route in found["gpt2"]["routes"]] == ["native"]
    assert found["mpt"]["chosen"] is None and found["mpt"]["routes"][0]["name"] == "rank_one"
    assert found["opt"]["architecture"] is None and found["reformer"]["why_none"]["message"]


def test_all_can_be_interrupted(run: Run, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "default_config", interrupted)
    code, out, err = run("--all")
    assert code == 130 and out == "" and "interrupted" in err


PROGRAM = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    print(json.dumps({"model": name}), flush=True)
"""


def test_a_class_that_takes_its_process_down_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_architectures, "_COMMAND", [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(all_architectures, "_MOST_SECONDS", 2.5)
    names = ["a", "dies", "b", "hangs", "c", "d", "dies", "e"]
    found: list[tuple[str, dict[str, Any]]] = []
    all_architectures._side_by_side(names, {}, lambda name, body: found.append((name, body)))
    assert sorted(name for name, _ in found) == sorted(names)
    for name, body in found:
        why = (body.get("why_none") or {}).get("found", "")
        assert {"dies": "exit status 3" in why, "hangs": "longer than 2" in why}.get(name, body == {"model": name})


@pytest.mark.parametrize("model_type", language_models())
def test_every_installed_type_is_known_by_its_name(model_type: str) -> None:
    assert model_type_of(model_type) == model_type == model_type_of(model_type.upper().replace("_", "-"))
    assert model_type in near_types(model_type + "x")


@pytest.mark.slow
def test_a_type_that_no_row_is_about_is_analysed(run: Run) -> None:
    assert "sarvam_moe" in text_models() and "sarvam_moe" not in rows()
    found = json.loads(run("sarvam_moe", "--json")[1])
    assert found["architecture"] == "Glm4MoeForCausalLM" and found["chosen"] == "carrier"


@pytest.mark.slow
def test_the_name_of_a_multimodal_model(run: Run) -> None:
    found = json.loads(run("llava", "--json")[1])
    assert found["architecture"] == "LlavaForConditionalGeneration" and found["chosen"] == "flag"


def test_the_part_of_a_wrapper_names_the_wrapper(run: Run) -> None:
    code, _, err = run("qwen3_vl_text")
    assert code == 2 and "it is a part of qwen3_vl" in err and "patch-model inspect qwen3_vl" in err


def test_a_class_that_fails_is_told_in_words(run: Run, config: dict[str, Any], tmp_path: Path, few: None) -> None:
    code, out, err = run("opt")
    assert code == 2 and out == "" and "a class of another release" in err and "a checkpoint folder" in err
    # What is advised helps: the same type by a config of its own.
    default_checkpoint(tmp_path / "opt", "opt", tokenizer=False)
    assert run(tmp_path / "opt")[0] == 0


def _remote(config: dict[str, Any]) -> dict[str, bytes]:
    names = {"AutoConfig": "configuration_plain.PlainConfig", "AutoModelForCausalLM": "modeling_plain.PlainForCausalLM"}
    raw = {**config, "model_type": "plain_llama", "architectures": ["PlainForCausalLM"], "auto_map": names}
    return {
        "config.json": json.dumps(raw).encode(),
        "configuration_plain.py": CONFIGURATION.encode(),
        "modeling_plain.py": MODELING.encode(),
    }


def test_a_folder_tells_what_a_constant_is_off_by(run: Run, tmp_path: Path) -> None:
    found = {}
    for rms in (0.02, 2.0):
        layer = default_checkpoint(tmp_path / str(rms), "qwen3", 1, tokenizer=False, embedding_rms=rms)
        code, said, _ = run(tmp_path / str(rms), "--layer", layer, "--json")
        assert code == 0
        (carrier,) = (route for route in json.loads(said)["routes"] if route["name"] == "carrier")
        found[rms] = carrier["constant"]
    # epsilon / (mean square + epsilon), with an epsilon of 1e-6
    assert 1e-3 < found[0.02]["typical"] < found[0.02]["worst"] < 0.02
    assert found[2.0]["worst"] < 1e-6
    assert found[0.02]["measured_on"] == "embedding rows"
    assert "as if no block added anything; a build measures more" in " ".join(run(tmp_path / "0.02")[1].split())


def _inspect(hub: Any, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **hub.environment(str(tmp_path / "home"))}
    command = [sys.executable, "-m", "patcher", "inspect", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
