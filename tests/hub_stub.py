"""A stand-in for the Hugging Face Hub: what huggingface_hub's uploads say to it over HTTP, without its Xet storage.

Clients must have HF_HUB_DISABLE_XET set, as hf_xet speaks to servers of its own.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_secretsecretsecret"
USER = {"name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]}


@dataclass
class Repository:
    """private; files: content by path, at the newest commit; commits: how many there are."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: int = 1

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What a test sets and sees. role: of the token; objects: of LFS, by digest; puts: digests of those that were sent;
    fails: status of the answer to a PUT once so many are done; calls: method and path of every request."""

    url: str = ""
    role: dict = field(default_factory=lambda: {"role": "write"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    fails: tuple[int, int] | None = None
    calls: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self) -> None:
        content, path = self.body(), self.path.partition("?")[0]
        self.hub.calls.append(f"{self.command} {path}")
        if self.command == "PUT":
            return self.put(path.rpartition("/")[2], content)
        if path.startswith("/verify/"):
            return self.answer({}, 200 if path.rpartition("/")[2] in self.hub.objects else 404)
        if (given := self.headers.get("Authorization", "")) != f"Bearer {TOKEN}":
            return self.answer({"error": f"{given} is wrong"}, 401)  # a server that repeats the token
        if path == "/api/whoami-v2":
            return self.answer(USER | {"auth": {"accessToken": self.hub.role}})
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path == "/api/validate-yaml":
            return self.answer({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"objects": [self.action(o) for o in json.loads(content)["objects"]]})
        _, _, _, owner, name, *rest = path.split("/")
        return self.of_repository(f"{owner}/{name}", rest, content)

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def create(self, asked: dict) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            return self.answer({"error": "exists"}, 409)
        self.hub.repositories[repo] = Repository(asked.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{repo}"})

    def action(self, asked: dict) -> dict:
        if asked["oid"] in self.hub.objects:
            return asked
        href = {name: {"href": f"{self.hub.url}/{name}/{asked['oid']}?signed=secret"} for name in ("upload", "verify")}
        return asked | {"actions": href}

    def put(self, oid: str, content: bytes) -> None:
        with self.hub.lock:  # clients send several at once
            if self.hub.fails and len(self.hub.puts) >= self.hub.fails[0]:
                return self.answer({"error": "expired"}, self.hub.fails[1])
            if hashlib.sha256(content).hexdigest() != oid:
                return self.answer({}, 400)
            self.hub.puts.append(oid)
            self.hub.objects[oid] = content
            return self.answer({})

    def of_repository(self, name: str, rest: list[str], content: bytes) -> None:
        repo = self.hub.repositories.get(name)
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if rest and rest[0] == "preupload":
            asked = json.loads(content)["files"]
            return self.answer({"files": [mode(file["path"], repo) for file in asked]})
        if rest and rest[0] == "tree":
            return self.answer([{"type": "file", "oid": "0", "size": 1, "path": path} for path in repo.files])
        if rest and rest[0] == "commit":
            return self.commit(name, repo, [json.loads(line) for line in content.splitlines()])
        siblings = [sibling(path, data) for path, data in repo.files.items()]
        return self.answer({"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def commit(self, name: str, repo: Repository, lines: list[dict]) -> None:
        header, *operations = lines
        if header["value"].get("parentCommit", repo.sha) != repo.sha:
            return self.answer({"error": "the branch has changed"}, 412)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif operation["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                repo.files[value["path"]] = base64.b64decode(value["content"])
        repo.commits += 1
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def mode(path: str, repo: Repository) -> dict:
    found = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
    if path in repo.files:
        data = repo.files[path]
        found["oid"] = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_hash(data)
    return found


def sibling(path: str, data: bytes) -> dict:
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    found = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
    return found | ({"lfs": lfs, "blobId": "0"} if is_lfs(path) else {})


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (Answers,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
