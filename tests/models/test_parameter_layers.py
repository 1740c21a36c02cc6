"""Single matrices as targets: routers of experts, in-projections of nn.MultiheadAttention, a model's own parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_classes import model_class
from torch import Tensor, nn

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.errors import SettingsError, TargetError
from lora_lightning.models.anatomy import survey
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

IDS = torch.tensor([[1, 5, 7, 2, 9, 4]])
ROUTERS = {
    "MixtralForCausalLM": "gate",
    "Qwen3MoeForCausalLM": "gate",
    "OlmoeForCausalLM": "gate",
    "DeepseekV3ForCausalLM": "gate",
    "Glm4MoeForCausalLM": "gate",
    "Ernie4_5_MoeForCausalLM": "gate",
    "GptOssForCausalLM": "router.weight",
}


def disturbed(model: nn.Module, size: float = 0.5) -> nn.Module:
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index, size=size)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def summed(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with W + s B A written into each parameter by hand, in float64."""
    with torch.no_grad():
        for path, layer in ll.iter_adapters(model):
            adapter: Any = layer.adapter("default")
            update = adapter.lora_B[0].double() @ adapter.lora_A[0].double() * adapter.scaling
            plain.get_parameter(path).add_(update.to(plain.get_parameter(path).dtype))
    return plain


@pytest.mark.parametrize(("name", "pattern"), ROUTERS.items())
def test_the_router_of_experts_is_a_target_by_name(name: str, pattern: str, tmp_path: Path) -> None:
    found = model_class(name)
    model = found.build()
    base = logits(model)
    report = ll.inject(model, LoRA(rank=2), targets=[pattern], seed=0)
    assert report.layers
    assert {path.rpartition(".")[2] for path in report.layers} == {"weight"}
    assert torch.equal(logits(model), base)
    disturbed(model)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    torch.testing.assert_close(logits(summed(model, found.build())), adapted, rtol=1e-5, atol=1e-6)

    model(IDS).logits.square().mean().backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(report.layers)
    assert all(p.grad is not None and p.grad.any() for p in trained.values())

    ll.save_adapter(model, tmp_path / "adapter")
    fresh = found.build()
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), adapted)
    ll.merge(fresh)
    torch.testing.assert_close(logits(fresh), adapted, rtol=1e-5, atol=1e-6)
    ll.unmerge(fresh)
    assert torch.equal(logits(fresh), adapted)
    ll.eject(fresh)
    assert list(fresh.state_dict()) == list(found.build().state_dict())
    assert torch.equal(logits(fresh), base)
    ll.export(model, tmp_path / "merged", format="merged")
    plain = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-5, atol=1e-6)


def test_all_linear_and_scopes_leave_the_router_alone() -> None:
    for targets in ("all-linear", "experts", ".*mlp.*"):
        model = model_class("MixtralForCausalLM").build()
        assert not [path for path in ll.inject(model, LoRA(rank=2), targets=targets).layers if "gate.weight" in path]


def test_all_linear_after_a_router_leaves_it_alone_too() -> None:
    model = model_class("MixtralForCausalLM").build()
    ll.inject(model, LoRA(rank=2), targets=["gate"], name="router")
    assert not [path for path in ll.inject(model, LoRA(rank=2), name="rest").layers if path.endswith("gate.weight")]
    assert len(ll.inject(model, LoRA(rank=2), targets=["gate.weight"], name="again").layers) == 2


