"""Keras jobs whose workers are lost, leave and come while they train."""

from __future__ import annotations

import pytest

from tests.elastic.check import complaint
from tests.elastic.jobs import Job, undisturbed

pytestmark = pytest.mark.timeout(400)  # a loaded machine takes long to start processes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The ends of undisturbed trainings in one process, by style."""
    ends = {}

    def of(style):
        if style not in ends:
            # A run that keeps its state draws the order of a pipeline from the number of the pass.
            env = {"STYLE": style, "HVDLM_CHECKPOINT_DIR": "checkpoints"}
            ends[style] = undisturbed(tmp_path_factory.mktemp("plain"), "train_keras.py", env)
        return ends[style]

    return of


def sizes(ended):
    return [event["size"] for event in ended.of("generation")]


@pytest.mark.parametrize(("style", "worker"), [("fit", 0), ("loop", 1)])
def test_a_killed_worker_costs_no_sample(directory, plain, style, worker):
    fault = {"worker": worker, "at": "step", "how": "kill", "number": 32}
    with Job(directory, "train_keras.py", faults=[fault], env={"STYLE": style}) as job:
        ended = job.end()
    found = complaint(ended, plain(style), counted=style == "fit")
    assert found is None, found
    assert [event["worker"] for event in ended.of("lost")] == [worker]
    assert sizes(ended)[:2] == [2, 1]
    # The newest commit was at step 28, in the second epoch; step 32 was not completed.
    assert ended.summary["lost_steps"] == 3


def test_a_worker_comes_within_an_epoch_and_another_is_told_to_leave(directory, plain):
    hosts = directory / "hosts"
    hosts.write_text("localhost slots=1\n")
    (directory / "slow").touch()
    with Job(directory, "train_keras.py", ("--min-np", "1", "--hostfile", "hosts"), env={"COMMIT": "2"}) as job:
        job.committed(2)
        hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        assert job.generation(2)["size"] == 2
        reached = job.until(lambda e: e["event"] == "restore")["step"]
        job.committed(reached + 2)
        job.signal(0, 15)
        assert job.generation(3)["members"].keys() == {"1"}
        (directory / "slow").unlink()
        ended = job.end()
    found = complaint(ended, plain("fit"))
    assert found is None, found
    assert ended.summary["lost_steps"] == ended.summary["samples_retrained"] == 0
    assert [event["worker"] for event in ended.of("left")] == [0]
    assert not ended.of("lost")
