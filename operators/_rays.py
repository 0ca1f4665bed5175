"""The sparse matrix of a ray geometry, by Joseph's method.

Every ray steps through the columns (or rows) that it crosses fastest, and at each step interpolates linearly between the two nearest
pixels; the weight is the length of the step in mm. Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE
Trans. Med. Imaging 1(3), 1982.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from operators._sparse import Chunk, SparseMatrix, assemble
from operators.geometry import Array, Beam, FanBeam, Grid

_BLOCK = 2**17  # ray steps handled at once: the temporaries stay in the processor's cache
_CHUNK = 2**22  # ray steps per yielded chunk


def ray_matrix(grid: Grid, beam: Beam, *, split: int = 1, subrays: int = 1) -> SparseMatrix:
    """Line integrals of a pixel image as a CSR matrix (views * detectors, ny * nx), weights in mm.

    Args:
        split: cut every pixel into split x split and sum the finer grid's weights back onto it.
        subrays: make every bin the mean of this many rays, evenly spread over its width.

    Raises:
        ValueError: split or subrays below one, or more than 2^31 entries.
    """
    steps = 2 * max(grid.shape) * split * subrays * beam.detectors * len(beam.angles)
    shape = (len(beam.angles) * beam.detectors, grid.shape[0] * grid.shape[1])
    return assemble(ray_chunks(grid, beam, split=split, subrays=subrays), shape, steps)


def estimated_bytes(grid: Grid, beam: Beam, *, split: int = 1, subrays: int = 1) -> int:
    """About how large `ray_matrix` is: a pixel meets 1.8 rays per view when the rays are one pixel apart."""
    pitch = beam.pitch * beam.source_origin / beam.source_detector if isinstance(beam, FanBeam) else beam.pitch
    hits = 1.8 * max(grid.spacing) / pitch + (1 if subrays > 1 else 0)
    return int(8 * hits * len(beam.angles) * grid.shape[0] * grid.shape[1])


def ray_chunks(grid: Grid, beam: Beam, *, split: int = 1, subrays: int = 1, merge: bool = True) -> Iterator[Chunk]:
    """The rows of `ray_matrix`, some views at a time; without `merge` a row may name a pixel several times."""
    if split < 1 or subrays < 1:
        raise ValueError(f"split and subrays are whole numbers of at least 1, got {split} and {subrays}")
    fine = Grid(shape=(grid.shape[0] * split, grid.shape[1] * split), spacing=(grid.spacing[0] / split, grid.spacing[1] / split))
    views = len(beam.angles)
    step = max(1, _CHUNK // (max(fine.shape) * subrays * beam.detectors))
    for first in range(0, views, step):
        points, directions = beam.rays(slice(first, min(first + step, views)), subrays)
        counts, indices, weights = _joseph(points.reshape(-1, 2), directions.reshape(-1, 2), fine, split)
        if subrays > 1:
            counts = counts.reshape(-1, subrays).sum(1)
            weights /= np.float32(subrays)
        if merge and (split > 1 or subrays > 1):
            counts, indices, weights = _merge(counts, indices, weights, grid.shape[0] * grid.shape[1])
        yield counts, indices, weights


def _joseph(points: Array, directions: Array, grid: Grid, split: int) -> Chunk:
    ny, nx = grid.shape
    size = np.array([grid.spacing[1], grid.spacing[0]])
    start = points / size + (np.array([nx, ny]) - 1) / 2  # (x, y) in units of pixels
    speed = directions / size
    along_x = np.abs(speed[:, 0]) >= np.abs(speed[:, 1])
    edges = np.flatnonzero(np.diff(along_x)) + 1
    counts, indices, weights = [], [], []
    for low, high in zip([0, *edges], [*edges, len(along_x)], strict=True):
        major, minor = (0, 1) if along_x[low] else (1, 0)
        n, m = (nx, ny) if along_x[low] else (ny, nx)
        slope = speed[low:high, minor] / speed[low:high, major]
        origin = start[low:high, minor] - start[low:high, major] * slope
        length = (1 / np.abs(speed[low:high, major])).astype(np.float32)
        j = np.arange(n, dtype=np.int32)
        block = max(1, _BLOCK // n)
        for first in range(0, high - low, block):
            rays = slice(first, first + block)
            position = origin[rays, None] + slope[rays, None] * j
            floor = np.floor(position)
            upper = (position - floor).astype(np.float32)
            upper *= length[rays, None]
            below = floor.astype(np.int32)
            weight = np.empty((*below.shape, 2), dtype=np.float32)
            np.subtract(length[rays, None], upper, out=weight[..., 0])
            weight[..., 1] = upper
            keep = weight > 0
            keep[..., 0] &= (below >= 0) & (below < m)
            keep[..., 1] &= (below >= -1) & (below < m - 1)
            pixel = np.empty((*below.shape, 2), dtype=np.int32)
            for k in (0, 1):
                row, column = (below + k, j) if major == 0 else (j, below + k)
                if split > 1:
                    row, column = row // split, column // split
                np.add(row * (nx // split), column, out=pixel[..., k])
            counts.append(np.count_nonzero(keep, axis=(1, 2)))
            indices.append(pixel[keep])
            weights.append(weight[keep])
    return np.concatenate(counts), np.concatenate(indices), np.concatenate(weights)


def _merge(counts: np.ndarray, indices: np.ndarray, weights: np.ndarray, columns: int) -> Chunk:
    """Sum the entries of a row that name the same pixel."""
    import scipy.sparse

    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    matrix = scipy.sparse.csr_matrix((weights, indices, indptr), shape=(counts.size, columns))
    matrix.sum_duplicates()
    return np.diff(matrix.indptr), matrix.indices, matrix.data
