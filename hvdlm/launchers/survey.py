"""Asks every host of a list what it is like, and measures the network between them: `hvdlm doctor -H`."""

from __future__ import annotations

import itertools
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdlm.errors import ConfigError, LaunchError
from hvdlm.launchers.hosts import is_local
from hvdlm.launchers.interfaces import choose_network
from hvdlm.launchers.link import HostLink
from hvdlm.launchers.loop import Loop
from hvdlm.launchers.peers import Peers
from hvdlm.launchers.ssh import Ssh, python_command
from hvdlm.network import interface_towards, interfaces
from hvdlm.observe.hosts import Pair

__all__ = ["Survey", "survey"]

_SECONDS_OF_A_MEASUREMENT = 0.3
_SECONDS_OF_AN_ANSWER = 30.0


@dataclass
class Survey:
    """What was found."""

    facts: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    """Host -> its facts, or why it cannot be reached."""
    names: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Host -> name of each host -> what it resolves to there."""
    networks: dict[str, str] = field(default_factory=dict)
    """Host -> its address in the chosen network."""
    problem: str = ""
    """Why no network was chosen."""
    pairs: list[Pair] = field(default_factory=list)


def survey(
    hosts: Sequence[str], ssh: Ssh, nics: Sequence[str] = (), timeout: float = 30.0, say: Callable[[str], None] = print
) -> Survey:
    """Reach the hosts (this one too if it is among them) and ask.

    Args:
        hosts: Their names.
        ssh: How they are reached.
        nics: ``--network-interfaces``.
        timeout: Seconds for them to answer.
        say: Told what is being done.
    """
    found = Survey()
    with Loop() as loop:
        peers = Peers(None, loop.selector, lambda *_: None, lambda *_: None, lambda _: None)
        talk = _Talk(loop, ssh, peers)
        try:
            say(f"reaching {len(hosts)} hosts")
            talk.reach(hosts, timeout)
            found.facts |= {host: talk.errors[host] for host in hosts if host in talk.errors}
            packages = sysconfig.get_paths()["purelib"]
            for host in talk.up:
                sent = time.time()
                facts = talk.ask(host, "facts", packages=packages)
                if facts is not None:
                    facts["clock_seconds"] = facts["time"] - (sent + time.time()) / 2
                    found.facts[host] = facts
                else:
                    found.facts[host] = "it did not answer"
            found.facts = {host: found.facts[host] for host in hosts}
            found.networks, found.problem = _networks(talk, nics)
            found.names = {host: talk.ask(host, "resolve", names=list(hosts)) or {} for host in talk.up}
            for source, target in itertools.permutations([h for h in talk.up if h in found.networks], 2):
                say(f"measuring {source} to {target}")
                found.pairs.append(_pair(talk, source, target, found.networks[target]))
        finally:
            talk.close()
            peers.close()
    return found


def _networks(talk: _Talk, nics: Sequence[str]) -> tuple[dict[str, str], str]:
    there = {host: talk.links[host].facts["interfaces"] for host in talk.up}
    others = {host: found for host, found in there.items() if not is_local(host)}
    towards = interface_towards(next(iter(others))) if others else None
    try:
        network = choose_network(nics, interfaces(), others, towards)
    except ConfigError as error:
        return {}, str(error)
    chosen = {host: network.others.get(host, network.here)[0] for host in there}
    return {host: there[host][name].partition("/")[0] for host, name in chosen.items() if name in there[host]}, ""


def _pair(talk: _Talk, source: str, target: str, address: str) -> Pair:
    listening = talk.ask(target, "listen", address=address)
    measured = listening and talk.ask(
        source, "measure", address=address, seconds=_SECONDS_OF_A_MEASUREMENT, **listening
    )
    if not measured or "error" in measured:
        return Pair(source, target, 0.0, 0.0, str((measured or {}).get("error", "no answer")))
    return Pair(source, target, measured["bytes_per_second"], measured["latency_seconds"])


class _Talk:
    """Questions and answers, one at a time."""

    def __init__(self, loop: Loop, ssh: Ssh, peers: Peers) -> None:
        self._loop, self._ssh, self._peers = loop, ssh, peers
        self.links: dict[str, HostLink] = {}
        self.errors: dict[str, str] = {}
        self._answers: list[Any] = []

    @property
    def up(self) -> list[str]:
        return [host for host, link in self.links.items() if link.is_ready and link.is_open]

    def reach(self, hosts: Sequence[str], timeout: float) -> None:
        for host in hosts:
            link = HostLink(
                host,
                self._ssh,
                self._loop.selector,
                self._peers,
                on_ready=lambda _: None,
                on_failed=lambda *_: None,
                on_lost=self._lost,
                # This host needs no sshd.
                command=python_command("hvdlm.agent") if is_local(host) else None,
            )
            link.on_answer = lambda _, found: self._answers.append(found)
            self.links[host] = link
        deadline = time.monotonic() + timeout
        while any(not link.is_ready and host not in self.errors for host, link in self.links.items()):
            left = deadline - time.monotonic()
            if left <= 0 or self._loop.signals:
                break
            self._loop.step(left)
        for host, link in self.links.items():
            if not link.is_ready and host not in self.errors:
                self.errors[host] = link.error().message
                link.kill()

    def ask(self, host: str, probe: str, **arguments: Any) -> Any:
        self._answers.clear()
        self.links[host].probe(probe, **arguments)
        deadline = time.monotonic() + _SECONDS_OF_AN_ANSWER
        while not self._answers and self.links[host].is_open and time.monotonic() < deadline:
            if self._loop.signals:
                raise KeyboardInterrupt
            self._loop.step(0.5)
            for link in self.links.values():
                link.pulse()
        return self._answers[0] if self._answers else None

    def close(self) -> None:
        for link in self.links.values():
            link.finish()
        deadline = time.monotonic() + 3
        while any(not link.is_over for link in self.links.values()) and time.monotonic() < deadline:
            self._loop.step(0.2)
        for link in self.links.values():
            link.close()

    def _lost(self, link: HostLink, error: LaunchError) -> None:
        self.errors[link.host] = error.message
