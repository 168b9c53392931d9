"""A small BERT from a ``transformers`` configuration, trained on masked characters of Python's language reference.

Needs transformers. Run it with ``hvdlm run -np 2 train_hvdlm.py``; ``--help`` lists the settings.
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM

import hvdlm

PAD, MASK, NUM_SPECIAL = 0, 1, 2


class MaskedBlocks(Dataset):
    """Blocks of text with 15 % of the characters hidden: the same number in each block, the same ones in each epoch."""

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed

    def __len__(self):
        return len(self.tokens) // self.block_size

    def __getitem__(self, index):
        tokens = self.tokens[index * self.block_size : (index + 1) * self.block_size]
        generator = torch.Generator().manual_seed(self.seed * len(self) + index)
        hidden = torch.randperm(self.block_size, generator=generator)[: self.block_size * 15 // 100]
        inputs, labels = tokens.clone(), torch.full_like(tokens, -100)
        inputs[hidden], labels[hidden] = MASK, tokens[hidden]
        return {"input_ids": inputs, "labels": labels}


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    losses = [(model(**batch).loss, len(batch["labels"])) for batch in loader]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@hvdlm.distribute
def train(model, optimizer, scheduler, train_loader, valid_loader, args):
    steps = 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps += 1
            if steps == args.steps:
                break
        hvdlm.log(epoch=epoch, valid_loss=evaluate(model, valid_loader))
        if steps == args.steps:
            break
    if args.checkpoint:
        hvdlm.save(model.state_dict(), args.checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="where to save the trained model")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # Every tenth document is for validation.
    documents = [text for _, text in sorted(topics.items())]
    alphabet = {c: NUM_SPECIAL + i for i, c in enumerate(sorted(set("".join(documents))))}
    train_text = "\n".join(text for i, text in enumerate(documents) if i % 10)
    valid_text = "\n".join(documents[::10])
    train_set, valid_set = (
        MaskedBlocks(torch.tensor([alphabet[c] for c in text]), args.block_size, args.seed)
        for text in (train_text, valid_text)
    )
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True)
    valid_loader = DataLoader(valid_set, args.batch_size)

    config = BertConfig(
        vocab_size=NUM_SPECIAL + len(alphabet),
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        intermediate_size=4 * args.width,
        max_position_embeddings=args.block_size,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        pad_token_id=PAD,
    )
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(train_loader))
    train(model, optimizer, scheduler, train_loader, valid_loader, args)


if __name__ == "__main__":
    main()
