"""A model's own processor: its tokenizer, and what prepares images and sounds, in Pillow and numpy alone.

A processor that takes videos too asks for torchvision to be made at all. What stands in its place here keeps the
video settings for whoever saves it, and prepares none, so that every machine prepares images alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import PushToHubMixin, cached_file

from lora_lightning.data.media.parts import KINDS
from lora_lightning.errors import DataError
from lora_lightning.models.pretrained import resolve


class WithoutVideos(PushToHubMixin):  # type: ignore[misc]
    """The settings of a video processor, which prepares nothing.

    Args:
        settings: Those of its file.
    """

    _auto_class = None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.__dict__.update(settings)
        self.model_input_names: list[str] = []
        self._settings = dict(settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - whatever it is asked
        """Refuse."""
        raise DataError("videos are not read; give their frames as images.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return dict(self._settings)


def load_processor(name: str | None, setting: str) -> Any:
    """The processor that `name` means, with a token to pad with.

    Args:
        name: Path, hub id or `pkg:IMPORT_NAME/FOLDER`.
        setting: What names it, for messages.

    Raises:
        DataError: no name, no processor of images or sounds there, or a package that it needs is not installed.
        ModelError: the folder or package does not exist.
    """
    if name is None:
        raise DataError(
            f"{setting} is null; set it to the path or hub id of a processor (the command line copies "
            "model.pretrained; a random: model has none)."
        )
    folder = resolve(name, setting, needs=None)
    try:
        processor = _composed(folder)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f'{setting} is "{name}", whose processor needs a package: {reason} pip install "lora-lightning[vision]"'
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f'{setting} is "{name}"; no processor can be read there: {reason}') from error
    if not marks(processor):
        raise DataError(
            f'{setting} is "{name}"; {type(processor).__name__} has no token that stands for an image or a sound in a '
            "text. Name a processor of a model that reads both."
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def marks(processor: Any) -> dict[str, str]:
    """The token that stands for one image or one sound in a rendered text, by kind, where the processor has one."""
    found = {kind: getattr(processor, f"{kind}_token", None) for kind in KINDS}
    return {kind: token for kind, token in found.items() if isinstance(token, str)}


def templated_tokenizer(processor: Any) -> Any:
    """The processor's tokenizer, which writes the processor's chat template from here on where that has one."""
    template = processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    processor.tokenizer.chat_template = template or processor.tokenizer.chat_template
    return processor.tokenizer


def sampling_rate(processor: Any) -> int:
    """Samples a second of the sounds that it takes; 0 where it takes none."""
    return int(getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 0))


def without_videos(kind: Any) -> Any:
    """The class of a processor; of one that takes videos one of its name that takes `WithoutVideos` in their place."""
    if "video_processor" not in kind.get_attributes():
        return kind

    def check(self: Any, name: str, component: Any) -> Any:
        if isinstance(component, WithoutVideos):
            return WithoutVideos
        return kind.check_argument_for_proper_class(self, name, component)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _composed(folder: str) -> Any:
    settings, _ = transformers.ProcessorMixin.get_processor_dict(folder)
    kind = without_videos(getattr(transformers, _class_name(folder, settings)))
    made = [_component(name, folder, settings) for name in kind.get_attributes()]
    processor = kind.from_args_and_dict(made, settings)
    return processor[0] if isinstance(processor, tuple) else processor


def _class_name(folder: str, settings: Mapping[str, Any]) -> str:
    """The processor's class as a file names it, else that of the model's type."""
    if name := settings.get("processor_class"):
        return str(name)
    with suppress(OSError, ValueError):
        found, _ = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", return_unused_kwargs=True)
        if name := getattr(found, "processor_class", None):
            return str(name)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return str(PROCESSOR_MAPPING_NAMES[config.model_type])


def _component(name: str, folder: str, settings: Mapping[str, Any]) -> Any:
    if name == "tokenizer":
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if name == "image_processor":
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    if name == "video_processor":
        return WithoutVideos(settings.get(name) or _video_file(folder))
    return transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)


def _video_file(folder: str) -> dict[str, Any]:
    """The settings that lie in a file of their own; none where there is no such file."""
    with suppress(OSError):
        if (file := cached_file(folder, "video_preprocessor_config.json")) is not None:
            return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    return {}
