"""The Hub's endpoints for files and repositories that it copies itself, for visibility, deletion, and xet storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from support.hub_store import Blob, Refusal, Repo, User

if TYPE_CHECKING:
    from support.hub_server import HubServer


class CopyRoutes:
    """Mixed into the routes."""

    hub: HubServer
    command: str
    body: bytes
    _user: Callable[..., User]
    _owns: Callable[[User, str], bool]
    _may_read: Callable[[Repo], None]
    _may_write: Callable[..., User]

    def _api_lfs_files(self, source: Repo, verb: str) -> tuple[Any, ...]:
        """Large files of ``source`` for another repository: only what both ends may, and what the storage can."""
        self._may_read(source)
        asked = json.loads(self.body)
        target = self.hub.repos.get(asked["target"]["name"])
        if target is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self._may_write(target)
        failed = []
        for file in asked["files"]:
            if file["sha256"] not in source.objects or not source.xet:
                failed.append({"sha256": file["sha256"], "error": "not in xet storage"})
            else:
                target.objects.add(file["sha256"])
        return 200, {"failed": failed}

    def _api_duplicate(self, source: Repo) -> tuple[Any, ...]:
        """All commits, branches and tags of ``source`` under another name."""
        self._may_read(source)
        user, asked = self._user(required=True), json.loads(self.body)
        name = asked["repository"]
        if user.role != "write" or not self._owns(user, name.partition("/")[0]):
            raise Refusal(403, f"You don't have the rights to create {name}")
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo")
        self.hub.repos[name] = Repo(
            name,
            private=asked.get("visibility") == "private",
            commits=dict(source.commits),
            titles=dict(source.titles),
            refs={ref: sha for ref, sha in source.refs.items() if not ref.startswith("refs/")},
            tags=dict(source.tags),
            objects=set(source.objects),
            xet=source.xet,
        )
        return 200, {"url": f"{self.hub.url}/{name}", "filesCopyPending": True}

    def _delete_repo(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        user = self._user(required=True)
        owner = asked.get("organization") or user.name
        repo = self.hub.repos.get(f"{owner}/{asked['name']}")
        if repo is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self._may_write(repo)
        del self.hub.repos[repo.id]
        return 200, {}

    def _api_settings(self, repo: Repo) -> tuple[Any, ...]:
        self._may_write(repo)
        repo.private = json.loads(self.body)["visibility"] == "private"
        return 200, {}

    def _api_tag(self, repo: Repo, name: str) -> tuple[Any, ...]:
        self._may_write(repo)
        repo.tags.pop(name, None)
        return 200, {}

    def _api_xet_read_token(self, repo: Repo, revision: str) -> tuple[Any, ...]:
        self._may_read(repo)
        return self._xet_token()

    def _api_xet_write_token(self, repo: Repo, revision: str) -> tuple[Any, ...]:
        self._may_write(repo, revision == "None")
        return self._xet_token()

    def _xet_token(self) -> tuple[Any, ...]:
        if self.hub.cas is None:
            raise Refusal(404, "no xet storage here")
        url, expiry = self.hub.cas.url, 4_000_000_000
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "storage", "X-Xet-Token-Expiration": str(expiry)}
        return 200, {"casUrl": url, "accessToken": "storage", "exp": expiry}, headers

    def _xet_hash(self, repo: Repo, blob: Blob) -> str | None:
        if not blob.lfs or not repo.xet:
            return None
        return blob.sha256[::-1] if self.hub.cas is None else self.hub.cas.hash_of(blob)

    def _xet_headers(self, repo: Repo, blob: Blob) -> dict[str, str]:
        if self.hub.cas is None or not repo.xet:
            return {}
        route = f"{self.hub.url}/api/models/{repo.id}/xet-read-token/main"
        return {"X-Xet-Hash": self.hub.cas.hash_of(blob), "X-Xet-Refresh-Route": route}

    def _take_from_xet(self, repo: Repo, sha256: str) -> bool:
        """Whether the content was uploaded through xet; if so, the Hub now has it."""
        content = self.hub.cas.content_of(sha256) if self.hub.cas is not None else None
        if content is None:
            return False
        self.hub.lfs[sha256] = content
        repo.objects.add(sha256)
        return True
