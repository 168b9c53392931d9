"""What goes wrong on purpose, on one rank, while two train: see test_inspection.py."""

import sys
import time

import torch

import hvdlm

case = sys.argv[1]
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
net.register_buffer("seen", torch.zeros(3))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
data = torch.utils.data.TensorDataset(torch.randn(200, 4), torch.randn(200, 1))
options = {"resync": {"on_divergence": "resync"}, "warn": {"on_divergence": "warn"}}.get(case, {})
if case in ("missing", "mismatch"):
    options = {"watchdog_seconds": 1.0}
net, optimizer, loader = hvdlm.wrap(
    net,
    optimizer,
    torch.utils.data.DataLoader(data, batch_size=8),
    fingerprint_every=1 if len(sys.argv) > 2 else 4,
    **options,
)
odd = hvdlm.rank() == 1


def linger() -> None:
    time.sleep(5)


step = 0
for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 2):
    for x, y in loader:
        step += 1
        optimizer.zero_grad()
        if case == "missing" and step == 6 and odd:
            linger()
        if case == "mismatch" and step == 6:
            hvdlm.barrier() if odd else hvdlm.mean(1.0)
        (net(x) - y).square().mean().backward()
        optimizer.step()
        if step == 6 and odd:
            with torch.no_grad():
                if case in ("flip", "resync", "warn"):
                    bits = net[2].weight.view(torch.int32)
                    bits[0, 3] ^= 1  # the last bit of one number
                if case == "buffer":
                    net.seen += 1
                if case == "skipped":  # a state loaded after the broadcast, on one rank only
                    net[0].bias.copy_(torch.ones(8))
print(f"rank {hvdlm.rank()} ended")
