"""What looking at a job costs: fingerprints every 100 steps, times every 20, the watchdog's thread.

    hvdlm run -np 2 tests/perf/bench_watch.py

Times both kinds of exchange in a running job, and the steps between them, and prints the part of a step that the
defaults take. The other arm, the same steps with all of it off, is interleaved in blocks.
"""

from __future__ import annotations

import time

import torch
from torch import nn

import hvdlm
from hvdlm.api import _current
from hvdlm.bench.stats import median_interval

BLOCK, BLOCKS = 20, 8

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
net = nn.Sequential(nn.Embedding(512, 256), nn.TransformerEncoder(layer, 6), nn.Linear(256, 512))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
data = torch.utils.data.TensorDataset(torch.randint(512, (2 * BLOCK * BLOCKS * 8 + 400, 64)))
loader = torch.utils.data.DataLoader(data, batch_size=8)
# Exchanges are made by hand below, at the places where they would be made.
net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, fingerprint_every=0, timings_every=0)
account = _current().account
inspection = account.inspection
assert inspection is not None
times: dict[str, list[float]] = {"off": [], "on": [], "fingerprint": [], "times": []}
started = time.perf_counter()
for step, (x,) in enumerate(loader):
    if step == 2 * BLOCK * BLOCKS:
        break
    arm = "on" if step // BLOCK % 2 else "off"
    begin = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x).transpose(1, 2), x).backward()
    optimizer.step()
    took = time.perf_counter() - begin
    if arm == "on" and step % BLOCK == BLOCK - 1:
        for kind, compare in (("times", False), ("fingerprint", True)):
            begin = time.perf_counter()
            inspection.look(compare)
            times[kind].append(time.perf_counter() - begin)
    if step >= BLOCK:
        times[arm].append(took)
if hvdlm.is_main():
    middle = {name: median_interval(values) for name, values in times.items()}
    part = [
        100 * (f / 100 + t * (1 / 20 - 1 / 100)) / middle["off"].median
        for f, t in zip(times["fingerprint"], times["times"], strict=True)
    ]
    count = sum(p.numel() for p in net.parameters())
    print(f"{count:,} parameters; ms: " + ", ".join(f"{n} {1e3 * m.median:.2f}" for n, m in middle.items()))
    print(f"per cent of a step: {median_interval(part)}")
