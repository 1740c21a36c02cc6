"""ExactResume: what a checkpoint needs beyond Lightning's own, so that resuming equals not having stopped."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.callbacks.step_counting import JUDGES, order_callbacks, total_steps
from lora_lightning.distributed import as_shard_of, gather_objects, local
from lora_lightning.errors import ResumeError
from lora_lightning.methods import renamed
from lora_lightning.models.paths import plain
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.optim.wrapper import former_names
from lora_lightning.registry import arguments
from lora_lightning.storage.folded import rewrite_weights

_SECTION = "lora_lightning_resume"
_LENGTH = "optimizer steps"
_PLAIN = (int, float, str, bool, type(None))
"""Types of settings that are compared."""


class ExactResume(Callback):
    """Keeps random-number states of each process, and the partial gradients of an open accumulation window.

    A shuffling loader must draw its order from (seed, epoch) and report its position (`state_dict`), as the loaders of
    `lora_lightning.data` do.

    Another number of processes goes on with the same tensors bit for bit where batches and steps are as many; its
    random numbers are others.

    Raises:
        ResumeError: another number of batches or optimizer steps than the run was started with, other training data or
            settings of them; another number of processes inside an accumulation window.

    A run that has ended goes on with more optimizer steps than it had; its rates are then those of the longer run.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._data: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save after every schedule has acted."""
        order_callbacks(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add this run's section; every process takes part. A step that an error interrupted gets none."""
        if trainer.state.fn != "fit" or trainer.state.status == "interrupted":
            return
        mine = {"rng": _random_states(), "gradients": _open_window(trainer, pl_module)}
        if self._data is None:
            self._data = _data_facts(trainer)
        if trainer.state.finished:
            _mend_last_epoch(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)
        run = _run_facts(trainer, pl_module) | self._data
        checkpoint[_SECTION] = {"ranks": gather_objects(mine), "run": run, "ended": trainer.state.finished}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what adapters had folded into the weights that have just been loaded; keep the section."""
        rewrite_weights(pl_module)
        if trainer.state.fn != "fit":
            return
        section = checkpoint.get(_SECTION)
        if section is None:
            raise ResumeError(
                "the checkpoint was not written while training went on (an interrupted step, or another program); "
                "an exact resume is not possible from it. Resume from last.ckpt."
            )
        before = len(section["ranks"])
        if before != trainer.world_size:
            if any(mine["gradients"] for mine in section["ranks"]):
                raise ResumeError(
                    f"the checkpoint was written by {before} processes inside an accumulation window; this run has "
                    f"{trainer.world_size}. Resume with the same number."
                )
            if trainer.is_global_zero:
                print(
                    f"resume: {trainer.world_size} processes instead of {before}; random numbers are others from here"
                )
        self._pending = section

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the partial gradients of an open window back, and loaders where they were."""
        if self._pending is None:
            return
        _place_loaders(trainer)
        saved = _renamed_facts(self._pending["run"], trainer)
        self._data = _data_facts(trainer)
        for name, value in (_run_facts(trainer, pl_module) | self._data).items():
            before = saved.get(name, value)  # older checkpoints say less
            if name == _LENGTH and _goes_on(self._pending, before, value, trainer):
                if trainer.is_global_zero:
                    print(f"resume: the run had ended and goes on from step {trainer.global_step} to {value}")
            elif value != before:
                was, now = _apart(before, value)
                raise ResumeError(
                    f"the run was started with {name} {was} and would go on with {now}; rates, schedules or "
                    f"batches would jump. Resume with the same settings{self._batch_size(trainer)}; or start a run "
                    "with others from this one's adapter (model.adapter)."
                )
        gradients = self._mine(trainer)["gradients"]
        for name, parameter in pl_module.named_parameters():
            if plain(name) in gradients:
                parameter.grad = as_shard_of(gradients[plain(name)].to(parameter.device, copy=True), parameter)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore random numbers here: building the loader's iterator draws one."""
        if self._pending is not None:
            _restore_random(self._mine(trainer)["rng"])
            self._pending = None

    def _batch_size(self, trainer: Trainer) -> str:
        """What keeps batches as they were on another number of processes."""
        before, now = len((self._pending or {})["ranks"]), trainer.world_size
        if before == now:
            return ""
        return f"; on {now} in place of {before} processes batch_size must be {before / now:g} times what it was"

    def _mine(self, trainer: Trainer) -> dict[str, Any]:
        """This process's part of the section."""
        ranks: list[dict[str, Any]] = (self._pending or {})["ranks"]
        return ranks[trainer.global_rank % len(ranks)]


