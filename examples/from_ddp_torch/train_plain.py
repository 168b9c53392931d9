"""A character LSTM on Python's language reference, written for DistributedDataParallel.

torchrun --nproc-per-node 2 train_plain.py --epochs 2
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class CharLSTM(nn.Module):
    def __init__(self, vocabulary, width=64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--characters", type=int, default=60_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    text = "\n".join(text for _, text in sorted(topics.items()))[: args.characters]
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[c] for c in text])
    blocks = tokens[: len(tokens) // 65 * 65].view(-1, 65)

    dist.init_process_group("gloo")
    dataset = TensorDataset(blocks[:, :-1], blocks[:, 1:])
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32 // dist.get_world_size(), sampler=sampler)
    model = DistributedDataParallel(CharLSTM(len(alphabet)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
