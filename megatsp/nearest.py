"""Suggestions for a word that is not among the valid ones."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: "; did you mean A or B?", or nothing where no valid word is near."""
    likeness = {other: SequenceMatcher(None, word.lower(), other.lower()).ratio() for other in valid}
    best = max(likeness.values(), default=0.0)
    if best < 0.6:
        return ""
    near = sorted(
        (other for other in likeness if likeness[other] > best - 0.08), key=lambda other: -likeness[other]
    )
    return f"; did you mean {' or '.join(near[:3])}?"
