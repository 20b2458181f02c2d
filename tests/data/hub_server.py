"""A small Hugging Face hub on the loopback device: serves what `datasets` and `huggingface_hub` request, from a folder.

FOLDER/OWNER/NAME/... are the files of the data sets. Faults are injected with `drop`, `refuse` and `gated`.
"""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serve a folder of data sets until `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests = []
        self.drop: list[int] = []  # bytes after which the next answers with data are cut off
        self.skip = 0  # answers with data before these faults
        self.refuse = 0  # answers with data that are 503 instead
        self.gated: set[str] = set()
        self.go_away = False  # close the server when an answer is cut off
        self._port = 0
        self.open()

    def open(self) -> None:
        """Start to serve; after `close`, at the same address."""
        self.away = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop: new connections are refused, open ones are cut off."""
        self.away = True
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.do_GET()

    def do_GET(self):
        if self.hub.away:
            self.close_connection = True
            return self.connection.close()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path):
            repo, what, _, below = found.groups()
            root = self.hub.folder / repo
            if not root.is_dir():
                return self._error(404, "RepoNotFound", "Repository not found")
            if what == "tree":
                return self._json(
                    self._tree(
                        root, (below or "").strip("/"), "recursive=True" in self.path or "recursive=true" in self.path
                    )
                )
            if what == "paths-info":
                wanted = re.findall(r"paths=([^&]+)", self._body) or json.loads(self._body or "{}").get("paths", [])
                files = [root / unquote(name) for name in wanted]
                return self._json([self._entry(root, path) for path in files if path.exists()])
            siblings = [{"rfilename": p.relative_to(root).as_posix()} for p in sorted(root.rglob("*")) if p.is_file()]
            gated = "manual" if repo in self.hub.gated else False
            return self._json(
                {"_id": "0", "id": repo, "sha": COMMIT, "private": False, "gated": gated, "disabled": False,
                 "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
                 "lastModified": "2026-01-01T00:00:00.000Z"}
            )  # fmt: skip
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, _, name = found.groups()
            if repo in self.hub.gated:
                return self._error(401, "GatedRepo", f"Access to dataset {repo} is restricted.")
            file = self.hub.folder / repo / name
            return self._file(file) if file.is_file() else self._error(404, "EntryNotFound", "Entry not found")
        return self._error(404, "RepoNotFound", "Repository not found")

    def _tree(self, root, below, recursive):
        base = root / below
        found = base.rglob("*") if recursive else base.iterdir() if base.is_dir() else []
        return [self._entry(root, path) for path in sorted(found)]

    def _entry(self, root, path):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        return {
            "type": "file",
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "path": name,
        }

    def _file(self, file):
        data = file.read_bytes()
        start = 0
        stop = len(data)
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(found[1])
            status = 206
            stop = min(int(found[2]) + 1, len(data)) if found[2] else len(data)
        is_data = self.command == "GET" and file.suffix in (".parquet", ".jsonl", ".gz", ".json", ".txt")
        if is_data and self.hub.skip:
            self.hub.skip = self.hub.skip - 1
            is_data = False
        if is_data and self.hub.refuse:
            self.hub.refuse -= 1
            return self._error(503, "", "try later")
        body = data[start:stop]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            if is_data and self.hub.drop and len(body) > self.hub.drop[0]:
                self.wfile.write(body[: self.hub.drop.pop(0)])
                self.wfile.flush()
                if self.hub.go_away:
                    self.hub.close()
                self.close_connection = True
                self.connection.close()
                return None
            self.wfile.write(body)
        return None

    def _json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status, code, message):
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
