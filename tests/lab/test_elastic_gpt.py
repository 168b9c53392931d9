"""The GPT example as an elastic job on two hosts, two slots on each: one is cut off, and comes back."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.elastic.jobs import Job
from tests.lab.hostile import attack
from tests.lab.hosts import inside, lab

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
SCRIPT = str(Path(__file__).with_name("held_gpt.py"))


def test_a_host_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "slow").touch()
    with lab(tmp_path, second_network=True) as hosts:
        first, second = hosts.hosts
        flags = ["--min-np", "1", "--max-np", "4", "-H", "h1:2,h2:2", "--network-interfaces", "eth0"]
        flags += ["--commit-every", "2", "--blacklist-cooldown-range", "3", "3"]
        with Job(tmp_path / "job", SCRIPT, flags, prefix=inside(first.namespace, first.name)) as job:
            assert job.generation(1)["size"] == 4
            job.committed(2)
            # The rendezvous, the driver's line to its workers, and where rank 0 watches for some that hang.
            assert attack(hosts, tmp_path / "CREATED") >= 3
            job.committed(job.events()[-1].get("step", 0) + 4)
            subprocess.run(["ip", "-n", second.namespace, "link", "set", "eth0", "down"], check=True, timeout=30)
            small = job.until(lambda e: e["event"] == "generation" and e["size"] == 2)
            assert set(small["members"].values()) == {"h1[0]", "h1[1]"}
            subprocess.run(["ip", "-n", second.namespace, "link", "set", "eth0", "up"], check=True, timeout=30)
            after = small["generation"]
            job.until(lambda e: e["event"] == "generation" and e["generation"] > after and e["size"] == 4)
            (tmp_path / "job" / "slow").unlink()
            ended = job.end()
        assert ended.code == 0, ended.output[-4000:]
        summary = ended.summary
        assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
        assert summary["replicas_identical"] is True and summary["world_size"] == 4
        assert "line of the job: refused from 10.77.0.2" in ended.output
        assert summary["resets"] >= 2 and not (tmp_path / "CREATED").exists()
        end = time.monotonic() + 60
        while hosts.processes() and time.monotonic() < end:
            time.sleep(0.2)
        assert not hosts.processes()
