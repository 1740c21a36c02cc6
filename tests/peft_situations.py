"""Situations that peft's own tests try, tried here: read, computed alike, trained on and written back, or refused.

`python tests/peft_situations.py` prints the table of docs/export.md. An adapter is made and saved by peft, read here,
compared with peft's output, exported again, and opened by peft once more. What another method of peft's wrote is
"missing"; a refusal is shown with its words.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from pages import DOCS, as_table, write
from peft_models import llama, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import LoraLightningError

PAGE = DOCS / "export.md"
PART = "peft situations"
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


class MLP(nn.Module):
    """Two layers, as in peft's tests."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20, bias=bias), nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


class Embedded(nn.Module):
    """An embedding before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0 = nn.Embedding(30, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.emb(x))


class Convolved(nn.Module):
    """A convolution before a layer."""

    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        self.conv = getattr(nn, f"Conv{dims}d")(4, 8, 3, **options)
        self.lin0 = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv(x).flatten(1))


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Bare(nn.Module):
    """A parameter that is no layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.inner = nn.Linear(10, 8), nn.Module()
        self.inner.matrix = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(x) @ self.inner.matrix


def bert(kind: str = "SequenceClassification") -> nn.Module:
    cls = getattr(transformers, f"BertFor{kind}")
    return seeded(lambda: cls(transformers.BertConfig(num_labels=2 if kind == "QuestionAnswering" else 3, **SMALL)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8, num_key_value_heads=2, **SMALL
    )
    return seeded(lambda: transformers.Qwen3MoeForCausalLM(config))


def own(build: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = seeded(build)
        model.example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(model.example)  # lazy layers take their size
        return model

    return make


def embedded() -> nn.Module:
    model = seeded(Embedded)
    model.example = torch.arange(6).view(2, 3)
    return model


def output(model: nn.Module) -> Tensor:
    """Logits on inputs that are the same for each model of a class."""
    inner = getattr(getattr(model, "base_model", model), "model", model) if isinstance(model, peft.PeftModel) else model
    if hasattr(inner, "example"):
        return model(inner.example)
    ids = torch.arange(3, 12)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more)[0]


@dataclass(frozen=True)
class Situation:
    """One way to make an adapter with peft."""

    build: Callable[[], nn.Module]
    options: dict[str, Any]
    config: Any = peft.LoraConfig
    extra: dict[str, Any] = field(default_factory=dict)


def lora(build: Callable[[], nn.Module], *targets: str, **options: Any) -> Situation:
    return Situation(build, {"r": 4, "lora_alpha": 6, "target_modules": list(targets) or None, **options})


def other(kind: str, build: Callable[[], nn.Module] = llama, **options: Any) -> Situation:
    return Situation(build, {"target_modules": ["q_proj"], **options}, getattr(peft, kind))


MLP_MODEL = own(MLP, 10)
SITUATIONS: dict[str, Situation] = {
    "linear layers": lora(MLP_MODEL, "lin0", "lin1"),
    "one layer": lora(MLP_MODEL, "lin0"),
    "layers without a bias": lora(own(lambda: MLP(bias=False), 10), "lin0"),
    "names by a regular expression": lora(llama, target_modules=r".*\.1\..*(q|v)_proj"),
    "`all-linear`": lora(llama, target_modules="all-linear"),
    "`exclude_modules`": lora(llama, "q_proj", "v_proj", exclude_modules=["layers.0.self_attn.q_proj"]),
    "`layers_to_transform`": lora(llama, "q_proj", layers_to_transform=[1]),
    "`layers_to_transform` with `layers_pattern`": lora(
        llama, "q_proj", layers_to_transform=1, layers_pattern="layers"
    ),
    "`rank_pattern` and `alpha_pattern`": lora(
        llama, "q_proj", "v_proj", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.v_proj": 3}
    ),
    "rank above the narrow side": lora(llama, "k_proj", r=20),
    "`use_rslora`": lora(llama, "q_proj", use_rslora=True),
    "`lora_dropout`": lora(llama, "q_proj", lora_dropout=0.1),
    "`lora_bias`": lora(MLP_MODEL, "lin0", lora_bias=True),
    "`bias`: all": lora(bert, "query", bias="all"),
    "`bias`: lora_only": lora(bert, "query", bias="lora_only"),
    "`modules_to_save`": lora(MLP_MODEL, "lin0", modules_to_save=["lin1"]),
    "a classifier": lora(bert, "query", task_type="SEQ_CLS"),
    "a token classifier": lora(lambda: bert("TokenClassification"), "query", task_type="TOKEN_CLS"),
    "answers": lora(lambda: bert("QuestionAnswering"), "query", task_type="QUESTION_ANS"),
    "an encoder with a decoder": lora(t5, "q", "v", task_type="SEQ_2_SEQ_LM"),
    "Conv1D": lora(gpt2, "c_attn", "c_fc", fan_in_fan_out=True),
    "an embedding": lora(embedded, "emb", "lin0"),
    "embedding and output layer of a language model": lora(llama, "embed_tokens", "lm_head"),
    "both, tied": lora(lambda: llama(tie_word_embeddings=True), "embed_tokens", "lm_head"),
    "both, with `ensure_weight_tying`": lora(
        lambda: llama(tie_word_embeddings=True), "embed_tokens", ensure_weight_tying=True
    ),
    "a tied embedding saved whole, with `ensure_weight_tying`": lora(
        lambda: llama(tie_word_embeddings=True), "q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "two tied weights saved whole that differ": lora(
        lambda: llama(tie_word_embeddings=True), "q_proj", modules_to_save=["embed_tokens", "lm_head"]
    ),
    "a convolution in one dimension": lora(own(lambda: Convolved(1), 4, 6), "conv"),
    "a convolution in two dimensions": lora(own(lambda: Convolved(2), 4, 6, 6), "conv"),
    "a convolution in three dimensions": lora(own(lambda: Convolved(3), 4, 4, 4, 4), "conv"),
    "a grouped convolution": lora(own(lambda: Convolved(2, groups=2), 4, 6, 6), "conv"),
    "a dilated convolution": lora(own(lambda: Convolved(1, dilation=2), 4, 8), "conv"),
    "nn.MultiheadAttention": lora(own(Attention, 3, 8), "mha"),
    "a bare nn.Parameter": lora(own(Bare, 10), target_parameters=["inner.matrix"]),
    "fused experts by `target_parameters`": lora(
        qwen3_moe, "q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "a linear layer by `target_parameters`": lora(llama, target_parameters=["mlp.up_proj.weight"]),
    "rows of known tokens": lora(llama, "q_proj", trainable_token_indices=[3, 7]),
    "DoRA": lora(llama, "q_proj", "down_proj", use_dora=True),
    "DoRA on Conv1D": lora(gpt2, "c_attn", use_dora=True, fan_in_fan_out=True),
    "DoRA on an embedding": lora(embedded, "emb", use_dora=True),
    "DoRA on a convolution": lora(own(lambda: Convolved(2), 4, 6, 6), "conv", use_dora=True),
    "DoRA with biases that train": lora(bert, "query", use_dora=True, bias="all"),
    "start: Gaussian": lora(llama, "q_proj", init_lora_weights="gaussian"),
    "start: orthogonal": lora(llama, "q_proj", init_lora_weights="orthogonal"),
    "start: MiCA": lora(llama, "q_proj", init_lora_weights="mica"),
    "start: PiSSA": lora(llama, "q_proj", init_lora_weights="pissa"),
    "start: PiSSA by iterations": lora(llama, "q_proj", init_lora_weights="pissa_niter_4"),
    "start: OLoRA": lora(llama, "q_proj", init_lora_weights="olora"),
    "activated LoRA": lora(llama, "q_proj", alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
    "layer replication": lora(llama, "q_proj", layer_replication=[[0, 1], [0, 2]]),
    "AdaLoRA": other("AdaLoraConfig", total_step=10),
    "LoHa": other("LoHaConfig"),
    "LoKr": other("LoKrConfig"),
    "OFT": other("OFTConfig", oft_block_size=4, r=0),
    "IA3": other("IA3Config", feedforward_modules=[]),
    "VeRA": other("VeraConfig"),
    "FourierFT": other("FourierFTConfig", n_frequency=8),
    "HRA": other("HRAConfig"),
    "VB-LoRA": other("VBLoRAConfig", vector_length=4, num_vectors=8, topk=2),
    "prompt tuning": Situation(llama, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}, peft.PromptTuningConfig),
    "prefix tuning": Situation(llama, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}, peft.PrefixTuningConfig),
}


def trained(situation: Situation, folder: Path) -> Any:
    """A peft model with values that training would leave, saved to `folder`."""
    model = situation.build()
    torch.manual_seed(4)
    theirs = peft.get_peft_model(model, situation.config(**situation.options))
    starts = situation.options.get("init_lora_weights", "")
    if str(starts).startswith(("pissa", "olora")):
        torch.manual_seed(2)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    else:
        randomise(theirs)
    theirs.eval().save_pretrained(folder)
    return theirs


def outcome(situation: Situation) -> tuple[str, str]:
    """Whether it is right, refused or missing, and what is said."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        folder = Path(place)
        theirs = trained(situation, folder / "theirs")
        model = situation.build()
        try:
            ll.import_peft(model, folder / "theirs")
        except LoraLightningError as error:
            said = _said(error, folder)
            return ("missing" if "peft_type" in said else "refused"), said
        expected = output(theirs)
        torch.testing.assert_close(output(model.eval()), expected, atol=1e-4, rtol=1e-4)
        try:
            ll.export(model, folder / "ours")
        except LoraLightningError as error:
            return "read only", _said(error, folder)
        opened = peft.PeftModel.from_pretrained(situation.build(), folder / "ours").eval()
        torch.testing.assert_close(output(opened), expected, atol=1e-4, rtol=1e-4)
        return "right", ""


def _said(error: Exception, folder: Path) -> str:
    text = str(error).replace(f'"{folder}/theirs"', "the folder").replace(str(folder), "")
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def table() -> str:
    """Every situation with its outcome."""
    found = [[name, *outcome(situation)] for name, situation in SITUATIONS.items()]
    return as_table([["situation", "outcome", "what is said"], *found])


if __name__ == "__main__":
    write(PAGE, PART, table())
