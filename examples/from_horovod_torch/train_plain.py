"""A convolutional character model on Python's language reference, written for bare Horovod.

horovodrun -np 2 python train_plain.py --epochs 2
"""

import argparse
from pydoc_data.topics import topics

import horovod.torch as hvd
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class CharCNN(nn.Module):
    def __init__(self, vocabulary, width=64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, kernel_size=8)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        past = nn.functional.pad(self.embedding(x).mT, (7, 0))
        return self.head(self.mix(past).relu().mT)


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

    hvd.init()
    dataset = TensorDataset(blocks[:, :-1], blocks[:, 1:])
    sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(dataset, batch_size=32 // hvd.size(), sampler=sampler)
    model = CharCNN(len(alphabet))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        mean = hvd.allreduce(loss.detach()).item()
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}  loss {mean:.4f}")


if __name__ == "__main__":
    main()