@pytest.mark.parametrize("first", ["all-linear", ["gate_up_proj"], ["q_proj"]])
def test_a_second_adapter_on_a_model_with_fused_experts(first: Any, tmp_path: Path) -> None:
    """Both are found again, each computes what it does alone, and together they add up."""
    found = model_class("MixtralForCausalLM")
    model = found.build().double()
    model.set_experts_implementation("eager")  # the grouped product of torch takes no float64
    ll.inject(model, LoRA(rank=2), first, name="a", seed=0)
    second = ll.inject(model, LoRA(rank=3), name="b", seed=1)
    assert len(second.layers) == 12
    disturbed(model, size=0.1)
    ll.set_active(model, ["a", "b"])
    both = logits(model)
    plain = found.build().double()
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        for path, layer in ll.iter_adapters(model):
            name = path if isinstance(dict(plain.named_parameters()).get(path), Tensor) else f"{path}.weight"
            for adapter in layer.adapters.values():
                plain.get_parameter(name).add_(adapter.lora_B @ adapter.lora_A * adapter.scaling)
    torch.testing.assert_close(logits(plain), both)
    for name in ("a", "b"):
        ll.save_adapter(model, tmp_path / name, name)
        ll.set_active(model, name)
        fresh = found.build().double()
        fresh.set_experts_implementation("eager")
        ll.load_adapter(fresh, tmp_path / name)
        torch.testing.assert_close(logits(fresh), logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Glm4MoeForCausalLM"])
def test_peft_computes_the_same_with_a_router(name: str, tmp_path: Path) -> None:
    found = model_class(name)
    model = disturbed(ll_router(found.build()))
    ll.export(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(found.build(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    again = found.build()
    ll.import_peft(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def ll_router(model: nn.Module) -> nn.Module:
    ll.inject(model, LoRA(rank=2), targets=["gate", "q_proj"], seed=0)
    return model


# -- torch's own attention ---------------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), RoseLoRA(rank=2)], ids=["LoRA", "DoRA", "RoseLoRA"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_in_projection_of_multihead_attention(method: Any, grad: bool) -> None:
    """In evaluation without gradients torch would take a path of its own, which must see the adapter too."""
    model, plain = encoder(), encoder()
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = model(x)
    report = ll.inject(model, method, targets=["in_proj_weight", "out_proj"], seed=0)
    assert len(report.layers) == 4
    assert any("are read by MultiheadAttention instead of called" in note for note in report.notes)
    torch.testing.assert_close(model(x), base)
    disturbed(model)
    with torch.no_grad():
        for path, layer in ll.iter_adapters(model):
            own = path if path.endswith("in_proj_weight") else f"{path}.weight"
            weight = layer.applied_weight(torch.float64)
            plain.get_parameter(own).copy_(weight[0] if own == path else weight)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), plain(x))
    assert not torch.allclose(model(x), base)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_that_drops_padding_asks_the_projection_before_it_runs(grad: bool) -> None:
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
    plain = copy.deepcopy(model)
    ll.inject(model, LoRA(rank=2), targets=["in_proj_weight"], seed=0)
    summed(disturbed(model), plain)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        found, expected = (net(x, src_key_padding_mask=padding) for net in (model, plain))
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_other_widths_for_keys_and_values() -> None:
    """Then there are three matrices, each of its own."""
    with seeded(0):
        model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)})
    with pytest.raises(
        TargetError, match=r"a block; its layers are: k_proj_weight, out_proj, q_proj_weight, v_proj_weight"
    ):
        ll.inject(model, LoRA(rank=2), targets=["mha"])
    report = ll.inject(model, LoRA(rank=2), targets=["q_proj_weight", "v_proj_weight"])
    assert list(report.layers) == ["mha.q_proj_weight", "mha.v_proj_weight"]
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    model.mha(q, k, v)[0].sum().backward()
    assert all(layer.adapter("default").lora_B.grad.any() for _, layer in ll.iter_adapters(model))


