"""A character GPT as small research scripts are: random batches from a memory map, AMP, warm-up, checkpoints."""

import argparse
import math
import os
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="corpus.bin")
parser.add_argument("--out-dir", default="out")
parser.add_argument("--max-iters", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--block-size", type=int, default=32)
parser.add_argument("--n-embd", type=int, default=48)
parser.add_argument("--grad-accum", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--eval-interval", type=int, default=20)
args = parser.parse_args()

if not os.path.exists(args.data):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8).tofile(f"{args.data}.{os.getpid()}")
    os.replace(f"{args.data}.{os.getpid()}", args.data)

torch.manual_seed(1337)
os.makedirs(args.out_dir, exist_ok=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
autocast = torch.autocast(device, dtype=torch.float16) if device == "cuda" else nullcontext()


def get_batch(split):
    data = np.memmap(args.data, dtype=np.uint8, mode="r")
    n = int(0.9 * len(data))
    data = data[:n] if split == "train" else data[n:]
    ix = torch.randint(len(data) - args.block_size - 1, (args.batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + args.block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + args.block_size].astype(np.int64)) for i in ix])
    return x.to(device), y.to(device)


class Block(nn.Module):
    def __init__(self, n_embd, n_head=4):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            h.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for h in self.attn(self.ln_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.blocks = nn.Sequential(Block(args.n_embd), Block(args.n_embd))
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, 256, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


model = GPT().to(device)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


@torch.no_grad()
def estimate_loss():
    model.eval()
    out = {split: torch.stack([model(*get_batch(split))[1] for _ in range(20)]).mean() for split in ("train", "val")}
    model.train()
    return out


X, Y = get_batch("train")
t0 = time.time()
for it in range(args.max_iters):
    lr = args.learning_rate * min((it + 1) / 10, 0.5 * (1 + math.cos(math.pi * it / args.max_iters)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if it and it % args.eval_interval == 0:
        losses = estimate_loss()
        print(f"step {it}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        torch.save({"model": model.state_dict(), "iter": it}, os.path.join(args.out_dir, "ckpt.pt"))
    for _ in range(args.grad_accum):
        with autocast:
            logits, loss = model(X, Y)
            loss = loss / args.grad_accum
        X, Y = get_batch("train")
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
print(f"last loss {loss.item() * args.grad_accum:.4f} in {time.time() - t0:.1f} s")
print(f"final loss {estimate_loss()['val']:.4f}")
