"""Files in memory without a file handle each: a run over a thousand shards stays below `ulimit -n`.

Python's own mmap, and np.memmap on top of it, keep a duplicate of the handle as long as they live.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | os.PathLike[str], dtype: npt.DTypeLike, count: int) -> np.ndarray:
    """The first `count` elements of a file, read from it when they are looked at; read-only.

    Raises:
        OSError: it cannot be opened or mapped, or it is shorter.
    """
    num_bytes = count * np.dtype(dtype).itemsize
    if not num_bytes:
        return np.empty(0, dtype)
    return np.asarray(_Mapping(os.fspath(path), num_bytes)).view(dtype)


class _Mapping:
    """NumPy keeps it as long as an array looks into it."""

    def __init__(self, path: str, num_bytes: int) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(handle).st_size < num_bytes:  # a look beyond the end would kill the process
                raise OSError(f"{path} has fewer than {num_bytes} bytes")
            address = _LIBC.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        self._address, self._num_bytes = address, num_bytes
        self._unmap: Callable[..., Any] = _LIBC.munmap  # there still when the interpreter ends
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (num_bytes,), "data": (address, True),
        }  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):
            self._unmap(self._address, self._num_bytes)
