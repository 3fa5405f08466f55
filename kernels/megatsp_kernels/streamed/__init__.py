"""Products that move weights and gradients between ranks' memories while they compute."""

from megatsp_kernels.streamed.exchange import Collected, Exchange, Posted, layout_for
from megatsp_kernels.streamed.op import matmul_pull, matmul_scatter, publish, pull, reduce
from megatsp_kernels.streamed.probe import probe

__all__ = [
    "Collected",
    "Exchange",
    "Posted",
    "layout_for",
    "matmul_pull",
    "matmul_scatter",
    "probe",
    "publish",
    "pull",
    "reduce",
]
