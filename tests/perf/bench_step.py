"""What a training step costs: plain, with bare Horovod, with hvdlm, with PyTorch's DistributedDataParallel.

    python tests/perf/bench_step.py                    # 2 workers over MPI and over Gloo, and 1 process
    python tests/perf/bench_step.py --only mpi         # one of: mpi, gloo, one
    python tests/perf/bench_step.py --check            # exit 1 if a limit is missed

A GPT of 6.8 million parameters, 4 sequences of 64 tokens for each worker and step. All arms run in one process, a step
of each in turn, each with its own model, optimizer and loader; a step is everything from asking the loader for a batch
to the end of ``optimizer.step()``, and takes as long as its slowest worker. Figures are medians of the ratios of steps
next to each other, with their 95 % bootstrap intervals. Absolute times of a shared machine mean little: run it on an
idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "gpt_torch"), str(Path(__file__).parent)]

import torch  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402
from train_plain import GPT, loss_of  # type: ignore[import-not-found] # noqa: E402

from hvdlm.bench.stats import Interval, median_interval  # noqa: E402

BATCH, LENGTH, VOCABULARY, SAMPLES = 4, 64, 2048, 4096
WARM_UP = 5
RUNS = {"mpi": (2, ["--mpi"]), "gloo": (2, ["--gloo"]), "one": (1, [])}
TITLES = {"mpi": "2 workers, MPI", "gloo": "2 workers, Gloo", "one": "1 process"}
LABELS = {
    "plain": "plain step, nothing sent",
    "horovod": "bare Horovod",
    "hvdlm": "hvdlm",
    "horovod fp16": "bare Horovod, fp16",
    "hvdlm fp16": 'hvdlm, compression="fp16"',
    "ddp": "PyTorch DDP (gloo)",
}
LIMITS = (
    # (run, arm, compared with, limit)
    ("mpi", "hvdlm", "horovod", 1.00),
    ("mpi", "hvdlm fp16", "horovod fp16", 1.00),
    ("gloo", "hvdlm", "horovod", 1.00),
    ("gloo", "hvdlm fp16", "horovod fp16", 1.00),
    ("one", "hvdlm", "plain", 1.02),
)

Step = Callable[[], None]
Times = dict[str, list[float]]


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, TensorDataset]:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, LENGTH, layers=8, width=256, heads=8, dropout=0.0)
    data = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), TensorDataset(data[:, :-1], data[:, 1:])


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def step_of(model: torch.nn.Module, optimizer: Any, loader: Any) -> Step:
    batches = endless(loader)

    def step() -> None:
        inputs, targets = next(batches)
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain() -> Step:
    model, optimizer, dataset = make()
    return step_of(model, optimizer, DataLoader(dataset, BATCH, shuffle=True))


def sampled(dataset: TensorDataset, rank: int, size: int) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset, size, rank))


def horovod(compress: bool) -> Step:
    import horovod.torch as hvd

    model, optimizer, dataset = make()
    prefix = "half" if compress else "full"  # the names of collectives must be its own
    wrapped = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=[(f"{prefix}.{name}", p) for name, p in model.named_parameters()],
        compression=hvd.Compression.fp16 if compress else hvd.Compression.none,
    )
    return step_of(model, wrapped, sampled(dataset, hvd.rank(), hvd.size()))


def ddp(rank: int, size: int, store: Path) -> Step:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    model, optimizer, dataset = make()
    return step_of(torch.nn.parallel.DistributedDataParallel(model), optimizer, sampled(dataset, rank, size))


def with_hvdlm(size: int, compression: str) -> Step:
    from hvdlm.adapters.torch_adapter import TorchAdapter
    from hvdlm.environment import read_environment
    from hvdlm.session import Session

    model, optimizer, dataset = make()
    unwatched = torch.autograd.backward
    session = Session(TorchAdapter(), read_environment(), {"compression": compression})
    loader = DataLoader(dataset, BATCH * size, shuffle=True)
    found = [("model", "model", model), ("optimizer", "optimizer", optimizer), ("loader", "loader", loader)]
    (_, _, sharded) = session.attach(found)  # type: ignore[arg-type]
    session.started()
    for reducer in session.adapter._sync._reducers:  # type: ignore[attr-defined]
        for bucket in (b for group in reducer._buckets for b in group):
            bucket.name = f"{compression}.{bucket.name}"  # two sessions in one process are not foreseen
    step = step_of(model, optimizer, sharded)
    watched, torch.autograd.backward = torch.autograd.backward, unwatched

    def watched_step() -> None:
        torch.autograd.backward = watched
        try:
            step()
        finally:
            torch.autograd.backward = unwatched

    return watched_step


def work(rounds: int, wanted: list[str], result: Path) -> None:
    """One worker: measures all arms; rank 0 writes the times."""
    size = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("HOROVOD_SIZE") or 1)
    arms: dict[str, Step] = {}
    barrier: Callable[[], object] = lambda: None  # noqa: E731
    gather: Callable[[list[float]], list[list[float]]] = lambda own: [own]  # noqa: E731
    rank = 0
    if size > 1:
        import horovod.torch as hvd

        hvd.init()
        rank = hvd.rank()
        barrier = hvd.barrier

        def gather(own: list[float]) -> list[list[float]]:
            return hvd.allgather(torch.tensor([own], dtype=torch.float64), name="times").tolist()  # type: ignore

    for name in wanted:
        if name == "plain":
            arms[name] = plain()
        elif name.startswith("hvdlm"):
            arms[name] = with_hvdlm(size, name.partition(" ")[2] or "none")
        elif size > 1 and name.startswith("horovod"):
            arms[name] = horovod("fp16" in name)
        elif size > 1 and name == "ddp":
            arms[name] = ddp(rank, size, result.with_suffix(".store"))
    names = list(arms)
    times: Times = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        first = number % len(names)  # no arm always follows the same other one
        for name in names[first:] + names[:first]:
            barrier()
            start = time.perf_counter()
            arms[name]()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    slowest = {name: [max(step) for step in zip(*gather(times[name]), strict=True)] for name in names}
    if rank == 0:
        result.write_text(json.dumps(slowest))
    # Horovod's optimizer and DDP leave threads behind that need not end in order.
    sys.stdout.flush()
    barrier()
    os._exit(0)


def launch(run: str, rounds: int, wanted: list[str]) -> Times:
    num_proc, flags = RUNS[run]
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "times.json"
        worker = [__file__, "--work", str(result), "--rounds", str(rounds), "--arms", ",".join(wanted)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HVDLM_RUN_DIR": directory,
            "HVDLM_PROGRESS": "none",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, *worker]
        if num_proc > 1:
            hvdlm = [sys.executable, "-m", "hvdlm", "run", "-np", str(num_proc), "--run-dir", directory]
            command = [*hvdlm, *flags, *worker]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60 + 15 * rounds, check=False
        )
        with contextlib.suppress(FileNotFoundError):
            return json.loads(result.read_text())  # type: ignore[no-any-return]
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def ratio(times: Times, arm: str, other: str) -> Interval:
    return median_interval([a / b for a, b in zip(times[arm], times[other], strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(RUNS), action="append")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--arms", default=",".join(LABELS), help="comma-separated: " + ", ".join(LABELS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = args.arms.split(",")
    if args.work:
        work(args.rounds, wanted, args.work)
    table = {run: launch(run, args.rounds, wanted) for run in args.only or RUNS}
    print("| step, against a plain one | " + " | ".join(TITLES[run] for run in table) + " |")
    print("| --- |" + " --- |" * len(table))
    for name in wanted:
        cells = [str(ratio(t, name, "plain")) if name in t else "" for t in table.values()]
        print(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
    missed = False
    for run, arm, other, limit in LIMITS:
        if run in table and arm in table[run] and other in table[run]:
            figure = ratio(table[run], arm, other)
            verdict = "holds" if figure.holds(limit) else "MISSED"
            missed |= not figure.holds(limit)
            print(f"{TITLES[run]}: {LABELS[arm]} / {LABELS[other]} = {figure}, limit {limit:.2f}: {verdict}")
    sys.exit(args.check and missed)


if __name__ == "__main__":
    main()
