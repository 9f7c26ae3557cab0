"""A sampling engine behind HTTP on this machine: weights in as safetensors, completions out as
token ids with log-probs.

    GET  /hello    what the engine holds: protocol, vocabulary, shape, dtype, max_length, version
    PUT  /weights  a safetensors file; its SHA-256 is the version from then on
    POST /sample   {version, max_new_tokens, temperature, top_p, stop, prompts: [[id]], seeds: [[one
    per completion]]}
                   -> {version, completions: [{ids, logps, ended}]}, prompt by prompt; 409 under
                   another version

It listens on 127.0.0.1 alone. Where ALIGNKIT_ROLLOUT_TOKEN is set, every request must bear it.
Standard library only.
"""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from alignkit.rollout.wire import CHUNK, PROTOCOL, TOKEN_ENV, VERSION_HEADER, version_of

LARGEST_REQUEST = 1 << 28  # bytes of JSON


@dataclass(frozen=True)
class Row:
    """One completion to draw."""

    prompt: Sequence[int]
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: Sequence[int]  # tokens that end it; the one that does belongs to it


class Engine(Protocol):
    """What draws. All of it is called from one thread, one call at a time."""

    def describe(self) -> dict[str, Any]:
        """`engine`, `model`, `vocabulary`, `shape`, `dtype` (as torch calls it), `max_length`."""
        ...

    def load(self, folder: Path) -> None:
        """Take the weights of `folder`/model.safetensors, named as in
        a checkpoint, and forget all caches.
        """
        ...

    def sample(self, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
        """{ids, logps, ended} for each row."""
        ...


class Refused(Exception):
    """A request that is answered with this status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Job:
    """Rows to draw under a version, or weights to load as one."""

    version: str
    rows: Sequence[Row] = ()
    weights: Path | None = None
    done: Future[Mapping[str, Any]] = field(default_factory=Future)


class Worker:
    """Runs the engine in one thread. Requests for samples that wait together (those of several
    ranks) run as one batch.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.jobs = SimpleQueue[Job]()
        self.version = "as started"
        self.about = engine.describe()

    def run(self) -> None:
        """Work for ever."""
        while True:
            waiting = [self.jobs.get()]
            while not self.jobs.empty():
                waiting.append(self.jobs.get())

            # In the order they came: loads one by one, the samples between two of them together.
            for loads, jobs in groupby(waiting, key=lambda job: job.weights is not None):
                for part in [[job] for job in jobs] if loads else [list(jobs)]:
                    self._settle(part, self._load if loads else self._sample)

    def _settle(self, jobs: list[Job], work: Callable[[list[Job]], None]) -> None:
        try:
            work(jobs)
        except Exception as error:  # an engine raises anything; it goes to those who asked
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(error)

    def _load(self, jobs: list[Job]) -> None:
        (job,) = jobs
        assert job.weights is not None
        self.version = "none: the last weights could not be loaded"
        try:
            self.engine.load(job.weights)
        except Exception as error:
            raise Refused(422, f"the weights do not fit this model: {error}") from error
        self.version = job.version
        job.done.set_result({"version": self.version})

    def _sample(self, jobs: list[Job]) -> None:
        current = [job for job in jobs if job.version == self.version]
        for job in jobs:
            if job.version != self.version:
                job.done.set_exception(
                    Refused(409, f"asked for weights {job.version[:12]}, has {self.version[:12]}")
                )
        drawn = iter(self.engine.sample([row for job in current for row in job.rows]))
        for job in current:
            job.done.set_result(
                {"version": self.version, "completions": [next(drawn) for _ in job.rows]}
            )


class Handler(BaseHTTPRequestHandler):
    """Checks a request and hands it to the worker."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        """What this server holds."""
        worker = self.server.worker
        self._answer(
            "/hello", lambda _: {"protocol": PROTOCOL, "version": worker.version, **worker.about}
        )

    def do_PUT(self) -> None:
        """New weights."""
        self._answer("/weights", self._weights)

    def do_POST(self) -> None:
        """Completions."""
        self._answer("/sample", self._sample)

    def _answer(self, path: str, act: Callable[[int], Mapping[str, Any]]) -> None:
        self.close_connection = True  # a refused body is not read
        try:
            if self.path != path:
                raise Refused(404, f"there is no {self.command} {self.path}")
            if self.server.token and not compare_digest(
                self.headers.get("Authorization", ""), f"Bearer {self.server.token}"
            ):
                raise Refused(
                    401, f"the token is missing or wrong: set {TOKEN_ENV} to the server's"
                )

            status = 200
            body = act(int(self.headers.get("Content-Length", 0)))
        except Refused as error:
            status = error.status
            body = {"error": str(error)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            status = 400
            body = {"error": f"malformed request: {type(error).__name__}: {error}"}
        except Exception as error:
            status = 500
            body = {"error": f"{type(error).__name__}: {error}"}

        data = json.dumps(body).encode()
        with suppress(ConnectionError):  # the client went away: nobody waits for the answer
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _weights(self, length: int) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory(prefix="alignkit-weights-") as folder:
            if length > shutil.disk_usage(folder).free:
                raise Refused(
                    507, f"{length} bytes of weights do not fit on the disk of {folder}; set TMPDIR"
                )

            file = Path(folder) / "model.safetensors"
            with file.open("wb") as out:
                while length and (block := self.rfile.read(min(CHUNK, length))):
                    length -= out.write(block)

            version = version_of(file)
            if version != self.headers.get(VERSION_HEADER):
                raise Refused(
                    400, "the weights arrived damaged: their SHA-256 is not the announced version"
                )
            return self._done(Job(version, weights=Path(folder)))

    def _sample(self, length: int) -> Mapping[str, Any]:
        # A web page that a user of this machine visits cannot send this content type here.
        if self.headers.get("Content-Type") != "application/json":
            raise Refused(415, "send application/json")
        if length > LARGEST_REQUEST:
            raise Refused(413, f"{length} bytes are too many for one request")

        asked = json.loads(self.rfile.read(length))
        shared = [asked[name] for name in ("max_new_tokens", "temperature", "top_p", "stop")]
        pairs = zip(asked["prompts"], asked["seeds"], strict=True)
        rows = [Row(prompt, seed, *shared) for prompt, seeds in pairs for seed in seeds]
        return self._done(Job(asked["version"], rows))

    def _done(self, job: Job) -> Mapping[str, Any]:
        self.server.worker.jobs.put(job)
        return job.done.result()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: prompts and completions stay private."""


class Server(ThreadingHTTPServer):
    """Listens on 127.0.0.1 and no other address; port 0 takes a free one. Without a `token` the
    environment's is used.
    """

    daemon_threads = True

    def __init__(self, worker: Worker, port: int, token: str | None = None):
        self.worker = worker
        self.token = os.environ.get(TOKEN_ENV, "") if token is None else token
        super().__init__(("127.0.0.1", port), Handler)


def serve(engine: Engine, port: int) -> None:
    """Serve for ever; the engine works in the calling thread."""
    worker = Worker(engine)
    server = Server(worker, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"alignkit: sampling server ready on http://127.0.0.1:{server.server_port}", flush=True)
    worker.run()
