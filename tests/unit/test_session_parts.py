"""The session's parts that need no framework: recognition, agreement, coverage, progress, summary, a fake job."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm.adapters.fake import FakeAdapter, FakeJob, FakeLoader, FakeModel, ThreadCollectives
from hvdlm.agreement import agree
from hvdlm.environment import Environment
from hvdlm.errors import ConfigError, EngineError, MismatchError, RecognitionError
from hvdlm.observe import coverage as coverage_module
from hvdlm.observe.coverage import Coverage, expected_sum
from hvdlm.observe.progress import Progress
from hvdlm.observe.summary import Summary, write_json
from hvdlm.recognise import find, replace
from hvdlm.session import Session


def kind(value: object) -> Any:
    return "model" if isinstance(value, FakeModel) else "loader" if isinstance(value, FakeLoader) else None


def test_found_in_any_order_and_depth() -> None:
    model, loader = FakeModel(), FakeLoader(4, 2)
    args, kwargs = (1, [loader, {"a": model}]), {"again": model, "config": {"x": (loader,)}}
    assert find(args, kwargs, kind) == [("arg1.0", "loader", loader), ("arg1.1.a", "model", model)]
    stand_ins = {id(loader): "L"}
    assert replace(args[1], stand_ins) == ["L", {"a": model}]
    assert replace(kwargs, stand_ins)["config"] == {"x": ("L",)}
    untouched = [1, {"a": model}]
    assert replace(untouched, stand_ins) is untouched


def test_agreement_names_the_first_difference_on_every_rank() -> None:
    lines = {0: ["a = 1", "b: (3, 4)"], 1: ["a = 1", "b: (3, 5)"], 2: ["a = 1", "b: (3, 4)"]}
    told = []

    def compare(collectives: ThreadCollectives) -> None:
        with pytest.raises(MismatchError) as caught:
            agree(collectives, lines[collectives.rank])
        told.append(str(caught.value))

    FakeJob(3).run(compare)
    assert len(told) == 3 and len(set(told)) == 1
    assert "rank 0, 2: b: (3, 4); rank 1: b: (3, 5)" in told[0]


def test_agreement_is_silent_when_equal() -> None:
    FakeJob(2).run(lambda collectives: agree(collectives, ["x"]))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[0, 2, 4], [1, 3, 5]], (0, 0)),
        ([[0, 2, 4], [1, 3]], (1, 0)),
        ([[0, 2, 4], [1, 3, 4]], (1, 1)),
        ([[0, 2, 4, 1], [1, 3, 5]], (0, 1)),
        ([[], [0, 0, 0, 0, 0, 0]], (5, 5)),
    ],
)
def test_coverage_counts(ids: list[list[int]], expected: tuple[int, int]) -> None:
    def count(collectives: ThreadCollectives) -> tuple[int, int] | None:
        coverage = Coverage(6, 6)
        coverage.add(np.array(ids[collectives.rank], dtype=np.int64))
        return coverage.missing_and_repeated(collectives.allreduce, expected_sum(6))

    assert FakeJob(2).run(count) == [expected, expected]


@pytest.mark.parametrize(("planned", "read", "counted"), [(9, 9, (0, 0)), (9, 8, None), (10, 9, None)])
def test_large_data_is_counted_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, planned: int, read: int, counted: tuple[int, int] | None
) -> None:
    """Too large to count one by one: the rest of an epoch that was gone on with is not taken for a failure."""
    monkeypatch.setattr(coverage_module, "_MAX_COUNTED", 5)
    coverage = Coverage(10, planned)
    coverage.add(np.arange(read))
    assert coverage.missing_and_repeated(lambda array: array, expected_sum(10)) == counted


def test_dropped_last_batch_is_not_missing() -> None:
    coverage = Coverage(7, 6)
    coverage.add(np.arange(6))
    assert coverage.missing_and_repeated(lambda array: array, expected_sum(7)) == (0, 0)


def session(collectives: ThreadCollectives | None = None, directory: Path | None = None, **code: object) -> Session:
    size = collectives.job.size if collectives else 1
    environment = Environment(run_dir=str(directory) if directory else None, progress="none", size=size, launcher="x")
    return Session(FakeAdapter(collectives), environment, code)


@pytest.mark.parametrize("size", [1, 3])
def test_a_whole_run(tmp_path: Path, size: int) -> None:
    def work(collectives: ThreadCollectives) -> list[int]:
        run = session(collectives if size > 1 else None, tmp_path)
        model, loader = FakeModel(w=np.full(3, float(collectives.rank))), FakeLoader(23, 4)
        model, train = run.attach([("m", "model", model), ("l", "loader", loader)])
        run.started()
        ids = [i for _ in range(2) for batch in train() for i in batch.tolist()]
        run.account.loss(1.5 + collectives.rank, None)
        assert run.mean(float(collectives.rank), None) == (size - 1) / 2
        assert run.mean(float("nan"), 0.0 if collectives.rank else 1.0) != run.mean(1.0, 1.0)
        run.finish()
        assert model.parameters["w"].tolist() == [0.0] * 3, "rank 0's parameters"
        return ids

    ids = FakeJob(size).run(work)
    assert sorted(i for own in ids for i in own) == sorted([*range(23)] * 2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples_seen"] == 46 and summary["steps"] == 12 and summary["world_size"] == size
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True
    assert summary["loss_last"] == pytest.approx(1.5 + (size - 1) / 2)
    assert list(summary) == [field.name for field in dataclasses.fields(Summary)]
    assert summary["shares"] == (None if size == 1 else pytest.approx([22 / 46, 12 / 46, 12 / 46], abs=1e-5))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["seed"] == {"value": 0, "origin": "default"}
    assert not any(path.stat().st_mode & 0o077 for path in tmp_path.rglob("*")), "for the person alone"


def test_diverged_replicas_are_reported(tmp_path: Path) -> None:
    def work(collectives: ThreadCollectives) -> None:
        run = session(collectives, tmp_path)
        (model,) = run.attach([("m", "model", FakeModel(w=np.zeros(2)))])
        model.parameters["w"][0] += collectives.rank * 1e-300
        run.finish()

    FakeJob(2).run(work)
    assert json.loads((tmp_path / "summary.json").read_text())["replicas_identical"] is False


def test_nothing_recognised_is_refused() -> None:
    with pytest.raises(RecognitionError, match=r"HINT: .*hvdlm\.wrap"):
        session().attach([("l", "loader", FakeLoader(3, 1))])


def test_options_cannot_change_under_attached_objects(tmp_path: Path) -> None:
    run = session(directory=tmp_path, seed=1)
    run.attach([("m", "model", FakeModel())])
    run.configure({"seed": 1})
    with pytest.raises(ConfigError, match="first call"):
        run.configure({"seed": 2})


def test_options_that_differ_between_ranks_are_named(tmp_path: Path) -> None:
    def work(collectives: ThreadCollectives) -> None:
        run = session(collectives, tmp_path, seed=collectives.rank)
        with pytest.raises(MismatchError, match="rank 0: option seed = 0; rank 1: option seed = 1"):
            run.attach([("m", "model", FakeModel())])

    FakeJob(2).run(work)


def test_a_launcher_that_horovod_does_not_see() -> None:
    environment = Environment(size=4, launcher="mpirun", rank=1)
    with pytest.raises(EngineError, match=r"mpirun started 4 processes, but Horovod sees 1"):
        Session(FakeAdapter(), environment, {})


def test_progress_shows_seldom_and_cleans_up() -> None:
    now, written = [0.0], []
    progress = Progress("bar", written.append, lambda: now[0])
    progress.epoch(0, 10)
    for _ in range(10):
        now[0] += 0.05
        progress.batch(8, lambda: 2.5)
    assert 1 <= len(written) <= 4 and "2.5" in written[0] and "/10" in written[0]
    progress.message("done")
    assert "done" in "".join(written[-2:]) and written[-1].endswith("\n")
    silent = Progress("none", written.append, lambda: now[0])
    before = len(written)
    silent.epoch(0, 1)
    silent.batch(1, lambda: pytest.fail("a loss was read though nothing is shown"))
    silent.message("x")
    assert len(written) == before


def test_json_is_whole_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads(path.read_text()) == {"a": "nan", "b": ["inf", 1.0]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_fake_job_that_hangs_says_where() -> None:
    let_go = threading.Event()

    def stuck(collectives: ThreadCollectives) -> None:
        if collectives.rank == 1:
            let_go.wait(60)

    try:
        with pytest.raises(TimeoutError, match=r"worker 1 still running after 0.3 s(.|\n)*let_go.wait"):
            FakeJob(2, time_limit=0.3).run(stuck)
    finally:
        let_go.set()
    with pytest.raises(TimeoutError, match="waited for others"):
        FakeJob(2, time_limit=1).run(lambda c: None if c.rank else c.allgather(b""))
