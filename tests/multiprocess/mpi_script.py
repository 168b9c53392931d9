"""A program that uses MPI itself, and trains in all of its processes or in some: ``mpi_script.py all|half|ranks``."""

from __future__ import annotations

import sys

import torch
from mpi4py import MPI

import hvdlm

how = sys.argv[1]
world = MPI.COMM_WORLD
before = world.allgather(world.rank)
torch.manual_seed(0)

if how == "half":
    hvdlm.init("torch", comm=world.Split(world.rank % 2, world.rank))
elif how == "ranks" and world.rank > 0:
    hvdlm.init("torch", comm=list(range(1, world.size)))
if how != "ranks" or world.rank > 0:

    @hvdlm.distribute
    def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: torch.utils.data.DataLoader) -> None:
        for x in loader:
            optimizer.zero_grad()
            net(x).mean().backward()
            optimizer.step()

    for _ in range(2):  # the second time in the same communicator
        net = torch.nn.Linear(1, 1)
        loader = torch.utils.data.DataLoader(torch.arange(41.0)[:, None], 4, shuffle=True)
        train(net, torch.optim.SGD(net.parameters(), lr=1e-4), loader)
    print(f"world {world.rank} of {world.size}: rank {hvdlm.rank()} of {hvdlm.size()}", flush=True)
# It goes on to be the program's.
assert world.allgather(world.rank) == before
world.Barrier()
