"""What the tests of publishing share: tokens, a ``steering.json``, and what every error for people must be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.hub_client import Client
from support.hub_server import HubServer

REPO = "me/steered"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "steering.json",
    "steering.safetensors",
}
TOKEN, READ_ONLY, OTHER = "hf_" + "Writes0" * 5, "hf_" + "Reads00" * 5, "hf_" + "Other00" * 5


def no_token_in(texts: Iterable[bytes]) -> bool:
    return not any(token.encode() in text for text in texts for token in (TOKEN, READ_ONLY, OTHER))


@contextmanager
def client_of(hub: HubServer, home: Path) -> Iterator[Client]:
    """A client process with a home folder of its own, in which no token may be left."""
    client = Client(hub.environment(str(home / "hub")), home / "printed")
    yield client
    client.close()
    assert no_token_in(path.read_bytes() for path in home.rglob("*") if path.is_file()), "caches and logs"


def manifest(**changes: Any) -> dict[str, Any]:
    """A ``steering.json`` as a build writes it."""
    check = {"stack": "transformers", "version": "5.23.0", "status": "passed", "passed": True, "reference": "hook"}
    numbers = {"max_abs_logprob_diff": 1e-6, "noise_floor": 1e-6, "steering_effect": 2.1, "tolerance": 1e-4}
    bias = {"name": "model.layers.1.mlp.down_proj.bias", "kind": "created", "layer": 1, "factor": 1.0, "original": None}
    edit = {
        "name": "love",
        "layer": 1,
        "site": "model.layers.1.mlp.down_proj",
        "read_layer": 1,
        "tensor": "love.layer.1",
    }
    return {
        "format": 1,
        "tool_version": "0.1.0",
        "base": {"model": "gpt2-xl", "hub": True, "revision": "0" * 40, "path": None, "adapter": None, "files": []},
        "edits": [{**edit, "method": "mean_difference", "coefficient": 5.0, "norm": 12.3, "residual_norm": 60.1}],
        "route": {
            **{
                "name": "native",
                "exact": True,
                "cost": "none",
                "architecture": "LlamaForCausalLM",
                "blocks": "model.layers",
            },
            **{"tensors": [{**bias, "dtype": "F32", "shape": [16]}], "config_changes": {"mlp_bias": True}},
            "stacks": {"transformers": "native", "vllm": "native", "llama.cpp": "no"},
        },
        "verification": [{**check, "dtype": "float32", **numbers, "vector_rel_error": 0.0, "checks": []}],
        "evaluation": None,
        "recipe": {"text": "model: gpt2-xl\n", "resolved": {"model": "gpt2-xl"}},
        "notes": [],
        **changes,
    }


def refused(answer: dict[str, Any], exit_code: int, code: str) -> str:
    """The message of an expected error: right class, one screen, a remedy, no token."""
    assert (answer.get("exit_code"), answer.get("code")) == (exit_code, code), answer
    text: str = answer["text"]
    assert answer["remedy"] and answer["message"]
    assert len(text.splitlines()) <= 10 and len(text) <= 1200
    assert all(token not in text for token in (TOKEN, READ_ONLY, OTHER))
    return text


def shows_the_folder(
    hub: HubServer, folder: Path, repo: str = REPO, revision: str = "main", kept: Collection[str] = ()
) -> bool:
    """Whether the repository holds the folder's files, and no other but the Hub's own and those in ``kept``."""
    found = hub.repos[repo].files(revision)
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Without what may not be published, and therefore not the same to the byte.
    wanted["steering.json"] = found["steering.json"]
    wrong = set(found) ^ {*wanted, ".gitattributes", *kept}
    wrong |= {name for name, data in wanted.items() if found.get(name) != data}
    if wrong:
        print("missing, too many or different:", sorted(wrong))
    return not wrong


def steers(client: Client, repo: str, pair: tuple[Path, Path], **kwargs: Any) -> bool:
    """Whether stock transformers, loading ``repo`` from the Hub, does what the base does under the hook."""
    base, steered = pair
    vector = str(steered / "steering.safetensors")
    answer = client("steering", model=repo, base=str(base), vector=vector, **kwargs)
    error, effect = answer["result"]
    return bool(error < 1e-4 and effect > 1000 * error and effect > 0.5)
