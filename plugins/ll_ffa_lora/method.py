"""FFA-LoRA: federated freeze-A. A random A stays, the same for all clients, so that averages of B are exact.

Sun et al., 2024, arXiv:2403.12313.

    W' = W + s B A,   sum_k p_k (B_k A) = (sum_k p_k B_k) A

    paper   here              shape
    A       lora_A            (r, d_in)    a buffer, drawn from the seed and the layer's path
    B       lora_B            (d_out, r)   starts at 0, trains
    s       alpha / rank
    p_k     weights           share of client k in the average, by its rows or 1 / K

Departs from the paper: clients take their turns in one run, so that a schedule of the rate goes on from one client to
the next; the orthonormal A is our reading of "other initialisations".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter
    from lora_lightning.injection.probe import Probe

ROUNDS = ("clients", "local_steps", "weights", "moments", "skew")
PRIVACY = ("clip", "noise_multiplier", "epsilon", "delta", "accountant")


@dataclass(frozen=True, kw_only=True)
class FFALoRA(LowRankFields, Method):
    """LoRA with a frozen random A, made for federated and private training (Sun et al., 2024).

    With `clients` a run simulates federated rounds on parts of its training data; with `clip` gradients are private.
    """

    paper: ClassVar[str] = "2403.12313"
    bibtex: ClassVar[str] = """@inproceedings{sun2024ffalora,
  title = {Improving {LoRA} in Privacy-preserving Federated Learning},
  author = {Sun, Youbang and Li, Zitao and Li, Yaliang and Ding, Bolin},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2403.12313}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = (*ROUNDS, *PRIVACY)

    directions: Literal["kaiming", "gaussian", "orthonormal"] = "kaiming"
    """Rows of the frozen A: uniform as LoRA's, N(0, 1/rank^2), or orthonormal."""
    clients: int | None = None
    """Clients that the training rows are shared out to, which train in turns; null for ordinary training."""
    local_steps: int = 10
    """Optimizer steps of a client in a round; steps of the run are a multiple of this and `clients`."""
    weights: Literal["rows", "equal"] = "rows"
    """Whether clients count by their rows in the average, or all alike."""
    moments: Literal["reset", "keep"] = "reset"
    """Whether a client's optimizer begins anew in each round, or goes on where it was."""
    skew: float | None = None
    """Concentration of a Dirichlet distribution of each class over clients: 0.1 makes them very different, 100 hardly.
    Null shares rows out evenly."""
    clip: float | None = None
    """Largest norm of an example's gradient, which makes gradients private; data.batch_size is then 1. Null: none."""
    noise_multiplier: float | None = None
    """Noise over `clip`; null finds it for `epsilon`."""
    epsilon: float | None = None
    """Privacy of the whole run, for the client with the fewest rows; the paper takes 1, 3 and 6."""
    delta: float = 1e-5
    """Chance that epsilon does not hold."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """How Opacus counts privacy: by Renyi divergences, or tighter and slower."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        whole = self.clients is None or (type(self.clients) is int and self.clients >= 1)
        check(whole, self, "clients", "it must be a whole number of at least 1, or null.")
        private = self.clip is not None or (self.noise_multiplier is None and self.epsilon is None)
        check(private, self, "clip", "noise needs a largest gradient; 1 is common.")
        federated = self.clients is not None or self.skew is None
        check(federated, self, "skew", "clients is None, so there is nothing to differ; give clients.")

    def build(self, base: BaseLayer) -> LowRankAdapter:
        """A frozen A and a trained B."""
        from lora_lightning.adapters.low_rank import LowRankAdapter

        start: Literal["kaiming", "gaussian"] = "gaussian" if self.directions == "gaussian" else "kaiming"
        return LowRankAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, train="B", start=start)

    def initialize(self, adapters: Adapters, probe: Probe) -> None:  # noqa: ARG002 - it needs no data
        """Make the rows of A orthonormal, where asked for."""
        if self.directions != "orthonormal":
            return
        import torch

        from lora_lightning.adapters.base import write_values

        for adapter in adapters.values():
            for pair in adapter.factor_pairs():
                write_values(pair.lora_A, torch.linalg.qr(pair.lora_A.double().mT).Q.mT)

    def callbacks(self) -> Sequence[Callback]:
        """Rounds of clients, and private gradients, where asked for."""
        from lora_lightning.callbacks.federated import FederatedRounds
        from lora_lightning.callbacks.privacy import PrivateGradients

        found: list[Callback] = []
        if self.clients is not None:
            found.append(FederatedRounds(**{name: getattr(self, name) for name in ROUNDS}))
        if self.clip is not None:
            found.append(PrivateGradients(**{name: getattr(self, name) for name in PRIVACY}))
        return found

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Numbers that a client sends in a round for its adapters, and how many both factors would be."""
        pairs = [pair for adapter in adapters.values() for pair in adapter.factor_pairs()]
        sent = sum(pair.lora_B.numel() for pair in pairs)
        return {"numbers_a_round": sent, "with_both_factors": sent + sum(pair.lora_A.numel() for pair in pairs)}
