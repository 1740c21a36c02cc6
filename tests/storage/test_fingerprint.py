from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapter_files import TOKENS, X, adapted
from model_classes import model_class
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PhiConfig, PhiForCausalLM

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, AdapterStateError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows
from lora_lightning.storage.fingerprint import differences, fingerprint, say_how_compared
from lora_lightning.testing import TinyMLP, tiny_decoder


def test_adapters_do_not_count_even_merged(tmp_path: Path) -> None:
    bare = fingerprint(survey(TinyMLP()))
    model = adapted(method=LoRA(rank=2, bias=True))
    assert fingerprint(survey(model)) == bare
    ll.merge(model)
    assert fingerprint(survey(model)) == bare
    ll.save_adapter(model, tmp_path)
    ll.unmerge(model)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    ll.eject(model)
    assert fingerprint(survey(model)) == bare


def test_a_bias_that_a_merge_made_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    bare = fingerprint(survey(model))
    adapted(model, LoRA(rank=2, bias=True))
    ll.merge(model)
    assert fingerprint(survey(model)) == bare


def test_tied_weights_count_once(tmp_path: Path) -> None:
    bare = fingerprint(survey(tiny_decoder(tied=True)))
    for target in ("lm_head", "embed_tokens"):
        model = adapted(tiny_decoder(tied=True), targets=[target])
        assert fingerprint(survey(model)) == bare
        ll.save_adapter(model, tmp_path / target)
        fresh = tiny_decoder(tied=True)
        ll.load_adapter(fresh, tmp_path / target)
        assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)


def test_a_base_in_half_precision_is_recognised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = TinyMLP().to(torch.bfloat16)
    assert not differences(fingerprint(survey(half)), fingerprint(survey(TinyMLP())))
    ll.load_adapter(half, folder)
    said = "compared at 64 places a tensor only; they are bfloat16 here and float32 in training"
    assert said in capsys.readouterr().out
    torch.testing.assert_close(half(X.bfloat16()).float(), adapted()(X), rtol=0.1, atol=0.1)


def test_large_weights_are_sampled_within_their_bounds() -> None:
    """Beyond 2^24 entries positions are not exact in float32: the last one, 2^24 + 3, would round past the end."""
    model = nn.Sequential(nn.Embedding.from_pretrained(torch.zeros(2**24 + 4, 1, dtype=torch.bfloat16)))
    before = fingerprint(survey(model))
    with torch.no_grad():
        model[0].weight[-1] = 1
    assert fingerprint(survey(model))["weights"] != before["weights"]


def test_packed_weights_have_no_sample() -> None:
    model = TinyMLP()
    model.third = nn.Linear(2, 2)
    model.third.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(survey(model))["weights"] is None
    model.third = nn.Module()
    model.third.empty = nn.Parameter(torch.zeros(0, 3))
    assert fingerprint(survey(model))["weights"] is not None


# -- every weight counts -----------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (3, 5), (4, 6), (5, 1), (2, 3, 4), (4, 2, 3, 3), (2, 520), (2, 2, 260)]
"""The last ones have rows that are wide enough for a hash of their own, but for eight-bit numbers."""


def holding(tensor: Tensor) -> nn.Module:
    model = nn.Module()
    model.register_parameter("held", nn.Parameter(tensor, requires_grad=False))
    return model


