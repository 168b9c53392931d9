"""Values of options: as text, from text, and which types take a function."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from hvdlm.errors import ConfigError

__all__ = ["close", "named", "numbers", "spelled", "takes_function"]


def named(value: Any) -> Any:
    """The value as JSON takes it: a function is its name."""
    if not callable(value):
        return value
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def spelled(hint: Any) -> Any:
    """The type of the values that can be written as text: the first of a union with functions."""
    return typing.get_args(hint)[0] if takes_function(hint) else hint


def takes_function(hint: Any) -> bool:
    """Whether an option of this type may be a function."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def numbers(name: str, value: object) -> tuple[float, ...]:
    """A list of weights; text is split at commas, and empty text is an empty list."""
    from hvdlm.algorithms.partition import check_weights  # not at the top: the command line needs no NumPy

    given = (value.split(",") if value.strip() else []) if isinstance(value, str) else value
    if not isinstance(given, Sequence) and not hasattr(given, "tolist"):
        raise ConfigError(f"{name} is {value!r}; it takes numbers.", hint=f"{name}=[1, 2], or --{name} 1,2")
    items = list(typing.cast(Sequence[Any], given))
    try:
        return check_weights(items) if items else ()
    except ValueError as error:
        raise ConfigError(f"{name}: {error}.", hint=f"{name}=[1, 2], or --{name} 1,2") from None


def close(value: object, allowed: tuple[str, ...]) -> str | None:
    """A question that names the allowed value that looks most like the one given."""
    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else None
