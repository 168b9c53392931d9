"""Unmodified scripts on two workers: what is recognised, what is trained, what is held back, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPTS = ROOT / "examples" / "scripts"


def run(
    program: list[str], workers: int, cwd: Path, *, autowrap: bool = True, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    flags = ["--mpi", "-np", str(workers), "--run-dir", str(cwd / f"run{workers}"), *options]
    flags += ["--autowrap"] if autowrap else []
    return run_workers(["-m", "hvdlm", "run", *flags, *program], 1, controller=None, cwd=cwd, timeout=110)


def final_loss(job: subprocess.CompletedProcess[str]) -> float:
    assert job.returncode == 0, job.stdout[-1500:] + job.stderr[-3000:]
    found = re.findall(r"final loss ([\d.]+)", job.stdout)
    assert len(found) == 1, f"printed by {len(found)} workers"
    return float(found[0])


@pytest.mark.parametrize(
    ("script", "own_line", "alone"),
    [
        ("gpt_memmap", "", ["--batch-size", "16"]),  # each worker draws its own 8
        ("lstm_bptt", "train_data = hvdlm.shard(train_data, dim=1)", []),
        ("loader_loop", "", []),
        ("hf_trainer", "", []),
        ("keras_fit", "", []),
        ("keras_loop", "", []),
    ],
)
def test_a_script_trains_as_in_one_process(tmp_path: Path, script: str, own_line: str, alone: list[str]) -> None:
    source = (SCRIPTS / f"{script}.py").read_text()
    path = tmp_path / f"{script}.py"
    if own_line:
        source = source.replace("\nimport torch\n", "\nimport hvdlm\nimport torch\n")
        source = source.replace(
            "val_data = batchify(ids[cut:], 10)\n", f"val_data = batchify(ids[cut:], 10)\n{own_line}\n"
        )
        assert own_line in source
    path.write_text(source)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    # Dropout draws other masks on each worker: off, to compare.
    same = {"lstm_bptt": ["--dropout", "0"], "gpt_memmap": ["--max-iters", "200"]}.get(script, [])
    expected = final_loss(run([str(path), *alone, *same], 1, one))
    job = run([str(path), *same], 2, two)
    assert final_loss(job) == pytest.approx(expected, rel=0.02)
    summary = json.loads((two / "run2" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["replicas_identical"] is True and summary["steps"] > 10
    if script in ("loader_loop", "hf_trainer", "keras_fit"):
        assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    events = map(json.loads, (two / "run2" / "events.jsonl").read_text().splitlines())
    said = [event["what"] for event in events if event["event"] == "recognised"]
    assert any(line.startswith("model ") for line in said)
    if "lstm" not in script and script != "keras_fit":
        assert any(re.match(rf"optimizer \w+ at {script}.py:\d+: gradients reduced", line) for line in said)
    # Only one worker writes.
    assert "it/s" not in "".join(line for line in job.stderr.splitlines() if line.startswith("[1]"))
    held = (two / "run2" / "logs" / "rank-1.held.log").read_text()
    assert "final loss" in held and "final loss" not in (two / "run2" / "logs" / "rank-1.out.log").read_text()


def test_the_same_batches_on_all_workers_are_refused(tmp_path: Path) -> None:
    job = run([str(SCRIPTS / "lstm_bptt.py"), "--epochs", "1"], 2, tmp_path)
    assert job.returncode != 0
    assert "every worker trains on the same batches" in job.stderr
    assert "HINT: share the data out with one line, as in: data = hvdlm.shard(data, dim=1)" in job.stderr


REFUSED = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
model = torch.nn.Linear(2, 2)
for attempt in (
    lambda: torch.distributed.init_process_group("gloo"),
    lambda: DistributedDataParallel(model),
    lambda: torch.nn.DataParallel(model),
):
    try:
        attempt()
    except TypeError as error:
        print(type(error).__name__, error)
import horovod.torch as hvd
try:
    hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
except TypeError as error:
    print(type(error).__name__, error)
print(sys.argv, __name__, __file__)
"""


