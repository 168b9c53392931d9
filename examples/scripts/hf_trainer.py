"""HuggingFace's Trainer over a configuration with random weights."""

from pydoc_data.topics import topics

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

BLOCK = 32
text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")[:20000]
tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Blocks(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data) // BLOCK

    def __getitem__(self, i):
        block = self.data[i * BLOCK : (i + 1) * BLOCK]
        return {"input_ids": block, "labels": block}


cut = len(tokens) * 9 // 10
config = GPT2Config(
    vocab_size=256, n_positions=BLOCK, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
torch.manual_seed(0)
trainer = Trainer(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        output_dir="trainer-out",
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=20,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        seed=3,
    ),
    train_dataset=Blocks(tokens[:cut]),
    eval_dataset=Blocks(tokens[cut:]),
)
trainer.train()
print(f"final loss {trainer.evaluate()['eval_loss']:.4f}")
trainer.save_model("trainer-out/final")
