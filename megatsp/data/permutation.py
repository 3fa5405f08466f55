"""Pseudo-random permutations that are computed, never stored: any range, any length, a few words of memory.

A generalised Feistel network over a x b >= count boxes; what falls beyond count walks on until it does not.
The result depends on integers alone, so it is the same on every machine and in every version of NumPy.

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 3 and 4.
"""

import hashlib
from math import isqrt

import numpy as np

ROUNDS = 4  # of two halves each
FEW = 6  # indices that Python sends in less time than NumPy


class Permutation:
    """A permutation of range(count) that `key` chooses.

    Args:
        count: at least 1 and below 2^62.
        key: numbers and texts; another key is another, unrelated permutation.
    """

    def __init__(self, count: int, *key: int | str) -> None:
        assert 1 <= count < 2**62, count
        self.count = count
        self._a = np.uint64(isqrt(count - 1) + 1)
        self._b = np.uint64(-(-count // int(self._a)))
        text = repr((count, *(part if isinstance(part, str) else int(part) for part in key)))
        digest = hashlib.shake_256(text.encode()).digest(16 * ROUNDS)
        self._keys = np.frombuffer(digest, "<u8").reshape(ROUNDS, 2)
        self._numbers = int(self._a), int(self._b), self._keys.tolist()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where the permutation sends `indices`, integers in [0, count): int64 of the same shape."""
        if np.size(indices) <= FEW:
            sent = [self._send(index) for index in np.ravel(indices).tolist()]
            return np.array(sent, np.int64).reshape(np.shape(indices))
        result = np.atleast_1d(indices).astype(np.uint64)
        assert result.size == 0 or int(result.max()) < self.count
        walking = np.arange(result.size)
        flat = result.reshape(-1)
        while len(walking):
            flat[walking] = self._encrypt(flat[walking])
            walking = walking[flat[walking] >= self.count]
        return flat.astype(np.int64).reshape(np.shape(indices))

    def _send(self, x: int) -> int:
        """One index, by the same arithmetic."""
        assert 0 <= x < self.count
        a, b, keys = self._numbers
        while True:
            left, right = divmod(x, b)
            for left_key, right_key in keys:
                left = (left + _mix_one(right ^ left_key) % a) % a
                right = (right + _mix_one(left ^ right_key) % b) % b
            x = left * b + right
            if x < self.count:
                return x

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for left_key, right_key in self._keys:
            left = np.mod(left + np.mod(_mix(right ^ left_key), self._a), self._a)
            right = np.mod(right + np.mod(_mix(left ^ right_key), self._b), self._b)
        return np.add(left * self._b, right)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser; Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    """_mix of one number."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
