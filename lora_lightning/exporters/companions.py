"""What goes with a model so that it can be used: tokenizer and chat template, processor, the token that ends a turn.

They are those of the run, where one is known, else those that lie beside the base model's weights. What reads data is
imported where it is called: exporting from plain PyTorch takes neither it nor Lightning.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.errors import LoraLightningError
from lora_lightning.models.pretrained import resolve
from lora_lightning.storage.run_start import paths_from_start

_KINDS = ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor")


def companion_files(model: Any, processor: Any, added: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of processor and tokenizer, by path in a folder; none where nobody knows them.

    Args:
        model: a Hugging Face model, whose configuration says where its weights were read.
        processor: the run's tokenizer or processor; None takes the base model's.
        added: files of the tokenizer that knows new tokens, which win.
    """
    found = _base_files(getattr(model.config, "_name_or_path", ""))
    if processor is not None:
        found |= saved_files(processor)
    return {**found, **added}


def names_template(adapter: Path) -> bool:
    """Whether the run around an adapter has a chat template of its own, which the base model lacks."""
    try:
        config = yaml.safe_load((adapter.resolve().parent / "config.yaml").read_text(encoding="utf-8"))
        return config["data"]["init_args"].get("chat_template") is not None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return False


def run_processor(adapter: Path) -> Any:
    """The tokenizer or processor, with its chat template, or the image processor of the run around an adapter.

    None where there is no run, or where they cannot be read any more: those of the base model will do.
    """
    from lora_lightning.data.chats.templates import choose_template
    from lora_lightning.data.images import load_image_processor
    from lora_lightning.data.media.processors import load_processor
    from lora_lightning.data.tokens.tokenizers import load_tokenizer

    try:
        config = yaml.safe_load((adapter.resolve().parent / "config.yaml").read_text(encoding="utf-8"))
        settings = {"tokenizer": None, "processor": None, "size": None, **config["data"]["init_args"]}
        for name in ("tokenizer", "processor", "chat_template"):
            settings |= {name: paths_from_start(settings[name], adapter)} if name in settings else {}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    with suppress(LoraLightningError):
        if isinstance(settings["tokenizer"], str):
            tokenizer = load_tokenizer(settings["tokenizer"])
            if settings.get("chat_template") is not None:
                tokenizer.chat_template = choose_template(tokenizer, settings["chat_template"])[0]
            return tokenizer
        if "chat_template" in settings:
            return _with_template(load_processor(settings["processor"], "data.processor"), settings["chat_template"])
        if isinstance(settings["processor"], str) or isinstance(settings["size"], int):
            return load_image_processor(settings["processor"], settings["size"])
    return None


def _with_template(processor: Any, given: str | None) -> Any:
    """A processor and its tokenizer with the run's chat template."""
    from lora_lightning.data.chats.templates import choose_template
    from lora_lightning.data.media.processors import templated_tokenizer

    if given is not None:
        processor.chat_template = choose_template(processor.tokenizer, given)[0]
    templated_tokenizer(processor)
    return processor


@contextmanager
def ending_turns(model: Any, files: Mapping[str, bytes]) -> Iterator[None]:
    """Inside, generation ends with the token that ends a turn of the chat template too; afterwards it is as before."""
    config: Any = getattr(model, "generation_config", None)
    end = _end_of_turn(files) if config is not None else None
    if end is None:
        yield
        return
    before = config.eos_token_id
    known = before if isinstance(before, list) else [] if before is None else [before]
    if end not in known:
        config.eos_token_id = [end, *known] if known else end
    try:
        yield
    finally:
        config.eos_token_id = before


@contextmanager
def any_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Inside, `save_pretrained` takes the model whatever its generation config is; afterwards that is in the folder.

    Many published models have one with settings of sampling and no sampling: transformers reads it with a warning, and
    refuses to write it.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    config = getattr(model, "generation_config", None)
    if not model.can_generate() or _can_be_saved(config):
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
    if config is None:
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    else:
        config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _can_be_saved(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except (AttributeError, ValueError):  # none at all, or one that transformers does not write
        return False
    return True


def _end_of_turn(files: Mapping[str, bytes]) -> int | None:
    from transformers import AutoTokenizer

    from lora_lightning.data.chats.templates import end_of_turn

    if "tokenizer_config.json" not in files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_below(files, Path(folder))
        try:
            return end_of_turn(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        except (OSError, ValueError):
            return None


def _base_files(name: str) -> dict[str, bytes]:
    """Files of what `from_pretrained` finds beside the weights; the first that holds the others, or all that do not."""
    import transformers

    from lora_lightning.data.media.processors import load_processor

    found: dict[str, bytes] = {}
    try:
        folder = resolve(name, needs=None) if name else ""
    except LoraLightningError:
        return found
    if folder:
        with suppress(Exception):  # it has none for images or sounds
            found = saved_files(load_processor(folder, "model.pretrained"))
    for kind in _KINDS if folder else ():
        with suppress(Exception):  # there is none, or the library that it takes is not installed
            found = {
                **saved_files(getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)),
                **found,
            }
    return found


def saved_files(what: Any) -> dict[str, bytes]:
    """The files that a tokenizer or processor writes, by path in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        what.save_pretrained(folder)
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_below(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by path into a folder that is there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
