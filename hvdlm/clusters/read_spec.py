"""A :class:`SubmitSpec` from a YAML file and flags; a flag goes over the file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm.clusters.spec import SubmitSpec, check_targets
from hvdlm.errors import ConfigError
from hvdlm.launchers.config_file import parse_file
from hvdlm.options import coerce, names

__all__ = ["FIELDS", "make_spec"]

FIELDS = {field.name: field for field in dataclasses.fields(SubmitSpec) if "help" in field.metadata}
"""The fields that are flags too, by name."""
_FILE_ONLY = ("script", "args", "options")


def make_spec(
    target: str, path: str | None, flags: Mapping[str, Any], options: Mapping[str, Any], words: Sequence[str]
) -> SubmitSpec:
    """The job of a command line.

    Args:
        target: Where it goes.
        path: The YAML file, None for none. It has the fields of :class:`SubmitSpec`, and ``script``, ``args``,
            ``options``.
        flags: Fields given as flags, as text.
        options: Options of hvdlm given as flags, as text.
        words: The script and its arguments; instead of the file's if there are any.

    Raises:
        ConfigError: The file or a value is not as it has to be.
    """
    content = _content(path) if path else {}
    values = {name: _typed(name, value, path or "") for name, value in content.items() if name in FIELDS}
    given = {name: _typed(name, value, "--" + name.replace("_", "-")) for name, value in flags.items()}
    check_targets(given, target)
    merged = {name: _option(name, value) for name, value in {**content.get("options", {}), **options}.items()}
    for name, value in given.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    command = tuple(words) or (*content.get("script", ()), *content.get("args", ()))
    return SubmitSpec(command=command, options=merged, **values)


def _content(path: str) -> dict[str, Any]:
    found = parse_file(path, "--spec")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: names and values are needed, not {type(found).__name__}.", hint="num_proc: 2")
    known = [*FIELDS, *_FILE_ONLY]
    content = {str(key).replace("-", "_"): value for key, value in found.items()}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{path}: unknown key {key!r}; the keys are: {', '.join(sorted(known))}.",
                hint=f"did you mean {close[0]!r}?" if close else "hvdlm submit --help describes each",
            )
    script, arguments, options = content.get("script"), content.get("args", []), content.get("options", {})
    if script is not None:
        content["script"] = [str(script)]
    if not isinstance(arguments, list) or any(isinstance(word, dict | list) for word in arguments):
        raise ConfigError(f"{path}: args is a list of words, not {arguments!r}.", hint='args: ["--epochs", "3"]')
    content["args"] = [str(word) for word in arguments]
    if not isinstance(options, dict) or set(options) - set(names()):
        raise ConfigError(f"{path}: options are names and values of: {', '.join(names())}.", hint="compression: fp16")
    return content


def _option(name: str, value: Any) -> str:
    """An option of hvdlm as its flag takes it; checked here, before anything is sent anywhere."""
    coerce(name, value)
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _typed(name: str, value: Any, where: str) -> Any:
    """A value as the type of its field, from text or from YAML."""
    default = FIELDS[name].default
    expected = FIELDS[name].type
    wrong = ConfigError(
        f"{where}: {name} cannot be {value!r}.", hint=f"it is of the form {FIELDS[name].metadata['metavar']}"
    )
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise wrong
    if "int" in str(expected):
        if isinstance(value, bool) or not str(value).lstrip("-").isdecimal():
            raise wrong
        return int(value)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise wrong
        return tuple(str(part) for part in value)
    if str(expected).startswith("Mapping"):
        if isinstance(value, dict):
            return {str(key): "" if entry is None else str(entry) for key, entry in value.items()}
        if not isinstance(value, list | tuple):
            raise wrong
        pairs = [str(part).partition("=") for part in value]
        if any(not equals for _, equals, _ in pairs) and name != "secrets":
            raise wrong
        return {key: entry for key, _, entry in pairs}
    if isinstance(value, dict | list | tuple | bool):
        raise wrong
    return str(value)
