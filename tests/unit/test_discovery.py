"""Where workers of elastic jobs may run: files, programs, Slurm, Google Cloud against a server of the test's own."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdlm.errors import ConfigError
from hvdlm.gce import is_gce, metadata, watch_preemption
from hvdlm.launchers import discovery
from hvdlm.launchers.discovery import Discovery, Fixed, HostFile, Script, Slurm, make_source, parse_found
from hvdlm.launchers.discovery_cloud import GoogleGroup
from hvdlm.launchers.hosts import Host


def program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_lines_of_a_discovery_script() -> None:
    found = parse_found("a:2\nb\n\n# none\nc slots=3 # big\n", None, "script")
    assert found == (Host("a", 2), Host("b", 1), Host("c", 3))
    assert parse_found("a\nb:1", 4, "script") == (Host("a", 4), Host("b", 1))
    assert parse_found("\n", None, "script") == ()


@pytest.mark.parametrize("text", ["<html>404</html>", "a:0", "a:x", "-oProxyCommand=x:1", "a:1\na:2", "a b c"])
def test_rubbish_of_a_discovery_script_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="script"):
        parse_found(text, None, "script")


def test_a_script_prints_hosts(tmp_path: Path) -> None:
    assert Script(program(tmp_path / "hosts.sh", "echo h1:2; echo $1"), 3).hosts() == (Host("h1", 2),)
    command = program(tmp_path / "hosts.sh", "echo h1:2; echo $1") + " h2"
    assert Script(command, 3).hosts() == (Host("h1", 2), Host("h2", 3))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("echo oh no >&2; exit 3", "failed with code 3: oh no"),
        ("exit 1", "failed with code 1: it said nothing"),
        ("sleep 60 & sleep 60", "did not end within 0.5 s"),
        ("printf '\\000\\001'", "no list of hosts"),
    ],
)
def test_a_script_that_fails_or_hangs_is_told_and_nothing_of_it_stays(tmp_path: Path, body: str, told: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=told):
        Script(program(tmp_path / "hosts.sh", body), None, timeout=0.5).hosts()
    assert time.monotonic() - start < 10


def test_a_script_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be run: No such file"):
        Script(str(tmp_path / "none"), None).hosts()


def test_a_host_file_is_read_again_when_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\n")
    source = HostFile(str(path))
    assert source.hosts() == (Host("a", 1),)
    path.write_text("a slots=1\nbb slots=2\n")
    assert source.hosts() == (Host("a", 1), Host("bb", 2))
    path.write_text("a slots=\n")
    with pytest.raises(ConfigError, match="is no host"):
        source.hosts()
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        source.hosts()


class Flaky:
    """A source whose answers are given."""

    interval = 0.01

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def hosts(self) -> tuple[Host, ...]:
        answer = self.answers.pop(0) if self.answers else ConfigError("nothing left.")
        if isinstance(answer, Exception):
            raise answer
        found: tuple[Host, ...] = answer
        return found


def test_trouble_is_told_once_and_changes_nothing() -> None:
    told: list[tuple[str, str]] = []
    a, b = (Host("a", 1),), (Host("b", 1),)
    source = Flaky(a, ConfigError("it failed."), ConfigError("it failed."), b, ConfigError("it failed."))
    found = Discovery(source, lambda kind, text: told.append((kind, text)))
    assert found.first() == a
    assert found.first() is None and found.first() is None
    assert [kind for kind, _ in told] == ["discovery_failed"] and "it failed. The hosts stay" in told[0][1]
    assert found.first() == b
    assert found.first() is None
    assert len(told) == 2


def test_it_goes_on_asking_in_a_thread_of_its_own() -> None:
    found = Discovery(Flaky(ConfigError("later."), (Host("a", 2),)), lambda *_: None)
    found.start()
    end = time.monotonic() + 20
    news = None
    while news is None and time.monotonic() < end:
        news = found.news()
        time.sleep(0.01)
    found.close()
    assert news == (Host("a", 2),)


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path / "scontrol",
        """case "$*" in
        "show job 42 --oneliner") echo "JobId=42 JobName=x NodeList=n[1-2] BatchHost=n1";;
        "show hostnames n[1-2]") echo n1; echo n2;;
        *) exit 9;; esac""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Slurm("42", 2).hosts() == (Host("n1", 2), Host("n2", 2))
    source = make_source({}, (), {"SLURM_JOB_ID": "42", "SLURM_NTASKS_PER_NODE": "3"})
    assert source.hosts() == (Host("n1", 3), Host("n2", 3))
    with pytest.raises(ConfigError, match="failed with code 9"):
        Slurm("43", 2).hosts()


