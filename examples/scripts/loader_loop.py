"""A GRU trained with a plain DataLoader loop: random split, worker processes, scheduler, tqdm, validation."""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split
from tqdm import tqdm


class Windows(Dataset):
    def __init__(self, length, count):
        text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
        self.data, self.length, self.count = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), length, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        start = i * (len(self.data) - self.length - 1) // self.count
        return self.data[start : start + self.length], self.data[start + 1 : start + self.length + 1]


class GRUModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.gru = nn.Embedding(256, width), nn.GRU(width, width, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x):
        return self.head(self.norm(self.gru(self.embed(x))[0]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(7)
    data = Windows(24, args.samples)
    train_set, valid_set = random_split(data, [args.samples * 9 // 10, args.samples - args.samples * 9 // 10])
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True, num_workers=1)
    valid_loader = DataLoader(valid_set, batch_size=32)
    model = GRUModel(48)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, epochs=args.epochs, steps_per_epoch=len(train_loader)
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        model.train()
        for x, y in tqdm(train_loader, desc=f"epoch {epoch}"):
            optimizer.zero_grad()
            loss = criterion(model(x).transpose(1, 2), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.no_grad():
            losses = [criterion(model(x).transpose(1, 2), y).item() * len(x) for x, y in valid_loader]
        valid = sum(losses) / len(valid_set)
        print(f"epoch {epoch}: validation {valid:.4f}")
        torch.save(model.state_dict(), "gru.pt")
    print(f"final loss {valid:.4f}")


if __name__ == "__main__":
    main()
