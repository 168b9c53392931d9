"""What `hvdlm doctor -H` says of hosts, from what was found on them."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from hvdlm.errors import ConfigError
from hvdlm.launchers.hosts import parse_names
from hvdlm.launchers.interfaces import choose_network
from hvdlm.observe.hosts import HostCheck, Pair, check_hosts, slow_pairs
from hvdlm.probe import answer, facts_of_the_host


def facts(**changes: Any) -> dict[str, Any]:
    usual = {
        "host": "x",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "build": "abc",
        "hvdlm": "d1",
        "clock_seconds": 0.0,
        "cores": 8,
        "memory_bytes": 16 * 2**30,
        "shm_bytes": 2**30,
    }
    return usual | changes


def check(odd: dict[str, Any] | str, **more: Any) -> dict[str, HostCheck]:
    networks = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"} | more.pop("networks", {})
    names = {host: dict(networks) for host in "abc"} | more.pop("names", {})
    found = {"a": facts(), "b": odd if isinstance(odd, str) else facts(**odd), "c": facts()}
    return {entry.name: entry for entry in check_hosts(found, names, {k: v for k, v in networks.items() if v})}


def test_alike_hosts_are_right() -> None:
    assert all(entry.ok for entry in check({}).values())


@pytest.mark.parametrize(
    ("odd", "name", "shown", "needed"),
    [
        ({"python": "3.10.1"}, "python", "3.10.1", True),
        ({"packages": {"torch": "2.1.0"}}, "torch", "2.1.0", True),
        ({"packages": {}}, "torch", "missing", True),
        ({"build": "other"}, "horovod build", "other", True),
        ({"build": None}, "horovod build", "none", True),
        ({"hvdlm": "old"}, "hvdlm", "old", True),
        ({"clock_seconds": -7.25}, "clock", "-7.2 s", False),
        ({"memory_bytes": 2**30}, "free memory", "1.0 GB", False),
        ({"shm_bytes": 2**20}, "/dev/shm", "0.0 GB", False),
        ({"cores": 4}, "cores", "4", False),
        ("host b: ssh ended with code 255.", "reachable", "host b: ssh ended with code 255.", True),
    ],
)
def test_the_odd_one_out_is_named(odd: Any, name: str, shown: str, needed: bool) -> None:
    found = check(odd)
    assert found[name].odd == ("b",) and found[name].found["b"] == shown and found[name].needed is needed
    assert found[name].hint
    assert [entry.name for entry in found.values() if not entry.ok] == [name]


def test_names_that_lead_elsewhere_and_a_host_outside_the_network() -> None:
    found = check({}, names={"c": {"a": "127.0.1.1", "b": None, "c": "10.0.0.3"}})
    assert found["names"].odd == ("c",) and found["names"].found["c"] == "a is 127.0.1.1, b is None"
    found = check({}, networks={"b": ""})
    assert found["network"].odd == ("b",) and found["network"].needed


def test_slow_pairs() -> None:
    pairs = [Pair("a", "b", 100e6, 1e-4), Pair("b", "a", 100e6, 1e-4), Pair("a", "c", 12e6, 1e-3)]
    broken = Pair("c", "a", 0.0, 0.0, "timed out")
    assert slow_pairs([*pairs, broken]) == [pairs[2], broken]


def test_a_measurement_needs_the_secret() -> None:
    listening = answer({"probe": "listen", "address": "127.0.0.1"})
    with socket.create_connection(("127.0.0.1", listening["port"])) as stranger:
        stranger.sendall(b"x" * 32)
        assert stranger.recv(10) == b""
    measured = answer({"probe": "measure", "address": "127.0.0.1", "seconds": 0.05, **listening})
    assert measured["bytes_per_second"] > 1e6 and 0 < measured["latency_seconds"] < 1
    assert "error" in answer({"probe": "measure", "address": "127.0.0.1", "seconds": 0.05, **listening})


def test_facts_of_this_host() -> None:
    found = facts_of_the_host("/no/such")
    assert found["host"] == socket.gethostname() and found["cores"] >= 1 and found["memory_bytes"] > 2**20
    assert found["packages"] == {} and found["build"] is None


def test_names() -> None:
    assert parse_names("a, b:4,c") == ("a", "b", "c")
    for text in ("a b", "-oProxyCommand=x", "$(id)", "a;b", "", "a,,b", "a'"):
        with pytest.raises(ConfigError, match="is no host"):
            parse_names(text)


LO, H1, H2 = {"lo": "127.0.0.1/8"}, {"eth0": "10.0.0.1/24"}, {"ens5": "10.0.0.2/24", "ib0": "10.9.0.2/16"}


def test_networks() -> None:
    assert choose_network([], LO | H1, {}).here == ("lo",)
    chosen = choose_network([], LO | H1, {"h2": LO | H2})
    assert (chosen.here, chosen.others, chosen.cidr) == (("eth0",), {"h2": ("ens5",)}, "10.0.0.0/24")
    # Through a router: the one that is not loopback, if there is only one.
    routed = choose_network([], LO | H1, {"h2": LO | {"eth7": "10.5.0.2/24"}}, towards="eth0")
    assert routed.others == {"h2": ("eth7",)}
    with pytest.raises(ConfigError, match=r"(?s)no network .*this host: eth0 10\.0\.0\.1.*HINT: --network-interfaces"):
        choose_network([], H1, {"h2": {"a": "10.5.0.2/24", "b": "10.6.0.2/24"}}, towards="eth0")
    with pytest.raises(ConfigError, match=r"'eth0' is no interface with an IPv4 address on h2; there are: ens5"):
        choose_network(["eth0"], LO | H1, {"h2": H2})
