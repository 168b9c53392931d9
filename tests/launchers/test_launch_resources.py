"""What a worker may take of its host: memory, priority, threads."""

from __future__ import annotations

import pytest

BOTH = pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
HOG = """
import os, time
rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
def hog():
    held = []
    while True:
        held.append(b"x" * (8 << 20))
        time.sleep(0.02)
if rank == 1:
    hog()
time.sleep(100)
"""


@BOTH
def test_too_much_memory_ends_the_job_and_names_the_worker(jobs, controller):
    result = jobs.run("-np", "2", controller, "--max-memory", "200M", "--run-dir", "run", jobs.script(HOG), limit=40)
    assert result.code == 134, result.err
    last = result.err[result.err.index("hvdlm: rank 1 on") :]
    assert "more than the 200 MiB of --max-memory, and was ended" in last
    assert "HINT: a smaller batch, more workers, or a larger --max-memory" in last
    where = [line.rpartition("/")[2] for line in last.rstrip().splitlines()[-2:]]
    assert where[0] in [f'script.py", line {line} in hog' for line in (6, 7, 8)]
    assert where[1] == 'script.py", line 10 in <module>'
    assert jobs.left() == {}


SHARED = """
import mmap, os, time
held = b"x" * (100 << 20)
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        sum(held[::4096])
        time.sleep(1)
        os._exit(0)
    children.append(pid)
with open("big", "wb") as file:
    file.truncate(300 << 20)
with open("big", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
    total = sum(view[::4096])
    for pid in children:
        os.waitpid(pid, 0)
print("done", total)
"""


def test_shared_memory_counts_once_and_files_do_not(jobs):
    result = jobs.run("-np", "1", "--gloo", "--max-memory", "250M", "--run-dir", "run", jobs.script(SHARED))
    assert result.code == 0 and result.out == "done 0\n", result.err


@BOTH
def test_the_memory_of_what_a_worker_started_counts(jobs, controller):
    script = jobs.script(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)\\nimport time\\ntime.sleep(60)'])\n"
    )
    result = jobs.run("-np", "1", controller, "--max-memory", "300M", "--run-dir", "run", script, limit=40)
    assert result.code == 134 and "MiB of memory, more than the 300 MiB" in result.err, result.err
    assert jobs.left() == {}


@BOTH
def test_priority(jobs, controller):
    script = jobs.script("import os\nprint('nice', os.nice(0), open('/proc/self/oom_score_adj').read())\n")
    before = jobs.run("-np", "1", controller, "--run-dir", "run", script)
    after = jobs.run("-np", "2", controller, "--nice", "7", "--max-memory", "1G", "--run-dir", "run2", script)
    (base,) = [int(line.split()[1]) for line in before.out.splitlines() if line.startswith("nice")]
    found = [line.split()[2:] for line in after.out.splitlines() if "nice" in line]
    assert found == [[str(base + 7), "500"]] * 2, after.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-memory", "much"], "--max-memory: 'much' is no size"),
        (["--nice", "20"], "--nice 20: allowed is an integer of at least 0 and at most 19"),
        (["--launcher", "debug", "--max-memory", "1G"], "HINT: leave out --max-memory"),
        (["--launcher", "horovodrun", "--nice", "1"], "HINT: leave out --nice"),
    ],
)
def test_what_is_refused(jobs, flags, said):
    result = jobs.run("-np", "1", *flags, jobs.script("print('not reached')\n"))
    assert result.code == 2 and said in result.err and "not reached" not in result.out


def test_an_elastic_job_tells_which_worker_it_was(jobs):
    """Its place rests, and the others go on; here there are none, so that the job ends."""
    script = jobs.script(HOG.replace("if rank == 1:", "if True:"))
    flags = ["--min-np", "1", "-H", "localhost:1", "--max-memory", "150M", "--reset-limit", "0"]
    result = jobs.run(*flags, "--blacklist-cooldown-range", "1", "1", "--run-dir", "run", script, limit=60)
    assert result.code != 0 and "hvdlm: worker 0 on localhost[0] was lost (used " in result.err, result.err
    assert "MiB of memory, more than --max-memory, 150 MiB)" in result.err
    assert "more than the 150 MiB of --max-memory, and was ended" in result.err
    assert jobs.left() == {}
