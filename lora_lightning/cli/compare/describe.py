"""What a command line of `fit` would train, found without weights: sizes, metric, rate, and the rank for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.cli.compare.arms import flags
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Method, WrapperMethod

LARGEST = 4096
"""Rank above which none is looked for."""
OPTIMIZER = "model.optimizer"


@dataclass(frozen=True)
class Described:
    """Facts of one arm."""

    method: str
    metric: str
    higher_is_better: bool
    adapter_numbers: int
    """Trained numbers of adapters."""
    head_numbers: int
    """Trained numbers of the base model: heads, or all of them."""
    total_numbers: int
    size_field: str
    """Dotted setting that is the method's rank; empty where it has none, or nothing is adapted."""
    rate: float
    """The learning rate that the arm has by itself."""
    rate_field: str
    """The dotted setting that is this rate."""
    optimizer_words: tuple[str, ...]
    """Flags that name its optimizers as far as the settings name none."""
    data_seed: bool
    """Whether the data module has a setting `seed`."""
    tunable: bool
    """Whether a part of the training rows can be held out for tuning."""
    data: str
    """The data module's class."""

    @property
    def trained_numbers(self) -> int:
        """All that trains."""
        return self.adapter_numbers + self.head_numbers


def describe(words: Sequence[str]) -> Described:
    """Build what `words` say on a model without values.

    Raises:
        LoraLightningError: as `fit` would.
    """
    from lora_lightning.cli.lightning import build_with_settings

    module, data, _ = build_with_settings(words)
    report = _injected(module, data)
    method = module.method
    rate, field, named = _optimizer(module, _given(words))
    return Described(
        method=type(method).__name__,
        metric=module.task.metric,
        higher_is_better=module.task.higher_is_better,
        adapter_numbers=report.adapter_parameters,
        head_numbers=sum(report.trained.values()),
        total_numbers=report.total_parameters,
        size_field=size_field(method) if report.layers else "",
        rate=rate,
        rate_field=field,
        optimizer_words=named,
        data_seed=hasattr(data, "seed"),
        tunable=hasattr(data, "hold_out") and not getattr(data, "streaming", False),
        data=type(data).__name__,
    )


def _injected(module: Any, data: Any) -> Any:
    """The report of what is injected into a model without values."""
    from lora_lightning.cli.preflight.skeleton import assemble_skeleton
    from lora_lightning.cli.preflight.trace import without_values

    module.quantization = None  # nothing is loaded, so nothing can be quantized
    with without_values() as meter:
        assemble_skeleton(module, data, meter)
    return module.injection


def _given(words: Sequence[str]) -> dict[str, Any]:
    """Settings of a command line by dotted key."""
    from lora_lightning.cli import command_line, former_names
    from lora_lightning.cli.given_settings import given_settings

    return given_settings(command_line.read(words).rest, former_names.load)


def _optimizer(module: Any, given: Mapping[str, Any]) -> tuple[float, str, tuple[str, ...]]:
    """The rate, the setting that it is, and flags for optimizers that no setting names: one around the other."""
    import torch

    from lora_lightning.cli.given_settings import flat
    from lora_lightning.optim.wrapper import OptimizerWrapper, adamw

    make: Callable[[Any], Any] = module.optimizer_factory or module.method.optimizer() or adamw
    optimizer = make([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    named: dict[str, Any] = {}
    for key, value in given.items():
        named |= flat(value, key)
    place, words = OPTIMIZER, list[str]()
    while True:
        if named.get(place) is None:
            words += [f"--{place}", type(optimizer).__name__]
        if not isinstance(optimizer, OptimizerWrapper):
            return float(optimizer.param_groups[0]["lr"]), f"{place}.lr", tuple(words)
        optimizer, place = optimizer.inner, f"{place}.inner"


def size_field(method: Method) -> str:
    """The setting of a method that says how large its adapters are; empty where it has none."""
    prefix = "model.method"
    while isinstance(method, WrapperMethod):
        method, prefix = method.inner, f"{prefix}.inner"
    return next((f"{prefix}.{name}" for name in type(method).ranks if hasattr(method, name)), "")


def solve_rank(words: Sequence[str], start: Described, budget: int) -> tuple[int, int]:
    """The rank whose adapters have as near to `budget` numbers as can be, and how many those are.

    Raises:
        SettingsError: the method has no rank, or its smallest one is far above the budget.
    """
    if not start.size_field:
        raise SettingsError(f"--budget: {start.method} has no rank to solve for; leave --budget out.")

    def count(rank: int) -> int:
        if rank not in found:
            found[rank] = describe([*words, *flags({start.size_field: rank})]).adapter_numbers
        return found[rank]

    found: dict[int, int] = {}
    low, high = 1, 2
    while high < LARGEST and count(high) < budget:
        low, high = high, 2 * high
        if count(high) == count(low):  # ranks above a layer's narrow side change nothing
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < budget else (low, middle)
    best = min((low, high), key=lambda rank: abs(count(rank) - budget))
    if not budget / 2 <= count(best) <= 2 * budget:
        raise SettingsError(
            f"--budget is {budget:,} numbers; {start.method} gets no nearer than {count(best):,}, with "
            f"{start.size_field} {best}. Give another budget, or other targets."
        )
    return best, count(best)


def parse_budget(text: str, total: int, first: int) -> int:
    """Numbers of a budget: "400k", "1.5m", "0.5%" (of `total`), or "same" (as `first`).

    Raises:
        SettingsError: anything else.
    """
    text = text.strip().lower()
    if text == "same":
        return first
    unit = {"k": 1e3, "m": 1e6, "%": total / 100}.get(text[-1:], 1.0)
    try:
        value = float(text.rstrip("km%")) * unit
    except ValueError:
        value = 0.0
    if value < 1:
        raise SettingsError(f'--budget is "{text}"; write numbers such as 400k or 1.5m, a share such as 0.5%, or same.')
    return round(value)
