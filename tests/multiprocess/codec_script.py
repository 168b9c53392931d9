"""Trains with every codec, then with gradients at the ends of what floats hold; rank 0 writes what came out.

``python codec_script.py RESULT`` under a launcher.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from hvdlm.adapters.torch_adapter import TorchAdapter
from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_coded import bucket_maker
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.adapters.torch_warmup import WarmUp
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.algorithms.codecs import CODECS
from hvdlm.options import Options
from hvdlm.plan import Share

Parameters = dict[str, torch.nn.Parameter]
BIG = 50 * 2**20  # 200 MB of float32


def same_everywhere(wire: TorchWire, tensors: list[torch.Tensor]) -> bool:
    payload = b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return len(set(wire.allgather(payload))) == 1


class Training:
    """One model whose gradients travel under one codec."""

    def __init__(
        self, wire: TorchWire, codec: str, parameters: dict[str, torch.nn.Parameter], number: list[int]
    ) -> None:
        self.watch = BackwardWatch()
        number[0] += 1
        self.reducer = Reducer(
            [list(parameters.items())],
            sparse=frozenset(),
            wire=wire,
            watch=self.watch,
            size=wire.size,
            mean=True,
            make_bucket=bucket_maker(codec, wire, ratio=0.1),
            bucket_cap_bytes=2**18,
            name=f"{codec}.{number[0]}",
        )
        self.parameters = list(parameters.values())
        self.watch.install()

    def end(self) -> None:
        self.watch.remove()
        self.reducer.remove()

    def backward(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        for p in self.parameters:
            p.grad = None
        pairs = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        loss = sum((p * g).sum() for p, g in pairs)
        loss.backward()  # type: ignore[union-attr]
        return [p.grad for p in self.parameters]


def converges(wire: TorchWire, codec: str, number: list[int]) -> dict[str, Any]:
    """Least squares with uneven shares: how far from the solution, and whether replicas are equal."""
    torch.manual_seed(0)
    x, truth = torch.randn(960, 96), torch.randn(96, 64)
    y = x @ truth
    weight = torch.nn.Parameter(torch.zeros(96, 64))
    bias = torch.nn.Parameter(torch.zeros(64))
    training = Training(wire, codec, {"weight": weight, "bias": bias}, number)
    cuts = [0, 160, 960] if wire.size == 2 else [0, 160, 560, 960]
    own = slice(cuts[wire.rank], cuts[wire.rank + 1])
    training.reducer.share = Share(ids=None, count=own.stop - own.start, total=960)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        ((x[own] @ weight + bias - y[own]) ** 2).sum(1).mean().div(2).backward()
        optimizer.step()
    training.end()
    return {
        "distance": float((weight - truth).detach().norm() / truth.norm()),
        "same": same_everywhere(wire, [weight, bias]),
    }


def extremes(wire: TorchWire, codec: str, number: list[int]) -> dict[str, Any]:
    shapes = [(1,), (130, 70), (7,), (33, 5, 3)]
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        parameters = {str(i): torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for i, s in enumerate(shapes)}
        training = Training(wire, codec, parameters, number)
        for scale in (1e-30, 1e30, 0.0, 1.0):
            own = [torch.ones(s, dtype=dtype) * scale for s in shapes]
            got = [training.backward([g.clone() for g in own]) for _ in range(3)][-1]
            assert all(g is not None and bool(torch.isfinite(g).all()) for g in got), (dtype, scale)
            assert same_everywhere(wire, [g for g in got if g is not None])
        bad = [torch.ones(s, dtype=dtype) for s in shapes]
        if wire.rank == wire.size - 1:
            bad[1][5, 5] = math.nan
        got = training.backward(bad)
        assert got[1] is not None and not bool(torch.isfinite(got[1]).all()), "a NaN of one rank"
        got = training.backward([torch.ones(s, dtype=dtype) for s in shapes])
        found[str(dtype)] = all(g is not None and bool(torch.isfinite(g).all()) for g in got)
        training.end()
    return found


def sizes(wire: TorchWire, codec: str, number: list[int]) -> dict[str, Any]:
    many = {str(i): torch.nn.Parameter(torch.zeros(1 + i % 3)) for i in range(10_000)}
    training = Training(wire, codec, many, number)
    got = training.backward([torch.ones(1 + i % 3) for i in range(10_000)])
    tiny = all(g is not None for g in got)
    training.end()
    large = {"large": torch.nn.Parameter(torch.zeros(BIG // 1024, 1024))}
    training = Training(wire, codec, large, number)
    (one,) = training.backward([torch.full((BIG // 1024, 1024), 0.5)])
    training.end()
    return {"tiny": tiny, "large": one is not None and 0.0 < float(one.sum()) <= BIG * 0.6}


def warms_up(wire: TorchWire, number: list[int]) -> dict[str, Any]:
    """The first sums are exact, those after hold a tenth; one more that is exact brings what these have not sent."""
    options = Options(compression="topk", topk_ratio=0.1, compression_warmup_steps=2)
    warm_up, parameter = WarmUp(), torch.nn.Parameter(torch.zeros(40, 25))
    training = Training(wire, "none", {"p": parameter}, number)
    reducer = training.reducer
    warm_up.resume(options.compression_warmup_steps, [reducer])
    reducer.rebuild(warm_up.maker_for(options, wire), 2**18)
    generator = torch.Generator().manual_seed(wire.rank)
    sent, given, arrived = [], torch.zeros(40, 25), torch.zeros(40, 25)
    for turn in range(5):
        if turn == 4:
            warm_up.resume(1, [reducer])
        own = torch.randn(40, 25, generator=generator)
        got = training.backward([own])[0]
        assert got is not None
        sent.append(float((got != 0).float().mean()))
        given, arrived = given + own, arrived + got
        if turn < 4:
            warm_up.reduced(1, [reducer])
    training.end()
    mean = torch.from_numpy(wire.allreduce(given.numpy())) / wire.size
    return {"sent": sent, "lost": float((arrived - mean).abs().max()), "left": warm_up.left}


def waits(wire: TorchWire) -> float:
    """Seconds of a processor that rank 0 takes in the second in which it waits for the others."""
    wire.wait(wire.start(torch.zeros(1), "together"))
    if wire.rank:
        time.sleep(1.0)
    handle, before = wire.start(torch.zeros(1), "late"), time.thread_time()
    wire.wait(handle)
    return time.thread_time() - before


def _thread_states() -> int:
    """How many threads the interpreter knows of; those of C++ are not in ``threading``."""
    python = ctypes.pythonapi
    for function in (python.PyInterpreterState_Get, python.PyInterpreterState_ThreadHead, python.PyThreadState_Next):
        function.restype = ctypes.c_void_p
    state, count = python.PyInterpreterState_ThreadHead(ctypes.c_void_p(python.PyInterpreterState_Get())), 0
    while state:
        state, count = python.PyThreadState_Next(ctypes.c_void_p(state)), count + 1
    return count


def forks(wire: TorchWire) -> dict[str, int]:
    """Fork right after collectives whose tensors nobody here holds any longer, as a DataLoader of a new epoch does."""
    stuck = 0
    for turn in range(100):
        wire.wait(wire.start(torch.zeros(100_000), f"dropped.{turn}"))
        child = os.fork()
        if not child:
            os._exit(0)
        deadline = time.monotonic() + 10
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                stuck += 1
                break
            time.sleep(0.001)
    return {"stuck": stuck, "native": _thread_states() - threading.active_count()}


def main() -> None:
    adapter = TorchAdapter()
    adapter.start(launched=True)
    wire = adapter._wire
    assert wire is not None
    number = [0]
    result: dict[str, Any] = {}
    for codec in CODECS:
        result[codec] = {**converges(wire, codec, number), **extremes(wire, codec, number)}
        if "--sizes" in sys.argv:
            result[codec].update(sizes(wire, codec, number))
    result["warm-up"] = warms_up(wire, number)
    result["waits"] = waits(wire)
    result["forks"] = forks(wire)
    if wire.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
