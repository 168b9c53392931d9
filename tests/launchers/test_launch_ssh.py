"""Jobs on another host, without one: `ssh` is a script of ours that runs the command here, and may misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdlm import wire
from hvdlm.errors import ConfigError
from hvdlm.launchers.passing import check_patterns, held_back, passed_on
from hvdlm.launchers.ssh import Ssh, agent_command, explain_ssh
from hvdlm.secrets import Masker, is_secret_name, masked, secret_values

# The words before "--" are options; then come the host and the command, which the host's shell reads.
FAKE = """#!/bin/sh
printf '%s\\n' "$@" >> "$SSH_WORDS"
while [ "$1" != -- ]; do shift; done
HOST=$2; COMMAND=$3
"""
RUN = 'exec env -i HOME=/home/there PATH="$PATH" LAUNCH_TEST_MARK="$LAUNCH_TEST_MARK" HERE=there sh -c "$COMMAND"\n'


@pytest.fixture
def ssh(jobs, monkeypatch):
    """Installs an ssh with this body."""

    def install(body: str = RUN) -> Path:
        program = jobs.directory / "bin" / "ssh"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE + body)
        program.chmod(0o755)
        words = jobs.directory / "words"
        jobs.environment |= {"PATH": f"{program.parent}:{jobs.environment['PATH']}", "SSH_WORDS": str(words)}
        return words

    return install


SHOW = """
import json, os, sys
rank = os.environ["HOROVOD_RANK"]
names = ("HERE", "HOME", "MY_DATA", "MY_TOKEN", "OTHER", "BIG", "OMP_NUM_THREADS", "HOROVOD_HOSTNAME")
found = {name: os.environ.get(name, "")[:40] for name in names} | {"cwd": os.getcwd(), "argv": sys.argv[1:]}
found["big"] = sum(len(value) for name, value in os.environ.items() if name.startswith("BIG"))
open(f"rank-{rank}.json", "w").write(json.dumps(found))
print("line of", rank)
"""
# Not this machine: nothing of that name can be resolved.
TWO = ("-np", "2", "-H", "localhost:1,host-b.invalid:1", "--gloo", "--network-interfaces", "lo", "--run-dir", "run")


def test_environment_output_and_logs(jobs, ssh):
    words = ssh()
    big = {f"BIG_{i}": "x" * 50_000 for i in range(4)}
    arguments = ["a b", "it's", "$(touch HACKED)", "--", "-x", "ü\n", ""]
    result = jobs.run(
        *TWO, "--pass-env", "MY_DATA,BIG*,MY_TOK*", jobs.script(SHOW), *arguments,
        MY_DATA="$(touch HACKED) 'd'", MY_TOKEN="secret-value", OTHER="o", OMP_NUM_THREADS="3", **big,
    )  # fmt: skip
    assert result.code == 0, result.err
    here, there = (json.loads((jobs.directory / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert there["argv"] == here["argv"] == arguments and there["cwd"] == here["cwd"]
    assert (there["HERE"], there["HOME"]) == ("there", "/home/there"), "what belongs to the host stays"
    assert there["MY_DATA"] == "$(touch HACKED) 'd'" and there["OMP_NUM_THREADS"] == "3"
    assert there["big"] == 200_000 and there["HOROVOD_HOSTNAME"] == "host-b.invalid"
    # A pattern does not pass a secret; only its full name does.
    assert (there["MY_TOKEN"], there["OTHER"]) == ("", "") and here["MY_TOKEN"] == "secret-value"
    assert "not passed to other hosts: " in result.err and "--pass-env NAME" in result.err
    assert {"[0] line of 0", "[1] line of 1"} <= set(result.out.splitlines())
    assert (jobs.directory / "run" / "logs" / "rank-1.out.log").read_text() == "line of 1\n"
    assert os.stat(jobs.directory / "run" / "logs").st_mode & 0o777 == 0o700
    said = words.read_text()
    assert "BatchMode=yes" in said and "StrictHostKeyChecking=accept-new" in said
    assert not any(text in said for text in ("MY_DATA", "secret-value", "script.py", "xxxx", "HOROVOD"))
    assert not (jobs.directory / "HACKED").exists()


def test_a_secret_that_is_named_is_passed(jobs, ssh):
    ssh()
    assert jobs.run(*TWO, "--pass-env", "MY_TOKEN", jobs.script(SHOW), MY_TOKEN="secret-value").code == 0
    assert json.loads((jobs.directory / "rank-1.json").read_text())["MY_TOKEN"] == "secret-value"


def test_banner_before_the_agent(jobs, ssh):
    ssh("echo Welcome to the cluster; printf 'no newline'; echo 'a note' >&2\n" + RUN)
    result = jobs.run(*TWO, jobs.script(SHOW))
    assert result.code == 0, result.err
    assert "Welcome" not in result.out


@pytest.mark.parametrize(
    ("body", "said", "hint"),
    [
        ("echo 'root@h: Permission denied (publickey,password).' >&2; exit 255\n", "code 255", "ssh-copy-id"),
        ("echo 'Host key verification failed.' >&2; exit 255\n", "verification failed", "ssh-keygen -R"),
        ("exit 0\n", "ended with code 0", "ssh -o BatchMode=yes"),
        ("echo 'sh: 1: exec: python: not found' >&2; exit 127\n", "not found", "same Python and hvdlm"),
        ("sleep 60\n", "no answer over ssh within 2 s", "--start-timeout"),
        ("yes | head -c 3000000; sleep 60\n", "no agent answered", "ssh -o BatchMode=yes"),
    ],
)
def test_ssh_that_does_not_bring_an_agent(jobs, ssh, body, said, hint):
    ssh(body)
    result = jobs.run(*TWO, "--start-timeout", "2", jobs.script(SHOW))
    assert result.code == 2
    assert "host host-b.invalid" in result.err and said in result.err and "HINT: " in result.err and hint in result.err
    assert not (jobs.directory / "rank-0.json").exists()


def test_what_speaks_another_language(jobs, ssh):
    greeting = "".join(f"\\{byte:03o}" for byte in wire.AGENT_GREETING)
    ssh(f"printf '{greeting}R\\377\\377\\377\\377garbage'; cat\n")
    result = jobs.run(*TWO, jobs.script(SHOW))
    assert result.code == 2 and "host host-b.invalid" in result.err and "no agent of this version" in result.err


def test_a_directory_that_is_not_there(jobs, ssh):
    if os.geteuid() != 0:
        pytest.skip("hiding a directory needs root")
    hidden = jobs.directory / "hidden"
    hidden.mkdir()
    jobs.environment |= {"PWD_HERE": str(hidden.parent)}
    ssh('exec unshare --mount sh -c \'mount -t tmpfs none "$0" && exec sh -c "$1"\' "$PWD_HERE" "$COMMAND"\n')
    argv = [sys.executable, "-m", "hvdlm", "run", *TWO, "-m", "this"]
    process = subprocess.Popen(
        argv, cwd=hidden, env=jobs.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    result = jobs.finish(process)
    assert result.code == 2 and f"the directory {str(hidden)!r} does not exist" in result.err, result.err


FAIL = """
import os, signal, sys, time
rank = int(os.environ["HOROVOD_RANK"])
open(f"up-{rank}", "w").close()
if rank == 1 and sys.argv[1] == "raise":
    raise ValueError("boom over there")
