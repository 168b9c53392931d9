"""How workers of other launchers find each other: the launcher's store, a rendezvous on rank 0, the interface."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from hvdlm import network
from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.errors import LaunchError
from hvdlm.launchers.meeting import meet
from hvdlm.network import chosen_address
from hvdlm.pmi import Pmi


class Launcher:
    """The other end of the connections: a store and a barrier, as MPICH's mpiexec has them."""

    def __init__(self, size: int) -> None:
        self._values: dict[str, str] = {}
        self._barrier = threading.Barrier(size)
        self.longest = 0
        self.finished: list[int] = []

    def serve(self, connection: socket.socket, rank: int) -> None:
        """Answer one process to its end."""
        with connection, connection.makefile("rw", newline="\n") as file:
            for line in file:
                words = dict(word.split("=", 1) for word in line.split())
                file.write(self._answer(words, rank) + "\n")
                file.flush()

    def _answer(self, words: dict[str, str], rank: int) -> str:
        if words["cmd"] == "init":
            return "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1"
        if words["cmd"] == "get_my_kvsname":
            return "cmd=my_kvsname rc=0 kvsname=kvs_1_0"
        if words["cmd"] == "put":
            self.longest = max(self.longest, len(words["value"]))
            self._values[words["key"]] = words["value"]
            return "cmd=put_result rc=0"
        if words["cmd"] == "barrier_in":
            self._barrier.wait(20)
            return "cmd=barrier_out"
        if words["cmd"] == "get":
            found = self._values.get(words["key"])
            return "cmd=get_result rc=1 msg=not_found" if found is None else f"cmd=get_result rc=0 value={found}"
        self.finished.append(rank)
        return "cmd=finalize_ack rc=0"


def connect(launcher: Launcher, rank: int, size: int) -> tuple[Pmi, Callable[[], None]]:
    here, there = socket.socketpair()
    thread = threading.Thread(target=launcher.serve, args=(there, rank))
    thread.start()
    made = Pmi(here.fileno(), rank, size)
    here.close()

    def end() -> None:
        made._finish()
        thread.join(10)

    return made, end


def test_the_store_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atexit.register", lambda _: None)
    launcher = Launcher(3)
    texts = ["", "short words = here", "ünï " * 400]

    def work(collectives: ThreadCollectives) -> None:
        pmi, end = connect(launcher, collectives.rank, 3)
        assert pmi.allgather(texts[collectives.rank]) == texts
        assert pmi.allgather(str(collectives.rank)) == ["0", "1", "2"], "the second round is another one"
        end()

    FakeJob(3).run(work)
    assert launcher.longest <= 255 and sorted(launcher.finished) == [0, 1, 2]


@pytest.mark.parametrize("answer", [b"", b"cmd=response_to_init rc=1\n", b"\xff\xfe nonsense\n", b"HTTP/1.1 200 OK\n"])
def test_what_is_no_launcher(answer: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(answer)
        if not answer:
            there.shutdown(socket.SHUT_RDWR)
        with pytest.raises(LaunchError, match="PMI"):
            Pmi(here.fileno(), 0, 1)
    with pytest.raises(LaunchError, match="PMI_FD=9999"):
        Pmi(9999, 0, 1)


def test_they_meet_at_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", kept.append)

    def work(collectives: ThreadCollectives) -> dict[str, str]:
        def allgather(text: str) -> list[str]:
            return [each.decode() for each in collectives.allgather(text.encode())]

        return meet(allgather, collectives.rank)

    found = FakeJob(2).run(work)
    assert [env["HOROVOD_RANK"] for env in found] == ["0", "1"]
    assert {env["HOROVOD_LOCAL_SIZE"] for env in found} == {"2"}
    assert {env["HOROVOD_GLOO_IFACE"] for env in found} == {"lo"}, "one host: nobody else needs to reach it"
    (address,) = {env["HOROVOD_GLOO_RENDEZVOUS_ADDR"] for env in found}
    host, _, rest = address.partition(":")
    assert host == "127.0.0.1"
    socket.create_connection((host, int(rest.partition("/")[0])), 5).close()
    kept[0]()

    def wrong(collectives: ThreadCollectives) -> str:
        def allgather(text: str) -> list[str]:
            return [each.decode() for each in collectives.allgather(text.encode())]

        with pytest.raises(LaunchError, match=r"rank 0 could not open .*'nowhere' is no interface") as caught:
            meet(allgather, collectives.rank, ["nowhere"])
        return str(caught.value)

    assert len(FakeJob(2).run(wrong)) == 2, "the others do not wait for ever"


def test_the_interface_to_listen_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        network, "interfaces", lambda: {"lo": "127.0.0.1/8", "eth0": "10.1.0.7/24", "eth1": "10.2.0.7/24"}
    )
    assert chosen_address(["eth1", "eth0"]) == "10.2.0.7"
    assert chosen_address(["eth9"]) is None
    assert chosen_address([], "10.1.0.0/24") == "10.1.0.7" and chosen_address([], "10.3.0.0/24") is None
    for named, wanted in (("10.1.0.7", "10.1.0.7"), ("127.0.1.1", None), ("127.0.0.1", None), ("10.9.9.9", None)):
        monkeypatch.setattr(socket, "gethostbyname", lambda _, named=named: named)
        assert chosen_address([]) == wanted
