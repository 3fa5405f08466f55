"""First weights: a function of the seed, the parameter's name and the place in its logical tensor.

Matrices are drawn in blocks of rows of their h-major view, each block from a generator keyed by
(seed, name, block). So a rank draws its own rows alone under the `hidden` layout, and every mesh
and layout starts from the same model.
"""

import hashlib

import torch
from torch import Tensor

ROWS = 16


def initial_slice(
    seed: int, name: str, rows: tuple[int, int], columns: tuple[int, int], total_columns: int, std: float
) -> Tensor:
    """Rows and columns [start, stop) of the h-major matrix `name`: fp32, normal, of deviation `std`."""
    blocks = []
    for block in range(rows[0] // ROWS, -(-rows[1] // ROWS)):
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # A block is always drawn whole: how torch fills a tensor depends on its size.
        drawn = torch.randn(ROWS, total_columns, generator=generator)
        first = max(rows[0] - block * ROWS, 0)
        blocks.append(drawn[first : rows[1] - block * ROWS, columns[0] : columns[1]] * std)
    return torch.cat(blocks)
