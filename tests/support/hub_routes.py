"""The Hub's endpoints, as far as the clients of this project use them. Each returns status, body and headers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_copies import CopyRoutes
from support.hub_store import LFS_SUFFIXES, Blob, Refusal, Repo, User

if TYPE_CHECKING:
    from support.hub_server import HubServer


class Routes(CopyRoutes):
    """Mixed into the request handler; one ``_api_<verb>`` for each ``/api/models/{id}/<verb>/...``."""

    hub: HubServer
    command: str
    path: str
    body: bytes
    headers: Message

    def route(self) -> tuple[Any, ...]:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        # Before unquoting: refs%2Fpr%2F1 is one part.
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "whoami-v2"]:
            user = self._user(required=True)
            return 200, {"type": "user", "name": user.name, "orgs": [{"name": org} for org in user.orgs]}
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            return self._create_repo(json.loads(self.body))
        if parts == ["api", "repos", "delete"]:
            return self._delete_repo(json.loads(self.body))
        if parts[0] == "lfs" and self.command == "PUT":
            return self._put_lfs(parts[1])
        if parts[:2] == ["api", "models"]:
            repo, rest = self._split_repo(parts[2:])
            verb = rest[0] if rest else "info"
            handler: Callable[..., tuple[Any, ...]] | None = getattr(self, f"_api_{verb.replace('-', '_')}", None)
            if handler is None:
                raise Refusal(404, f"no such endpoint: {verb}")
            return handler(repo, *rest[1:])
        repo, rest = self._split_repo(parts)
        if rest[:1] == ["resolve"]:
            return self._resolve(repo, rest[1], "/".join(rest[2:]))
        if rest[:4] == ["info", "lfs", "objects", "batch"]:
            return self._lfs_batch(repo)
        if rest[:3] == ["info", "lfs", "verify"]:
            present = json.loads(self.body)["oid"] in repo.objects
            return (200, {}) if present else (404, {"error": "object not found"})
        raise Refusal(404, f"no such page: {url.path}")

    def _user(self, required: bool = False) -> User:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.hub.users.get(token)
        if user is None and (token or required):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user or User("", "none")

    def _split_repo(self, parts: list[str]) -> tuple[Repo, list[str]]:
        names = [part.removesuffix(".git") for part in parts]
        size = 1 if names[0] in self.hub.repos else 2
        repo, user = self.hub.repos.get("/".join(names[:size])), self._user()
        if repo is None or (repo.private and not self._owns(user, repo.owner)):
            # As the Hub does: to strangers a missing and a private repository look the same.
            raise Refusal(404 if user.name else 401, "Repository not found", "RepoNotFound")
        return repo, parts[size:]

    @staticmethod
    def _owns(user: User, owner: str) -> bool:
        return bool(user.name) and owner in (user.name, *user.orgs)

    def _may_write(self, repo: Repo, for_pull_request: bool = False) -> User:
        user = self._user(required=True)
        if user.role != "write" or not (for_pull_request or self._owns(user, repo.owner)):
            raise Refusal(403, f"You do not have write access to {repo.id}")
        return user

    def _may_read(self, repo: Repo) -> None:
        user = self._user()
        if repo.gated and user.name not in repo.granted and not self._owns(user, repo.owner):
            raise Refusal(403 if user.name else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = (
            repo.refs.get(revision)
            or repo.tags.get(revision)
            or next((c for c in repo.commits if c.startswith(revision)), None)
        )
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def _create_repo(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        user = self._user(required=True)
        owner = asked.get("organization") or user.name
        repo_id = f"{owner}/{asked['name']}"
        if user.role != "write" or not self._owns(user, owner):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": url, "name": repo_id}

    def _api_info(self, repo: Repo, revision: str = "main") -> tuple[Any, ...]:
        sha = self._sha(repo, revision)
        siblings = []
        for path, blob in sorted(repo.commits[sha].items()):
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": len(blob.data), "blobId": blob.oid[:40]}
                if blob.lfs:
                    entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
            siblings.append(entry)
        return 200, {
            **{"id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private},
            **{"gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "siblings": siblings},
        }

    _api_revision = _api_info

    def _api_tree(self, repo: Repo, revision: str, *folder: str) -> tuple[Any, ...]:
        prefix = "".join(f"{part}/" for part in folder)
        inside = {p: b for p, b in repo.commits[self._sha(repo, revision)].items() if p.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f"{prefix} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() in ("1", "true")
        files = [b.entry(p) for p, b in sorted(inside.items()) if deep or "/" not in p[len(prefix) :]]
        folders = {prefix + p[len(prefix) :].partition("/")[0] for p in inside if "/" in p[len(prefix) :]}
        return 200, files + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]

    def _api_paths_info(self, repo: Repo, revision: str) -> tuple[Any, ...]:
        self._may_read(repo)
        tree = repo.commits[self._sha(repo, revision)]
        form = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
        return 200, [tree[path].entry(path, self._xet_hash(repo, tree[path])) for path in form["paths"] if path in tree]

    def _api_refs(self, repo: Repo) -> tuple[Any, ...]:
        def listed(pull_requests: bool) -> list[dict[str, str]]:
            chosen = {name: sha for name, sha in repo.refs.items() if name.startswith("refs/pr/") == pull_requests}
            return [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in chosen.items()]

        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        return 200, {"branches": listed(False), "tags": tags, "converts": [], "pullRequests": listed(True)}

    def _api_discussions(self, repo: Repo) -> tuple[Any, ...]:
        return 200, {"discussions": [], "count": 0, "start": 0}

    def _api_auth_check(self, repo: Repo, write: str | None = None) -> tuple[Any, ...]:
        self._may_read(repo)
        if write:
            self._may_write(repo)
        return 200, {}

    def _api_branch(self, repo: Repo, name: str) -> tuple[Any, ...]:
        self._may_write(repo)
        if self.command == "DELETE":
            repo.refs.pop(name, None)
            return 200, {}
        if name in repo.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repo.refs[name] = self._sha(repo, start)
        return 200, {}

    def _api_preupload(self, repo: Repo, revision: str) -> tuple[Any, ...]:
        self._may_write(repo, "create_pr" in self.query)
        tree, files = repo.commits[self._sha(repo, revision)], []
        for file in json.loads(self.body)["files"]:
            self.hub.received.append(base64.b64decode(file["sample"]))
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = tree[file["path"]].oid if file["path"] in tree else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def _api_commit(self, repo: Repo, revision: str) -> tuple[Any, ...]:
        pull_request = "create_pr" in self.query
        self._may_write(repo, pull_request)
        head = self._sha(repo, revision)
        tree = dict(repo.commits[head])
        title = ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if not pull_request and value.get("parentCommit", head) != head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
                self.hub.received.append(tree[value["path"]].data)
            elif key == "lfsFile":
                if value["oid"] not in repo.objects and not self._take_from_xet(repo, value["oid"]):
                    raise Refusal(400, f"LFS pointer {value['oid']} has no object")
                tree[value["path"]] = Blob(self.hub.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {key}")
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        sha = repo.commit(f"refs/pr/{number}" if pull_request else revision, tree, title)
        url = f"{self.hub.url}/{repo.id}"
        pr_url = f"{url}/discussions/{number}" if pull_request else None
        return 200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pr_url}

    def _lfs_batch(self, repo: Repo) -> tuple[Any, ...]:
        self._may_write(repo, for_pull_request=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in repo.objects:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}?repo={repo.id}"}
                verify = {"href": f"{self.hub.url}/{repo.id}.git/info/lfs/verify"}
                wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}

    def _put_lfs(self, oid: str) -> tuple[Any, ...]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this sha256")
        self.hub.lfs[oid] = self.body
        self.hub.repos[self.query["repo"]].objects.add(oid)
        return 200, b"", {"ETag": f'"{oid}"'}

    def _resolve(self, repo: Repo, revision: str, path: str) -> tuple[Any, ...]:
        self._may_read(repo)
        sha = self._sha(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {
            **{"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"},
            **{"Content-Type": "application/octet-stream", "Content-Length": str(len(blob.data))},
        }
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            headers |= self._xet_headers(repo, blob)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, blob.data, headers
        start, end = int(asked[1]), min(int(asked[2] or len(blob.data)), len(blob.data) - 1)
        data = blob.data[start : end + 1]
        headers |= {"Content-Length": str(len(data)), "Content-Range": f"bytes {start}-{end}/{len(blob.data)}"}
        return 206, data, headers
