"""Small PyTorch scripts for ``hvdlm verify``: correct ones, and ones with one mistake each."""

from __future__ import annotations

__all__ = ["CORRECT", "MISTAKES"]

_BASE = """
import torch, hvdlm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

{setup}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(96, 32){middle}, nn.GELU())
        self.head = nn.Linear(32, 5)
        {extra}

    def forward(self, x):
        return self.head(self.body(x))

generator = torch.Generator().manual_seed(1)
data = TensorDataset(
    torch.randint(50, (256, 6), generator=generator), torch.randint(5, (256,), generator=generator)
)
torch.manual_seed({seed})
net = Net()
optimizer = torch.optim.{optimizer}(net.parameters(), lr={lr})
loader = DataLoader(data, batch_size=16, shuffle=True)
criterion = nn.CrossEntropyLoss(reduction="{loss}")
{wrap}
{after}
for step, (x, y) in enumerate(loader):
    {before_step}
    optimizer.zero_grad()
    criterion(net(x), y).backward()
    {after_backward}
    {step}
    {after_step}
"""
_DEFAULTS = {
    "setup": "",
    "middle": "",
    "extra": "pass",
    "seed": "0",
    "optimizer": "AdamW",
    "lr": "1e-3",
    "loss": "mean",
    "wrap": "net, optimizer, loader = hvdlm.wrap(net, optimizer, loader)",
    "after": "",
    "before_step": "pass",
    "after_backward": "pass",
    "step": "optimizer.step()",
    "after_step": "pass",
}


def _script(**parts: str) -> str:
    return _BASE.format(**(_DEFAULTS | parts))


CORRECT = {
    "plain": _script(),
    "sgd": _script(optimizer="SGD", lr="0.1"),
    "clip": _script(after_backward="nn.utils.clip_grad_norm_(net.parameters(), 0.5)"),
    "sum": _script(loss="sum", wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, reduction="sum")'),
    "batch_norm": _script(middle=", nn.BatchNorm1d(32)"),
    "per_worker": _script(
        wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, batch="per_worker", lr_scale="linear")'
    ),
    "schedule": _script(after="for g in optimizer.param_groups: g['lr'] *= 0.5"),
    "save": _script(after_step='hvdlm.save(net.state_dict(), "ok.pt")'),
    "main_only": _script(after_step='torch.save(net.state_dict(), "ok.pt") if hvdlm.is_main() else None'),
    "weights": _script(
        wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, balance="static", weights='
        "[1, 3] if hvdlm.size() == 2 else [])"
    ),
}

MISTAKES = {
    "not_sharded": ("data", _script(wrap="net, optimizer = hvdlm.wrap(net, optimizer)", setup="import itertools")),
    "same_generator": (
        "data",
        _script(
            wrap="net, optimizer = hvdlm.wrap(net, optimizer)",
            after="g = torch.Generator().manual_seed(3)\n"
            "loader = [tuple(t[torch.randint(256, (8,), generator=g)] for t in data.tensors) for _ in range(20)]",
        ),
    ),
    "rate_scaled_by_hand": (
        "learning rate",
        _script(after="for g in optimizer.param_groups: g['lr'] *= hvdlm.size()"),
    ),
    "rate_reset": (
        "learning rate",
        _script(
            wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, batch="per_worker", lr_scale="linear")',
            before_step="optimizer.param_groups[0]['lr'] = 1e-3 / (step + 1)",
        ),
    ),
    "clipped_before": (
        "clipping",
        _script(extra="[p.register_hook(lambda g: g.clamp(-1e-3, 1e-3)) for p in self.parameters()]"),
    ),
    "normalised_before": (
        "clipping",
        _script(extra="[p.register_hook(lambda g: g / (g.norm() + 1e-6)) for p in self.parameters()]"),
    ),
    "seed_by_rank": ("seed", _script(seed="hvdlm.rank()")),
    "dropout": ("dropout", _script(middle=", nn.Dropout(0.3)")),
    "local_norms": (
        "batch norm",
        _script(
            middle=", nn.BatchNorm1d(32)",
            wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, batch_norm="local")',
        ),
    ),
    "buffer": (
        "buffer",
        _script(extra='self.register_buffer("mean", torch.zeros(()))', after_step="net.mean += x.float().mean()"),
    ),
    "parameter": (
        "parameter",
        _script(after_step="net.head.bias.data.add_(1e-3 * hvdlm.rank())"),
    ),
    "not_given": (
        "parameter",
        _script(
            setup="other = nn.Linear(32, 5)",
            after="own = [p for p in net.parameters()] + [nn.Parameter(torch.zeros(5))]\n"
            "optimizer = torch.optim.SGD(own, lr=0.1)",
            after_backward="own[-1].grad = torch.full((5,), float(x.sum()) * 1e-3)",
        ),
    ),
    "sum_as_mean": ("loss", _script(loss="sum")),
    "mean_as_sum": (
        "loss",
        _script(wrap='net, optimizer, loader = hvdlm.wrap(net, optimizer, loader, reduction="sum")'),
    ),
    "step_on_main": ("optimizer step", _script(step="optimizer.step() if hvdlm.is_main() else None")),
    "save_everywhere": ("checkpoint", _script(after_step='torch.save(net.state_dict(), "checkpoint.pt")')),
}
"""name -> (cause that verify names, script)"""
