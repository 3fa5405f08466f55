import os

import numpy as np
import pytest

from megatsp.data.mapped import map_file


@pytest.fixture
def file(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "numbers")
    return tmp_path / "numbers"


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_is_the_file_and_holds_no_handle(file):
    before = handles()
    mapped = [map_file(file, np.dtype("<u2"), 1000) for _ in range(50)]
    assert handles() == before
    assert all(np.array_equal(one, np.arange(1000)) and one.dtype == np.dtype("<u2") for one in mapped)
    assert np.array_equal(map_file(str(file), "<u2", 3), [0, 1, 2])


def test_it_lives_as_long_as_a_view_of_it(file):
    view = map_file(file, "<u2", 1000)[500:600].view("<u1")[::2]
    file.unlink()
    assert np.array_equal(view, np.arange(500, 600) % 256)


def test_it_goes_with_its_last_view(file):
    def maps() -> int:
        with open("/proc/self/maps") as lines:
            return sum(str(file) in line for line in lines)

    mapped = map_file(file, "<u2", 1000)
    view = mapped[3:]
    assert maps() == 1
    del mapped
    assert maps() == 1
    del view
    assert maps() == 0


def test_it_cannot_be_written_to(file):
    with pytest.raises(ValueError, match="read-only"):
        map_file(file, "<u2", 1000)[0] = 1


def test_of_nothing(file):
    assert len(map_file(file, "<u2", 0)) == 0


def test_what_is_not_there(file):
    with pytest.raises(FileNotFoundError):
        map_file(f"{file}x", "<u2", 1)
    with pytest.raises(OSError, match="fewer than 2002 bytes"):
        map_file(file, "<u2", 1001)
    with pytest.raises(OSError, match="No such device|Permission"):
        map_file(file.parent, "<u2", 1)
