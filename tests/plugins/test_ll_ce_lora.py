from ll_ce_lora import CELoRA
from lora_lightning.testing import MethodContract, BASE_KINDS
LINEAR = ("Linear", "Linear without bias", "Conv1D")
class TestCELoRA(MethodContract):
    method = CELoRA(rank=2, alpha=4.0, kept=0.5, svd_rank=1)
    base_kinds = LINEAR
