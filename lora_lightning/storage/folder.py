"""Writing an adapter folder: `save_adapter`.

    adapter.safetensors    tensors of adapters and fully trained heads, the description, digests of everything; commits
    adapter.json           the description again, for people
    README.md              the model card, written from the description; see `card.py`
    tokenizer/             where new tokens were added: the tokenizer that knows them

Tensor names are those of the model: `<path>.adapters.<name>.<tensor>`, heads under their own names, without what
torch.compile, FSDP1 or activation checkpointing put into a path.

`stored.py` reads the folder, `load.py` loads it, and `commit.py` replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.distributed import gather
from lora_lightning.errors import AdapterFileError, AdapterStateError, did_you_mean
from lora_lightning.injection.heads import heads_of
from lora_lightning.injection.records import injected_root, records
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import vocabulary
from lora_lightning.models.paths import plain
from lora_lightning.storage.atomic import as_json
from lora_lightning.storage.card import new_card
from lora_lightning.storage.commit import replace_files
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.load import check_loads
from lora_lightning.storage.sealed import seal
from lora_lightning.storage.state import surveyed_state
from lora_lightning.storage.stored import DESCRIPTION, FILE, LAYOUT, TOKENIZER, Stored, belonging, read_settled


def save_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Write one adapter as a folder, all or nothing, after it has been read back from the disk.

    Of a sharded model every process calls this, and the first one writes.

    Args:
        model: a model with adapters.
        directory: the folder; an adapter that is there already is replaced only when the new one is whole.
        name: which adapter.

    Returns:
        The folder.

    Raises:
        AdapterStateError: there is no such adapter, or it was merged with `keep_original=False`.
        AdapterFileError: a value is NaN or infinite, what was written does not read back, or the folder cannot be
            written; what was there is intact.
    """
    root = injected_root(model)
    if name not in records(root):
        raise AdapterStateError(
            f'no adapter "{name}".{did_you_mean(name, records(root))} Installed: {", ".join(records(root))}.'
        )
    anatomy = survey(root)
    with heads_of(root, [name]):
        state = surveyed_state(anatomy, [name])
        full = gather(list(state.values()))
        tensors = {plain(k): t.to("cpu", copy=True).contiguous() for k, t in zip(state, full, strict=True)}
        description = describe_adapter(anatomy, name)
    folder = Path(directory)
    if anatomy.sharded and torch.distributed.get_rank() > 0:
        return folder
    added = vocabulary(root)
    tokenizer = added.files if added else {}
    write_adapter(folder, tensors, description, tokenizer, lambda stored: check_loads(anatomy, stored, folder))
    return folder


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
    check: Callable[[Stored], object],
) -> None:
    """Write an adapter folder, read it back from the disk, and put it in the place of what is there.

    Args:
        folder: the folder.
        tensors: contiguous, on the CPU.
        description: as `describe_adapter` gives it.
        tokenizer: files of the tokenizer that knows new tokens, by name.
        check: is given what was read back, and raises where it is not good.

    Raises:
        AdapterFileError: see `save_adapter`.
    """
    beside = {f"{TOKENIZER}/{name}": content for name, content in tokenizer.items()}

    def read_back(staged: Path) -> None:
        try:
            stored = read_settled(staged)
            for key in sorted(tensors.keys() | stored.tensors.keys()):
                if key not in stored.tensors or not torch.equal(_bits(stored.tensors[key]), _bits(tensors[key])):
                    raise AdapterFileError(f"{key} is another one there.")
            check(stored)
        except AdapterFileError as error:
            why = str(error).replace(str(staged), str(folder))
            raise AdapterFileError(f"the adapter does not read back as it is; nothing was written. {why}") from error

    try:
        content = seal(tensors, description, beside)
    except AdapterFileError as error:
        raise AdapterFileError(f'cannot write the adapter to "{folder}": it {error} Nothing was written.') from error
    try:
        replace_files(
            folder,
            LAYOUT,
            {**beside, **new_card(folder, description), FILE: content, DESCRIPTION: as_json(description)},
            read_back,
            belonging,
        )
    except OSError as error:
        raise AdapterFileError(
            f'cannot write the adapter to "{folder}": {error.strerror or error}. What was there before is intact.'
        ) from error


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
