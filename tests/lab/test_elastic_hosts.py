"""An elastic job on two hosts, one of which is cut off from the network."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.elastic.check import complaint
from tests.elastic.jobs import Job, undisturbed
from tests.lab.hosts import inside, lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_the_others_go_on_when_a_host_is_cut_off(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    wanted = undisturbed(plain, "train_torch.py")
    (tmp_path / "job").mkdir()
    with lab(tmp_path) as hosts:
        first, second = hosts.hosts
        flags = ("--min-np", "1", "-H", "h1:1,h2:1", "--blacklist-cooldown-range", "60", "60")
        flags += ("--pass-env", "PAUSE,COMMIT,FAULTS")
        prefix = inside(first.namespace, first.name)
        (tmp_path / "job" / "slow").touch()
        with Job(tmp_path / "job", flags=flags, prefix=prefix, env={"COMMIT": "2"}) as job:
            assert job.generation(1)["size"] == 2
            job.committed(2)
            subprocess.run(["ip", "-n", second.namespace, "link", "set", "eth0", "down"], check=True, timeout=30)
            assert job.generation(2)["members"] == {"0": "h1[0]"}
            (tmp_path / "job" / "slow").unlink()
            ended = job.end()
        found = complaint(ended, wanted)
        assert found is None, found
        assert ended.of("lost")[0]["place"] == "h2[0]"
        assert ended.summary["recovery_seconds"] < 60
        # What ran on the host that is cut off ends by itself: it hears nothing from the launcher any more.
        end = time.monotonic() + 60
        while hosts.processes() and time.monotonic() < end:
            time.sleep(0.2)
        assert not hosts.processes()
