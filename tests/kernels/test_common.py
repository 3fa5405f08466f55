"""What the kernels share: bf16 products are refused where they would be wrong, chips without tiles too."""

import pytest
import torch
from checks import DEVICE
from megatsp_kernels import common
from megatsp_kernels.attention import attention
from megatsp_kernels.linear_cross_entropy import linear_cross_entropy
from megatsp_kernels.streamed import matmul_pull

X, HEADS = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU multiplies bf16 rightly")
@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(HEADS, HEADS, HEADS, 1.0),
        lambda: linear_cross_entropy(X, X, torch.zeros(4, dtype=torch.int64)),
        lambda: matmul_pull(X, X.t()),
    ],
)
def test_the_interpreter_multiplies_no_bf16(call):
    with pytest.raises(ValueError, match="Triton's interpreter multiplies bf16 matrices wrongly: take fp32"):
        call()


def test_a_chip_without_tiles_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(common, "chip_of", lambda device: "sm_80")
    with pytest.raises(ValueError, match="have tiles for gfx942, gfx950, sm_90; this GPU is sm_80"):
        common.target_of(torch.device("cuda"))


def test_tensors_that_overlap_themselves_are_told():
    assert common.overlaps_itself(torch.zeros(1, 4).expand(3, 4))
    assert not common.overlaps_itself(torch.zeros(1, 4)) and not common.overlaps_itself(torch.zeros(3, 4).t())
