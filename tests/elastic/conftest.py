"""What all jobs of these tests are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.elastic.check import complaint
from tests.elastic.jobs import Ended, undisturbed


@pytest.fixture(scope="session")
def plain_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of an undisturbed training in one process."""
    return undisturbed(tmp_path_factory.mktemp("plain"), "train_torch.py")


@pytest.fixture
def check(plain_torch: dict[str, Any]) -> Callable[[Ended], None]:
    """Checks that a job was complete and exact, and trained the same model."""

    def checked(ended: Ended) -> None:
        found = complaint(ended, plain_torch)
        assert found is None, found

    return checked


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory for one job."""
    return tmp_path
