"""``hvdlm doctor``: check this machine and what is installed on it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import click

from hvdlm.observe.doctor import Check, examine

__all__ = ["doctor"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The checks as JSON: name, ok, detail, hint, needed.")
@click.option("-H", "--hosts", metavar="HOST,...", help="Compare these hosts, and measure the network between them.")
@click.option("--network-interfaces", "nics", metavar="NAME,...", help="With -H: the interfaces a job would use.")
@click.option("-p", "--ssh-port", type=click.IntRange(1, 65535), help="With -H: port of sshd.")
@click.option("-i", "--ssh-identity-file", metavar="FILE", help="With -H: private key for ssh.")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="NAME=VALUE", help="With -H: as ssh -o.")
def doctor(
    as_json: bool,
    hosts: str | None,
    nics: str | None,
    ssh_port: int | None,
    ssh_identity_file: str | None,
    ssh_options: tuple[str, ...],
) -> None:
    """Check this machine and what is installed on it, down to a real sum over two processes.

    Exit code 1 if something that training needs is not right; what is only worth knowing does not count.
    """
    if hosts is not None:
        from hvdlm.cli.doctor_hosts import check_these
        from hvdlm.launchers.ssh import Ssh

        ssh = Ssh(port=ssh_port, identity_file=ssh_identity_file, options=ssh_options)
        sys.exit(0 if check_these(hosts, ssh, [name for name in (nics or "").split(",") if name], as_json) else 1)
    checks = list(examine(os.environ)) if as_json else _shown()
    ok = all(check.ok or not check.needed for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    sys.exit(0 if ok else 1)


def _shown() -> list[Check]:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    checks = []
    with console.status("looking") as status:
        for check in examine(os.environ):
            checks.append(check)
            status.update(f"looking, {len(checks)} checks done: two processes are being started")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAIL[/]" if check.needed else "[yellow]note[/]"
        table.add_row(mark, check.name, check.detail if check.ok else f"{check.detail}\n[cyan]HINT: {check.hint}[/]")
    console.print(table)
    failed = [check.name for check in checks if check.needed and not check.ok]
    if failed:
        console.print(f"[red]not ready to train: {', '.join(failed)}[/]")
    else:
        console.print("[green]ready to train[/]")
    return checks
