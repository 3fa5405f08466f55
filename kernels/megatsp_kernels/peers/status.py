"""What a wait that failed leaves for the host, and the error it becomes."""

import torch
from torch import Tensor

# What was waited for, by the code that a kernel writes.
READY, PULLED, ARRIVED, FREED = 1, 2, 3, 4
_FLAGS = {
    READY: "slice of epoch {target}",
    PULLED: "epoch {target} copied from here",
    ARRIVED: "gradient tile {target} written here",
    FREED: "summing program {target} of what was written there",
}


class PeerError(RuntimeError):
    """A rank waited for another one in vain; what it should have got is NaN."""


class Status:
    """The first wait of this rank that failed.

    tensor: int32 [4]: code (0: none), rank waited for, value wanted, value seen. On a GPU it is pinned
    host memory: kernels write it, the host reads it without waiting for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor: Tensor = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = device

    def check(self, rank: int, timeout_s: float) -> None:
        """Raises PeerError, naming the rank waited for and its flag, if a wait has failed."""
        if not self.tensor[0]:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the rest of the entry is there too
        code, peer, target, seen = self.tensor.tolist()
        flag = _FLAGS[code].format(target=target)
        raise PeerError(
            f"rank {rank} waited {timeout_s:g} s for rank {peer}'s flag '{flag}': it is at {seen}. Look for "
            f"that rank's own error first; ranks are numbered within their tsp group"
        )
