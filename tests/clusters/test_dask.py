"""Train functions on a Dask cluster whose workers are processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import hvdlm
from hvdlm.errors import ConfigError, WorkerFailed
from tests.clusters.trained import check_summary, train_the_gpt_example

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("dask")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
            local_directory=str(directory), memory_limit=0,
        ) as cluster,
        distributed.Client(cluster) as made,
    ):  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Instead of the usual look: Dask keeps threads, and replaces processes; those of a job have to be gone."""
    yield
    deadline = time.monotonic() + 5
    while (left := job_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def job_processes() -> list[str]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if "hvdlm.clusters.child" in command and process.status() != psutil.STATUS_ZOMBIE:
                found.append(command)
    return found


def run(client: Any, function: Any, **settings: Any) -> list[Any]:
    import hvdlm.dask

    env = {"OMP_NUM_THREADS": "1", "HVDLM_PROGRESS": "none", **settings.pop("env", {})}
    return hvdlm.dask.run(client, function, env=env, **settings)


@pytest.mark.lab
def test_the_gpt_example(client: Any, tmp_path: Path) -> None:
    sizes = run(client, train_the_gpt_example, num_proc=2, env={"HVDLM_RUN_DIR": str(tmp_path / "run")})
    assert sizes == [2, 2]
    summary = check_summary(tmp_path / "run", 2)
    assert summary["loss_last"] < summary["loss_first"]


def train_on_rows(rows: Any, factor: float) -> tuple[int, list[int]]:
    import torch

    seen: list[int] = []
    net = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=list)
    net, optimizer, loader = hvdlm.wrap(net, torch.optim.SGD(net.parameters(), lr=1e-4), loader)
    for batch in loader:
        seen += [row["n"] for row in batch]
        optimizer.zero_grad()
        (factor * net(torch.tensor([[float(row["n"])] for row in batch]))).mean().backward()
        optimizer.step()
    return hvdlm.rank(), seen


def test_a_collection_is_shared_out(client: Any, tmp_path: Path) -> None:
    import dask.bag

    bag = dask.bag.from_sequence([{"n": number} for number in range(40)], npartitions=3)
    env = {"HVDLM_CACHE_DIR": str(tmp_path / "cache"), "HVDLM_RUN_DIR": str(tmp_path / "run")}
    results = run(client, train_on_rows, args=(bag, 2.0), data_dir=str(tmp_path / "rows"), env=env)
    assert [rank for rank, _ in results] == [0, 1], "in the order of ranks"
    assert sorted(number for _, seen in results for number in seen) == list(range(40))
    assert min(len(seen) for _, seen in results) >= 15
    assert len(list((tmp_path / "rows").rglob("*.parquet"))) == 3
    check_summary(tmp_path / "run", 2)


@pytest.mark.parametrize("kind", ["dataframe", "array"])
def test_rows_of_other_collections(client: Any, tmp_path: Path, kind: str) -> None:
    import dask.array
    import dask.dataframe
    import numpy as np
    import pandas as pd

    from hvdlm.clusters.dask_files import write_collection
    from hvdlm.sources import open_files

    if kind == "array":
        made = dask.array.from_array(np.arange(12).reshape(6, 2), chunks=(4, 1))
        expected: list[dict[str, Any]] = [{"value": [2 * i, 2 * i + 1]} for i in range(6)]
    else:
        made = dask.dataframe.from_pandas(pd.DataFrame({"n": range(6), "s": list("abcdef")}), npartitions=2)
        expected = [{"n": i, "s": "abcdef"[i]} for i in range(6)]
    rows = write_collection(client, made, str(tmp_path / "rows"), 0)
    assert rows is not None
    read = open_files(rows.pattern, cache_dir=tmp_path / "cache")
    assert [read[i] for i in range(len(read))] == expected


def fails_on_one() -> None:
    import torch

    import hvdlm

    torch.manual_seed(0)
    hvdlm.init("torch")
    print("the token is", os.environ["A_TOKEN"], flush=True)
    if hvdlm.rank() == 1:
        raise ValueError("broken on one with " + os.environ["A_TOKEN"])
    hvdlm.barrier()


def test_the_cause_is_told(client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """And no secret of the job's is."""
    start = time.monotonic()
    cause = r"(?s)rank 1 on 127.0.0.1 failed:.*ValueError: broken on one with \*\*\*"
    with pytest.raises(WorkerFailed, match=cause) as caught:
        run(client, fails_on_one, env={"A_TOKEN": "tok-17a9c3e5"})
    assert time.monotonic() - start < 40
    out, err = capfd.readouterr()
    assert "the token is ***" in out and "17a9c3e5" not in f"{out}{err}{caught.value}"


def waits_for_ever(directory: str) -> str:
    import torch

    import hvdlm

    torch.manual_seed(0)
    hvdlm.init("torch")
    path = Path(directory) / f"rank-{hvdlm.rank()}"
    if path.exists():
        return "again"
    path.write_text(f"{os.getpid()} {os.getppid()}")
    hvdlm.barrier()
    if hvdlm.rank() == 0:
        hvdlm.barrier()  # the other never comes
    time.sleep(600)
    return "never"


@pytest.mark.lab
def test_a_lost_worker_ends_the_job_and_it_can_start_again(client: Any, tmp_path: Path) -> None:
    import threading

    def kill() -> None:
        paths = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 100
        while not all(path.exists() and path.read_text() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.1)
        pids.extend(int(path.read_text().split()[0]) for path in paths)
        os.kill(int(paths[1].read_text().split()[1]), signal.SIGKILL)

    pids: list[int] = []
    for restarts in (0, 1):
        for path in tmp_path.glob("rank-*"):
            path.unlink()
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            if restarts:
                assert run(client, waits_for_ever, args=(str(tmp_path),), num_proc=2, max_restarts=1) == ["again"] * 2
            else:
                with pytest.raises(
                    WorkerFailed, match=r"the Dask worker tcp://\S+ \(rank 1\) was lost during training"
                ):
                    run(client, waits_for_ever, args=(str(tmp_path),), num_proc=2)
                client.wait_for_workers(2, timeout=60)
        finally:
            killer.join()
    time.sleep(0.5)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "no process of the job is left"


def test_what_is_refused(client: Any) -> None:
    import dask.bag

    with pytest.raises(ConfigError, match="3 workers were asked for, and the Dask cluster has 2"):
        run(client, print, num_proc=3)
    with pytest.raises(ConfigError, match="data_dir"):
        run(client, print, args=(dask.bag.from_sequence([1]),))
    with pytest.raises(ConfigError, match=r"distributed\.Client"):
        run("tcp://scheduler:8786", print)
