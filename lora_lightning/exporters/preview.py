"""What an export will be refused, known before anything is trained: from layers, heads and settings alone."""

from __future__ import annotations

from torch import nn

from lora_lightning.errors import AdapterStateError, ExportError, PluginError
from lora_lightning.exporters.export import find_writer
from lora_lightning.exporters.source import find
from lora_lightning.plugins import registry


def refusals(model: nn.Module, name: str = "default") -> dict[str, str]:
    """Formats that will refuse an adapter as it is, each with the reason and the way out.

    What only trained values show, such as an update that has no exact low rank, is found by the export itself. Of a
    sharded model nothing is said.

    Args:
        model: a model with adapters.
        name: which adapter.
    """
    try:
        source = find(model, name)
    except (AdapterStateError, ExportError):
        return {}
    found = {}
    for form in registry().formats:
        try:
            check = getattr(find_writer(form, None), "check", None)
            if check is not None:
                check(source)
        except ExportError as error:
            found[form] = str(error)
        except PluginError:  # its own export says so
            continue
    return found
