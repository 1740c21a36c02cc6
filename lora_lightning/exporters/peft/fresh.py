"""An export in peft's format is opened by peft in a process of its own, on the base model as it lies on the disk.

    python -m lora_lightning.exporters.peft.fresh ADAPTER BASE EXPORT REFERENCE

REFERENCE is a safetensors file: inputs as `in.<name>`, the output that must come out as `out`, and in its metadata the
size of the vocabulary, 0 where it did not grow. The last line printed is the verdict in JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import save_file

from lora_lightning.errors import ExportError, LoraLightningError
from lora_lightning.exporters.peft import verify as verifying
from lora_lightning.exporters.report import Origin
from lora_lightning.exporters.source import Source


def verify_afresh(source: Source, folder: Path, origin: Origin, truncated: bool) -> verifying.Verdict:
    """Start such a process and read its verdict.

    Raises:
        ExportError: peft cannot open the export there, or computes something else.
    """
    found = verifying.reference(source, folder, truncated)
    if isinstance(found, str):
        return verifying.Verdict(found, ran=False)
    inputs, expected = found
    size = max((layer.num_embeddings for layer in source.extended.values()), default=0)
    with tempfile.TemporaryDirectory() as place:
        tensors = {f"in.{key}": value.cpu().contiguous() for key, value in inputs.items()}
        save_file({**tensors, "out": expected[0].cpu().contiguous()}, f"{place}/reference", {"vocabulary": str(size)})
        arguments = [str(origin.adapter), origin.base, str(folder), f"{place}/reference"]
        command = [sys.executable, "-W", "ignore", "-m", "lora_lightning.exporters.peft.fresh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return verifying.Verdict(f"the process that was to open it failed: {reason[:300]}", ran=False)
    verdict = json.loads(lines[-1])
    if "error" in verdict:
        raise ExportError(verdict["error"])
    return verifying.Verdict(verdict["by"], ran=True)


def main(adapter: str, base: str, export: str, reference: str) -> dict[str, Any]:
    """The verdict: `by`, or `error`."""
    from lora_lightning.exporters.from_folder import load_base
    from lora_lightning.models.pretrained import resolve
    from lora_lightning.storage.stored import read_folder

    stored = read_folder(adapter)
    model = cast(Any, load_base(resolve(base, field="the base model"), stored, "the base model"))
    with safe_open(reference, framework="pt") as file:
        size = int(file.metadata()["vocabulary"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if size > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(size, mean_resizing=False)
    inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    try:
        opened = verifying.load_with_peft(model.eval(), Path(export))
        found = verifying.outputs(opened, inputs)
        return {"by": verifying.compare([tensors["out"]], found, f"{verifying.version()} in a process of its own").by}
    except LoraLightningError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": verifying.not_opened(verifying.version(), error)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
