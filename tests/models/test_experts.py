"""Fused experts: the owner computes with the merged matrices, in both orientations, and gets its parameters back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_rose import RoseLoRA
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.callbacks import Cascade, SparsitySchedule
from lora_lightning.errors import AdapterStateError, SettingsError, TargetError
from lora_lightning.injection.records import adapters_named
from lora_lightning.models.experts import install, is_transposed, restore, stack
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

E, HIDDEN, INNER, TOKENS = 3, 6, 4, 7


class Experts(nn.Module):
    """Every token through every expert, weighted: two stacked parameters and a bias that is read too."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (E, 2 * INNER, HIDDEN), (E, HIDDEN, INNER)
        with seeded(3):
            self.up_proj_bias = nn.Parameter(torch.randn(E, 2 * INNER))
            self.up_proj, self.down_proj = (nn.Parameter(self._stored(torch.randn(shape))) for shape in (up, down))
        self.calls = 0

    def _stored(self, weight: Tensor) -> Tensor:
        return (weight.mT if self.is_transposed else weight).contiguous()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        y = torch.zeros_like(x)
        for expert in range(E):
            up, down = self._stored(self.up_proj[expert]), self._stored(self.down_proj[expert])
            left, right = (x @ up.mT + self.up_proj_bias[expert]).chunk(2, dim=-1)
            y = y + weights[:, expert, None] * ((left.sigmoid() * right) @ down.mT)
        return y


class Block(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, x[:, :E].softmax(-1))


def block(transposed: bool) -> tuple[Block, Tensor]:
    with seeded(5):
        x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    return Block(transposed).double(), x


def moved(model: nn.Module) -> nn.Module:
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    return model


METHODS = {
    "LoRA": LoRA(rank=2, alpha=3.0),
    "DoRA": DoRA(rank=2, alpha=3.0),
    "RoseLoRA": RoseLoRA(rank=2, alpha=3.0),
    "LoRASC": LoRASC(inner=DoRA(rank=2)),
}


def merged_by_hand(model: Block) -> dict[str, Tensor]:
    """W' of every expert, one matrix at a time, from the adapter's tensors and the papers' equations."""
    found = {}
    for path, adapter in adapters_named(model, "default").items():
        name = path.rpartition(".")[2]
        (pair,) = adapter.factor_pairs()
        stored = model.experts._modules[name].base.weight
        rows = []
        for e in range(E):
            weight = model.experts._stored(stored[e])
            weight = weight + pair.scaling * pair.lora_B[e] @ pair.lora_A[e]
            if hasattr(adapter, "magnitude"):
                weight = (adapter.magnitude[e] / weight.norm(dim=1))[:, None] * weight
            rows.append(model.experts._stored(weight))
        found[f"experts.{name}"] = torch.stack(rows).detach()
    return found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_owner_computes_with_the_merged_matrices(name: str, transposed: bool) -> None:
    model, x = block(transposed)
    before, plain = model(x), copy.deepcopy(model)
    ll.inject(model, METHODS[name], seed=0)
    assert torch.equal(model(x), before), "exact start"
    moved(model)
    expected = functional_call(plain, merged_by_hand(model), (x,))
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    adapted = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    ll.unmerge(model)
    assert torch.equal(model(x), adapted)
    with ll.disable_adapters(model):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_factor_has_the_gradient_of_its_matrix(transposed: bool) -> None:
    """d loss / dB_e = s dW_e A_e^T and d loss / dA_e = s B_e^T dW_e, with dW from the plain owner."""
    model, x = block(transposed)
    plain = copy.deepcopy(model)
    ll.inject(model, METHODS["LoRA"], seed=0)
    moved(model)(x).square().sum().backward()
    weights = {name: tensor.requires_grad_() for name, tensor in merged_by_hand(model).items()}
    functional_call(plain, weights, (x,)).square().sum().backward()
    for path, adapter in adapters_named(model, "default").items():
        (pair,) = adapter.factor_pairs()
        for e in range(E):
            dW = plain.experts._stored(weights[path].grad[e])
            torch.testing.assert_close(pair.lora_B.grad[e], pair.scaling * dW @ pair.lora_A[e].T)
            torch.testing.assert_close(pair.lora_A.grad[e], pair.scaling * pair.lora_B[e].T @ dW)


