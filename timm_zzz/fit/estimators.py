"""Estimate classifiers in closed form from the moments of the classes, and bring them into the form of the ZZZ head.

docs/fit_theory.md has the derivation. Everything is in float64, for normalised embeddings x, and up to terms that all
classes share. Logits are to be multiplied by a temperature; with 1 / ``scale`` they are the Gaussians' log-densities.
"""

import math
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..functional import normalize
from .moments import Moments

__all__ = ['Density', 'Discriminant', 'Estimator', 'Quadratic', 'on_sphere']

LEAST_VARIANCE = 1.01e-4  # just above the head's default v_min and sigma2_min
_MARGINS = (1.8, 3.0, 6.0)  # ratios of 1 / sigma2 to the largest gain, tried in turn until the means are found
_VALUES = 2**24  # largest number of values of an intermediate result


class Quadratic(NamedTuple):
    """Classifier with the logits x.row_c + offset_c + 1/2 sum_i gain_ci (direction_ci.(x - centre_c))^2."""

    rows: Tensor  # (C, d)
    offset: Tensor  # (C,)
    centre: Tensor  # (C, d)
    directions: Tensor  # (C, r, d)
    gain: Tensor  # (C, r), >= 0

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits (N, C) for x (N, d)."""
        axes, centre = self.directions.flatten(0, 1), self.directions @ self.centre[..., None]
        logits = []
        for part in x.split(max(1, _VALUES // max(1, self.gain.numel()))):
            t = (part @ axes.T).unflatten(1, self.gain.shape).sub_(centre[..., 0])
            logits.append(part @ self.rows.T + self.offset + 0.5 * t.square_().mul_(self.gain).sum(2))
        return torch.cat(logits)

    def precision(self) -> float:
        """Return the precision a = 1 / sigma2 of a classifier in the form of the head."""
        return float(self.rows.norm(dim=1).max())

    def pulled(self, spread: float, v_ratio: Optional[float], x: Tensor) -> Tuple['Quadratic', float]:
        """Move the means of a classifier in the form of the head closer together, and give all directions one gain.

        Means become normalize(m + spread (mu_c - m)), where m is their normalised mean. This multiplies x.mu_c by the
        fraction spread / |m + spread (mu_c - m)|, up to a term that all classes share. The offsets are chosen so that
        the logits at ``x`` are multiplied by the mean fraction, so decisions near ``x`` stay the same.

        Args:
            spread: 0 to 1; 1 keeps the means.
            v_ratio: v / sigma2 for all directions; None keeps the gains.
            x: Mean of the examples, shape (d,).

        Returns:
            The classifier, and the mean fraction.
        """
        a, middle = self.precision(), normalize(self.centre.mean(0))
        between = middle + spread * (self.centre - middle)
        fraction = float((spread / between.norm(dim=1).clamp(min=1e-12)).mean())
        mu = normalize(between)
        gain = self.gain if v_ratio is None else torch.full_like(self.gain, a * v_ratio / (1 + v_ratio))
        form = Quadratic(a * mu, torch.zeros_like(self.offset), mu, self.directions, gain)
        offset = fraction * self.logits(x[None])[0] - form.logits(x[None])[0]
        return form._replace(offset=offset), fraction


def _product(directions: Tensor, gain: Tensor, x: Tensor) -> Tensor:
    """Compute sum_i gain_ci direction_ci (direction_ci.x_c), shape (C, d), for x (C, d)."""
    return (directions.mT @ (gain[..., None] * (directions @ x[..., None])))[..., 0]


def _by_parts(function: Callable[..., Tuple[Tensor, Tensor]], *per_class: Tensor) -> Tuple[Tensor, Tensor]:
    """Apply a function to tensors of C rows, a few classes at a time; join its two results."""
    size = max(1, _VALUES // (4 * per_class[0][0].numel() + 1))
    parts = [function(*part) for part in zip(*(t.split(size) for t in per_class), strict=True)]
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


class Estimator:
    """Eigenvectors of a covariance, in columns, and eigenvalues divided by their mean ``scale``, which is 1 if zero."""

    def __init__(self, covariance: Tensor, rank: int):
        self.rank = rank
        eigenvalues, self.basis = torch.linalg.eigh(covariance)
        eigenvalues = eigenvalues.clamp(min=0)
        self.scale = float(eigenvalues.mean())
        if self.scale <= 1e-24:  # zero covariance up to rounding: all examples of a class are equal
            self.scale, eigenvalues = 1.0, torch.ones_like(eigenvalues)
        self.eigenvalues = eigenvalues / self.scale

    def shrunk(self, shrinkage: float) -> Tensor:
        return (1 - shrinkage) * self.eigenvalues + shrinkage

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        """Yield the classifiers for several prior counts, as functions of x @ basis."""
        raise NotImplementedError

    def head_form(self, shrinkage: float, prior_count: float, temperature: float, most: float) -> Quadratic:
        """Compute the classifier in the form of the head; ``temperature`` and ``most`` as in :func:`on_sphere`."""
        form = next(self.candidates(shrinkage, [prior_count]))
        rows, centre, directions = (t @ self.basis.T for t in (form.rows, form.centre, form.directions))
        return form._replace(rows=rows, centre=centre, directions=directions)


class Discriminant(Estimator):
    """Gaussian classes with a shrunken pooled covariance, plus more variance along r directions of each class.

    Args:
        moments: Of the classes.
        rank: Number r of directions.
        leading: Where a class has no gain, directions are those of the largest pooled variance, for a start that gives
            all of them variance. Otherwise they are those of the least, where v_min changes the logits least.
    """

    def __init__(self, moments: Moments, rank: int, leading: bool = False):
        self.leading = leading
        self.count = moments.count
        super().__init__(moments.scatter / max(1.0, float((self.count - 1).sum())), rank)
        self.mean = moments.mean @ self.basis
        self.scatter = moments.sketches() @ self.basis / math.sqrt(self.scale)

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        pooled = self.shrunk(shrinkage)
        root = pooled.rsqrt()

        def leading(scatter: Tensor, count: Tensor) -> Tuple[Tensor, Tensor]:
            """Find directions, orthonormal after whitening, and the variances of the classes along them."""
            whitened = scatter * root / (count - 1).clamp(min=1).sqrt()[:, None, None]
            values, vectors = torch.linalg.eigh(whitened @ whitened.mT)
            values, vectors = values[:, -self.rank :].clamp(min=0), vectors[..., -self.rank :]
            # A direction without variance is arbitrary; its gain will be 0
            return vectors.mT @ whitened * root / values.clamp(min=1e-12).sqrt()[..., None], values

        directions, variance = _by_parts(leading, self.scatter, self.count)
        rows = self.mean / pooled
        # An estimated mean is farther from any x than the true mean; this is the expected excess
        excess = self.scale * (self.eigenvalues / pooled).sum() / self.count
        for prior_count in prior_counts:
            own = (self.count / (self.count + prior_count))[:, None]  # weight of the class's own covariance
            ratio = ((1 - own) + own * variance).clamp(min=1)  # only directions of more than the pooled variance
            offset = -0.5 * ((rows * self.mean).sum(1) - excess + self.scale * ratio.log().sum(1))
            yield Quadratic(rows, offset, self.mean, directions, 1 - 1 / ratio)

    def head_form(self, shrinkage: float, prior_count: float, temperature: float, most: float) -> Quadratic:
        form = super().head_form(shrinkage, prior_count, temperature, most)
        axes = self.basis.T  # by increasing variance
        fill = axes[len(axes) - self.rank :] if self.leading else axes[: self.rank]
        return on_sphere(form, fill, temperature, most)


class Density(Estimator):
    """Maximum likelihood for the head's own model: probabilistic PCA of each class about its mean direction.

    As in Tipping and Bishop 1999 (doi:10.1111/1467-9868.00196), but with one sigma2 for all classes. A class has r
    directions of its own and of the pooled scatter in any case, so ``leading`` is of no use.
    """

    def __init__(self, moments: Moments, rank: int, leading: bool = False):
        self.count = moments.count
        mu = normalize(moments.mean)
        off = moments.mean - mu
        super().__init__((moments.scatter + off.T @ (off * self.count[:, None])) / self.count.sum(), rank)
        self.mu = mu @ self.basis
        own = torch.cat([off[:, None], moments.sketches() / self.count.sqrt()[:, None, None]], 1)
        self.own = own @ self.basis / math.sqrt(self.scale)  # their Gram matrices are the second moments about mu

    def candidates(self, shrinkage: float, prior_counts: Sequence[float]) -> Iterator[Quadratic]:
        pooled = self.shrunk(shrinkage)
        dim = len(pooled)
        axes = torch.eye(dim, dtype=pooled.dtype, device=pooled.device)[dim - self.rank :]

        def leading(own: Tensor, share: Tensor) -> Tuple[Tensor, Tensor]:
            """Find leading eigenvectors, as rows, and eigenvalues of (1 - share) pooled + share own^T own."""
            # Rayleigh-Ritz method in the span of the own rows and the leading pooled directions
            span = torch.linalg.svd(torch.cat([own, axes.expand(len(own), -1, -1)], 1), full_matrices=False)[2]
            projected, share = span @ own.mT, share[:, None, None]
            matrix = (1 - share) * ((span * pooled) @ span.mT) + share * (projected @ projected.mT)
            values, vectors = torch.linalg.eigh(matrix)
            start = matrix.shape[-1] - self.rank
            return vectors[..., start:].mT @ span, values[:, start:].clamp(min=0)

        for prior_count in prior_counts:
            share = self.count / (self.count + prior_count)
            directions, values = _by_parts(leading, self.own, share)
            if self.rank < dim:
                total = (1 - share) * pooled.sum() + share * self.own.square().sum((1, 2))
                rest = (total - values.sum(1)).clamp(min=0) / (dim - self.rank)
                sigma2 = float((self.count * rest).sum() / self.count.sum())
            else:
                sigma2 = float(values.min()) / 2
            a = 1 / max(sigma2, LEAST_VARIANCE / self.scale)
            ratio = (a * values - 1).clamp(min=0)  # v / sigma2, for v = values - sigma2
            offset = -0.5 * (a * self.mu.square().sum(1) + self.scale * ratio.log1p().sum(1))
            yield Quadratic(a * self.mu, offset, self.mu, directions, a * ratio / (1 + ratio))


# The form of the head: centres of length 1, rows a * centre, orthonormal directions, gains < a


def on_sphere(form: Quadratic, fill: Tensor, temperature: float, most: float = math.inf) -> Quadratic:
    """Bring a classifier into the form of the head, up to a term that all classes share.

    Subtracting a vector s from all rows changes no decision. With D_c = sum_i g_i u_i u_i^T, the head's means have to
    be mu_c = (a - D_c)^-1 (row_c - D_c centre_c - s), of length 1. These are C equations for the d values of s, which
    are solved by least squares if C > d. The precision a is the radius of the smallest sphere, or larger so that gains
    stay below it.

    Args:
        form: Any quadratic classifier. Gains are clipped to 0.8 a, and to at least what v_min corresponds to.
        fill: Orthonormal directions (r, d) to use where there is no gain.
        temperature: Factor by which the logits will be multiplied.
        most: Largest a * temperature that gains may require.
    """
    directions, wanted = _orthonormal(form, fill)
    smallest = max(1e-3, _circumsphere(form.rows - _product(directions, wanted, form.centre))[1])
    for margin in _MARGINS:
        a, gain = smallest, wanted
        if gain.numel():
            a = max(1.02 * smallest, min(margin * float(gain.max()), most / temperature))
            ratio = LEAST_VARIANCE * a * temperature  # smallest v / sigma2
            gain = gain.clamp(a * ratio / (1 + ratio), 0.8 * a)
        linear = _product(directions, gain, form.centre)
        target = form.rows - linear
        s, radius = _circumsphere(target)
        if a > radius:
            s = _farther(target, s, form.centre.mean(0), math.sqrt(a**2 - radius**2))
        a = max(a, radius)
        z = _means(target, s, directions, gain, a)
        solved = float((z.norm(dim=1) - a).abs().max()) <= 1e-9 * a
        if solved or len(target) > target.shape[1] or not gain.numel():
            break
    mu = normalize(z)
    gap = z / a - mu  # error of the linear terms if C > d; the offsets make the logits exact at the class means
    offset = 0.5 * (form.centre * linear - mu * _product(directions, gain, mu)) + gap * (a * form.centre - linear)
    return Quadratic(a * mu, form.offset + offset.sum(1), mu, directions, gain)


def _orthonormal(form: Quadratic, fill: Tensor) -> Tuple[Tensor, Tensor]:
    """Find orthonormal directions and gains with the same quadratic terms; add directions with gain 0 if some lack."""
    roots = form.directions * form.gain.sqrt()[..., None]
    tiny = 1e-7 * max(1.0, math.sqrt(float(roots.square().sum((1, 2)).max())))

    def decomposed(part: Tensor) -> Tuple[Tensor, Tensor]:
        _, values, vectors = torch.linalg.svd(torch.cat([part, tiny * fill.expand_as(part)], 1), full_matrices=False)
        return vectors[:, : len(fill)], (values[:, : len(fill)].square() - tiny**2).clamp(min=0)

    return _by_parts(decomposed, roots)


def _circumsphere(points: Tensor) -> Tuple[Tensor, float]:
    """Compute centre and radius of the smallest sphere through points (C, d), by least squares if there is none."""
    middle = points.mean(0)
    points = points - middle
    matrix = torch.cat([2 * points, points.new_ones(len(points), 1)], 1)
    centre = _least_norm(matrix, points.square().sum(1))[:-1]
    return middle + centre, float((points - centre).square().sum(1).mean().sqrt())


def _farther(points: Tensor, centre: Tensor, towards: Tensor, distance: float) -> Tensor:
    """Move a centre away from ``towards`` by a distance, mostly along directions in which the points vary least."""
    points = points - points.mean(0)
    spread = points.T @ points
    spread.diagonal().add_(1e-9 * spread.diagonal().mean() + 1e-300)
    return centre - distance * normalize(torch.linalg.solve(spread, towards + 1e-9))


def _least_norm(matrix: Tensor, target: Tensor) -> Tensor:
    """Solve least squares for x of least norm; torch.linalg.lstsq on a GPU can't if rows are linearly dependent."""
    if matrix.shape[0] < matrix.shape[1]:
        return matrix.T @ (torch.linalg.pinv(matrix @ matrix.T, hermitian=True) @ target)
    return torch.linalg.pinv(matrix.T @ matrix, hermitian=True) @ (matrix.T @ target)


def _means(target: Tensor, s: Tensor, directions: Tensor, gain: Tensor, a: float) -> Tensor:
    """Solve |z_c| = a, z_c = a (a - D_c)^-1 (target_c - s), for s by the Gauss-Newton method; return z (C, d)."""

    def scaled_inverse(y: Tensor) -> Tensor:
        """Compute a (a - D_c)^-1 y_c, shape (C, d)."""
        return y + _product(directions, gain / (a - gain), y)

    z = scaled_inverse(target - s)
    error = z.norm(dim=1) - a
    while float(error.abs().max()) > 1e-13 * a:
        step = _least_norm(scaled_inverse(normalize(z)), error)
        for size in (1.0, 0.5, 0.25, 0.125, 0.0625):  # halve steps that are too long
            new_z = scaled_inverse(target - s - size * step)
            new_error = new_z.norm(dim=1) - a
            if float(new_error.norm()) < (1 - 0.1 * size) * float(error.norm()):
                break
        else:
            break
        s, z, error = s + size * step, new_z, new_error
    return z
