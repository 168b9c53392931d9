# ruff: noqa: E501 - commands and outputs stand on one line
"""What a person can get wrong; nothing is started, and the message says what to do."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from hvdlm.cli import main
from hvdlm.cli.run import run
from hvdlm.errors import EngineError
from hvdlm.launchers.config_file import read_config_file
from hvdlm.launchers.engine import find_engine
from hvdlm.launchers.program import resolve_program
from hvdlm.options import Options, names


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["run", *arguments])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hello.py").write_text("print('hello')\n")
    (tmp_path / "bad.py").write_text("x = 1\nif x\n  pass\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.py").write_text("")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--compresion", "fp16", "-np", "2", "hello.py"], ["'--compresion'", "HINT: did you mean '--compression'?"]),
        (["-np=x", "hello.py"], ["-np x", "HINT: for example: -np 2"]),
        (["--xyzzy", "hello.py"], ["'--xyzzy'", "HINT: hvdlm run --help"]),
        (["-np", "0", "hello.py"], ["-np 0", "at least 1", "HINT: "]),
        (["-np", "-2", "hello.py"], ["-np -2", "at least 1", "HINT: "]),
        (["-np", "two", "hello.py"], ["-np two", "an integer", "HINT: "]),
        (["-np", "1.5", "hello.py"], ["-np 1.5", "an integer", "HINT: "]),
        (["hello.py"], ["number of workers", "HINT: hvdlm run -np 2"]),
        (["-np", "3", "-H", "localhost:2", "hello.py"], ["-np 3", "2 slots", "HINT: -np 2"]),
        (["-np", "2", "-H", "local host:2", "hello.py"], ["'local host:2'", "host:slots", "HINT: "]),
        (["-np", "2", "-H", "-oProxyCommand=id:2", "hello.py"], ["-oProxyCommand=id", "HINT: "]),
        (["-np", "2", "--hostfile", "none", "hello.py"], ["'none'", "No such file"]),
        (["-np", "2"], ["no script", "HINT: hvdlm run -np 2 train.py"]),
        (["-np", "2", "helo.py"], ["'helo.py'", "HINT: did you mean 'hello.py'?"]),
        (["-np", "2", "none/such.py"], ["'none/such.py'", "HINT: there is no directory 'none'"]),
        (["-np", "2", "python", "helo.py"], ["'helo.py'", "HINT: did you mean 'hello.py'?"]),
        (["-np", "2", "folder"], ["directory", "HINT: hvdlm run folder/train.py"]),
        (["-np", "2", "bad.py"], ["bad.py, line 2", "    if x\n", "^", "HINT: "]),
        (["-np", "2", "python", "bad.py"], ["bad.py, line 2"]),
        (["-np", "2", "-m", "bad"], ["bad.py, line 2"]),
        (["-np", "2", "-m", "no.such"], ["no module 'no'", "HINT: "]),
        (["-np", "2", "-m", "json.none"], ["no module 'json.none'"]),
        (["-np", "2", "-m", "os.path"], ["'os' is no package"]),
        (["-np", "2", "-m", "json"], ["cannot be run", "__main__"]),
        (["-np", "2", "--gloo", "--mpi", "hello.py"], ["--gloo and --mpi", "HINT: "]),
        (["-np", "2", "--gloo", "--launcher", "mpi", "hello.py"], ["--launcher mpi", "--gloo", "HINT: "]),
        (["-np", "2", "-H", "a:2", "--hostfile", "f", "hello.py"], ["--hosts and --hostfile", "HINT: "]),
        (["-np", "2", "--launcher", "slurmm", "hello.py"], ["'slurmm'", "debug, elastic, gloo, horovodrun, mpi", "HINT: "]),
        (["-np", "2", "--launcher", "debug", "hello.py"], ["one worker, not 2", "HINT: "]),
        (["-np", "2", "--config-file", "none.yaml", "hello.py"], ["'none.yaml'", "No such file", "HINT: "]),
        (["-np", "2", "--compression", "fp15", "hello.py"], ["'fp15'", "'none', 'fp16'"]),
        (["-np", "2", "--seed", "many", "hello.py"], ["seed", "an integer"]),
        (["-np", "2", "--run-dir", "hello.py", "hello.py"], ["cannot be written", "HINT: --run-dir"]),
        (["-np", "2", "--gloo", "--network-interfaces", "eth99", "hello.py"], ["'eth99'", "lo", "HINT: "]),
        (["-np", "2", "--network-interfaces", ",", "hello.py"], ["no interface", "HINT: "]),
        (["-np", "2", "--min-np", "3", "hello.py"], ["--min-np 3", "HINT: -np 3"]),
        (["-np", "2", "--min-np", "1", "hello.py"], ["--host-discovery-script", "HINT: "]),
        (["-np", "2", "--min-np", "1", "--max-np", "1", "hello.py"], ["-np 2 is more than --max-np 1", "HINT: "]),
        (["-np", "2", "--min-np", "1", "--mpi", "hello.py"], ["elastic", "MPI", "HINT: "]),
        (["-np", "2", "--host-discovery-script", "./none", "hello.py"], ["'./none'", "HINT: chmod"]),
        (["-np", "2", "--cycle-time-ms", "-1", "hello.py"], ["--cycle-time-ms -1", "at least 0", "HINT: "]),
        (["-np", "2", "--ssh-port", "70000", "hello.py"], ["at most 65535", "HINT: "]),
        (["-np", "2", "--log-level", "LOUD", "hello.py"], ["'LOUD'", "TRACE, DEBUG"]),
        (["-np", "2", "--blacklist-cooldown-range", "9", "3", "hello.py"], ["9 3", "ascending"]),
    ],
)  # fmt: skip
def test_bad_input(capsys, arguments, parts):
    err = fail(capsys, *arguments)
    for part in parts:
        assert part in err


def test_option_without_value(capsys):
    assert "'-np' requires an argument" in fail(capsys, "-np")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("c.yaml", "compresion: fp16\n", ["'compresion'", "did you mean 'compression'?"]),
        ("c.yaml", "a: [", ["not YAML", "HINT: "]),
        ("c.json", "{", ["not JSON", "HINT: "]),
        ("c.yaml", "- fp16\n", ["names and values", "HINT: "]),
        ("c.yaml", "compression: fp15\n", ["c.yaml", "'fp15'", "'none', 'fp16'"]),
        ("c.json", '{"seed": 1.5}', ["c.json", "seed"]),
        (
            "c.yaml",
            "params: {fusion_treshold_mb: 1}\n",
            ["'fusion_treshold_mb'", "did you mean 'fusion_threshold_mb'?"],
        ),
        ("c.yaml", "params: {cache_capacity: -1}\n", ["params.cache_capacity", "at least 0"]),
        ("c.yaml", "params: 3\n", ["section 'params'"]),
        ("c.yaml", "controller: tcp\n", ["'tcp'", "gloo, mpi"]),
        ("c.yaml", "stall_check: {enabled: maybe}\n", ["stall_check.enabled", "true or false"]),
    ],
)
def test_bad_config_file(capsys, tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    err = fail(capsys, "-np", "2", "--config-file", name, "hello.py")
    for part in parts:
        assert part in err


def test_binary_config_file(capsys, tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not text" in fail(capsys, "-np", "2", "--config-file", "c.yaml", "hello.py")


def test_config_file_of_horovodrun(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "controller: gloo\ncompression: fp16\nbatch-norm: local\n"
        "params: {fusion_threshold_mb: 32, hierarchical_allreduce: false}\n"
        "autotune: {enabled: true, log_file: f}\ntimeline: {filename: t, mark_cycles: true}\n"
        "stall_check: {enabled: false, warning_time_seconds: 5}\n"
        "library_options: {gloo_timeout_seconds: 9}\nlogging: {level: debug, with_timestamp: true}\n"
    )
    options, flags = read_config_file("c.yaml")
    assert options == {"compression": "fp16", "batch_norm": "local"}
    assert flags == {
        "use_gloo": True, "fusion_threshold_mb": 32, "hierarchical_allreduce": False, "autotune": True,
        "autotune_log_file": "f", "timeline_filename": "t", "timeline_mark_cycles": True, "no_stall_check": True,
        "stall_check_warning_time_seconds": 5, "gloo_timeout_seconds": 9, "log_level": "DEBUG", "log_with_timestamp": True,
    }  # fmt: skip


def test_empty_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_config_file("c.yaml") == ({}, {})


def test_unknown_variable_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("HVDLM_COMPRESION", "fp16")
    assert "HVDLM_COMPRESION" in fail(capsys, "-np", "2", "hello.py")


def test_print_config(tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text(json.dumps({"seed": 3, "partition": "random", "timeline": {"filename": "t"}}))
    monkeypatch.setenv("HVDLM_SEED", "5")
    monkeypatch.setenv("HVDLM_REDUCTION", "sum")
    shown = CliRunner().invoke(run, ["--config-file", "c.json", "--partition", "contiguous", "--print-config"])
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines()}
    assert rows["seed"] == ["3", "config", "file"]
    assert rows["partition"] == ["contiguous", "command", "line"]
    assert rows["reduction"] == ["sum", "environment"]
    assert rows["batch"] == ["global", "default"]
    assert rows["timeline_filename"][0] == "t"
    assert set(names()) <= set(rows)
    assert "may be set by the script" in shown.output
    assert os.listdir() and not os.path.exists("hvdlm-runs")


def test_print_config_with_values_the_code_may_mend(tmp_path):
    shown = CliRunner().invoke(run, ["--lr-scale", "linear", "--print-config"])
    assert shown.exit_code == 0
    assert "lr_scale" in shown.output and "Note: " in shown.output


def test_every_option_is_a_flag_with_its_docstring():
    shown = CliRunner().invoke(run, ["--help"], terminal_width=110)
    text = " ".join(shown.output.split())
    for name in names():
        assert "--" + name.replace("_", "-") in text
    assert "Gradients travel in flat buckets of at most this many megabytes" in text
    assert "--elastic / --no-elastic" in text
    assert Options().compression == "none"


def test_horovod_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "HINT: hvdlm build-horovod" in fail(capsys, "-np", "2", "hello.py")


def test_horovod_without_libraries(tmp_path):
    (tmp_path / "horovod").mkdir()
    with pytest.raises(EngineError, match="HINT: hvdlm build-horovod --force"):
        find_engine(tmp_path / "horovod")


def test_horovod_without_mpi(tmp_path):
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    library = tmp_path / "horovod" / "torch" / "mpi_lib_v2.cpython.so"
    library.write_bytes(b"\0libgloo.so\0")
    assert not find_engine(tmp_path / "horovod").mpi
    library.write_bytes(b"\0libc10.so\0libmpi.so.40\0")
    assert find_engine(tmp_path / "horovod").mpi


def test_mpi_of_the_installed_horovod_is_seen():
    """Against what Horovod itself says, which takes importing it."""
    import subprocess
    import sys

    text = "import horovod.torch as hvd; print(hvd.mpi_built())"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert str(find_engine().mpi) == done.stdout.strip()


def test_programs(tmp_path, monkeypatch):
    import sys

    (tmp_path / "-dash.py").write_text("")
    (tmp_path / "a b.py").write_text("")
    (tmp_path / "nosuffix").write_text("x = 1\n")
    (tmp_path / "prog").write_text("#!/bin/sh\n")
    (tmp_path / "prog").chmod(0o755)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__main__.py").write_text("")
    path = os.environ["PATH"]
    assert resolve_program(["-dash.py", "-x"], None, path) == (sys.executable, "./-dash.py", "-x")
    assert resolve_program(["a b.py"], None, path) == (sys.executable, "a b.py")
    assert resolve_program(["nosuffix"], None, path) == (sys.executable, "nosuffix")
    assert resolve_program(["./prog", "1"], None, path) == ("./prog", "1")
    assert resolve_program(["prog"], None, path) == ("./prog",)
    assert resolve_program(["pkg"], None, path) == (sys.executable, "pkg")
    assert resolve_program(["--x"], "pkg", path) == (sys.executable, "-m", "pkg", "--x")
    assert resolve_program(["sh", "-c", "x"], None, path)[1:] == ("-c", "x")
