"""Means and covariances of classes from examples that come in batches, each seen once.

Memory is O(C d k + d^2) for C classes, width d and sketches of k rows, whatever the number of examples. Results don't
depend on how the examples are cut into batches, up to rounding.
"""

import copy
import math
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ..functional import normalize

__all__ = ['HeldOut', 'Moments', 'as_features', 'as_labels']

_EXAMPLES = 2048  # that enter at a time
_VALUES = 2**24  # of an intermediate result that are held at a time
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def as_features(X: Any) -> Tensor:
    """A floating-point tensor (N, d) without NaN and infinities, of any array; ValueError if it is none."""
    X = torch.as_tensor(X).detach()
    if X.ndim != 2 or X.shape[1] < 1 or X.is_complex() or X.dtype == torch.bool:
        raise ValueError(f'X: expected numbers of shape (N, d), got {X.dtype} of shape {list(X.shape)}')
    wrong = (~X.isfinite().all(1)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f'X: {len(wrong)} of {len(X)} rows have NaN or infinite values, the first is row {first}')
    return X if X.is_floating_point() else X.double()


def as_labels(y: Any, num_classes: Optional[int] = None) -> Tensor:
    """Class indices (N,) as int64, of any array of integers; ValueError if they are none."""
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
    """For each label how often it stands before, e.g. 0, 0, 1 for the labels 7, 3, 7; shape (N,)."""
    order = y.argsort(stable=True)
    ordered = y[order]
    start = torch.searchsorted(ordered, ordered)
    return torch.empty_like(y).index_put_((order,), torch.arange(len(y), device=y.device) - start)


class Moments:
    """Counts, means, the pooled within-class scatter and sketches of the classes' own scatters, in float64.

    Args:
        num_classes: Number of classes C.
        dim: Width d of the examples.
        sketch_rank: Rows k of a class's sketch; 0 for no sketches.
        device: Where they are kept.

    Attributes:
        count: Examples of each class, float64, shape (C,).
        mean: Shape (C, d), zero for a class without examples.
        scatter: Sum over all examples of (x - mean_y) (x - mean_y)^T, shape (d, d).
    """

    def __init__(self, num_classes: int, dim: int, sketch_rank: int, device: Optional[torch.device] = None):
        self.count = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.mean = self.count.new_zeros(num_classes, dim)
        self.scatter = self.count.new_zeros(dim, dim)
        self._sketch = _Sketch(self.mean, sketch_rank) if sketch_rank else None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in examples x (N, d) of classes y (N,), in their order."""
        for start in range(0, len(x), _EXAMPLES):
            part, labels = x[start : start + _EXAMPLES], y[start : start + _EXAMPLES]
            self._add(part, labels)
            if self._sketch is not None:
                self._sketch.add(part, labels)

    def _add(self, x: Tensor, y: Tensor) -> None:
        # The update of Chan et al. 1979: nothing cancels, so classes of one example have a scatter of exactly zero
        classes, index = y.unique(return_inverse=True)
        member = x.new_zeros(len(classes), len(x))
        member[index, torch.arange(len(x), device=x.device)] = 1
        new = member.sum(1)
        mean = member @ x / new[:, None]
        old = self.count[classes]
        step = mean - self.mean[classes]
        rows = torch.cat([x - mean[index], step * (old * new / (old + new)).sqrt()[:, None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean[classes] += step * (new / (old + new))[:, None]
        self.count[classes] += new

    def copy(self) -> 'Moments':
        return copy.deepcopy(self)

    def sketches(self) -> Optional[Tensor]:
        """Rows B_c whose Gram matrices B_c^T B_c approximate the classes' scatters, shape (C, k, d); None without any.

        Exact for a class of at most k examples, or whose scatter has a rank of at most k. Ends the sketches: to take in
        more, ask a copy for them.
        """
        return None if self._sketch is None else self._sketch.finish()


class _Sketch:
    """Incremental PCA of each class, k examples at a time (Ross et al. 2008, doi:10.1007/s11263-007-0075-7)."""

    def __init__(self, mean: Tensor, rank: int):
        num_classes, dim = mean.shape
        self.rows = mean.new_zeros(num_classes, rank, dim)
        self.count = mean.new_zeros(num_classes)
        self.mean = torch.zeros_like(mean)
        self.pending = torch.zeros_like(self.rows)
        self.filled = torch.zeros(num_classes, dtype=torch.int64, device=mean.device)

    def add(self, x: Tensor, y: Tensor) -> None:
        rank = self.rows.shape[1]
        slot = self.filled[y] + _occurrence(y)
        while len(y):
            fits = slot < rank
            self.pending[y[fits], slot[fits]] = x[fits]
            self.filled += y[fits].bincount(minlength=len(self.filled))
            self._take_in((self.filled == rank).nonzero()[:, 0])
            x, y, slot = x[~fits], y[~fits], slot[~fits] - rank

    def finish(self) -> Tensor:
        self._take_in(self.filled.nonzero()[:, 0])
        return self.rows

    def _take_in(self, classes: Tensor) -> None:
        for part in classes.split(max(1, _VALUES // (3 * self.rows[0].numel()))):
            self._merge(part)

    def _merge(self, classes: Tensor) -> None:
        """Replace sketch and pending examples of classes by the leading directions of both together."""
        x, rank = self.pending[classes], self.rows.shape[1]
        new, old = self.filled[classes].double()[:, None], self.count[classes][:, None]
        mean = x.sum(1) / new
        step = mean - self.mean[classes]
        used = torch.arange(rank, device=x.device) < new
        between = step * (old * new / (old + new)).sqrt()
        rows = torch.cat([self.rows[classes], (x - mean[:, None]) * used[..., None], between[:, None]], 1)
        vectors = torch.linalg.eigh(rows @ rows.mT)[1][..., -rank:]
        self.rows[classes] = vectors.mT @ rows
        self.mean[classes] += step * new / (old + new)
        self.count[classes] += new[:, 0]
        self.pending[classes] = 0
        self.filled[classes] = 0


class HeldOut:
    """The latest examples of each class, which enter the moments only when later ones take their place.

    Args:
        moments: What the others enter.
        share: Of each class's examples, at least one of those that have two; 0 for none at all.
        most: About how many there are at most; one of each class in any case.
    """

    def __init__(self, moments: Moments, share: float, most: int):
        self.moments = moments
        self.share = share
        self.most = most
        self._waiting: List[Tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in embeddings (N, d) of any floating-point dtype, which are normalised, and their classes (N,)."""
        for part, labels in zip(x.split(_EXAMPLES), y.split(_EXAMPLES), strict=True):
            self._waiting.append((normalize(part.to(labels.device, torch.float64)), labels))
            if sum(len(each) for _, each in self._waiting) > 2 * max(self.most, len(self.moments.count)):
                self.examples()

    def examples(self) -> Tuple[Tensor, Tensor]:
        """Those that are held out now, (N, d) and (N,); the others have entered the moments."""
        x, y = (torch.cat(each) for each in zip(*self._waiting, strict=True))
        before = self.moments.count.long()
        seen = before + y.bincount(minlength=len(before))
        held = (self.share * seen).long().clamp(1, max(1, self.most // len(before)))
        held = held.where((seen > 1) & (self.share > 0), torch.zeros_like(seen))
        enters = before[y] + _occurrence(y) < (seen - held)[y]
        self.moments.add(x[enters], y[enters])
        self._waiting = [(x[~enters], y[~enters])]
        return self._waiting[0]
