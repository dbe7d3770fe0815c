"""A model hub on loopback that serves folders as repositories: ``hub.py PORT REPO=DIR...``, for ``HF_ENDPOINT``."""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "1".rjust(40, "0")
REPOS = {name: Path(folder) for name, _, folder in (argument.partition("=") for argument in sys.argv[2:])}


class Handler(BaseHTTPRequestHandler):
    """The few answers that nnsight, NDIF and transformers ask a hub for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer for a repository, or one of its files."""
        path = self.path.split("?")[0]
        for repo, folder in REPOS.items():
            if path.lower() == f"/api/models/{repo}".lower() or path.startswith(f"/api/models/{repo}/revision/"):
                return self.answer(200, json.dumps(describe(repo, folder)).encode())
            if path.startswith(f"/api/models/{repo}/tree"):
                return self.answer(200, b"[]")
            if path.startswith(f"/{repo}/resolve/"):
                file = folder / path.removeprefix(f"/{repo}/resolve/").partition("/")[2]
                if not file.is_file():
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                content = file.read_bytes()
                return self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer, without its body if only the head was asked for."""
        self.send_response(status)
        for name, value in {"X-Repo-Commit": REVISION, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def describe(repo: str, folder: Path) -> dict:
    """A repository's entry."""
    parameters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 4
    return {
        "id": repo,
        "modelId": repo,
        "sha": REVISION,
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": [],
        "safetensors": {"parameters": {"F32": parameters}, "total": parameters},
        "siblings": [{"rfilename": file.name} for file in folder.iterdir()],
    }


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
