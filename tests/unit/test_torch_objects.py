"""What the torch adapter takes, refuses and says, in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hvdlm
from hvdlm.errors import ConfigError, DataError, RecognitionError


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDLM_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("HVDLM_PROGRESS", "none")


def dataset(n: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(n))[:, None], torch.arange(float(n))[:, None])


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(1, 1)


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    ((net(x / 10) - y / 10) ** 2).mean().backward()
    optimizer.step()


def test_one_process_trains_as_without_hvdlm() -> None:
    """In order and in one process nothing differs from plain torch, not one bit."""
    plain, net = model(), model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for x, y in DataLoader(dataset(), batch_size=4):
        step(plain, optimizer, x, y)

    @hvdlm.distribute
    def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> str:
        for x, y in data:
            step(net, optimizer, x, y)
        return "returned"

    data = DataLoader(dataset(), batch_size=4)
    assert train(net, torch.optim.AdamW(net.parameters(), lr=0.1), data) == "returned"
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


def test_loader_stand_in_keeps_its_face() -> None:
    seen = {}

    @hvdlm.distribute
    def train(net: torch.nn.Module, data: DataLoader[Any]) -> None:
        seen.update(n=len(data), size=data.batch_size, data=data.dataset, real=isinstance(data, DataLoader))
        seen["ids"] = sorted(int(x) for xs, _ in data for x in xs)

    own = dataset()
    train(model(), DataLoader(own, batch_size=4, shuffle=True))
    assert seen == {"n": 3, "size": 4, "data": own, "real": True, "ids": list(range(10))}


def test_epochs_are_shuffled_anew_and_repeat_with_the_seed() -> None:
    def orders(seed: int) -> list[list[float]]:
        result = []

        @hvdlm.distribute(seed=seed)
        def train(net: torch.nn.Module, data: Any) -> None:
            for _ in range(2):
                result.append([x for xs, _ in data for x in xs.flatten().tolist()])

        train(model(), DataLoader(dataset(40), batch_size=8, shuffle=True))
        return result

    first = orders(0)
    assert first == orders(0) != orders(1)
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1]) == [float(i) for i in range(40)]


def test_evaluation_reads_everything_in_one_order() -> None:
    @hvdlm.distribute
    def train(net: torch.nn.Module, data: Any) -> None:
        net.eval()
        assert sorted(x for xs, _ in data for x in xs.flatten().tolist()) == [float(i) for i in range(10)]
        net.train()
        with torch.no_grad():
            assert sum(len(xs) for xs, _ in data) == 10

    train(model(), DataLoader(dataset(), batch_size=4, shuffle=True))


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class NoLength(torch.utils.data.Dataset[int]):
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize(
    ("loader", "error", "told"),
    [
        (lambda: DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2), DataError, "empty"),
        (lambda: DataLoader(Stream(), batch_size=None), DataError, "batch_size=None"),
        (lambda: DataLoader(dataset(), batch_size=None), DataError, "batch_size=None"),
        (lambda: DataLoader(dataset(), sampler=DistributedSampler(dataset(), 2, 0)), DataError, "DistributedSampler"),
        (lambda: DataLoader(dataset(), sampler=Endless()), DataError, "no length"),
        (lambda: DataLoader(NoLength(), sampler=[0, 1]), DataError, "no length"),
        (lambda: OwnLoader(dataset()), RecognitionError, "__iter__"),
    ],
)
def test_loaders_that_cannot_be_shared_out_are_refused(loader: Any, error: type[Exception], told: str) -> None:
    @hvdlm.distribute
    def train(net: torch.nn.Module, data: Any) -> None:
        pytest.fail("ran")

    with pytest.raises(error, match=told) as caught:
        train(model(), loader())
    assert "HINT:" in str(caught.value) and "arg1" in str(caught.value)


def test_a_custom_sampler_is_respected() -> None:
    @hvdlm.distribute
    def train(net: torch.nn.Module, data: Any) -> list[float]:
        return [x for xs, _ in data for x in xs.flatten().tolist()]

    assert train(model(), DataLoader(dataset(), batch_size=4, sampler=[7, 3, 7, 1, 0])) == [7, 3, 7, 1, 0]
    many = RandomSampler(dataset(), replacement=True, num_samples=25)
    assert len(train(model(), DataLoader(dataset(), batch_size=4, sampler=many))) == 25


def test_what_synchronises_by_itself_is_refused() -> None:
    class DistributedDataParallel(torch.nn.Module):
        pass

    class Horovod(torch.optim.SGD):
        def skip_synchronize(self) -> None: ...

    with pytest.raises(RecognitionError, match="synchronises by itself"):
        hvdlm.distribute(lambda net: None)(DistributedDataParallel())
    with pytest.raises(RecognitionError, match="plain optimizer"):
        hvdlm.distribute(lambda o: None)(Horovod(model().parameters(), lr=1))
    with pytest.raises(RecognitionError, match="lazy"):
        hvdlm.distribute(lambda net: None)(torch.nn.LazyLinear(3))


def test_nothing_to_distribute() -> None:
    with pytest.raises(RecognitionError, match=r"hvdlm\.wrap"):
        hvdlm.distribute(lambda data: None)(DataLoader(dataset()))


def test_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"(?s)partition.*HINT: did you mean .compression"):
        hvdlm.distribute(compresion="fp16")(lambda net: None)(model())


def test_nothing_stays_behind_not_even_after_an_error() -> None:
    backward, iterate, length = torch.autograd.backward, DataLoader.__iter__, DataLoader.__len__
    norm = torch.nn.BatchNorm1d.forward

    @hvdlm.distribute
    def train(net: torch.nn.Module, data: Any) -> None:
        assert torch.autograd.backward is not backward
        raise KeyError("mine")

    net = model()
    state = list(net.__dict__)
    with pytest.raises(KeyError, match="mine"):
        train(net, dataset())
    assert (torch.autograd.backward, DataLoader.__iter__, DataLoader.__len__) == (backward, iterate, length)
    assert torch.nn.BatchNorm1d.forward is norm and list(net.__dict__) == state


def test_save_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    hvdlm.save(model().state_dict(), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|lambda"):
        hvdlm.save({"x": lambda: None}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.glob("*.pt*")] == ["model.pt"]


def test_learning_rate_scale_needs_the_scheduler_too() -> None:
    """With one worker nothing is scaled; the rule itself is about the combination of options."""
    with pytest.raises(ConfigError, match="per_worker"):
        hvdlm.distribute(lr_scale="linear")(lambda net: None)(model())


def test_horovod_missing_or_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing real can stand in for an absent package here: the import is made to fail as it would."""
    from importlib import metadata

    from hvdlm.adapters.torch_adapter import TorchAdapter
    from hvdlm.errors import EngineError

    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(EngineError, match=r"(?s)built for torch 2\.\d+.*HINT: hvdlm build-horovod.*--force"):
        TorchAdapter().start(launched=True)

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EngineError, match=r"(?s)not installed.*HINT: hvdlm build-horovod"):
        TorchAdapter().start(launched=True)