def _apart(before: Any, now: Any) -> tuple[Any, Any]:
    """Of two groups of settings those that differ; anything else as it is."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return before, now
    keys = [key for key in {**before, **now} if key not in before or key not in now or before[key] != now[key]]
    return {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}


def _place_loaders(trainer: Trainer) -> None:
    """Give loaders their position where Lightning has not.

    It gives one only to loaders that it makes after the checkpoint has been read; `estimated_stepping_batches` in
    `configure_optimizers` makes them before, unless max_epochs is -1.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def _open_window(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    grads = {plain(n): p.grad.detach() for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: local(grad).cpu() for name, grad in grads.items()}


def _run_facts(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What a resumed run must share, as plain data; optimizer settings as given, not as scheduled."""
    schedule = getattr(module, "lr_scheduler", None)
    facts: dict[str, Any] = {
        _LENGTH: total_steps(trainer),
        "batches an epoch": float(trainer.num_training_batches),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "learning-rate schedule": dataclasses.asdict(schedule) if isinstance(schedule, WarmUp) else None,
    }
    for number, optimizer in enumerate(trainer.optimizers):
        # torch adds "differentiable" to any optimizer's defaults while it loads a state
        settings = {"class": type(optimizer).__name__, "differentiable": False, **getattr(optimizer, "defaults", {})}
        facts[f"optimizer {number}"] = {k: v for k, v in settings.items() if isinstance(v, _PLAIN)}
    return facts


def _mend_last_epoch(loop: dict[str, Any], batches: float) -> None:
    """Make the state of an ended loop one that more steps go on from.

    Lightning counts the last epoch as whole wherever the run ends, and then goes on with the next; and a whole one it
    would end a second time.
    """
    done = loop["epoch_loop.batch_progress"]
    if done["current"]["ready"] < batches:
        for counts in (loop["epoch_progress"]["current"], loop["epoch_progress"]["total"]):
            counts["processed"] -= 1
            counts["completed"] -= 1
    else:
        done["current"] = dict.fromkeys(done["current"], 0)
        done["is_last_batch"] = False
        loop["state_dict"].pop("combined_loader", None)


def _data_facts(trainer: Trainer) -> dict[str, Any]:
    """What the data module says of the training data, where it does, and how many examples a batch has in all."""
    data: Any = getattr(trainer, "datamodule", None)
    known = getattr(data, "training_identity", None)
    return {**known(), "examples a batch": data.batch_size * trainer.world_size} if known is not None else {}


def _goes_on(section: Mapping[str, Any], before: int | None, now: int | None, trainer: Trainer) -> bool:
    """Whether a run that has ended, by its length or by a callback, is given more steps."""
    if before is None or now == before:
        return False
    return bool(section.get("ended") or trainer.global_step >= before) and (now is None or now > before)


def _renamed_facts(saved: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint says of its run, with settings under the names of today.

    A setting that an optimizer has got since then has the value that stood for its absence: the default.
    """
    facts = dict(saved)
    schedule = "learning-rate schedule"
    if facts.get(schedule) is not None:
        facts[schedule] = dataclasses.asdict(WarmUp()) | renamed(facts[schedule], WarmUp.former_fields)
    for number, optimizer in enumerate(trainer.optimizers):
        name = f"optimizer {number}"
        facts[name] = renamed(saved[name], former_names(optimizer))
        if facts[name].get("class") == type(optimizer).__name__:
            defaults = {
                key: p.default for key, p in arguments(type(optimizer)).items() if isinstance(p.default, _PLAIN)
            }
            facts[name] = {key: defaults[key] for key in optimizer.defaults if key in defaults} | facts[name]
    return facts


def _random_states() -> dict[str, Any]:
    name, key, *rest = np.random.get_state()  # what data code outside this library draws from
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(key, dtype=np.int64)), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_random(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
