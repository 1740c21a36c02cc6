"""LoftQ: the factors start at the best low-rank approximation of what quantization has lost.

Li et al., 2023, arXiv:2310.08659; one alternation (T = 1), after the model was quantized.

    E = W - Q = U S V^T,   s B0 A0 = U_r S_r V_r^T
    y = Q x + s B A x

    paper   here        meaning
    Q       weight()    the layer's weight as its quantized form means it
    T       1           alternations

Departs from the paper: further alternations would quantize W - s B A anew, and so write the base, which adapters here
never do. The product is divided by s, so that Q + s B0 A0 is the approximation; peft leaves that to alpha = r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_lightning.errors import SettingsError, check
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors


@dataclass(frozen=True, kw_only=True)
class LoftQ(Start):
    """The factors start at what quantization has lost of each weight, as well as their rank can (Li et al., 2023)."""

    paper: ClassVar[str] = "2310.08659"
    bibtex: ClassVar[str] = """@inproceedings{li2024loftq,
  title = {{LoftQ}: {LoRA}-Fine-Tuning-Aware Quantization for Large Language Models},
  author = {Li, Yixiao and Yu, Yifan and Liang, Chen and He, Pengcheng and Karampatziakis, Nikos and Chen, Weizhu and
            Zhao, Tuo},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2310.08659}
}"""
    subtracts: ClassVar[bool] = False

    weights: str = ""
    """Folder with the safetensors files of the model before it was quantized: that of `model.pretrained`, mostly."""

    def __post_init__(self) -> None:
        rule = "it must be the folder of the model before it was quantized, such as that of model.pretrained."
        check(isinstance(self.weights, str) and self.weights != "", self, "weights", rule)

    def of_layer(self, path: str, weight: Tensor, adapter: PairAdapter) -> Factors:
        """Leading singular triplets of W - Q."""
        from lora_lightning.adapters.starts import weight_start
        from lora_lightning.models.weight_files import WeightFiles

        lost = WeightFiles(self.weights, "LoftQ.weights").lost(path, weight)
        if not bool(lost.any()):
            raise SettingsError(
                f"LoftQ on {path}: quantization has lost nothing of it, so both factors would start at zero and "
                "never learn. Quantize the model (model.quantization), or leave init out."
            )
        return weight_start(lost, adapter.rank, adapter.scaling)