if rank == 1 and sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "supervisor" and rank == 1:
    os.kill(os.getppid(), 9)
time.sleep(100)
"""


@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("kill", 137), ("supervisor", 137)])
def test_a_worker_there_fails(jobs, ssh, how, code):
    ssh()
    result = jobs.run(*TWO, jobs.script(FAIL), how)
    assert result.code == code, result.err
    assert "rank 1 on" in result.err
    assert how != "raise" or result.err.rstrip().endswith("ValueError: boom over there")


@pytest.mark.parametrize("who", ["agent", "ssh", "launcher", "interrupt"])
def test_whoever_goes_away_nothing_is_left(jobs, ssh, who):
    ssh()
    process = jobs.start(*TWO, jobs.script(FAIL), "wait")
    jobs.wait_until(lambda: all((jobs.directory / f"up-{rank}").exists() for rank in (0, 1)))
    if who == "interrupt":
        process.send_signal(signal.SIGINT)
    elif who == "launcher":
        process.kill()
    else:  # the shell that is ssh becomes the agent: to end one is to end the other
        agent = next(pid for pid, line in jobs.left().items() if "hvdlm.agent" in line)
        os.kill(agent, signal.SIGKILL if who == "agent" else signal.SIGTERM)
    started = time.monotonic()
    if who == "launcher":
        process.wait(5)
    else:
        result = jobs.finish(process, 20)
        assert result.code == (130 if who == "interrupt" else 255), result.err
        assert who == "interrupt" or "connection to the host is lost" in result.err
    jobs.wait_until(lambda: not jobs.left(), limit=10)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "hosts", ["a b:1", "a;touch HACKED:1", "$(touch HACKED):1", "`id`:1", "'a':1", '"a":1', "-oProxyCommand=x:1", "a:x"]
)
def test_hostile_host_names(jobs, ssh, hosts):
    words = ssh()
    result = jobs.run("-np", "1", "-H", hosts, jobs.script(SHOW))
    assert result.code == 2 and "is no host" in result.err and "HINT: " in result.err
    (jobs.directory / "hosts").write_text(hosts.replace(":", " slots=") + "\n")
    result = jobs.run("-np", "1", "--hostfile", "hosts", jobs.script(SHOW))
    assert result.code == 2 and "HINT: " in result.err
    assert not words.exists() and not (jobs.directory / "HACKED").exists()


def test_the_ssh_command():
    command = agent_command("h", Ssh(port=22, identity_file="/my key", options=("StrictHostKeyChecking=yes",)))
    at = command.index("StrictHostKeyChecking=yes")
    assert at < command.index("StrictHostKeyChecking=accept-new"), "ssh takes the first"
    assert command[-3:-1] == ["--", "h"] and command[-1].startswith("exec ") and "/my key" in command
    assert "HINT" in str(explain_ssh("h", "", 255, 1.0))


def test_what_is_passed():
    environment = {"PATH": "p", "HF_HOME": "h", "HF_TOKEN": "t", "X": "1", "BASH_FUNC_f%%": "()", "HOME": "/r"}
    assert passed_on(environment) == {"PATH": "p", "HF_HOME": "h"}
    assert passed_on(environment, ["*"]) == {"PATH": "p", "HF_HOME": "h", "X": "1", "HOME": "/r"}
    assert held_back(environment) == ["HF_TOKEN", "X"]
    assert check_patterns(["A,B*", "C"]) == ("A", "B*", "C")
    with pytest.raises(ConfigError, match=r"(?s)'A' with a value: only names.*HINT: export A"):
        check_patterns(["A=secret"])
    with pytest.raises(ConfigError) as raised:
        check_patterns(["A=secret"])
    assert "secret" not in str(raised.value)


def test_secrets():
    environ = {"MY_TOKEN": "abcdefgh", "DB_PASSWORD": "longer-abcdefgh", "SHORT_KEY": "x", "PATH": "/usr/bin"}
    secrets = secret_values(environ)
    assert secrets == ("longer-abcdefgh", "abcdefgh")
    assert masked({"a": ["x abcdefgh y"], "API_KEY": "z"}, secrets) == {"a": ["x *** y"], "API_KEY": "***"}
    assert not is_secret_name("MONKEY") and is_secret_name("AWS_SECRET_ACCESS_KEY")
    for cut in range(1, 20):  # wherever a read ends
        masker = Masker(secrets)
        text = b"say abcdefgh, abcdef and longer-abcdefg! longer-abcdefgh."
        shown = masker.feed(text[:cut]) + masker.feed(text[cut:]) + masker.flush()
        assert shown == b"say ***, abcdef and longer-abcdefg! ***."
