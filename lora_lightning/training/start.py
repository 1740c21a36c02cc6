"""What `model.adapter` names: the trained adapter that a run goes on from, or those below a new one.

    model.adapter: A                 A trains on; method, layers, heads and new tokens come from its folder
    model.adapter: [A, B]            A and B stay as they are, in this order, and a new adapter trains on top of them

What the settings say beside it must agree, but for what holds for a whole run: a schedule may be another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import write_values
from lora_lightning.errors import LoraLightningError, SettingsError
from lora_lightning.exporters.trained_adapter import TrainedAdapter, find_adapter
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.injection.inject import settings_by_layer
from lora_lightning.injection.records import (
    Below,
    adapters_named,
    add_record,
    iter_adapters,
    records,
    stack_of,
    stand_on,
)
from lora_lightning.injection.report import InjectionReport, report_on
from lora_lightning.injection.switches import set_active, set_trainable
from lora_lightning.injection.targets import Selection, select
from lora_lightning.methods import Method, replace
from lora_lightning.models.anatomy import survey
from lora_lightning.models.paths import plain
from lora_lightning.storage.below import SHOWN

SETTING = "model.adapter"
_LEAVE = "Leave it null, and it is taken from there"


@dataclass(frozen=True)
class Start:
    """Trained adapters that a run begins with."""

    adapters: tuple[TrainedAdapter, ...]
    """One to train on, or those below a new one."""
    stacked: bool
    """Whether a new adapter trains on top."""

    @property
    def lines(self) -> list[str]:
        """What the run's header and `doctor` say."""
        if not self.stacked:
            one = self.adapters[0]
            return [f"trains on from {one}; the optimizer, the rate and the method's schedule begin anew"]
        return [f"trains on top of {one}, which stays as it is" for one in self.adapters]

    @property
    def facts(self) -> list[dict[str, str]]:
        """The same for summary.json."""
        role = "below" if self.stacked else "trained on"
        return [
            {"adapter": one.given, "format": one.format, "sha256": one.digest, "role": role} for one in self.adapters
        ]

    @property
    def labels(self) -> list[str]:
        """Class names of the head that is in the model with them: that of the last one that states any."""
        return next((one.labels for one in reversed(self.adapters) if one.labels), [])

    # -- what is refused before anything is loaded ---------------------------------------------------------------------

    def refusals(self, names: Sequence[str], tokens: Sequence[str], tokenizer: Any) -> list[LoraLightningError]:
        """What of the data does not fit the adapters.

        Args:
            names: class names of the data, where the task has a head.
            tokens: new tokens that the data name.
            tokenizer: the data's; None where it is not known.
        """
        found: list[LoraLightningError] = []
        for one in self.adapters:
            for check_one in (partial(_check_labels, one, names), partial(_check_tokens, one, tokens, tokenizer)):
                try:
                    check_one()
                except LoraLightningError as error:
                    found.append(error)
        return found

    # -- on the model --------------------------------------------------------------------------------------------------

    def trained(self) -> tuple[str, ...]:
        """Parameters that the adapters bring values for, as far as they state them."""
        return tuple(dict.fromkeys(name for one in self.adapters for name in one.trained))

    def train_on(self, net: nn.Module, name: str, method: Method, said: Mapping[str, Any]) -> InjectionReport:
        """Load the one adapter and let it train.

        Args:
            net: the base model.
            name: name of the adapter.
            method: its method, with the schedule of this run.
            said: settings of the module that were given, by name: targets, exclude, overrides, also_train.

        Raises:
            SettingsError: one of them says something else than the folder.
            AdapterFileError: the folder does not fit the model.
        """
        (one,) = self.adapters
        before = survey(net)
        wanted = _wanted(net, one, said)
        one.load(net, name)
        record = records(net)[name]
        _compare(one, wanted, {plain(path) for path in record.layers}, record.trained)
        layers = {path: with_run_wide(own, method) for path, own in record.layers.items()}
        _check_overrides(one, layers, said.get("overrides") or {})
        add_record(net, name, dataclasses.replace(record, method=with_run_wide(record.method, method), layers=layers))
        set_trainable(net, name)
        bases = {path: layer.base_layer for path, layer in iter_adapters(net) if name in layer.adapters}
        tied = {path: layer.tied_to for path, layer in iter_adapters(net) if name in layer.adapters and layer.tied_to}
        under = [f'on top of "{b.source}" (sha256 {b.digest[:SHOWN]}), as it was trained' for b in record.below]
        notes = [*self.lines, *under]
        return report_on(
            before, name, records(net)[name], adapters_named(net, name), Selection(bases, tied=tied), notes
        )

    def load_below(self, net: nn.Module) -> None:
        """Load the adapters that stay as they are; together they are active."""
        names = self._names()
        for one, name in zip(self.adapters, names, strict=True):
            one.load(net, name)
        set_active(net, list(dict.fromkeys(other for name in names for other in stack_of(net, name))))

    def kept_heads(self, net: nn.Module) -> dict[str, Tensor]:
        """Values of the heads that are in the model, by name; of a model without values none."""
        own = {name for record in records(net).values() for name in record.trained}
        state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        owners = {name.rpartition(".")[0] for name in own}
        wanted = {name for name in state if name in own or name.rpartition(".")[0] in owners}
        return {name: state[name].detach().clone() for name in wanted if not state[name].is_meta}

    def put_on_top(self, net: nn.Module, name: str, heads: Mapping[str, Tensor]) -> None:
        """Let a new adapter stand on the others, its head beginning with the values that they gave it.

        Raises:
            AdapterStateError: adapters that cannot be active together.
        """
        own = set(records(net)[name].trained)
        owners = {parameter.rpartition(".")[0] for parameter in own}
        state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        with torch.no_grad():
            for key, value in heads.items():
                if key in own or (key.rpartition(".")[0] in owners and not isinstance(state[key], nn.Parameter)):
                    write_values(state[key], value)
        names = dict.fromkeys(other for below in self._names() for other in stack_of(net, below))
        found = {one.digest: one.source for one in self.adapters}
        below = []
        for other in names:
            digest = records(net)[other].digest or ""
            below.append(Below(other, digest, found.get(digest) or _source(net, digest)))
        stand_on(net, name, below)
        set_active(net, [*names, name])

    def _names(self) -> list[str]:
        return [f"below_{number}" for number, _ in enumerate(self.adapters, 1)]


