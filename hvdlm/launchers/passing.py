"""Which variables of the environment are passed to other hosts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from hvdlm.errors import ConfigError
from hvdlm.secrets import is_secret_name

__all__ = ["ALLOWED", "check_patterns", "held_back", "passed_on"]

ALLOWED = (
    *("HVDLM_*", "HOROVOD_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "PATH", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "NO_COLOR", "COLUMNS", "XDG_CACHE_HOME"),
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "VECLIB_*", "NUMEXPR_*", "MALLOC_*"),
    *("TORCH*", "PYTORCH_*", "TF_*", "TENSORFLOW_*", "KERAS_*", "XLA_*", "JAX_*", "CUDA_*", "NVIDIA_*", "NCCL_*"),
    *("GLOO_*", "UCX_*", "FI_*", "IBV_*", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_*", "DATASETS_*"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Patterns of the variables that are passed unasked. A name that looks like a secret never is."""

_OF_THE_HOST = re.compile(
    r"(?:HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|HOSTNAME|MAIL|TMPDIR|_|SHLVL|DISPLAY|XAUTHORITY|SSH_\w+|XDG_\w+|DBUS_\w+"
    r"|PS1|LS_COLORS|LESS\w*|PAGER|EDITOR|VISUAL|INVOCATION_ID|JOURNAL_STREAM|TERM_\w+|COLORTERM|HIST\w+|WINDOWID)"
)
"""What belongs to one host or one terminal, so that nobody misses it on another."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"[A-Za-z_*?][A-Za-z0-9_*?]*")


def check_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """The patterns of ``--pass-env``, each a name that may hold ``*`` and ``?``.

    Raises:
        ConfigError: One is not of that form (a value has no place on a command line).
    """
    found = tuple(part.strip() for given in patterns for part in given.split(",") if part.strip())
    for pattern in found:
        if not _PATTERN.fullmatch(pattern):
            name = pattern.partition("=")[0]
            raise ConfigError(
                f"--pass-env {name!r}{' with a value' if '=' in pattern else ''}: only names are given, with * and ?.",
                hint=f"export {name}=... first, then: --pass-env {name}" if _NAME.fullmatch(name) else None,
            )
    return found


def passed_on(environment: Mapping[str, str], asked: Sequence[str] = ()) -> dict[str, str]:
    """The part of an environment that goes to other hosts.

    >>> passed_on({"OMP_NUM_THREADS": "2", "HF_TOKEN": "t", "DATA": "/d", "HOME": "/root"}, ["DATA"])
    {'OMP_NUM_THREADS': '2', 'DATA': '/d'}

    Args:
        environment: The environment.
        asked: Patterns of ``--pass-env``. A secret is passed if it is named in full.
    """
    return {name: value for name, value in environment.items() if _passes(name, asked)}


def held_back(environment: Mapping[str, str], asked: Sequence[str] = ()) -> list[str]:
    """Names of the variables that a worker on another host may miss."""
    return sorted(
        name
        for name in environment
        if _NAME.fullmatch(name) and not _passes(name, asked) and not _OF_THE_HOST.fullmatch(name)
    )


def _passes(name: str, asked: Sequence[str]) -> bool:
    if not _NAME.fullmatch(name):  # an exported shell function
        return False
    if name in asked:
        return True
    if is_secret_name(name):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*ALLOWED, *asked))
