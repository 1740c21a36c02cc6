from lora_lightning.testing import MethodContract, BASE_KINDS
from ll_dora import DoRA
NO_EMB = tuple(k for k in BASE_KINDS if k != "Embedding")
class TestDoRA(MethodContract):
    method = DoRA(rank=2, alpha=4.0)
class TestDrop(MethodContract):
    method = DoRA(rank=2, alpha=4.0, dropout=0.3)
    base_kinds = NO_EMB
class TestFull(MethodContract):
    method = DoRA(rank=2, alpha=4.0, detach_norm=False)
class TestMag(MethodContract):
    method = DoRA(mode="magnitude")
    random_start = False
