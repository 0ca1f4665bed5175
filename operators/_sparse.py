"""Sparse matrices applied to batches: one CSR in memory, its adjoint through a transposed view, a cache with a cap.

Measured on CPU at 256 x 256: torch's CSR product and scipy's CSC view of the same arrays are each several times faster than a
projector called once per image, and reuse every entry for all images of a chunk; torch's product with `A.t()` is fifty times slower
than one projector call, so it is never used.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

MEMORY_CAP = 2 * 1024**3  # bytes; larger matrices are not stored, and the cache forgets the least recently used above it
COLUMNS = 8  # images per product: measured optimum, beyond it the accumulators leave the cache

Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # entries per row, column indices (int32), weights (float32), in row order


class SparseMatrix:
    """A float32 CSR matrix, applied to (batch, columns) tensors on the device where they are.

    Args:
        counts, indices, data: entries per row, column indices and weights in row order.
        shape: (rows, columns).
    """

    def __init__(self, counts: np.ndarray, indices: np.ndarray, data: np.ndarray, shape: tuple[int, int]) -> None:
        if indices.size >= 2**31:
            raise ValueError(f"a matrix of {indices.size} entries does not fit 32-bit indices")
        indptr = np.zeros(shape[0] + 1, dtype=np.int32)
        np.cumsum(counts, out=indptr[1:])
        self.shape = shape
        self._csr = scipy.sparse.csr_matrix(shape, dtype=np.float32)
        self._csr.indptr, self._csr.indices, self._csr.data = indptr, indices, data
        self._wide: scipy.sparse.csr_matrix | None = None
        self._torch: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 matrix."""
        return self._csr.indptr.nbytes + self._csr.indices.nbytes + self._csr.data.nbytes

    def to_scipy(self, dtype: torch.dtype = torch.float32) -> scipy.sparse.csr_matrix:
        """The matrix as scipy sees it; in double precision it shares its indices with the single one."""
        if dtype == torch.float32:
            return self._csr
        if self._wide is None:
            self._wide = scipy.sparse.csr_matrix(self.shape, dtype=np.float64)
            self._wide.indptr, self._wide.indices = self._csr.indptr, self._csr.indices
            self._wide.data = self._csr.data.astype(np.float64)
        return self._wide

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, columns) -> (batch, rows)."""
        return self._product(self._on(x.device, x.dtype, transposed=False), x, self.shape[0])

    def adjoint(self, y: Tensor) -> Tensor:
        """y (batch, rows) -> (batch, columns)."""
        if y.device.type != "cpu":
            return self._product(self._on(y.device, y.dtype, transposed=True), y, self.shape[1])
        view = self.to_scipy(y.dtype).T
        out = y.new_empty(y.shape[0], self.shape[1])
        for k in range(0, y.shape[0], COLUMNS):
            block = y[k : k + COLUMNS].detach().T.contiguous().numpy()
            out[k : k + COLUMNS] = torch.from_numpy(view @ block).T
        return out

    @staticmethod
    def _product(matrix: Tensor, x: Tensor, rows: int) -> Tensor:
        out = x.new_empty(x.shape[0], rows)
        for k in range(0, x.shape[0], COLUMNS):
            out[k : k + COLUMNS] = (matrix @ x[k : k + COLUMNS].T.contiguous()).T
        return out

    def _on(self, device: torch.device, dtype: torch.dtype, transposed: bool) -> Tensor:
        key = (device, dtype, transposed)
        if key not in self._torch:
            source = self.to_scipy(dtype)
            self._torch[key] = _torch_csr(source.T.tocsr() if transposed else source, device)
        return self._torch[key]


class StreamedMatrix:
    """A matrix too large to keep: its chunks of rows are built, applied and forgotten at every call. Exact, slow, CPU only."""

    def __init__(self, chunks: Callable[[], Iterable[Chunk]], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._chunks = chunks

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, columns) -> (batch, rows)."""
        columns = np.ascontiguousarray(_numpy(x).T)
        parts = [block @ columns for _, block in self._blocks(columns.dtype)]
        return torch.from_numpy(np.concatenate(parts)).T

    def adjoint(self, y: Tensor) -> Tensor:
        """y (batch, rows) -> (batch, columns)."""
        columns = np.ascontiguousarray(_numpy(y).T)
        out = np.zeros((self.shape[1], columns.shape[1]), dtype=columns.dtype)
        for row, block in self._blocks(columns.dtype):
            out += block.T @ columns[row : row + block.shape[0]]
        return torch.from_numpy(out).T

    def _blocks(self, dtype: np.dtype) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
        row = 0
        for counts, indices, data in self._chunks():
            indptr = np.concatenate([[0], np.cumsum(counts)])
            block = scipy.sparse.csr_matrix((data.astype(dtype, copy=False), indices, indptr), shape=(counts.size, self.shape[1]))
            yield row, block
            row += counts.size


def assemble(chunks: Iterable[Chunk], shape: tuple[int, int], bound: int) -> SparseMatrix:
    """Join chunks of rows into one matrix; `bound` is an upper limit of its entries (only pages that are written use memory)."""
    indices, data = np.empty(bound, dtype=np.int32), np.empty(bound, dtype=np.float32)
    counts, end = [], 0
    for rows, columns, weights in chunks:
        indices[end : end + columns.size], data[end : end + columns.size] = columns, weights
        counts.append(rows)
        end += columns.size
    return SparseMatrix(np.concatenate(counts), indices[:end], data[:end], shape)


_cache: OrderedDict[Hashable, SparseMatrix] = OrderedDict()
_lock = threading.Lock()


def cached(key: Hashable, build: Callable[[], SparseMatrix]) -> SparseMatrix:
    """The matrix of this key, built once per process and kept while the cache stays under `MEMORY_CAP`."""
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    matrix = build()
    with _lock:
        _cache[key] = matrix
        while len(_cache) > 1 and sum(m.nbytes for m in _cache.values()) > MEMORY_CAP:
            _cache.popitem(last=False)
    return matrix


def clear_cache() -> None:
    """Forget every cached matrix; operators that already hold theirs keep it."""
    with _lock:
        _cache.clear()


def _numpy(x: Tensor) -> np.ndarray:
    if x.device.type != "cpu":
        raise ValueError(f"a matrix above the memory cap is applied on the CPU only, the tensor is on {x.device}")
    return x.detach().numpy()


def _torch_csr(matrix: scipy.sparse.csr_matrix, device: torch.device) -> Tensor:
    """A torch CSR tensor on the arrays of a scipy one (shared on CPU); the only place where torch's beta message is silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr),
            torch.from_numpy(matrix.indices),
            torch.from_numpy(matrix.data),
            size=matrix.shape,
            device=device,
            check_invariants=False,
        )
