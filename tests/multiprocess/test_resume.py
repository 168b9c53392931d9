"""Jobs that are killed and go on with other numbers of workers end with the model of one that was not."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.multiprocess.interruptions import Life, check, interrupted, live


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    live(directory, Life(1))
    return directory


@pytest.mark.timeout(300)  # up to three jobs, each some seconds on a machine that is not busy
@pytest.mark.parametrize(
    "lives",
    [
        [Life(2, 1, 10), Life(3, weights="1,2,4")],
        [Life(3, 2, 6), Life(1, 0, 15), Life(2)],
        [Life(2, 0, 17, "1,3", signal.SIGTERM), Life(2, weights="0,1")],
    ],
)
def test_no_gap_and_no_repeat(tmp_path: Path, uninterrupted: Path, lives: list[Life]) -> None:
    for number, life in enumerate(lives):
        assert live(tmp_path, life) == (number == len(lives) - 1)
    check(tmp_path, uninterrupted)


@pytest.mark.timeout(600)
def test_interrupted_at_random(tmp_path: Path, uninterrupted: Path) -> None:
    """A sample of what tests/perf/soak_resume.py does 50 times."""
    assert interrupted(tmp_path, random.Random(4), most=3) >= 2
    check(tmp_path, uninterrupted)
