"""Settings of training in stages: the group that methods and the cascade share, and the base of methods in stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import SettingsError, check
from lora_lightning.methods import (
    Adapters,
    Method,
    WrapperMethod,
    check_choices,
    check_fields,
    field_names,
    values_of,
)

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadeFields:
    """Settings of training in stages, each of which is folded into the weights before the next."""

    former_fields: ClassVar[Mapping[str, str]] = {"share": "blend"}

    blend: float = 1.0
    """Weight of the newest update in the blend, in (0, 1]; 1 with noise 0 is the plain cascade. Try 0.3 to 1."""
    blend_decay: float = 1.0
    """The k-th update is folded with weight blend * blend_decay^k, k from 1; below 1 the function jumps there."""
    rule: Literal["outer_step", "figure_ema"] = "outer_step"
    """How updates become the slow one: "outer_step" adds the blend of each update once, "figure_ema" keeps a moving
    average of updates and adds that at every stage."""
    remainder: Literal["restart", "shrink", "shrink_each"] = "restart"
    """What becomes of a folded adapter: "restart" begins at zero. Of blend m, "shrink" takes sqrt(1 - m) times each
    factor, which keeps the function; "shrink_each" 1 - m times, and it jumps."""
    noise: float = 0.0
    """Noise on the frozen weights, relative to their standard deviation, drawn anew each stage; 0 for none. Try 0 to
    0.15."""
    noise_mode: Literal["restore", "persist"] = "restore"
    """Whether a stage's noise is taken off at its end, or folded in with the update, as NoisyTune leaves it."""
    stage_epochs: int | None = None
    """Epochs of a stage; null for one, unless stage_steps is given."""
    stage_steps: int | None = None
    """Optimizer steps of a stage, instead; instruction sets run for few epochs."""
    stage_ranks: list[int] | None = None
    """Rank components that train in each stage, the last number in all that follow, by a mask; null for all."""
    active_layers: int | None = None
    """Layers that train in a stage, drawn for each; the others rest at zero. Null for all."""
    moments: Literal["reset", "keep", "prune"] = "reset"
    """Whether the optimizer forgets, keeps or thins out its state at a stage's end; slow weights go in any case."""
    pruned_fraction: float = 0.999
    """For moments "prune": fraction of the entries that become zero."""
    pruned_by: Literal["random", "magnitude"] = "random"
    """For moments "prune": which entries become zero, drawn ones or the smallest."""
    pruned_apart: bool = False
    """For moments "prune": whether each moment has its own mask, which may move an entry far."""
    lr: Literal["continue", "rewarm", "restart", "jagged"] = "continue"
    """Learning rate over stages: one schedule for the run, with a short rise at each stage, one a stage, or that of the
    run with a line from zero back to it. All but the first need AdapterModule's schedule."""
    rewarm_steps: int = 20
    """Steps of that rise, which begins at a tenth of the rate ("jagged": at zero); 20 to 50 are common."""
    lr_floor: float = 0.0
    """For lr "jagged": fraction of the rate that the schedule decays to."""
    log_rank: int | None = None
    """Largest rank of folded factors, which are cut to the best of it, with the error logged; null for none."""

    def __post_init__(self) -> None:
        check_cascade(self)