def test_what_is_given_decides_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = program(tmp_path / "discover_hosts.sh", "echo pod-0:2")
    assert isinstance(make_source({}, [Host("a", 1)], {}), Fixed)
    assert isinstance(make_source({"hostfile": "h"}, [Host("a", 1)], {}), HostFile)
    assert make_source({"host_discovery_script": script}, (), {}).hosts() == (Host("pod-0", 2),)
    with pytest.raises(ConfigError, match="where workers may run"):
        make_source({}, (), {})
    with pytest.raises(ConfigError, match="needs /etc/mpi"):
        make_source({"host_discovery": "KUBERNETES"}, (), {})
    monkeypatch.setattr(discovery, "_MPIJOB_SCRIPT", script)
    assert make_source({}, (), {}).hosts() == (Host("pod-0", 2),)


class Google(http.server.BaseHTTPRequestHandler):
    """A metadata server and a compute API."""

    status = 200
    preempted = threading.Event()
    asked: list[str] = []  # noqa: RUF012 - of the class, for it is made anew for each request

    def do_GET(self) -> None:
        answers = {
            "project/project-id": "proj",
            "instance/zone": "projects/1/zones/europe-west4-a",
            "instance/service-accounts/default/token": json.dumps({"access_token": "t0ken"}),
            "instance/preempted": "FALSE",
        }
        key = self.path.removeprefix("/computeMetadata/v1/").partition("?")[0]
        if "wait_for_change" in self.path:
            self.preempted.wait(20)
        if self.preempted.is_set():
            answers["instance/preempted"] = "TRUE"
        known = self.headers["Metadata-Flavor"] == "Google" and key in answers
        self._send(200 if known else 403, answers.get(key, "").encode())

    def do_POST(self) -> None:
        self.asked.append(self.path)
        assert self.headers["Authorization"] == "Bearer t0ken"
        machines = [("vm-b", "RUNNING", "NONE"), ("vm-c", "RUNNING", "DELETING"), ("vm-d", "STOPPING", "NONE")]
        content: dict[str, Any] = {"nextPageToken": "p 2"}
        if "pageToken=p%202" in self.path:
            machines, content = [("vm-a", "RUNNING", "VERIFYING")], {}
        base = "https://www.googleapis.com/compute/v1/projects/proj/zones/z/instances/"
        content["managedInstances"] = [
            {"instance": base + name, "instanceStatus": status, "currentAction": action}
            for name, status, action in machines
        ]
        self._send(self.status, json.dumps(content).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def google() -> Iterator[dict[str, str]]:
    """The environment in which Google's servers are ours."""
    Google.status, Google.asked = 200, []
    Google.preempted.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Google)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"127.0.0.1:{server.server_address[1]}"
    yield {"GCE_METADATA_HOST": address, "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"http://{address}/compute/v1/"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_machines_of_an_instance_group(google: dict[str, str]) -> None:
    flags = {"host_discovery": "GCLOUD", "gcloud_group": "workers", "slots": 2}
    assert make_source(flags, (), google).hosts() == (Host("vm-a", 2), Host("vm-b", 2))
    path = "/compute/v1/projects/proj/zones/europe-west4-a/instanceGroupManagers/workers/listManagedInstances"
    assert Google.asked == [path, path + "?pageToken=p%202"]
    full = GoogleGroup("projects/other/zones/z/instanceGroupManagers/g", 1, google)
    full.hosts()
    assert Google.asked[-2] == "/compute/v1/projects/other/zones/z/instanceGroupManagers/g/listManagedInstances"


def test_a_preemption_is_noticed(google: dict[str, str], tmp_path: Path) -> None:
    host = google["GCE_METADATA_HOST"]
    assert metadata("instance/preempted", host) == "FALSE"
    noticed = threading.Event()
    thread = watch_preemption(host, noticed.set)
    assert not noticed.wait(0.3)
    Google.preempted.set()
    assert noticed.wait(20)
    thread.join()
    (tmp_path / "product").write_text("Google Compute Engine\n")
    assert is_gce(tmp_path / "product") and not is_gce(tmp_path / "none")


def test_google_cloud_that_does_not_answer_is_told(google: dict[str, str]) -> None:
    Google.status = 403
    with pytest.raises(ConfigError, match="answered 403"):
        GoogleGroup("workers", 1, google).hosts()
    with pytest.raises(ConfigError, match="cannot be asked"):
        GoogleGroup("workers", 1, {**google, "GCE_METADATA_HOST": "127.0.0.1:1"}).hosts()
    with pytest.raises(ConfigError, match="allowed is a name"):
        GoogleGroup("zones/x", 1, google)
