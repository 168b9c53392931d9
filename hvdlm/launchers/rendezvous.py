"""The store through which Horovod's Gloo workers find each other, made safe to have on a network.

Horovod's own server listens on every interface, believes everyone, and (in elastic jobs) unpickles what it is sent:
CVE-2024-10190; readers of its key-value store unpickle too: CVE-2026-31234. This one listens at one address, answers
only requests whose path starts with the secret of the job, and unpickles nothing.

Horovod's C++ client cannot sign requests or set headers. But the address it is given in
``HOROVOD_GLOO_RENDEZVOUS_ADDR`` goes into its URLs as it is, ``http://ADDR:PORT/scope/key``: with ``host:port/secret``
as ADDR, every path starts with ``/secret:PORT/``. Whoever can read the job's traffic can read the secret: see the
README on how to isolate or tunnel it.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from hvdlm.errors import LaunchError
from hvdlm.launchers.hosts import Slot

__all__ = ["MAX_VALUE_BYTES", "Rendezvous", "given_rendezvous"]

MAX_VALUE_BYTES = 4 * 2**20
"""A worker writes the addresses it listens at, some 200 bytes for each other worker."""
_VARIABLES = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_MAX_ENTRIES = 100_000
_MAX_CONNECTIONS = 256
_SECONDS_OF_A_REQUEST = 5.0
_MAX_COMPLAINTS = 50
_SCOPE = re.compile(r"(?:global|local_[\w.-]+|cross_\d+)(?:_process_set_hash_[0-9a-f]+)?")
_KEY = re.compile(r"[\w.:-]{1,200}")
# The first bytes of a pickle of protocol 2 and later, as they are and in base64.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|gA[I-X]")

_log = logging.getLogger("hvdlm")


class Rendezvous:
    """One job's store; listens from the start, answers between :meth:`start` and :meth:`close`.

    Args:
        address: The address to listen at, on a free port.
        slots: The place of each worker, see :meth:`reset`.
        on_get: Asked before the store is, with (scope, key): a value, None to go on. Elastic drivers answer
            ``rank_and_size`` so. Called in a thread of its own.
        report: Called with a line for each refused request; the logger if None.
    """

    def __init__(
        self,
        address: str,
        slots: Iterable[Slot] = (),
        *,
        on_get: Callable[[str, str], bytes | None] = lambda *_: None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._secret = secrets.token_urlsafe(24)
        self._on_get = on_get
        self._report = report or (lambda line: _log.warning("%s", line))
        self._complaints = 0
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._left: dict[str, set[str]] = {}
        self._server = _Server((address, 0), type("Handler", (_Handler,), {"store": self}))
        self._thread: threading.Thread | None = None
        self.address, self.port = address, int(self._server.server_address[1])
        self.reset(slots)

    def environment(self) -> dict[str, str]:
        """The variables with which a worker's Horovod finds this store."""
        return {
            _VARIABLES[0]: f"{self.address}:{self.port}/{self._secret}",
            _VARIABLES[1]: str(self.port),
        }

    def reset(self, slots: Iterable[Slot]) -> None:
        """Forget everything, for workers in these places."""
        sizes = {}
        for slot in slots:
            sizes["global"] = slot.size
            sizes[f"local_{slot.hostname}"] = slot.local_size
            sizes[f"cross_{slot.local_rank}"] = slot.cross_size
        with self._lock:
            self._values, self._left, self._sizes = {}, {}, sizes

    def start(self) -> None:
        """Answer, in a thread. Start processes before, where possible."""
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def request(self, method: str, path: str, body: bytes, source: str) -> tuple[int, bytes]:
        """Answer one request; returns the HTTP status and the content.

        Args:
            method: ``GET``, ``PUT`` or ``DELETE``.
            path: ``/secret:port/scope/key``.
            body: What is to be stored.
            source: Who asks, for the log.
        """
        given, _, rest = path.lstrip("/").partition("/")
        if not hmac.compare_digest(given.partition(":")[0].encode(), self._secret.encode()):
            return self._refuse(403, f"{method} without the job's secret", source)
        scope, _, key = rest.partition("/")
        scope, key = unquote(scope), unquote(key)
        if not _KEY.fullmatch(key):
            return self._refuse(400, f"{method} of the key {key[:80]!r}", source)
        if method == "GET":
            answer = self._on_get(scope, key)
            if answer is None:
                with self._lock:
                    answer = self._values.get(scope, {}).get(key)
            return (404, b"") if answer is None else (200, answer)
        if not _SCOPE.fullmatch(scope):
            # worker_addresses, among others: Horovod's elastic driver unpickles what is written there.
            return self._refuse(403, f"{method} in the scope {scope[:80]!r}", source)
        if method == "DELETE":
            self._leave(scope, key)
            return 200, b""
        if _PICKLE.match(body):
            return self._refuse(403, f"{method} of a pickle in {scope}/{key}", source)
        with self._lock:
            if sum(map(len, self._values.values())) >= _MAX_ENTRIES:
                return self._refuse(507, f"{method} of one entry too many", source)
            self._values.setdefault(scope, {})[key] = body
        return 200, b""

    def complain(self, what: str, source: str) -> None:
        """Report a request that was refused; a flood of them is not written down in full."""
        self._complaints += 1
        if self._complaints <= _MAX_COMPLAINTS:
            more = "; further ones are not reported" if self._complaints == _MAX_COMPLAINTS else ""
            self._report(f"rendezvous: refused from {source}: {what}{more}")

    def _refuse(self, status: int, what: str, source: str) -> tuple[int, bytes]:
        self.complain(what, source)
        return status, b""

    def _leave(self, scope: str, key: str) -> None:
        """A worker has found the others of a scope. When all have, the scope can be used anew."""
        with self._lock:
            if scope not in self._sizes:  # one of a process set, whose size only its workers know
                self._values.get(scope, {}).pop(key, None)
                return
            left = self._left.setdefault(scope, set())
            left.add(key)
            if len(left) == self._sizes[scope]:
                self._values.pop(scope, None)
                del self._left[scope]


def given_rendezvous(environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(:meth:`Rendezvous.environment` as this process was given it, the address of the store).

    Raises:
        LaunchError: It was given none.
    """
    found = {name: environ[name] for name in _VARIABLES if environ.get(name)}
    if len(found) < len(_VARIABLES):
        raise LaunchError("this worker was not told where the job's rendezvous is.", hint="start it with hvdlm run")
    return found, found[_VARIABLES[0]].partition(":")[0]


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away in the middle is no event."""


class _Handler(BaseHTTPRequestHandler):
    store: Rendezvous
    timeout = _SECONDS_OF_A_REQUEST
    server_version, sys_version = "hvdlm", ""

    def _answer(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > MAX_VALUE_BYTES:
            self.store.complain(f"{self.command} of {length[:20]} bytes", self.client_address[0])
            status, content = 413, b""
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                return
            status, content = self.store.request(self.command, self.path, body, self.client_address[0])
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_DELETE = _answer  # noqa: N815 - names that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Each request is not worth a line."""

    def log_error(self, format: str, *args: Any) -> None:
        """What is no HTTP request of ours."""
        self.store.complain((format % args)[:200], self.client_address[0])
