"""How many bytes go to the Hub when a patched model is published whose base is there; the Hub is a loopback one."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support.hub_server import HubServer, User  # noqa: E402
from support.publishing import TOKEN, manifest  # noqa: E402

BASE, REPO = "org/base", "me/steered"
PUSH = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from patcher.publish.hub import push_folder
print(json.dumps(asdict(push_folder(Path(sys.argv[1]), sys.argv[2], token=sys.argv[3]))))
"""


def published(base: Path, folder: Path, home: Path) -> dict[str, Any]:
    """Publish ``folder``, a copy of ``base`` without its texts; {sent, method, size, whole}, in bytes.

    ``sent`` is all that the server was sent: the bodies of every request.
    """
    from safetensors.torch import save_file
    from torch import ones

    with HubServer() as hub:
        hub.users = {TOKEN: User("me")}
        contents: dict[str, Any] = {}
        for path in base.iterdir():
            with path.open("rb") as file:
                # Mapped, or the server would hold the model in memory.
                contents[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        repo = hub.add_repo(BASE, contents)
        save_file({"love.layer.1": ones(json.loads((folder / "config.json").read_text())["hidden_size"])},
                  folder / "steering.safetensors")  # fmt: skip
        (folder / "README.md").write_text(f"---\nbase_model: {BASE}\n---\n\n# Steered\n", encoding="utf-8")
        tree = repo.commits[repo.refs["main"]]
        files = [{"name": name, "size": len(blob.data), "sha256": blob.sha256} for name, blob in tree.items()]
        source = {"model": BASE, "hub": True, "revision": repo.refs["main"], "path": None, "adapter": None}
        (folder / "steering.json").write_text(json.dumps(manifest(base={**source, "files": files})), encoding="utf-8")
        command = [sys.executable, "-c", PUSH, str(folder), REPO, TOKEN]
        environment = {**os.environ, **hub.environment(str(home)), "PYTHONPATH": str(TESTS.parent)}
        environment |= {"PATCH_MODEL_CACHE": str(home / "hashes"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
        there = hub.repos[REPO].commits[answer["commit"]]
        local = {path.name: path.stat().st_size for path in folder.iterdir()}
        whole = all(len(there[name].data) == size for name, size in local.items() if name != "steering.json")
        result = {"sent": hub.uploaded(), "method": answer["method"], "size": sum(local.values()), "whole": whole}
        hub.repos.clear()
        hub.lfs.clear()
        return result
