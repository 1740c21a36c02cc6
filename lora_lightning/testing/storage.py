"""Storage: settings as plain data and YAML, state dictionaries, adapter folders, and a run that goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from lora_lightning.cli.parser import method_from_yaml
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.methods import plain_settings
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.plugins import restore_settings
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.storage.state import adapter_keys
from lora_lightning.testing.method_under_test import MethodUnderTest
from lora_lightning.testing.toy_models import perturb, seeded, tiny_encoder

_EXPORTS = ("native", "exact LoRA", "merged only", "not expressible")


class StorageContract(MethodUnderTest):
    """What of a method travels: its settings, its facts and its tensors."""

    def test_settings_round_trip_as_plain_data(self) -> None:
        """Settings -> plain data -> JSON -> settings gives equal settings, as the adapter file needs."""
        plain = json.loads(json.dumps(plain_settings(self.method)))
        back = restore_settings(type(self.method), "settings", plain)
        look = "fields that JSON gives back as another type, such as a tuple, and at `__post_init__`"
        assert back == self.method, self._broken(f"settings came back from JSON as {back!r}", look=look)

    def test_settings_round_trip_through_yaml(self) -> None:
        """Written as YAML under the class's short name, the command line's parser makes equal settings of them."""
        given = {"class_path": type(self.method).__name__, "init_args": plain_settings(self.method)}
        back = method_from_yaml(yaml.safe_dump({"method": given}))
        look = "the fields' annotations, and at `__post_init__`"
        assert back == self.method, self._broken(f"settings came back from YAML as {back!r}", look=look)

    def test_class_facts(self) -> None:
        """The method says what it is: a docstring, a documented way to travel, a citation for a paper."""
        method, look = self.method, "the settings class"
        # a dataclass without a docstring is given its signature as one
        written = (type(method).__doc__ or "").strip() and not str(type(method).__doc__).startswith(
            f"{type(method).__name__}("
        )
        assert written, self._broken("the settings class must have a docstring, which `show` prints", look=look)
        ways = ", ".join(f'"{way}"' for way in _EXPORTS)
        assert method.export in _EXPORTS, self._broken(f'`export` is "{method.export}"; it must be one of {ways}')
        cited = f"bibtex must name the arXiv id {method.paper} given as `paper`, such as eprint = {{{method.paper}}}"
        assert not method.paper or method.paper in method.bibtex, self._broken(cited, look=look)
        merged = f'`mergeable` is False, so `export` must be "not expressible", not "{method.export}"'
        assert method.mergeable or method.export == "not expressible", self._broken(merged, look=look)

    def test_state_dict_round_trip(self, kind: str) -> None:
        """The tensors below the adapter are all of its state."""
        model, _, adapter, x = self._one_layer(kind)
        fresh, _, other, _ = self._one_layer(kind, perturbed=False)
        other.reset(torch.Generator().manual_seed(5))
        perturb(other, seed=8)
        fresh.load_state_dict(model.state_dict())
        state = "two adapters with equal state dictionaries must compute the same; one was reset with seed 5"
        look = f"{type(adapter).__name__}.__init__ and reset for numbers that are no parameter or buffer"
        self._equal(fresh(x), model(x), self._broken(state, kind, look))

    def test_save_and_load(self, tmp_path: Path) -> None:
        """An adapter folder gives a fresh copy of the base model the same function, trained head included."""
        model, tokens = tiny_encoder(), torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
        inject(model, self.method, seed=0)
        for i, adapter in enumerate(adapters_named(model, "default").values()):
            perturb(adapter, i, size=0.05)
        perturb(model.classifier, seed=3)
        save_adapter(model, tmp_path / "adapter")
        fresh = tiny_encoder()
        load_adapter(fresh, tmp_path / "adapter")
        loaded = "an adapter folder must give a fresh base model what was saved"
        look = "`build`, which is all that gives a loaded adapter its form, and at buffers with persistent=False"
        promise = self._broken(loaded, "a BERT classifier", look)
        self._equal_states(fresh.state_dict(), model.state_dict(), promise)
        with torch.no_grad():
            self._equal(fresh(tokens).logits, model(tokens).logits, promise)

    def test_resume_equals_uninterrupted(self) -> None:
        """Four steps equal two, a checkpoint of adapter and optimizer, and two more in a new process's objects."""
        whole, x = self._mlp(torch.float32, perturbed=False)
        self._train(whole, build_optimizer(whole, None), x, range(4))
        first, _ = self._mlp(torch.float32, perturbed=False)
        optimizer = build_optimizer(first, None)
        self._train(first, optimizer, x, range(2))
        file = io.BytesIO()
        state = first.state_dict()
        torch.save([{key: state[key] for key in adapter_keys(first)}, optimizer.state_dict()], file)
        file.seek(0)
        tensors, moments = torch.load(file, weights_only=True)
        second, _ = self._mlp(torch.float32, perturbed=False, seed=1)
        second.load_state_dict(tensors, strict=False)
        optimizer = build_optimizer(second, None)
        optimizer.load_state_dict(moments)
        self._train(second, optimizer, x, range(2, 4))
        resumed = "two steps, a checkpoint and two more steps must give what four steps give, bit for bit"
        look = "state that is in no parameter or buffer, and at draws from generators of the method's own"
        self._equal_states(second.state_dict(), whole.state_dict(), self._broken(resumed, "TinyMLP", look))

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: range) -> None:
        model.train()
        for step in steps:
            with seeded(step):
                self._step(model, optimizer, x)
