"""What the first rank finds is every rank's, errors too: here of a process without ranks."""

import pytest

from megatsp.checkpoint.agree import on_first
from megatsp.checkpoint.manifest import Damaged


def failing(error: Exception) -> int:
    raise error


def test_what_the_first_rank_finds_is_given():
    assert on_first(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Damaged("it is damaged"), Damaged, "^it is damaged$"),
        (ValueError("a mistake"), ValueError, "^a mistake$"),
        (KeyError("a bug"), RuntimeError, "^rank 0: KeyError: 'a bug'$"),
        (OSError("a disk"), RuntimeError, "^rank 0: OSError: a disk$"),
    ],
)
def test_its_error_is_raised(error, kind, message):
    with pytest.raises(Exception, match=message) as caught:
        on_first(lambda: failing(error))
    assert type(caught.value) is kind and caught.value.__cause__ is error
