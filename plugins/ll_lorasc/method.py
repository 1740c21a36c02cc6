"""LoRASC: low-rank adaptation with slow cascaded learning.

Li et al., 2024, arXiv:2407.01491. The noise is that of NoisyTune: Wu et al., 2022, arXiv:2202.12024.

For stages t = 1..T on a frozen W0:

    W~_t = W_t-1 + N_t,   N_t = lambda std(W_t-1) U[-1/2, 1/2]          the noise of the stage
    F_t  = merged(W~_t) - W~_t                                          the fast update, s B A for LoRA
    S_t  = (1 - alpha) S_t-1 + alpha F_t   or   alpha F_t               the slow one
    W_t  = W_t-1 + S_t

    paper     here                      meaning
    alpha     blend                     pace: weight of the newest update
    lambda    noise                     strength of the noise
    T         total / stage             stages of one epoch, or of stage_steps

Departs from the paper: no reference code was at hand. Which slow rule the paper runs, whether a stage's noise is taken
off again, whether its standard deviation is computed anew, and the learning rate over stages could not be settled;
each is an option here, with the default that the overview figure suggests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_lightning.stages import StagedMethod


@dataclass(frozen=True, kw_only=True)
class LoRASC(StagedMethod):
    """A chain of short trainings of another method, each folded into the weights before the next (Li et al., 2024)."""

    paper: ClassVar[str] = "2407.01491"
    bibtex: ClassVar[str] = """@inproceedings{li2024lorasc,
  title = {{LoRASC}: Expressive and Generalizable Low-rank Adaptation for Large Models via Slow Cascaded Learning},
  author = {Li, Siwei and Yang, Yifan and Shen, Yifei and Wei, Fangyun and Lu, Zongqing and Qiu, Lili and
            Yang, Yuqing},
  booktitle = {Empirical Methods in Natural Language Processing},
  year = {2024},
  note = {arXiv:2407.01491}
}"""

    blend: float = 0.5
    """Weight of the newest update in the blend, in (0, 1]; 1 with noise 0 is the plain cascade. Try 0.3 to 1."""
    rule: Literal["outer_step", "figure_ema"] = "figure_ema"
    """How updates become the slow one: a moving average which every stage adds, or the blend of each update once."""
    noise: float = 0.1
    """Noise on the frozen weights, relative to their standard deviation; 0 for none. Try 0 to 0.15."""
