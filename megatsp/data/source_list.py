"""What a list of sources says: `[a]`, `[a, b]` or `[weight, a, weight, b]`."""

from collections.abc import Sequence


def read_sources(given: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """Weights, or None for those of their sizes, and sources, of a data.path.

    Raises:
        ValueError: neither sources alone, nor weight and source in turn; a weight that is not positive.
    """
    numbers = [_number(text) for text in given]
    if all(number is None for number in numbers) and given:
        return None, list(given)
    weights, sources = numbers[::2], given[1::2]
    if (
        not given
        or len(weights) != len(sources)
        or any(w is None for w in weights)
        or any(n is not None for n in numbers[1::2])
    ):
        raise ValueError(
            f"data.path=[{','.join(given)}]: give sources alone, or weight and source in turn: [0.7,a,0.3,b] "
            "(a source whose name is a number: ./NUMBER)"
        )
    positive = [w for w in weights if w is not None and 0 < w < float("inf")]
    if len(positive) != len(weights):
        raise ValueError(
            f"data.path=[{','.join(given)}]: every weight must be above 0; leave out what has none"
        )
    return positive, list(sources)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
