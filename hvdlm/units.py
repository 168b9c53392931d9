"""Sizes and times as people and clusters write them."""

from __future__ import annotations

import re

from hvdlm.errors import ConfigError

__all__ = ["clock", "mebibytes", "seconds"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(?:i?B?)?", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?")
_SPAN = re.compile(r"(\d+)\s*([smhd])")


def mebibytes(name: str, text: str) -> int:
    """A size in MiB.

    >>> mebibytes("memory", "4G"), mebibytes("memory", "512MiB")
    (4096, 512)

    Raises:
        ConfigError: Not a number and M, G or T.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * 1024 ** "MGT".index(match[2].upper())) if match else 0
    if size < 1:
        raise ConfigError(f"{name}: {text!r} is no size; a number and M, G or T is.", hint="4G")
    return size


def seconds(name: str, text: str) -> int:
    """A time in seconds.

    >>> seconds("time_limit", "90m"), seconds("time_limit", "1-02:00:00"), seconds("time_limit", "2:30:00")
    (5400, 93600, 9000)

    Raises:
        ConfigError: Neither ``90m`` (s, m, h, d) nor ``[days-]hours:minutes[:seconds]``.
    """
    match = _SPAN.fullmatch(text.strip())
    if match:
        found = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    else:
        match = _CLOCK.fullmatch(text.strip())
        days, hours, minutes, rest = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
        found = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if found < 1:
        raise ConfigError(f"{name}: {text!r} is no time; 90m, 2:30:00 and 1-00:00:00 are.", hint="--time-limit 2:00:00")
    return found


def clock(total: int) -> str:
    """Seconds as Slurm writes them.

    >>> clock(93600), clock(90)
    ('1-02:00:00', '0-00:01:30')
    """
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
