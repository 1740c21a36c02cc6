"""Data modules: texts with a label, words with tags, prompts with completions, plain text, and the built-in PyDocs."""

from lora_lightning.data.completions import Completions
from lora_lightning.data.labelled import LabelledText
from lora_lightning.data.loader import ResumableLoader
from lora_lightning.data.plain import PlainText
from lora_lightning.data.pydocs import PyDocs
from lora_lightning.data.tagged import TaggedWords

__all__ = ["Completions", "LabelledText", "PlainText", "PyDocs", "ResumableLoader", "TaggedWords"]
