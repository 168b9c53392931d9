"""``hvdlm bench``: tables and plots from what was measured, and what is said of a wrong flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hvdlm.bench import tables
from hvdlm.bench.worker import measure
from hvdlm.cli.bench import bench
from hvdlm.errors import ConfigError

STEPS = {
    "workers": 2,
    "steps": {"plain": [0.1] * 9, "none": [0.125] * 9, "ddp": [0.2] * 9},
}
SUMS = {"workers": 2, "sums": {"4096": {"none": [0.001] * 5}, "1048576": {"none": [0.01] * 5}}}


def test_tables() -> None:
    assert tables.step_rows(STEPS)[2] == ["none", "125.0", "1.250 [1.250, 1.250]"]
    assert tables.scaling_rows([STEPS, STEPS])[1] == ["2", "80.0%", "50.0%"]
    # A ring over 2 workers sends each byte once.
    assert tables.allreduce_rows(SUMS, None) == [["arm", "4 kB", "1 MB"], ["none", "4.1", "104.9"]]
    assert tables.allreduce_rows(SUMS, 1000.0)[1][2] == "104.9 (84%)"
    assert tables.table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize("kind", ["step", "allreduce", "scaling"])
def test_plots(tmp_path: Path, kind: str) -> None:
    data = tables.ratios(STEPS["steps"], "plain") if kind == "step" else {"none": [(2, 0.9), (4, 0.8)]}  # type: ignore[arg-type]
    path = tmp_path / "plot.png"
    tables.plot(path, "a title", kind, data)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["step", "--codec", "zip"], "codec 'zip'; allowed: none, fp16"),
        (["step", "--compare", "nccl"], "compare 'nccl'; allowed: horovod, ddp"),
        (["step", "--np", "1"], "np is '1'; allowed"),
        (["scaling", "--np", "2,x"], "np is '2,x'; allowed"),
        (["allreduce", "--max-mb", "0"], "max-mb is 0.0; allowed"),
    ],
)
def test_wrong_flags(words: list[str], told: str) -> None:
    done = CliRunner().invoke(bench, words)
    assert isinstance(done.exception, ConfigError)
    assert told in done.exception.message


def test_arms_take_turns_and_the_first_rounds_do_not_count() -> None:
    order: list[str] = []
    arms: Any = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = measure(arms, 3, lambda: None, 2)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "abcbcacababcbca"


def test_seconds_that_an_arm_leaves_out_do_not_count() -> None:
    assert measure({"a": lambda: 100.0}, 1, lambda: None, 0)["a"][0] < -99
