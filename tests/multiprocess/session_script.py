"""What a job of several workers shows of hvdlm's functions; run by test_session.py. Asserts inside, on every rank."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.errors import DataError, HvdlmError, MismatchError

directory = Path(sys.argv[1])
torch.set_num_threads(1)
rank, size = hvdlm.rank(), hvdlm.size()
assert size == int(sys.argv[2]) and hvdlm.local_size() == size and hvdlm.local_rank() == rank
assert hvdlm.is_main() == (rank == 0)


def dataset(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(n))[:, None])


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(1, 1)


# mean: of numbers and tensors, weighted, with a value that must not count
assert hvdlm.mean(float(rank)) == (size - 1) / 2
mean = hvdlm.mean(torch.tensor(float(rank), dtype=torch.float64), weight=rank)
assert isinstance(mean, torch.Tensor) and mean.dtype == torch.float64
assert abs(float(mean) - sum(r * r for r in range(size)) / sum(range(size))) < 1e-12
assert hvdlm.mean(float("nan") if rank == 0 else 2.0, weight=float(rank)) == 2.0

# main_first: rank 0's file is there before the others look, and an error on rank 0 does not hang them
with hvdlm.main_first():
    if hvdlm.is_main():
        time.sleep(0.5)
        (directory / "cache").write_text("x")
    assert (directory / "cache").exists()

# save: rank 0 writes, all find it; a failure is raised on every rank
hvdlm.save({"rank": rank}, directory / "saved.pt")
assert torch.load(directory / "saved.pt") == {"rank": 0}
with contextlib.suppress(HvdlmError, OSError):
    hvdlm.save({}, directory / "missing" / "saved.pt")
    raise SystemExit("saved into a directory that is not there")
hvdlm.barrier()


@hvdlm.distribute(eval="sharded")
def sharded_evaluation(model: Any, data: Any) -> None:
    model.eval()
    seen = [x for (xs,) in data for x in xs.flatten().tolist()]
    assert len(seen) < 11
    own = sum(seen) / len(seen) if seen else float("nan")
    assert abs(hvdlm.mean(own) - 5.0) < 1e-9, "weighted by the samples each worker read"


sharded_evaluation(linear(), DataLoader(dataset(11), batch_size=4))


@hvdlm.distribute
def whole_evaluation(model: Any, data: Any) -> None:
    model.eval()
    seen = [x for (xs,) in data for x in xs.flatten().tolist()]
    assert sorted(seen) == [float(i) for i in range(11)]
    orders = [order.decode() for order in _gather(repr(seen))]
    assert len(set(orders)) == 1, "all workers read in the same order"


def _gather(text: str) -> list[bytes]:
    from hvdlm.api import _current

    return _current().adapter.collectives.allgather(text.encode())


whole_evaluation(linear(), DataLoader(dataset(11), batch_size=4, shuffle=True))


@hvdlm.distribute(seed=4)
def dropout_streams(model: Any, data: Any) -> None:
    """A function of seed, step and rank: different on each worker and in each step, the same when run again."""
    draws = [[torch.rand(1).item() for _ in data] for _ in range(2)]
    gathered = _gather(repr(draws))
    assert len(set(gathered)) == size
    flat = [x for epoch in draws for x in epoch]
    assert len(set(flat)) == len(flat)
    global first
    first = first or draws
    assert first == draws


first: Any = None
for _ in range(2):
    torch.manual_seed(int(time.time() * 1000) % 10**6)
    dropout_streams(linear(), DataLoader(dataset(9), batch_size=3))


@hvdlm.distribute
def hand_made_batches(model: Any) -> None:
    draws = set(_gather(repr(torch.randint(1000, (8,)).tolist())))
    assert len(draws) == size, "each worker draws batches of its own"


torch.manual_seed(5)
hand_made_batches(linear())

# Models that differ are named, on every rank alike.
try:
    hvdlm.distribute(lambda model: None)(torch.nn.Linear(1, 1 + rank))
except MismatchError as error:
    assert "rank 0: arg0.weight: (1, 1)" in str(error) and "rank 1: arg0.weight: (2, 1)" in str(error), error
else:
    raise SystemExit("models of different shape were accepted")

try:
    hvdlm.distribute(lambda model, data: None)(linear(), DataLoader(dataset(1)))
except DataError as error:
    assert f"fewer than the {size} workers" in str(error) and "HINT" in str(error)
else:
    raise SystemExit("one sample was shared out among several workers")


@hvdlm.distribute(batch="per_worker", lr_scale="linear")
def per_worker(model: Any, optimizer: Any, data: Any) -> None:
    assert len(data) == -(-20 // (2 * size))
    assert abs(optimizer.param_groups[0]["lr"] - 0.1 * size) < 1e-12
    assert {len(xs) for (xs,) in list(data)[:-1]} == {2}


net = linear()
per_worker(net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(dataset(20), batch_size=2))

# log: metrics.jsonl on rank 0; the call form leaves its summary when the script ends
net, data = hvdlm.wrap(linear(), DataLoader(dataset(10), batch_size=4))
for (x,) in data:
    net(x).mean().backward()
hvdlm.log(loss=torch.tensor(1.25), step_size=3)
print(f"rank {rank} done in {os.getpid()}")
