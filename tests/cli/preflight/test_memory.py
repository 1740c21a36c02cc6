"""Layouts against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_lightning.cli.preflight.memory import (
    PACKED,
    Parts,
    Unit,
    estimate,
    find_strategy,
    quantized_size,
    smallest_fit,
    verdict,
)
from lora_lightning.errors import SettingsError
from lora_lightning.models.quantized_loading import FORMATS

# two blocks of 100 frozen and 8 trained bytes, one of 60 and 4, outside them 40 and 4
PARTS = Parts((Unit(100, 8), Unit(60, 4), Unit(100, 8)), Unit(40, 4), optimizer=48, kept=6, activations=1000)


def test_one_gpu_holds_everything_and_sends_nothing():
    for strategy in ("ddp", "fsdp2", "fsdp", "deepspeed"):
        found = estimate(PARTS, strategy, 1)
        assert found.total == 300 + 24 + 24 + 48 + 6 + 1000
        assert found.sent == 0


def test_ddp_copies_all_and_reduces_gradients_once_a_step():
    found = estimate(PARTS, "ddp", 4, batches=3)
    assert found.total == 300 + 24 + 24 + 48 + 6 + 1000 + 24
    assert found.sent == 2 * 3 / 4 * 24


def test_fsdp2_keeps_trained_parameters_gathered():
    found = estimate(PARTS, "fsdp2", 4, batches=3)
    assert found.total == (300 + 24 + 24 + 48) / 4 + 6 + 1000 + 40 + 24 + 2 * 100
    a_batch = 2 * 260 + 40 + 2 * 24  # blocks twice, the rest once; trained ones gathered once and reduced once
    assert found.sent == 3 / 4 * 3 * a_batch


def test_fsdp_shards_frozen_weights_alone():
    found = estimate(PARTS, "fsdp", 4, batches=3)
    assert found.total == 300 / 4 + 24 + 24 + 48 + 6 + 1000 + 40 + 24 + 2 * 100
    a_batch = 2 * 260 + 40 + 2 * 24  # blocks twice, the rest once; gradients reduced among all
    assert found.sent == 3 / 4 * 3 * a_batch


def test_deepspeed_shards_gradients_and_state():
    found = estimate(PARTS, "deepspeed", 4, batches=3)
    assert found.total == 300 + 24 + (24 + 48) / 4 + 6 + 1000 + 24
    assert found.sent == 3 / 4 * (3 + 1) * 24


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("auto", "ddp"),
        ("lora_lightning.training.strategies.fsdp2.FSDP2", "fsdp2"),
        ("FSDP1", "fsdp"),
        ("DeepSpeed", "deepspeed"),
    ],
)
def test_names_of_strategies(given, name):
    assert find_strategy(given) == name


def test_an_unknown_strategy_names_the_nearest():
    with pytest.raises(SettingsError, match=r'strategy is "fsdpp"\. Did you mean "fsdp"\? Estimates know: ddp, '):
        estimate(PARTS, "fsdpp", 2)


@pytest.mark.parametrize(
    ("gpus", "batches", "message"), [(0, 1, "gpus is 0; it must"), (1, 0, "batches is 0; it must")]
)
def test_less_than_one(gpus, batches, message):
    with pytest.raises(SettingsError, match=message):
        estimate(PARTS, "ddp", gpus, batches)


def test_what_fits():
    assert smallest_fit(PARTS, 1350).gpus == 8  # 396 / 8 + 6 + 1000 + 264 = 1319.5; on 4 it is 1369
    assert smallest_fit(PARTS, 1200) is None
    small, large = estimate(PARTS, "ddp", 1), estimate(PARTS, "fsdp2", 8)
    assert verdict([small, large], PARTS, 1500).endswith("a tenth of it left free: fsdp2 on 8.")
    assert verdict([small], PARTS, 1500).endswith("a tenth of it left free; fsdp2 on 8 GPUs does.")
    assert "lower batch_size or max_length" in verdict([small], PARTS, 1000)


def test_weights_in_few_bits():
    rows, columns = 128, 256
    blocks = rows * columns // 64
    assert quantized_size((rows, columns), "nf4") == rows * columns // 2 + 4 * blocks
    assert quantized_size((rows, columns), "nf4-double") == rows * columns // 2 + blocks + 4 * blocks // 256
    for name in ("int8", "torchao-int8"):
        assert quantized_size((rows, columns), name) == rows * columns + 4 * rows
    assert set(PACKED) == set(FORMATS)
    with pytest.raises(SettingsError, match=r'quantized is "nf"\. Did you mean "nf4"'):
        quantized_size((rows, columns), "nf")


@pytest.mark.parametrize(("strategy", "gpus"), [("fsdp", 2), ("fsdp2", 2), ("fsdp2", 1), ("deepspeed", 2)])
def test_what_takes_no_quantized_base_names_what_does(strategy, gpus):
    parts = replace(PARTS, dequantized=100)
    assert estimate(parts, "ddp", 2).activations == 1100
    with pytest.raises(SettingsError, match=f'strategy is "{strategy}", which takes no .*; nearest: "ddp"'):
        estimate(parts, strategy, gpus)
