"""How the data of an adapter's run made prompts, as the run's config.yaml says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.data.prompt_formats import PromptFormat, layout_of

CONVERSATIONS = ("Chat", "MediaChat")
"""Data modules that make turns."""


@dataclass(frozen=True)
class RunData:
    """The data module of a run; empty where no run is known."""

    kind: str = ""
    """Name of its class."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_turns(self) -> bool:
        """Whether a chat template, where there is one, wrote the prompts."""
        return self.kind in ("", *CONVERSATIONS)

    @property
    def layout(self) -> PromptFormat | None:
        """The layout of prompts that are built from columns."""
        if self.kind != "Completions":
            return None
        return layout_of(self.settings.get("format"), self.settings.get("prompt_template"))

    @property
    def prefix(self) -> str:
        """What stands before each source text."""
        return str(self.settings.get("prefix") or "") if self.kind == "TextToText" else ""

    @property
    def template_options(self) -> dict[str, Any]:
        """Variables of the chat template beside the conversation."""
        return dict(self.settings.get("chat_template_kwargs") or {}) if self.in_turns else {}

    @property
    def tools(self) -> str:
        """Column of tool descriptions."""
        return str(self.settings.get("tools") or "tools")

    @property
    def columns(self) -> list[str]:
        """Columns that may hold the prompts."""
        return [self.settings[name] for name in ("messages", "prompt", "source") if self.settings.get(name)]

    def asked(self, text: str, where: str) -> str:
        """The prompt for a text that somebody asks; raises `DataError` where it is made of several columns."""
        return f"{self.prefix}{text}" if self.layout is None else self.layout.of_text(text, where)


def run_data(folder: Path) -> RunData:
    """The data that the adapter in `folder` was trained on, where a run's config.yaml lies beside it."""
    try:
        data = yaml.safe_load((folder.resolve().parent / "config.yaml").read_text(encoding="utf-8"))["data"]
        return RunData(str(data["class_path"]).rpartition(".")[2], dict(data.get("init_args") or {}))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return RunData()
