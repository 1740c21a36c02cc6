"""TrainingGuard: stops a run in which something would stay silently untrained, and says at the end what changed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.averages import keep_equal_means
from lora_lightning.callbacks.injected import Injected, check_injected
from lora_lightning.callbacks.step_counting import JUDGES, StepCallback, announce, gradients_finite, inside_window
from lora_lightning.callbacks.unreached import layers_of, leave_out, unreached
from lora_lightning.distributed import gather_nested, local, shard_like, summed
from lora_lightning.errors import TrainingError
from lora_lightning.injection.records import iter_adapters, trainable_adapters
from lora_lightning.methods import renamed
from lora_lightning.models.paths import plain

SLOW = 0.01
"""Fraction of the full rate below which a tensor need not train yet."""
DIVERGED = 10.0
"""How many times its first value a loss is when it is said to diverge."""


_MEND = " Freeze them, exclude their layers, or mend the forward pass."


class TrainingGuard(StepCallback):
    """Judges every trainable tensor over real optimizer steps: those with a rate above zero and finite gradients.

    After `patience_steps` of them a tensor must have had a non-zero gradient and have changed, or the run stops with
    the list. A tensor that its adapter calls idle has more time, and so has one whose rate a schedule is still warming
    up from below a hundredth of the full one: that may be too little to change a number. A loss that is no number stops
    the run at once, unless a gradient scaler is at work, which skips such steps.

    A layer whose adapter has no gradient at the first step, nor has any of that name in another block, has no part in
    the loss. It is named at once, with the `exclude` that leaves it out, as a note or, with `stop_unreached`, as the
    error. Of experts and blocks that other data would reach nothing is said.

    What `inject` let train must lie in an optimizer, and still train before each batch; the weights under adapters
    must stay frozen, and at the end have the values of the start. A callback of the project may have changed any of it.
    Works in any Lightning project.

    Args:
        patience_steps: real steps a tensor has to get a gradient and change.
        stop_unreached: stop before the first step where a layer has no part in its loss. It suits a module whose loss
            is made of the same parts in each batch.

    Raises:
        TrainingError: nothing trains; adapters are merged, frozen since they were injected, or in no optimizer; base
            weights train; tensors that stay untrained; a loss or a parameter that is not finite.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self, patience_steps: int = 3, stop_unreached: bool = False) -> None:
        super().__init__()
        self.patience_steps, self.stop_unreached = patience_steps, stop_unreached
        self._watched: dict[str, nn.Parameter] = {}
        self._adapters: dict[str, Adapter] = {}
        self._start: dict[str, Tensor] = {}
        self._real: dict[str, int] = {}
        self._had_gradient: set[str] = set()
        self._changed: set[str] = set()
        self._slow: set[str] = set()
        self._injected: Injected | None = None
        self._loss: Tensor | None = None
        self._first_loss: Tensor | None = None
        self._rate = 0.0
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the start values of everything that trains."""
        super().on_train_start(trainer, pl_module)
        merged = {path: layer for path, layer in iter_adapters(pl_module) if layer.merged}
        if merged:
            path, layer = next(iter(merged.items()))
            raise TrainingError(f"{len(merged)} layers are merged, {path} first; {layer.merging.way_out}")
        self._watched = {plain(name): p for name, p in pl_module.named_parameters() if p.requires_grad}
        if not self._watched:
            raise TrainingError("nothing trains: every parameter is frozen. Call set_trainable, or inject an adapter.")
        self._adapters = trainable_adapters(pl_module)
        self._injected = check_injected(trainer, pl_module)
        keep_equal_means(trainer.callbacks)  # type: ignore[attr-defined]
        self._start = {name: p.detach().clone() for name, p in self._watched.items()}
        if self._restored is None:
            self._real, self._had_gradient, self._changed = dict.fromkeys(self._watched, 0), set(), set()
        else:
            self._real, self._had_gradient = dict(self._restored["real"]), set(self._restored["had_gradient"])
            self._changed = set(self._restored["changed"])
            for name, value in self._restored["start"].items():
                self._start[name] = shard_like(value, self._watched[name])
            self._restored = None
        announce(trainer, self, "watches", "trainable tensor", list(self._watched))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look whether what was injected still trains, and nothing of the base does."""
        if self._injected is not None:
            self._injected.check(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note which tensors have a gradient."""
        if inside_window(trainer):
            return
        if not gradients_finite(trainer, pl_module):
            if getattr(trainer.precision_plugin, "scaler", None) is None:
                raise TrainingError(self._not_finite(trainer.global_step + 1))
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self._rate = max(rates.values(), default=0.0)
        elsewhere = {id(p) for other in trainer.optimizers for group in other.param_groups for p in group["params"]}
        warming = [group for group in optimizer.param_groups if group["lr"] < SLOW * group.get("initial_lr", 0.0)]
        slow = {id(p) for group in warming for p in group["params"]}
        # those of other optimizers are as they were when these stepped
        self._slow = {n for n, p in self._watched.items() if (id(p) in slow if id(p) in rates else n in self._slow)}
        real: list[str] = []
        resting = self._resting()
        for name, parameter in self._watched.items():
            if name in resting:
                continue
            # a tensor that no optimizer holds is judged as well: it will not change
            if rates.get(id(parameter), float(id(parameter) not in elsewhere)) != 0.0:
                real.append(name)
                self._real[name] += 1
        if getattr(trainer.strategy, "hides_gradients", False):
            self._had_gradient |= set(real)  # that they change says it
        else:
            self._name_unreached(trainer, pl_module, [name for name in real if self._real[name] == 1])
            self._note_gradients(real)
        self._note_changes(real)  # before the step as well: a new stage may put a factor back to where it started

    def _name_unreached(self, trainer: Trainer, module: LightningModule, names: list[str]) -> None:
        """Say which layers have no part in the loss of the first step of these tensors."""
        layers = layers_of(module, set(names) - self._idle())
        flags = [float(any(self._watched[name].grad is not None for name in own)) for own in layers.values()]
        if not flags:
            return
        device = trainer.strategy.root_device
        flags = trainer.strategy.reduce(torch.tensor(flags, device=device), reduce_op="sum").tolist()
        reached = {path: flag > 0 for path, flag in zip(layers, flags, strict=True)}
        lost = unreached(reached)
        if not lost:
            return
        said = (
            f"{len(lost)} of {len(reached)} adapted layers have no part in the loss of the first step: "
            f"{', '.join(lost[:8])}{', ...' if len(lost) > 8 else ''}.{leave_out(lost, reached.keys() - set(lost))}"
        )
        if self.stop_unreached:
            raise TrainingError(said)
        if trainer.is_global_zero:
            print(f"note: {said}")

    def _note_gradients(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._had_gradient]
        grads = [self._watched[name].grad for name in unknown]
        self._had_gradient |= self._holding(unknown, [grad is not None and local(grad).any() for grad in grads])

    def _note_changes(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._changed]
        shards = [(local(self._watched[name].detach()), local(self._start[name])) for name in unknown]
        self._changed |= self._holding(unknown, [not torch.equal(now, start) for now, start in shards])

    def _holding(self, names: list[str], flags: list[Any]) -> set[str]:
        """Those of `names` whose flag is set on any process that holds a shard."""
        if not names:
            return set()
        counts = summed(torch.tensor([float(flag) for flag in flags]), [self._watched[name] for name in names])
        return {name for name, count in zip(names, counts.tolist(), strict=True) if count > 0}

    def _not_finite(self, step: int) -> str:
        bad = [n for n, p in self._watched.items() if p.grad is not None and not torch.isfinite(local(p.grad)).all()]
        loss = "" if self._loss is None else f" Last loss: {float(self._loss):g}."
        where = f"{len(bad)} tensors, {bad[0]} first" if bad else "the gradient norm overflows"
        return (
            f"the loss or its gradient is not a number at optimizer step {step}: {where}."
            f"{loss}{self._diverged()} Lower the learning rate, clip gradients, or look at the data of this step."
        )

    def _diverged(self) -> str:
        """What to say of a loss that has grown many times over, with the rate; empty where it has not."""
        first, last = (None if loss is None else float(loss) for loss in (self._first_loss, self._loss))
        if first is None or last is None or last <= DIVERGED * abs(first):
            return ""
        return f" The loss has gone from {first:g} to {last:g} at a learning rate of {self._rate:g}: it diverges."

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss of the batch, for the message should the next one be no number."""
        self._loss = outputs["loss"].detach() if isinstance(outputs, dict) and "loss" in outputs else None
        if self._first_loss is None:
            self._first_loss = self._loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Judge the tensors that have had enough real steps."""
        due = [name for name, steps in self._real.items() if steps == self.patience_steps]
        if due:
            for name in self._slow.intersection(due):
                self._real[name] = 1  # the last slow step may be the first of those that count
            self._judge([name for name in due if name not in self._slow], pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge what a short run left unjudged, before anything is written."""
        if not any(self._real.values()):
            raise TrainingError("nothing was trained: no optimizer step with a rate above zero and finite gradients.")
        if self._injected is not None:
            self._injected.check_end(pl_module)
        # one step cannot give a gradient to the partner of a factor that starts at zero
        slow = self._slow if trainer.global_step > 1 else set()
        short = [name for name, steps in self._real.items() if 2 <= steps < self.patience_steps or name in slow]
        never = [name for name, steps in self._real.items() if steps == 0]
        self._note_changes(never)
        broken = [name for name, p in self._watched.items() if not torch.isfinite(local(p.detach())).all()]
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            raise TrainingError(
                f"{(broken or ['a tensor of another process'])[0]} has been trained to values that are not finite, "
                f"{len(broken)} tensors in all.{self._diverged()} Lower the learning rate, or go on from an earlier "
                "checkpoint."
            )
        still = [name for name in never if name not in self._changed and name not in slow]
        self._judge(short + still, pl_module)

    def _judge(self, names: list[str], module: nn.Module) -> None:
        idle = self._idle()
        untrained: list[str] = []
        self._note_changes(names)
        for name in names:
            if name in idle:
                self._real[name] -= 1
            elif name not in self._had_gradient:
                untrained.append(f"{name} (no gradient)")
            elif name not in self._changed:
                untrained.append(f"{name} (did not change)")
        if untrained:
            steps = f"after {max(self._real.values())} optimizer steps with a rate above zero"
            if any(name in self._slow for name in names):
                steps = "at the end of a run whose rate has not come to a hundredth of the full one"
            raise TrainingError(
                f"{len(untrained)} of {len(self._watched)} trainable tensors are not training {steps}: "
                f"{', '.join(untrained[:8])}"
                f"{', ...' if len(untrained) > 8 else ''}.{self._diverged() or _MEND}{self._leave_out(module)}"
            )

    def _leave_out(self, module: nn.Module) -> str:
        """How to leave out the layers that never had a gradient."""
        layers = layers_of(module, self._watched)
        lost = [path for path, own in layers.items() if not self._had_gradient.intersection(own)]
        return leave_out(lost, layers.keys() - set(lost))

    def _idle(self) -> set[str]:
        idle = {plain(f"{path}.{name}") for path, adapter in self._adapters.items() for name in adapter.idle()}
        return idle | self._resting()

    def _resting(self) -> set[str]:
        resting = {path: adapter for path, adapter in self._adapters.items() if adapter.resting}
        return {plain(f"{path}.{name}") for path, adapter in resting.items() for name, _ in adapter.named_parameters()}

    def changed(self) -> dict[str, float]:
        """Relative distance |p - start| / |start| (|p| where the start is zero) of every trained tensor so far."""
        names, watched = list(self._watched), list(self._watched.values())
        pairs = [(local(p.detach()), local(self._start[name])) for name, p in self._watched.items()]
        squares = [torch.stack([(now - start).square().sum(), start.square().sum()]) for now, start in pairs]
        sizes = summed(torch.stack(squares).double(), watched).sqrt().tolist()
        return {name: change / (size if size > 0 else 1.0) for name, (change, size) in zip(names, sizes, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What has been judged, and start values: a resumed run goes on judging and measures from its first start."""
        return {
            "real": self._real,
            "had_gradient": sorted(self._had_gradient),
            "changed": sorted(self._changed),
            "start": gather_nested(self._start),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run stopped."""
        self._restored = renamed(state_dict, {"moved": "changed"})
