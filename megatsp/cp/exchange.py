"""What an exchange of keys and values owes to the attention that uses it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Arrival:
    """Keys and values of consecutive ranks of the sequence, as they landed.

    kv: [n, 2, B, K, T/S, d], of the ranks first .. first + n - 1, each with its two zigzag chunks.
    """

    kv: Tensor
    first: int


class Exchange(Protocol):
    """Brings the others' keys and values, and takes the gradients of them home.

    Made with this rank's keys and values, when its first transfer is posted; then `arrivals`; in
    the backward `send` after each; then `total`.
    """

    count: int  # of arrivals

    def arrivals(self) -> Iterator[Arrival]:
        """What comes next is posted before. Keeps nothing of what was yielded: nor should the caller.

        This rank's own keys and values may be among them: it has attended to those already.
        """

    def send(self, gradient: Tensor) -> None:
        """Takes the fp32 gradient of what was yielded last, shaped like it; it is overwritten."""

    def total(self, own: Tensor) -> Tensor:
        """`own` plus what all ranks sent for this rank's keys and values: fp32 [2, B, K, T/S, d]."""
