"""Method: the base of every method's settings, and the questions a method may answer.

Imports neither torch nor Lightning, so that `--help` and `methods` stay fast; `build`, `optimizer` and `callbacks`
import what they need inside.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import SettingsError, check, did_you_mean
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lora_lightning.adapters.base import Adapter, GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.linked import Linked
    from lora_lightning.injection.probe import Probe

Plan = Mapping[str, Mapping[str, Any]]
"""Fields that differ, by layer path: plain data."""
Adapters = Mapping[str, "Adapter"]
"""Adapters of one name by the path of the layer they sit on."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of an adapter method. Fields are the documentation, `--help` and the YAML.

    Class facts:
        paper: arXiv identifier.
        bibtex: BibTeX entry of the paper, printed by `cite`.
        mergeable: False where the update depends on the input, so that no merged weight exists.
        starts_at_base: True where the adapted model equals the base model before the first step.
        export: how the method travels to other libraries ("native", "exact LoRA", "merged only", "not expressible").
        peft_type: peft's name of the format that this method is read from ("LORA": its fields are then `rank`, `alpha`,
            `dropout`, `scaling_rule` and `bias`, its adapters own one factor pair; "ADALORA": they have `lora_E`
            beside it, the scaling is alpha / (rank + 1e-5), and the first three are its fields); empty for none. Any
            other is a type of the method's own, of which its adapters state all tensors in `Adapter.peft_tensors`.
        peft_fields: of such a type, entries of adapter_config.json by the fields that they mean.
        peft_options: entries of adapter_config.json with which that format means this method, such as `use_dora`; what
            its adapters own beside the pair they then state in `Adapter.peft_tensors`.
        run_wide: fields that hold for a whole run (of a schedule, an optimizer), so that no layer can have its own.
        ranks: fields that are ranks of a layer; `inject` takes at most the layer's narrow side.
        rate_ratio: its best learning rate over that of plain low-rank updates, as measured; where `lr: auto` starts.
        former_fields: fields by the name that they had before, as older files and configs spell them.
        plans_by_shape: True where `plan` reads names and shapes alone, so that a model without values, which is only
            measured, gets its plan too.
    """

    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    export: ClassVar[str] = "merged only"
    peft_type: ClassVar[str] = ""
    run_wide: ClassVar[tuple[str, ...]] = ()
    ranks: ClassVar[tuple[str, ...]] = ("rank",)
    rate_ratio: ClassVar[float] = 1.0
    peft_fields: ClassVar[Mapping[str, str]] = {}
    peft_options: ClassVar[Mapping[str, object]] = {}
    former_fields: ClassVar[Mapping[str, str]] = {}
    plans_by_shape: ClassVar[bool] = False

    @abstractmethod
    def build(self, base: BaseLayer) -> Adapter:
        """The adapter for one layer, on the layer's device; `inject` gives it its start values by `reset`."""

    def probe_batches(self) -> int:
        """How many calibration batches `plan` and `initialize` read, where a training run hands them out; 0: none."""
        return 0

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:  # noqa: ARG002
        """Fields of some layers that differ from the method's own, by layer path; `{"rank": 0}` skips a layer.

        Asked once for a new adapter, before anything is built, with the plain model and its matched layers; of several
        processes the first one is asked. `probe` reads the model on calibration batches. The answer is plain data
        (numbers, strings, lists) and is saved with the adapter: resuming and loading read it there. `overrides` of the
        user win over it, field by field.
        """
        return {}

    def initialize(self, adapters: Adapters, probe: Probe) -> None:  # noqa: B027 - a question with a default answer
        """Write start values that depend on weights or data, in place; nothing is returned.

        Asked once for a new adapter, after `build`, `reset` and `link`, before adapters are on their layers; of several
        processes the first one is asked and its values are sent. Not asked where values are loaded.
        `probe.layers[path]` is the base layer of an adapter; its `weight()` is (d_out, d_in). Functions for starts:
        `adapters.starts`.
        """

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:  # noqa: ARG002
        """Modules above one layer by the path of the module that they are registered at ("" is the model itself).

        Asked whenever adapters have been built: for a new one and for one that is loaded. It sees the plain model and
        all adapters, and sets `adapter.linked` of those that read what it returns; each module must be read by one at
        least. Tensors lie at `<path>.adapters.<name>.<tensor>`. Values are given by `Linked.reset`.

        Here adapters also learn of one another: `adapter.peers` are those of earlier layers whose tensors it reads.
        """
        return {}

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Trainables by group name: sides of factor pairs as "A" and "B", the rest as "other"."""
        from lora_lightning.adapters.base import pair_groups

        return pair_groups(adapters)

    def optimizer(self) -> Callable[[Any], Optimizer] | None:
        """The method's own default optimizer as a factory over parameter groups; None for AdamW."""
        return None

    def callbacks(self) -> Sequence[Callback]:
        """Lightning callbacks the method needs; each yields to a trainer callback of its class or a subclass."""
        return ()

    def penalty(self, adapters: Adapters) -> Tensor | None:  # noqa: ARG002 - a question with a default answer
        """Extra loss per optimizer step, already weighted."""
        return None

    def report(self, adapters: Adapters) -> dict[str, Any]:  # noqa: ARG002 - a question with a default answer
        """Facts for the summary, name to plain value."""
        return {}


