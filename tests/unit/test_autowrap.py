"""What recognition is made of, without processes: hooks on imports, places in scripts, shares of tensors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hvdlm.autowrap.imports import AfterImport
from hvdlm.autowrap.places import place
from hvdlm.autowrap.scope import Scope
from hvdlm.errors import ConfigError, DataError, RecognitionError
from hvdlm.launchers.program import autowrapped
from hvdlm.recognise import part_of
from hvdlm.world import World


def test_a_module_that_is_only_asked_for_is_still_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hvdlm_watched_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[ModuleType] = []
    hook = AfterImport({"hvdlm_watched_module": told.append})
    hook.install()
    try:
        # As libraries do that want to know whether another is installed.
        assert importlib.util.find_spec("hvdlm_watched_module") is not None
        assert told == []
        module = importlib.import_module("hvdlm_watched_module")
        assert told == [module] and module.value == 3
        assert type(module.__loader__).__name__ == "SourceFileLoader"
    finally:
        hook.remove()
        sys.modules.pop("hvdlm_watched_module", None)
    assert hook not in sys.meta_path


def test_place_is_the_line_of_the_script() -> None:
    line = sys._getframe().f_lineno + 1
    assert place() == f"test_autowrap.py:{line}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_of_a_tensor_are_equal_and_complete(world_size: int) -> None:
    data = np.arange(24).reshape(3, 8)
    parts = [part_of(data, 1, World(rank=rank, size=world_size)) for rank in range(world_size)]
    assert (np.concatenate(parts, axis=1) == data).all() and {p.shape for p in parts} == {(3, 8 // world_size)}
    assert all(p.base is not None for p in parts)


def test_shares_that_cannot_be_equal_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"8 along dimension 1 cannot be cut into 3 equal parts(.|\n)*1, 2, 4, 8 workers"
    ):
        part_of(np.zeros((3, 8)), 1, World(rank=0, size=3))
    with pytest.raises(DataError, match="no dimension 2"):
        part_of(np.zeros((3, 8)), 2, World(rank=0, size=2))


def test_a_script_that_distributes_itself_is_left_to_it() -> None:
    def never(framework: str) -> None:
        raise AssertionError(framework)

    with Scope(never) as scope:  # type: ignore[arg-type]
        assert Scope.active is scope
        scope.stand_down()
        assert Scope.active is None
        scope.finished()
    with Scope(never) as scope, pytest.raises(RecognitionError, match="recognised nothing"):  # type: ignore[arg-type]
        scope.finished()


LIGHTNING = "class Trainer:\n    def __init__(self, devices=1):\n        self.devices = devices\n"


@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_a_lightning_trainer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def never(framework: str) -> None:
        raise AssertionError(framework)

    (tmp_path / f"{name}.py").write_text(LIGHTNING)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with Scope(never):  # type: ignore[arg-type]
            module = importlib.import_module(name)
            with pytest.raises(RecognitionError) as raised:
                module.Trainer(devices=2)
        line = f"test_autowrap.py:{sys._getframe().f_lineno - 1}"
        assert str(raised.value).startswith(f"{line} makes a Lightning Trainer")
        assert "HINT: run it as it is (Trainer(devices=...))" in str(raised.value)
        assert module.Trainer(devices=2).devices == 2  # outside of the scope it is as it was
    finally:
        sys.modules.pop(name, None)


def test_commands_that_can_be_autowrapped() -> None:
    assert autowrapped(("/usr/bin/python3", "train.py", "--lr", "1")) == (
        *("/usr/bin/python3", "-m", "hvdlm.autorun", "train.py", "--lr", "1"),
    )
    assert autowrapped(("python", "-m", "pack", "x"))[1:] == ("-m", "hvdlm.autorun", "-m", "pack", "x")
    assert autowrapped(("python", "-u", "train.py"))[1:] == ("-u", "-m", "hvdlm.autorun", "train.py")
    for command in (("./train.sh",), ("python", "-c", "1"), ("python",)):
        with pytest.raises(ConfigError, match="--autowrap needs a Python script"):
            autowrapped(command)
