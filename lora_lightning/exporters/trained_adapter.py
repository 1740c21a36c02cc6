"""A trained adapter by its name: a run folder, an adapter folder of this library, a folder of peft, or a hub id.

find_adapter(name)                what it is, read without a model
find_adapter(name).load(model)    on the model, frozen and active, with what it was trained on top of
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.errors import AdapterFileError, ModelError, SettingsError
from lora_lightning.exporters.export import import_peft
from lora_lightning.exporters.peft.folder import read_config
from lora_lightning.exporters.peft.read import stated_method
from lora_lightning.exporters.peft.rules import CONFIG, TENSORS
from lora_lightning.injection.records import meant_to_train, note_read, records
from lora_lightning.injection.switches import set_active, set_trainable
from lora_lightning.methods import Method
from lora_lightning.models.pretrained import resolve
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.storage.below import SHOWN
from lora_lightning.storage.inside import read_inside
from lora_lightning.storage.load import load_stored
from lora_lightning.storage.run_start import from_start
from lora_lightning.storage.stored import FILE, TOKENIZER, Stored, read_folder

OURS, PEFTS = "lora_lightning", "peft"
"""Formats."""
WANTED = (
    "adapter.*", "adapter_config.json", "adapter_model.safetensors", "tokenizer/*", "tokenizer*", "*.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model",
)  # fmt: skip
"""Files of a repository of the hub that belong to an adapter; none of them is a pickle."""
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter, read as far as no model is needed."""

    given: str
    """Its name as it was given."""
    folder: Path
    """Where its files lie."""
    format: str
    """`OURS` or `PEFTS`."""
    digest: str
    """sha256 of its files."""
    base: str | None
    """The base model that it names."""
    method: Method
    """Its method, with the settings that all of its layers have."""
    tokenizer: Path | None
    """Folder of the tokenizer that came with it."""
    stored: Stored | None = field(default=None, repr=False)
    """What is read of a folder of this library."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """adapter_config.json of a folder of peft."""

    def __str__(self) -> str:
        return f'"{self.given}" ({type(self.method).__name__}, {self.format}, sha256 {self.digest[:SHOWN]})'

    @property
    def source(self) -> str:
        """Where it is found from any directory: its folder, absolute, or its hub id."""
        return str(self.folder.absolute()) if Path(self.given).expanduser().exists() else self.given

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters that train in full, as far as the files tell without a model."""
        return self.stored.trained if self.stored else ()

    @property
    def labels(self) -> list[str]:
        """Class names of the head that it trained, in their order; none where it states none."""
        return list(self.stored.description.get("labels") or ()) if self.stored and self.stored.trained else []

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Tokens that it added to the base model's, as far as it states them."""
        return self.stored.vocabulary.tokens if self.stored and self.stored.vocabulary else ()

    def below(self) -> list[TrainedAdapter]:
        """The adapters that it was trained on top of, looked up where they lay.

        Raises:
            AdapterFileError: one is not there any more, or is another one now.
        """
        found = []
        for one in self.stored.below if self.stored else ():
            needs = f'{self} was trained on top of "{one["source"]}" (sha256 {one["digest"][:SHOWN]})'
            try:
                there = find_adapter(from_start(one["source"], self.folder))
            except (AdapterFileError, ModelError) as error:
                raise AdapterFileError(f"{needs}, which is not there: {error} Put it back.") from error
            if there.digest != one["digest"]:
                raise AdapterFileError(
                    f"{needs}; what lies there now has sha256 {there.digest[:SHOWN]}. Put back what it was trained on."
                )
            found.append(there)
        return found

    def load(self, model: nn.Module, name: str = "default") -> None:
        """Put it on a model: frozen, and active with those that it was trained on top of.

        Args:
            model: the base model.
            name: its name there; those below it are called `<name>_below_<n>`, unless they are there already.

        Raises:
            AdapterFileError: it does not fit the model, or one below it is missing.
            AdapterStateError: the name is taken.
        """
        read = {record.digest for record in records(model).values()}
        for number, one in enumerate(self.below(), 1):
            if one.digest not in read:
                one.load(model, f"{name}_below_{number}")
        if self.stored is not None:
            load_stored(model, self.stored, self.folder, name)
            return
        trains = meant_to_train(model)
        import_peft(model, self.folder, name)
        set_trainable(model, trains)
        note_read(model, name, self.digest)
        set_active(model, name)


def find_adapter(name: str, setting: str = "the adapter") -> TrainedAdapter:
    """What a name means; nothing is loaded into a model.

    Args:
        name: a run folder, an adapter folder of this library or of peft, or a hub id; of the hub the newest snapshot
            is taken, or without a network the one in the cache.
        setting: what holds the name, for messages.

    Raises:
        AdapterFileError: no adapter there, or a damaged one.
        ModelError: no such folder.
        UnknownMethodError: the plugin that brings its method is not installed.
    """
    folder = _folder(name, setting)
    if not (folder / FILE).is_file() and (folder / CONFIG).is_file():
        config = read_config(folder)
        parts = [read_inside(folder, part) for part in (CONFIG, TENSORS) if (folder / part).is_file()]
        return TrainedAdapter(
            given=name,
            folder=folder,
            format=PEFTS,
            digest=hashlib.sha256(b"".join(parts)).hexdigest(),
            base=config.get("base_model_name_or_path") or None,
            method=stated_method(config),
            tokenizer=folder if any((folder / file).is_file() for file in _TOKENIZER_FILES) else None,
            config=config,
        )
    stored = read_folder(folder)
    method_class = registry().method(stored.method, where=f'"{name}"')
    try:
        method = restore_settings(method_class, "settings", stored.settings)
    except SettingsError as error:
        raise AdapterFileError(f'"{name}": {error}') from error
    return TrainedAdapter(
        given=name,
        folder=folder,
        format=OURS,
        digest=stored.digest,
        base=None if stored.base is None else from_start(stored.base, folder),
        method=method,
        tokenizer=folder / TOKENIZER if stored.vocabulary else None,
        stored=stored,
    )


def _folder(name: str, setting: str) -> Path:
    """The local folder of an adapter: given, inside a run folder, or in the hub's cache."""
    place = resolve(name, setting, needs=None)
    folder = Path(place)
    if not folder.is_dir():
        return _from_hub(name, setting)
    if (folder / FILE).is_file() or (folder / CONFIG).is_file():
        return folder
    if (folder / "adapter" / FILE).is_file():
        return folder / "adapter"
    if (folder / "config.yaml").is_file():
        raise AdapterFileError(
            f'{setting} is "{name}", a run without adapter/, which a fit writes when it has finished. Continue it with '
            f"fit --resume {name}, or give an adapter folder."
        )
    raise AdapterFileError(
        f'{setting} is "{name}", which holds neither {FILE} nor {CONFIG}, so it is no adapter of this library and none '
        "of peft's."
    )


def _from_hub(name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except HFValidationError as error:
        raise ModelError(f'{setting} is "{name}"; that is no folder and no hub id.') from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split("\n", maxsplit=1)[0].split())
        raise ModelError(
            f'{setting} is "{name}"; there is no such folder, and the hub gave nothing: {reason} Give a folder, or '
            "download it first where there is a network."
        ) from error