def test_what_synchronises_by_itself_is_refused_with_the_reason(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(REFUSED)
    job = run_workers(
        ["-m", "hvdlm.autorun", "-m", "pack", "--flag", "3"], 1, controller=None, cwd=tmp_path, timeout=60
    )
    assert job.returncode == 0, job.stderr
    lines = [line for line in job.stdout.splitlines() if line.startswith("RecognitionError")]
    assert [line.split(", and")[0] for line in lines] == [
        "RecognitionError __main__.py:6 starts torch.distributed (DistributedDataParallel, FSDP, DeepSpeed)",
        "RecognitionError __main__.py:7 makes a DistributedDataParallel",
        "RecognitionError __main__.py:8 makes a DataParallel",
        "RecognitionError __main__.py:16 makes a horovod.torch.DistributedOptimizer",
    ]
    assert job.stdout.count("HINT:") == 4
    assert f"['{package}/__main__.py', '--flag', '3'] __main__" in job.stdout


INSIDE = """
import torch, hvdlm

@hvdlm.distribute(seed=4)
def train(steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        for x, y in loader:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    return model.weight.sum().item(), len(loader)

before = torch.utils.data.DataLoader.__iter__, torch.nn.Module.__call__, torch.optim.Optimizer.__init__
total, length = train(3)
assert before == (torch.utils.data.DataLoader.__iter__, torch.nn.Module.__call__, torch.optim.Optimizer.__init__)
print(f"final loss {abs(total):.5f}" if hvdlm.rank() == 0 else "")
assert length == 5
"""


def test_a_function_that_makes_its_own_objects(tmp_path: Path) -> None:
    path = tmp_path / "inside.py"
    path.write_text(INSIDE)
    one = run([str(path)], 1, tmp_path, autowrap=False)
    two = run([str(path)], 2, tmp_path, autowrap=False)
    assert final_loss(two) == pytest.approx(final_loss(one), rel=1e-4)
    summary = json.loads((tmp_path / "run2" / "summary.json").read_text())
    assert summary["samples_seen"] == 120 and summary["samples_missing"] == 0


HYDRA = """
import hydra, torch
from omegaconf import DictConfig

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=cfg.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr)
    for _ in range(cfg.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
    print(f"lr {cfg.optimizer.lr} final loss {loss.item():.5f}")

if __name__ == "__main__":
    main()
"""
NOTEBOOK = """#!/usr/bin/env python
# coding: utf-8

# # A notebook

# In[1]:


import torch
torch.manual_seed(0)


# In[2]:


x, y = torch.randn(40, 3), torch.randn(40, 1)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model


# In[3]:


def epoch():
    global loss
    for inputs, targets in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()

for _ in range(2):
    epoch()
print(f"final loss {loss.item():.5f}")


# In[ ]:




"""


def test_a_script_of_hydra(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(HYDRA)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("batch_size: 8\nepochs: 2\noptimizer:\n  lr: 0.5\n")
    job = run([str(tmp_path / "train.py"), "optimizer.lr=0.25", "hydra.job.chdir=false"], 2, tmp_path)
    assert final_loss(job) >= 0 and "lr 0.25" in job.stdout, "its overrides reach it"
    summary = json.loads((tmp_path / "run2" / "summary.json").read_text())
    assert (summary["samples_seen"], summary["samples_missing"], summary["samples_repeated"]) == (80, 0, 0)
    assert summary["replicas_identical"] is True


def test_a_notebook_that_was_exported(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    job = run([str(tmp_path / "notebook.py")], 2, tmp_path)
    assert final_loss(job) >= 0
    assert "autowrap: optimizer SGD at notebook.py:18: gradients reduced" in job.stderr
    summary = json.loads((tmp_path / "run2" / "summary.json").read_text())
    assert (summary["samples_seen"], summary["samples_missing"], summary["samples_repeated"]) == (80, 0, 0)
    assert summary["replicas_identical"] is True


def test_nothing_to_recognise(tmp_path: Path) -> None:
    path = tmp_path / "nothing.py"
    path.write_text("print('hello')\n")
    job = run([str(path)], 2, tmp_path)
    assert job.returncode != 0 and "--autowrap recognised nothing" in job.stderr and "HINT:" in job.stderr
    shell = run(["/bin/true"], 2, tmp_path)
    assert shell.returncode == 2 and "--autowrap needs a Python script" in shell.stderr
    failing = tmp_path / "failing.py"
    failing.write_text("import torch\nraise ValueError('mine')\n")
    job = run([str(failing)], 1, tmp_path)
    assert job.returncode == 1
    assert re.search(r'Traceback \(most recent call last\):\n  File "[^"]*failing.py", line 2', job.stderr)
