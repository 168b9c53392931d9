"""PyTorch jobs whose workers are lost, leave and come while they train."""

from __future__ import annotations

import signal

import pytest

from tests.elastic.jobs import Job
from tests.elastic.schedules import play, schedule

pytestmark = pytest.mark.timeout(400)  # a loaded machine takes long to start processes

TWO = ("--min-np", "1", "-H", "localhost:2")


def fault(worker, at, how, number=0):
    return {"worker": worker, "at": at, "how": how, "number": number}


@pytest.mark.parametrize("worker", [0, 1])
def test_a_killed_worker_costs_no_sample(directory, check, worker):
    with Job(directory, faults=[fault(worker, "step", "kill", 32)]) as job:
        ended = job.end()
    check(ended)
    assert ended.of("lost")[0]["worker"] == worker
    sizes = [event["size"] for event in ended.of("generation")]
    assert sizes[:2] == [2, 1]
    assert ended.summary["resets"] == len(sizes) - 1
    # The newest commit was at step 28; step 32 was not completed.
    assert ended.summary["lost_steps"] == 3
    assert 0 < ended.summary["recovery_seconds"] < 30


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([fault(1, "step", "raise", 20)], id="exception"),
        pytest.param([fault(0, "commit", "kill", 21)], id="killed in a commit"),
        pytest.param([fault(1, "start", "exit")], id="at the start"),
        pytest.param([fault(1, "step", "kill", 20), fault(0, "recovery", "kill", 2)], id="all but one, in a recovery"),
    ],
)
def test_failures_at_other_places(directory, check, faults):
    flags = ("--min-np", "1", "-H", "localhost:2,127.0.0.1:1") if len(faults) > 1 else TWO
    with Job(directory, flags=flags, faults=faults) as job:
        ended = job.end()
    check(ended)
    assert {event["worker"] for event in ended.of("lost")} >= {one["worker"] for one in faults}


def test_a_stopped_process_is_found_and_replaced(directory, check):
    with Job(directory, flags=(*TWO, "--hang-timeout", "4"), faults=[fault(1, "step", "stop", 20)]) as job:
        ended = job.end()
    check(ended)
    assert ended.of("hung")[0]["worker"] == 1


@pytest.mark.parametrize("how", ["term", "usr1"])
def test_a_worker_that_is_told_to_leave_loses_no_step(directory, check, how):
    with Job(directory, faults=[fault(1, "step", how, 20)], env={"COMMIT": "1000"}) as job:
        ended = job.end()
    check(ended)
    assert ended.of("left")[0]["worker"] == 1
    assert not ended.of("lost")
    assert ended.summary["lost_steps"] == ended.summary["samples_retrained"] == 0


def test_hosts_are_added_removed_and_replaced_in_a_live_file(directory, check):
    hosts = directory / "hosts"
    hosts.write_text("localhost slots=1\n")
    (directory / "slow").touch()
    with Job(directory, flags=("--min-np", "1", "--hostfile", "hosts"), env={"COMMIT": "2"}) as job:
        job.committed(2)
        hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        assert job.generation(2)["size"] == 2
        hosts.write_text("127.0.0.1 slots=1\n")
        assert list(job.generation(3)["members"].values()) == ["127.0.0.1[0]"]
        (directory / "slow").unlink()
        ended = job.end()
    check(ended)
    assert ended.summary["lost_steps"] == 0
    assert [event["worker"] for event in ended.of("left")] == [0]


def test_below_the_minimum_it_waits_writes_the_state_and_ends_with_a_code_of_its_own(directory, check):
    flags = ("--min-np", "2", "-H", "localhost:2", "--elastic-timeout", "2", "--blacklist-cooldown-range", "60", "60")
    store = ("--checkpoint-dir", "checkpoints", "--checkpoint-every", "1000")
    with Job(directory, flags=(*flags, *store), faults=[fault(1, "step", "kill", 20)]) as job:
        ended = job.end()
    assert ended.code == 75
    assert "1 of at least 2 workers are ready" in ended.output and "HINT: " in ended.output
    assert ended.of("below_minimum")
    # The newest commit was at step 14: it is all there is, and another job goes on from it.
    assert [event["step"] for event in ended.of("checkpoint")] == [14]
    with Job(directory, flags=("--min-np", "1", "-H", "localhost:1", *store, "--resume")) as job:
        ended = job.end()
    check(ended)
    assert [event["step"] for event in ended.of("restore")] == [14]


def test_a_script_that_fails_everywhere_ends_the_job_with_its_traceback(directory):
    faults = [fault(0, "step", "raise", 5), fault(1, "step", "raise", 5)]
    flags = (*TWO, "--blacklist-cooldown-range", "30", "60")
    with Job(directory, flags=flags, faults=faults, env={"ALL_MAY_FAIL": "1"}) as job:
        ended = job.end()
    assert ended.code == 1
    assert "RuntimeError: a fault of the test" in ended.output.splitlines()[-1]


def test_ctrl_c_ends_all_workers(directory):
    with Job(directory) as job:
        job.committed(7)
        job.process.send_signal(signal.SIGINT)
        ended = job.end(60)
    assert ended.code == 128 + signal.SIGINT


@pytest.mark.parametrize("seed", [7, 15])
def test_random_schedules(directory, check, seed):
    """A sample of what ``tests/perf/elastic_faults.py`` plays."""
    check(play(schedule(seed), directory, "train_torch.py"))
