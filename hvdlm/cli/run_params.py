"""The parameters of ``hvdlm run``: horovodrun's flags, one flag per option, and a few of its own."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
from collections.abc import Collection
from typing import Any

import click

from hvdlm.errors import ConfigError
from hvdlm.launchers.base import LAUNCHERS
from hvdlm.launchers.flags import FLAGS, Flag
from hvdlm.options import Options, choices, kind, names

__all__ = ["RunCommand", "make_params", "option_help", "option_params"]


def option_help() -> dict[str, str]:
    """The docstring of each field of Options, on one line; empty if the source is not at hand."""
    try:
        tree = ast.parse(inspect.getsource(Options))
    except (OSError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split()).replace("``", "")
    return found


def _own(*spellings: str, **settings: Any) -> click.Option:
    return click.Option(spellings, **settings)


def option_params(taken: Collection[str] = ()) -> list[click.Parameter]:
    """One flag for each option of hvdlm.

    Args:
        taken: Options that are left out, because the command has a flag of its own for them.
    """
    params: list[click.Parameter] = []
    for name in names():
        if name in taken:
            continue
        flag = "--" + name.replace("_", "-")
        if name == "resume":
            params += _resume_switches()
        elif kind(name) is bool:
            params.append(click.Option([f"{flag}/--no-{flag[2:]}", name], default=None))
        else:
            plain = "N,N,..." if kind(name) is tuple else kind(name).__name__.upper()
            metavar = "|".join(choices(name) or ()) or plain
            params.append(click.Option([flag, name], metavar=metavar))
    return params


def make_params() -> list[click.Parameter]:
    """All parameters. Values stay text here: checking them later gives one kind of message for flags and files."""
    params: list[click.Parameter] = [
        click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]...")
    ]
    params += option_params()
    params += [
        _own(
            "-m", "--module", "module", metavar="MODULE", help="Run a module as python -m does; its arguments follow."
        ),
        _own("--autowrap", "autowrap", is_flag=True, help="Recognise what an unmodified script makes."),
        _own("--run-dir", "run_dir", metavar="DIR", help="For logs and the summary [hvdlm-runs/<time>-<script>]."),
        _own(
            "--config-file", "config_file", metavar="FILE", help="Options in YAML or JSON; sections of horovodrun too."
        ),
        _own("--print-config", "print_config", is_flag=True, help="Show every option and its origin, and exit."),
        _own("--launcher", "launcher", metavar="|".join(["auto", *LAUNCHERS]), help="debug runs one worker in place."),
        _own("--ssh-option", "ssh_options", multiple=True, metavar="NAME=VALUE", help="An option for ssh, as ssh -o."),
        _own("--pass-env", "pass_env", multiple=True, metavar="NAME,...", help="Variables for other hosts; * and ?."),
        _own("-cb", "--check-build", "check_build", is_flag=True, help="Show what Horovod was built with, and exit."),
        _own(
            "-v", "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show versions."
        ),
    ]
    for entry in FLAGS:
        params += _flag_params(entry)
    return params


def _resume_switches() -> list[click.Parameter]:
    """``--resume`` as a switch: a value beside it could be the script's name."""
    spellings = (("--resume", "yes"), ("--auto-resume", "auto"), ("--no-resume", "no"))
    return [
        click.Option([flag, "resume"], flag_value=value, type=click.UNPROCESSED, default=None)
        for flag, value in spellings
    ]


def _flag_params(flag: Flag) -> list[click.Parameter]:
    if flag.kind == "switch":
        # Two options for one value, so that each may have several names and neither counts if it is not given.
        spellings = ((True, flag.names), (False, flag.off))
        return [
            click.Option(
                [*names_, flag.dest],
                flag_value=value,
                type=click.UNPROCESSED,
                default=None,
                hidden=not value,
                help=flag.help,
            )
            for value, names_ in spellings
            if names_
        ]
    if flag.count > 1:
        return [click.Option([*flag.names, flag.dest], nargs=flag.count, metavar="MIN MAX", help=flag.help)]
    metavar = "|".join(flag.allowed) or flag.kind.upper()
    return [click.Option([*flag.names, flag.dest], multiple=flag.dest == "nics", metavar=metavar, help=flag.help)]


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    import importlib.metadata

    import hvdlm

    try:
        horovod = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        horovod = "not installed"
    click.echo(f"hvdlm {hvdlm.__version__}, Horovod {horovod}")
    ctx.exit()


class RunCommand(click.Command):
    """Flags end at the script, or at the module of ``-m``; help texts are read only when help is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes: dict[str, int] = {}
        for param in self.params:
            if isinstance(param, click.Option):
                for name in (*param.opts, *param.secondary_opts):
                    takes[name] = 0 if param.is_flag else param.nargs
        takes |= {"-h": 0, "--help": 0}
        position = 0
        while position < len(args) and args[position].startswith("-") and args[position] not in ("-", "--"):
            name, equals, _ = args[position].partition("=")
            if name not in takes:
                raise _unknown(name, sorted(takes))
            if equals and not name.startswith("--"):  # horovodrun takes -np=2
                args = [*args[:position], name, args[position][len(name) + 1 :], *args[position + 1 :]]
                equals = ""
            position += 1 if equals else 1 + takes[name]
            if name in ("-m", "--module"):
                # Like python -m: whatever follows the module is its own.
                args = [*args[:position], "--", *args[position:]]
                break
        return super().parse_args(ctx, list(args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        texts = option_help()
        own: list[tuple[str, str]] = []
        horovod: list[tuple[str, str]] = []
        job: list[tuple[str, str]] = []
        flags = {flag.dest for flag in FLAGS}
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option):
                continue
            if param.name in texts:
                param.help = texts[param.name]
            record = param.get_help_record(ctx)
            if record is not None:
                (
                    own if param.name in texts or param.name in names() else horovod if param.name in flags else job
                ).append(record)
        for title, records in (("Options of hvdlm", own), ("Job", job), ("Flags of horovodrun", horovod)):
            with formatter.section(title):
                formatter.write_dl(records)


def _unknown(name: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
        "--" + name.lstrip("-"), known, n=1
    )
    return ConfigError(
        f"unknown flag {name!r}; hvdlm run takes horovodrun's flags and one per option of hvdlm, before the script.",
        hint=f"did you mean {close[0]!r}?" if close else "hvdlm run --help lists them",
    )