@dataclass(frozen=True, kw_only=True)
class WrapperMethod(Method):
    """A method around another one, to which it hands on every question it has nothing to add to."""

    inner: Method
    """The method inside: its class and its settings."""

    def build(self, base: BaseLayer) -> Adapter:
        """The inner method's adapter."""
        return self.inner.build(base)

    def probe_batches(self) -> int:
        """As many as the inner method's."""
        return self.inner.probe_batches()

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:
        """The inner method's plan, of fields of the method inside."""
        return {path: {"inner": fields} for path, fields in self.inner.plan(model, targets, probe).items()}

    def initialize(self, adapters: Adapters, probe: Probe) -> None:
        """The inner method's start values."""
        self.inner.initialize(adapters, probe)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        """The inner method's linked modules."""
        return self.inner.link(model, adapters)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """The inner method's groups."""
        return self.inner.param_groups(adapters)

    def optimizer(self) -> Callable[[Any], Optimizer] | None:
        """The inner method's optimizer."""
        return self.inner.optimizer()

    def callbacks(self) -> Sequence[Callback]:
        """The inner method's callbacks."""
        return self.inner.callbacks()

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """The inner method's penalty."""
        return self.inner.penalty(adapters)

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """The inner method's facts."""
        return self.inner.report(adapters)


def replace(method: Method, where: str, fields: Mapping[str, Any]) -> Method:
    """`method` with other values for `fields`; a mapping for a method inside replaces fields of that one.

    Raises:
        SettingsError: a field that the method does not have, naming `where` it was given and the nearest one.
    """
    check_names(type(method), where, fields)
    inside = {name: getattr(method, name) for name in fields if isinstance(getattr(method, name), Method)}
    nested = {
        name: replace(old, f"{where}.{name}", value)
        for name, old in inside.items()
        if isinstance(value := fields[name], Mapping)
    }
    return dataclasses.replace(method, **{**fields, **nested})


