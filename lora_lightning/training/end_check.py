"""EndCheck: says before training that a model cannot learn to end its answers."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lora_lightning.callbacks.step_counting import outside_step
from lora_lightning.distributed import reshard
from lora_lightning.injection.records import injected_root
from lora_lightning.models.generation import end_of_answer
from lora_lightning.models.untrained_rows import untrained_rows


class EndCheck(Callback):
    """Looks at the row of the token that ends an answer in the output layer of a language model, once a fit.

    Base models often have tokens that pretraining never reached, the end of a chat's turn among them. Adapters on other
    layers cannot tell them apart, so that answers would go on without end.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a note, with the setting that trains the row."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer_object", None)
        model: Any = injected_root(pl_module)
        if tokenizer is None or not hasattr(model, "get_output_embeddings"):
            return
        end = end_of_answer(tokenizer)
        found = outside_step(trainer, lambda: untrained_rows(model, [] if end is None else [end]))
        reshard(model)
        for token, others in found.items():
            text = tokenizer.convert_ids_to_tokens(token)
            setting = row_setting(model, text)
            if trainer.is_global_zero:
                print(
                    f"note: {text}, which ends an answer, has the same row in the output layer as {others:,} other "
                    "tokens, as rows have that pretraining never reached. The model cannot learn to write it and not "
                    f"them, so that answers would not end. model.train_tokens: {setting} trains its row.",
                    flush=True,
                )


def row_setting(model: Any, text: str) -> str:
    """The value of `train_tokens` that trains a token's row of the output layer."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output.weight is embedding.weight:
        return json.dumps([text])
    path = next(path for path, module in model.named_modules() if module is output)
    return json.dumps({path.rpartition(".")[2]: [text]})
