"""gs:// through fsspec and gcsfs, against an emulator of Google Cloud Storage: data and checkpoints of two workers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess.workers import run_workers

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

UPLOAD = """
    import json, fsspec
    system = fsspec.filesystem("gs")
    system.mkdir("corpus")
    system.mkdir("models")
    for part in range(3):
        lines = [json.dumps({"n": number}) for number in range(part * 8, part * 8 + 8)]
        system.pipe(f"corpus/part-{part}.jsonl", "\\n".join(lines).encode())
"""


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[str]:
    """The address of an emulator with nothing in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        f"--port={port}",
        "--host=127.0.0.1",
        "--in-memory",
    ]
    with open(tmp_path / "storage.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "storage.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


SCRIPT = """
    import sys, torch, hvdlm
    from hvdlm.sources import open_files
    data = open_files("gs://corpus/part-*.jsonl")
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, collate_fn=lambda rows: [row["n"] for row in rows])
    net = torch.nn.Linear(1, 1)
    net, optimizer, loader = hvdlm.wrap(net, torch.optim.SGD(net.parameters(), lr=0.001), loader)
    for numbers in loader:
        print(*(f"sample={n}" for n in numbers))
        optimizer.zero_grad()
        net(torch.tensor(numbers, dtype=torch.float32)[:, None]).sum().backward()
        optimizer.step()
"""


def environment_of(storage: str, directory: Path) -> dict[str, str]:
    """What leads gcsfs to the emulator, with data and an empty bucket in it."""
    environment = {
        "STORAGE_EMULATOR_HOST": storage,
        # gcsfs looks at a bucket's kind through gRPC first, which the emulator does not serve.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GS_TOKEN": "anon",
        "HVDLM_CACHE_DIR": str(directory / "cache"),
    }
    made = run_workers(["-c", textwrap.dedent(UPLOAD)], 1, controller=None, cwd=directory, timeout=60, env=environment)
    assert made.returncode == 0, made.stderr[-3000:]
    return environment


def test_two_workers_read_a_bucket(storage: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = environment_of(storage, tmp_path)
    program = ["-m", "hvdlm", "run", "-np", "2", "--run-dir", str(tmp_path / "run"), str(script)]
    done = run_workers(program, 2, controller=None, cwd=tmp_path, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [int(word.partition("=")[2]) for word in done.stdout.split() if word.startswith("sample=")]
    assert sorted(seen) == list(range(24))


RESUMED = """
    import os, sys, time, fsspec, torch, hvdlm
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.arange(24.0)[:, None], 4, shuffle=True)
    net, optimizer, loader = hvdlm.wrap(net, torch.optim.Adam(net.parameters(), lr=0.01), loader)
    for epoch in hvdlm.epochs(2):
        for step, x in enumerate(loader):
            if (epoch, step) == (1, 3) and "dies" in sys.argv:
                store, deadline = fsspec.filesystem("gs", use_listings_cache=False), time.monotonic() + 30
                while not store.glob("models/one/*/manifest.json") and time.monotonic() < deadline:
                    time.sleep(0.1)  # they are written beside the training, which is short
                os.kill(os.getpid(), 9)
            optimizer.zero_grad()
            net(x).mean().backward()
            optimizer.step()
    print("weight", net.weight.item(), flush=True)
"""


def test_checkpoints_in_a_bucket(storage: str, tmp_path: Path) -> None:
    """A job that was killed goes on from the bucket, and ends as one process would that was not."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(RESUMED))
    environment = environment_of(storage, tmp_path)

    def run(name: str, *words: str) -> tuple[int, str]:
        flags = ["-np", "2", "--run-dir", str(tmp_path / name), "--checkpoint-dir", "gs://models/one"]
        program = ["-m", "hvdlm", "run", *flags, "--checkpoint-every", "2", "--auto-resume", str(script), *words]
        done = run_workers(program, 2, controller=None, cwd=tmp_path, timeout=100, env=environment)
        return done.returncode, done.stdout + done.stderr

    code, told = run("first", "dies")
    assert code == 137, told[-3000:]
    code, told = run("second")
    assert code == 0, told[-3000:]
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True and summary["steps"] == 12
    events = [json.loads(line) for line in (tmp_path / "second" / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "restore" for event in events), events
    alone = run_workers([str(script)], 1, controller=None, cwd=tmp_path, timeout=60, env=environment)
    weights = [float(text.split("weight")[1].split()[0]) for text in (told, alone.stdout)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
