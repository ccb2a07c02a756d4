"""Estimate means and covariances of classes from batches of examples, in one pass.

Memory is O(C d k + d^2) for C classes, width d and sketches of k rows, for any number of examples. Up to rounding, the
results do not depend on how the examples are split into batches.
"""

import copy
import math
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ..functional import normalize

__all__ = ['HeldOut', 'Moments', 'as_features', 'as_labels']

_EXAMPLES = 2048  # number of examples added at a time
_VALUES = 2**24  # largest number of values of an intermediate result
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def as_features(X: Any) -> Tensor:
    """Convert an array to a floating-point tensor (N, d); raise a ValueError for other shapes, NaN or inf."""
    X = torch.as_tensor(X).detach()
    if X.ndim != 2 or X.shape[1] < 1 or X.is_complex() or X.dtype == torch.bool:
        raise ValueError(f'X: expected numbers of shape (N, d), got {X.dtype} of shape {list(X.shape)}')
    wrong = (~X.isfinite().all(1)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f'X: {len(wrong)} of {len(X)} rows have NaN or infinite values, the first is row {first}')
    return X if X.is_floating_point() else X.double()


def as_labels(y: Any, num_classes: Optional[int] = None) -> Tensor:
    """Convert an array of integers to class indices (N,), int64; raise a ValueError for anything else."""
    y = torch.as_tensor(y).detach()
    if y.ndim != 1 or (y.dtype not in _INTEGERS and len(y)):
        raise ValueError(f'y: expected class indices of shape (N,), got {y.dtype} of shape {list(y.shape)}')
    y = y.long()
    wrong = y[(y < 0) | (y >= (math.inf if num_classes is None else num_classes))]
    if len(wrong):
        limit = '' if num_classes is None else f' to {num_classes - 1}'
        raise ValueError(f'y: expected class indices from 0{limit}, got {int(wrong[0])}')
    return y


def _occurrence(y: Tensor) -> Tensor:
    """Count the earlier occurrences of each label, e.g. 0, 0, 1 for the labels 7, 3, 7; shape (N,)."""
    ordered, order = y.sort(stable=True)
    count = torch.arange(len(y), device=y.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(y).index_put_((order,), count)


class Moments:
    """Counts, means, pooled within-class scatter, and sketches of the scatters of the classes, in float64.

    Args:
        num_classes: Number of classes C.
        dim: Width d of the examples.
        sketch_rank: Number of rows k of a class's sketch; 0 for no sketches.
        device: Device of the tensors.

    Attributes:
        count: Number of examples of each class, float64, shape (C,).
        mean: Shape (C, d), zero for a class without examples.
        scatter: Sum over all examples of (x - mean_y) (x - mean_y)^T, shape (d, d).
    """

    def __init__(self, num_classes: int, dim: int, sketch_rank: int, device: Optional[torch.device] = None):
        self.count = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.mean = self.count.new_zeros(num_classes, dim)
        self.scatter = self.count.new_zeros(dim, dim)
        self._sketch = _Sketch(self.mean, sketch_rank)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add examples x (N, d) of classes y (N,), in order."""
        # Update of Chan et al. 1979: nothing cancels, so a class with one example has a scatter of exactly zero
        classes, index, new = y.unique(return_inverse=True, return_counts=True)
        mean = x.new_zeros(len(classes), x.shape[1]).index_add_(0, index, x) / new[:, None]
        old = self.count[classes]
        step = mean - self.mean[classes]
        rows = torch.cat([x - mean[index], step * (old * new / (old + new)).sqrt()[:, None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean[classes] += step * (new / (old + new))[:, None]
        self.count[classes] += new
        self._sketch.add(x, y)

    def mean_embedding(self) -> Tensor:
        """Compute the mean of all examples, shape (d,)."""
        return self.count @ self.mean / self.count.sum()

    def sketches(self) -> Tensor:
        """Compute rows B_c, shape (C, k, d), such that B_c^T B_c approximates the scatter of class c.

        They are exact for a class with at most k examples, or with a scatter of rank at most k.
        """
        sketch = copy.deepcopy(self._sketch)
        sketch.merge(sketch.filled > 0)
        return sketch.rows


class _Sketch:
    """Incremental PCA of each class, k examples at a time (Ross et al. 2008, doi:10.1007/s11263-007-0075-7)."""

    def __init__(self, mean: Tensor, rank: int):
        self.mean = torch.zeros_like(mean)
        self.count = mean.new_zeros(len(mean))
        self.rows = mean.new_zeros(len(mean), rank, mean.shape[1])
        self.pending = torch.zeros_like(self.rows)
        self.filled = torch.zeros_like(self.count, dtype=torch.int64)

    def add(self, x: Tensor, y: Tensor) -> None:
        rank = self.rows.shape[1]
        slot = self.filled[y] + _occurrence(y)
        while rank and len(y):
            fits = slot < rank
            self.pending[y[fits], slot[fits]] = x[fits]
            self.filled += y[fits].bincount(minlength=len(self.filled))
            self.merge(self.filled == rank)
            x, y, slot = x[~fits], y[~fits], slot[~fits] - rank

    def merge(self, which: Tensor) -> None:
        """Replace the rows and pending examples of the classes in a mask (C,) by their joint leading directions."""
        rank = self.rows.shape[1]
        for classes in which.nonzero()[:, 0].split(max(1, _VALUES // (3 * self.rows[0].numel() + 1))):
            x = self.pending[classes]
            new, old = self.filled[classes].double()[:, None], self.count[classes][:, None]
            mean = x.sum(1) / new
            step = mean - self.mean[classes]
            used = torch.arange(rank, device=x.device) < new
            between = step * (old * new / (old + new)).sqrt()
            rows = torch.cat([self.rows[classes], (x - mean[:, None]) * used[..., None], between[:, None]], 1)
            vectors = torch.linalg.eigh(rows @ rows.mT)[1][..., rank + 1 :]
            self.rows[classes] = vectors.mT @ rows
            self.mean[classes] += step * new / (old + new)
            self.count[classes] += new[:, 0]
            self.pending[classes] = 0
            self.filled[classes] = 0


class HeldOut:
    """The latest examples of each class, held out of the moments until later examples replace them.

    Args:
        moments: Moments to which all other examples are added.
        share: Share of each class's examples to hold out, at least one if the class has two; 0 for none at all.
        most: Approximate upper limit of their number; one per class is held out in any case.
    """

    def __init__(self, moments: Moments, share: float, most: int):
        self.moments = moments
        self.share = share
        self.most = most
        self._waiting: List[Tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add embeddings (N, d), of any floating-point dtype and not normalised, and their classes (N,)."""
        for part, labels in zip(x.split(_EXAMPLES), y.split(_EXAMPLES), strict=True):
            self._waiting.append((normalize(part.to(labels.device, torch.float64)), labels))
            if sum(len(each) for _, each in self._waiting) > 2 * max(self.most, len(self.moments.count)):
                self.examples()

    def examples(self) -> Tuple[Tensor, Tensor]:
        """Add all other examples to the moments; return those held out, normalised (N, d), and their classes (N,)."""
        x, y = (torch.cat(each) for each in zip(*self._waiting, strict=True))
        before = self.moments.count.long()
        seen = before + y.bincount(minlength=len(before))
        held = (self.share * seen).long().clamp(1, max(1, self.most // len(before)))
        held *= (seen > 1) & (self.share > 0)
        enters = before[y] + _occurrence(y) < (seen - held)[y]
        self.moments.add(x[enters], y[enters])
        self._waiting = [(x[~enters], y[~enters])]
        return self._waiting[0]
