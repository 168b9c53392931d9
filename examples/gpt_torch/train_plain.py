"""A small GPT, trained character by character on the language reference that ships with Python.

Run it with ``python train_plain.py``; ``--help`` lists the settings.
"""

import argparse
import math
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Blocks(Dataset):
    """Consecutive blocks of a text: characters, and for each the one that follows it."""

    def __init__(self, tokens, block_size):
        self.tokens, self.block_size = tokens, block_size

    def __len__(self):
        return (len(self.tokens) - 1) // self.block_size

    def __getitem__(self, index):
        start = index * self.block_size
        block = self.tokens[start : start + self.block_size + 1]
        return block[:-1], block[1:]


class Layer(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=True)
        x = x + F.dropout(self.out(attended.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, layers, width, heads, dropout):
        super().__init__()
        self.block_size = block_size
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(block_size, width))
        self.layers = nn.Sequential(*(Layer(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.tokens(x) + self.positions[: x.shape[1]])))


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    losses = [(loss_of(model, inputs, targets), len(inputs)) for inputs, targets in loader]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def train(model, optimizer, scheduler, train_loader, valid_loader, args):
    steps = 0
    for epoch in range(1, args.epochs + 1):
        for inputs, targets in train_loader:
            loss = loss_of(model, inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            steps += 1
            if steps == args.steps:
                break
        print(f"epoch {epoch}  valid_loss {evaluate(model, valid_loader):.4f}")
        if steps == args.steps:
            break
    if args.checkpoint:
        torch.save(model.state_dict(), args.checkpoint)


@torch.no_grad()
def sample(model, prompt, length):
    model.eval()
    tokens = prompt
    for _ in range(length):
        logits = model(tokens[None, -model.block_size :])[0, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)])
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="where to save the trained model")
    parser.add_argument("--sample", type=int, default=0, help="characters of text to write at the end")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # Every tenth document is for validation.
    documents = [text for _, text in sorted(topics.items())]
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(documents))))}

    def encode(text):
        return torch.tensor([alphabet[c] for c in text])

    valid_text = "\n".join(documents[::10])
    train_text = "\n".join(text for i, text in enumerate(documents) if i % 10)
    train_loader = DataLoader(Blocks(encode(train_text), args.block_size), args.batch_size, shuffle=True)
    valid_loader = DataLoader(Blocks(encode(valid_text), args.block_size), args.batch_size)

    model = GPT(len(alphabet), args.block_size, args.layers, args.width, args.heads, args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    total = args.epochs * len(train_loader)
    warmup = min(50, total // 10)

    def cosine(step):
        return min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * min(1, step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    train(model, optimizer, scheduler, train_loader, valid_loader, args)
    if args.sample:
        text = sample(model, encode("The "), args.sample)
        print("".join(list(alphabet)[i] for i in text))


if __name__ == "__main__":
    main()
