from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapted_models import METHOD, adapted
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import TinyMLP


def test_adapters_follow_dtype_and_mode_of_their_layer() -> None:
    model = TinyMLP().to(torch.bfloat16).eval()
    ll.inject(model, METHOD)
    assert {p.dtype for p in adapters_named(model, "default")["first"].parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert not any(p.dtype == torch.float32 for name, p in model.named_parameters() if ".base." in name)


def test_settings_a_layer_cannot_have_name_the_layer() -> None:
    with pytest.raises(SettingsError, match=r"LoRA on 0: dropout is 0.1; an embedding has token ids as input"):
        ll.inject(nn.Sequential(nn.Embedding(9, 4)), LoRA(rank=2, dropout=0.1), ["0"])
    with pytest.raises(SettingsError, match=r'overrides\["second"\]: LoRA has no "rnk". Did you mean "rank"\?'):
        ll.inject(TinyMLP(), METHOD, overrides={"second": {"rnk": 4}})
    with pytest.raises(SettingsError, match=r"LoRA.rank is 0"):
        ll.inject(TinyMLP(), METHOD, overrides={"second": {"rank": 0}})


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(AdapterStateError, match='has an adapter "default" already; eject it or choose another name'):
        adapted(model=adapted())


def test_a_merged_model_takes_no_further_adapter() -> None:
    model = adapted()
    ll.merge(model)
    with pytest.raises(AdapterStateError, match="first: default is merged; call unmerge first"):
        adapted("b", model)


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterStateError, match=r"0\.weight is on the meta device, without a value; load the weights"):
        ll.inject(model, METHOD)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused() -> None:
    model = fully_shard(TinyMLP(), mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(AdapterStateError, match="the model is sharded already; inject adapters before fully_shard"):
        ll.inject(model, METHOD)
