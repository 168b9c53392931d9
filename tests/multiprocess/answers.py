"""What a case of a script found, written down by each rank."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hvdlm


def write_answer(directory: Path, name: str, ask: Callable[[], dict[str, Any]]) -> None:
    """Write what ``ask`` returns to ``name.RANK.json``; its traceback if it raises, and the process ends."""
    try:
        result = ask()
    except Exception:
        result = {"error": traceback.format_exc()}
    hvdlm.init()
    (directory / f"{name}.{hvdlm.rank()}.json").write_text(json.dumps(result))
    if "error" in result:
        sys.exit(1)  # the ranks are no longer in step
