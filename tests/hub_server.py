"""A hub on loopback that the real huggingface_hub client takes for the real one, with faults on demand.

    with HubServer({"owner/name": {"main": {"config.json": b"{}", "model.safetensors": path}}}) as server:
        subprocess.run([...], env=server.env(tmp_path))
        assert server.downloads() == [...]

It speaks what the client asks for when it looks up, lists and downloads models, over HTTP/1.1 with ranges.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

Repos = Mapping[str, Mapping[str, Mapping[str, bytes | Path]]]
"""Repository -> revision -> file -> content."""

LARGE = (".safetensors", ".bin", ".model")
"""Suffixes of files that the hub keeps as Git LFS objects, named by their sha256."""

_MODELS = "/api/models/"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteBlob:
    """One file as the hub keeps it."""

    content: bytes | Path
    large: bool

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks(0):
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def git_hash(self) -> str:
        """What git calls the file, or the pointer that stands for a large one."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        body = pointer if self.large else b"".join(self.blocks(0))
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_hash

    def blocks(self, start: int) -> Iterator[bytes]:
        """The bytes from `start` on."""
        if isinstance(self.content, bytes):
            yield self.content[start:]
            return
        with open(self.content, "rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK):
                yield block


@dataclass
class Cut:
    """Transfers of a file break off."""

    after: int
    """Bytes that still come through."""

    times: int | None = None
    """How often; None is always."""


@dataclass(frozen=True)
class Lie:
    """How a file is served otherwise than it is listed."""

    content: bytes | None = None
    """Other bytes than those that were listed."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """In place of the true ones of the same name, or beside them."""

    location: str | None = None
    """Where a redirect leads."""

    endless: bool = False
    """Zeros without end, in parts of unknown number."""

    pause: float | None = None
    """Seconds between single bytes."""

    only: str | None = None
    """The method that is lied to: HEAD or GET."""


class HubServer:
    """Repositories served on a free port of 127.0.0.1 while the context lasts."""

    def __init__(self, repos: Repos, tags: Collection[str] = (), large: tuple[str, ...] = LARGE) -> None:
        self.repos = {
            repo: {
                revision: {name: RemoteBlob(content, name.endswith(large)) for name, content in files.items()}
                for revision, files in revisions.items()
            }
            for repo, revisions in repos.items()
        }
        self.tags = frozenset(tags)
        """Revisions that are tags rather than branches."""

        self.gated: set[str] = set()
        """Repositories whose terms have to be accepted first."""

        self.private: set[str] = set()
        """Repositories that want another token, without saying more."""

        self.cuts: dict[str, Cut] = {}
        """File name -> how its transfers break off."""

        self.lies: dict[str, Lie] = {}
        """File name -> how it is served."""

        self.rewrite: Callable[[str, Any], Any] = lambda _path, listing: listing
        """What becomes of the listing at a path before it is sent: other JSON, or bytes to be sent as they are."""

        self.listing_headers: dict[str, str] = {}
        """Sent along with every listing."""

        self.gone: set[str] = set()
        """Revisions that listings know and files do not: removed in between."""

        self.status: int | None = None
        """Answer everything with this status."""

        self.headers: dict[str, str] = {}
        """Sent along with `status`."""

        self.not_a_hub = False
        """Answer everything with a web page, as a hotel's login does."""

        self.requests: Counter[tuple[str, str]] = Counter()
        """(method, path) -> how often it was asked for; of models only, not of the client's own affairs."""

        self.port = 0
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Serve, on the same port as before if there was one."""
        self._server = _Server(self, self.port)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that knows no hub but this one and keeps its cache in `home`."""
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_XET_CACHE")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        return inherited | hub | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more

    @contextmanager
    def used_here(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
        """`use_here` while the body runs, with no connection kept after it."""
        with monkeypatch.context() as patch:
            self.use_here(patch, home)
            yield
        huggingface_hub.close_session()

    def use_here(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this very process know no hub but this one, as if it had started in `env(home)`."""
        constants = "huggingface_hub.constants"
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", self.url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        # The client keeps connections, and the proxies it saw when it made the first.
        huggingface_hub.close_session()

    def commit(self, repo: str, revision: str) -> str:
        """The commit that a revision stands for: another one whenever its files change."""
        files = sorted((name, blob.etag) for name, blob in self.repos[repo][revision].items())
        return hashlib.sha1(json.dumps([repo, revision, files]).encode()).hexdigest()

    def push(self, repo: str, revision: str, files: Mapping[str, bytes | Path]) -> None:
        """Move a revision to other files."""
        self.repos[repo][revision] = {
            name: RemoteBlob(content, name.endswith(LARGE)) for name, content in files.items()
        }

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for, one a request."""
        paths = Counter({path: n for (method, path), n in self.requests.items() if method == "GET"})
        return sorted(path.split("/")[-1] for path in paths.elements() if "/resolve/" in path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        self.open: set[socket.socket] = set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        self.open.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for request in list(self.open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is none of a test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        if path.startswith(_MODELS) or "/resolve/" in path:
            with self.server.lock:
                hub.requests[self.command, unquote(path)] += 1
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status is not None:
            self._refuse(hub.status, "", "out of order", hub.headers)
        elif hub.not_a_hub:
            self._send(200, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html"})
        elif path == _MODELS.rstrip("/"):
            self._answer_search(parse_qs(urlsplit(self.path).query))
        elif path.startswith(_MODELS):
            self._answer_api(path.removeprefix(_MODELS), posted)
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._answer_file(unquote(repo), unquote(revision), unquote(name))
        else:
            self._refuse(404, "", "no such page")

    def _answer_search(self, asked: Mapping[str, list[str]]) -> None:
        """Every model of an author whose name holds a word."""
        author, word = asked["author"][0], asked.get("search", [""])[0]
        names = [repo for repo in self.server.hub.repos if repo.startswith(f"{author}/") and word in repo]
        self._send_json([{"id": name, "modelId": name} for name in names])

    def _answer_api(self, rest: str, posted: bytes) -> None:
        parts = rest.split("/")
        words = ("revision", "refs", "tree", "paths-info")
        at = next((i for i, part in enumerate(parts[1:], start=1) if part in words), len(parts))
        repo, word, revision = unquote("/".join(parts[:at])), "".join(parts[at : at + 1]), parts[at + 1 : at + 2]
        if not self._may_read(repo):
            return
        if word == "refs":
            self._send_json(self._refs(repo))
            return
        commit, files = self._revision(repo, unquote(revision[0]) if revision else "main")
        if files is None:
            return
        if word == "tree":
            self._send_json([_entry(name, blob) for name, blob in files.items()])
        elif word == "paths-info":
            asked = parse_qs(posted.decode()).get("paths", [])
            self._send_json([_entry(name, files[name]) for name in asked if name in files])
        else:
            blobs = parse_qs(urlsplit(self.path).query).get("blobs", ["false"])[0].lower() in ("1", "true")
            siblings = [_sibling(name, blob, blobs) for name, blob in files.items()]
            self._send_json({"id": repo, "sha": commit, "private": False, "gated": False, "siblings": siblings})

    def _answer_file(self, repo: str, revision: str, name: str) -> None:
        if not self._may_read(repo):
            return
        commit, files = self._revision(repo, revision)
        if files is None:
            return
        if self.server.hub.gone & {revision, *(r for r in self.server.hub.repos[repo] if self._is(repo, r, commit))}:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        blob = files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{blob.size - 1}/{blob.size}"
        lie = self.server.hub.lies.get(name)
        if lie is not None and lie.only in (None, self.command):
            self._answer_falsely(lie, headers, blob)
            return
        self._head(206 if start else 200, headers | {"Content-Length": str(blob.size - start)})
        if self.command == "GET":
            self._send_blocks(blob, start, self._cut(name))

    def _answer_falsely(self, lie: Lie, headers: Mapping[str, str], blob: RemoteBlob) -> None:
        body = lie.content if lie.content is not None else b"".join(blob.blocks(0))
        if lie.location is not None:
            self._head(302, {**headers, **lie.headers, "Location": lie.location, "Content-Length": "0"})
            return
        length = {"Transfer-Encoding": "chunked"} if lie.endless else {"Content-Length": str(len(body))}
        self._head(200, {**headers, **length, **lie.headers})
        if self.command == "HEAD":
            return
        while lie.endless:
            self.wfile.write(b"%x\r\n%s\r\n" % (_BLOCK, bytes(_BLOCK)))
        if lie.pause is None:
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(lie.pause)

    def _is(self, repo: str, revision: str, commit: str) -> bool:
        return self.server.hub.commit(repo, revision) == commit

    def _send_blocks(self, blob: RemoteBlob, start: int, left: int | None) -> None:
        for block in blob.blocks(start):
            if left is not None:
                block, left = block[:left], left - len(block)
            self.wfile.write(block)
            if left is not None and left <= 0:
                self.wfile.flush()
                self.close_connection = True
                return

    def _cut(self, name: str) -> int | None:
        """How many bytes of a file come through now; None is all."""
        with self.server.lock:
            cut = self.server.hub.cuts.get(name)
            if cut is None or cut.times == 0:
                return None
            if cut.times is not None:
                cut.times -= 1
            return cut.after

    def _may_read(self, repo: str) -> bool:
        hub = self.server.hub
        if repo not in hub.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repo in hub.gated:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.\nYou must be authenticated.")
        elif repo in hub.private:
            self._refuse(403, "", "Forbidden")
        else:
            return True
        return False

    def _revision(self, repo: str, revision: str) -> tuple[str, Mapping[str, RemoteBlob] | None]:
        hub = self.server.hub
        for name, files in hub.repos[repo].items():
            commit = hub.commit(repo, name)
            if revision in (name, commit):
                return commit, files
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return "", None

    def _refs(self, repo: str) -> dict[str, Any]:
        hub = self.server.hub
        refs: dict[str, Any] = {"branches": [], "tags": [], "converts": []}
        for name in hub.repos[repo]:
            kind = "tags" if name in hub.tags else "branches"
            folder = "tags" if name in hub.tags else "heads"
            refs[kind].append({"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": hub.commit(repo, name)})
        return refs

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        all_headers = {"X-Error-Message": message.replace("\n", " "), "Content-Type": "application/json"}
        if code:
            all_headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), {**all_headers, **(headers or {})})

    def _send_json(self, value: Any) -> None:
        value = self.server.hub.rewrite(urlsplit(self.path).path, value)
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._send(200, body, {"Content-Type": "application/json", **self.server.hub.listing_headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _sibling(name: str, blob: RemoteBlob, blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name}
    if blobs:
        entry |= {"size": blob.size, "blobId": blob.git_hash}
        if blob.large:
            entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


def _entry(name: str, blob: RemoteBlob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.git_hash}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry
