"""The ``hvdlm`` command: a thin group that loads each subcommand only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys

import click

from hvdlm.errors import HvdlmError
from hvdlm.secrets import masked, secret_values

__all__ = ["main"]

# name -> (module, attribute, one-line help shown in `hvdlm --help` without importing the module)
COMMANDS = {
    "bench": ("hvdlm.cli.bench", "bench", "Measure what communication costs here."),
    "build-horovod": ("hvdlm.cli.build_horovod", "build_horovod", "Build, install and prove a mended Horovod."),
    "doctor": ("hvdlm.cli.doctor", "doctor", "Check this machine and what is installed on it."),
    "estimate": ("hvdlm.cli.estimate", "estimate_command", "Memory, traffic and efficiency at a link and scale."),
    "partition": ("hvdlm.cli.partition", "partition", "Show which worker gets which share of the data."),
    "report": ("hvdlm.cli.report", "report", "Write one HTML page about runs."),
    "run": ("hvdlm.cli.run", "run", "Run a training script on many workers."),
    "verify": ("hvdlm.cli.verify", "verify", "Check that several workers train what one would."),
    "submit": ("hvdlm.cli.submit", "submit", "Run a job on Slurm, Kubernetes, Google Cloud, Spark or Dask."),
}


class LazyGroup(click.Group):
    """Lists subcommands without importing them, so that ``hvdlm run`` starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hvdlm")
def group() -> None:
    """Run a PyTorch or Keras language-model training script on many workers."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a mistake of the person's ends in one clear message, not a traceback."""
    try:
        group.main(args=argv, prog_name="hvdlm", standalone_mode=True)
    except HvdlmError as error:
        print(masked(f"hvdlm: {error}", secret_values(os.environ)), file=sys.stderr)
        sys.exit(error.exit_code)
