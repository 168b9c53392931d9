"""Ten thousand steps whose replicas are compared after every one: no false alarm, of nothing that watches.

    hvdlm run -np 2 tests/perf/soak_watch.py             # --steps 10000, --every 1

A model with dropout, BatchNorm, an embedding and a tied head, under AdamW with clipping and a schedule. Exit code
1 if the events of the run hold a divergence or a stall.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import nn

import hvdlm
from hvdlm.api import _current

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--every", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.1)
        self.head = nn.Linear(32, 64)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.hidden(self.embed(x))))))  # type: ignore[no-any-return]


net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
ids = torch.randint(64, (4096,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=16, shuffle=True)
net, optimizer, scheduler, loader = hvdlm.wrap(
    net, optimizer, scheduler, loader, fingerprint_every=args.every, timings_every=20
)
started, step = time.perf_counter(), 0
while step < args.steps:
    for (x,) in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x * 7 + 3) % 64).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        step += 1
        if step == args.steps:
            break
seconds = time.perf_counter() - started
if hvdlm.is_main():
    path = _current().run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    alarms = [event for event in events if event["event"] in ("divergence", "stall")]
    compared = (step - 1) // args.every
    print(
        f"{step:,} steps in {seconds:.0f} s, replicas compared {compared:,} times, {len(alarms)} false alarms {alarms}"
    )
    sys.exit(bool(alarms))
