"""Settings as plain data, settings by layer, and what a wrapper hands on."""

from __future__ import annotations

import doctest

import pytest

from ll_lora import LoRA
from ll_lorasc import LoRASC
from lora_lightning import methods
from lora_lightning.errors import SettingsError, UnknownMethodError
from lora_lightning.methods import plain_settings, replace
from lora_lightning.plugins import registry, restore


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
        restore(LoRASC, "here", plain)


def test_replace_reaches_inside():
    method = LoRASC(inner=LoRA(rank=4), share=0.3)
    assert replace(method, "x", {"inner": {"rank": 2}}) == LoRASC(inner=LoRA(rank=2), share=0.3)
    assert replace(method, "x", {"inner": LoRA(rank=1)}) == LoRASC(inner=LoRA(rank=1), share=0.3)
    with pytest.raises(SettingsError, match=r'x: LoRASC has no "shar"\. Did you mean "share"\?'):
        replace(method, "x", {"shar": 1.0})
