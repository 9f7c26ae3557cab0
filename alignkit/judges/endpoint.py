"""POST of JSON to an address that a recipe names: guarded, bounded in time and size, and silent
about the key.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import random
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from alignkit.errors import ConfigError, ResourceError

_RETRIED = {408, 425, 429, *range(500, 600)}
_LONGEST_WAIT = 30.0  # seconds between two attempts


class Unanswered(Exception):
    """A request that failed for good, or a response that is no JSON. Its text holds no secret."""


class Endpoint:
    """A JSON endpoint. `post` is safe to call from several threads.

    https anywhere public, http on loopback addresses only; private, link-local and metadata
    addresses are refused unless `allow_private`. The address is resolved once per request, checked,
    and connected to as checked. No redirect is followed, no proxy is used. Raises ConfigError for
    an address that is not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_bytes: int = 1 << 20,
        allow_private: bool = False,
    ):
        parts = urlsplit(url)
        if (
            parts.scheme not in ("https", "http")
            or not parts.hostname
            or "@" in parts.netloc
            or parts.query
            or parts.fragment
        ):
            raise ConfigError(
                "judge.chat.url: write https://host/path, without user, query or fragment"
            )
        self.secure = parts.scheme == "https"
        self.host = parts.hostname
        self.path = parts.path.rstrip("/")
        self.port = parts.port or (443 if self.secure else 80)
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_bytes = max_bytes
        self.allow_private = allow_private
        # its own: the run's random numbers must not depend on the network
        self.jitter = random.Random()
        self._key()

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The response's JSON. Raises Unanswered after the last attempt, ResourceError for what no
        attempt can mend (a refused key, an unknown route, a redirect), ConfigError for an address
        that is not allowed.
        """
        for attempt in range(self.retries + 1):
            if attempt:
                pause = min(_LONGEST_WAIT, self.backoff * 2 ** (attempt - 1))
                time.sleep(pause * self.jitter.uniform(0.5, 1.5))

            try:
                status, data = self._once(route, json.dumps(body).encode())
            except (OSError, http.client.HTTPException) as error:
                reason = f"no response ({type(error).__name__})"
            else:
                if status == 200:
                    return _parsed(data)
                if status not in _RETRIED:
                    hint = _hint(status, self.api_key_env)
                    raise ResourceError(f"judge: {self.host} answered {_status(status)}; {hint}")
                reason = _status(status)

        raise Unanswered(f"{self.host}: {reason}, after {self.retries + 1} attempts")

    def _once(self, route: str, body: bytes) -> tuple[int, bytes]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Connection": "close",
        }
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {self._key()}"
        connection = _Pinned(self.host, self.port, self._address(), self.secure, self.timeout)

        # A server that sends byte by byte never exceeds the timeout of a socket, which counts from
        # one byte to the next; this one limits the whole request.
        deadline = threading.Timer(self.timeout, connection.cut)
        deadline.daemon = True
        deadline.start()
        try:
            connection.request("POST", f"{self.path}/{route}", body=body, headers=headers)
            response = connection.getresponse()
            data = response.read(self.max_bytes + 1)
        finally:
            deadline.cancel()
            connection.close()

        if len(data) > self.max_bytes:
            raise Unanswered(f"{self.host}: a response of more than {self.max_bytes} bytes")
        if connection.was_cut:
            raise TimeoutError
        if response.length:  # bytes that were announced and did not come
            raise http.client.IncompleteRead(data)
        return response.status, data

    def _key(self) -> str:
        """The key, checked here because the error for a bad header would quote it."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if self.api_key_env and not (key and key.isascii() and key.isprintable()):
            raise ConfigError(
                f"judge.chat.api_key_env: the variable {self.api_key_env} is not set, or holds no "
                "key"
            )
        return key

    def _address(self) -> str:
        """The first address of the host. ConfigError unless all of its addresses are allowed."""
        resolved = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        texts = [str(info[4][0]) for info in resolved]

        for text in texts:
            address = ipaddress.ip_address(text.partition("%")[0])
            address = getattr(address, "ipv4_mapped", None) or address
            if address.is_loopback or (
                self.allow_private and address.is_private and not address.is_link_local
            ):
                continue
            if not address.is_global or address.is_multicast:
                raise ConfigError(
                    f"judge.chat.url: {self.host} is the private, link-local or reserved address "
                    f"{address}; use a public or loopback address (a private one needs "
                    "--allow-private-judge; link-local and reserved ones are never used)"
                )
            if not self.secure:
                raise ConfigError(
                    f"judge.chat.url: http would send prompts to {self.host} in the clear; "
                    "use https"
                )
        return texts[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to the address that was checked; TLS still verifies the host's name."""

    def __init__(self, host: str, port: int, address: str, secure: bool, timeout: float):
        super().__init__(host, port, timeout=timeout)
        self.address = address
        self.secure = secure
        self.was_cut = False
        # `sock` is dropped as soon as the response owns it
        self.opened: socket.socket | None = None

    def connect(self) -> None:
        """Open the socket to the pinned address."""
        self.sock = self.opened = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            self.sock = self.opened = ssl.create_default_context().wrap_socket(
                self.sock, server_hostname=self.host
            )

    def cut(self) -> None:
        """End the connection from another thread: reads that wait return at once."""
        self.was_cut = True
        if self.opened is not None:
            with contextlib.suppress(OSError):
                self.opened.shutdown(socket.SHUT_RDWR)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Unanswered("the response is not JSON") from None


def _status(status: int) -> str:
    return f"{status} {http.client.responses.get(status, '')}".strip()


def _hint(status: int, key: str | None) -> str:
    if status in (401, 403):
        return (
            f"check the key in {key}"
            if key
            else "set judge.chat.api_key_env to the variable that holds the key"
        )
    if 300 <= status < 400:
        return "redirects are not followed; give the final address in judge.chat.url"
    return "check judge.chat.url and judge.chat.model"
