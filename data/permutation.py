"""A pseudo-random permutation that computes any position without the others.

A shuffled list of the windows of 10 billion tokens would cost 80 MB per process and half a second per epoch, and would
depend on the version of NumPy.
"""

import hashlib

import numpy as np

_ROUNDS = 8


class Permutation:
    """A permutation of 0 ... size - 1 (size >= 1) that is selected by a key.

    It is a Feistel network over the next power of four; results beyond the size are enciphered again ("cycle walking";
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at these positions: [N] int -> [N] int64."""
        elements = self._encipher(np.asarray(positions, dtype=np.uint64))
        while (outside := elements >= self.size).any():
            elements[outside] = self._encipher(elements[outside])
        return elements.astype(np.int64)

    def _encipher(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014): each input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
