"""The line between workers and driver: who does not know the key is told nothing."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from typing import Any

import pytest

from hvdlm.launchers.switchboard import Switchboard
from hvdlm.line import Lines, dial, greet, mac, new_key


def meet(client: Any, key: str) -> tuple[Any, Any]:
    """What a greeting gives (or the error) when somebody calls; and what the caller got."""
    listener = socket.create_server(("127.0.0.1", 0))
    results: list[Any] = [None, None]

    def call() -> None:
        try:
            results[1] = client(listener.getsockname()[1])
        except (OSError, ValueError) as error:
            results[1] = error

    thread = threading.Thread(target=call)
    thread.start()
    connection, _ = listener.accept()
    try:
        results[0] = greet(connection, key)
    except OSError as error:
        results[0] = error
        connection.close()
    thread.join()
    listener.close()
    return results[0], results[1]


def test_both_know_the_key() -> None:
    key = new_key()
    (worker, ours), theirs = meet(lambda port: dial("127.0.0.1", port, 7, key), key)
    assert worker == 7
    theirs.send({"kind": "ready", "text": "\n"})
    theirs.send({"kind": "beat"})
    received: list[dict[str, Any]] = []
    while len(received) < 2:
        received += ours.receive()
    assert received == [{"kind": "ready", "text": "\n"}, {"kind": "beat"}]
    theirs.close()
    assert ours.receive() is None
    ours.close()


def test_a_caller_without_the_key_is_refused() -> None:
    greeting, dialled = meet(lambda port: dial("127.0.0.1", port, 0, "wrong"), new_key())
    assert isinstance(greeting, ConnectionError) and "does not know" in str(greeting)
    assert isinstance(dialled, OSError)


def test_what_was_heard_once_opens_no_second_line() -> None:
    key = new_key()
    said: dict[str, Any] = {"worker": 1, "nonce": "n", "mac": mac(key, "worker", "1", "an earlier nonce", "n")}

    def replay(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            Lines(connection).send(said)

    assert isinstance(meet(replay, key)[0], ConnectionError)


STRANGE = [
    *(b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"worker": "x"}\n', b"", b"[" * 5000 + b"\n"),
    *(b'{"worker": 1e999, "nonce": "n"}\n', b'{"worker": 1, "nonce": "\\ud800", "mac": "\xc3\xa9"}\n'),
]


@pytest.mark.parametrize("said", STRANGE)
def test_strangers_are_refused(said: bytes) -> None:
    def shout(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(said)

    assert isinstance(meet(shout, new_key())[0], ConnectionError)


def test_a_driver_without_the_key_is_hung_up_on() -> None:
    def pose(port: int) -> Any:
        return dial("127.0.0.1", port, 0, "key")

    listener = socket.create_server(("127.0.0.1", 0))
    errors: list[Exception] = []

    def call() -> None:
        try:
            pose(listener.getsockname()[1])
        except ConnectionError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    connection, _ = listener.accept()
    lines = Lines(connection)
    lines.send({"nonce": "n"})
    lines.one()
    lines.send({"mac": "0" * 64})
    thread.join()
    lines.close()
    listener.close()
    assert "does not know" in str(errors[0])


def test_the_driver_tells_who_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    """And goes on answering those who know the key."""
    heard: list[tuple[int, dict[str, Any]]] = []
    with selectors.DefaultSelector() as selector:
        board = Switchboard(selector, lambda worker, message: heard.append((worker, message)))
        address, port, worker, key = board.control(3, "127.0.0.1").rsplit(":", 3)
        with caplog.at_level(logging.WARNING, "hvdlm"):
            for said in STRANGE:
                with socket.create_connection((address, int(port)), 5) as connection:
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        while connection.recv(1000):
                            pass
            line = dial(address, int(port), int(worker), key)
            line.send({"kind": "beat"})
            end = time.monotonic() + 10
            while not heard and time.monotonic() < end:
                for ready, _ in selector.select(0.1):
                    ready.data()
        line.close()
        board.close()
    assert heard == [(3, {"kind": "beat"})]
    assert caplog.text.count("line of the job: refused from 127.0.0.1") == len(STRANGE)
