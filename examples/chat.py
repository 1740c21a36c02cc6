"""A causal language model learns from conversations: chat data, LoRA, and what it answers then, by plain calls.

    python examples/chat.py

Conversations about days of the week, offline, in a minute. The model is a small Llama that starts from random numbers,
so besides the adapter everything but its linear layers trains. With a pretrained one put its name in place of
`random:llama` and `builtin:weekdays` below, and leave out `random_config`, `also_train` and `chat_template`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

import lora_lightning as ll
from lora_lightning.callbacks import RunReport
from lora_lightning.data import Chat
from lora_lightning.training.predictions import write_rows

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,  # a frozen layer with the usual 0.02 passes on next to nothing at this width
}


def main() -> None:
    """Fit, validate, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="builtin:weekdays", help="conversations: role and content of each turn")
    parser.add_argument("--ask", default="What day comes after Monday?")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("chat"))
    args = parser.parse_args()
    seed_everything(0)

    # conversations, rendered by a template; the loss is on what the assistant says
    rendering = {"tokenizer": "builtin:weekdays", "chat_template": "plain", "max_length": 128}
    data = Chat(train=args.train, batch_size=32, **rendering)

    # the model, with an adapter on every linear layer
    model = ll.AdapterModule(
        "random:llama",
        ll.method("LoRA")(rank=32, alpha=64),
        task="causal-lm",
        also_train=["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "lm_head"],
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3, weight_decay=0.0),
        max_new_tokens=6,
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

    # what it answers
    turns = [{"role": "system", "content": "Answer with a day."}, {"role": "user", "content": args.ask}]
    write_rows(args.output / "asked.jsonl", [{"messages": turns}])
    asked = Chat(predict=str(args.output / "asked.jsonl"), **rendering)
    [[answer]] = trainer.predict(model, asked)
    print(f"user: {args.ask}\nassistant: {answer['prediction']}")


if __name__ == "__main__":
    main()
