"""Image classification with a small vision transformer and LoRA, by plain calls.

    python examples/image_classification.py

Small pictures of five shapes, offline, in a minute. The model is a ViT that starts from random numbers, so besides the
adapter everything but its linear layers trains. With a pretrained one put its name in place of `random:vit`, and as
`processor` in place of `size`, and leave out `random_config` and `also_train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

import lora_lightning as ll
from lora_lightning.callbacks import RunReport
from lora_lightning.data import LabelledImages

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,  # a frozen layer with the usual 0.02 passes on next to nothing at this width
}


def main() -> None:
    """Fit, validate, predict, merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="builtin:shapes", help="a folder with a folder of images for each class")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("image_classification"))
    args = parser.parse_args()
    seed_everything(0)

    # the model, with an adapter on every linear layer and a head for the classes of the data
    data = LabelledImages(train=args.train, size=32, validation_fraction=0.2, batch_size=32)
    model = ll.AdapterModule(
        "random:vit",
        ll.method("LoRA")(rank=32, alpha=64),
        task="image-classification",
        also_train=["embeddings", "layernorm", "layernorm_before", "layernorm_after", "classifier"],
        optimizer=lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.0),
        linear_baseline=False,
        random_config=SMALL,
    )
    trainer = Trainer(
        max_steps=args.steps,
        callbacks=[RunReport(args.output)],  # prints what is adapted and what moved; writes the adapter
        default_root_dir=args.output,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    trainer.validate(model, data)

    # the class of each validation image, and the same from plain layers
    adapted = [row for batch in trainer.predict(model, data) for row in batch]
    ll.merge(model)
    merged = [row for batch in trainer.predict(model, data) for row in batch]
    for row in adapted[:5]:
        print(row)
    same = sum(one["prediction"] == other["prediction"] for one, other in zip(adapted, merged, strict=True))
    print(f"merged: {same} of {len(adapted)} images have the same class")


if __name__ == "__main__":
    main()
