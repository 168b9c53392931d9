"""``python -m hvdlm.autorun SCRIPT ARGUMENTS``: runs a script as Python would, and recognises what it makes.

``hvdlm run --autowrap`` starts it on each worker. It shows nothing of itself: ``sys.argv``, ``__main__``, the module
search path and tracebacks are those of ``python SCRIPT``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Sequence

from hvdlm import adoption, api
from hvdlm.autowrap.quiet import hold_back, meet_on_main
from hvdlm.autowrap.scope import Scope
from hvdlm.environment import read_environment
from hvdlm.errors import ConfigError
from hvdlm.processes import report_uncaught_exceptions

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Run ``SCRIPT [ARGUMENT ...]`` or ``-m MODULE [ARGUMENT ...]``.

    Raises:
        RecognitionError: The script ended, and nothing was recognised.
    """
    environment = read_environment()
    report_uncaught_exceptions()
    if environment.rank == 0:
        meet_on_main(api.barrier)
    else:
        hold_back(environment.run_dir, environment.rank, api.barrier, environment.secrets)
    source, module = _prepare(list(argv))
    code = compile(source, module.__file__ or "?", "exec", dont_inherit=True)
    status: str | int | None = None
    with Scope(adoption.begin) as scope:
        try:
            exec(code, module.__dict__)
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                raise
            status = leaving.code
        except KeyboardInterrupt:
            sys.exit(130)
        except BaseException as error:
            # What the person sees begins in the script.
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1)
        if environment.size > 1:
            scope.finished()
    adoption.end()
    sys.exit(status)


def _prepare(argv: list[str]) -> tuple[bytes, types.ModuleType]:
    """The source of what is to run, and the module it runs in, made the main one."""
    if not argv or (argv[0] == "-m" and len(argv) < 2):
        raise ConfigError("no script was given.", hint="hvdlm run -np 2 --autowrap train.py")
    module = types.ModuleType("__main__")
    if argv[0] == "-m":
        sys.path[0:1] = [os.getcwd()]
        spec = importlib.util.find_spec(argv[1])
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(argv[1] + ".__main__")
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise ConfigError(f"there is no module {argv[1]!r} with a source file.", hint="give the script's path")
        path, sys.argv = spec.origin, [spec.origin, *argv[2:]]
        module.__package__, module.__spec__ = spec.parent, spec
    else:
        path, sys.argv = argv[0], argv
        sys.path[0:1] = [os.path.dirname(os.path.abspath(path))]
    module.__file__ = os.path.abspath(path)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    try:
        with open(path, "rb") as file:
            return file.read(), module
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


if __name__ == "__main__":
    main(sys.argv[1:])