def find_start(adapter: str | list[str] | None, method: Method | None) -> tuple[Start | None, Method]:
    """What `model.adapter` names, and the method of the run.

    Args:
        adapter: one name, to train on; a list of them, for those below a new one; or None.
        method: the method that the settings name, or None.

    Raises:
        SettingsError: no method, or another one than the adapter's.
        AdapterFileError: no adapter there, or a damaged one.
    """
    if adapter is None:
        if method is None:
            raise SettingsError(
                "model.method is null; name a method, such as LoRA (all: python -m lora_lightning methods), or a "
                f"trained adapter to go on from: {SETTING}."
            )
        return None, method
    names = [adapter] if isinstance(adapter, str) else adapter
    if not names:
        raise SettingsError(f"{SETTING} is []; it must name an adapter, or several below a new one, or be null.")
    start = Start(tuple(find_adapter(name, SETTING) for name in names), stacked=not isinstance(adapter, str))
    if start.stacked:
        twice = [one.given for n, one in enumerate(start.adapters) if one.digest in _digests(start.adapters[:n])]
        if twice:
            raise SettingsError(f'{SETTING} names "{twice[0]}" twice; its update would be applied twice.')
        if method is None:
            raise SettingsError(
                f"{SETTING} is a list, so a new adapter trains on top, but model.method is null; name its method, or "
                f"give one adapter that is to train on: {SETTING}: {names[0]}."
            )
        return start, method
    one = start.adapters[0]
    if method is None:
        return start, one.method
    _check_method(one, one.method, method, "model.method")
    return start, with_run_wide(one.method, method)


def tokenizer_of(adapter: str | list[str] | None) -> str | None:
    """The tokenizer that came with the adapters which `model.adapter` names: that of the last one that has any."""
    names = [adapter] if isinstance(adapter, str) else adapter or []
    found = [one.tokenizer for one in (find_adapter(name, SETTING) for name in names) if one.tokenizer is not None]
    return str(found[-1]) if found else None


def with_run_wide(own: Method, given: Method) -> Method:
    """`own` with those fields of `given` that hold for a whole run, inside a wrapped method too."""
    fields: dict[str, Any] = {name: getattr(given, name) for name in type(own).run_wide}
    for field in dataclasses.fields(own):
        inner = getattr(own, field.name)
        if isinstance(inner, Method):
            fields[field.name] = with_run_wide(inner, getattr(given, field.name))
    return replace(own, SETTING, fields)


