"""The trainer's side of a sampling server: addresses that are allowed, requests that end, answers
that are checked.
"""

import http.client
import json
import logging
import os
import ssl
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignkit.errors import ConfigError, ModelError, ResourceError
from alignkit.rollout.wire import PROTOCOL, TOKEN_ENV, VERSION_HEADER, chunks

WARN_EVERY = 20.0  # seconds between two warnings about a server that does not answer yet
RESUME = "start it again, then go on with --resume auto"
log = logging.getLogger("alignkit")


class Unreachable(ResourceError):
    """No answer: nothing listens there, or it stopped."""


class Client:
    """A sampling server at `url`.

    Raises ResourceError where it is gone or slow, or its answer is malformed.

    http goes to loopback addresses alone; https goes anywhere and needs the token. No redirect is
    followed, no proxy is used.
    """

    def __init__(self, url: str, *, timeout: float):
        parts = urlsplit(url)
        self.url = url
        self.timeout = timeout
        self.host = parts.hostname or ""
        self.port = parts.port
        self.secure = parts.scheme == "https"
        self.token = os.environ.get(TOKEN_ENV, "").strip()
        if self.secure and not self.token:
            raise ConfigError(
                f"rollout.url: {url} is not this machine; set {TOKEN_ENV} to the server's token"
            )

    def wait(self, patience: float) -> dict[str, Any]:
        """The server's hello; a server that is still loading its model has `patience` seconds."""
        began = time.monotonic()
        warned = began
        while True:
            try:
                return self.hello()
            except Unreachable as error:
                now = time.monotonic()
                waited = now - began
                if waited >= patience:
                    raise Unreachable(
                        f"{error} within rollout.start_timeout ({patience:g} s); start one with "
                        "`python -m alignkit.rollout.vllm_server MODEL` in vLLM's environment"
                    ) from error

                if now - warned >= WARN_EVERY:
                    waiting = "waiting for the sampling server at %s: %.0f of %g s"
                    log.warning(waiting, self.url, waited, patience)
                    warned = now
                time.sleep(min(1.0, patience / 10))

    def hello(self) -> dict[str, Any]:
        """What the server holds. ModelError for a server of another kind."""
        about = self._ask("GET", "/hello", most=1 << 16)
        if about.get("protocol") != PROTOCOL:
            raise ModelError(
                f"rollout.url: {self.url} speaks protocol {about.get('protocol')}, not {PROTOCOL}; "
                "start one with `python -m alignkit.rollout.vllm_server MODEL`"
            )
        return about

    def push(self, file: Path, version: str) -> None:
        """Give the server weights."""
        headers = {VERSION_HEADER: version, "Content-Length": str(file.stat().st_size)}
        self._ask("PUT", "/weights", chunks(file), headers, most=1 << 16)

    def sample(self, asked: Mapping[str, Any], most: int) -> dict[str, Any]:
        """The answer to a request for completions, `most` bytes at most."""
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return self._ask("POST", "/sample", [body], headers, most=most)

    def _ask(
        self,
        method: str,
        path: str,
        body: Iterable[bytes] = (),
        headers: Mapping[str, str] | None = None,
        *,
        most: int,
    ) -> dict[str, Any]:
        bearer = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connection = self._connection()
        try:
            connection.putrequest(method, path)
            for name, value in {**bearer, **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders()
            for block in body:
                connection.send(block)

            response = connection.getresponse()
            status = response.status
            data = response.read(most + 1)  # one byte more shows that the answer is too long
        except TimeoutError as error:
            raise Unreachable(
                f"rollout.url: {self.url} did not answer in {self.timeout:g} s; {RESUME}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"rollout.url: no sampling server answers at {self.url} "
                f"({type(error).__name__}: {error}); {RESUME}"
            ) from error
        finally:
            connection.close()

        if len(data) > most:
            raise ResourceError(
                f"rollout.url: the answer of {self.url} is longer than the {most} bytes that were "
                "asked for"
            )
        return self._checked(method, path, status, data)

    def _connection(self) -> http.client.HTTPConnection:
        if self.secure:
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=self.timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)

    def _checked(self, method: str, path: str, status: int, data: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ResourceError(
                f"rollout.url: {self.url} answered {path} with {status} and no JSON object; "
                "is it the right port?"
            )
        if status == 200:
            return answer

        reason = str(answer.get("error", ""))[:500]
        if status == 409:
            raise ResourceError(
                f"rollout.url: stale weights: the server at {self.url} has others than this run "
                f"gave it ({reason}); it was started again, or another run uses it. Give each run "
                "its own server, then go on with --resume auto"
            )
        if status == 422:
            raise ModelError(
                f"rollout.url: the server at {self.url} refused the policy's weights: {reason}"
            )
        raise ResourceError(
            f"rollout.url: {self.url} answered {method} {path} with {status}: {reason}"
        )
