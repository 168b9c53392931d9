"""The stated model of ``hvdlm estimate``: its limits, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hvdlm.algorithms.estimate import Model, estimate, parse_count, parse_link
from hvdlm.cli.estimate import estimate_command
from hvdlm.errors import ConfigError

MODEL = Model(parameters=124e6, step_seconds=2.0, link_bytes_per_second=125e6)


@given(st.integers(1, 512), st.floats(1e5, 1e11), st.floats(1e-3, 1e2), st.floats(1e6, 1e11))
def test_limits(workers: int, parameters: float, seconds: float, link: float) -> None:
    model = Model(parameters=parameters, step_seconds=seconds, link_bytes_per_second=link)
    found = estimate(model, workers)
    assert 0 < found.efficiency <= 1 + 1e-9
    assert 0 <= found.exposed_seconds <= found.transfer_seconds + 1e-12
    faster = estimate(replace(model, link_bytes_per_second=2 * link), workers)
    assert faster.step_seconds <= found.step_seconds
    halved = estimate(replace(model, bytes_per_element=2.0), workers)
    assert halved.sent_bytes == pytest.approx(found.sent_bytes / 2)
    assert estimate(model, workers, per_worker=True).efficiency >= found.efficiency - 1e-9


def test_one_worker_sends_nothing() -> None:
    found = estimate(MODEL, 1)
    assert (found.sent_bytes, found.exposed_seconds, found.speedup) == (0, 0, 1)
    assert found.memory_bytes == 124e6 * (4 + 4 + 8)


def test_a_ring_sends_what_a_ring_sends() -> None:
    assert estimate(MODEL, 4).sent_bytes == pytest.approx(2 * 3 / 4 * 4 * 124e6)


@pytest.mark.parametrize("bad", ["", "many", "-3M", "0", "5q"])
def test_counts_that_are_none(bad: str) -> None:
    with pytest.raises(ValueError):
        parse_count(bad)
    with pytest.raises(ValueError):
        parse_link(bad)


def test_command() -> None:
    flags = ["--params", "124M", "--step-seconds", "2", "--link", "10Gbit", "--workers", "2,8"]
    shown = CliRunner().invoke(estimate_command, flags)
    assert shown.exit_code == 0 and "496 MB" in shown.output and "1.95x" in shown.output
    told = json.loads(CliRunner().invoke(estimate_command, [*flags, "--json"]).output)
    assert [row["workers"] for row in told["estimates"]] == [2, 8]


def test_a_keras_script_is_not_timed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import keras\n")
    with pytest.raises(ConfigError, match=r"is a Keras script(.|\n)*HINT: hvdlm estimate --params"):
        CliRunner().invoke(estimate_command, [str(script)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either a script or --params"),
        (["--params", "124M"], "needs --step-seconds"),
        (["--params", "x", "--step-seconds", "1"], "could not convert"),
        (["--params", "1M", "--step-seconds", "1", "--workers", "two"], "invalid literal"),
        (["nowhere.py"], "there is no script 'nowhere.py'"),
    ],
)
def test_bad_input(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(estimate_command, flags, catch_exceptions=False)
