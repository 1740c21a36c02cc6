"""Voices: a base model and several adapters on it, of which one answers at a time.

The base is loaded once. Each adapter has the tokenizer and the chat template that it was trained with. Weights are
merged only where they are float32, since a small update is lost in half precision.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_lightning.cli.answers.run_data import RunData, run_data
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.media.encoding import Encode, writes_parts
from lora_lightning.data.media.parts import Media
from lora_lightning.data.media.processors import load_processor, sampling_rate, templated_tokenizer
from lora_lightning.data.media.reading import read_media
from lora_lightning.data.tokens.causal import start_ids
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import (
    AdapterStateError,
    DataError,
    LoraLightningError,
    ModelError,
    SettingsError,
    did_you_mean,
)
from lora_lightning.exporters.companions import run_processor
from lora_lightning.exporters.from_folder import load_base, stored_whole, with_below
from lora_lightning.exporters.peft.rules import CONFIG
from lora_lightning.exporters.trained_adapter import OURS, TrainedAdapter, find_adapter
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import injected_root, iter_adapters, stack_of
from lora_lightning.injection.switches import set_active
from lora_lightning.models.loading import load_model
from lora_lightning.models.pretrained import PACKAGE, resolve
from lora_lightning.models.random import config_of, is_random
from lora_lightning.models.tasks import find_task
from lora_lightning.storage.stored import FILE

BASE = "base"
"""Label of the base model."""
TRIALS = 6
"""Tokens that merged and unmerged weights are timed with."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Voice:
    """The base model, or one adapter on it."""

    label: str
    tokenizer: Any = field(repr=False)
    active: tuple[str, ...] = ()
    """Adapters that are active when it speaks, by their names in the model."""
    adapter: TrainedAdapter | None = None
    data: RunData = field(default_factory=RunData)
    """How it was asked while it was trained."""
    processor: Any = field(default=None, repr=False)
    """What prepares images and sounds for it, where its template writes content in parts."""
    without: str = "it has no processor"
    """Why it reads texts alone, where it does."""

    @property
    def in_turns(self) -> bool:
        """Whether a text is what a user says in a conversation."""
        return bool(self.tokenizer.chat_template) and self.data.in_turns

    @property
    def renderer(self) -> Renderer:
        """Its chat template, with the variables that its run gave it."""
        plain = Renderer(self.tokenizer, f"of {self.label}", options=self.data.template_options)
        return plain if self.processor is None else replace(plain, encode=Encode(self.processor, self.read))

    def read(self, media: Media) -> Any:
        """An image or a sound as the processor takes it; raises `RowError`."""
        return read_media(media, sampling_rate(self.processor))


