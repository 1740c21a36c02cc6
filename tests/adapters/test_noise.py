from __future__ import annotations

import pytest
import torch

from lora_lightning.adapters.noise import Noise


def test_noise_is_bounded_centred_and_a_function_of_its_key():
    noise = Noise(3, 1, "layer", 0.5)
    values = noise.draw(torch.zeros(400, 250))
    assert values.abs().max() <= 0.25
    assert abs(float(values.mean())) < 0.002
    assert float(values.std()) == pytest.approx(0.5 / 12**0.5, rel=0.01)
    assert torch.equal(values, Noise(3, 1, "layer", 0.5).draw(values))
    assert not torch.equal(values, Noise(3, 2, "layer", 0.5).draw(values))


def test_values_drawn_ahead_are_the_same():
    noise, like = Noise(3, 1, "layer", 0.5), torch.zeros(4, 3, dtype=torch.bfloat16)
    ahead = noise.values(like.shape)
    assert torch.equal(noise.draw(like, values=ahead), noise.draw(like))
    assert noise.draw(like).dtype == torch.bfloat16
    assert torch.equal(noise.draw(like, torch.float32), 0.5 * ahead)
