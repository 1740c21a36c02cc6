"""What trains stays in float32 under every precision of the trainer, and the model starts at its base."""

from __future__ import annotations

import pytest
import torch
from composition import ADAPTERS as COMPOSED
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from ll_optimizers.riemannian import RiemannianAdamW
from ll_riemannian_moe import MoELoRA
from lora_lightning.adapters.precision import compute_in_float32
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.testing import tiny_encoder
from lora_lightning.testing.toy_models import seeded

ADAPTERS = {**COMPOSED, "MoELoRA": MoELoRA(experts=3, top_k=2, rank=1, router_lr_ratio=1.0)}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


def trained(module, folder, precision, **options):
    fit = trainer(folder, precision=precision, max_steps=4, **options)
    fit.fit(module, datamodule=labelled_data(folder))
    return module


@pytest.mark.parametrize(
    "precision", ["bf16-true", *[pytest.param(p, marks=pytest.mark.slow) for p in ("bf16-mixed", "32-true")]]
)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_trains_in_float32(encoder, tmp_path, name, precision):
    module = trained(classification(encoder, ADAPTERS[name]), encoder, precision)
    base = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {base}
    saved = save_adapter(module, tmp_path / "adapter")
    fresh = load_model(str(encoder), find_task("sequence-classification"), 3, dtype=base)
    load_adapter(fresh, saved)
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, module.eval().model(IDS).logits)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_half_precision_base_is_the_start(name):
    """Heads too: they compute in float32 and give what they gave, up to one rounding."""
    with seeded(0):
        plain = tiny_encoder().to(torch.bfloat16).eval()
        net = tiny_encoder().to(torch.bfloat16).eval()
    net.load_state_dict(plain.state_dict())
    inject(net, ADAPTERS[name], seed=0)
    with torch.no_grad():
        expected, found = (model(IDS, output_hidden_states=True).hidden_states[-1] for model in (plain, net))
        assert torch.equal(found, expected)
        logits = net(IDS).logits
        with disable_adapters(net):
            assert torch.equal(net(IDS).logits, logits)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, plain(IDS).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_leaves_its_adapters(cast):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=2, train="A"), ["0"], also_train=(), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." in key}
    cast(model)
    assert model[0].base.weight.dtype != torch.float32
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_half_adapters_when_asked(encoder, tmp_path):
    module = trained(classification(encoder, LoRA(rank=2), half_adapters=True), encoder, "bf16-true")
    adapters = adapters_named(module.model, "default").values()
    assert {p.dtype for adapter in adapters for p in adapter.parameters()} == {torch.bfloat16}
    assert module.model.classifier.weight.dtype == torch.float32
    pairs = classification(
        encoder, LoRA(rank=2), half_adapters=True, optimizer=lambda params: RiemannianAdamW(params, lr=1e-3)
    )
    with pytest.raises(TrainingError, match="is in half precision"):
        trained(pairs, encoder, "bf16-true")


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (None, "16-true", 'trainer.precision is "16-true", under which gradients underflow; take "bf16-true"'),
        ("float32", "bf16-true", 'model.dtype is "float32", but trainer.precision "bf16-true"'),
    ],
)
def test_what_cannot_work_is_refused(encoder, dtype, precision, message):
    with pytest.raises(SettingsError, match=message):
        trained(classification(encoder, LoRA(rank=2), dtype=dtype), encoder, precision)


def test_a_parameter_that_two_layers_share_stays_shared() -> None:
    one, two = nn.Linear(2, 2, bias=False).bfloat16(), nn.Linear(2, 2).bfloat16()
    two.weight = one.weight
    compute_in_float32([one, two])
    assert one.weight is two.weight
    assert one.weight.dtype == two.bias.dtype == torch.float32
