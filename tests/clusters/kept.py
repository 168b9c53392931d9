"""Rendered files, compared with those kept in ``golden/``."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """The text is the kept one; a file that is not there yet is written, and the test fails once."""
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        raise AssertionError(f"{path} was written: read it, and run again")
    assert text == path.read_text(encoding="utf-8")
