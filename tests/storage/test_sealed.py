from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.storage.sealed import SCHEMA, check_finite, digest, seal, tensor_digest, unseal

DESCRIPTION = {"schema_version": SCHEMA, "name": "ä", "settings": {"alpha": 4.0}}
FILES = {"tokenizer/b.json": b"b", "tokenizer/a.json": b"a"}


def tensors() -> dict[str, Tensor]:
    values = torch.arange(6.0)
    return {
        "b": values.view(2, 3),
        "a": -values.view(2, 3),
        "half": values.bfloat16(),
        "mask": values > 2,
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(7),
    }


def header(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def test_it_holds_what_was_given_and_safetensors_reads_it() -> None:
    content = seal(tensors(), DESCRIPTION, FILES)
    sealed = unseal(content)
    for key, tensor in load(content).items():
        assert torch.equal(tensor, tensors()[key])
        assert torch.equal(sealed.tensors[key], tensor)
        assert sealed.tensors[key].dtype == tensors()[key].dtype
    assert sealed.tensors.keys() == tensors().keys()
    assert sealed.description == DESCRIPTION
    assert sealed.files == {"tokenizer/a.json": digest(b"a"), "tokenizer/b.json": digest(b"b")}


def test_the_same_content_gives_the_same_bytes_in_whatever_order_it_comes() -> None:
    """safetensors itself writes the keys of the metadata in an order that changes from call to call."""
    contents = {
        seal(dict(order(tensors().items())), DESCRIPTION, dict(order(FILES.items())))
        for order in [list, lambda items: reversed(list(items))] * 8
    }
    assert len(contents) == 1
    content = contents.pop()
    assert list(header(content)["__metadata__"]) == ["adapter", "digests", "format"]
    assert int.from_bytes(content[:8], "little") % 8 == 0, "tensors start at a multiple of eight bytes"


def test_a_digest_is_of_type_shape_and_bytes() -> None:
    a = torch.arange(6, dtype=torch.int32)
    others = [a.view(2, 3), a.view(torch.float32), a.view(3, 2), a + 1, a.flip(0), a.view(torch.int16), a[:5]]
    found = [tensor_digest(tensor) for tensor in (a, *others)]
    assert len(set(found)) == len(found)
    assert tensor_digest(a.view(2, 3).mT) == tensor_digest(a.view(2, 3).mT.contiguous())


def written(metadata: dict[str, str], values: dict[str, Tensor] | None = None) -> bytes:
    return save(tensors() if values is None else values, metadata)


def metadata(**changes: Any) -> dict[str, str]:
    """Metadata as `seal` writes them, some of them changed or, with None, left out."""
    found = header(seal(tensors(), DESCRIPTION, FILES))["__metadata__"] | changes
    return {key: value for key, value in found.items() if value is not None}


def swapped() -> dict[str, Tensor]:
    found = tensors()
    found["a"], found["b"] = found["b"], found["a"]
    return found


EDITED = json.dumps({**DESCRIPTION, "settings": {"alpha": 8.0}})
DIGESTS = json.loads(metadata()["digests"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written(metadata(adapter=EDITED)), "the description in it is not what was saved"),
        (written(metadata(), swapped()), "tensor a is not what was saved"),
        (written(metadata(), {**tensors(), "c": torch.zeros(1)}), "tensor c was not saved with the others"),
        (written(metadata(), {k: t for k, t in tensors().items() if k != "mask"}), "tensor mask is missing"),
        (written(metadata(), {**tensors(), "b": tensors()["b"].view(3, 2)}), "tensor b is not what was saved"),
        (written(metadata(), {**tensors(), "number": torch.tensor(7.0)}), "tensor number is not what was saved"),
        (written(metadata(digests=None)), "'digests'"),
        (written(metadata(digests="{}")), "'adapter'"),
        (written(metadata(digests="[]")), "list indices"),
        (written(metadata(digests=None, digestz="{}")), "unknown entry 'digestz'"),
        (written(metadata(adapter=None)), "'adapter'"),
        (written(metadata(adapter='{"schema_version": "2"}')), "schema_version is '2'"),
        (written(metadata(adapter='{"schema_version": 0}')), "schema_version is 0"),
        (written(metadata(adapter='{"schema_version": true}')), "schema_version is True"),
        (written(metadata(adapter="[" * 100_000)), "recursion"),
        (written(metadata(format="pt")), "was not written by this library"),
        (written({}), "was not written by this library"),
    ],
)
def test_what_was_edited_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(Exception, match=message):
        unseal(content)


def test_digests_of_a_description_of_0_1_are_compared_where_there_are_some() -> None:
    old = json.dumps({**DESCRIPTION, "schema_version": 1})
    assert unseal(written(metadata(adapter=old, digests=None))).files is None
    with pytest.raises(ValueError, match="tensor a is not what was saved"):
        unseal(
            written(metadata(adapter=old, digests=json.dumps({**DIGESTS, "adapter": digest(old.encode())})), swapped())
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_value_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    values = torch.ones(2, 3).to(dtype)
    check_finite({"whole": values}, DESCRIPTION)
    values[1, 2] = float("nan")
    for call in (lambda: check_finite({"x.y": values}, DESCRIPTION), lambda: seal({"x.y": values}, DESCRIPTION, {})):
        with pytest.raises(AdapterFileError, match=r"NaN or infinite in x\.y"):
            call()
