"""Say what each GPU would hold and send in training, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.cli.console import print_table
from lora_lightning.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from lora_lightning.cli.preflight.memory import Estimate, Parts
    from lora_lightning.training.module import AdapterModule

COLUMNS = (
    "Strategy",
    "GPUs",
    "Frozen",
    "Trained",
    "Gradients",
    "Optimizer",
    "Kept",
    "Activations",
    "Gathered",
    "Total",
)
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A config, what to lay out and where, and any flags of `fit`."""
    parser.usage = "%(prog)s CONFIG [--strategy NAME ...] [--gpus N ...] [--memory GIB] [flags of fit ...]"
    parser.add_argument("--strategy", nargs="+", metavar="NAME", help="ddp, fsdp2, fsdp, deepspeed")
    parser.add_argument("--gpus", nargs="+", type=int, metavar="N", help="numbers of GPUs; one row each")
    parser.add_argument("--batch-size", type=int, metavar="N", help="examples of a batch on each GPU; the data's")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each example; the data's max_length")
    parser.add_argument("--precision", metavar="NAME", help="32-true, bf16-true, bf16-mixed, 16-mixed; the trainer's")
    parser.add_argument("--quantized", metavar="FORMAT", help="frozen linear quantized weights: nf4, int8, ...")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one GPU; adds what fits")
    parser.add_argument("--markdown", action="store_true", help="the table as the documentation has it")
    parser.set_defaults(flags=[])


@dataclass(frozen=True)
class Request:
    """What is laid out, and where: a verb's own flags, else what the config says."""

    strategies: Sequence[str]
    gpus: Sequence[int]
    batch_size: int
    """Examples of a batch on each GPU."""
    length: int
    """Tokens of each example; 1 where examples are no texts."""
    batches: int
    """Batches of an optimizer step."""
    precision: str
    quantized: str | None
    """Format of the frozen linear weights."""


def run(args: argparse.Namespace) -> int:
    """Count a training step without values, lay it out, print."""
    from lora_lightning.cli.lightning import build_with_settings
    from lora_lightning.cli.preflight.memory import estimate, verdict

    module, datamodule, trainer = build_with_settings(args.flags)
    asked = requested(args, module, datamodule, trainer)
    module.quantization = None  # nothing is loaded, so nothing can be quantized; sizes are counted
    parts = count(module, datamodule, asked.batch_size, asked.length, asked.precision, asked.quantized)
    found: list[Estimate] = []
    for gpus in asked.gpus:
        names = asked.strategies if gpus > 1 else asked.strategies[:1]  # on one GPU they are all the same
        found += [estimate(parts, name, gpus, asked.batches) for name in names]
    rows = [_row(each) for each in found]
    if args.markdown:
        for row in [_columns(), ["---"] * len(_columns()), *rows]:
            print(f"| {' | '.join(row)} |")
        print()
    else:
        print_table(_columns(), rows)
    print(_assumptions(module, asked))
    if args.memory:
        print(verdict(found, parts, args.memory * GIB, asked.batches))
    return 0


def requested(args: argparse.Namespace, module: AdapterModule, datamodule: Any, trainer: Mapping[str, Any]) -> Request:
    """What a command line asks for.

    Raises:
        SettingsError: an unknown strategy or format, a number below 1, or no size of a batch.
    """
    from lora_lightning.cli.preflight.memory import check_positive, find_strategy, quantized_size
    from lora_lightning.models.loading import checkpoint_format

    batch_size = getattr(datamodule, "batch_size", None) if args.batch_size is None else args.batch_size
    if batch_size is None:
        raise SettingsError("the data module does not state its batch_size; give --batch-size N.")
    asked = Request(
        strategies=args.strategy or [strategy_of(trainer)],
        gpus=args.gpus or [devices_of(trainer)],
        batch_size=batch_size,
        length=(getattr(datamodule, "max_length", None) or 1) if args.length is None else args.length,
        batches=trainer.get("accumulate_grad_batches", 1),
        precision=args.precision or str(trainer.get("precision") or "32-true"),
        quantized=args.quantized or module.quantization or checkpoint_format(module.pretrained),
    )
    for name in asked.strategies:
        find_strategy(name)
    if args.quantized:
        quantized_size((1, 1), args.quantized)
    for n in asked.gpus:
        check_positive(gpus=n, batch_size=batch_size, length=asked.length, accumulate_grad_batches=asked.batches)
    if args.memory is not None and not args.memory > 0:
        raise SettingsError(f"memory is {args.memory:g}; it must be more than 0.")
    return asked