def test_the_matrices_are_merged_once_a_call() -> None:
    model, x = block(False)
    ll.inject(model, METHODS["LoRA"], seed=0)
    counts = []
    adapter = adapters_named(model, "default")["experts.up_proj"]
    whole = type(adapter).merged_weight
    adapter.merged_weight = lambda weight: counts.append(1) or whole(adapter, weight)
    model(x)
    assert counts == [1], "the owner reads its parameter once an expert"


def test_eject_gives_the_owner_its_parameters_back_in_order() -> None:
    model, x = block(True)
    names, before, y = list(model.state_dict()), copy.deepcopy(model.state_dict()), model(x)
    ll.inject(model, METHODS["LoRA"], targets=["up_proj"], seed=0)
    moved(model)
    assert isinstance(model.experts.up_proj, AdaptedLayer)
    ll.eject(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(model.experts.up_proj, nn.Parameter)
    assert not model.experts._forward_hooks
    assert not model.experts._forward_pre_hooks
    assert torch.equal(model(x), y)


def test_an_error_inside_the_owner_leaves_no_weight_behind() -> None:
    model, x = block(False)
    ll.inject(model, METHODS["LoRA"], seed=0)
    with pytest.raises(RuntimeError):
        model(x[:, :-1])
    assert "up_proj" not in model.experts.__dict__
    assert isinstance(model.experts.up_proj, AdaptedLayer)
    assert torch.isfinite(model(x)).all()


def test_two_adapters_sum_and_are_switched() -> None:
    model, x = block(False)
    base = model(x)
    ll.inject(model, METHODS["LoRA"], seed=0)
    moved(model)
    first = model(x)
    ll.inject(model, METHODS["LoRA"], name="second", targets=["down_proj"], seed=1)
    assert torch.equal(model(x), base)
    ll.set_active(model, ["default", "second"])
    assert torch.equal(model(x), first), "the second starts at zero"
    ll.eject(model, "default")
    assert isinstance(model.experts.down_proj, AdaptedLayer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = block(False)
        ll.inject(model, METHODS["DoRA"], seed=0)
        moved(model)
        x.requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_save_and_load(tmp_path: Any) -> None:
    model, x = block(True)
    ll.inject(model, METHODS["RoseLoRA"], seed=0)
    ll.save_adapter(moved(model), tmp_path)
    fresh, _ = block(True)
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    ll.load_adapter(model, tmp_path)
    assert torch.equal(fresh(x), model(x))
    names = {key for key in model.state_dict() if ".adapters." in key}
    assert "experts.up_proj.adapters.default.lora_A" in names


def test_a_copy_is_a_model_of_its_own() -> None:
    model, x = block(False)
    ll.inject(model, METHODS["LoRA"], seed=0)
    twin = copy.deepcopy(model)
    moved(twin)
    assert not torch.equal(twin(x), model(x))
    assert twin.experts.up_proj.base_layer.module is twin.experts.up_proj.base


def test_compiles_whole() -> None:
    model, x = block(False)
    ll.inject(model, METHODS["LoRA"], seed=0)
    moved(model)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
    finally:
        torch._dynamo.reset()


def test_the_path_is_the_parameters(tmp_path: Any) -> None:
    model, x = block(True)
    ll.inject(model, METHODS["LoRA"], seed=0)
    moved(model)
    report = ll.export(model, tmp_path / "delta", format="delta")
    assert report.layers == 2
    from safetensors.torch import load_file

    update = load_file(tmp_path / "delta" / "delta.safetensors")
    plain, _ = block(True)
    with torch.no_grad():
        for name, delta in update.items():
            plain.get_parameter(name).add_(delta)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=2, dropout=0.1), r"LoRA on experts.up_proj: dropout is 0.1; stacked experts .* give overrides"),
        (LoRA(rank=2, bias=True), "bias is True; a stack of experts has no bias to add to"),
    ],
)
def test_refusals(method: ll.Method, message: str) -> None:
    model, _ = block(False)
    with pytest.raises(SettingsError, match=message):
        ll.inject(model, method)
    assert isinstance(model.experts.up_proj, nn.Parameter)


