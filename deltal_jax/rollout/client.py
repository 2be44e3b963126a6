"""JSON over HTTP: time-outs, bounded retries with growing pauses, answers of bounded size."""

import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from deltal_jax.errors import UserError

#: Seconds until a server must have taken a connection.
CONNECT = 30.0
#: Answers of a proxy whose server is gone.
GONE = (502, 503, 504)
TOO_MANY = 429
#: How much of an error's text is shown.
SHOWN = 300


class LostServerError(Exception):
    """A connection was refused or broke off: the server may have started anew since."""


class AbortedError(Exception):
    """The client was closed meanwhile."""


class Client:
    """POST requests to one server, from several threads.

    Time-outs, 429 and 5xx are tried again, `retries` times, after pauses of `backoff` seconds that
    double.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, backoff: float):
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self._parts = urlsplit(url)
        self._left = threading.Event()
        self._guard = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def close(self) -> None:
        """Break off what is under way, so that no thread goes on waiting and the server can drop
        what nobody waits for."""
        self._left.set()
        with self._guard:
            for own in self._sockets:
                with suppress(OSError):
                    own.shutdown(socket.SHUT_RDWR)

    def post(self, path: str, body: dict[str, Any], *, limit: int) -> Any:
        """The answer's JSON, None where it is empty; of at most `limit` bytes.

        Raises LostServerError where the connection was refused or lost, and UserError for what
        another try would not change, or did not.
        """
        where = f"{self.url}{path}"
        for attempt in itertools.count(1):
            if self._left.is_set():
                raise AbortedError
            try:
                status, text = self._send(path, body, limit)
            except TimeoutError:
                field, problem = "timeout", f"no answer from {where} within {self.timeout:g} s"
                fix = "raise it, or lower rollout.slots"
            except (OSError, http.client.HTTPException) as error:
                if self._left.is_set():
                    raise AbortedError from error
                raise LostServerError(f"{where}: {error or type(error).__name__}") from error
            else:
                if self._left.is_set():  # what came may be cut
                    raise AbortedError
                if status == http.client.OK:
                    return _parsed(where, text)
                field, problem = "url", f"{where} answered {status}: {_shown(text)}"
                fix = "see the server's log"
                if status in GONE:
                    raise LostServerError(f"{where} answered {status}")
                if status != TOO_MANY and status < 500:
                    raise UserError(f"rollout.server.{field}: {problem}; {fix}")
            if attempt > self.retries:
                times = f", {attempt} times" if attempt > 1 else ""
                raise UserError(f"rollout.server.{field}: {problem}{times}; {fix}")
            self._left.wait(self.backoff * 2 ** (attempt - 1))
        raise AssertionError

    def _send(self, path: str, body: dict[str, Any], limit: int) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout
        with self._connected() as (connection, own):
            own.settimeout(self.timeout)
            content = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", self._parts.path + path, content, headers)
            with connection.getresponse() as response:
                return response.status, self._read(response, own, path, deadline, limit)

    def _read(
        self,
        response: http.client.HTTPResponse,
        own: socket.socket,
        path: str,
        deadline: float,
        limit: int,
    ) -> bytes:
        found = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            own.settimeout(left)
            part = response.read1(2**16)
            if not part:
                break
            found += part
            if len(found) > limit:
                raise UserError(
                    f"rollout.server.url: {self.url}{path} answered more than {limit:,} bytes; is "
                    "it the server meant?"
                )
        if response.length:  # what its header had promised and did not come
            raise http.client.IncompleteRead(bytes(found), response.length)
        return bytes(found)

    @contextmanager
    def _connected(self) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        kind, parts = kinds[self._parts.scheme], self._parts
        connection = kind(parts.hostname or "", parts.port, timeout=min(CONNECT, self.timeout))
        try:
            connection.connect()
        except TimeoutError as error:
            raise LostServerError(f"{self.url}: takes no connection") from error
        own = connection.sock
        with self._guard:
            if self._left.is_set():
                connection.close()
                raise AbortedError
            self._sockets.add(own)
        try:
            yield connection, own
        finally:
            with self._guard:
                self._sockets.discard(own)
            connection.close()


def _parsed(where: str, text: bytes) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"rollout.server.url: {where} answered what is no JSON: {_shown(text)}; "
            "is it the server meant?"
        ) from error


def _shown(text: bytes) -> str:
    """The beginning, on one line."""
    line = " ".join(text.decode("utf-8", "replace").split())
    return line[:SHOWN] + ("…" if len(line) > SHOWN else "") or "nothing"
