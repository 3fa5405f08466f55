"""Where things lie in the buffer that each rank of a group shares: the same on every rank."""

from dataclasses import dataclass

LINE = 128  # bytes from one flag to the next: no two share a cache line
_ALIGNMENT = 256  # bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Byte offsets, computed from sizes alone.

    flags | two slots of one weight slice | two slots of one gradient slice from each rank

    A flag is an int32 that only grows, and lies with the rank that waits for it. Those of rank p:

        ready[r, i]   epoch whose piece i rank r has published
        pulled[r, i]  epoch whose piece i rank r has copied out of p's slot
        arrived[r]    gradient tiles that rank r has written here, counted
        freed[r]      programs of rank r that have summed what p wrote there, counted
        failed        whether a wait of p has failed: the others then end at once

    ranks: D. pieces: how many programs publish a slice, each a piece of its rows. slice_bytes: of the
    largest slice [h/D, R] in the compute dtype. gradient_bytes: of the largest in fp32.
    """

    ranks: int
    pieces: int
    slice_bytes: int
    gradient_bytes: int

    @property
    def ready(self) -> int:
        return 0

    @property
    def pulled(self) -> int:
        return self.ready + self.ranks * self.pieces * LINE

    @property
    def arrived(self) -> int:
        return self.pulled + self.ranks * self.pieces * LINE

    @property
    def freed(self) -> int:
        return self.arrived + self.ranks * LINE

    @property
    def failed(self) -> int:
        return self.freed + self.ranks * LINE

    @property
    def flags_bytes(self) -> int:
        return self.failed + LINE

    def slot(self, epoch: int) -> int:
        """Of the weight slice published in this epoch."""
        return _aligned(self.flags_bytes) + epoch % 2 * _aligned(self.slice_bytes)

    def staging(self, epoch: int) -> int:
        """Of rank 0's gradient slice in this epoch; the others' follow, `source_bytes` apart."""
        return (
            _aligned(self.flags_bytes)
            + 2 * _aligned(self.slice_bytes)
            + epoch % 2 * self.ranks * self.source_bytes
        )

    @property
    def source_bytes(self) -> int:
        return _aligned(self.gradient_bytes)

    @property
    def num_bytes(self) -> int:
        return self.staging(0) + 2 * self.ranks * self.source_bytes
