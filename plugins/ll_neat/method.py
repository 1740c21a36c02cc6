"""NEAT, in later versions of the paper PEANuT: the update is a small neural network of the frozen weight.

Zhong et al., 2024, arXiv:2410.01870; the equations stand in `adapter.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Method, check_fields

if TYPE_CHECKING:
    from ll_neat.adapter import NEATAdapter
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class NEAT(Method):
    """An update that a small network computes from the frozen weight itself (Zhong et al., 2024), peft's PEANuT.

    It trains 2 rank d_out + 2 depth rank^2 numbers a layer.
    """

    paper: ClassVar[str] = "2410.01870"
    bibtex: ClassVar[str] = """@article{zhong2024neat,
  title = {{NEAT}: Nonlinear Parameter-efficient Adaptation of Pre-trained Models},
  author = {Zhong, Yibo and Jiang, Haoxiang and Li, Lincan and Nakada, Ryumei and Liu, Tianci and Zhang, Linjun and
            Yao, Huaxiu and Wang, Haoyu},
  journal = {arXiv preprint arXiv:2410.01870},
  year = {2024}
}"""

    export: ClassVar[str] = "native"
    peft_type: ClassVar[str] = "PEANUT"
    peft_fields: ClassVar[Mapping[str, str]] = {
        "rank": "r",
        "depth": "depth",
        "activation": "act_fn",
        "scaling": "scaling",
    }

    rank: int = 32
    """Hidden width r of the network, and the largest rank of the update."""
    depth: int = 0
    """Hidden layers on each side, d; 0 is the network of one hidden layer, more have residual connections."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "linear"] = "relu"
    """What stands after each hidden layer, by its name in transformers. "linear" leaves a linear left factor."""
    scaling: float = 1.0
    """Factor s on the update. Results are sensitive to it: the authors take 0.01 and 0.1 on GLUE."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.rank >= 1, self, "rank", "it must be at least 1. Hidden width of the network; 8 and 32 are common.")
        check(self.depth >= 0, self, "depth", "it must be at least 0. Hidden layers on each side; 0 to 3 are common.")
        check(self.scaling > 0, self, "scaling", "it must be above 0. Factor on the update; 0.01 to 1 are common.")

    def build(self, base: BaseLayer) -> NEATAdapter:
        """The network of one layer's weight."""
        from ll_neat.adapter import NEATAdapter

        return NEATAdapter(base, self.rank, depth=self.depth, activation=self.activation, scaling=self.scaling)
