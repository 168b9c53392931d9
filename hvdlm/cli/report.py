"""``hvdlm report``: a page about runs."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hvdlm.errors import ConfigError
from hvdlm.observe.report import render
from hvdlm.observe.runs import read_run
from hvdlm.private import open_private
from hvdlm.secrets import secret_values

__all__ = ["report"]


@click.command("report", help="Write one HTML page about a run, or comparing several.")
@click.argument("run_dirs", nargs=-1, metavar="RUN_DIR...")
@click.option("-o", "--output", metavar="FILE", help="Where the page goes [report.html in the first run directory].")
def report(run_dirs: tuple[str, ...], output: str | None) -> None:
    if not run_dirs:
        raise ConfigError("no run directory was given.", hint="hvdlm report hvdlm-runs/*")
    secrets = secret_values(os.environ)
    runs = [read_run(Path(directory), secrets) for directory in run_dirs]
    path = Path(output) if output is not None else Path(run_dirs[0]) / "report.html"
    try:
        with open_private(path) as file:
            file.write(render(runs))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}.", hint="-o FILE names another") from None
    click.echo(f"{path}  ({path.stat().st_size / 1024:.0f} kB)")
