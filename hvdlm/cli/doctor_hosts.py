"""``hvdlm doctor -H``: several hosts side by side, and the network between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from hvdlm.launchers.hosts import parse_names
from hvdlm.launchers.ssh import Ssh
from hvdlm.launchers.survey import Survey, survey
from hvdlm.observe.hosts import HostCheck, check_hosts, slow_pairs

__all__ = ["check_these"]


def check_these(text: str, ssh: Ssh, nics: Sequence[str], as_json: bool) -> bool:
    """Ask the hosts, show what they said; returns whether a job can run on them.

    Args:
        text: The value of ``-H``.
        ssh: How the hosts are reached.
        nics: Interfaces a job would use.
        as_json: Whether to show JSON.
    """
    from rich.console import Console

    hosts = parse_names(text)
    console = Console(highlight=False, stderr=True)
    with console.status("looking") as status:
        found = survey(hosts, ssh, nics, say=status.update)
    checks = check_hosts(found.facts, found.names, found.networks)
    slow = slow_pairs(found.pairs)
    ok = all(check.ok or not check.needed for check in checks) and not found.problem
    ok = ok and not any(pair.error for pair in found.pairs)
    if as_json:
        shown = [{**asdict(check), "ok": check.ok} for check in checks]
        pairs = [{**asdict(pair), "slow": pair in slow} for pair in found.pairs]
        print(json.dumps({"ok": ok, "checks": shown, "pairs": pairs, "problem": found.problem}, indent=2))
        return ok
    _show(hosts, checks, found, ok)
    return ok


def _show(hosts: Sequence[str], checks: Sequence[HostCheck], found: Survey, ok: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("", "", *hosts):
        table.add_column(name, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAIL[/]" if check.needed else "[yellow]note[/]"
        cells = [check.found.get(host, "") for host in hosts]
        coloured = [f"[red]{cell}[/]" if host in check.odd else cell for host, cell in zip(hosts, cells, strict=True)]
        table.add_row(mark, check.name, *coloured)
    console.print(table)
    slow = slow_pairs(found.pairs)
    if found.pairs:
        network = Table(box=None, pad_edge=False, title="network, from the left to the top", title_justify="left")
        for name in ("", *hosts):
            network.add_column(name)
        by_pair = {(pair.source, pair.target): pair for pair in found.pairs}
        for source in hosts:
            row = [source]
            for target in hosts:
                pair = by_pair.get((source, target))
                if pair is None:
                    row.append("-")
                elif pair.error:
                    row.append(f"[red]{pair.error}[/]")
                else:
                    speed = f"{pair.bytes_per_second * 8 / 1e6:,.0f} Mbit/s  {pair.latency_seconds * 1e3:.2f} ms"
                    row.append(f"[red]{speed}[/]" if pair in slow else speed)
            network.add_row(*row)
        console.print(network)
    for check in checks:
        if not check.ok:
            colour = "red" if check.needed else "yellow"
            console.print(f"[{colour}]{check.name}: {', '.join(check.odd)}[/]\n[cyan]HINT: {check.hint}[/]")
    for pair in slow:
        why = pair.error or f"{pair.bytes_per_second * 8 / 1e6:,.0f} Mbit/s"
        console.print(f"[yellow]slow: {pair.source} to {pair.target}, {why}[/]")
    if found.problem:
        console.print(f"[red]{found.problem}[/]")
    console.print("[green]ready for a job[/]" if ok else "[red]not ready for a job[/]")
