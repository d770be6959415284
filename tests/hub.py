"""A server on loopback that answers as the Hugging Face hub does, of one repository, and another one with its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class Hub:
    """The hub: facts at one address, and bytes at another, to which requests for files are sent on.

    Attributes:
        repo: ``ORG/NAME`` of a model, or ``datasets/ORG/NAME``.
        files: of the commit that the branch main, and the tag v1, are.
        commit: that commit; None answers without one.
        older: the files of other commits.
        content: what is sent instead of a file; the announced SHA-256 and size are those of `files`.
        refusal: a status and its X-Error-Code, instead of every answer.
        later: the same, of every request but the first.
        gated: the same, of files alone.
        signature: the query of the addresses of bytes, which then answer with an error.
        cuts: how many downloads end half way.
        asked: every request: method, path, Range and Authorization.
    """

    repo: str = "org/name"
    files: Mapping[str, bytes] = field(default_factory=dict)
    commit: str | None = COMMIT
    older: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    content: bytes | None = None
    refusal: tuple[int, str] | None = None
    later: tuple[int, str] | None = None
    gated: tuple[int, str] | None = None
    signature: str = ""
    cuts: int = 0
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    url: str = ""
    other: str = ""

    def environment(self, **more: str) -> dict[str, str]:
        """What a process needs to find it, and nothing else of the hub."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1"} | more

    @property
    def ranges(self) -> list[str | None]:
        """The Range of each request for bytes."""
        return [asked[2] for asked in self.asked if asked[1].startswith("/bytes/")]

    def move(self, files: Mapping[str, bytes], commit: str) -> None:
        """Let the branch be another commit; the one before stays."""
        assert self.commit
        self.older[self.commit] = self.files
        self.files, self.commit = files, commit

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        kind, name = ("", self.repo) if self.repo.count("/") == 1 else self.repo.split("/", 1)
        api = f"/api/{kind or 'models'}/{name}"
        found = re.fullmatch(rf"(?:{api}(?:/(revision|tree))?|/{self.repo}/(resolve))(?:/([^/]+)(?:/(.+))?)?", path)
        refusal = self.refusal or (self.later if len(self.asked) > 1 else None)
        if found is None:
            self._refuse(request, refusal or (404, "RepoNotFound"))
            return
        what, revision, inner = found[1] or found[2] or "revision", found[3] or "main", found[4] or ""
        known = {"main": self.files, "v1": self.files, self.commit: self.files, **self.older}
        if what == "resolve" and self.gated:
            refusal = refusal or self.gated
        if refusal or revision not in known:
            self._refuse(request, refusal or (404, "RevisionNotFound"))
            return
        files = known[revision]
        if what == "revision":
            self._say(
                request,
                {
                    "id": name,
                    "sha": self.commit if files is self.files else revision,
                    **_FACTS,
                    "siblings": [{"rfilename": each} for each in files],
                },
            )
        elif what == "tree":
            begin = inner and f"{inner}/"
            inside = [each for each in files if each.startswith(begin)]
            listed = _tree(files, begin, "recursive=true" in request.path.lower())
            self._say(request, listed) if inside else self._refuse(request, (404, "EntryNotFound"))
        elif inner not in files:
            self._refuse(request, (404, "EntryNotFound"))
        else:
            request.send_response(302)
            request.send_header("Location", f"{self.other}/bytes/{revision}/{inner}{self.signature}")
            if self.commit:
                request.send_header("X-Repo-Commit", self.commit if files is self.files else revision)
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(files[inner]).hexdigest()}"')
            request.send_header("X-Linked-Size", str(len(files[inner])))
            request.send_header("Content-Length", "0")
            request.end_headers()

    def _refuse(self, request: BaseHTTPRequestHandler, refusal: tuple[int, str]) -> None:
        request.send_response(refusal[0])
        request.send_header("X-Error-Code", refusal[1])
        request.send_header("X-HF-Warning", "login; You are not logged in.")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _say(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        content = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("X-HF-Warning", "login; You are not logged in.")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def send(self, request: BaseHTTPRequestHandler) -> None:
        if self.signature:
            self._refuse(request, (501, ""))
            return
        revision, _, name = unquote(request.path).removeprefix("/bytes/").partition("/")
        files = self.older.get(revision, self.files)
        content = self.content or files[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        start, stop = (int(asked[1]), int(asked[2]) + 1 if asked[2] else len(content)) if asked else (0, len(content))
        stop = min(stop, len(content))
        request.send_response(206 if asked else 200)
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        end = stop
        if self.cuts:
            self.cuts -= 1
            end = start + (stop - start) // 2
            request.close_connection = True
        request.wfile.write(content[start:end])


_FACTS = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}


def _tree(files: Mapping[str, bytes], begin: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a directory, which ends with a slash, or of the root; of all its directories if recursive."""
    inside = sorted(name.removeprefix(begin) for name in files if name.startswith(begin))
    parents = {str(each) for name in inside for each in PurePosixPath(name).parents[:-1]}
    found = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": begin + name} for name in sorted(parents)]
    for name in inside:
        content = files[begin + name]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        found.append({"type": "file", "oid": "0" * 40, "size": len(content), "path": begin + name, "lfs": lfs})
    return [each for each in found if recursive or "/" not in str(each["path"]).removeprefix(begin)]


@contextmanager
def hub_server(**options: Any) -> Iterator[Hub]:
    """The hub, until the block ends. The options are `Hub`'s."""
    made = Hub(**options)

    def handler(answer: Any) -> type:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                made.asked.append((self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        return Handler

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(answer)) for answer in (made.answer, made.send)]
    for server in servers:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    made.url, made.other = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield made
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