def test_a_parameter_trains_in_full_or_is_adapted() -> None:
    model, _ = block(False)
    with pytest.raises(TargetError, match=r"experts.up_proj would be adapted and trained in full"):
        ll.inject(model, METHODS["LoRA"], also_train=["up_proj"])


def test_orientation_is_stated_or_known() -> None:
    owner = Experts(True)
    assert is_transposed(owner) is True
    assert stack(owner, "up_proj").transposed
    del owner.is_transposed
    assert is_transposed(owner) is None
    assert stack(owner, "up_proj") is None
    assert is_transposed(type("Llama4TextExperts", (nn.Module,), {})()) is True


def test_install_and_restore_alone() -> None:
    owner = Experts(False)
    held = stack(owner, "up_proj")
    install(owner, "up_proj", AdaptedLayer(core_base_layer(held)))
    assert isinstance(owner.up_proj, AdaptedLayer)
    restore(owner, "up_proj", held)
    assert owner.up_proj is held.weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [FactoredUpdate, DenseUpdate])
def test_stages_fold_on_experts(kind: Any, transposed: bool) -> None:
    model, x = block(transposed)
    base = model(x)
    ll.inject(model, METHODS["LoRA"], seed=0)
    moved(model)
    expected = model(x)
    for _, layer in ll.iter_adapters(model):
        layer.set_folded("default", kind(layer.base_layer))
        layer.fold("default")
        layer.adapter("default").reset(torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    ll.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    ll.eject(model)
    assert torch.equal(model(x), base)


class Project(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.x = block(False)[0].float(), block(False)[1].float()

    def training_step(self, batch: Any) -> Tensor:
        return (self.block(self.x) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_sparsity_schedule_prunes_every_expert() -> None:
    project = Project()
    ll.inject(project, RoseLoRA(rank=2), targets="experts", seed=0)
    schedule = SparsitySchedule(sparsity=0.5, start=2, end=6)
    fit(project, [schedule])
    for adapter in adapters_named(project, "default").values():
        for entry in adapter.masks():
            rows = entry.param if entry.by_row else entry.param.mT
            assert rows.shape[0] == E
            assert ((rows != 0).sum(-1) == rows.shape[-1] // 2).all()


def test_a_cascade_folds_stages_of_experts() -> None:
    project = Project()
    ll.inject(project, METHODS["LoRA"], targets="experts", seed=0)
    fit(project, [Cascade(stage_steps=4, noise=0.1)])
    layers = [layer for _, layer in ll.iter_adapters(project)]
    assert all(layer.shifts["default"].delta.any() for layer in layers)
    assert all(torch.equal(layer.original_weight(), plain) for layer, plain in zip(layers, originals(), strict=True))


def originals() -> list[Tensor]:
    experts = block(False)[0].float().experts
    return [experts.up_proj, experts.down_proj]


def fit(project: Project, callbacks: list[Any]) -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)), batch_size=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    Trainer(max_steps=8, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **options).fit(
        project, data
    )


def test_a_merge_for_good_stays() -> None:
    model, x = block(True)
    ll.inject(model, METHODS["LoRA"], seed=0)
    expected = moved(model)(x)
    ll.merge(model, keep_original=False)
    with pytest.raises(AdapterStateError, match="keep_original=False"):
        ll.unmerge(model)
    ll.eject(model)
    torch.testing.assert_close(model(x), expected)