def check_overridable(method: Method, where: str, fields: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for a field, of the method or of one inside it, of which all layers have the same value.

    That is what holds for the whole run, and a method inside as such: only its fields may differ from layer to layer.
    """
    for name, value in fields.items():
        if name in type(method).run_wide:
            raise SettingsError(
                f"{where}: {type(method).__name__}.{name} holds for the whole run; set it on the method itself."
            )
        inside = getattr(method, name, None)
        if isinstance(inside, Start) or isinstance(value, Start):
            raise SettingsError(f"{where}: {type(method).__name__}.{name} holds for the whole run; set it there.")
        if not isinstance(inside, Method):
            continue
        if not isinstance(value, Mapping):
            raise SettingsError(
                f"{where}.{name} is {value!r}; {type(inside).__name__} stays on every layer, so it must be a mapping "
                "of the fields that differ, such as {rank: 4}."
            )
        check_overridable(inside, f"{where}.{name}", value)


def plain_settings(method: Method | Start) -> dict[str, Any]:
    """Settings as plain data, field by field; a method or start inside as its class name and its own settings.

    Example:
        >>> from ll_lora import LoRA
        >>> plain_settings(LoRA(rank=4))["rank"]
        4
    """
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {
        name: {"class_path": type(value).__name__, "init_args": plain_settings(value)}
        if isinstance(value, Method | Start)
        else value
        for name, value in values.items()
    }


def renamed(settings: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """`settings` under the names of today, where `former` maps older names to them.

    Example:
        >>> renamed({"share": 0.5, "rule": "outer_step"}, {"share": "blend"})
        {'blend': 0.5, 'rule': 'outer_step'}
    """
    return {former.get(name, name): value for name, value in settings.items()}


def check_names(method_class: type[Method | Start], where: str, fields: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for a field that the method does not have, naming `where` it was given."""
    names = [field.name for field in dataclasses.fields(method_class)]
    for name in fields:
        if name not in names:
            raise SettingsError(
                f'{where}: {method_class.__name__} has no "{name}".{did_you_mean(name, names)} '
                f"It takes: {', '.join(names)}."
            )


def check_fields(method: Method | Start) -> None:
    """Raise `SettingsError` for a field whose value is none of its `Literal`'s, or not of its type.

    An int is a whole number, a float a finite one, a bool true or false.

    The command line checks types while parsing; this is for settings built in Python.
    """
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        hint, value = hints[field.name], getattr(method, field.name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if choices and value not in choices:
            listed = ", ".join(f'"{choice}"' for choice in choices)
            raise SettingsError(
                f'{type(method).__name__}.{field.name} is "{value}".{did_you_mean(str(value), choices)} '
                f"It takes: {listed}."
            )
        check(hint is not int or type(value) is int, method, field.name, "it must be a whole number.")
        check(hint is not bool or type(value) is bool, method, field.name, "it must be true or false.")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        check(hint is not float or number, method, field.name, "it must be a finite number.")


# -- field groups: settings that several methods and callbacks take ----------------------------------------------------
#
# A method or callback lists the groups it takes as bases, before `Method` or its callback class. Whoever has a
# `__post_init__` of its own, or more than one group, calls the rules of each.


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankFields:
    """Settings of an update that is a product of two factors."""

    rank: int = 8
    """Inner width r of the update. Memory grows linearly; 4 to 64 covers most published runs."""
    alpha: float = 16.0
    """Numerator of the scaling. Twice the rank is common; it is set once and left when rank changes."""
    dropout: float = 0.0
    """Probability of dropping entries of the update's input while training; 0.05 to 0.1 on small data."""
    init: Start | None = None
    """Where the factors start (`methods` lists starts); null for one at random and the other at zero."""

    def __post_init__(self) -> None:
        check_low_rank(self)

    @property
    def scaling(self) -> float:
        """Factor s on the product B A."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledLowRankFields(LowRankFields):
    """The same, with a choice of how the scaling follows the rank."""

    scaling_rule: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """"alpha/sqrt(r)" (rsLoRA, arXiv:2312.03732) keeps updates of equal size when rank grows; worth it above 32."""

    @property
    def scaling(self) -> float:
        """Factor s on the product B A."""
        return self.alpha / (self.rank if self.scaling_rule == "alpha/r" else math.sqrt(self.rank))


def check_low_rank(method: Any) -> None:
    """`check_fields`, and the rules of `LowRankFields`."""
    check_fields(method)
    check(method.rank >= 1, method, "rank", "it must be at least 1. Inner width of the update; 8 is common.")
    check(method.alpha > 0, method, "alpha", "it must be above 0. Numerator of the scaling; twice the rank is common.")
    check(0 <= method.dropout < 1, method, "dropout", "it must lie in [0, 1). Probability of a drop; 0.1 is common.")
    is_start = method.init is None or (isinstance(method.init, Start) and type(method.init) is not Start)
    check(is_start, method, "init", "it must be a start, such as those that `methods` lists, or null.")


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityFields:
    """Settings of a schedule that removes the entries of least averaged sensitivity."""

    sparsity: float = 0.8
    """Fraction of zeros in each row and column at the end, in [0, 1), so 0.9 keeps 10%. Editing uses 0.95."""
    beta: float = 0.8
    """Memory of the averaged sensitivity; results are not sensitive to it."""
    start: float = 0.1
    """When pruning starts: up to 1 a fraction of the run's optimizer steps, from 2 on a step number (see `clock`)."""
    end: float = 0.8
    """When the final sparsity is reached, in the same unit; the rest of the run trains the survivors."""
    keep_rule: Literal["floor", "ceil", "official"] = "floor"
    """How a density becomes a count: "floor" never exceeds it, "official" is the released RoseLoRA code's ceil + 1."""
    first_score: Literal["zero", "gradient"] = "zero"
    """Start of the average: zero, or the first sensitivity, as in the released code."""
    clamp: float | None = None
    """Largest magnitude of any entry once pruning has begun, null for none; the released editing code uses 0.003."""
    clock: Literal["steps", "passes"] = "steps"
    """What `start` and `end` count: optimizer steps, or passes over the training data (from 1), as the released editing
    code does. In a pass the sparsity stays as it is."""

    def __post_init__(self) -> None:
        check_sparsity(self)


def check_sparsity(owner: Any) -> None:
    """Raise `SettingsError` for a setting outside its rule; `owner` has `SparsityFields`."""
    check_choices(owner, SparsityFields)
    rule = "it must lie in [0, 1). Fraction of entries set to zero, so 0.9 keeps 10%."
    check(0 <= owner.sparsity < 1, owner, "sparsity", rule)
    check(
        0 <= owner.beta < 1, owner, "beta", "it must lie in [0, 1). Memory of the averaged sensitivity; 0.8 is usual."
    )
    check(
        owner.start >= 0, owner, "start", "it must be at least 0. A fraction of the run's steps, or a step from 2 on."
    )
    comparable = (owner.start > 1) == (owner.end > 1)
    check(not comparable or owner.start < owner.end, owner, "end", f"it must come after start, which is {owner.start}.")
    check(owner.clamp is None or owner.clamp > 0, owner, "clamp", "it must be above 0, or null for no clamp.")


def check_choices(owner: Any, group: type[Any]) -> None:
    """Raise `SettingsError` where a field of `group` has a value that its `Literal` does not list."""
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if typing.get_origin(hints[field.name]) is not Literal:
            continue
        choices = typing.get_args(hints[field.name])
        listed = " or ".join(f'"{choice}"' for choice in choices)
        check(getattr(owner, field.name) in choices, owner, field.name, f"it must be {listed}.")


def field_names(group: type[Any]) -> tuple[str, ...]:
    """Names of the settings in a group, in order."""
    return tuple(field.name for field in dataclasses.fields(group))


def values_of(settings: Any, group: type[Any]) -> dict[str, Any]:
    """The settings that belong to `group`, by name, so that a method can hand them to its callback.

    Example:
        >>> from ll_lora import LoRA
        >>> values_of(LoRA(rank=4, bias=True), LowRankFields)
        {'rank': 4, 'alpha': 16.0, 'dropout': 0.0, 'init': None}
    """
    return {name: getattr(settings, name) for name in field_names(group)}