# -- a model's own matrices --------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A matrix, a stack, a vector, a list and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 6))
        self.stack = nn.Parameter(torch.randn(1, 4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
        self.unread = nn.Parameter(torch.randn(4, 4))
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix.T @ self.stack[0] + self.vector
        return self.recurrent(y @ self.listed[0])[0]


def test_a_models_own_matrix_is_a_target_by_its_path() -> None:
    with seeded(0):
        model = nn.Sequential(Own().double())
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 6, dtype=torch.float64)
    report = ll.inject(model, LoRA(rank=2), targets=r"0\.matrix", seed=0)
    assert list(report.layers) == ["0.matrix"]
    disturbed(model)
    torch.testing.assert_close(model(x), summed(model, plain)(x))
    ll.eject(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", ["vector", "unread", "listed.0"])
def test_what_an_adapter_would_not_reach_is_no_target(name: str) -> None:
    model = nn.Sequential(Own())
    with pytest.raises(TargetError, match=rf'Train it in full instead: also_train=\["{name}"\]'):
        ll.inject(model, LoRA(rank=2), targets=[name])
    wide = nn.ModuleDict({"own": Own(), "linear": nn.Linear(6, 6)})
    report = ll.inject(wide, LoRA(rank=2), targets=["linear"], also_train=[name])
    assert list(report.trained) == [p for p, _ in wide.named_parameters() if p.endswith(f".{name}")]


RECURRENT = {
    "RNN": (nn.RNN, {}),
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM with a projection": (nn.LSTM, {"proj_size": 2}),
    "GRU": (nn.GRU, {"bias": False}),
}
DIVERSE: Any = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", RECURRENT)
def test_weights_of_a_recurrent_layer_are_targets_by_name(case: str, tmp_path: Path) -> None:
    kind, options = RECURRENT[case]

    def build() -> Any:
        with seeded(0):
            return nn.ModuleDict({"recurrent": kind(4, 4, batch_first=True, **options)}).double()

    def outputs(one: Any) -> Tensor:
        return one["recurrent"](DIVERSE)[0]

    model, plain = build(), build()
    base = outputs(model)
    weights = [name for name, p in plain.named_parameters() if p.dim() == 2]
    report = ll.inject(model, LoRA(rank=2), targets=weights, seed=0)
    assert list(report.layers) == weights
    torch.testing.assert_close(outputs(model), base)  # the kernel sums in another order without a gradient
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters)
    torch.testing.assert_close(outputs(model), outputs(summed(model, plain)))
    outputs(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(outputs(twin), outputs(model))
    ll.save_adapter(model, tmp_path)
    again = build()
    ll.load_adapter(again, tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model))
    ll.merge(again)
    torch.testing.assert_close(outputs(again), outputs(model))
    ll.eject(model)
    torch.testing.assert_close(outputs(model), base)
    assert list(model.state_dict()) == list(build().state_dict())
    with torch.no_grad():
        model.recurrent.weight_ih_l0.zero_()
    assert not torch.equal(outputs(model), base)


def test_a_recurrent_layer_as_a_whole_names_its_weights() -> None:
    model = nn.ModuleDict({"recurrent": nn.LSTM(4, 4)})
    with pytest.raises(
        TargetError, match=r'Its parameters do: targets=\["recurrent.weight_ih_l0", "recurrent.weight_hh'
    ):
        ll.inject(model, LoRA(rank=2), targets=["recurrent"])
    assert len(ll.inject(model, LoRA(rank=2), targets=["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]).layers) == 2


def test_an_expression_that_does_not_spell_a_parameter_says_what_reaches_it() -> None:
    model = nn.ModuleDict({"recurrent": nn.GRU(4, 4)})
    way_out = r'only its own name reaches it: targets=\["recurrent.weight_ih_l0"\]'
    with pytest.raises(TargetError, match=way_out):
        ll.inject(model, LoRA(rank=2), targets="recurrent.*")
    assert ll.inject(model, LoRA(rank=2), targets=["recurrent.weight_ih_l0"]).layers


def test_a_stack_of_matrices_is_a_target_by_name() -> None:
    with seeded(0):
        model = nn.Sequential(Own().double())
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 6, dtype=torch.float64)
    assert list(ll.inject(model, LoRA(rank=2), targets=["stack"], seed=0).layers) == ["0.stack"]
    torch.testing.assert_close(model(x), plain(x))
    disturbed(model)
    adapter = model[0].stack.adapter("default")
    with torch.no_grad():
        plain[0].stack += adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.LayerNorm(4), (4,)), (nn.Bilinear(4, 4, 4), (4, 4, 4)), (nn.ConvTranspose1d(4, 4, 2), (4, 4, 2))],
    ids=["norm", "bilinear", "transposed"],
)
def test_modules_that_take_no_adapter_train_in_full_instead(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"odd": layer, "out": nn.Linear(4, 2)})
    with pytest.raises(TargetError, match=r'Train it in full instead: also_train=\["odd"\]'):
        ll.inject(model, LoRA(rank=2), targets=["odd"])
    report = ll.inject(model, LoRA(rank=2), targets=["out"], also_train=["odd"])
    assert list(report.trained) == ["odd.weight", "odd.bias"]
    assert model.get_parameter("odd.weight").shape == shape
    ll.eject(model)


def test_a_module_without_a_layer_names_the_way_out() -> None:
    name, held = "listed", "0"
    model = nn.Sequential(Own())
    with pytest.raises(TargetError, match=rf'Train it in full instead: also_train=\["0\.{name}"\]'):
        ll.inject(model, LoRA(rank=2), targets=[name])
    wide = nn.ModuleDict({"own": Own(), "linear": nn.Linear(6, 6)})
    report = ll.inject(wide, LoRA(rank=2), targets=["linear"], also_train=[f"own.{name}"])
    assert f"own.{name}.{held}" in report.trained


def test_a_matrix_of_a_vision_language_model() -> None:
    config = model_class("Gemma3ForConditionalGeneration").config()
    with torch.device("meta"):
        name = "mm_input_projection_weight"
        model = transformers.Gemma3ForConditionalGeneration(config)
    assert [path for path in survey(model).reachable if path.endswith(name)] != []


def test_routed_adapters_say_that_they_cannot() -> None:
    model = model_class("MixtralForCausalLM").build()
    with pytest.raises((SettingsError, TargetError), match="stack of experts"):
        ll.inject(model, ll.method("MoELoRA")(rank=2), targets=["gate"])
