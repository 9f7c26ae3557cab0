"""A stand-in of the hub's HTTP API, as far as a push of huggingface_hub's real client asks for it."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """What was pushed: repository -> {"private", "files", "header"}; `fails` refuses commits."""

    def __init__(self):
        self.repositories = {}
        self.fails = False
        self.asked = []


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content, code=200):
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            hub.asked.append(self.path)
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            name = name.removesuffix("/revision/main")
            if name in hub.repositories:
                private = hub.repositories[name]["private"]
                return self.answer(
                    {"id": name, "private": private, "sha": "0" * 40, "siblings": []}
                )
            return self.answer({"error": "not here"}, 404)

        def do_POST(self):
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                return self.answer({"files": modes})
            if "/commit/main" in self.path:
                return self.commit(body)
            return self.answer({"error": self.path}, 404)

        def create(self, asked):
            owner = asked.get("organization") or "me"
            name = f"{owner}/{asked['name']}"
            if name in hub.repositories:
                return self.answer(
                    {"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409
                )
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repositories[name] = {"private": private, "files": {}}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})

        def commit(self, body):
            if hub.fails:
                return self.answer({"error": "the disk of the hub is full"}, 507)
            name = self.path.removeprefix("/api/models/").partition("/commit")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[name]["files"][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    return Handler


@contextmanager
def small_hub(monkeypatch):
    """The hub, at which huggingface_hub's client looks inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
