"""2 and 3 workers train what one process trains: 2-norm of the parameters' difference over that of the parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.multiprocess import torch_cases
from tests.multiprocess.workers import run_workers

# The first test waits for all the jobs below.
pytestmark = pytest.mark.timeout(1200)

SCRIPT = Path(torch_cases.__file__)

# What the arithmetic allows. Names that do not say otherwise train in float64.
TOLERANCES = {
    "sgd_fp32": 1e-6,
    "scaler_with_inf_on_one_rank": 1e-6,
    "adamw_fp32_foreach": 5e-5,
    "adamw_fp32_fused": 5e-5,
    "lbfgs_fp64": 1e-6,
    "sgd_compressed": 2e-3,
    "adamw_compressed": 2e-3,
    "autocast_bfloat16_parameters": 5e-3,
}
FLOAT64 = 1e-10

# Name -> (workers, controller, cases). Gloo carries those that lean on it most; MPI all.
JOBS: dict[str, tuple[int, str | None, list[str]]] = {
    "alone": (1, None, []),
    "mpi2": (2, "mpi", []),
    "mpi3": (3, "mpi", []),
    "gloo2": (2, "gloo", ["sgd_compressed", "adamw_fp64", "sparse_embeddings", "fillers", "two_models_two_optimizers"]),
}
RUNS = [
    (job, name)
    for job, (workers, _, names) in JOBS.items()
    if workers > 1
    for name in sorted(names or torch_cases.CASES)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Job -> directory with what each rank ended with."""
    directories = {}
    for job, (workers, controller, names) in JOBS.items():
        directory = tmp_path_factory.mktemp(job)
        done = run_workers(
            [str(SCRIPT), str(directory), *names], workers, controller=controller, cwd=directory, timeout=360
        )
        assert done.returncode == 0, done.stderr[-3000:]
        directories[job] = directory
    return directories


def load(directory: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    error = directory / f"{name}.{rank}.err"
    assert not error.exists(), error.read_text()
    state: dict[str, torch.Tensor] = torch.load(directory / f"{name}.{rank}.pt")
    return state


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


@pytest.mark.parametrize(("job", "name"), RUNS)
def test_same_as_one_process(results: dict[str, Path], job: str, name: str) -> None:
    alone = flat(load(results["alone"], name, 0))
    together = flat(load(results[job], name, 0))
    difference = float((together - alone).norm() / alone.norm())
    assert difference <= TOLERANCES.get(name, FLOAT64)


@pytest.mark.parametrize(("job", "name"), RUNS)
def test_replicas_are_identical(results: dict[str, Path], job: str, name: str) -> None:
    first = load(results[job], name, 0)
    for rank in range(1, JOBS[job][0]):
        other = load(results[job], name, rank)
        assert all(torch.equal(value, other[key]) for key, value in first.items()), f"rank {rank}"


def test_training_moves(results: dict[str, Path]) -> None:
    """The comparison is between models that learned something."""
    torch.manual_seed(3)
    start = flat(torch_cases.Gpt().state_dict())
    for name in ("sgd_fp32", "adamw_fp32_foreach"):
        assert float((flat(load(results["alone"], name, 0)) - start).norm() / start.norm()) > 0.01
