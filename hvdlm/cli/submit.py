"""``hvdlm submit``: a job for a cluster, from flags and a YAML file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from hvdlm.cli.run_params import RunCommand, option_params
from hvdlm.clusters.follow import follow, write_file
from hvdlm.clusters.read_spec import FIELDS, make_spec
from hvdlm.clusters.spec import TARGETS
from hvdlm.clusters.targets import get_target
from hvdlm.errors import ConfigError
from hvdlm.options import names

__all__ = ["submit"]

_HELP = "Render a job for TARGET ({targets}), submit it, show its output, and end it on Ctrl-C."


def _submit(**params: Any) -> None:
    target, words = params["target"], params["words"]
    given = {name: params[name] for name in FIELDS if params[name] not in (None, (), False)}
    options = {name: params[name] for name in names() if name not in FIELDS and params[name] is not None}
    spec = make_spec(target, params["spec"], given, options, words)
    chosen = get_target(target)
    text = chosen.render(spec)
    out = params["output"]
    if params["dry_run"] and out is None:
        click.echo(text, nl=False)
        return
    path = Path(os.path.abspath(out or f"{spec.name}{chosen.suffix}"))
    try:
        write_file(path, text)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}.", hint="-o FILE names another") from None
    _tell(f"written to {path}")
    if params["dry_run"]:
        return
    sys.stdout.flush()
    sys.exit(follow(chosen.open(spec), path, _show, _tell, detach=params["detach"]))


def _tell(line: str) -> None:
    click.echo(f"hvdlm: {line}", err=True)


def _show(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _params() -> list[click.Parameter]:
    params: list[click.Parameter] = [
        click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]..."),
        click.Option(["--spec", "spec"], metavar="FILE", help="The job in YAML; flags go over it."),
        click.Option(["--dry-run", "dry_run"], is_flag=True, help="Only render: to the screen, or to -o FILE."),
        click.Option(["-o", "--output", "output"], metavar="FILE", help="Where the rendered file goes [NAME.SUFFIX]."),
        click.Option(["--detach", "detach"], is_flag=True, help="Leave once the job is submitted."),
        *option_params(taken=set(FIELDS)),
    ]
    for name, field in FIELDS.items():
        flags = [field.metadata["flag"] or "--" + name.replace("_", "-")]
        flags += {"-m": ["--module"], "-np": ["--num-proc"]}.get(flags[0], [])
        only = field.metadata["targets"]
        text = field.metadata["help"] + ("" if only == TARGETS else f" ({', '.join(only)})")
        kind = str(field.type)
        if kind == "bool":
            params.append(click.Option([*flags, name], is_flag=True, help=text))
        else:
            many = kind.startswith(("Mapping", "tuple"))
            params.append(click.Option([*flags, name], multiple=many, metavar=field.metadata["metavar"], help=text))
    return params


class SubmitCommand(click.Group):
    """The target comes first, and what comes after it is as for ``hvdlm run``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(TARGETS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in TARGETS:
            raise ConfigError(
                f"no target {cmd_name!r}; the targets are: {', '.join(TARGETS)}.",
                hint="hvdlm submit slurm -np 2 train.py",
            )
        return RunCommand(
            cmd_name,
            params=_params(),
            callback=lambda **params: _submit(target=cmd_name, **params),
            help=_HELP.replace("TARGET ({targets})", cmd_name),
            short_help=f"On {cmd_name}.",
            options_metavar="[FLAGS]",
            context_settings={"allow_interspersed_args": False, "max_content_width": 110},
        )


submit = SubmitCommand(
    "submit",
    help=_HELP.format(targets=", ".join(TARGETS)),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
