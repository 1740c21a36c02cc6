"""Settings as plain data, settings by layer, and what a wrapper hands on."""

from __future__ import annotations

import doctest

import pytest

from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_rose import RoseLoRA
from lora_lightning import methods
from lora_lightning.callbacks import Cascade, SparsitySchedule
from lora_lightning.errors import SettingsError, UnknownMethodError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.methods import (
    LowRankFields,
    ScaledLowRankFields,
    SparsityFields,
    field_names,
    plain_settings,
    renamed,
    replace,
    values_of,
)
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.stages import CascadeFields
from lora_lightning.testing import TinyMLP


def test_examples_run():
    assert doctest.testmod(methods).failed == 0


@pytest.mark.parametrize("name", sorted(registry().methods))
def test_run_wide_fields_exist(name):
    cls = registry().methods[name]
    assert set(cls.run_wide) <= set(cls.__dataclass_fields__)


def test_a_method_inside_that_nobody_provides_is_named():
    plain = plain_settings(LoRASC(inner=LoRA()))
    plain["inner"]["class_path"] = "LoRAA"
    with pytest.raises(UnknownMethodError, match=r'here: no method "LoRAA"\. Did you mean "LoRA"'):
        restore_settings(LoRASC, "here", plain)


def test_replace_reaches_inside():
    method = LoRASC(inner=LoRA(rank=4), blend=0.3)
    assert replace(method, "x", {"inner": {"rank": 2}}) == LoRASC(inner=LoRA(rank=2), blend=0.3)
    assert replace(method, "x", {"inner": LoRA(rank=1)}) == LoRASC(inner=LoRA(rank=1), blend=0.3)
    with pytest.raises(SettingsError, match=r'x: LoRASC has no "blnd"\. Did you mean "blend"\?'):
        replace(method, "x", {"blnd": 1.0})


def test_layers_differ_in_fields_of_a_method_inside_but_not_in_what_holds_for_the_run():
    model = TinyMLP()
    inject(model, LoRASC(inner=RoseLoRA(rank=3)), overrides={"second": {"inner": {"rank": 1}}}, also_train=())
    assert {path: a.lora_A.shape[0] for path, a in adapters_named(model, "default").items()} == {
        "first": 3,
        "second": 1,
    }
    for fields, message in (
        ({"blend": 1.0}, r'overrides\["second"\]: LoRASC\.blend holds for the whole run'),
        (
            {"inner": {"sparsity": 0.5}},
            r'overrides\["second"\]\.inner: RoseLoRA\.sparsity holds for the whole run; set it',
        ),
        (
            {"inner": LoRA()},
            r'overrides\["second"\]\.inner is LoRA\(.*RoseLoRA stays on every layer, so it must be a mapping',
        ),
        ({"inner": {"rnak": 1}}, r'overrides\["second"\]\.inner: RoseLoRA has no "rnak"'),
    ):
        with pytest.raises(SettingsError, match=message):
            inject(TinyMLP(), LoRASC(inner=RoseLoRA()), overrides={"second": fields}, also_train=())


# -- field groups ------------------------------------------------------------------------------------------------------


def test_a_setting_of_a_group_is_spelled_once():
    """No method and no callback states a group's field again with the same default."""
    for group in (LowRankFields, ScaledLowRankFields, SparsityFields, CascadeFields):
        for owner in (LoRA, DoRA, RoseLoRA, LoRASC, SparsitySchedule, Cascade):
            if not issubclass(owner, group):
                continue
            own = vars(owner).get("__annotations__", {})
            again = [name for name in own if name in field_names(group)]
            for name in again:
                assert getattr(owner, name) != getattr(group, name), f"{owner.__name__}.{name}"


def test_a_method_hands_its_group_to_its_callback():
    method = LoRASC(inner=LoRA(), blend=0.3, rule="outer_step", noise=0.0, stage_steps=7, lr="rewarm", rewarm_steps=3)
    (cascade,) = method.callbacks()
    assert values_of(cascade, CascadeFields) == values_of(method, CascadeFields)
    assert (cascade.moments, cascade.seed) == ("reset", None)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_scaling_follows_the_rank(rank):
    assert LowRankFields(rank=rank, alpha=8.0).scaling == 8.0 / rank
    assert ScaledLowRankFields(rank=rank, alpha=8.0).scaling == 8.0 / rank
    assert ScaledLowRankFields(rank=rank, alpha=8.0, scaling_rule="alpha/sqrt(r)").scaling == 8.0 / rank**0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankFields(alpha="16"), r"LowRankFields\.alpha is '16'; it must be a finite number"),
        (lambda: LowRankFields(alpha=float("inf")), r"LowRankFields\.alpha is inf; it must be a finite number"),
        (lambda: LowRankFields(dropout=None), r"LowRankFields\.dropout is None; it must be a finite number"),
        (lambda: LoRA(bias="no"), r"LoRA\.bias is 'no'; it must be true or false"),
        (lambda: LowRankFields(rank=0), r"LowRankFields\.rank is 0; it must be at least 1"),
        (lambda: SparsityFields(end=0.05), r"SparsityFields\.end is 0\.05; it must come after start, which is 0\.1"),
        (
            lambda: CascadeFields(rule="ema"),
            r"CascadeFields\.rule is 'ema'; it must be \"outer_step\" or \"figure_ema\"",
        ),
        (lambda: CascadeFields(blend=0.0), r"CascadeFields\.blend is 0\.0; it must lie in \(0, 1\]"),
        (lambda: Cascade(moments="lose"), r"Cascade\.moments is 'lose'; it must be \"reset\" or \"keep\" or \"prune\""),
    ],
)
def test_a_group_checks_its_own_rules(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


def test_former_names_become_those_of_today():
    assert renamed({"share": 0.3, "noise": 0.0}, LoRASC.former_fields) == {"blend": 0.3, "noise": 0.0}
    assert renamed({"blend": 0.3}, LoRASC.former_fields) == {"blend": 0.3}
    assert set(LoRASC.former_fields.values()) <= set(field_names(LoRASC))
    assert LoRA.former_fields == {}
