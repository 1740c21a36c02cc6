"""Data modules: texts with labels, tags or masks, pairs, completions, translations, chats, images, PyDocs."""

from lora_lightning.data.batches.loader import ResumableLoader
from lora_lightning.data.chat import Chat
from lora_lightning.data.completions import Completions
from lora_lightning.data.images import LabelledImages
from lora_lightning.data.labelled import LabelledText
from lora_lightning.data.masked import MaskedText
from lora_lightning.data.multi_label import MultiLabelText
from lora_lightning.data.pairs import TextPairs
from lora_lightning.data.plain import PlainText
from lora_lightning.data.pydocs import PyDocs
from lora_lightning.data.tagged import TaggedWords
from lora_lightning.data.text_to_text import TextToText

__all__ = [
    "Chat",
    "Completions",
    "LabelledImages",
    "LabelledText",
    "MaskedText",
    "MultiLabelText",
    "PlainText",
    "PyDocs",
    "ResumableLoader",
    "TaggedWords",
    "TextPairs",
    "TextToText",
]
