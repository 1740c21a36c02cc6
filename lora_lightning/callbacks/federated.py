"""FederatedRounds: several clients train in turns, each from the server's values, and the server averages them.

    round r     every client k in turn: values = server; `local_steps` optimizer steps on rows of client k
    its end     server = sum_k p_k values_k

One process, or several that share each client's batches, simulate all clients one after the other. Everything that
trains is averaged; what is frozen is the same for all. An average of one factor of a product is exact where the other
is frozen and equal: sum_k p_k (B_k A) = (sum_k p_k B_k) A.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import STAGE_ENDS
from lora_lightning.data.batches.clients import ClientSampler, client_parts
from lora_lightning.data.table import TableData
from lora_lightning.distributed import gather_nested, shard_like
from lora_lightning.errors import SettingsError, check
from lora_lightning.models.paths import plain
from lora_lightning.optim.state import clear


class FederatedRounds(ScheduleCallback):
    """Simulates federated training: clients cut from the training data, local steps, weighted averages.

    Validation and checkpoints see the server's values at the end of a round, and those of one client inside. A run
    that is stopped inside a round ends with the server's values of the last whole one.

    Args:
        clients: how many clients share the training rows.
        local_steps: optimizer steps of a client in a round.
        weights: whether clients count by their rows, or all alike.
        moments: whether the optimizer begins anew at each turn, or goes on with what it kept of the same client.
        skew: concentration of a Dirichlet distribution of each label over clients; null shares rows out evenly.
        seed: decides who gets which rows, and their order.

    Raises:
        SettingsError: a value outside its rule; a run that does not end with a round; data that cannot be shared out.
    """

    phase: ClassVar[int] = STAGE_ENDS
    requires: ClassVar[str] = "parameters that train"

    def __init__(
        self,
        clients: int,
        local_steps: int = 10,
        weights: Literal["rows", "equal"] = "rows",
        moments: Literal["reset", "keep"] = "reset",
        skew: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clients, self.local_steps, self.weights, self.moments = clients, local_steps, weights, moments
        self.skew, self.seed = skew, seed
        check(type(clients) is int and clients >= 1, self, "clients", "it must be a whole number of at least 1.")
        check(
            type(local_steps) is int and local_steps >= 1, self, "local_steps", "it must be at least 1; 10 is common."
        )
        check(skew is None or skew > 0, self, "skew", "it must be above 0, or null; 0.5 differs clearly, 100 hardly.")
        self.rows: list[int] = []
        """Training rows of each client, once the data have been shared out."""
        self._server: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._kept: dict[int, dict[str, dict[str, Any]]] = {}
        self._saved: dict[str, Any] | None = None
        self._turns = 0

    # -- data ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data module an order of rows in turns of clients.

        Raises:
            SettingsError: the data cannot be shared out.
        """
        super().setup(trainer, pl_module, stage)
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "fit":
            return
        name = type(self).__name__
        if not isinstance(data, TableData):
            raise SettingsError(
                f"{name} shares out the rows of a data module of lora_lightning; this run has "
                f"{'none' if data is None else type(data).__name__}."
            )
        for field in ("streaming", "packing"):
            if getattr(data, field, False):
                raise SettingsError(f"data.{field} is true; {name} needs single rows to share out. Set it to false.")
        order = type(data).sampler

        def sampler(examples: Any, batch_size: int, **options: Any) -> DistributedSampler[Any]:
            if not options.pop("shuffle"):
                return order(data, examples, batch_size, shuffle=False, **options)
            labels = None
            if self.skew is not None:
                if "labels" not in examples.column_names or not isinstance(examples[0]["labels"], int):
                    raise SettingsError(f"{name}.skew is {self.skew}; the data have no classes to share out by it.")
                labels = examples["labels"][:]
            parts = client_parts(len(examples), self.clients, self.seed, labels, self.skew)
            self.rows = [len(part) for part in parts]
            turn = self.local_steps * trainer.accumulate_grad_batches
            return ClientSampler(examples, parts, batch_size, turn, **(options | {"seed": self.seed}))

        data.sampler = sampler  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data module its own order back."""
        getattr(trainer, "datamodule", self).__dict__.pop("sampler", None)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def accepts(self, adapter: Adapter) -> bool:
        """Every adapter that trains."""
        return True

    @property
    def shares(self) -> list[float]:
        """Weight p of each client in the average."""
        counts = self.rows if self.weights == "rows" else [1] * self.clients
        return [count / sum(counts) for count in counts]

    def client_at(self, step: int) -> int:
        """The client whose rows optimizer step `step`, from 1, is taken on."""
        return (step - 1) // self.local_steps % self.clients

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a run that ends inside a round, and stages that would fold one client's values."""
        length = self.clients * self.local_steps
        if total is not None and total % length:
            near = max(1, round(total / length)) * length
            raise SettingsError(
                f"{type(self).__name__}: the run has {total} optimizer steps, and a round takes {length} "
                f"({self.clients} clients of {self.local_steps} steps); set max_steps to {near}."
            )
        for other in others:
            if isinstance(other, ScheduleCallback) and other.phase == STAGE_ENDS:
                raise SettingsError(
                    f"{type(self).__name__} and {type(other).__name__} both end stages; use one of them."
                )

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """The server begins with the values that the run begins with; a resumed one with its own."""
        trained = self._trained()
        if not self.rows:  # a module that made its loaders before
            raise SettingsError(f"{type(self).__name__} found the training rows not shared out; give it a data module.")
        self._turns = self.trainer.global_step // self.local_steps
        self._server = {name: p.detach().clone() for name, p in trained.items()}
        self._sum = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in trained.items()}
        self._kept = {}
        if self._saved is None:
            return
        for name, parameter in trained.items():
            self._server[name].copy_(shard_like(self._saved["server"][name], parameter))
            self._sum[name].copy_(shard_like(self._saved["sum"][name], parameter))
        for client, states in self._saved["moments"].items():
            self._kept[client] = {
                name: {key: _placed(value, trained[name]) for key, value in state.items()}
                for name, state in states.items()
            }
        self._saved = None

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """End a turn where one ends."""
        self._end_turn(step)

    def on_skipped(self, step: int) -> None:
        """A skipped step counts in its turn as well."""
        self._end_turn(step)

    @torch.no_grad()
    def _end_turn(self, step: int) -> None:
        if step % self.local_steps:
            return
        self._turns = step // self.local_steps
        trained, client = self._trained(), self.client_at(step)
        share = self.shares[client]
        for name, parameter in trained.items():
            self._sum[name].add_(parameter.to(_wide(parameter)), alpha=share)
            if client == self.clients - 1:
                self._server[name].copy_(self._sum[name])
                self._sum[name].zero_()
            parameter.copy_(self._server[name])
        self._change_client(trained, client, self.client_at(step + 1))

    def _change_client(self, trained: Mapping[str, nn.Parameter], old: int, new: int) -> None:
        """Leave the optimizer as the next client's turn begins."""
        if self.moments == "keep" and old == new:
            return
        (optimizer,) = self.trainer.optimizers
        if self.moments == "keep":
            self._kept[old] = {name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in trained.items()}
        clear(optimizer, trained.values())
        for name, state in self._kept.pop(new, {}).items():
            if state:
                optimizer.state[trained[name]] = state

    def _trained(self) -> dict[str, nn.Parameter]:
        return {plain(name): p for name, p in self.module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the server's values where the run was stopped inside a round."""
        if self._server and trainer.global_step % (self.clients * self.local_steps):
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(self._server[name])
            self.changed_at_end = True
            if trainer.is_global_zero:
                print(f"{type(self).__name__}: stopped inside a round; what is kept is the average before it")

    def finished(self, step: int) -> bool:
        """Whether a round has just ended."""
        return step % (self.clients * self.local_steps) == 0

    def metrics(self) -> Mapping[str, float]:
        """Whole rounds so far."""
        return {"round": float(self._turns // self.clients)}

    def state_dict(self) -> dict[str, Any]:
        """The server's values, the sum of this round's turns, and moments of clients that wait."""
        own = {"server": self._server, "sum": self._sum, "moments": self._kept}
        return super().state_dict() | cast("dict[str, Any]", gather_nested(own))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the parameters are known."""
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("server", "sum", "moments")}


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    """A value of an optimizer's state, laid out as its parameter where it is shaped like that."""
    if not isinstance(value, Tensor):
        return value
    return shard_like(value, parameter) if value.shape == parameter.shape else value
