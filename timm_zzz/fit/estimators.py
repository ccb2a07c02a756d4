"""Classifiers in closed form from the moments of the classes, and how the ZZZ head represents them.

docs/fit.md has the derivation. Everything is in float64, of normalised embeddings x, and up to terms that all classes
share. Logits are to be multiplied by a temperature; at 1 / ``scale`` they are the Gaussians' log-densities.
"""

import math
from typing import Iterable, Iterator, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import normalize
from .moments import Moments

__all__ = [
    'Density',
    'Discriminant',
    'Estimator',
    'Quadratic',
    'best_temperature',
    'negative_log_likelihood',
    'on_sphere',
]

LEAST_VARIANCE = 1.01e-4  # just above the least of the bare head
_MARGINS = (1.8, 3.0, 6.0)  # of 1 / sigma2 over the largest gain; the next where the means are not found
_VALUES = 2**24  # of an intermediate result that are held at a time


class Quadratic(NamedTuple):
    """Logits x.row_c + offset_c + 1/2 sum_i gain_ci (direction_ci.(x - centre_c))^2."""

    rows: Tensor  # (C, d)
    offset: Tensor  # (C,)
    centre: Tensor  # (C, d)
    directions: Tensor  # (C, r, d)
    gain: Tensor  # (C, r), >= 0

    def logits(self, x: Tensor) -> Tensor:
        """Shape (N, C) for x (N, d)."""
        size = max(1, _VALUES // max(1, self.gain.numel()))
        return torch.cat([self._logits(part) for part in x.split(size)])

    def _logits(self, x: Tensor) -> Tensor:
        logits = x @ self.rows.T + self.offset
        if self.gain.numel():
            t = (x @ self.directions.flatten(0, 1).T).reshape(-1, *self.gain.shape)
            t -= _along(self.directions, self.centre)
            logits += 0.5 * (t.square_() * self.gain).sum(2)
        return logits

    def precision(self) -> float:
        """a, of one in the form of the head."""
        return float(self.rows.norm(dim=1).max())

    def rotated(self, basis: Tensor) -> 'Quadratic':
        """The same as a function of x where this one is a function of x @ basis, for an orthogonal basis (d, d)."""
        return self._replace(
            rows=self.rows @ basis.T, centre=self.centre @ basis.T, directions=self.directions @ basis.T
        )


def _along(directions: Tensor, x: Tensor) -> Tensor:
    """Components (C, r) of x (C, d) along the directions of the classes."""
    return (directions @ x[..., None])[..., 0]


def _across(directions: Tensor, t: Tensor) -> Tensor:
    """Vectors (C, d) of the components t (C, r) along the directions of the classes."""
    return (t[:, None] @ directions)[:, 0]


def _in_chunks(scatter: Tensor, per_class: Tensor) -> Iterable[Tuple[Tensor, Tensor]]:
    size = max(1, _VALUES // (4 * scatter[0].numel()))
    return zip(scatter.split(size), per_class.split(size), strict=True)


class Estimator:
    """Eigenvectors of a covariance, in columns, and eigenvalues divided by their mean, ``scale``; a zero one is 1."""

    def __init__(self, covariance: Tensor, rank: int):
        self.rank = rank
        eigenvalues, self.basis = torch.linalg.eigh(covariance)
        eigenvalues = eigenvalues.clamp(min=0)
        self.scale = float(eigenvalues.mean())
        if self.scale <= 1e-24:  # the examples of each class are equal, but for rounding
            self.scale, eigenvalues = 1.0, torch.ones_like(eigenvalues)
        self.eigenvalues = eigenvalues / self.scale

    def shrunk(self, shrinkage: float) -> Tensor:
        return (1 - shrinkage) * self.eigenvalues + shrinkage

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        """The classifiers for several prior counts, as functions of x @ basis."""
        raise NotImplementedError

    def head_form(self, shrinkage: float, prior_count: float, temperature: float, most: float) -> Quadratic:
        """The classifier in the form of the head, as a function of x. Further arguments as of :func:`on_sphere`."""
        raise NotImplementedError


class Discriminant(Estimator):
    """Gaussian classes of the shrunken pooled covariance, and along r directions more variance of their own."""

    def __init__(self, moments: Moments, rank: int):
        self.count = moments.count
        super().__init__(moments.scatter / max(1.0, float((self.count - 1).sum())), rank)
        self.mean = moments.mean @ self.basis
        scatter = moments.sketches()
        self.scatter = None if scatter is None else scatter @ self.basis / math.sqrt(self.scale)

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        directions, variance = self._whitened(shrinkage)
        for prior_count in prior_counts:
            yield self._quadratic(shrinkage, prior_count, directions, variance)

    def head_form(self, shrinkage: float, prior_count: float, temperature: float, most: float) -> Quadratic:
        form = next(self.candidates(shrinkage, [prior_count]))
        return on_sphere(form.rotated(self.basis), self.basis.T[-self.rank :], temperature, most)

    def _whitened(self, shrinkage: float) -> Tuple[Tensor, Tensor]:
        """Directions (C, r, d), orthonormal when whitened, and the classes' own variances along them (C, r)."""
        if self.scatter is None:
            return self.mean.new_zeros(len(self.mean), 0, self.mean.shape[1]), self.mean.new_zeros(len(self.mean), 0)
        root = self.shrunk(shrinkage).rsqrt()
        directions, variance = [], []
        for part, count in _in_chunks(self.scatter, self.count):
            whitened = part * root / (count - 1).clamp(min=1).sqrt()[:, None, None]
            values, vectors = torch.linalg.eigh(whitened @ whitened.mT)
            values, vectors = values[:, -self.rank :].clamp(min=0), vectors[..., -self.rank :]
            # What has no variance has no direction, and will have no gain
            directions.append(vectors.mT @ whitened * root / values.clamp(min=1e-12).sqrt()[..., None])
            variance.append(values)
        return torch.cat(directions), torch.cat(variance)

    def _quadratic(self, shrinkage: float, prior_count: float, directions: Tensor, variance: Tensor) -> Quadratic:
        """For class covariances (1 - k) pooled + k own, k = n / (n + prior_count)."""
        pooled = self.shrunk(shrinkage)
        own = (self.count / (self.count + prior_count))[:, None]
        ratio = ((1 - own) + own * variance).clamp(min=1)  # only directions of more variance than the pooled
        rows = self.mean / pooled
        # An estimated mean is farther from every x than the true one, by this in expectation
        excess = self.scale * (self.eigenvalues / pooled).sum() / self.count
        offset = -0.5 * ((rows * self.mean).sum(1) - excess + self.scale * ratio.log().sum(1))
        return Quadratic(rows, offset, self.mean, directions, 1 - 1 / ratio)


class Density(Estimator):
    """Maximum likelihood of the head's own model: probabilistic PCA of each class about its mean direction.

    Tipping and Bishop 1999, doi:10.1111/1467-9868.00196, with one sigma2 for all classes.
    """

    def __init__(self, moments: Moments, rank: int):
        self.count = moments.count
        mu = normalize(moments.mean)
        off = moments.mean - mu
        super().__init__((moments.scatter + off.T @ (off * self.count[:, None])) / self.count.sum(), rank)
        self.mu = mu @ self.basis
        own = off[:, None]
        scatter = moments.sketches()
        if scatter is not None:
            own = torch.cat([own, scatter / self.count.sqrt()[:, None, None]], 1)
        self.own = own @ self.basis / math.sqrt(self.scale)  # their Gram matrices are the second moments about mu

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        return (self._quadratic(shrinkage, prior_count) for prior_count in prior_counts)

    def head_form(self, shrinkage: float, prior_count: float, temperature: float, most: float) -> Quadratic:
        return self._quadratic(shrinkage, prior_count).rotated(self.basis)

    def _quadratic(self, shrinkage: float, prior_count: float) -> Quadratic:
        pooled = self.shrunk(shrinkage)
        share = self.count / (self.count + prior_count)
        parts = [self._leading(pooled, *part) for part in _in_chunks(self.own, share)]
        directions, values = (torch.cat(each) for each in zip(*parts, strict=True))
        total = (1 - share) * pooled.sum() + share * self.own.square().sum((1, 2))
        if self.rank < len(pooled):
            rest = (total - values.sum(1)).clamp(min=0) / (len(pooled) - self.rank)
            sigma2 = float((self.count * rest).sum() / self.count.sum())
        else:
            sigma2 = float(values.min()) / 2
        a = 1 / max(sigma2, LEAST_VARIANCE / self.scale)
        ratio = (a * values - 1).clamp(min=0)  # v / sigma2, for v = values - sigma2
        offset = -0.5 * (a * self.mu.square().sum(1) + self.scale * ratio.log1p().sum(1))
        return Quadratic(a * self.mu, offset, self.mu, directions, a * ratio / (1 + ratio))

    def _leading(self, pooled: Tensor, own: Tensor, share: Tensor) -> Tuple[Tensor, Tensor]:
        """Leading eigenvectors, as rows, and eigenvalues of (1 - share) pooled + share own^T own.

        By the Rayleigh-Ritz method in the span of the own rows and of the leading pooled directions.
        """
        dim = len(pooled)
        axes = torch.eye(dim, dtype=own.dtype, device=own.device)[dim - self.rank :]
        basis = torch.linalg.svd(torch.cat([own, axes.expand(len(own), -1, -1)], 1), full_matrices=False)[2]
        projected = basis @ own.mT
        share = share[:, None, None]
        matrix = (1 - share) * ((basis * pooled) @ basis.mT) + share * (projected @ projected.mT)
        values, vectors = torch.linalg.eigh(matrix)
        start = matrix.shape[-1] - self.rank
        return vectors[..., start:].mT @ basis, values[:, start:].clamp(min=0)


# The form of the head: centres of length 1, rows a * centre, orthonormal directions, gains less than a


def on_sphere(form: Quadratic, fill: Tensor, temperature: float, most: float = math.inf) -> Quadratic:
    """A classifier in the form of the head, up to a term that all classes share.

    Any vector s may be taken off all rows. With D_c = sum_i g_i u_i u_i^T the head's means have to be
    mu_c = (a - D_c)^-1 (row_c - D_c centre_c - s), of length 1: C equations for s, of width d. More classes than that
    are solved by least squares. The precision a is that of the smallest sphere, or larger so that gains stay below it,
    up to ``most``; gains beyond are cut off, and those below what v_min stands for at this temperature raised to it.

    Args:
        form: Any quadratic classifier.
        fill: Directions (r, d), orthonormal, to take where there is no gain.
        temperature: What the logits will be multiplied by.
        most: Largest a * temperature that gains are allowed to ask for.

    Returns:
        A classifier whose rows have the length a.
    """
    directions, gain = _orthonormal(form, fill)
    for margin in _MARGINS:
        a, gains = _precision(form, directions, gain, margin, temperature, most)
        target = _uncentred(form.rows, form.centre, directions, gains)
        s, radius = _circumsphere(target)
        if a > radius:
            s = _farther(target, s, form.centre.mean(0), math.sqrt(a**2 - radius**2))
        a = max(a, radius)
        z = _unit_means(target, s, directions, gains, a)
        solved = float((z.norm(dim=1) - a).abs().max()) <= 1e-9 * a
        if solved or len(target) > target.shape[1] or not gains.numel():
            break
    gain = gains
    mu = normalize(z)
    gap = z / a - mu  # of the linear terms, where there are too many classes: right at the classes' means at least
    along = _along(directions, form.centre)
    offset = form.offset + 0.5 * (gain * (along.square() - _along(directions, mu).square())).sum(1)
    offset += a * (gap * form.centre).sum(1) - (gain * _along(directions, gap) * along).sum(1)
    return Quadratic(a * mu, offset, mu, directions, gain)


def _precision(
    form: Quadratic, directions: Tensor, gain: Tensor, margin: float, temperature: float, most: float
) -> Tuple[float, Tensor]:
    """The precision a, and the gains that are possible with it."""
    a = max(1e-3, _circumsphere(_uncentred(form.rows, form.centre, directions, gain))[1])
    if not gain.numel():
        return a, gain
    a = max(1.02 * a, min(margin * float(gain.max()), most / temperature))
    least = LEAST_VARIANCE * a * temperature  # v / sigma2
    return a, gain.clamp(a * least / (1 + least)).clamp(max=0.8 * a)


def _uncentred(rows: Tensor, centre: Tensor, directions: Tensor, gain: Tensor) -> Tensor:
    return rows - _across(directions, gain * _along(directions, centre))


def _orthonormal(form: Quadratic, fill: Tensor) -> Tuple[Tensor, Tensor]:
    """Orthonormal directions and gains of the same quadratic terms; missing ones are filled in, without gain."""
    rank = form.gain.shape[1]
    if rank == 0:
        return form.directions, form.gain
    roots = form.directions * form.gain.sqrt()[..., None]
    tiny = 1e-7 * max(1.0, math.sqrt(float(roots.square().sum((1, 2)).max())))
    directions, gain = [], []
    for part, _ in _in_chunks(roots, form.offset):
        _, values, vectors = torch.linalg.svd(torch.cat([part, tiny * fill.expand_as(part)], 1), full_matrices=False)
        directions.append(vectors[:, :rank])
        gain.append((values[:, :rank].square() - tiny**2).clamp(min=0))
    return torch.cat(directions), torch.cat(gain)


def _circumsphere(points: Tensor) -> Tuple[Tensor, float]:
    """Centre and radius of the smallest sphere through points (C, d), by least squares if there is none."""
    middle = points.mean(0)
    points = points - middle
    matrix = torch.cat([2 * points, points.new_ones(len(points), 1)], 1)
    centre = _least_norm(matrix, points.square().sum(1))[:-1]
    return middle + centre, float((points - centre).square().sum(1).mean().sqrt())


def _farther(points: Tensor, centre: Tensor, towards: Tensor, distance: float) -> Tensor:
    """A centre moved, away from a vector, where the points vary least: not at all, where they span less than R^d."""
    points = points - points.mean(0)
    spread = points.T @ points
    spread.diagonal().add_(1e-9 * spread.diagonal().mean() + 1e-300)
    step = normalize(torch.linalg.solve(spread, towards + 1e-9))
    return centre - distance * step


def _least_norm(matrix: Tensor, target: Tensor) -> Tensor:
    """The shortest x of least |matrix x - target|."""
    wide = matrix.shape[0] < matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    damping = 1e-14 * float(gram.diagonal().mean()) + 1e-300
    for _ in range(6):  # more, where rows depend on each other
        gram.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not info:
            break
        damping *= 100
    right = (target if wide else matrix.T @ target)[:, None]
    solution = torch.cholesky_solve(right, factor)[:, 0]
    return matrix.T @ solution if wide else solution


def _solved(y: Tensor, directions: Tensor, gain: Tensor, a: float) -> Tensor:
    """a (a - D_c)^-1 y_c, shape (C, d)."""
    return y + _across(directions, gain / (a - gain) * _along(directions, y))


def _unit_means(target: Tensor, s: Tensor, directions: Tensor, gain: Tensor, a: float) -> Tensor:
    """Solve |z_c| = a, z_c = a (a - D_c)^-1 (target_c - s), for s by the Gauss-Newton method; returns z (C, d)."""
    z = _solved(target - s, directions, gain, a)
    error = z.norm(dim=1) - a
    while float(error.abs().max()) > 1e-13 * a:
        step = _least_norm(_solved(normalize(z), directions, gain, a), error)
        old, size = float(error.norm()), 1.0
        while size > 0.05:  # halve steps that lead too far
            new_z = _solved(target - s - size * step, directions, gain, a)
            new_error = new_z.norm(dim=1) - a
            if float(new_error.norm()) < (1 - 0.1 * size) * old:
                break
            size /= 2
        else:
            break
        s, z, error = s + size * step, new_z, new_error
    return z


# Temperature


def best_temperature(logits: Tensor, y: Tensor, log_prior: Union[Tensor, float] = 0.0) -> Tuple[float, float]:
    """T of the least mean negative log-likelihood of labels y under T * logits + log_prior, and that value in nats.

    Labels are smoothed by 1 / (N + 1), as if one example more had any label with the same probability: T stays finite
    where all are classified correctly. The function is convex in T: Newton's method, kept in a bracket.

    Args:
        logits: Shape (N, C).
        y: Class indices, shape (N,).
        log_prior: Shape (C,), or 0.
    """
    spread = max(float(logits.std(1, correction=0).mean()), 1e-12)
    logits = (logits - logits.mean(1, keepdim=True)) / spread
    right = float(logits.gather(1, y[:, None]).mean()) * len(y) / (len(y) + 1)  # smoothed; the mean over classes is 0
    low, high, T = 1e-4, 1e4, 1.0
    for _ in range(40):
        p = (T * logits + log_prior).softmax(1)
        mean = (p * logits).sum(1)
        slope = float(mean.mean()) - right
        curvature = float(((p * logits.square()).sum(1) - mean.square()).mean())
        low, high = (low, T) if slope > 0 else (T, high)
        new = T - slope / max(curvature, 1e-300)
        T, old = new if low < new < high else math.sqrt(low * high), T
        if abs(T - old) <= 1e-8 * T:
            break
    return T / spread, negative_log_likelihood(T * logits + log_prior, y)


def negative_log_likelihood(logits: Tensor, y: Tensor) -> float:
    return F.cross_entropy(logits, y).item()
