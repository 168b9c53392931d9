# ruff: noqa: E501 - commands and outputs stand on one line
"""Merging the output of ranks, on files and on terminals; tracebacks; which failure is the cause."""

from __future__ import annotations

import os
import pty

import pytest

from hvdlm import wire
from hvdlm.launchers import output as output_module
from hvdlm.launchers.failure import Record, explain, root_cause
from hvdlm.launchers.output import Output

OUT, ERR = wire.STDOUT, wire.STDERR


@pytest.fixture
def shown(monkeypatch):
    written = []

    def write(fd, data):
        written.append((fd, bytes(data)))
        return len(data)

    class Always:
        @staticmethod
        def select(r, w, x, timeout):
            return r, w, x

    monkeypatch.setattr(output_module.os, "write", write)
    monkeypatch.setattr(output_module, "select", Always)
    return lambda fd=None: b"".join(data for number, data in written if fd in (None, number))


@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        ([(0, OUT, b"a\nb\n"), (1, OUT, b"c\n")], b"[0] a\n[0] b\n[1] c\n"),
        ([(0, OUT, b"a"), (1, OUT, b"c\n"), (0, OUT, b"b\n")], b"[1] c\n[0] ab\n"),
        ([(0, OUT, b"a"), "flush", (1, OUT, b"c\n"), (0, OUT, b"b\n")], b"[0] a\n[1] c\n[0] b\n"),
        ([(0, OUT, b"a"), "flush", (0, OUT, b"b\n")], b"[0] ab\n"),
        ([(0, OUT, b"\r1%"), "flush", (0, OUT, b"\r2%"), "flush", (0, OUT, b"\n")], b"[0] 1%\r[0] 2%\n"),
        ([(0, OUT, b"1%\r"), (0, OUT, b"2%\r"), (0, OUT, b"done\n")], b"[0] 1%\r[0] 2%\r[0] done\n"),
        ([(0, OUT, b"\r1%"), "flush", (1, OUT, b"x\n"), (0, OUT, b"\r2%\n")], b"[0] 1%\n[1] x\n[0] 2%\n"),
        ([(0, OUT, b"a\r\nb\n")], b"[0] a\r\n[0] b\n"),
        ([(0, OUT, b"\n\n")], b"[0] \n[0] \n"),
        ([(0, OUT, b"\xff\x00\n")], b"[0] \xff\x00\n"),
        ([(0, OUT, b"end")], b"[0] end\n"),
    ],
)
def test_merging(shown, feeds, expected):
    output = Output(2)
    for feed in feeds:
        if feed == "flush":
            output.flush()
        else:
            output.feed(*feed)
    output.close()
    assert shown() == expected


def test_one_worker_has_no_prefix(shown):
    output = Output(1)
    output.feed(0, OUT, b"a\n\r5%")
    output.close()
    assert shown() == b"a\n5%\n"


def test_a_bar_is_wiped_for_another_line_on_a_terminal(shown, monkeypatch):
    monkeypatch.setattr(output_module.os, "isatty", lambda fd: True)
    output = Output(2, colour=False)
    output.feed(0, ERR, b"\r1%")
    output.flush()
    output.feed(0, ERR, b"\r2%")
    output.flush()
    output.feed(1, OUT, b"line\n")
    output.feed(0, ERR, b"\r3%\n")
    assert shown() == b"[0] 1%\r[0] 2%\r\x1b[K[1] line\n[0] 3%\n"


def test_message_stands_on_a_line_of_its_own(shown):
    output = Output(2)
    output.feed(0, ERR, b"partial")
    output.flush()
    output.message("text")
    assert shown(2) == b"[0] partial\nhvdlm: text\n"


def test_colour_only_on_a_terminal():
    pid, master = pty.fork()
    if pid == 0:
        output = Output(2)
        output.feed(1, OUT, b"x\n")
        os._exit(0)
    seen = os.read(master, 100)
    os.waitpid(pid, 0)
    os.close(master)
    assert seen == b"\x1b[33m[1]\x1b[0m x\r\n"


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (b"no traceback\n", None),
        (b"x\nTraceback (most recent call last):\n  a\nE: 1\n\n", "Traceback (most recent call last):\n  a\nE: 1"),
        (
            b"Traceback (most recent call last):\n  a\nE: old\nlogged\nTraceback (most recent call last):\n  b\nE: new\n",
            "Traceback (most recent call last):\n  b\nE: new",
        ),
        (
            b"Traceback (most recent call last):\n  a\nE: 1\n\nDuring handling of the above exception, another exception "
            b"occurred:\n\nTraceback (most recent call last):\n  b\nE: 2\n",
            "Traceback (most recent call last):\n  a\nE: 1\n\nDuring handling of the above exception, another exception "
            "occurred:\n\nTraceback (most recent call last):\n  b\nE: 2",
        ),
        (
            b"Fatal Python error: Aborted\n\nCurrent thread 0x1:\n  File x\n\nExtension modules: a, b (total: 2)\n",
            "Fatal Python error: Aborted\n\nCurrent thread 0x1:\n  File x",
        ),
    ],
)
def test_last_traceback(stderr, expected):
    assert wire.last_traceback(stderr) == expected


def test_a_very_long_traceback_is_cut_in_the_middle():
    text = wire.last_traceback(b"Traceback (most recent call last):\n" + b"x" * 100000 + b"\nE: end\n")
    assert text is not None and len(text) < 40000 and text.endswith("E: end")


def test_decoder_survives_any_cut():
    stream = wire.encode(OUT, b"abc") + wire.encode_json(wire.HELLO, {"rank": 1}) + wire.encode(wire.KILL)
    for size in (1, 2, 3, 7, len(stream)):
        decoder = wire.Decoder()
        found = [m for i in range(0, len(stream), size) for m in decoder.feed(stream[i : i + size])]
        assert found == [(OUT, b"abc"), (wire.HELLO, b'{"rank": 1}'), (wire.KILL, b"")]


def record(rank, time, code=1, **more):
    defaults = {"host": "h", "signal": None, "seconds": 1.0, "traceback": None, "tail": "", "secondary": False,
                "asked": None, "traceback_before_asked": False}  # fmt: skip
    return Record(rank=rank, time=time, code=code, **(defaults | more))


def test_root_cause():
    assert root_cause([record(0, 1.0, code=0)]) is None
    first = record(1, 5.0)
    slow = record(2, 9.0, code=143, signal=15, asked=15, traceback_before_asked=True, traceback="Traceback\nE")
    lost = record(0, 1.0, secondary=True)
    ended = record(3, 0.5, code=143, signal=15, asked=15)
    assert root_cause([ended, lost, slow, first]) is first
    assert root_cause([ended, lost, slow]) is slow
    assert root_cause([ended, lost]) is lost
    assert explain(slow, "logs").exit_code == 1
    # Nobody was heard to the end: what lost a peer says more than what we ended ourselves, and 143 would be our own doing.
    losing = record(0, 2.0, code=143, signal=15, asked=15, traceback_before_asked=True, secondary=True)
    assert root_cause([ended, losing]) is losing
    assert explain(losing, "logs").exit_code == 1


def test_another_build_is_said():
    text = "Traceback\nImportError: /x/horovod/torch/mpi_lib_v2.so: undefined symbol: _ZN3c10"
    error = explain(record(0, 1.0, traceback=text), "logs")
    assert "HINT: hvdlm doctor" in str(error) and str(error).endswith("undefined symbol: _ZN3c10")
