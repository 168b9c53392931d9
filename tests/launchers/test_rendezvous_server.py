"""The store of a Gloo job: what Horovod's client does with it, and what strangers cannot."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdlm.errors import LaunchError
from hvdlm.launchers import rendezvous
from hvdlm.launchers.hosts import assign, parse_hosts
from hvdlm.launchers.rendezvous import MAX_VALUE_BYTES, Rendezvous, given_rendezvous

SLOTS = assign(parse_hosts("a:2,b:1"), 3)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def store(told: list[str]) -> Iterator[Rendezvous]:
    made = Rendezvous("127.0.0.1", SLOTS, report=told.append)
    made.start()
    yield made
    made.close()


def ask(store: Rendezvous, method: str, rest: str, body: bytes = b"", secret: str | None = None) -> tuple[int, bytes]:
    """As Horovod's client does: the address it was given, then the port, in one URL."""
    variables = store.environment()
    address, port = variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"], variables["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    host, _, path = f"{address}:{port}/{rest}".partition("/")
    if secret is not None:
        path = f"{secret}/{rest}"
    return raw(
        store, f"{method} /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


def raw(store: Rendezvous, message: bytes) -> tuple[int, bytes]:
    with socket.create_connection((store.address, store.port), timeout=10) as connection:
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    head, _, content = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head.startswith(b"HTTP/") else 0), content


def test_put_get_delete(store: Rendezvous) -> None:
    assert ask(store, "GET", "global/0") == (404, b"")
    value = bytes(range(256))
    assert ask(store, "PUT", "global/0", value) == (200, b"")
    assert ask(store, "GET", "global/0") == (200, value)
    for rank in (0, 1):
        assert ask(store, "DELETE", f"global/{rank}")[0] == 200
        assert ask(store, "DELETE", f"global/{rank}")[0] == 200  # twice by the same rank counts once
        assert ask(store, "GET", "global/0") == (200, value)
    ask(store, "DELETE", "global/2")
    assert ask(store, "GET", "global/0")[0] == 404, "all have found each other: the scope is free again"
    assert ask(store, "PUT", "local_a_process_set_hash_1f/0", b"x")[0] == 200
    assert ask(store, "DELETE", "local_a_process_set_hash_1f/0")[0] == 200
    assert ask(store, "GET", "local_a_process_set_hash_1f/0")[0] == 404


def test_it_listens_at_its_address_only(store: Rendezvous) -> None:
    assert ":" not in store.address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5).close()


@pytest.mark.parametrize("secret", ["", "x", "x:1", "%00"])
def test_without_the_secret_nothing_is_read_or_written(store: Rendezvous, told: list[str], secret: str) -> None:
    ask(store, "PUT", "global/0", b"theirs")
    for method in ("PUT", "GET", "DELETE"):
        assert ask(store, method, "global/0", b"evil" if method == "PUT" else b"", secret)[0] == 403
    assert ask(store, "GET", "global/0") == (200, b"theirs")
    assert len(told) == 3 and told[0].startswith("rendezvous: refused from 127.0.0.1: PUT without the job's secret")


@pytest.mark.parametrize("encode", [bytes, base64.b64encode])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_even_with_the_secret(
    store: Rendezvous, told: list[str], tmp_path: Path, encode: type[bytes], protocol: int
) -> None:
    body = encode(pickle.dumps(Evil(tmp_path / "CREATED"), protocol=protocol))
    assert ask(store, "PUT", "global/0", body)[0] == 403
    assert ask(store, "PUT", "worker_addresses/a:0", body)[0] == 403
    assert "a pickle in global/0" in told[0] and "'worker_addresses'" in told[1]
    assert ask(store, "GET", "global/0")[0] == 404 and not (tmp_path / "CREATED").exists()


def test_sizes_are_limited(store: Rendezvous, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert raw(store, b"PUT /x/y/z HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_VALUE_BYTES + 1))[0] == 413
    assert raw(store, b"PUT /x/y/z HTTP/1.1\r\nContent-Length: -5\r\n\r\n")[0] == 413
    assert raw(store, b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n")[0] == 414
    assert raw(store, os.urandom(3000) + b"\r\n\r\n")[0] in (0, 400)
    assert ask(store, "PUT", "global/" + "k" * 300, b"x")[0] == 400
    monkeypatch.setattr(rendezvous, "_MAX_ENTRIES", 1)
    assert ask(store, "PUT", "global/0", b"x")[0] == 200
    assert ask(store, "PUT", "global/1", b"x")[0] == 507
    assert len(told) >= 5


def test_a_flood_is_not_written_down_in_full(store: Rendezvous, told: list[str]) -> None:
    for _ in range(80):
        store.request("GET", "/x/global/0", b"", "10.0.0.9")
    assert len(told) == 50 and told[-1].endswith("further ones are not reported")


def test_half_requests_do_not_keep_others_out(store: Rendezvous) -> None:
    held = [socket.create_connection((store.address, store.port)) for _ in range(50)]
    try:
        for connection in held:
            connection.sendall(b"PUT /x")
        assert ask(store, "PUT", "global/0", b"x")[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_a_driver_may_answer(told: list[str]) -> None:
    before = set(threading.enumerate())
    answers = {("rank_and_size", "a:0"): b"1,2,0,1,1,2"}
    store = Rendezvous("127.0.0.1", SLOTS, on_get=lambda scope, key: answers.get((scope, key)), report=told.append)
    store.start()
    try:
        assert ask(store, "GET", "rank_and_size/a:0") == (200, b"1,2,0,1,1,2")
        assert ask(store, "GET", "rank_and_size/b:0")[0] == 404
        assert given_rendezvous(store.environment() | {"X": "y"}) == (store.environment(), "127.0.0.1")
        with pytest.raises(LaunchError, match=r"(?s)not told.*HINT: start it with hvdlm run"):
            given_rendezvous({})
    finally:
        store.close()
    assert not [thread for thread in set(threading.enumerate()) - before if "serve_forever" in thread.name]
