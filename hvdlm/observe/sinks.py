"""Where metrics of rank 0 go besides the run directory: Weights & Biases, MLflow, a page that Prometheus reads."""

from __future__ import annotations

import http.server
import importlib
import re
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from hvdlm.errors import ConfigError

__all__ = ["SINKS", "Prometheus", "Sink", "open_sink"]

_PORT = 9400


class Sink(Protocol):
    """Takes scalars."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag, all of one step."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Wandb:
    """Logs to the script's own run of Weights & Biases, or to one that is begun here."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._wandb = _needed("wandb")
        self._own = self._wandb.run is None
        if self._own:
            self._wandb.init(project="hvdlm", config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        # The script counts steps its own way: ours is a metric of its own beside them.
        self._wandb.log({**values, "hvdlm/step": step})

    def close(self) -> None:
        """See :class:`Sink`."""
        if self._own:
            self._wandb.finish()


class Mlflow:
    """Logs to the active run of MLflow, or to one that is begun here."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._mlflow = _needed("mlflow")
        self._own = self._mlflow.active_run() is None
        if self._own:
            self._mlflow.start_run()
            self._mlflow.log_params(dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See :class:`Sink`."""
        if self._own:
            self._mlflow.end_run()


class Prometheus:
    """Shows the last values at ``http://127.0.0.1:9400/metrics``; at another port of loopback if that one is taken."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._values: dict[str, float] = {}
        sink = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = sink.page().encode()
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return None

        try:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", _PORT), Page)
        except OSError:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="hvdlm-prometheus", daemon=True)
        self._thread.start()

    def page(self) -> str:
        """The values, in Prometheus's text format."""
        lines = []
        for tag, value in sorted(self._values.items()):
            name = "hvdlm_" + re.sub(r"\W", "_", tag)
            lines.append(f"# TYPE {name} gauge\n{name} {value!r}\n")
        return "".join(lines)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._values = {**self._values, **values, "step": float(step)}

    def close(self) -> None:
        """See :class:`Sink`."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


SINKS: dict[str, type[Any]] = {"wandb": Wandb, "mlflow": Mlflow, "prometheus": Prometheus}
"""Value of ``metrics`` -> class."""


def open_sink(name: str, config: Mapping[str, Any]) -> Sink | None:
    """The sink of a name; None for ``none``.

    Raises:
        ConfigError: The library it needs is not installed.
    """
    if name == "none":
        return None
    sink: Sink = SINKS[name](config)
    return sink


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'metrics="{module}": {module} is not installed ({error}).', hint=f"pip install {module}"
        ) from None
