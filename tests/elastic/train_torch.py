"""A small training whose end depends on every sample and step: AdamW, a scheduler, clipping."""

from __future__ import annotations

import os
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from tests.elastic import faults

SAMPLES, BATCH, EPOCHS = 188, 8, 3
PAUSE = float(os.environ.get("PAUSE", "0.02"))

faults.at("start")


class Model(torch.nn.Module):
    """Two layers; counts its training steps for the faults."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predict."""
        if self.training:
            self.steps += 1
            faults.at("step", self.steps)
        return self.layers(x)


@hvdlm.distribute(commit_every=os.environ.get("COMMIT", "7"))
def train(model, optimizer, scheduler, loader, valid_loader):
    best = {"loss": float("inf")}
    hvdlm.register("best", best)
    for _epoch in range(EPOCHS):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            # A test that changes things from outside holds training back meanwhile, however slow the machine is.
            time.sleep(0.7 if os.path.exists("slow") else PAUSE)
        model.eval()
        with torch.no_grad():
            loss = sum(float(torch.nn.functional.mse_loss(model(x), y)) for x, y in valid_loader)
        best["loss"] = min(best["loss"], loss)
    hvdlm.save({"model": model.state_dict(), "best": best["loss"], "lr": scheduler.get_last_lr()}, "final.pt")


def main() -> None:
    faults.install()
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SAMPLES, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15, 0.9)
    data = TensorDataset(x, y)
    train(model, optimizer, scheduler, DataLoader(data, BATCH, shuffle=True), DataLoader(data, 64))


main()
