"""Uploading an export to the hub, through huggingface_hub, without the paths of this machine."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from lora_lightning.errors import ExportError
from lora_lightning.exporters.report import ExportReport
from lora_lightning.models.published import shown_name

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."


def check_push(repository: str) -> None:
    """Look at what can be known before anything is exported.

    Raises:
        ExportError: no OWNER/NAME, or no token.
    """
    from huggingface_hub import get_token

    if not _ID.fullmatch(repository):
        raise ExportError(
            f'--push is "{repository}"; it must be OWNER/NAME, both of letters, digits, "-", "_" and ".".'
        )
    if get_token() is None:
        raise ExportError(f'--push "{repository}": there is no token of the hub. {_LOGIN}')


def push(report: ExportReport, repository: str, private: bool = False) -> str:
    """Upload a verified export as one commit; the repository is made where it is not there.

    In the JSON files that are uploaded, absolute paths are shortened to their last part.

    Args:
        report: of the export.
        repository: OWNER/NAME.
        private: whether a new repository is private; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        ExportError: the export was not verified; no right, no network, or the hub refuses. The export is intact.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if report.difference is None or not report.verified_by:
        raise ExportError(f'--push "{repository}": the export was not verified, so it stays here. {report.not_run}')
    check_push(repository)
    api, what = HfApi(), f'--push "{repository}"'
    kept = f'The export is in "{report.directory}".'
    try:
        with tempfile.TemporaryDirectory() as folder:
            _public(report.directory.expanduser().resolve(), Path(folder))
            api.create_repo(repository, private=private or None, exist_ok=True)
            message = f"{report.format} export by lora_lightning"
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = f" The token has no right to write there. {_LOGIN}" if code in (401, 403) else ""
        raise ExportError(f"{what}: the hub answers {code}: {_line(error)}{advice} {kept}") from error
    except ValueError as error:  # metadata of a card that a person wrote
        raise ExportError(f"{what}: the hub refuses: {_line(error)} {kept}") from error
    except Exception as error:  # of the library for HTTP, which huggingface_hub has changed before
        raise ExportError(f"{what}: the hub cannot be reached at {api.endpoint}: {_line(error)} {kept}") from error
    return f"{api.endpoint}/{repository}"


def _public(folder: Path, into: Path) -> None:
    """Links to the files of an export, and its JSON files without absolute paths."""
    for path in sorted(folder.rglob("*")):
        there = into / path.relative_to(folder)
        if path.is_dir():
            there.mkdir()
        elif path.suffix == ".json" and (shorter := _shorter(path)) is not None:
            there.write_text(shorter, encoding="utf-8")
        else:
            there.symlink_to(path)


def _shorter(path: Path) -> str | None:
    """A JSON file without absolute paths of this machine; None where it has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    public = _without_paths(content)
    return None if public == content else json.dumps(public, indent=2, ensure_ascii=False) + "\n"


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    is_path = isinstance(value, str) and value.startswith("/") and len(value) < 4096 and "\n" not in value
    return shown_name(value) if is_path and Path(value).exists() else value


def _line(error: Exception) -> str:
    """An error's words on one line, ending with a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
