"""``--config-file``: options of hvdlm in YAML or JSON, and the sections of horovodrun's own configuration file."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.launchers.flags import SECTIONS, flags_of_sections
from hvdlm.options import coerce, names

__all__ = ["parse_file", "read_config_file"]


def read_config_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the flags of horovodrun that a file sets.

    Args:
        path: A file that holds one mapping: option names, and sections of horovodrun's (``params``, ``timeline``, ...).

    Returns:
        (options by name, flags by destination), checked.

    Raises:
        ConfigError: The file is missing or unreadable, does not parse, or has a key or value that is not allowed.
    """
    content = parse_file(path, "--config-file")
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: names and values are needed, not {type(content).__name__}.", hint="compression: fp16"
        )
    known = [*names(), *SECTIONS]
    options = {}
    sections = {}
    for key, value in content.items():
        if key in SECTIONS:
            sections[key] = value
            continue
        name = str(key).replace("-", "_")
        if name not in names():
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{path}: unknown key {key!r}; the options are: {', '.join(names())}; sections of horovodrun: "
                f"{', '.join(SECTIONS)}.",
                hint=f"did you mean {close[0]!r}?" if close else "hvdlm run --help describes each option",
            )
        try:
            options[name] = coerce(name, value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
    return options, flags_of_sections(sections, path)


def parse_file(path: str, flag: str) -> Any:
    """What a YAML or JSON file holds.

    Args:
        path: The file; JSON if its name ends so.
        flag: The flag it was named by, for messages.

    Raises:
        ConfigError: It is missing or unreadable, or does not parse.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{flag} {path!r} cannot be read: {reason}.", hint="check the path") from None
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{flag} {path!r} is not JSON: {error}.", hint=f"python -m json.tool {path}") from None
    import yaml  # comes with Horovod; only loaded when a file is given

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{flag} {path!r} is not YAML: {said}.", hint="a line is: compression: fp16") from None