def count(
    module: AdapterModule, datamodule: Any, batch_size: int, length: int, precision: str, quantized: str | None = None
) -> Parts:
    """Build the module's model without values and count one step of it.

    Raises:
        SettingsError: a precision that training refuses.
    """
    import torch

    from lora_lightning.cli.preflight.memory import Parts
    from lora_lightning.cli.preflight.skeleton import assemble_skeleton
    from lora_lightning.cli.preflight.trace import largest_linear, trace_step, units, without_values
    from lora_lightning.models.loss_head import choose_without_values, set_loss_head
    from lora_lightning.optim.groups import build_optimizer

    autocast = _autocast(precision)

    with without_values() as meter:
        assemble_skeleton(module, datamodule, meter, torch.bfloat16 if precision == "bf16-true" else None)
        module.train()
        if module.task.by_loss_head and module.loss_head == "auto":
            set_loss_head(module.model, choose_without_values(module.model))
        batch = module.task.example(module.model.config, batch_size, length)

        def loss() -> torch.Tensor:
            made = module.task.loss_of(module.model, batch)
            penalty = module.method.penalty(module.adapters())
            mean = made.total / made.count.clamp_min(1)
            return mean if penalty is None else mean + penalty

        def optimizer() -> Optimizer:
            return build_optimizer(module.model, module.optimizer_factory, module.head_ratio, "model.optimizer")

        inside, rest = units(module.model, quantized)
        unpacked = largest_linear(module.model) if quantized else 0
        step = trace_step(meter, module.model, loss, optimizer, autocast)
    return Parts(inside, rest, step.optimizer, step.kept, step.activations, unpacked)


def _autocast(precision: str) -> torch.dtype | None:
    import torch

    known = {"32-true": None, "32": None, "bf16-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in known:
        raise SettingsError(
            f'precision is "{precision}".{did_you_mean(precision, known)} Estimates know: {", ".join(known)}.'
        )
    return known[precision]


def devices_of(trainer: Mapping[str, Any]) -> int:
    """Processes of the trainer: devices of a node, where their number is said, times nodes."""
    devices = trainer.get("devices")
    listed = str(len(devices) if isinstance(devices, list) else devices)
    one = max(int(listed), 1) if listed.isdigit() else 1
    return one * int(trainer.get("num_nodes") or 1)


def strategy_of(trainer: Mapping[str, Any]) -> str:
    """The strategy that the trainer names."""
    given = trainer.get("strategy") or "auto"
    return str(given["class_path"] if isinstance(given, dict) else given)


def _columns() -> Sequence[str]:
    return (*COLUMNS, "Sent a step")


def _row(each: Estimate) -> tuple[str, ...]:
    sizes = (each.frozen, each.trained, each.gradients, each.optimizer, each.kept, each.activations, each.gathered)
    return (each.strategy, str(each.gpus), *(_size(value) for value in (*sizes, each.total, each.sent)))


def _size(value: float) -> str:
    """Bytes as GiB with three digits; small ones as MiB."""
    unit, name = (GIB, "GiB") if value >= GIB else (2**20, "MiB")
    return f"{value / unit:.3g} {name}" if value < 1000 * unit else f"{value / unit:.0f} {name}"


def _assumptions(module: AdapterModule, asked: Request) -> str:
    model = type(module.model).__name__
    dtype = next(p.dtype for p in module.model.parameters() if not p.requires_grad)
    frozen = asked.quantized or str(dtype).removeprefix("torch.")
    again = "recomputed in backward" if module.gradient_checkpointing else "kept for backward"
    steps = f"{asked.batches} batch{'es' * (asked.batches > 1)} a step"
    examples = f"{asked.batch_size} x {asked.length} tokens" if asked.length > 1 else f"{asked.batch_size} examples"
    started = module.start.lines if module.start is not None else []
    return (
        f"{model} with {type(module.method).__name__}: batches of {examples}, {steps}, "
        f"{asked.precision}, frozen weights in {frozen}, activations {again}. "
        f"{''.join(f'It {line}. ' for line in started)}"
        "The CUDA context and the allocator's gaps come on top."
    )
