"""CorDA: context-oriented decomposition adaptation. What trains is chosen by the inputs of some data.

Yang et al., 2024, arXiv:2406.05223.

    C = mean over samples of X^T X,   W C = U S V^T,   W = U S V^T C^-1
    A0 = (S_r / s)^(1/2) V_r^T C^-1,   B0 = U_r (S_r / s)^(1/2)
    y = W x + (s B A x - s B0 A0 x)

    paper                               here                    meaning
    instruction-previewed (IPM)         mode "instruction"      the leading r triplets train: adapt to the data
    knowledge-preserved (KPM)           mode "knowledge"        the trailing r train, the leading ones stay

Departs from the paper: W is never written. Inputs of a call are divided by the size of their largest entry, as in
peft. The data of both modes are the run's training rows: for "knowledge" train on rows whose knowledge is to stay, or
give a `Probe` of others in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import check_fields
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class CorDA(Start):
    """The factors start at singular triplets of the weight as some data's inputs see it (Yang et al., 2024)."""

    paper: ClassVar[str] = "2406.05223"
    bibtex: ClassVar[str] = """@inproceedings{yang2024corda,
  title = {{CorDA}: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
           Parameter-Efficient Fine-tuning},
  author = {Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and Song, Shuaiwen Leon and Wu, Jianlong and Nie, Liqiang and
            Ghanem, Bernard},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2406.05223}
}"""

    batches: int = 16
    """Training batches whose inputs are looked at; the authors take 256 samples of 2,048 tokens for 4,096 inputs."""
    mode: Literal["instruction", "knowledge"] = "instruction"
    """Which end of the spectrum trains: the leading part, or the trailing one, so that the leading one stays."""
    damping: float = 0.01
    """Added to the covariance's diagonal, over its mean; doubled until the covariance can be inverted."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.batches >= 1, self, "batches", "it must be at least 1; 16 to 256 are usual.")
        check(self.damping > 0, self, "damping", "it must be above 0; 0.01 is usual.")

    def probe_batches(self) -> int:
        """Those of `batches`."""
        return self.batches

    def factors(self, adapters: Mapping[str, PairAdapter], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """Singular triplets of each weight times the covariance of its inputs."""
        from lora_lightning.adapters.starts import context_start

        part_of: Literal["leading", "trailing"] = "leading" if self.mode == "instruction" else "trailing"
        for part in probe.in_parts(list(adapters)):
            tokens = [0]

            def scaled(rows: Tensor, tokens: list[int] = tokens) -> Tensor:
                tokens[0] += len(rows)
                return rows / rows.max().abs().clamp_min(1e-30)

            found = probe.covariances(part, scaled=scaled)
            length = tokens[0] / len(part) / max(sum(map(_samples, probe.batches)), 1)
            for path, covariance in found.items():
                adapter, weight = adapters[path], probe.layers[path].weight()
                C = length * covariance  # a sum over a sample's tokens
                yield path, context_start(weight, C, adapter.rank, adapter.scaling, part_of, self.damping)


def _samples(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    return next((len(value) for value in batch.values() if getattr(value, "ndim", 0)), 1)
