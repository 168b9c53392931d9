"""Metrics go where they are asked to go."""

from __future__ import annotations

import sys
import types
import urllib.request
from typing import Any

import pytest

from hvdlm.errors import ConfigError
from hvdlm.observe.sinks import SINKS, Prometheus, open_sink
from hvdlm.options import choices


def test_every_choice_has_a_sink() -> None:
    assert set(choices("metrics") or ()) == {"none", *SINKS}
    assert open_sink("none", {}) is None


def test_prometheus_reads_the_page() -> None:
    first, second = Prometheus({}), Prometheus({})  # the second finds the port taken
    try:
        assert first.address != second.address and all("//127.0.0.1:" in s.address for s in (first, second))
        first.scalars(20, {"train/loss": 2.5, "rank0/data_ms": 1.0})
        first.scalars(40, {"train/loss": 2.25})
        with urllib.request.urlopen(first.address, timeout=20) as answer:
            page = answer.read().decode()
        assert page == (
            "# TYPE hvdlm_rank0_data_ms gauge\nhvdlm_rank0_data_ms 1.0\n# TYPE hvdlm_step gauge\nhvdlm_step 40.0\n"
            "# TYPE hvdlm_train_loss gauge\nhvdlm_train_loss 2.25\n"
        )
    finally:
        first.close()
        second.close()


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"{name} is not installed.*\n?.*HINT: pip install {name}"):
            open_sink(name, {})


@pytest.mark.parametrize("running", [True, False])
def test_the_scripts_own_run_is_used_and_left_open(monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    """Against stand-ins with the functions that the two libraries document."""
    calls: list[tuple[str, Any]] = []

    def noting(name: str) -> Any:
        return lambda *args, **kwargs: calls.append((name, args or kwargs))

    wandb = types.SimpleNamespace(
        run=object() if running else None, init=noting("init"), log=noting("log"), finish=noting("finish")
    )
    mlflow = types.SimpleNamespace(
        active_run=lambda: object() if running else None,
        start_run=noting("start_run"),
        log_params=noting("log_params"),
        log_metrics=noting("log_metrics"),
        end_run=noting("end_run"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for name in ("wandb", "mlflow"):
        sink = open_sink(name, {"seed": 0})
        assert sink is not None
        sink.scalars(20, {"train/loss": 2.5})
        sink.close()
    names = [name for name, _ in calls]
    shown = ["log", "log_metrics"]
    assert names == (
        shown if running else ["init", "log", "finish", "start_run", "log_params", "log_metrics", "end_run"]
    )
    assert ("log", ({"train/loss": 2.5, "hvdlm/step": 20},)) in calls
