"""What to run on each worker: finds the program and checks it before anything starts."""

from __future__ import annotations

import difflib
import importlib.machinery
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdlm.errors import ConfigError

__all__ = ["autowrapped", "check_syntax", "find_module", "resolve_program"]

_PYTHON = re.compile(r"python[0-9.]*")


def resolve_program(words: Sequence[str], module: str | None, path: str | None) -> tuple[str, ...]:
    """The command of a worker.

    Args:
        words: The script or program and its arguments, or those of the module.
        module: The module to run (``-m``), None for a script or program.
        path: Where programs are searched (``PATH``).

    Raises:
        ConfigError: There is no such program, it cannot be run, or its first file has a syntax error.
    """
    if module is not None:
        source = find_module(module)
        if source is not None:
            check_syntax(source)
        return (sys.executable, "-m", module, *words)
    if not words:
        raise ConfigError("no script was given.", hint="hvdlm run -np 2 train.py")
    name, *arguments = words
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "__main__.py")):
            check_syntax(os.path.join(name, "__main__.py"))
            return (sys.executable, _safe(name), *arguments)
        raise ConfigError(f"{name!r} is a directory; a script or program is needed.", hint=_scripts_in(name))
    if os.path.exists(name):
        is_python = name.endswith((".py", ".pyw", ".pyc", ".pyz"))
        if not is_python and os.access(name, os.X_OK):
            _check_python_call(name, arguments)
            return (_safe(name) if os.sep in name else os.path.join(os.curdir, name), *arguments)
        if not os.access(name, os.R_OK):
            raise ConfigError(f"{name!r} cannot be read.", hint=f"chmod u+r {name}")
        if not name.endswith((".pyc", ".pyz")):
            check_syntax(name)
        return (sys.executable, _safe(name), *arguments)
    if os.sep not in name and not name.endswith(".py"):
        program = shutil.which(name, path=path)
        if program is not None:
            _check_python_call(name, arguments)
            return (program, *arguments)
    raise ConfigError(f"there is no script or program {name!r} (in {os.getcwd()}).", hint=_closest(name))


def autowrapped(command: Sequence[str]) -> tuple[str, ...]:
    """The command that runs the same Python script or module, with what it makes recognised (``--autowrap``).

    Raises:
        ConfigError: It is no Python script.
    """
    python, *words = command
    while words and words[0].startswith("-") and words[0] != "-m":
        words = words[1:]  # flags of the interpreter
    if (
        not _PYTHON.fullmatch(os.path.basename(python))
        or not words
        or not (words[0] == "-m" or words[0].endswith(".py"))
    ):
        raise ConfigError(
            f"--autowrap needs a Python script or -m module, not {' '.join(command)!r}.",
            hint="hvdlm run -np 2 --autowrap train.py",
        )
    flags = list(command[1 : len(command) - len(words)])
    return (python, *flags, "-m", "hvdlm.autorun", *words)


def _safe(name: str) -> str:
    """A path that no interpreter takes for a flag."""
    return os.path.join(os.curdir, name) if name.startswith("-") else name


def _check_python_call(name: str, arguments: Sequence[str]) -> None:
    # `hvdlm run -np 2 python train.py`, as horovodrun wants it.
    if _PYTHON.fullmatch(os.path.basename(name)) and arguments and arguments[0].endswith(".py"):
        if not os.path.isfile(arguments[0]):
            raise ConfigError(f"there is no script {arguments[0]!r} (in {os.getcwd()}).", hint=_closest(arguments[0]))
        check_syntax(arguments[0])


def check_syntax(path: str) -> None:
    """Compile a script, so that a syntax error is told once and before workers start.

    Raises:
        ConfigError: It does not compile; the message shows the line.
    """
    try:
        compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = (error.text or "").rstrip("\n")
        caret = f"\n    {' ' * (max(error.offset or 1, 1) - 1)}^" if line else ""
        shown = f"\n    {line}{caret}" if line else ""
        raise ConfigError(
            f"{path}, line {error.lineno}: {error.msg}{shown}", hint="mend the script; nothing was started"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is no Python script: {error}.", hint="give a program its execute permission"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def find_module(module: str) -> str | None:
    """The file ``python -m module`` runs, found without importing anything; None if an import hook may provide it.

    Raises:
        ConfigError: There is no such module.
    """
    path: Sequence[str] | None = [os.getcwd(), *sys.path]
    names = module.split(".")
    for index in range(len(names)):
        name = ".".join(names[: index + 1])
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            if index == 0 and any(_finds(finder, name) for finder in sys.meta_path):
                return None
            raise ConfigError(
                f"there is no module {name!r}.", hint="a script is run by its path: hvdlm run -np 2 train.py"
            )
        path = spec.submodule_search_locations
        if index + 1 < len(names) and path is None:
            raise ConfigError(f"module {name!r} is no package, so it has no {names[index + 1]!r}.")
    if path is not None:
        main = importlib.machinery.PathFinder.find_spec(f"{module}.__main__", path)
        if main is None:
            raise ConfigError(f"package {module!r} cannot be run: it has no __main__.py.")
        spec = main
    return spec.origin if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _finds(finder: object, name: str) -> bool:
    find = getattr(finder, "find_spec", None)
    return find is not None and find(name, None) is not None


def _closest(name: str) -> str:
    folder = os.path.dirname(name) or os.curdir
    try:
        entries = [entry for entry in os.listdir(folder) if entry.endswith(".py")]
    except OSError:
        return f"there is no directory {folder!r}"
    close = difflib.get_close_matches(os.path.basename(name), entries, n=1)
    return f"did you mean {os.path.join(os.path.dirname(name), close[0])!r}?" if close else "check the path"


def _scripts_in(folder: str) -> str:
    scripts = sorted(entry for entry in os.listdir(folder) if entry.endswith(".py"))
    return f"hvdlm run {os.path.join(folder, scripts[0])}" if scripts else "give the path of the script"
