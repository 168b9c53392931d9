"""What a machine of Google Cloud can ask its metadata server. Standard library only."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

__all__ = ["METADATA_HOST", "is_gce", "metadata", "watch_preemption"]

METADATA_HOST = "metadata.google.internal"
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_SECONDS_PER_QUESTION = 60
_SECONDS_AFTER_TROUBLE = 5.0


def is_gce(product: Path = _PRODUCT) -> bool:
    """Whether this is a machine of Google Cloud, as its firmware says; nothing is asked."""
    try:
        return product.read_text(errors="replace").startswith("Google")
    except OSError:
        return False


def metadata(path: str, host: str = METADATA_HOST, query: str = "", timeout: float = 5.0) -> str:
    """Ask the metadata server of this machine.

    Args:
        path: Below ``computeMetadata/v1/``.
        host: The server.
        query: After the question mark.
        timeout: Seconds.

    Raises:
        OSError: There is none, or it does not know.
    """
    url = f"http://{host}/computeMetadata/v1/{path}" + (f"?{query}" if query else "")
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return str(answer.read().decode())


def watch_preemption(host: str, preempted: Callable[[], None]) -> threading.Thread:
    """Call ``preempted`` once when the machine is about to be taken away (30 seconds before).

    A thread waits in a request that the server answers when the value changes, so that nothing is polled.

    Args:
        host: The metadata server.
        preempted: What to call, in that thread.
    """

    def watch() -> None:
        query = f"wait_for_change=true&timeout_sec={_SECONDS_PER_QUESTION}"
        first = True
        while True:
            try:
                # The first question is answered at once: it may have happened before we came.
                value = metadata("instance/preempted", host, "" if first else query, _SECONDS_PER_QUESTION + 10)
                first = False
            except OSError:
                time.sleep(_SECONDS_AFTER_TROUBLE)
                continue
            if value.strip().upper() == "TRUE":
                preempted()
                return

    thread = threading.Thread(target=watch, name="hvdlm-preemption", daemon=True)
    thread.start()
    return thread
