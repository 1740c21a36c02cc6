"""What several fine-tunes of one base model have changed in its layers: adapters as factors, models as differences.

A source is an adapter folder of this library, a folder that holds some, or a model of the class of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.pretrained import resolve
from lora_lightning.storage.compose import Update, updates
from lora_lightning.storage.stored import DESCRIPTION, read_folder


class FineTunes:
    """Fine-tunes of a base model, layer by layer. All models among them are held at once, in the dtype of their files.

    Args:
        sources: adapter folders, folders of them, and models: folders, hub ids or `pkg:` names.
        model: the base model.
        layers: the layers that are asked for, by path.
        setting: the setting that names the sources, for messages.

    Raises:
        AdapterFileError: an adapter that is damaged, or whose update is no product.
        SettingsError: a model, where the base model is no Hugging Face model.
        ModelError: a source that is neither.
    """

    def __init__(self, sources: Sequence[str], model: nn.Module, layers: Mapping[str, BaseLayer], setting: str) -> None:
        self.layers, self.setting = layers, setting
        self.adapters: dict[str, dict[str, Update]] = {}
        self.models: dict[str, Mapping[str, BaseLayer]] = {}
        for source in sources:
            folders = sorted(file.parent for file in Path(source).rglob(DESCRIPTION)) if Path(source).is_dir() else []
            for folder in folders:
                self.adapters[str(folder)] = updates(read_folder(folder), folder)
            if not folders:
                self.models[source] = self._load(model, source)

    def _load(self, model: nn.Module, source: str) -> Mapping[str, BaseLayer]:
        load: Any = getattr(type(model), "from_pretrained", None)
        if load is None:
            raise SettingsError(
                f"{self.setting} names the model {source}, and {type(model).__name__} is no Hugging Face model, so "
                "that nobody knows how to load it; give adapter folders."
            )
        return survey(load(resolve(source, self.setting), dtype="auto")).reachable

    def factors(self, path: str) -> list[Update]:
        """(A (R, d_in), B (d_out, R)) in float64 of each adapter on the layer; the update is B A.

        Raises:
            SettingsError: sizes of another layer.
        """
        found = [(folder, parts[path]) for folder, parts in self.adapters.items() if path in parts]
        for folder, (A, B) in found:
            self._check(path, folder, (B.shape[-2], A.shape[-1]))
        return [update for _, update in found]

    def differences(self, path: str) -> list[Tensor]:
        """W_k - W of each model that has the layer, (*lead, d_out, d_in) in float64.

        Raises:
            SettingsError: sizes of another layer.
        """
        found = []
        for source, theirs in self.models.items():
            if path in theirs:
                self._check(path, source, (theirs[path].d_out, theirs[path].d_in))
                own = self.layers[path].weight(torch.float64)
                found.append(theirs[path].weight(torch.float64).to(own.device) - own)
        return found

    def _check(self, path: str, source: str, size: tuple[int, int]) -> None:
        own = (self.layers[path].d_out, self.layers[path].d_in)
        if size != own:
            raise SettingsError(
                f"{self.setting}: {path} has size {size} in {source} and {own} here; it is another model's."
            )