def check_cascade(owner: Any) -> None:
    """Raise `SettingsError` for a setting outside its rule; `owner` has `CascadeFields`."""
    check_choices(owner, CascadeFields)
    for field in ("stage_epochs", "stage_steps", "active_layers", "log_rank"):
        value = getattr(owner, field)
        whole = value is None or (type(value) is int and value >= 1)
        check(whole, owner, field, "it must be a whole number of at least 1, or null.")
    both = owner.stage_epochs is not None and owner.stage_steps is not None
    check(not both, owner, "stage_steps", f"stage_epochs is {owner.stage_epochs} too; give one of them.")
    check(owner.stage_steps != 1, owner, "stage_steps", "it must be at least 2: a stage's first step moves one factor.")
    check(0 < owner.blend <= 1, owner, "blend", "it must lie in (0, 1]. Weight of the newest update; 0.5 is usual.")
    check(0 < owner.blend_decay <= 1, owner, "blend_decay", "it must lie in (0, 1]; 1 folds all stages alike.")
    check(owner.noise >= 0, owner, "noise", "it must be at least 0. Relative to the weight's deviation; 0.1 is usual.")
    rule = "it must lie in (0, 1). Fraction of zeros; 0.9 to 0.999 are usual."
    check(0 < owner.pruned_fraction < 1, owner, "pruned_fraction", rule)
    check(owner.rewarm_steps >= 1, owner, "rewarm_steps", "it must be at least 1; 20 to 50 are common.")
    check(0 <= owner.lr_floor < 1, owner, "lr_floor", "it must lie in [0, 1). Fraction of the rate at the end; 0.1.")
    jagged = owner.lr == "jagged" or owner.lr_floor == 0
    check(jagged, owner, "lr_floor", f'lr is "{owner.lr}", which has no floor; take lr: jagged, or leave it out.')
    _check_ranks(owner)
    _check_together(owner)


def _check_ranks(owner: Any) -> None:
    ranks = owner.stage_ranks
    given = isinstance(ranks, list | tuple) and len(ranks) > 0 and all(type(r) is int and r >= 1 for r in ranks)
    check(ranks is None or given, owner, "stage_ranks", "it must be whole numbers of at least 1, such as [8, 4].")


def _check_together(owner: Any) -> None:
    """Refuse settings that contradict one another."""
    if owner.rule == "figure_ema":  # its average goes on from stage to stage, so that each must be folded as it is
        rule = 'rule is "figure_ema", which averages whole updates; take rule: outer_step, or leave it out.'
        for field in ("remainder", "blend_decay", "active_layers", "log_rank"):
            default = getattr(owner, field) == getattr(CascadeFields, field)
            check(default, owner, field, rule)
    persists = owner.noise > 0 and owner.noise_mode == "persist"
    rule = 'noise stays on all layers with noise_mode: persist; take "restore", or null.'
    check(owner.active_layers is None or not persists, owner, "active_layers", rule)
    if owner.remainder != "restart":
        rule = "what is left of an update is not zero, so that"
        check(owner.stage_ranks is None, owner, "remainder", f"{rule} stage_ranks would cut it; take restart.")
        check(owner.active_layers is None, owner, "remainder", f"{rule} no layer can rest; take restart.")
        check(owner.noise == 0, owner, "remainder", f"{rule} it would be on another noise; take noise: 0, or restart.")


@dataclass(frozen=True, kw_only=True)
class StagedMethod(CascadeFields, WrapperMethod):
    """A method that trains another one in stages; a subclass gives its paper, its defaults and its own rules.

    A subclass with a `__post_init__` calls `check_staged`.
    """

    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = field_names(CascadeFields)

    def __post_init__(self) -> None:
        check_staged(self)

    def report(self, adapters: Adapters) -> dict[str, Any]:  # noqa: ARG002 - what is left of an adapter says nothing
        """Nothing: at the end of a stage the inner method's adapter is back at zero."""
        return {}

    def callbacks(self) -> Sequence[Callback]:
        """The cascade, and what the inner method needs."""
        # by its name, as a config takes it: callbacks stand above settings
        cascade = import_module("lora_lightning.callbacks.cascade").Cascade
        return [*self.inner.callbacks(), cascade(**values_of(self, CascadeFields))]


def check_staged(method: StagedMethod) -> None:
    """Raise `SettingsError` for a setting outside its rule, or an inner method whose update cannot be folded."""
    check_fields(method)
    check_cascade(method)
    name, inner = type(method).__name__, type(method.inner).__name__
    check(isinstance(method.inner, Method), method, "inner", "it must be a method with its settings, such as LoRA().")
    check(not isinstance(method.inner, StagedMethod), method, "inner", "stages inside stages would be folded twice.")
    if not method.inner.mergeable:
        raise SettingsError(
            f"{name}.inner is {inner}, whose update depends on the input, so that it cannot be folded into a weight; "
            "take a mergeable method, such as LoRA."
        )
    if not method.inner.starts_at_base:
        raise SettingsError(f"{name}.inner is {inner}, which does not start at zero, as each stage must.")
