"""ReLoRA: high-rank training through low-rank updates.

Lialin et al., 2023, arXiv:2307.05695; code: github.com/Guitaricet/relora.

    every L steps:   W <- W + s B A,   A ~ init,   B = 0,   moments of A and B thinned out
    rate:            k / w * e(t + w)  for the k-th of the first w steps of a stage that begins at t,  e(k) else

    paper        here               meaning
    L            stage_steps        steps of a stage
    w            rewarm_steps       steps of the line from zero after each merge
    e            lr_scheduler       the one decay of the run, down to lr_floor
    99.9 %       pruned_fraction    moments that become zero

Departs from the paper: merges and resets fall on the multiple of L, where the code merges one update later, an update
of rate 0. Resets come with merges only. Both moments are pruned under one mask; the code's independent ones are
`pruned_apart`. After a merge the rate rises to the envelope as it is at the end of the rise. What trains beside the
adapters, embeddings and norms in the authors' pretraining, is chosen by `also_train`; a phase of full training before
the first adapter is another run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_lightning.stages import StagedMethod


@dataclass(frozen=True, kw_only=True)
class ReLoRA(StagedMethod):
    """A chain of merged updates, with pruned moments and a rate that rises anew after each (Lialin et al., 2023)."""

    paper: ClassVar[str] = "2307.05695"
    bibtex: ClassVar[str] = """@inproceedings{lialin2024relora,
  title = {{ReLoRA}: High-Rank Training Through Low-Rank Updates},
  author = {Lialin, Vladislav and Muckatira, Sherin and Shivagunde, Namrata and Rumshisky, Anna},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2307.05695}
}"""

    moments: Literal["reset", "keep", "prune"] = "prune"
    """Whether the optimizer forgets, keeps, or thins out its state of an adapter whose stage has ended."""
    lr: Literal["continue", "rewarm", "restart", "jagged"] = "jagged"
    """Learning rate over stages: "jagged" is the run's own schedule with a line from zero back to it at each stage."""
    rewarm_steps: int = 100
    """Steps of that line; the authors take 50 to 100."""
    lr_floor: float = 0.1
    """Fraction of the rate that the schedule decays to."""
