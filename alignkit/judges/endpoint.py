"""POST of JSON to an address that a recipe names: guarded, bounded in time and size, and silent
about the key.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from alignkit.errors import ConfigError, ResourceError

_RETRIED = {408, 425, 429, *range(500, 600)}
_LONGEST_WAIT = 30.0  # seconds between two attempts
_LONGEST_NAME = 253  # characters of a host's name

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> list[_Network]:
    return [ipaddress.ip_network(text) for text in texts]


_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
_GIVEN_OUT = _networks("2000::/3")
_DETOURS = _networks("192.0.0.0/24", "192.88.99.0/24", "2001::/32", "2002::/16")
_METADATA = ("fd00:ec2::254",)


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
        self.secure, self.host, self.port, self.path = _address_parts(url)
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
            if address.is_loopback or (self.allow_private and _within(address, _PRIVATE)):
                continue
            if not _public(address):
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


def _address_parts(url: str) -> tuple[bool, str, int, str]:
    """Whether it is https, host, port and path. ConfigError for an address of another form."""
    parts = None
    with contextlib.suppress(ValueError):  # an open bracket, letters that hide a slash
        parts = urlsplit(url)
    if (
        parts is None
        or parts.scheme not in ("https", "http")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
        or not (parts.path.isascii() and parts.path.isprintable() and " " not in parts.path)
        or url != url.strip()
    ):
        raise ConfigError(
            "judge.chat.url: write https://host/path, without user, query, fragment, white space "
            "or letters that a path has to escape"
        )

    secure = parts.scheme == "https"
    try:
        port = parts.port if parts.port is not None else (443 if secure else 80)
    except ValueError:
        port = 0
    if port == 0:
        raise ConfigError("judge.chat.url: the port is a number from 1 to 65535")
    return secure, _host(parts.hostname), port, parts.path.rstrip("/")


def _host(name: str) -> str:
    """`name` as a resolver takes it. ConfigError for what can be no name and no address."""
    with contextlib.suppress(ValueError):
        if "%" not in name:  # a zone belongs to link-local addresses, which are never used
            ipaddress.ip_address(name)
            return name
    try:
        ascii_name = name.encode("idna").decode()
    except UnicodeError:  # a label that is empty, too long, or of letters that no name has
        ascii_name = ""
    if len(ascii_name) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_.-]+", ascii_name):
        raise ConfigError(
            "judge.chat.url: its host is neither an address nor a name of letters, digits and "
            "hyphens, with at most 63 characters between two dots and 253 in all"
        )
    return ascii_name


def _public(address: _Address) -> bool:
    """Whether this is an address of the public network and leads to itself.

    Of IPv6 only 2000::/3 is given out for that. Teredo, 6to4 and the addresses of their relays lead
    to the IPv4 address that they carry inside, such as that of a cloud's metadata.
    """
    if address.version == 6 and not _within(address, _GIVEN_OUT):
        return False
    return address.is_global and not address.is_multicast and not _within(address, _DETOURS)


def _within(address: _Address, networks: Sequence[_Network]) -> bool:
    inside = any(address.version == other.version and address in other for other in networks)
    return inside and str(address) not in _METADATA


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
