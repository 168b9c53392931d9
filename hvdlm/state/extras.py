"""Objects that a person registers, so that their state is kept with the training's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.errors import CheckpointError, RecognitionError
from hvdlm.state.snapshot import LOCAL

__all__ = ["Extras", "check_extra"]


class Extras:
    """The objects, and states that wait for theirs to be registered.

    Args:
        values: By name; may grow.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._kept: dict[str, Any] = {}

    def states(self) -> dict[str, Any]:
        """What is kept of them."""
        return {_key(name): _state_of(value) for name, value in self._values.items()}

    def put_back(self, kept: dict[str, Any]) -> None:
        """Put the states back that were kept; those of objects that are not there yet, once they are."""
        self._kept = kept
        for name, value in self._values.items():
            self.registered(name, value)

    def registered(self, name: str, value: Any) -> None:
        """The person registered an object."""
        state = self._kept.pop(_key(name), LOCAL)
        if state is not LOCAL:
            _load(name, value, state)


def _key(name: str) -> str:
    return f"extra {name}"


def check_extra(name: object, value: Any) -> None:
    """Refuse what has no state that could be taken and put back.

    Raises:
        RecognitionError: It is no dict, no list, and has not both ``state_dict`` and ``load_state_dict``.
    """
    if not isinstance(name, str) or not name:
        raise RecognitionError(f"register: the name is {name!r}; it takes text.", hint='hvdlm.register("best", best)')
    if isinstance(value, (dict, list)):
        return
    if not all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")):
        raise RecognitionError(
            f"register: {name} is a {type(value).__name__}, which cannot be put back; allowed: a dict, a list, or an "
            "object with state_dict() and load_state_dict(state).",
            hint=f'keep it in a dict: hvdlm.register("{name}", {{"value": ...}})',
        )


def _state_of(value: Any) -> Any:
    return value if isinstance(value, (dict, list)) else value.state_dict()


def _load(name: str, value: Any, state: Any) -> None:
    """Put its state back, in place.

    Raises:
        CheckpointError: It is another kind of object than the one whose state was kept.
    """
    if isinstance(value, dict) and isinstance(state, dict):
        value.clear()
        value.update(state)
    elif isinstance(value, list) and isinstance(state, list):
        value[:] = state
    elif isinstance(value, (dict, list)):
        raise CheckpointError(
            f"the state to go on from has a {type(state).__name__} for what is registered as {name!r}, now a "
            f"{type(value).__name__}.",
            hint=f"register what {name!r} was in the run that wrote it",
        )
    else:
        value.load_state_dict(state)
