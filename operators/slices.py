"""Thick slices: the rows of an image seen only as weighted means, and the interpolation between those."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from operators.geometry import ThickSlices
from operators.linear import LinearOperator


class _Rows(LinearOperator):
    """y = W x along the rows: (*batch, n, columns) -> (*batch, m, columns) for a matrix W (m, n)."""

    def __init__(self, matrix: np.ndarray, columns: int) -> None:
        super().__init__((matrix.shape[1], columns), (matrix.shape[0], columns))
        self.register_buffer("matrix", torch.from_numpy(matrix), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype) @ x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.matrix.to(y.dtype).mT @ y


class SliceMean(_Rows):
    """An image through thick slices, (*batch, rows, columns) -> (*batch, slices, columns), in the image's own unit.

    Slice k is the mean over its ``factor`` rows or, with ``fwhm``, over a Gaussian profile about their centre; weights sum to one, at
    the edges too.
    """

    def __init__(self, acquisition: ThickSlices) -> None:
        rows = np.arange(acquisition.rows)
        away = rows - acquisition.centres[:, None]
        if acquisition.fwhm is None:
            weights = (rows // acquisition.factor == np.arange(acquisition.slices)[:, None]).astype(np.float64)
        else:
            weights = np.exp(-4 * math.log(2) * (away / acquisition.fwhm) ** 2)
        super().__init__(weights / weights.sum(1, keepdims=True), acquisition.columns)


class SliceInterpolation(_Rows):
    """Approximate inverse of `SliceMean`: rows interpolated linearly between the slices' centres, constant beyond the outermost."""

    def __init__(self, acquisition: ThickSlices) -> None:
        unit, rows = np.eye(acquisition.slices), np.arange(acquisition.rows)
        super().__init__(np.stack([np.interp(rows, acquisition.centres, one) for one in unit], axis=1), acquisition.columns)