def content(tensor: Tensor) -> str:
    return str(fingerprint(survey(holding(tensor)))["content"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_changed_entry_is_noticed_wherever_it_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The sample of 64 entries, rounded to bfloat16, sees few of them in a large tensor."""
    tensor = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dtype)
    before = content(tensor)
    assert content(tensor.clone()) == before
    bits = tensor.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    for i in range(0, len(bits), 1 + len(bits) // 100):
        bits[i] ^= 1  # the last bit of the mantissa
        assert content(tensor) != before
        bits[i] ^= 1
    assert content(tensor) == before


def corners(step: float) -> Callable[[Tensor], Tensor]:
    """A change at the corners of a rectangle, after which every sum of a row or a column is as before."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        for row, column, sign in ((2, 3, 1), (2, 9, -1), (7, 3, -1), (7, 9, 1)):
            changed[row, column] += sign * step
        return changed

    return change


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.flip(0),
        lambda t: t.flip(1),
        lambda t: t.roll(1, 0),
        lambda t: t.roll(1, 1),
        lambda t: t[:, :16].mT.repeat(1, t.shape[1] // 16),
        lambda t: t[torch.tensor([1, 0, *range(2, 16)])],
        lambda t: t.view(32, -1),
        lambda t: torch.where(t == t.max(), t.min(), torch.where(t == t.min(), t.max(), t)),
        lambda t: -t,
        lambda t: torch.zeros_like(t),
        lambda t: t[:, torch.randperm(t.shape[1], generator=torch.Generator().manual_seed(1))],
        lambda t: t.flatten()[torch.randperm(t.numel(), generator=torch.Generator().manual_seed(1))].view_as(t),
        corners(8.0),
        lambda t: t * (1 - 2 * (corners(1.0)(torch.zeros_like(t)) != 0).float()),
        lambda t: t + torch.tensor([1.0, -2.0, 1.0]).repeat(t.shape[1])[: t.shape[1]],
    ],
    ids=[
        "rows",
        "columns",
        "rolled",
        "rolled-columns",
        "transposed",
        "two-rows",
        "shape",
        "two-entries",
        "sign",
        "zero",
        "permuted-columns",
        "permuted",
        "corners",
        "signs-at-corners",
        "second-differences",
    ],
)
def test_what_is_moved_about_in_a_tensor_is_noticed(change: Callable[[Tensor], Tensor], width: int) -> None:
    tensor = torch.randint(-99, 99, (16, width), generator=torch.Generator().manual_seed(0)).float()
    assert content(change(tensor)) != content(tensor)


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    tensor = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    room = torch.zeros(49, dtype=torch.bfloat16)
    room[1:] = tensor.view(-1)  # words of eight bytes do not start at their own multiples here
    assert content(room[1:].view(6, 8)) == content(tensor) == content(tensor.mT.contiguous().mT)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What each process gives to a sum over processes; nothing can be sent in a group that is no real one."""
    given: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: given.append(tensor.clone()))
    return given


@pytest.mark.parametrize("shape", [(7, 4), (2, 3), (6,), (9, 1, 2), (7, 256), (2, 3, 300)])
def test_three_shards_are_what_the_whole_tensor_is(
    shape: tuple[int, ...], sizes: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(survey(holding(tensor)))

    def shard(rank: int) -> dict[str, Any]:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            parts = tensor.chunk(3)
            own = parts[rank].clone() if rank < len(parts) else tensor[:0]
            mesh = init_device_mesh("cpu", (3,))
            held = DTensor.from_local(own, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())
            return fingerprint(survey(holding(held)))
        finally:
            dist.destroy_process_group()

    for rank in range(3):
        shard(rank)
    totals = [sum(sizes[i::2]) for i in range(2)]  # of the sample, and of the content
    assert totals[1].dtype == torch.int64
    added = iter(totals)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.copy_(next(added)))
    assert shard(0) == whole


def test_one_frozen_weight_that_changed_by_one_is_noticed_on_load(tmp_path: Path) -> None:
    model = adapted(tiny_decoder())
    ll.save_adapter(model, tmp_path)
    fresh = tiny_decoder()
    weight = fresh.model.layers[0].mlp.up_proj.weight
    sampled = {int(i) for i in torch.arange(64) * (weight.numel() - 1) // 63}
    place = min(set(range(weight.numel())) - sampled)
    with torch.no_grad():
        weight.view(-1)[place] += 1.0
    with pytest.raises(AdapterFileError, match="was trained on other base weights than this model has"):
        ll.load_adapter(fresh, tmp_path)
    with torch.no_grad():
        weight.view(-1)[place] -= 1.0
    weight.data.copy_(tiny_decoder().model.layers[0].mlp.up_proj.weight)
    ll.load_adapter(fresh, tmp_path)


@pytest.mark.parametrize("former", [{}, {"dtypes": "float32", "sums": "0" * 64}], ids=["0.1", "sums"])
def test_a_file_with_a_former_hash_is_compared_at_sampled_places_and_says_so(
    former: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = fingerprint(survey(TinyMLP()))
    old = {key: own[key] for key in ("architecture", "names", "weights")} | former
    assert differences(own, old) == []
    assert differences(own, {**old, "weights": "0"}) == differences({**own, "content": "0"}, own) == ["weights"]
    say_how_compared(own, old, None, None)
    assert "compared at 64 places a tensor only; its file is of an older version" in capsys.readouterr().out
    say_how_compared(own, own, None, None)
    assert capsys.readouterr().out == ""


def test_of_a_mixed_model_it_counts_which_tensor_has_which_type() -> None:
    """Two models with the same data types, exchanged between two tensors, are compared at sampled places."""
    one, other = TinyMLP(), TinyMLP()
    one.first.bfloat16()
    other.second.bfloat16()
    found = [fingerprint(survey(model)) for model in (one, other)]
    assert found[0]["dtypes"] != found[1]["dtypes"]
    assert differences(*found) == []


# -- rows of new tokens ------------------------------------------------------------------------------------------------


def phi() -> Any:
    """A model whose output layer has a bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    nn.init.normal_(model.lm_head.bias)
    return model.eval()


@pytest.mark.parametrize("also_train", ["heads", ["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("make", [phi, tiny_decoder, lambda: tiny_decoder(tied=True)], ids=["bias", "untied", "tied"])
def test_new_tokens_with_a_trained_embedding_or_an_output_layer_with_a_bias(
    make: Callable[[], Any], also_train: Any, tmp_path: Path
) -> None:
    """Names with and without rows of new tokens are the same ones, and what trains in full never counts."""
    model = make()
    add_rows(model, Vocabulary(("<a>", "<b>"), 32))
    if also_train == ["lm_head"] and model.lm_head.base.weight is model.get_input_embeddings().base.weight:
        also_train = ["embed_tokens"]
    adapted(model, targets=["q_proj"], also_train=also_train)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    ll.save_adapter(model, tmp_path)
    fresh = make()
    ll.load_adapter(fresh, tmp_path)
    ids = torch.tensor([[3, 32, 33]])
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("trained", [False, True])
def test_a_base_model_with_another_buffer_is_noticed_on_load(trained: bool, tmp_path: Path) -> None:
    """A router's correction is a buffer, and decides which experts see a token."""
    found = model_class("DeepseekV3ForCausalLM")
    router = next(path for path, module in found.build().named_modules() if hasattr(module, "e_score_correction_bias"))

    def other() -> Any:
        model = found.build()
        model.get_submodule(router).e_score_correction_bias[1] += 1e-3
        return model

    model = other()
    ll.inject(model, LoRA(rank=2), ["q_b_proj"], also_train=[f"{router}.weight"] if trained else [])
    ll.save_adapter(model, tmp_path)
    again = other()
    ll.load_adapter(again, tmp_path)
    if trained:  # it belongs to what is saved whole
        again = found.build()
        ll.load_adapter(again, tmp_path)
        bias = again.get_submodule(router).e_score_correction_bias
        assert torch.equal(bias, model.get_submodule(router).e_score_correction_bias)
    else:
        with pytest.raises(AdapterFileError, match=r"trained on other buffers than this model has .* a router"):
            ll.load_adapter(found.build(), tmp_path)
        ll.load_adapter(found.build().bfloat16(), tmp_path)  # of another type they are not compared


# -- no values ---------------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_has_no_weights_to_compare(folder: Path) -> None:
    with torch.device("meta"):
        model = TinyMLP()
    for load in (lambda: ll.load_adapter(model, folder), lambda: fingerprint(survey(model))):
        with pytest.raises(AdapterStateError, match=r"first\.\w+ is on the meta device, without a value.*to_empty"):
            load()
    model.to_empty(device="cpu").load_state_dict(TinyMLP().state_dict())
    ll.load_adapter(model, folder)
    assert torch.equal(model(X), adapted()(X))


def test_one_weight_on_the_meta_device_is_named(folder: Path) -> None:
    """As after accelerate has put a part of a model onto the disk."""
    model = TinyMLP()
    model.second.to("meta")
    with pytest.raises(AdapterStateError, match=r"second\.\w+ is on the meta device"):
        ll.load_adapter(model, folder)


def test_a_base_model_with_other_running_statistics_is_noticed_on_load(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model = network()
    ll.inject(model, LoRA(rank=2), ["0"])
    ll.save_adapter(model, tmp_path / "a")
    ll.load_adapter(network(), tmp_path / "a")
    other: Any = network()
    other[1].running_var[2] += 1e-6
    with pytest.raises(AdapterFileError, match="trained on other running statistics, as of batch normalisation"):
        ll.load_adapter(other, tmp_path / "a")
    half = network().bfloat16()  # of another type they are not compared
    ll.load_adapter(half, tmp_path / "a")
    plain = nn.Sequential(nn.Linear(4, 4))
    assert fingerprint(survey(plain))["statistics"] is None
