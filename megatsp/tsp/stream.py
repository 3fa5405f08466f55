"""The weight stream: the buckets of a layer, one after another, the next one on its way."""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatsp.comm import Pending
from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.transport import FrozenGradients, Gradients, Transport


class WeightStream:
    """Walks the buckets of one part of one layer.

    At most two buckets exist at a time: the one in use and the one on its way.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._ahead: Pending | None = None

    def prefetch(self, weights: Sequence[Tensor]) -> None:
        """Posts the first bucket of the next walk.

        Raises:
            RuntimeError: if it is posted already: every prefetch must be followed by a walk.
        """
        if self._ahead is not None:
            raise RuntimeError(f"the first {self._transport.part.label} bucket is on its way already")
        self._ahead = self._transport.post(0, weights, None)

    def walk(
        self,
        weights: Sequence[Tensor],
        use: Callable[[int, Bucket, Columns], None],
        following: Callable[[], None] | None = None,
    ) -> None:
        """Calls use(step, bucket, its columns) for each bucket once, in this rank's order.

        weights: this rank's shards. use: computes with the columns and lets go of them. following:
        called before the last bucket is used, to post what is needed after this walk.
        """
        if self._ahead is None:
            self.prefetch(weights)
        pending, self._ahead = self._ahead, None
        transport = self._transport
        for step in range(transport.steps):
            assert pending is not None
            arrived = pending.wait()
            if step + 1 < transport.steps:
                pending = transport.post(step + 1, weights, arrived)
            elif following is not None:
                following()
            # No name for the columns: they would hold this bucket until after the next but one is posted.
            bucket = transport.part.buckets[transport.bucket(step)]
            use(step, bucket, transport.columns(step, weights, arrived))

    @property
    def steps(self) -> int:
        """Buckets of one walk."""
        return self._transport.steps

    def gradients(self, weights: Sequence[Tensor], frozen: bool = False) -> Gradients:
        """Where the gradients of one backward walk go; nowhere if the weights are frozen."""
        return FrozenGradients(weights) if frozen else self._transport.gradients(weights)
