"""What must not be shown: which names look like secrets, and texts without their values. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

__all__ = ["MASK", "Masker", "is_secret_name", "masked", "secret_arguments", "secret_values"]

MASK = "***"
_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASS|PASSWD|PASSWORD|PASSPHRASE|PWD|CREDENTIALS?|AUTH|COOKIE|JWT|PAT|DSN)(?:S|$|_)"
    r"|PASSWORD|SECRET|TOKEN$|APIKEY",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(
    r"KEYS?|PWD|OLDPWD|HVDLM_\w+|TOKENIZERS?_\w+|.*_(?:KEY|TOKENS?)_(?:NAME|ID|COUNT|FILE|PATH)|SSH_AUTH_SOCK"
    r"|(?:\w+_)?(?:NUM|MAX|MIN|N)_(?:\w+_)?TOKENS|TOKENS_PER_\w+",
    re.IGNORECASE,
)
_SHORTEST = 6
"""Shorter values are not looked for in texts: they would hide much that is no secret."""
_MOST_BYTES = 65536
"""Longer values are no secrets, but files that somebody put into a variable."""
_HARMLESS = re.compile(r"[\d.,:/-]*|true|false|enabled|disabled|default|(?:/[\w.-]+)+", re.IGNORECASE)
"""Numbers, switches and paths: what hides them hides the run. Not looked for, unless the name leaves no doubt."""
_CERTAIN = re.compile(r"PASS|SECRET|TOKEN\Z", re.IGNORECASE)
_OF_A_JOB = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HVDLM_CONTROL")
"""Addresses that end with the key of a job of ours."""
_URL = re.compile(r"(?<=://)([^\s/?#@:'\"]*):([^\s/?#@'\"]+)@")
_URL_BYTES = re.compile(_URL.pattern.encode())
_URL_BEGUN = re.compile(rb"://[^\s/?#@'\"]{0,512}\Z|:/?\Z")


def is_secret_name(name: str) -> bool:
    """Whether a variable or flag of this name holds a secret, by its name.

    >>> [is_secret_name(name) for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "PWD", "MAX_TOKENS")]
    [True, True, True, False, False]
    """
    return not _NOT_SECRET.fullmatch(name) and _SECRET.search(name) is not None


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values to be masked, longest first: of secret names, and the passwords in URLs of any name.

    >>> secret_values({"HF_TOKEN": "hf_abcdefgh", "PROXY": "http://me:pass%40word@proxy:3128", "PATH": "/bin"})
    ('hf_abcdefgh', 'pass%40word', 'pass@word')
    """
    found: set[str] = set()
    for name, value in environ.items():
        if name in _OF_A_JOB:
            found.add(re.split("[:/]", value)[-1])
        elif is_secret_name(name):
            found |= _parts(name, value)
        elif "://" in value:
            passwords = [match[2] for match in _URL.finditer(value)]
            found |= {*passwords, *map(unquote, passwords)}
    return _longest_first(found)


def secret_arguments(words: Sequence[str]) -> tuple[str, ...]:
    """The secrets among the words of a command: ``--api-key VALUE``, ``--password=VALUE``, ``TOKEN=VALUE``.

    >>> secret_arguments(["train.py", "--hub-token", "hf_abcdefgh", "--epochs", "3"])
    ('hf_abcdefgh',)
    """
    found = set()
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not re.fullmatch(r"[A-Za-z]\w*", name) or not is_secret_name(name):
            continue
        if equals:
            found |= _parts(name, value)
        elif word.startswith("-") and position + 1 < len(words) and not words[position + 1].startswith("-"):
            found |= _parts(name, words[position + 1])
    return _longest_first(found)


def _parts(name: str, value: str) -> set[str]:
    """What to look for of one secret."""
    if _HARMLESS.fullmatch(value.strip()) and not _CERTAIN.search(name):
        return set()
    # A key of several lines may be printed line by line.
    lines = [line.strip() for line in value.splitlines()] if "\n" in value else []
    return {value, value.strip(), *(line for line in lines if len(line) >= 16 and not line.startswith("-----"))}


def _longest_first(values: Iterable[str]) -> tuple[str, ...]:
    found = {value for value in values if _SHORTEST <= len(value) <= _MOST_BYTES}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def masked(value: Any, secrets: Iterable[str] = ()) -> Any:
    """A text, or lists and dicts of texts, without ``secrets``, what secret names hold, and passwords in URLs.

    >>> masked({"dir": "s3://me:secret@host/x", "argv": ["--key", "hf_abcdefgh"]}, ["hf_abcdefgh"])
    {'dir': 's3://me:***@host/x', 'argv': ['--key', '***']}
    """
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return _URL.sub(rf"\1:{MASK}@", value) if "://" in value else value
    if isinstance(value, Mapping):
        return {
            name: MASK if isinstance(entry, str) and entry and is_secret_name(str(name)) else masked(entry, secrets)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [masked(entry, secrets) for entry in value]
    return value


class Masker:
    """Masks secrets in a stream of bytes, also where one is cut in two.

    Args:
        secrets: What to mask; besides, passwords in URLs.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = [secret.encode(errors="surrogateescape") for secret in secrets]
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown of what has come; an end that may be the start of a secret is held back."""
        data = self._held + data
        for secret in self._secrets:
            data = data.replace(secret, MASK.encode())
        if b"://" in data:
            data = _URL_BYTES.sub(rb"\1:" + MASK.encode() + b"@", data)
        keep = max((_overlap(data, secret) for secret in self._secrets), default=0)
        begun = _URL_BEGUN.search(data, max(0, len(data) - 520))
        if begun is not None:
            keep = max(keep, len(data) - begun.start())
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    @property
    def holds(self) -> bool:
        """Whether something is held back."""
        return bool(self._held)

    def flush(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, b""
        return held


def _overlap(data: bytes, secret: bytes) -> int:
    """Length of the longest end of ``data`` that a secret starts with, and is not all of it."""
    start = max(0, len(data) - len(secret) + 1)
    while (start := data.find(secret[:1], start)) >= 0:
        if secret.startswith(data[start:]):
            return len(data) - start
        start += 1
    return 0
