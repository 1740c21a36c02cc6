"""CoRA: LoRA whose B is a basis that fine-tuned models have in common.

Optimal low-rank adaptation on a common subspace, 2024, arXiv:2409.02119.

    W' = W + s B_c A

    paper   here              shape
    B_c     lora_B            (d_out, r)   the common basis, see `basis.py`; frozen, or a start
    A       lora_A            (r, d_in)    starts at 0, so that the model starts as it is; trains
    s       alpha / rank

Departs from the paper: only its abstract and a summary could be read. How the basis is found, its scale and A = 0 are a
reconstruction, see the card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lora_lightning.errors import SettingsError, check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from ll_cora.adapter import BasisAdapter
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class CoRA(LowRankFields, Method):
    """LoRA on a common subspace: B is what several fine-tunes of a model share (arXiv:2409.02119, reconstructed).

    Frozen, it halves what trains, and adapters on one basis average exactly; as a start it trains as well.
    """

    paper: ClassVar[str] = "2409.02119"
    bibtex: ClassVar[str] = """@misc{cora2024,
  title = {{CoRA}: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models},
  year = {2024},
  note = {arXiv:2409.02119}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("mode", "sources", "basis_of", "basis_sha256")

    mode: Literal["frozen", "start"] = "frozen"
    """Whether the common basis stays, and A trains alone, or is where B starts."""
    sources: list[str] | None = None
    """Where the basis comes from: adapter folders, a folder of them, fine-tunes of the base model, or one file of a
    basis. Null takes the weights' own leading directions."""
    basis_of: Literal["B", "update"] = "B"
    """What of an adapter counts: its factor B as it is, or its update B A."""
    basis_scale: float = 1.0
    """Length of the basis' columns, which are orthogonal."""
    basis_sha256: str | None = None
    """Digest that the file of a basis must have; null takes any."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.basis_scale > 0, self, "basis_scale", "it must be above 0; 1 keeps columns orthonormal.")
        check(self.sources is None or len(self.sources) > 0, self, "sources", "it must name one at least, or be null.")
        alone = self.basis_sha256 is None or (self.sources is not None and _is_file(self.sources))
        check(alone, self, "basis_sha256", "it belongs to sources that are one .safetensors file of a basis.")

    def build(self, base: BaseLayer) -> BasisAdapter:
        """A zero A, and a B that `initialize` writes."""
        from ll_cora.adapter import BasisAdapter

        frozen = self.mode == "frozen"
        return BasisAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, frozen=frozen)

    def initialize(self, adapters: Adapters, probe: Probe) -> None:
        """Start B at the basis; A is zero already."""
        from tqdm import tqdm

        from ll_cora.basis import checked, columns_of, left_basis
        from lora_lightning.storage.fine_tunes import FineTunes
        from lora_lightning.storage.layer_tensors import read_tensors

        written, tunes = None, None
        if self.sources is not None and _is_file(self.sources):
            written = read_tensors(self.sources[0], "CoRA.sources", self.basis_sha256)
        elif self.sources is not None:
            tunes = FineTunes(self.sources, probe.model, probe.layers, "CoRA.sources")
        for path, adapter in tqdm(adapters.items(), delay=3.0, desc="common basis", unit=" layers", leave=False):
            layer, basis_adapter = probe.layers[path], cast("BasisAdapter", adapter)
            rank = basis_adapter.rank
            try:
                if written is not None:
                    basis = checked(written.get(path), layer.d_out, rank)
                else:
                    basis = left_basis(columns_of(path, layer, tunes, self.basis_of), rank)
            except SettingsError as error:
                raise SettingsError(f"CoRA on {path}: {error}") from error
            basis_adapter.hold_basis(self.basis_scale * basis)

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Digest of the bases, equal for adapters whose A can be averaged; null where they have trained."""
        from lora_lightning.storage.layer_tensors import tensors_digest

        bases = {path: adapter.factor_pairs()[0].lora_B for path, adapter in adapters.items()}
        return {"basis_sha256": tensors_digest(bases) if self.mode == "frozen" else None}


def _is_file(sources: list[str]) -> bool:
    return len(sources) == 1 and sources[0].endswith(".safetensors")
