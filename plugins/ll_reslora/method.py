"""ResLoRA: residual paths between low-rank updates of layers of the same type, in the order of depth.

Shi et al., 2024, arXiv:2402.18039, section 3.

    block shortcut    y_n = W_n x_n + s sum_(k = 0..m) B_(n-k) A_(n-k) x_n
    merged            W_n + s sum_(k = 0..m) B_(n-k) A_(n-k), exactly
    input shortcut    y_n = W_n x_n + s B_n A_n (x_n + x_(n-1))
    middle shortcut   y_n = W_n x_n + s B_n sum_(k = 0..m) A_(n-k) x_(n-k)
    merged            W_n + (1 + c_n) s B_n A_n, approximately; see `crossing.py`

    paper  here          shape (out, in as nn.Linear stores it)
    W      weight        (d_out, d_in)   frozen
    A, B   lora_A/B      (rank, d_in), (d_out, rank)   start at LoRA's values: B is zero
    s      scaling       alpha / rank
    n      depth of the layer's block among blocks with a layer at that place, all query projections for one
    m      previous      pre_num in the released code
    c      from path_means (5,)   by |x_(n-k)| / |x_n| over the last steps (merge_bi), or of least error

Departs from the paper: one dropout mask for all pairs of a layer. Layers of other shapes at the same place are passed
over, where the released code would fail. The released code merges with A^T B^T, which is right for square layers alone.
The window of the ratio counts optimizer steps, and norms are those of tokens. Ratios of merged weight norms (merge_bw)
are not offered; the ratio of least error is, instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import nn

    from ll_reslora.crossing import InputShortcuts
    from lora_lightning.adapters.joined import JoinedPair
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.linked import Linked


@dataclass(frozen=True, kw_only=True)
class ResLoRA(LowRankFields, Method):
    """Low-rank updates that act in later blocks as well, so that gradients reach early ones by a shorter path.

    Block shortcuts (ResLoRA_bs) of Shi et al., 2024: a layer adds the updates of its predecessors of the same type to
    its own, and merges exactly. It trains as many numbers as LoRA.
    """

    paper: ClassVar[str] = "2402.18039"
    bibtex: ClassVar[str] = """@inproceedings{shi2024reslora,
  title = {{ResLoRA}: Identity Residual Mapping in Low-Rank Adaption},
  author = {Shi, Shuhua and Huang, Shaohan and Song, Minghui and Li, Zhoujun and Zhang, Zihan and Huang, Haizhen
            and Wei, Furu and Deng, Weiwei and Sun, Feng and Zhang, Qi},
  booktitle = {Findings of the Association for Computational Linguistics: ACL},
  year = {2024},
  note = {arXiv:2402.18039}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("previous",)

    previous: int = -1
    """How many earlier layers of its type a layer reads; -1 for all of them, 0 for none, which is LoRA. Every one of
    them is a further product of rank r in the layer, and a further r in the rank of an export."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.previous >= -1, self, "previous", "it must be at least 0, or -1 for all earlier layers.")

    def build(self, base: BaseLayer) -> JoinedPair:
        """One pair of factors; `link` joins those of earlier layers."""
        from lora_lightning.adapters.joined import JoinedPair

        joins = self.previous != 0
        return JoinedPair(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, joins=joins)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        """Earlier layers of the same type and shape, as peers; nothing lies above layers."""
        from lora_lightning.injection.links import earlier_alike

        for path, earlier in earlier_alike(model, adapters, shapes, self.previous).items():
            adapters[path].peers = earlier
        return {}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """How many earlier layers each layer reads, and how many layers read none."""
        read = {path: len(adapter.peers) for path, adapter in adapters.items()}
        return {"without_shortcut": sum(not count for count in read.values()), "earlier_layers": read}


@dataclass(frozen=True, kw_only=True)
class ResLoRAInputs(LowRankFields, Method):
    """Low-rank updates that read what earlier layers of their type were given: input or middle shortcuts.

    ResLoRA_is and ResLoRA_ms of Shi et al., 2024. Values cross layers, so that no fixed weight computes the same: the
    merged model is another one, whose error is measured while training.
    """

    paper: ClassVar[str] = ResLoRA.paper
    bibtex: ClassVar[str] = ResLoRA.bibtex
    mergeable: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"
    run_wide: ClassVar[tuple[str, ...]] = ("shortcut", "previous", "first", "window")

    shortcut: Literal["input", "middle"] = "middle"
    """"input" adds the input of the nearest earlier layer to a layer's own, "middle" what earlier layers' first factors
    have made of theirs."""
    previous: int = -1
    """How many earlier layers a middle shortcut reads; -1 for all, 0 for none, which is LoRA. An input shortcut reads
    one, whatever the number."""
    first: Literal["itself", "nothing"] = "itself"
    """What the first layer reads as its predecessor's input: its own, as in the released code, or nothing."""
    estimate: Literal["inputs", "fit"] = "inputs"
    """The ratio by which a merge stands for earlier values: of norms of inputs, as in the paper, or of least error."""
    window: int = 100
    """Optimizer steps over which that ratio is averaged; the authors take 100 batches."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.previous >= -1, self, "previous", "it must be at least 0, or -1 for all earlier layers.")
        check(self.window >= 1, self, "window", "it must be at least 1; the authors take 100.")

    def build(self, base: BaseLayer) -> InputShortcuts:
        """One pair of factors; `link` says whose values it reads."""
        from ll_reslora.crossing import InputShortcuts

        return InputShortcuts(base, self.rank, self.scaling, self.dropout, self.shortcut == "middle", self.estimate)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        """Whose values each layer reads; nothing lies above layers."""
        from lora_lightning.injection.links import earlier_alike

        own = cast("Mapping[str, InputShortcuts]", adapters)
        middle = self.shortcut == "middle"
        same = (lambda adapter: adapter.lora_A.shape) if middle else (lambda adapter: adapter.lora_A.shape[1:])
        count = self.previous if middle else min(1, abs(self.previous))
        for path, earlier in earlier_alike(model, own, same, count).items():
            own[path].earlier = earlier
            for adapter in earlier:
                adapter.is_read = adapter.reads_context = own[path].reads_context = True
        for adapter in own.values():
            adapter.doubles = not middle and self.first == "itself" and adapter.is_read and not adapter.earlier
        return {}

    def callbacks(self) -> Sequence[Callback]:
        """What averages the measured ratios."""
        from ll_reslora.crossing import MEANS
        from lora_lightning.callbacks.window_means import WindowMeans

        return [WindowMeans(MEANS, self.window)]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """How many earlier layers each layer reads, and the relative error of an approximate merge once it trained."""
        own = cast("Mapping[str, InputShortcuts]", adapters)
        errors = {path: a.approximation().error for path, a in own.items() if bool(a.path_means.any())}
        return {"earlier_layers": {path: len(a.earlier) for path, a in own.items()}, "merge_error": errors}


def shapes(adapter: Any) -> tuple[int, ...]:
    """What must be equal for pairs to be joined: leading axes and both widths."""
    return (*adapter.lora_A.shape[:-2], adapter.lora_A.shape[-1], adapter.lora_B.shape[-2])
