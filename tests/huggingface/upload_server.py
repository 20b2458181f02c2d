"""A small Hugging Face hub on the loopback device that takes uploads, and keeps the files in a folder."""

import base64
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import urlsplit

TOKEN = "hf_of_the_test"


class UploadHub:
    """Accept uploads of models to FOLDER/OWNER/NAME until `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.messages: list[str] = []  # of the commits
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.role = "write"  # of the access token
        self.refused = 0  # status of the answers to commits; 0: they are accepted
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        """Stop to serve."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        if not self._authorized():
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.hub.role}}
            return self._answer(200, {"type": "user", "name": "ada", "auth": auth})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/main/?)?(?:/revision/main)?", path):
            root = self.hub.folder / found[1]
            if not root.is_dir():
                return self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
            files = sorted(file for file in root.iterdir())
            if found[2]:
                return self._answer(200, [_entry(file) for file in files])
            return self._answer(
                200,
                {
                    "id": found[1],
                    "private": False,
                    "sha": "0" * 40,
                    "siblings": [{"rfilename": file.name} for file in files],
                },
            )
        return self._answer(404, {"error": "unknown"})

    def do_PUT(self):
        data = self._body()
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, {})

    def do_POST(self):
        path = urlsplit(self.path).path
        body = self._body()
        if not self._authorized():
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":  # of the model card
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            root = self.hub.folder / (request.get("organization") or "ada") / request["name"]
            url = f"{self.hub.url}/{root.parent.name}/{root.name}"
            if root.is_dir():
                return self._answer(409, {"error": "You already created this model repo", "url": url})
            root.mkdir(parents=True)
            is_private = request.get("visibility") == "private" or request.get("private") is True
            (self.hub.folder / "visibility").write_text("private" if is_private else "public")
            return self._answer(200, {"url": url})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(self.hub.folder / found[1], body.decode().splitlines())
        return self._answer(404, {"error": "unknown"})

    def _commit(self, root, lines):
        if self.hub.refused:
            return self._answer(self.hub.refused, {"error": "not allowed"})
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                (root / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (root / value["path"]).write_bytes(self.hub.objects[value["oid"]])
            else:
                (root / value["path"]).unlink()
        return self._answer(
            200,
            {"commitUrl": f"{self.hub.url}/{root.parent.name}/{root.name}/commit/{'1' * 40}", "commitOid": "1" * 40},
        )

    def _authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status, value, code=""):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _entry(file):
    oid = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "oid": oid, "size": file.stat().st_size, "path": file.name}
