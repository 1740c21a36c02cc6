"""PrivateGradients: each example's gradient is clipped and noise is added to their sum (DP-SGD), with an account.

Abadi et al., 2016, arXiv:1607.00133.

    g = (sum_i min(1, C / |g_i|) g_i + sigma C z) / L,   z ~ N(0, I)

    C       clip                 largest norm of an example's gradient, over everything that trains
    sigma   noise_multiplier     of the noise, relative to C
    L       accumulate_grad_batches     examples of an optimizer step; a batch holds one, so that its gradient is g_i

Opacus keeps the account: what (epsilon, delta) the steps so far amount to, for the client with the largest epsilon.
It takes each step's examples for a random sample of the client's rows, each with the same chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.federated import FederatedRounds
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, logs_at
from lora_lightning.errors import SettingsError, check
from lora_lightning.models.paths import plain
from lora_lightning.seeds import generator


class PrivateGradients(ScheduleCallback):
    """Clips the gradient of every example, adds noise, and counts the privacy that is spent.

    A batch holds one example, and `accumulate_grad_batches` the examples of a step. One process, float32 or bfloat16.

    Args:
        clip: largest norm C of an example's gradient.
        noise_multiplier: sigma, noise over C; null finds it for `epsilon` over the whole run.
        epsilon: privacy of the whole run, where sigma is to be found.
        delta: chance that epsilon does not hold; below one over the number of rows.
        accountant: "rdp" (Renyi), or "prv" (tighter, takes longer), of Opacus.
        seed: of the noise. Whoever knows it can take the noise off: keep it to yourself.

    Raises:
        SettingsError: a value outside its rule, another kind of run, or Opacus is missing.
    """

    phase: ClassVar[int] = MASKS
    writes_values: ClassVar[bool] = False
    requires: ClassVar[str] = "parameters that train"

    def __init__(
        self,
        clip: float,
        noise_multiplier: float | None = None,
        epsilon: float | None = None,
        delta: float = 1e-5,
        accountant: Literal["rdp", "prv"] = "rdp",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clip, self.noise_multiplier, self.epsilon, self.delta = clip, noise_multiplier, epsilon, delta
        self.accountant, self.seed = accountant, seed
        check(clip > 0, self, "clip", "it must be above 0. Norm of an example's gradient; 0.1 to 10 are common.")
        check(noise_multiplier is None or noise_multiplier >= 0, self, "noise_multiplier", "it must be at least 0.")
        given = sum(value is not None for value in (noise_multiplier, epsilon))
        check(given == 1, self, "epsilon", f"noise_multiplier is {noise_multiplier}; give one of the two.")
        check(epsilon is None or epsilon > 0, self, "epsilon", "it must be above 0; 1 to 8 are common.")
        check(0 < delta < 1, self, "delta", "it must lie in (0, 1); 1e-5 is common.")
        self.sigma = 0.0
        """Noise over C, once training has begun."""
        self.spent = 0.0
        """Largest epsilon of a client, as it was last worked out."""
        self._sum: dict[str, Tensor] = {}
        self._accounts: list[Any] = []
        self._saved: dict[str, Any] | None = None

    def accepts(self, adapter: Adapter) -> bool:
        """Every adapter that trains."""
        return True

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Find the noise, and open an account for each client.

        Raises:
            SettingsError: several processes, a gradient scaler, or an unbounded run whose noise is to be found.
        """
        name, accountants = type(self).__name__, _accountants()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        check(self.trainer.world_size == 1, self, "clip", "gradients of several processes are summed; use one.")
        check(scaler is None, self, "clip", 'gradients are scaled under 16-mixed; take "bf16-mixed" or "32-true".')
        self._federated = next(
            (c for c in self.trainer.callbacks if isinstance(c, FederatedRounds)),  # type: ignore[attr-defined]
            None,
        )
        data: Any = getattr(self.trainer, "datamodule", None)
        rows = self._federated.rows if self._federated else [len(data.examples("train"))]
        self._rates = [min(1.0, self.trainer.accumulate_grad_batches / count) for count in rows]
        self.sigma = self.noise_multiplier or 0.0
        if self.epsilon is not None:
            if total is None:
                raise SettingsError(f"{name}.epsilon is {self.epsilon}, but nothing bounds the run; set max_steps.")
            self.sigma = accountants.utils.get_noise_multiplier(
                target_epsilon=self.epsilon,
                target_delta=self.delta,
                sample_rate=max(self._rates),
                steps=-(-total // len(rows)),
                accountant=self.accountant,
            )
        self._accounts = [accountants.create_accountant(self.accountant) for _ in rows]
        self._sum = {}
        if self._saved is not None:
            for account, history in zip(self._accounts, self._saved["accounts"], strict=True):
                account.history = [tuple(entry) for entry in history]
            trained = self._trained()
            self._sum = {key: value.to(trained[key].device) for key, value in self._saved["sum"].items()}
            self._saved = None
        self.spent = self._epsilon()

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {plain(name): p for name, p in self.module.named_parameters() if p.requires_grad}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a batch of several examples, whose gradients cannot be told apart.

        Raises:
            SettingsError: it holds more than one.
        """
        rows = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else _first(batch)
        if len(rows) != 1:
            raise SettingsError(
                f"{type(self).__name__} clips the gradient of each example, and a batch holds {len(rows)}; set "
                "data.batch_size to 1 and trainer.accumulate_grad_batches to the examples of a step."
            )

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the example's gradient, clipped; with the last one of the step put the noisy mean in its place."""
        trained, of_step = self._trained(), trainer.accumulate_grad_batches
        grads = {name: p.grad * of_step for name, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        factor = torch.clamp(self.clip / (norm + 1e-12), max=1.0)
        for name, grad in grads.items():
            self._sum[name] = self._sum[name] + factor * grad if name in self._sum else factor * grad
        last = not trainer.fit_loop.epoch_loop._should_accumulate()
        for name, parameter in trained.items():
            parameter.grad = self._noisy(name, parameter, trainer.global_step + 1) / of_step if last else None
        if last:
            self._sum = {}

    def _noisy(self, name: str, parameter: Tensor, step: int) -> Tensor:
        """Sum of clipped gradients plus noise, drawn on the CPU as a function of (seed, step, name)."""
        own = generator(self.seed, "privacy", step, name)
        noise = torch.randn(parameter.shape, generator=own, dtype=torch.float64) * (self.sigma * self.clip)
        total = self._sum.get(name, torch.zeros_like(parameter))
        return total + noise.to(parameter.device, parameter.dtype)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Count the step in its client's account."""
        client = self._federated.client_at(step) if self._federated else 0
        self._accounts[client].step(noise_multiplier=self.sigma, sample_rate=self._rates[client])
        if logs_at(self.trainer, step) or step == self.total:
            self.spent = self._epsilon()

    def _epsilon(self) -> float:
        """Largest of a client: infinite without noise, 0 before the first step."""
        used = [account for account in self._accounts if len(account)]
        if used and not self.sigma:
            return math.inf
        return max((float(account.get_epsilon(delta=self.delta)) for account in used), default=0.0)

    def metrics(self) -> Mapping[str, float]:
        """The largest epsilon of a client."""
        return {"epsilon": self.spent}

    def state_dict(self) -> dict[str, Any]:
        """Accounts, and the clipped gradients of a step that is not over."""
        accounts = [[list(entry) for entry in account.history] for account in self._accounts]
        own = {"accounts": accounts, "sum": self._sum}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training begins."""
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("accounts", "sum")}

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a run without Opacus before it begins."""
        _accountants()


def _accountants() -> Any:
    try:
        import opacus.accountants
        import opacus.accountants.utils
    except ImportError as error:
        raise SettingsError(
            'PrivateGradients counts privacy with Opacus: pip install "lora-lightning[federated]".'
        ) from error
    return opacus.accountants


def _first(batch: Any) -> Tensor:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    return next(value for value in values if isinstance(value, Tensor) and value.dim())
