"""Multiplicative and hybrid steps around any optimizer: a step in proportion to each number's own size.

Kirtas, Passalis and Tefas, 2023, arXiv:2307.07189.

    u = eta m l                                               what the optimizer inside subtracts
    p = p - g |p| tanh(eta_in u) eta_out - (1 - g) u

    paper    here     meaning
    m, l              moment and preconditioner of the optimizer inside
    eta      lr       the rate of the group, with its schedule
    eta_in   eta_in   gain in front of tanh, over the rate: the paper's is eta_in lr
    eta_out  eta_out  the largest relative step, below 1
    g        blend    0 for "add", 1 for "mult"

Where |eta_in u| is small and g = 1, p (1 - eta_in eta_out sign(p) u): the defaults make lr the relative rate. A number
keeps its sign under "mult", and 0 stays 0.

Departs from the paper: the first gain is counted in rates, so that warm-up, decay and rates of groups act on it. Decay
that the optimizer inside keeps apart from its moments, as AdamW's, stays apart from tanh as well. The paper gives no
defaults that could be confirmed; the blend is that of slides that go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lora_lightning.distributed import local, summed
from lora_lightning.errors import SettingsError, TrainingError, check, did_you_mean
from lora_lightning.optim.pair_optimizer import PairOptimizer
from lora_lightning.optim.wrapper import OptimizerWrapper, adamw, innermost

Mode = Literal["add", "mult", "hybrid"]


class Multiplicative(OptimizerWrapper):
    """Turns another optimizer's steps into relative ones: all of a step, a part of it, or none, group by group.

    Args:
        params: parameters or groups.
        inner: the optimizer whose steps are turned; null for AdamW at a rate of 1e-3.
        mode: what becomes of a step: "mult" makes it relative, "hybrid" blends both, "add" leaves it. "mult" is for
            what starts away from zero, such as magnitudes and gates: it never leaves zero and never changes a sign.
        modes: other modes of some groups by name, such as {A: mult, head: add}; null for none.
        eta_in: gain in front of tanh, in rates; 1 / eta_out makes `lr` the relative rate of small steps.
        eta_out: the largest relative step, in (0, 1).
        blend: part of a hybrid step that is relative, in [0, 1]; 0 is the optimizer inside.
    """

    bibtex: ClassVar[str] = """@article{kirtas2023multiplicative,
  title = {Multiplicative Update Rules for Accelerating Deep Learning Training and Increasing Robustness},
  author = {Kirtas, Manos and Passalis, Nikolaos and Tefas, Anastasios},
  journal = {arXiv preprint arXiv:2307.07189},
  year = {2023}
}"""

    def __init__(
        self,
        params: Any,
        inner: Callable[[Any], Optimizer] | None = None,
        mode: Mode = "hybrid",
        modes: dict[str, Mode] | None = None,
        eta_in: float = 10.0,
        eta_out: float = 0.1,
        blend: float = 0.5,
    ) -> None:
        self.mode, self.modes, self.eta_in, self.eta_out, self.blend = mode, modes or {}, eta_in, eta_out, blend
        for name, value in (("mode", mode), *((f"modes.{group}", value) for group, value in self.modes.items())):
            if value not in get_args(Mode):
                raise SettingsError(f"Multiplicative.{name} is {value!r}; it takes add, mult or hybrid.")
        check(eta_in > 0, self, "eta_in", "it must be above 0. Gain in front of tanh; 1 / eta_out is usual.")
        check(0 < eta_out < 1, self, "eta_out", "it must lie in (0, 1), so that no number crosses zero; 0.1 is usual.")
        check(0 <= blend <= 1, self, "blend", "it must lie in [0, 1]; 0 is the optimizer inside, 1 is mode mult.")
        told = ", ".join(f"{group}: {value}" for group, value in sorted(self.modes.items()))
        settings = {"mode": mode, "modes": told, "eta_in": eta_in, "eta_out": eta_out, "blend": blend}
        super().__init__((inner or adamw)(params), settings)
        if self.copies:
            raise SettingsError(
                f"Multiplicative.inner is {type(self.inner).__name__}, whose steps are no multiples of a rate; put it "
                "around Multiplicative."
            )
        self._give_modes()
        self._checked = False

    def _give_modes(self) -> None:
        names = [str(group["name"]) for group in self.param_groups if "name" in group]
        for name in self.modes:
            if name not in names:
                listed = ", ".join(names) or "none with a name"
                raise SettingsError(
                    f'Multiplicative.modes names "{name}"; the groups are: {listed}.{did_you_mean(name, names)}'
                )
        for group in self.param_groups:
            group.setdefault("mode", self.modes.get(group.get("name", ""), self.mode))

    def take_step(self) -> None:
        """The inner optimizer's step, of which the relative part is put in place of an equal one.

        Raises:
            TrainingError: before the first step, a parameter that could never change, or one in half precision.
            SettingsError: weight decay of an optimizer that is not known to keep it apart from its moments or not.
        """
        turned = [(group, g) for group in self.param_groups if (g := self._relative_part(group))]
        if not self._checked:
            self._check(turned)
            self._checked = True
        shards = [[local(p) for p in group["params"] if p.grad is not None] for group, _ in turned]
        before = [[p.clone() for p in held] for held in shards]
        decays = [self._apart(group) for group, _ in turned]
        for (group, _), decay in zip(turned, decays, strict=True):
            group |= {"weight_decay": 0.0} if decay else {}
        self.inner.step()
        for (group, g), decay, held, old in zip(turned, decays, shards, before, strict=True):
            group |= {"weight_decay": decay} if decay else {}
            for p, start in zip(held, old, strict=True):
                p.copy_(step(start, start - p, g, self.eta_in, self.eta_out) - group["lr"] * decay * start)

    def _relative_part(self, group: Mapping[str, Any]) -> float:
        return {"add": 0.0, "mult": 1.0, "hybrid": self.blend}[group["mode"]]

    def _apart(self, group: Mapping[str, Any]) -> float:
        """Weight decay of a group that does not pass through moments."""
        inner, decay = innermost(self), float(group.get("weight_decay", 0.0))
        if isinstance(inner, AdamW | PairOptimizer) or group.get("decoupled_weight_decay", False):
            return decay
        if decay and not type(inner).__module__.startswith("torch.optim"):
            raise SettingsError(
                f"Multiplicative: {type(inner).__name__}.weight_decay is {decay:g}, and whether it passes through the "
                "moments is not known; it must be 0 there. AdamW has a decay."
            )
        return 0.0

    def _check(self, turned: list[tuple[dict[str, Any], float]]) -> None:
        """Of every process's shards, that there is something to step in proportion to."""
        for group, g in turned:
            name, params = group.get("name", "without a name"), group["params"]
            for p in params:
                if p.dtype in (torch.float16, torch.bfloat16):
                    raise TrainingError(
                        f"Multiplicative: a parameter of the group {name} is in half precision, where a step cannot be "
                        "read off its change; keep adapters in float32, or give the group the mode add."
                    )
            if g < 1:
                continue
            counts = torch.stack([local(p).count_nonzero() for p in params]).double()
            zero = [p for p, count in zip(params, summed(counts, params).tolist(), strict=True) if not count]
            if zero:
                raise TrainingError(
                    f"Multiplicative: {len(zero)} of {len(params)} parameters of the group {name} are zero, the first "
                    f"of shape {tuple(zero[0].shape)}, and a relative step never leaves zero. Give the group the mode "
                    f"hybrid, such as modes: {{{name}: hybrid}}, with a blend below 1."
                )


def step(p: Tensor, u: Tensor, blend: float, eta_in: float, eta_out: float) -> Tensor:
    """p - g |p| tanh(eta_in u) eta_out - (1 - g) u, for tensors of any shape."""
    relative = p - blend * eta_out * p.abs() * torch.tanh(eta_in * u)
    return relative if blend == 1 else relative - (1 - blend) * u
