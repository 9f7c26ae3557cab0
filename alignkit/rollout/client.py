"""One vLLM server over its own HTTP: addresses that are allowed, requests that end, answers that are
checked.

The server is an unmodified `vllm serve` in development mode, as `docs/vllm.md` starts it: the paths
below are those of vLLM 0.32.
"""

import http.client
import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignkit.errors import ConfigError, ModelError, ResourceError

TOKEN_ENV = "ALIGNKIT_ROLLOUT_TOKEN"  # the environment variable with the server's --api-key
WARN_EVERY = 20.0  # seconds between two warnings about a server that does not answer yet
SMALL = 1 << 22  # bytes of an answer that holds no completions
INCOMPLETE = "incomplete"  # the version of weights that are being replaced
RESUME = "start it again, then go on with --resume auto"
START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8001 --enable-scale-out "
    "--logprobs-mode processed_logprobs --generation-config vllm"
)
log = logging.getLogger("alignkit")


class Unreachable(ResourceError):
    """No answer: nothing listens there, or it stopped."""


class Client:
    """A vLLM server at `url`.

    Raises Unreachable where it is gone or slow, ResourceError where its answer is malformed.

    http goes to loopback addresses alone; https goes anywhere and needs the token. No redirect is
    followed, no proxy is used. Any number of threads may use one client.
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
        """`about` of a server that may still be loading its model, for `patience` seconds."""
        began = time.monotonic()
        warned = began
        while True:
            try:
                return self.about()
            except Unreachable as error:
                now = time.monotonic()
                waited = now - began
                if waited >= patience:
                    raise Unreachable(
                        f"{error} within rollout.start_timeout ({patience:g} s); start one with "
                        f"`{START}`"
                    ) from error

                if now - warned >= WARN_EVERY:
                    waiting = "waiting for the sampling server at %s: %.0f of %g s"
                    log.warning(waiting, self.url, waited, patience)
                    warned = now
                time.sleep(min(1.0, patience / 10))

    def about(self) -> dict[str, Any]:
        """vLLM's `model_config`: `model`, `dtype`, `max_model_len`, `logprobs_mode`, `hf_config`; and
        `transfer`, the backend of its weight transfer or None, and `unpickles`, whether it takes
        the handles of shared memory.

        ModelError for a server that was not started as it has to be.
        """
        info = self._ask("GET", "/server_info?config_format=json", missing=START)
        whole = info.get("vllm_config", {})
        config = whole.get("model_config")
        if not isinstance(config, dict):
            raise ModelError(
                f"rollout.url: {self.url} is no vLLM server that alignkit knows; start one with "
                f"`{START}`"
            )

        if config.get("logprobs_mode") != "processed_logprobs":
            raise ModelError(
                f"rollout.url: the server at {self.url} gives {config.get('logprobs_mode')}, not "
                "the log-probs of what it samples from; start it with --logprobs-mode "
                "processed_logprobs"
            )
        transfer = whole.get("weight_transfer_config") or {}
        environment = info.get("vllm_env") or {}
        return {
            **config,
            "transfer": transfer.get("backend"),
            "unpickles": bool(environment.get("VLLM_ALLOW_INSECURE_SERIALIZATION")),
        }

    def version(self) -> str:
        """The version of the weights that the server holds: what it was given last."""
        return str(self._ask("GET", "/weight_info", missing=START).get("weight_version"))

    def load(self, folder: Path, version: str) -> None:
        """Have the server read the weights in `folder`, a path that it sees, as `version`.

        Completions that are under way wait, and go on with the new weights; their answers name
        both versions.
        """
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        if self._pause():
            self._drop_parts(lambda: self._ask("POST", "/collective_rpc", asked))
        self._take_in("/collective_rpc", asked)
        self._resume_as(version)

    def join(self, init: Mapping[str, Any]) -> None:
        """Have the server's workers get ready for vLLM's weight transfer; what they are told depends
        on its backend.
        """
        self._ask("POST", "/init_weight_transfer_engine", {"init_info": init}, missing=START)

    def workers(self) -> int:
        """The server's processes that hold weights."""
        return int(self._ask("GET", "/get_world_size", missing=START)["world_size"])

    def begin(self) -> None:
        """Have the server wait for weights, which `update` brings and `finish` puts in force."""
        start = "/start_weight_update"
        if self._pause():
            try:
                self._ask("POST", start, missing=START)
            except Unreachable:
                raise
            except ResourceError:
                pass  # it counts the update as under way
            self._drop_parts(lambda: self._ask("POST", "/finish_weight_update"))
        self._ask("POST", start, missing=START)

    def update(self, info: Mapping[str, Any]) -> None:
        """Have the server take in some tensors; `info` depends on the backend."""
        self._take_in("/update_weights", {"update_info": info})

    def finish(self, version: str) -> None:
        """All tensors are there: the server goes on with them, as `version`."""
        self._take_in("/finish_weight_update", None)
        self._resume_as(version)

    def resume(self) -> None:
        """Have the server go on with whatever weights it has."""
        self._ask("POST", "/resume")

    def _drop_parts(self, end: Callable[[], object]) -> None:
        """Have vLLM drop what an update that broke off has left, which it does when one ends."""
        try:
            end()
        except Unreachable:
            raise
        except ResourceError as error:
            self.resume()
            raise ResourceError(
                f"rollout.url: the server at {self.url} holds parts of weights that broke off, and "
                f"cannot drop them: {error}. {RESUME.capitalize()}"
            ) from error

    def _pause(self) -> bool:
        """Whether an earlier update broke off. vLLM would count what came then as parts of the next
        one.
        """
        broken = self.version() == INCOMPLETE
        self._ask("POST", "/pause?mode=keep")
        # Until the new weights are all there, the server holds no version, and nothing that would be
        # taken for these weights where this breaks off.
        self.rename(INCOMPLETE)
        return broken

    def _take_in(self, path: str, asked: Mapping[str, Any] | None) -> None:
        """A request that makes the server load weights, which may not fit its model."""
        try:
            self._ask("POST", path, asked)
        except Unreachable:
            raise
        except ResourceError as error:
            self.resume()  # whatever waits is answered, under no version
            raise ModelError(
                f"rollout.url: the server at {self.url} refused the policy's weights: {error}"
            ) from error

    def _resume_as(self, version: str) -> None:
        # What was computed with the old weights is forgotten before the new version is in force.
        self._ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        self.rename(version)
        self.resume()

    def rename(self, version: str) -> None:
        """Give the weights that the server holds another version."""
        self._ask("POST", "/update_weight_version", {"new_version": version})

    def generate(self, asked: Mapping[str, Any], most: int) -> bytes:
        """The answer to a request for completions of one prompt: JSON of `most` bytes at most."""
        path = "/inference/v1/generate"
        status, data = self._answer("POST", path, asked, most)
        if status != 200:
            self._checked(path, status, data, missing=START)
        return data

    def sleep(self) -> None:
        """Have the server free its GPU: weights, which it then holds no more, and cache."""
        self.rename("asleep")
        self._ask("POST", "/sleep?level=2")

    def wake(self) -> None:
        """Give the server its GPU's memory back; its weights have to be loaded."""
        self._ask("POST", "/wake_up")

    def _ask(
        self,
        method: str,
        path: str,
        asked: Mapping[str, Any] | None = None,
        *,
        missing: str = "",
    ) -> dict[str, Any]:
        status, data = self._answer(method, path, asked, SMALL)
        return self._checked(path.partition("?")[0], status, data, missing)

    def _answer(
        self, method: str, path: str, asked: Mapping[str, Any] | None, most: int
    ) -> tuple[int, bytes]:
        """Status and body of an answer."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        body = b"" if asked is None else json.dumps(asked).encode()

        connection = self._connection()
        try:
            connection.request(method, path, body, headers)
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
        return status, data

    def _connection(self) -> http.client.HTTPConnection:
        if self.secure:
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=self.timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)

    def _checked(self, path: str, status: int, data: bytes, missing: str) -> dict[str, Any]:
        """The JSON object of an answer; nothing at all counts as an empty one."""
        if status == 404 and missing:
            raise ModelError(
                f"rollout.url: {self.url} has no {path}; vLLM has it from 0.32 on, in development "
                f"mode: start it with `{missing}`"
            )
        try:
            answer = json.loads(data) if data else {}
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ResourceError(
                f"rollout.url: {self.url} answered {path} with {status} and no JSON object; "
                "is it the right port?"
            )
        if status == 200:
            return answer

        error = answer.get("error", answer.get("detail", ""))
        reason = str(error.get("message", "") if isinstance(error, dict) else error)[:500]
        raise ResourceError(f"rollout.url: {self.url} answered {path} with {status}: {reason}")
