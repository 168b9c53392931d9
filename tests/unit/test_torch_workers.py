"""Loader workers end with the rank that has forked them, in whatever moment it is killed."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

RANK = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from hvdlm.adapters.torch_reader import make_reader
from hvdlm.plan import Partition

def slowly(worker):
    print("begun", os.getpid(), flush=True)
    time.sleep(float(sys.argv[1]))

feed, reader = make_reader(DataLoader(TensorDataset(torch.arange(8)), 2, num_workers=1, worker_init_fn=slowly))
feed.start(Partition(strategy="none", rank=0, size=1, seed=0).cut(torch.arange(8).numpy(), 2))
batches = iter(reader)
if sys.argv[1] == "0":
    next(batches)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("starting", ["0", "3"])
def test_a_worker_ends_with_its_rank(starting: str) -> None:
    """Also when the rank is killed while its worker is still starting, which PyTorch itself does not find out."""
    command = [sys.executable, "-c", RANK, starting]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdin is not None and rank.stdout is not None
        pid = int(rank.stdout.readline().split()[1])
        worker = psutil.Process(pid)
        try:
            rank.stdin.write("\n")
            rank.stdin.flush()
            assert rank.wait(30) == -9
            end = time.monotonic() + 2.5
            while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
                time.sleep(0.02)
            assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            pass
        finally:
            if worker.is_running():
                worker.kill()
