"""Jobs whose environment and arguments hold secrets: nothing that is shown or kept has them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

TOKEN, WORD = "hf_17a9c3e5d0b1f6", "pa55word"
SCRIPT = """
import os, sys, time
print("env", os.environ["HF_TOKEN"], sys.argv)
sys.stdout.write(os.environ["HF_TOKEN"][:7]); sys.stdout.flush(); time.sleep(0.2); print(os.environ["HF_TOKEN"][7:])
print("proxy", os.environ["HTTPS_PROXY"], file=sys.stderr)
print("rendezvous", os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"))
print("prompt: ", end="hf"); sys.stdout.flush()
if "fail" in sys.argv:
    raise ValueError("no access with " + os.environ["HF_TOKEN"])
"""


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
@pytest.mark.parametrize("end", ["fail", "well"])
def test_nothing_shows_a_secret(jobs, controller, end):
    script = jobs.script(SCRIPT)
    environment = {"HF_TOKEN": TOKEN, "HTTPS_PROXY": f"http://me:{WORD}@proxy:3128"}
    flags = ["-np", "1", controller, "--verbose", "--run-dir", "run", "--output-filename", "out"]
    before = os.umask(0)
    try:
        result = jobs.run(*flags, script, "--api-key", "key-0815-4711", end, **environment)
    finally:
        os.umask(before)
    assert (result.code == 0) == (end == "well"), result.err
    assert "env *** ['script.py', '--api-key', '***'" in result.out
    assert "\n***\n" in result.out and result.out.endswith("prompt: hf\n")
    assert "proxy http://me:***@proxy:3128" in result.err
    if end == "fail":
        assert "ValueError: no access with ***" in result.err
    files = [path for path in jobs.directory.rglob("*") if path.is_file() and path.name != script]
    assert {path.name for path in files} >= {"rank-0.out.log", "rank-0.err.log", "stdout", "stderr"}
    for text in (result.out, result.err, *(path.read_text() for path in files)):
        assert TOKEN not in text and TOKEN[7:] not in text and WORD not in text and "key-0815" not in text
    run = jobs.directory / "run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in run.rglob("*"))


def test_the_key_of_the_rendezvous_is_not_shown(jobs):
    script = jobs.script(SCRIPT)
    result = jobs.run("-np", "1", "--gloo", "--run-dir", "run", script, HF_TOKEN=TOKEN, HTTPS_PROXY="http://proxy")
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("rendezvous"))
    assert line.endswith("/***")


def test_a_directory_that_was_there_keeps_its_mode(jobs):
    (jobs.directory / "mine").mkdir()
    (jobs.directory / "mine").chmod(0o755)
    result = jobs.run("-np", "1", "--gloo", "--run-dir", "mine", jobs.script("print(1)\n"))
    assert result.code == 0
    assert stat.S_IMODE((jobs.directory / "mine").stat().st_mode) == 0o755
    assert stat.S_IMODE((jobs.directory / "mine" / "logs").stat().st_mode) == 0o700


def test_print_config(jobs):
    (jobs.directory / "c.yaml").write_text("checkpoint_dir: s3://me:pa55word@host/bucket\n")
    flags = ["-np", "1", "--print-config", "--config-file", "c.yaml", f"--mpi-args=-x MY_TOKEN={TOKEN}"]
    result = jobs.run(*flags, "-H", "h1:1", MY_TOKEN=TOKEN)
    assert result.code == 0, result.err
    assert "s3://me:***@host/bucket" in result.out and "-x MY_TOKEN=***" in result.out
    assert WORD not in result.out and TOKEN not in result.out


def test_errors_of_the_launcher(jobs):
    (jobs.directory / "c.yaml").write_text(f"checkpoint_dirs: s3://me:{WORD}@host/bucket\n")
    result = jobs.run("-np", "1", "--config-file", "c.yaml", "x.py")
    assert result.code == 2 and WORD not in result.err
    result = jobs.run("-np", "1", f"{TOKEN}.py", A_TOKEN=TOKEN)
    assert result.code == 2 and "there is no script or program '***.py'" in result.err


def test_the_logs_of_a_run_have_the_secret_of_nobody(jobs):
    """Two workers, so that prefixes and merging come after the masking."""
    script = jobs.script("import os\nfor _ in range(2000): print('x' * 30, os.environ['A_SECRET'], 'y' * 20)\n")
    result = jobs.run("-np", "2", "--gloo", "--run-dir", "run", script, A_SECRET=TOKEN)
    assert result.code == 0 and result.out.count(" *** ") == 4000 and TOKEN not in result.out
    logs = b"".join(Path(path).read_bytes() for path in (jobs.directory / "run" / "logs").iterdir())
    assert logs.count(b" *** ") == 4000 and TOKEN.encode() not in logs
