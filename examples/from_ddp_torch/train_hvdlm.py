"""A character LSTM on Python's language reference, written once for DistributedDataParallel.

hvdlm run -np 2 train_hvdlm.py --epochs 2
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvdlm


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

    dataset = TensorDataset(blocks[:, :-1], blocks[:, 1:])
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    model = CharLSTM(len(alphabet))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = hvdlm.wrap(model, optimizer, loader)
    for epoch in range(args.epochs):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        hvdlm.log(epoch=epoch + 1, loss=hvdlm.mean(loss))


if __name__ == "__main__":
    main()
