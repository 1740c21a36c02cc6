"""Squares of a layer's inputs, for each kind of layer."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning.adapters.input_squares import input_squares
from lora_lightning.adapters.layers.kinds import core_base_layer


def test_squares_of_a_linear_layer_are_summed_over_tokens():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    sums, count = input_squares(core_base_layer(nn.Linear(4, 2).double()), x)
    assert count == 6
    torch.testing.assert_close(sums, x.square().sum((0, 1)).float())


def test_inputs_in_half_precision_are_squared_in_float32():
    x = torch.full((1000, 1), 300.0, dtype=torch.float16)  # whose square is no float16
    sums, _ = input_squares(core_base_layer(nn.Linear(1, 1).half()), x)
    assert sums.tolist() == [9e7]


def test_squares_of_a_convolution_are_those_of_its_patches():
    conv = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    patches = nn.functional.unfold(x, (3, 2), stride=(2, 1), padding=1)  # (2, d_in, places)
    sums, count = input_squares(core_base_layer(conv), x)
    assert count == patches.shape[0] * patches.shape[2]
    torch.testing.assert_close(sums, patches.square().sum((0, 2)).float())


def test_squares_of_an_embedding_count_tokens():
    sums, count = input_squares(core_base_layer(nn.Embedding(5, 3)), torch.tensor([[1, 1, 4]]))
    assert sums.tolist() == [0, 2, 0, 0, 1]
    assert count == 3
