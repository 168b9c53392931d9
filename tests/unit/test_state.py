"""Checkpoints are whole or found out, stores that fail only warn, and workers agree on the state to go on from."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hvdlm
from hvdlm.adapters.fake import FakeJob
from hvdlm.adapters.single import SingleCollectives
from hvdlm.adapters.torch_capture import Stateful, capture, copy_to, leaf_of
from hvdlm.adapters.torch_copying import Background
from hvdlm.algorithms.schedule import Interval, Schedule
from hvdlm.errors import CheckpointError, ConfigError, RecognitionError
from hvdlm.options import Options
from hvdlm.state import checkpoint, store
from hvdlm.state.checkpoint import Damaged
from hvdlm.state.history import History
from hvdlm.state.snapshot import Gatherer, Snapshot, rebuild
from hvdlm.state.steward import Steward
from hvdlm.state.writer import Writer
from hvdlm.world import World


def snapshot(number: int = 7, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    gather = Gatherer(leaf_of, copy_to)
    value = {
        "weights": torch.randn(31, 17, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(3.0),
        3: [1, 2.5, None, True, ("a", np.arange(4, dtype=np.int16))],
    }
    made = gather.pack({"value": gather.add(value, "value"), "loaders": {}}, None)
    made.number = number
    return made


def write(where: str, *numbers: int) -> store.Store:
    target = store.open_store(where)
    for number in numbers:
        checkpoint.write(target, snapshot(number, number))
    return target


def equal(one: Snapshot, other: Snapshot) -> bool:
    return (one.number, one.tree, one.entries) == (other.number, other.tree, other.entries) and bool(
        np.array_equal(one.data, other.data)
    )


def test_a_checkpoint_comes_back_bit_for_bit_and_others_can_read_its_tensors(tmp_path: Path) -> None:
    target = write(str(tmp_path), 7)
    assert equal(checkpoint.read(target, "step-000000000007"), snapshot(7, 7))
    tensors = load_file(str(tmp_path / "step-000000000007" / "tensors.safetensors"))
    expected = torch.randn(31, 17, generator=torch.Generator().manual_seed(7))
    assert torch.equal(tensors["value.weights"], expected) and tensors["value.half"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000007"]


def test_values_come_back_as_they_were() -> None:
    made = snapshot()
    back = rebuild(made, made.tree["value"], lambda mark, entry, data: data.tobytes())
    assert list(back) == ["weights", "half", "step", 3]
    assert back[3][:4] == [1, 2.5, None, True] and back[3][4][0] == "a"
    assert back[3][4][1].dtype == np.int16 and back[3][4][1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damage_at_every_hundredth_is_found_out(tmp_path: Path, file: str, how: str) -> None:
    target = write(str(tmp_path), 7)
    path = tmp_path / "step-000000000007" / file
    whole = path.read_bytes()
    places = sorted({len(whole) * percent // 100 for percent in range(100)} | {len(whole) - 1})
    for at in places:
        for bit in range(8) if file == "manifest.json" else (at % 8,):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged if how == "flipped" else whole[:at])
            with pytest.raises(Damaged):
                checkpoint.read(target, "step-000000000007")
    path.write_bytes(whole)
    assert equal(checkpoint.read(target, "step-000000000007"), snapshot(7, 7))


def test_a_damaged_or_half_written_one_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), 10, 20, 30, 40)
    (tmp_path / "step-000000000040" / "manifest.json").unlink()
    (tmp_path / "step-000000000030" / "state.json").write_text("{")
    found = Writer(str(tmp_path), 3).open("yes")
    assert found is not None and equal(found, snapshot(20, 20))
    text = " ".join(record.message for record in caplog.records)
    assert "step-000000000040 is damaged (manifest.json is missing)" in text
    assert "step-000000000030 is damaged (state.json has 1 bytes" in text


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    write(str(tmp_path), 7)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"version 2.*reads up to 1\.\n(.|\n)*pip install --upgrade"):
        Writer(str(tmp_path), 3).open("yes")


def test_resume_without_a_checkpoint_and_a_fresh_run_over_old_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* to resume from"):
        Writer(str(tmp_path), 3).open("yes")
    assert Writer(str(tmp_path), 3).open("auto") is None
    assert Writer(str(tmp_path), 3).open("no") is None
    write(str(tmp_path), 7)
    with pytest.raises(CheckpointError, match=r"up to step 7(.|\n)*--resume"):
        Writer(str(tmp_path), 3).open("no")
    (tmp_path / "step-000000000007" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        Writer(str(tmp_path), 3).open("auto")


@pytest.mark.parametrize("kind", ["path", "file", "memory", "chained"])
def test_stores(tmp_path: Path, kind: str) -> None:
    where = {
        "path": str(tmp_path / "a"),
        "file": f"file://{tmp_path}/a",
        "memory": f"memory://hvdlm-{os.getpid()}/a",
        "chained": f"simplecache::memory://hvdlm-{os.getpid()}/b",
    }[kind]
    target = write(where, 10, 20)
    assert sorted(target.names()) == ["step-000000000010", "step-000000000020"]
    assert equal(checkpoint.read(target, "step-000000000020"), snapshot(20, 20))
    checkpoint.write(target, snapshot(20, 99))  # replaced
    assert equal(checkpoint.read(target, "step-000000000020"), snapshot(20, 99))
    target.remove("step-000000000010")
    assert target.names() == ["step-000000000020"]


def test_a_store_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be used(.|\n)*HINT: --checkpoint-dir"):
        store.open_store(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be used"):
        store.open_store("nosuchprotocol://x")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(str(tmp_path), 2)
    yield made
    made.close()


def test_the_last_ones_are_kept(writer: Writer, tmp_path: Path) -> None:
    for number in (10, 20, 30):
        writer.submit(snapshot(number))
        assert writer.wait(30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000020", "step-000000000030"]


def test_a_full_disk_only_warns_and_is_tried_again(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    writer.on_event = lambda name, fields: events.append(name)
    fails = threading.Event()
    fails.set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if fails.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("hvdlm.state.writer._FIRST_WAIT_SECONDS", 0.02)
    state = snapshot(10)
    writer.submit(state)
    end = time.monotonic() + 30
    while events.count("checkpoint_failed") < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert state.pins == 1 and not list(tmp_path.glob("step-*"))
    fails.clear()
    assert writer.wait(30) and state.pins == 0
    assert equal(checkpoint.read(writer.store, "step-000000000010"), snapshot(10))
    text = " ".join(record.message for record in caplog.records)
    assert "No space left on device; training goes on" in text and "failed attempts" in text
    assert events[-1] == "checkpoint"


def test_closing_gives_up_a_store_that_fails(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise ConnectionError("unreachable")

    monkeypatch.setattr("hvdlm.state.writer.write", failing)
    writer.submit(snapshot())
    assert not writer.wait(0.2)
    writer.close()
    assert not any(thread.name == "hvdlm checkpoints" and thread.is_alive() for thread in threading.enumerate())


def test_the_newest_commit_that_all_hold_is_chosen_and_sent() -> None:
    def worker(collectives: Any) -> tuple[list[int], bool, int]:
        history = History()
        for number in ((10, 20), (10, 20, 30), ())[collectives.rank]:
            history.add(snapshot(number, number))
        history.position = (25, 33, 0)[collectives.rank]
        agreed = history.agree(collectives)
        assert agreed is not None
        return history.numbers, equal(agreed, snapshot(20, 20)), history.lost

    assert FakeJob(3).run(worker) == [([20], True, 5), ([20], True, 13), ([20], True, 0)]
    assert FakeJob(2).run(lambda collectives: History().agree(collectives)) == [None, None]


def test_a_commit_that_is_being_written_is_not_overwritten() -> None:
    history = History(1)
    first = snapshot(1)
    history.add(first)
    first.pins = 1
    assert history.spare() is None
    history.add(snapshot(2))
    spare = history.spare()
    assert spare is not None and spare.number == 2


def test_schedules_count_steps_or_turn_time_into_steps() -> None:
    now = [0.0]
    schedule = Schedule(Interval.parse("10s"), lambda: now[0])
    schedule.start(0)
    due = []
    for step in range(1, 200):
        now[0] += 0.5
        if schedule.due(step):
            due.append(step)
            schedule.done(step, lambda seconds: 2 * seconds)  # another rank is half as fast
    assert due[:3] == [1, 5, 15] and {b - a for a, b in itertools.pairwise(due[2:])} == {10}
    with pytest.raises(ConfigError, match=r"commit_every is '5x'(.|\n)*10s"):
        Options(commit_every="5x")
    with pytest.raises(ConfigError, match="without a checkpoint_dir"):
        Options(resume="yes")


def test_what_can_be_registered() -> None:
    with pytest.raises(RecognitionError, match=r"best is a float(.|\n)*HINT: keep it in a dict"):
        hvdlm.register("best", 3.0)


def train(directory: Path, width: int, **options: Any) -> float:
    torch.manual_seed(1)
    model = torch.nn.Linear(4, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)

    @hvdlm.distribute(checkpoint_dir=str(directory / "checkpoints"), checkpoint_every=2, **options)
    def run(model: Any, optimizer: Any, loader: Any) -> float:
        for _ in range(2):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return float(sum(p.detach().sum() for p in model.parameters()))

    result: float = run(model, optimizer, loader)
    return result


def test_a_finished_run_trains_no_more_and_another_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVDLM_PROGRESS", "none")
    with caplog.at_level(logging.WARNING):
        whole = train(tmp_path, 3)
        assert train(tmp_path, 3, resume="yes") == whole
    summary = sorted((tmp_path / "hvdlm-runs").iterdir())[-1] / "summary.json"
    assert json.loads(summary.read_text())["steps"] == 12
    with pytest.raises(CheckpointError, match=r"First difference: model\.weight is F32 \[5, 4\].*F32 \[3, 4\]"):
        train(tmp_path, 5, resume="yes")
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        train(tmp_path, 3)


@pytest.mark.parametrize("changed", [False, True])
def test_copies_are_made_up_to_the_next_step_and_changes_meanwhile_are_noticed(
    monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """A batch is handed out while a slow copy is made; the step waits for it, and an earlier change is found out."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    may_go_on = threading.Event()
    real = np.copyto

    def slowly(*args: Any, **kwargs: Any) -> None:
        may_go_on.wait(30)
        real(*args, **kwargs)

    background = Background()
    background.install()
    taken: list[Snapshot] = []

    class Commits:
        def boundary(self) -> None:
            assert background.may_copy
            monkeypatch.setattr(np, "copyto", slowly)
            of = Stateful(models=[model], optimizers=[optimizer], schedulers=[], scalers=[], loaders={}, loose=[])
            taken.append(background.copies(capture(of, {}, None, later=background.may_copy)))

    try:
        course: Any = Commits()
        background.course(course).boundary()
        assert not background.may_copy  # outside of it a script may do what it likes
        assert taken[0].copying is not None
        if changed:
            with torch.no_grad():
                model.weight.mul_(2.0)
        threading.Timer(0.2, may_go_on.set).start()
        optimizer.step()
        assert may_go_on.is_set()
    finally:
        may_go_on.set()
        background.remove()
    history = History()
    history.add(taken[0])
    assert history.numbers == ([] if changed else [0])
    if not changed:
        for name, mark in taken[0].tree["models"][0].items():
            kept = taken[0].bytes_of(mark["t"]).view(np.float32).reshape(wanted[name].shape)
            assert np.array_equal(kept, wanted[name].numpy())
            assert not np.array_equal(kept, dict(model.named_parameters())[name].detach().numpy())


@pytest.mark.parametrize(("batch", "factor"), [("per_worker", 1.5), ("global", 1.0)])
def test_learning_rates_follow_the_number_of_workers_after_the_state_is_back(batch: str, factor: float) -> None:
    """Two workers committed, three go on: what they restore is scaled by 3 / 2, where batches are each worker's own."""
    scale = {"lr_scale": "linear"} if batch == "per_worker" else {}
    options = Options(elastic=True, batch=batch, **scale)  # type: ignore[arg-type]
    restored: list[float] = []

    class Adapter:
        collectives = SingleCollectives()

        def restore(self, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
            restored.append(lr_factor)
            return {"account": {}}

    class Account:
        steps = batches = 0

        def load_state_dict(self, state: Any) -> None:
            assert restored

    made = snapshot(0)
    made.tree = {"loaders": {}, "hvdlm": {"world_size": 2, "epochs": [0, 0]}}
    history = History()
    history.add(made)
    world = World(rank=0, size=3, local_rank=0, local_size=3, cross_rank=0, cross_size=1)
    adapter: Any = Adapter()
    account: Any = Account()
    Steward(adapter, options, world, account, {}, history=history).begin()
    assert restored == [factor]
