"""What looks like a secret, and that it is shown nowhere."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from hvdlm.autowrap.quiet import hold_back
from hvdlm.environment import read_environment
from hvdlm.observe.eventfile import EventFile
from hvdlm.observe.events import Events
from hvdlm.observe.summary import write_json
from hvdlm.private import make_private, open_private
from hvdlm.secrets import Masker, is_secret_name, masked, secret_arguments, secret_values

SECRET = "hf_17a9c3e5d0b1"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "dbPassword", "SECRET", "GITHUB_PAT",
     "GOOGLE_CREDENTIALS", "SENTRY_DSN", "api_key", "MLFLOW_TRACKING_TOKEN"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "MAX_NEW_TOKENS", "NUM_TOKENS", "KEYBOARD", "MONKEY", "key",
     "HVDLM_KEY", "SSH_AUTH_SOCK", "XDG_SESSION_ID", "COMPASS", "SECOND"],
)  # fmt: skip
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_values_that_would_hide_the_run_are_left() -> None:
    environ = {"A_TOKEN": "short", "SORT_KEY": "100000", "TLS_KEY": "/etc/tls/key.pem", "USE_AUTH": "disabled"}
    assert secret_values(environ) == ()
    assert secret_values({"MY_PASSWORD": "12345678"}) == ("12345678",), "a name that leaves no doubt"
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nBAQEFAASCBKcwggSjAgEA\n-----END KEY-----"
    assert set(secret_values({"TLS_KEY": key})) == {key, "MIIEvQIBADANBgkqhkiG9w0", "BAQEFAASCBKcwggSjAgEA"}


def test_arguments() -> None:
    words = [
        "train.py",
        "--api-key",
        SECRET,
        "--password=hunter22",
        "MY_TOKEN=tok-123456",
        "--key",
        "column",
        "--token",
    ]
    assert set(secret_arguments(words)) == {SECRET, "hunter22", "tok-123456"}
    assert secret_arguments(["--token", "--verbose", "a.py"]) == ()


def test_keys_of_a_job_of_ours() -> None:
    environ = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1:4711/AbCdEf123",
        "HVDLM_CONTROL": "10.0.0.1:99:3:0123456789abcdef",
    }
    assert set(secret_values(environ)) == {"AbCdEf123", "0123456789abcdef"}


def test_texts_in_lists_and_dicts() -> None:
    value = {"dir": f"s3://me:{SECRET}@host/x", "list": [1, ("a", f"Bearer {SECRET}")], "none": None}
    assert masked(value, [SECRET]) == {"dir": "s3://me:***@host/x", "list": [1, ["a", "Bearer ***"]], "none": None}
    assert (
        masked("redis://:p4ssw0rd@cache:6379/0 and http://host:8080/a@b")
        == "redis://:***@cache:6379/0 and http://host:8080/a@b"
    )


@pytest.mark.parametrize(
    "text", [f"token {SECRET}{SECRET} hf_17 end\n", f"to https://u:{SECRET}@host/x: done", f"{SECRET[:9]}"]
)
def test_a_stream_that_is_cut_anywhere(text: str) -> None:
    wanted = str(masked(text, [SECRET])).encode()
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            masker = Masker([SECRET, "another-secret"])
            parts = [text[:first], text[first:second], text[second:]]
            assert b"".join([*(masker.feed(part.encode()) for part in parts), masker.flush()]) == wanted
    assert SECRET.encode() not in wanted


def test_only_what_may_begin_a_secret_is_held_back() -> None:
    masker = Masker([SECRET])
    assert masker.feed(b"loss 1.0\n") == b"loss 1.0\n" and not masker.holds
    assert masker.feed(b"Name: hf") == b"Name: " and masker.holds
    assert masker.flush() == b"hf" and not masker.holds


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_of_a_run_are_the_persons_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = tmp_path / "runs" / "one"
        make_private(run)
        write_json(
            run / "summary.json", {"options": {"checkpoint_dir": f"s3://me:{SECRET}@host"}, "x": [SECRET]}, [SECRET]
        )
        events = Events(lambda: run, [SECRET])
        events.add("warning", text=f"refused {SECRET}")
        EventFile(run / "metrics").scalars(1, {"loss": 1.0})
        with open_private(run / "metrics.jsonl", "a") as file:
            file.write("{}\n")
    finally:
        os.umask(before)
    assert mode(run) == mode(run / "metrics") == 0o700
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) == 4 and all(mode(path) == 0o600 for path in files)
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert json.loads((run / "events.jsonl").read_text())["text"] == "refused ***"


def test_held_output_of_other_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    secrets = read_environment({"A_TOKEN": SECRET}).secrets
    restore = hold_back(str(tmp_path), 1, lambda: None, secrets)
    try:
        print("the token is", SECRET, 5)
    finally:
        restore()
    held = tmp_path / "logs" / "rank-1.held.log"
    assert held.read_text() == "the token is *** 5\n" and mode(held) == 0o600
    assert capsys.readouterr() == ("", "")


def test_the_environment_does_not_show_them() -> None:
    assert SECRET not in repr(read_environment({"A_TOKEN": SECRET}))
