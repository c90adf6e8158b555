"""A Hub on the loopback interface: repositories in memory, and as much of the Hub's API as huggingface_hub 1.x and 2.x need to publish and load models.

`with HubServer() as hub:` serves at `hub.url`; a process with `HF_ENDPOINT=hub.url` talks to it. `hub.token` may write, `hub.reader` may not. Commits are
kept, so old revisions stay; files ending in .safetensors and .png take the way of large files. `hub.break_at = "PUT /lfs"` cuts every connection whose
request begins so, half-way.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha: {path: content}
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/1: sha

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {ref} {message}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    def sha_of(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    def __init__(self) -> None:
        self.token, self.reader, self.user = "hf_" + "w" * 34, "hf_" + "r" * 34, "user"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.break_at: str | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.sha_of(revision)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.break_at is not None and f"{self.command} {path}".startswith(hub.break_at):
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))  # a part of it arrives
            self.close_connection = True
            self.connection.shutdown(2)
            return
        body = self._body()
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and match:
                answer(self, body, **match.groupdict())
                return
        self._send(404, {"error": f"no route for {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: "dict | list | bytes" = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _bearer(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._bearer() == self.hub.token:
            return True
        status = 403 if self._bearer() == self.hub.reader else 401
        self._send(status, {"error": "no right to write"}, {"X-Error-Message": "no right to write"})
        return False

    def _repository(self, name: str) -> Repository | None:
        """The repository, or None after having answered 404: private ones do not exist for those without a token."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._bearer() not in (self.hub.token, self.hub.reader)):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _snapshot(self, name: str, revision: str) -> "tuple[Repository, str, dict[str, bytes]] | None":
        repository = self._repository(name)
        if repository is None:
            return None
        sha = repository.sha_of(revision)
        if sha is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, sha, repository.commits[sha]

    def who_am_i(self, body: bytes) -> None:
        if self._bearer() not in (self.hub.token, self.hub.reader):
            return self._send(401, {"error": "Invalid username or password."})
        self._send(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", **answer})
        repository = self.hub.repositories[name] = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        self._send(200, answer)

    def model_info(self, body: bytes, name: str, revision: str = "main") -> None:
        if found := self._snapshot(name, revision):
            repository, sha, files = found
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            self._send(
                200, {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
            )

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if found := self._snapshot(name, revision):
            self._send(200, [_entry(path, content) for path, content in found[2].items()])

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._may_write() and self._snapshot(name, revision):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": modes})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self._may_write() and self._repository(name):
            objects = [
                {**o, **({} if o["oid"] in self.hub.large_files else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}})}
                for o in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "content does not have the hash that was announced"})
        self.hub.large_files[oid] = body
        self._send(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        found = self._snapshot(name, revision) if self._may_write() else None
        if found is None:
            return
        repository, sha, files = found[0], found[1], dict(found[2])
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", sha) != sha:
                    return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    return self._send(400, {"error": f"{value['path']} has not been uploaded"})
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"success": True, "commitUrl": "", "hookOutput": ""}
        if "create_pr=1" in self.path:
            number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        answer["commitOid"] = repository.commit(revision, files, message)
        answer["commitUrl"] = f"{self.hub.url}/{name}/commit/{answer['commitOid']}"
        self._send(200, answer)

    def create_branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        if branch in repository.refs:
            return self._send(409, {"error": "Reference already exists"})
        repository.refs[branch] = repository.refs["main"]
        self._send(201)

    def validate_yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if found := self._snapshot(name, revision):
            _, sha, files = found
            commit = {"X-Repo-Commit": sha}
            if path not in files:
                return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
            self._send(200, files[path], {"ETag": f'"{_etag(path, files[path])}"', "Content-Type": "application/octet-stream", **commit})


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return {**entry, "lfs": {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}} if path.endswith(LARGE) else entry


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.who_am_i),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_NAME}", _Handler.model_info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.model_info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
