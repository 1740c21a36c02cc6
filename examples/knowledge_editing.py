"""Editing facts into a language model: RoseLoRA beside LoRA with as many non-zero numbers.

    python examples/knowledge_editing.py stories260k

The model is a folder of a small causal language model of children's stories. Six facts are edited in together. Printed
are, as mean and standard deviation over seeds:

    edit success   share of the new answers' tokens that the edited model puts first; `before`, that the model did
    locality       share of tokens that the model put first after prompts like those of the facts, and still does
    drift          KL divergence of next-token distributions there, from before to after, in nats

Wang et al., 2024, arXiv:2406.10777, section 4.1, edit so; their models, facts and scores are others.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning import InjectAdapters, Method, method
from lora_lightning.injection.records import trainable_adapters

FACTS = {
    "Lily's favorite color was": "gray",
    "The name of Tom's dog was": "Jack",
    "Every morning Ben liked to eat": "fish",
    "The old king lived in a": "boat",
    "In the box Mia found a": "star",
    "At the park Sam played with a": "frog",
}
NEIGHBOURS = [
    "Anna's favorite color was",
    "Lily's favorite toy was",
    "The name of Sue's cat was",
    "The name of Tom's friend was",
    "Every night Ben liked to",
    "Every morning Lucy liked to eat",
    "The old man lived in a",
    "The little mouse lived in a",
    "In the garden Mia found a",
    "In the box Max found a",
    "At the beach Sam played with a",
    "At the park Jane saw a",
]
CONTINUED = 8
"""Tokens that each neighbour is continued by."""


class Edit(LightningModule):
    """A causal language model that learns the answers of the facts."""

    def __init__(self, model: Any, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the answers' tokens, all facts at once."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as the authors edit."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def as_batch(tokenizer: Any, facts: dict[str, str]) -> dict[str, Tensor]:
    """Facts as one batch, (n, longest); only answers have a loss, padding stands behind."""
    rows = [(tokenizer(p).input_ids, tokenizer(f"{p} {a}").input_ids) for p, a in facts.items()]
    longest = max(len(whole) for _, whole in rows)
    pad = [[0] * (longest - len(whole)) for _, whole in rows]
    ids = [whole + more for (_, whole), more in zip(rows, pad, strict=True)]
    labels = [
        [-100] * len(p) + whole[len(p) :] + [-100] * len(more) for (p, whole), more in zip(rows, pad, strict=True)
    ]
    seen = [[1] * len(whole) + more for (_, whole), more in zip(rows, pad, strict=True)]
    parts = {"input_ids": ids, "labels": labels, "attention_mask": seen}
    return {name: torch.tensor(part) for name, part in parts.items()}


@torch.no_grad()
def edit_success(model: Any, batch: dict[str, Tensor]) -> float:
    """Share of the answers' tokens that come first."""
    first, wanted = model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    return float((first == wanted)[wanted != -100].float().mean())


@torch.no_grad()
def continuations(model: Any, tokenizer: Any) -> list[Tensor]:
    """What the model goes on with after each neighbour, (1, n) each, the prompt in front."""
    prompts = [torch.tensor([tokenizer(text).input_ids]) for text in NEIGHBOURS]
    return [model.generate(p, max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0) for p in prompts]


@torch.no_grad()
def distributions(model: Any, texts: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the tokens behind each neighbour, (neighbours * CONTINUED, vocabulary)."""
    logits = [model(text).logits[0, -CONTINUED - 1 : -1] for text in texts]
    return torch.cat(logits).log_softmax(-1)


def edit(folder: Path, chosen: Method, seed: int, steps: int, lr: float) -> dict[str, float]:
    """Edit a fresh copy of the model and measure it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = continuations(model.eval(), tokenizer)
    before, batch = distributions(model, texts), as_batch(tokenizer, FACTS)
    success_before = edit_success(model, batch)
    module = Edit(model.train(), lr)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[InjectAdapters(chosen, targets=["q_proj", "v_proj", "down_proj"], also_train=[], seed=seed)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    model.eval()
    after = distributions(model, texts)
    trained = [p for adapter in trainable_adapters(model).values() for p in adapter.parameters()]
    return {
        "edit success": edit_success(model, batch),
        "before": success_before,
        "locality": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        "drift": float((before.exp() * (before - after)).sum(-1).mean()),
        "non-zero": float(sum(int((p != 0).sum()) for p in trained)),
    }


def main() -> None:
    """Edit with both methods, over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    # an eighth of the entries of rank 8 is as many as rank 1 has; both have scaling 2
    methods = {
        "RoseLoRA": method("RoseLoRA")(rank=8, alpha=16.0, sparsity=0.875, start=0.1, end=0.6),
        "LoRA": method("LoRA")(rank=1, alpha=2.0),
    }
    lines = []
    for name, chosen in methods.items():
        runs = [edit(args.model, chosen, seed, args.steps, args.lr) for seed in args.seeds]
        cells = []
        for what in runs[0]:
            values = [run[what] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{what} {statistics.mean(values):.4g} ± {spread:.2g}")
        lines.append(f"{name:<10}{'   '.join(cells)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
