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
    sharded model nothing is said, nor of formats of one server, which `servers.preview` looks at.

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
            writer = find_writer(form, None)
            check = getattr(writer, "check", None)
            if check is not None and not hasattr(writer, "SERVER"):  # that is said to whoever serves with it
                check(source)
        except ExportError as error:
            found[form] = str(error)
        except PluginError:  # its own export says so
            continue
    return found
