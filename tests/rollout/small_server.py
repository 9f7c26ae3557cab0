"""A transformers model behind the paths of vLLM's HTTP that alignkit uses, for tests without vLLM.

Each completion draws from a generator of its own seed, as vLLM's per-request seeds do. The real
vLLM: test_real_vllm.py.
"""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class TransformersEngine:
    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.folder = str(folder)
        self.version = "default"
        self.calls = []  # the paths that were asked for
        self.prompts = 0  # requests for completions that were answered
        self.about = {
            "model": self.folder,
            "dtype": "torch.float32",
            "max_model_len": self.model.config.max_position_embeddings,
            "logprobs_mode": "processed_logprobs",
        }
        self.lock = threading.Lock()

    def load(self, folder):
        wrong = self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        missing = set(wrong.missing_keys) - set(self.model._tied_weights_keys or ())
        if wrong.unexpected_keys or missing:
            raise KeyError(f"unexpected {wrong.unexpected_keys}, missing {missing}")

    @torch.no_grad()
    def sample(self, prompt, n, seed, max_tokens, temperature, stop_token_ids, **_):
        """The completions of one prompt; a row goes on after its end, and is cut there."""
        generators = [torch.Generator().manual_seed(seed + index) for index in range(n)]
        text, logps = torch.tensor([prompt] * n), []
        for _ in range(max_tokens):
            logprobs = (self.model(text).logits[:, -1] / temperature).log_softmax(-1)
            chosen = torch.cat(
                [p.exp().multinomial(1, generator=g) for p, g in zip(logprobs, generators)]
            )
            logps.append(logprobs.gather(-1, chosen[:, None]))
            text = torch.cat([text, chosen[:, None]], 1)
        new = text[:, len(prompt) :].tolist()
        return [
            self._cut(ids, scores, stop_token_ids)
            for ids, scores in zip(new, torch.cat(logps, 1).tolist())
        ]

    def _cut(self, ids, logps, stop):
        length = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
        return {"ids": ids[:length], "logps": logps[:length], "ended": ids[length - 1] in stop}

    def answer(self, path, asked):
        """What vLLM would answer to a request."""
        self.calls.append(path)
        if path == "/server_info":
            return {"vllm_config": {"model_config": self.about}}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = asked["new_version"]
        elif path == "/collective_rpc":
            assert asked["method"] == "reload_weights"
            self.load(Path(asked["kwargs"]["weights_path"]))
        elif path == "/inference/v1/generate":
            return {"choices": self.choices(asked)}
        return {}

    def choices(self, asked):
        with self.lock:
            drawn = self.sample(asked["token_ids"], **asked["sampling_params"])
            self.prompts += 1
        return [
            {
                "index": index,
                "finish_reason": "stop" if one["ended"] else "length",
                "token_ids": one["ids"],
                "weight_versions": [{"version": self.version, "start": 0, "end": len(one["ids"])}],
                "logprobs": {
                    "content": [
                        {"token_id": token, "logprob": logp}
                        for token, logp in zip(one["ids"], one["logps"])
                    ]
                },
            }
            for index, one in enumerate(drawn)
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply()

    def do_POST(self):
        self.reply()

    def reply(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        status, answer = 200, None
        token = self.server.token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            status, answer = 401, {"error": "Unauthorized"}
        else:
            try:
                answer = self.server.engine.answer(path, json.loads(body) if body else None)
            except ConnectionError:  # as if it died: the connection ends without an answer
                self.close_connection = True
                return
            except FileNotFoundError:  # a path that this release has not
                status, answer = 404, {"detail": "Not Found"}
            except Exception as error:
                status = 500
                answer = {"error": {"message": f"{type(error).__name__}: {error}"}}
        data = json.dumps(answer).encode()
        with suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving(engine, port=0, token=""):
    """A server around `engine`; gives its address and stops it at the end."""
    server = Server(("127.0.0.1", port), Handler)
    server.engine, server.token = engine, token
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    stopped = SimpleNamespace(yet=False)

    def stop():
        if not stopped.yet:
            stopped.yet = True
            server.shutdown()
            server.server_close()

    engine.stop = stop
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop()
