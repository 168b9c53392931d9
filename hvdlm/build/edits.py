"""Named changes to a source tree: what one is, how it is applied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdlm.errors import BuildError

__all__ = ["Edit", "Mend", "apply_mends", "digest"]

_HINT = "the source is not Horovod as released; try again with: hvdlm build-horovod --force"


@dataclass(frozen=True)
class Edit:
    """One replacement. ``find`` must occur exactly once in ``file``."""

    file: str
    find: str
    replace: str


@dataclass(frozen=True)
class Mend:
    """A named change and the reason for it."""

    name: str
    why: str
    edits: tuple[Edit, ...]
    needs: str = ""
    """A condition of the build (``cpu`` or ``avx``) without which this is left out; empty for always."""


def digest(mends: Iterable[Mend]) -> str:
    """A hash of all that these mends change."""
    edits = [[mend.name, mend.needs, [asdict(edit) for edit in mend.edits]] for mend in mends]
    return hashlib.sha256(json.dumps(edits, sort_keys=True).encode()).hexdigest()


def apply_mends(source: Path, mends: Iterable[Mend]) -> None:
    """Apply mends to an unpacked source tree.

    Raises:
        BuildError: The text a mend looks for does not occur exactly once; the mend is named and nothing is written.
    """
    texts: dict[Path, str] = {}
    for mend in mends:
        for edit in mend.edits:
            path = source / edit.file
            if path not in texts:
                try:
                    # Bytes, not read_text(): line ends stay as they are.
                    texts[path] = path.read_bytes().decode()
                except (OSError, UnicodeDecodeError) as error:
                    raise BuildError(f"mend {mend.name!r} cannot read {edit.file}: {error}.", hint=_HINT) from None
            count = texts[path].count(edit.find)
            if count != 1:
                found = "does not occur" if not count else f"occurs {count} times"
                raise BuildError(
                    f"mend {mend.name!r} no longer fits: in {edit.file}, the text it replaces {found} "
                    f"(it must occur once):\n{edit.find.strip()}",
                    hint=_HINT,
                )
            texts[path] = texts[path].replace(edit.find, edit.replace)
    for path, text in texts.items():
        path.write_bytes(text.encode())
