"""A word-level LSTM in the manner of the classic example: truncated back-propagation, SGD by hand, no optimizer."""

import argparse
import math
import os
from pydoc_data.topics import topics

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=20)
parser.add_argument("--bptt", type=int, default=12)
parser.add_argument("--nhid", type=int, default=48)
parser.add_argument("--lr", type=float, default=5.0)
parser.add_argument("--clip", type=float, default=0.25)
parser.add_argument("--words", type=int, default=6000)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--save", default="lstm.pt")
args = parser.parse_args()
torch.manual_seed(1111)

words = " ".join(topics[name] for name in sorted(topics)).split()[: args.words]
vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
ids = torch.tensor([vocabulary[word] for word in words])


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    return data.narrow(0, 0, nbatch * bsz).view(bsz, -1).t().contiguous()


cut = len(ids) * 9 // 10
train_data = batchify(ids[:cut], args.batch_size)
val_data = batchify(ids[cut:], 10)


class RNNModel(nn.Module):
    def __init__(self, ntoken, nhid, dropout):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, nhid)
        self.rnn = nn.LSTM(nhid, nhid, 1)
        self.decoder = nn.Linear(nhid, ntoken)

    def forward(self, tokens, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).view(-1, self.decoder.out_features), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(1, bsz, self.rnn.hidden_size), weight.new_zeros(1, bsz, self.rnn.hidden_size)


model = RNNModel(len(vocabulary), args.nhid, args.dropout)
criterion = nn.CrossEntropyLoss()


def get_batch(source, i):
    seq_len = min(args.bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].reshape(-1)


def evaluate(source):
    model.eval()
    total, hidden = 0.0, model.init_hidden(source.size(1))
    with torch.no_grad():
        for i in range(0, source.size(0) - 1, args.bptt):
            data, targets = get_batch(source, i)
            output, hidden = model(data, hidden)
            total += len(data) * criterion(output, targets).item()
    return total / (len(source) - 1)


def train(lr):
    model.train()
    total, hidden = 0.0, model.init_hidden(train_data.size(1))
    steps = range(0, train_data.size(0) - 1, args.bptt)
    for i in steps:
        data, targets = get_batch(train_data, i)
        hidden = tuple(h.detach() for h in hidden)
        model.zero_grad()
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)
        total += loss.item()
    return total / len(steps)


lr, best = args.lr, None
for epoch in range(1, args.epochs + 1):
    train_loss = train(lr)
    val_loss = evaluate(val_data)
    print(f"epoch {epoch}: train loss {train_loss:.4f}, valid loss {val_loss:.4f}, ppl {math.exp(val_loss):.1f}")
    if best is None or val_loss < best:
        torch.save(model.state_dict(), args.save)
        best = val_loss
    else:
        lr /= 4.0
if os.path.exists(args.save):
    model.load_state_dict(torch.load(args.save))
print(f"final loss {evaluate(val_data):.4f}")
