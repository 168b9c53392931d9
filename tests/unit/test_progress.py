"""What the person sees: width, speed, numbers, and a bar that leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hvdlm.observe.progress import Progress


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", text)


def shown(mode: str, batches: int, seconds: float) -> list[str]:
    now, written = [0.0], []
    progress = Progress(mode, written.append, lambda: now[0])
    for epoch in range(2):
        progress.epoch(epoch, batches)
        for _ in range(batches):
            progress.batch(16, lambda: 2.5)
            now[0] += seconds
        now[0] += 60.0  # an evaluation
    return written


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_speed_is_that_of_batches_trained_on(mode: str) -> None:
    lines = [visible(text) for text in shown(mode, 40, 0.5)]
    assert lines and all("32.0 samples/s" in line for line in lines), lines
    assert not any("1/40" in line.split() for line in lines)


@pytest.mark.parametrize("batches", [9, 212, 1234567])
def test_a_bar_fits_beside_the_prefix_of_its_rank(batches: int) -> None:
    written = shown("bar", min(batches, 400), 1.0)
    assert all(len(visible(text)) <= 76 for text in written)
    # The launcher's prefix stands at the start of the line: it must not be erased.
    assert all(text.startswith("\r") and "\x1b[2K" not in text for text in written)


def test_the_bar_grows_and_only_a_terminal_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    bars = [visible(text).split()[2] for text in shown("bar", 40, 1.0)[:39]]
    assert set("".join(bars)) <= set("━╸╺")
    drawn = [text.count("\x1b[") for text in shown("bar", 40, 1.0)]
    assert min(drawn) > 1, "rich colours what is done and what is left"
    assert len(set(shown("bar", 40, 1.0)[:39])) == 39
    code = "import sys; from hvdlm.observe.progress import Progress as P; p = P('lines', print); p.epoch(0, 3);"
    code += "p.message('x'); assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_message_replaces_the_bar() -> None:
    now, written = [0.0], []
    progress = Progress("bar", written.append, lambda: now[0])
    progress.epoch(0, 3)
    for _ in range(3):
        progress.batch(16, lambda: None)
        now[0] += 1.0
    progress.metrics({"epoch": 3.0, "valid_loss": 1.25, "lr": 3e-5})
    assert written[-1] == "\repoch 3  valid_loss 1.2500  lr 3e-05\x1b[K\n"
    before = len(written)
    progress.close()
    assert len(written) == before


def test_a_straggler_has_a_place_in_the_line() -> None:
    clock = iter(range(0, 1000, 6))
    written: list[str] = []
    progress = Progress("lines", written.append, lambda: float(next(clock)))
    progress.epoch(0, 10)
    progress.note = "rank 3 data-bound, 22 %"
    for _ in range(3):
        progress.batch(8, lambda: 1.0)
    assert written and all("rank 3 data-bound, 22 %" in line for line in written)
