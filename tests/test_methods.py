"""Settings as plain data, settings by layer, and what a wrapper hands on."""

from __future__ import annotations

import doctest

import pytest

from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_rose import RoseLoRA
from lora_lightning import methods
from lora_lightning.errors import SettingsError, UnknownMethodError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.methods import plain_settings, replace
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.testing import TinyMLP


def test_examples_run():
    assert doctest.testmod(methods).failed == 0


@pytest.mark.parametrize("name", sorted(registry().methods))
def test_run_wide_fields_exist(name):
    cls = registry().methods[name]
    assert set(cls.run_wide) <= set(cls.__dataclass_fields__)


def test_a_method_inside_that_nobody_provides_is_named():
    plain = plain_settings(LoRASC(inner=LoRA()))
    plain["inner"]["class_path"] = "LoRO"
    with pytest.raises(UnknownMethodError, match=r'here: no method "LoRO"\. Did you mean "LoRA"'):
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
