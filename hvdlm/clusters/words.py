"""The command line of the job inside a cluster, and templates with everything in them quoted for the shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hvdlm.clusters.spec import SubmitSpec
from hvdlm.errors import ConfigError
from hvdlm.options import kind

__all__ = ["as_written", "quoted", "render_template", "run_words", "script_words"]


def as_written(words: Iterable[str]) -> str:
    """Words as one line of shell; each stays one word whatever is in it."""
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word for the shell, on one line: a line break becomes an escape of bash's ``$'...'``."""
    if "\n" in word or "\r" in word:
        escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
        return f"$'{escaped}'"
    return shlex.quote(word)


def script_words(spec: SubmitSpec) -> list[str]:
    """The script and its arguments, after the flags of ``hvdlm run``."""
    if spec.module is not None:
        return ["-m", spec.module, *spec.command]
    return ["--", *spec.command]


def option_words(spec: SubmitSpec) -> list[str]:
    """Options of hvdlm as flags."""
    words = []
    for name, value in spec.options.items():
        flag = name.replace("_", "-")
        if name == "resume":
            words.append({"yes": "--resume", "no": "--no-resume"}.get(value, "--auto-resume"))
        elif kind(name) is bool:
            words.append(f"--{flag}" if value.lower() in ("true", "1", "yes", "on") else f"--no-{flag}")
        else:
            words += [f"--{flag}", value]
    return words


def run_words(spec: SubmitSpec, *flags: str, num_proc: bool = True) -> list[str]:
    """``hvdlm run`` and its flags, without the script: see :func:`script_words`.

    Args:
        spec: The job.
        flags: Flags for this target.
        num_proc: Whether the number of workers is given.
    """
    words = ["run", *(("-np", str(spec.num_proc)) if num_proc else ()), *flags]
    if spec.elastic:
        words += ["--min-np", str(spec.min_num_proc or 1)]
        words += ["--max-np", str(spec.max_num_proc or spec.num_proc)]
    if spec.memory_mib:
        words += ["--max-memory", f"{spec.memory_mib}M"]
    if spec.network_interfaces:
        words += ["--network-interfaces", spec.network_interfaces]
    if spec.checkpoint_dir:
        words += ["--checkpoint-dir", spec.checkpoint_dir]
        # The first start finds nothing there; one after a preemption does.
        words += [] if "resume" in spec.options else ["--auto-resume"]
    return [*words, *option_words(spec)]


def render_template(template: str, /, **values: Any) -> str:
    """Fill a template of this package.

    In it ``x|sh`` is one word of shell and ``xs|words`` several; an undefined name raises.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ConfigError("this target needs jinja2.", hint="pip install 'hvdlm[submit]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = quoted
    environment.filters["words"] = as_written
    environment.filters["directive"] = _directive
    return environment.get_template(template).render(**values)


def _directive(value: str) -> str:
    """A value on a ``#SBATCH`` line: Slurm's own quoting, which knows no escape inside of quotes."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value):
        return value
    if '"' in value and "'" in value:
        raise ConfigError(
            f"{value!r} has both kinds of quotes in it, which no #SBATCH line can hold.", hint="choose another name"
        )
    return f"'{value}'" if '"' in value else f'"{value}"'
