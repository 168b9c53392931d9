"""What is compared: a training step and a sum of gradients, by hvdlm under each codec, by bare Horovod and by DDP."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from hvdlm.adapters.torch_adapter import TorchAdapter
from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_coded import maker_for
from hvdlm.adapters.torch_local import LocalSync
from hvdlm.adapters.torch_planner import Planner
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.errors import ConfigError
from hvdlm.options import Options

__all__ = ["Arms", "Gpt"]

Step = Callable[[], float | None]
_VOCABULARY, _LENGTH, _BATCH = 2048, 64, 4
_AUTOGRAD: Any = torch.autograd


class Gpt(torch.nn.Module):
    """A decoder with tied embeddings; 6.8 million parameters as it comes.

    Args:
        layers: Blocks.
        width: Of the residual stream.
        vocabulary: Tokens.
        length: Longest sequence.
    """

    def __init__(self, layers: int = 8, width: int = 256, vocabulary: int = _VOCABULARY, length: int = _LENGTH) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(length, width)
        for embedding in (self.tokens, self.places):
            torch.nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                width, max(1, width // 32), 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = torch.nn.LayerNorm(width)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token; ``ids`` is (batch, length + 1)."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        length = inputs.shape[1]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(inputs) + self.places.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Arms:
    """Makes what is compared, all in one job.

    Args:
        interface: Network interface for DDP; None chooses.
        batch: Sequences of 64 tokens for each worker and step.
        options: Further options of hvdlm.
    """

    def __init__(self, interface: str | None, batch: int = _BATCH, **options: Any) -> None:
        adapter = TorchAdapter()
        self.world = adapter.start(launched=True)
        self.collectives = adapter.collectives
        self._wire = adapter._wire
        self._interface, self._batch, self._options = interface, batch, options
        self._has_group = False
        self.planners: dict[str, Planner] = {}

    @property
    def controller(self) -> str:
        """What carries the collectives."""
        return "none" if self._wire is None else "MPI" if self._wire.sums_halves else "Gloo"

    def step(self, name: str) -> Step:
        """A training step: ``plain``, ``horovod``, ``horovod-fp16``, ``ddp``, the name of a codec, or ``local``.

        ``local-`` before the name of a codec: what workers have moved travels by that.
        """
        torch.manual_seed(0)
        model = Gpt()
        ids = torch.randint(_VOCABULARY, (self._batch, _LENGTH + 1))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
        loss_of: Callable[[], torch.Tensor] = lambda: model.loss(ids)  # noqa: E731
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if name.startswith("horovod"):
            optimizer = self._horovod(name, model, optimizer)
        elif name == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(_Loss(model), process_group=self._group())
            loss_of = lambda: wrapped(ids)  # noqa: E731
        elif name != "plain" and not name.startswith("local"):
            around = self._hvdlm(name, list(model.named_parameters()))

        def step() -> None:
            with around():
                loss: Any = loss_of()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        if name.startswith("local"):
            return self._local(step, model, optimizer, _codec(name.partition("-")[2] or "none"))
        return step

    def _local(self, step: Callable[[], None], model: Gpt, optimizer: torch.optim.Optimizer, codec: Any) -> Step:
        """A step of a worker that trains alone, with its part of the synchronisation that comes every so many."""
        if self._wire is None:
            return step
        options = Options(sync="local", compression=codec, **self._options)
        make = maker_for(options, self._wire)
        local = LocalSync(options=options, wire=self._wire, size=self.world.size, make_bucket=make, synced=[])
        local.add(list(model.named_parameters()), [model])
        local.follow([optimizer], [])

        def charged() -> float:
            step()
            start = time.perf_counter()
            local.synchronise()
            return (time.perf_counter() - start) * (1 - 1 / options.sync_every)

        return charged

    def sum(self, name: str, num_bytes: int) -> Step:
        """A sum over workers of one float32 gradient: ``horovod``, ``horovod-fp16``, ``ddp``, or a codec."""
        columns = 256 if num_bytes >= 2**18 else 1
        gradient = torch.randn(max(1, num_bytes // 4 // columns), columns)
        wire = self._wire
        assert wire is not None
        if name == "ddp":
            group = self._group()
            return lambda: torch.distributed.all_reduce(gradient, group=group) and None
        if name.startswith("horovod"):
            sent = gradient.half() if name.endswith("fp16") else gradient
            return lambda: wire.wait(wire.start(sent, f"bench.{name}.{num_bytes}"))
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        make = maker_for(Options(compression=_codec(name), **self._options), wire)
        bucket = make(f"bench.{name}.{num_bytes}", [parameter], torch.float32, gradient.device)

        def step() -> None:
            bucket.fill(parameter, gradient, 0.5)
            bucket.launch(True)
            bucket.finish()

        return step

    def _hvdlm(self, name: str, parameters: list[tuple[str, torch.nn.Parameter]]) -> Any:
        if self._wire is None:
            return contextlib.nullcontext
        options = Options(compression=_codec(name), **self._options)
        watch, autograd = BackwardWatch(), _AUTOGRAD
        own = autograd.backward
        reducer = Reducer(
            [parameters],
            sparse=frozenset(),
            wire=self._wire,
            watch=watch,
            size=self.world.size,
            mean=True,
            make_bucket=maker_for(options, self._wire),
            bucket_cap_bytes=(options.bucket_cap_mb or 32.0) * 2**20,
            name=f"bench.{name}",
        )
        if self.world.size > 1 and (options.compression == "auto" or not options.bucket_cap_mb):
            plain = [p for _, p in parameters]
            self.planners[name] = Planner(
                reducer, self._wire, options, plain, watch, within_host=self.world.within_host
            )
        watch.install()
        watched, autograd.backward = autograd.backward, own
        left = time.perf_counter()

        @contextlib.contextmanager
        def around() -> Any:
            nonlocal left
            planner = self.planners.get(name)
            if planner is not None:
                planner.pause(time.perf_counter() - left)
            autograd.backward = watched
            try:
                yield
            finally:
                autograd.backward = own
                left = time.perf_counter()

        return around

    def _horovod(self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        import horovod.torch as hvd

        half = name.endswith("fp16")
        return hvd.DistributedOptimizer(
            optimizer,
            named_parameters=[(f"{name}.{where}", p) for where, p in model.named_parameters()],
            compression=hvd.Compression.fp16 if half else hvd.Compression.none,
        )

    def _group(self) -> Any:
        """DDP's own connection."""
        if not self._has_group:
            os.environ["GLOO_SOCKET_IFNAME"] = self._interface or "lo"
            host = socket.gethostname() if self._interface else "127.0.0.1"
            main = self.world.rank == 0
            distributed: Any = torch.distributed
            store: Any = None
            if main:
                store = distributed.TCPStore(host, 0, None, True, wait_for_workers=False)
            told = self.collectives.broadcast(f"{host} {store.port}".encode() if main else b"").decode().split()
            if not main:
                store = distributed.TCPStore(told[0], int(told[1]), None, False)
            torch.distributed.init_process_group("gloo", store=store, rank=self.world.rank, world_size=self.world.size)
            self._has_group = True
        return torch.distributed.group.WORLD


class _Loss(torch.nn.Module):
    """DDP watches ``forward``."""

    def __init__(self, model: Gpt) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.loss(ids)


def _codec(name: str) -> Any:
    from hvdlm.options import choices

    allowed = choices("compression") or ()
    if name not in allowed:
        known = ["plain", "horovod", "horovod-fp16", "ddp", *allowed]
        raise ConfigError(f"there is no arm {name!r}; allowed: {', '.join(known)}.")
    return name
