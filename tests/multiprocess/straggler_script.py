"""A job in which one rank is slow on purpose: see test_stragglers.py."""

import sys
import time

import torch

import hvdlm

case, options = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
slow = hvdlm.rank() == 1


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16 * 50

    def __getitem__(self, i):
        if case == "data" and slow:
            time.sleep(0.01)
        return torch.full((4,), float(i % 7)), torch.zeros(1)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        time.sleep(len(x) * (0.015 if case == "compute" and slow else 0.005))
        return self.layer(x)


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(Data(), batch_size=16)
net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, timings_every=10, **options)
for x, y in loader:
    optimizer.zero_grad()
    (net(x) - y).square().mean().backward()
    optimizer.step()