def _check_method(one: TrainedAdapter, own: Method, given: Method, where: str) -> None:
    """Raise `SettingsError` where two methods differ in more than what holds for a whole run."""
    if type(own) is not type(given):
        raise SettingsError(
            f"{where} is {type(given).__name__}, but {SETTING} names {one}, which is {type(own).__name__}. {_LEAVE}; "
            f'for a new {type(given).__name__} on top of it give a list: {SETTING}: ["{one.given}"].'
        )
    for field in dataclasses.fields(own):
        theirs, ours = getattr(own, field.name), getattr(given, field.name)
        if isinstance(theirs, Method):
            _check_method(one, theirs, ours, f"{where}.{field.name}")
        elif theirs != ours and field.name not in type(own).run_wide:
            raise SettingsError(
                f"{where}.{field.name} is {ours!r}, but {SETTING} names {one}, which has {theirs!r}. Give the same "
                "value, or leave model.method null, and all of it is taken from there."
            )


def _check_labels(one: TrainedAdapter, names: Sequence[str]) -> None:
    """Raise `SettingsError` where the data have other classes than the head of an adapter."""
    theirs = one.labels
    if not names or not theirs or list(names) == theirs:
        return
    listed = ", ".join(theirs[:6]) + (", ..." if len(theirs) > 6 else "")
    message = f"the data have the classes {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}, but the head of "
    message += f"{one} has {listed}. "
    if set(names) <= set(theirs):
        raise SettingsError(f"{message}Give the data its classes in its order: data.labels: {theirs!r}.")
    raise SettingsError(
        f"{message}A head of other classes starts anew: export it merged (export {one.given} --format merged --output "
        "DIR), and train on that: model.pretrained: DIR, without model.adapter."
    )


def _check_tokens(one: TrainedAdapter, tokens: Sequence[str], tokenizer: Any) -> None:
    """Raise `SettingsError` where the data do not know the new tokens of an adapter, or name others."""
    theirs = one.new_tokens
    if tokens and tuple(tokens) != theirs:
        raise SettingsError(
            f"data.new_tokens is {list(tokens)!r}, but {one} was trained with {list(theirs)!r}. Rows cannot be added "
            "to those of a trained adapter: name the same, or export it merged and train on that."
        )
    if not theirs or tokenizer is None:
        return
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in theirs if token not in vocabulary]
    if unknown:
        raise SettingsError(
            f"{one} was trained with the token {unknown[0]}, which data.tokenizer does not know, so that it would be "
            f"letters to the model. Set data.tokenizer: {one.tokenizer}"
        )


def _wanted(net: nn.Module, one: TrainedAdapter, said: Mapping[str, Any]) -> dict[str, set[str]]:
    """Layers and fully trained parameters that the settings name, where they name any; the model is still plain."""
    anatomy = survey(net)
    found: dict[str, set[str]] = {}
    if said.get("targets") is not None or said.get("exclude") is not None:
        if said.get("targets") is None:
            raise SettingsError(
                f"model.exclude is {said['exclude']!r}, but {SETTING} names {one}, whose layers are taken from there. "
                "Leave it null."
            )
        selected = select(anatomy, said["targets"], said.get("exclude") or ())
        found["targets"] = {plain(path) for path in selected.layers}
    if said.get("also_train") is not None:
        found["also_train"] = {plain(name) for name in trained_parameters(anatomy, said["also_train"])}
    return found


def _compare(one: TrainedAdapter, wanted: Mapping[str, set[str]], layers: set[str], trained: Iterable[str]) -> None:
    own = {"targets": layers, "also_train": {plain(name) for name in trained}}
    for name, named in wanted.items():
        rows = {key for key in own[name] if key.endswith(".new_rows")}  # they always train
        differing = sorted(named ^ (own[name] - rows))
        if differing:
            only = "the setting" if differing[0] in named else "the adapter"
            raise SettingsError(
                f"model.{name} means {len(named)} {'layers' if name == 'targets' else 'parameters'}, but {SETTING} "
                f"names {one}, which has {len(own[name] - rows)}: {differing[0]} is only in those of {only}. {_LEAVE}."
            )


def _check_overrides(one: TrainedAdapter, layers: Mapping[str, Method], overrides: Mapping[str, Any]) -> None:
    if not overrides:
        return
    bases: Any = layers
    for pattern, fields in overrides.items():
        for path, method in layers.items():
            try:
                other = settings_by_layer(method, {path: bases[path]}, {pattern: fields})[path]
            except LoraLightningError:
                continue  # the pattern is one of other layers
            if other != method:
                raise SettingsError(
                    f'model.overrides["{pattern}"] is {fields!r}, but {SETTING} names {one}, which has {method!r} on '
                    f"{path}. {_LEAVE}."
                )


def _digests(adapters: Iterable[TrainedAdapter]) -> set[str]:
    return {one.digest for one in adapters}


def _source(net: nn.Module, digest: str) -> str:
    """Where an adapter below another one lay, as that one states it."""
    stated = [one for record in records(net).values() for one in record.below]
    return next((one.source for one in stated if one.digest == digest), "")