class Voices:
    """A base model with adapters.

    Args:
        names: run folders, adapter folders of this library or of peft, hub ids, or the base model's name alone.
        pretrained: the base model; None takes what the adapters name.
        dtype: of the base weights, or "auto" for that of its files.
        device: where it computes; None takes an accelerator if there is one.

    Raises:
        AdapterFileError: an adapter that cannot be read or does not fit.
        ModelError: no base model, adapters of several, or one that writes no texts.
        SettingsError: an unknown dtype.
    """

    def __init__(
        self, names: Sequence[str], pretrained: str | None = None, dtype: str = "auto", device: str | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise SettingsError(f'--dtype is "{dtype}".{did_you_mean(dtype, DTYPES)} Known: {", ".join(DTYPES)}.')
        adapters, bases = _told_apart(names)
        self.base = _base_of(adapters, bases, pretrained)
        self.model: Any = _load(self.base, adapters, dtype if dtype == "auto" else getattr(torch, dtype))
        if not self.model.can_generate():
            raise ModelError(
                f"{type(self.model).__name__} writes no texts; predict --run RUN says what it predicts of examples."
            )
        for number, one in enumerate(adapters, 1):
            one.load(self.model, f"a{number}")
        self.model.to(device or _accelerator()).eval()
        own = _tokenizer(self.base, adapters)
        owned = [_own(one) for one in adapters]
        media, without = _processor(self.base, self.model.config)
        media = media or next((processor for _, processor in owned if processor is not None), None)
        self.voices = {BASE: _voice(BASE, own, media, without)}
        for number, (label, one) in enumerate(zip(_labels(adapters), adapters, strict=True), 1):
            active = stack_of(injected_root(self.model), f"a{number}")
            known = {"active": active, "adapter": one, "data": run_data(Path(one.folder))}
            tokenizer, processor = owned[number - 1]
            self.voices[label] = _voice(label, tokenizer or own, processor or media, without, **known)
        self.merges = False
        """Whether weights are merged while an adapter speaks."""
        self.current = self.voices[BASE]
        self.use(next(reversed(self.voices)) if len(adapters) == 1 else self._labels()[0])

    def _labels(self) -> list[str]:
        return [label for label in self.voices if label != BASE] or [BASE]

    @property
    def is_seq2seq(self) -> bool:
        """Whether the model reads a text and writes another, in place of going on with it."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def room(self, new_tokens: int) -> int | None:
        """Most tokens of a prompt beside so many new ones, which get half of the positions at most; None for no end."""
        config = self.model.config.get_text_config()
        longest: int | None = getattr(config, "max_position_embeddings", None)
        return None if longest is None or self.is_seq2seq else longest - min(new_tokens, longest // 2)

    def find(self, name: str) -> Voice:
        """The voice of a label, or of its number from 1.

        Raises:
            SettingsError: there is none.
        """
        labels = self._labels()
        if name.isdigit() and 1 <= int(name) <= len(labels):
            return self.voices[labels[int(name) - 1]]
        if name not in self.voices:
            near = did_you_mean(name, self.voices)
            raise SettingsError(f'there is no adapter "{name}".{near} Loaded: {", ".join(self.voices)}.')
        return self.voices[name]

    def use(self, name: str) -> Voice:
        """Let a voice speak, its weights merged if `merges`."""
        voice = self.find(name)
        if len(self.voices) > 1:
            unmerge(self.model)
            set_active(self.model, voice.active)
            if self.merges and voice.active:
                try:
                    merge(self.model)
                except AdapterStateError:
                    self.merges = False
        self.current = voice
        return voice

    def mergeable(self) -> str:
        """Why the weights of the voice that speaks are not to be merged; empty where they can be."""
        layers = [layer for _, layer in iter_adapters(self.model) if layer.active]
        if not layers:
            return "the base model speaks"
        if any(layer.base_layer.dtype not in (torch.float32, torch.float64) for layer in layers):
            return "a small update would be lost in half precision"
        try:
            merge(self.model)
        except AdapterStateError as error:
            return str(error)
        unmerge(self.model)
        return ""

    def merge_all(self) -> str:
        """Merge from here on where that can be; what is to be said of it."""
        why = self.mergeable()
        self.merges = not why
        self.use(self.current.label)
        return f"unmerged: {why}" if why else "merged into the weights"

    def choose(self) -> str:
        """Measure whether merged weights are faster for the voice that speaks, and go on so; what is to be said."""
        if why := self.mergeable():
            return f"unmerged: {why}"
        label, times = self.current.label, {}
        for merged in (False, True):
            self.merges = merged
            self.use(label)
            times[merged] = self._milliseconds()
        self.merges = times[True] < times[False]
        self.use(label)
        found = f"{times[True]:.1f} ms a token merged, {times[False]:.1f} unmerged"
        return f"{'merged' if self.merges else 'unmerged'}: {found}, measured just now"

    @torch.no_grad()
    def _milliseconds(self) -> float:
        ids = torch.full((1, 8), 1, device=self.model.device)
        inputs = {"decoder_input_ids": ids} if self.is_seq2seq else {}
        best = float("inf")
        for _ in range(TRIALS):
            began = time.perf_counter()
            self.model(input_ids=ids, **inputs)
            if ids.is_cuda:
                torch.cuda.synchronize()
            best = min(best, 1000 * (time.perf_counter() - began))
        return best


def _told_apart(names: Sequence[str]) -> tuple[list[TrainedAdapter], list[str]]:
    """Adapters, and names of base models."""
    adapters, bases = [], []
    for name in names:
        if is_base(name):
            bases.append(name)
        else:
            adapters.append(find_adapter(name, "the adapter"))
    return adapters, list(dict.fromkeys(bases))


def is_base(name: str) -> bool:
    """Whether a name is that of a model, and no adapter: its folder, here or in the hub's cache, says so.

    Raises:
        ModelError: no such folder.
    """
    if name.startswith(PACKAGE) or is_random(name):
        return True
    folder = Path(resolve(name, "the model or adapter", needs=None))
    if folder.is_dir():
        return (folder / "config.json").is_file() and not any((folder / file).is_file() for file in (FILE, CONFIG))
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    known = [isinstance(try_to_load_from_cache(name, file), str) for file in (FILE, CONFIG)]
    if any(known) or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return not any(known)
    try:
        return HF_HUB_OFFLINE or not any(file_exists(name, file) for file in (FILE, CONFIG))
    except Exception as error:  # of the network, in many classes
        raise ModelError(
            f'the model or adapter is "{name}"; there is no such folder, and the hub gave nothing: {error}'
        ) from error


def _base_of(adapters: Sequence[TrainedAdapter], bases: Sequence[str], pretrained: str | None) -> str:
    if pretrained is not None:
        return pretrained
    if len(bases) > 1:
        raise ModelError(f"{' and '.join(bases)} are base models; one at a time answers.")
    if bases:
        return bases[0]
    named = {one.base: str(one) for one in adapters}
    if None in named:
        raise ModelError(f"{named[None]} does not say which base model it was trained on; give it with --pretrained.")
    if len(named) > 1:
        told = "; ".join(f'{adapter} on "{base}"' for base, adapter in named.items())
        raise ModelError(f"the adapters were trained on several base models: {told}. Start one chat for each.")
    return str(next(iter(named)))


def _load(base: str, adapters: Sequence[TrainedAdapter], dtype: torch.dtype | str) -> Any:
    import transformers

    transformers.logging.disable_progress_bar()
    ours = [under for one in adapters for under in with_below(one) if under.format == OURS]
    if ours:
        folder = resolve(base, "--pretrained")
        return load_base(folder, stored_whole(ours), "the base model", dtype)
    return load_model(base, find_task(_task(base, adapters)), dtype=dtype)  # type: ignore[arg-type]


def _task(base: str, adapters: Sequence[TrainedAdapter]) -> str:
    """The task whose class a base model is loaded in; adapters of peft were mostly trained on a class of texts."""
    import transformers

    if "SEQ_2_SEQ_LM" in {one.config.get("task_type") for one in adapters}:
        return "seq2seq-lm"
    texts = {"causal-lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING}
    media = {
        "image-text-to-text": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "audio-text-to-text": transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    try:
        config = (
            config_of(base)
            if is_random(base)
            else transformers.AutoConfig.from_pretrained(resolve(base), trust_remote_code=False)
        )
    except (OSError, ValueError):  # said when it is loaded
        return "causal-lm"
    order = {**texts, **media} if adapters else {**media, **texts}
    return next((task for task, mapping in order.items() if type(config) in mapping), "causal-lm")


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found) if found is not None else "cpu"


def _tokenizer(base: str, adapters: Sequence[TrainedAdapter]) -> Any:
    """The base model's tokenizer; where none lies there, the first adapter's."""
    try:
        return load_tokenizer(base)
    except LoraLightningError as error:
        found = next((own for one in adapters if (own := _own_tokenizer(one)) is not None), None)
        if found is None:
            raise DataError(f'no tokenizer lies beside the base model "{base}" or the adapters: {error}') from error
        return found


def _processor(base: str, config: Any) -> tuple[Any, str]:
    """The base model's processor of images or sounds, or None and why there is none."""
    if not any(hasattr(config, f"{part}_config") for part in ("vision", "audio")):
        return None, f"{base} is a model of texts."
    if is_random(base):
        return None, "its base model starts from random numbers, and has no processor beside it."
    try:
        found = load_processor(base, "the base model")
    except LoraLightningError as error:
        return None, str(error)
    templated_tokenizer(found)
    return found, ""


def _voice(label: str, tokenizer: Any, processor: Any, without: str, **known: Any) -> Voice:
    """A voice; it has the processor where its template writes content in parts."""
    voice = Voice(label, tokenizer, processor=processor, without=without, **known)
    if processor is None:
        return voice
    if processor.tokenizer is not tokenizer:
        processor = copy.copy(processor)
        processor.tokenizer = tokenizer
    if voice.in_turns and tokenizer.is_fast and writes_parts(replace(voice, processor=None).renderer):
        return replace(voice, processor=processor)
    why = "its chat template writes no content in parts." if voice.in_turns else "it is asked in plain texts."
    return replace(voice, processor=None, without=why)


def _own_tokenizer(adapter: TrainedAdapter) -> Any:
    """The tokenizer of the run that an adapter lies in, or the one that it brings; None where it has none."""
    return _own(adapter)[0]


def _own(adapter: TrainedAdapter) -> tuple[Any, Any]:
    """The same, and the processor of images or sounds of that run; None where it has none."""
    run = run_processor(adapter.folder)
    found = getattr(run, "tokenizer", run)
    processor = run if hasattr(run, "tokenizer") else None
    template = getattr(found, "chat_template", None)
    if adapter.tokenizer is not None:
        own = load_tokenizer(str(adapter.tokenizer))
        if template and not own.chat_template:
            own.chat_template = template
        return own, processor
    return (found if hasattr(found, "decode") else None), processor


def _labels(adapters: Sequence[TrainedAdapter]) -> list[str]:
    """A short name for each: the last parts of its path that tell it from the others."""
    paths = [
        Path(one.folder).absolute() if Path(one.given).expanduser().exists() else Path(one.given) for one in adapters
    ]
    parts = [[part for part in path.parts if part not in ("adapter", "/")] for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        wanted = all(not label.isdigit() for label in labels) and BASE not in labels
        if wanted and len(set(labels)) == len(labels):
            return labels
    return [f"{number}-{part[-1]}" for number, part in enumerate(parts, 1)]


def plain_prompt(tokenizer: Any, text: str, seq2seq: bool) -> list[int]:
    """Token ids of a text that is gone on with, or, with `seq2seq`, that is read whole."""
    if seq2seq:
        whole: list[int] = tokenizer(text)["input_ids"]
        return whole
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*start_ids(tokenizer), *ids]
