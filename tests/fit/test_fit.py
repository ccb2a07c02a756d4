"""The closed-form fit against scikit-learn, dense Gaussians of torch.distributions, and batch computations."""

import inspect
import logging
import math
import re
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from timm_zzz import ZZZHead
from timm_zzz.fit import ZZZFit, fit_head, fit_model
from timm_zzz.fit.estimators import Discriminant, Quadratic, on_sphere
from timm_zzz.fit.moments import HeldOut, Moments
from timm_zzz.fit.zzzfit import SHRINKAGES
from timm_zzz.head import INIT_STD
from timm_zzz.metrics import best_temperature
from timm_zzz.scores import class_gaussians_of

close = torch.testing.assert_close
C, D = 6, 20
PLAIN = dict(shrinkage=0.3, prior_count=5.0, temperature=1.0)  # nothing to choose


def draw(per_class, num_classes=C, dim=D, spread=0.8, own=2.0, rank=2):
    """Unit vectors around means that are far from the origin, and varied along directions of each class's own."""
    scales = torch.linspace(1.5, 0.3, dim).double()
    means = 0.6 + torch.randn(num_classes, dim).double() * 0.7
    axes = torch.linalg.qr(torch.randn(num_classes, dim, rank).double())[0]
    y = torch.arange(num_classes).repeat(per_class)
    x = means[y] + spread * torch.randn(len(y), dim).double() * scales
    x += own * (axes[y] @ torch.randn(len(y), rank, 1).double())[..., 0]
    return F.normalize(x), y


def relative(logits):
    """Logits but for what all classes share."""
    return logits - logits.mean(1, keepdim=True)


def double(X, y, rank, **options):
    return fit_head(X, y, rank, dtype=torch.float64, **options).eval()


def density(X, y, rank, prior_count=0):
    return double(X, y, rank, objective='density', prior_count=prior_count, temperature=1.0)


def scatters(X, y):
    means = torch.stack([X[y == c].mean(0) for c in range(int(y.max()) + 1)])
    return means, torch.stack([(X[y == c] - m).T @ (X[y == c] - m) for c, m in enumerate(means)])


def moments(X, y, num_classes, rank):
    result = Moments(num_classes, X.shape[1], rank)
    result.add(X, y)
    return result


def dense(X, y, rank, shrinkage, prior_count):
    """Means and covariances of the discriminant by its definition; the pooled covariance, and the same shrunken."""
    means, own = scatters(X, y)
    pooled = own.sum(0) / (len(y) - len(means))
    shrunk = (1 - shrinkage) * pooled + shrinkage * pooled.trace() / X.shape[1] * torch.eye(X.shape[1]).double()
    L = torch.linalg.cholesky(shrunk)
    covariances = []
    for scatter, n in zip(own, y.bincount().tolist(), strict=True):
        k = n / (n + prior_count)
        whitened = torch.linalg.solve(L, torch.linalg.solve(L, scatter / max(n - 1, 1)).T)
        values, vectors = torch.linalg.eigh((1 - k) * torch.eye(len(L)).double() + k * whitened)
        values = torch.cat([torch.ones(len(L) - rank).double(), values[len(L) - rank :].clamp(min=1)])
        covariances.append(L @ (vectors * values) @ vectors.T @ L.T)
    return means, torch.stack(covariances), pooled, shrunk


# The discriminant


@pytest.mark.parametrize('shrinkage', [0.0, 0.2, 1.0])
def test_rank_0_is_lda(shrinkage):
    (X, y), (Z, _) = draw(12), draw(5)
    oracle = LinearDiscriminantAnalysis(solver='lsqr', shrinkage=shrinkage, priors=[1 / C] * C).fit(X.numpy(), y)
    # scikit-learn divides the scatter by N, not by N - C
    head = double(X, y, 0, shrinkage=shrinkage, temperature=len(y) / (len(y) - C))
    expected = torch.as_tensor(oracle.decision_function(Z.numpy()))
    close(relative(head(3 * Z)), relative(expected), rtol=1e-9, atol=1e-8)
    norms = head.weight.norm(dim=1)
    assert norms.allclose(norms.new_full((C,), INIT_STD * head.feat_dim**0.5), rtol=1e-12)
    if shrinkage == 1:  # the nearest mean
        assert torch.equal(double(X, y, 0, shrinkage=1.0)(Z).argmax(1), torch.cdist(Z, scatters(X, y)[0]).argmin(1))


@pytest.mark.parametrize('rank', [1, 2, 4])
def test_discriminant_is_the_dense_gaussians(rank):
    (X, y), (Z, _) = draw(9), draw(5)
    gaussians = (MultivariateNormal(*dense(X, y, r, 0.3, 5.0)[:2]) for r in (rank, 0))
    expected, plain = (relative(gaussian.log_prob(Z[:, None])) for gaussian in gaussians)
    assert (expected - plain).abs().max() > 1
    for temperature in (1.0, 0.5):
        head = double(X, y, rank, **{**PLAIN, 'temperature': temperature})
        close(relative(head(Z)), temperature * expected, rtol=1e-7, atol=1e-7)
    single = fit_head(X.float(), y, rank, **PLAIN).eval()
    close(relative(single(Z.float())).double(), expected, rtol=1e-4, atol=2e-3)


def test_classes_of_few_examples_are_not_favoured_nor_handicapped():
    X, y = draw(40)
    keep = torch.cat([(y == c).nonzero()[: 3 if c % 2 else 40, 0] for c in range(C)])
    (X, y), (Z, _) = (X[keep], y[keep]), draw(5)
    means, covariances, pooled, shrunk = dense(X, y, 0, 0.3, 5.0)
    expected = MultivariateNormal(means, covariances).log_prob(Z[:, None])
    # E |x - mean|^2 in the metric of the shrunken covariance is larger by this than with the true mean
    expected = expected + 0.5 * torch.linalg.solve(shrunk, pooled).trace() / y.bincount()
    close(relative(double(X, y, 0, **PLAIN)(Z)), relative(expected), rtol=1e-8, atol=1e-7)


def test_class_prior():
    X, y = draw(10)
    X, y = X[15:], y[15:]
    uniform, empirical = (double(X, y, 2, class_prior=each, **PLAIN) for each in ('uniform', 'empirical'))
    log_share = (y.bincount().double() / len(y)).log()
    close(empirical.bias - uniform.bias, log_share - log_share.mean(), rtol=0, atol=1e-9)
    close(empirical.A, uniform.A)


# The form of the head


@pytest.mark.parametrize('num_classes, dim, rank', [(5, 12, 0), (5, 12, 3), (13, 12, 0), (1, 4, 2), (30, 64, 8)])
def test_on_sphere_changes_nothing(num_classes, dim, rank):
    args = (num_classes, dim), (num_classes,), (num_classes, dim), (num_classes, rank, dim)
    tensors = [torch.randn(size).double() for size in args]
    form = Quadratic(*tensors, torch.rand(num_classes, rank).double() / dim)
    x = F.normalize(torch.randn(9, dim).double())
    result = on_sphere(form, torch.eye(dim).double()[:rank], temperature=1e-3)  # where v_min is no bound
    a = result.precision()
    close(relative(result.logits(x)), relative(form.logits(x)), rtol=0, atol=1e-6 * a)
    close(result.centre.norm(dim=1), torch.ones(num_classes).double(), rtol=0, atol=1e-12)
    close(result.rows, a * result.centre, rtol=0, atol=1e-12 * a)
    identity = torch.eye(rank).double().expand(num_classes, -1, -1)
    close(result.directions @ result.directions.mT, identity, rtol=0, atol=1e-10)
    assert not rank or result.gain.max() < a


def test_directions_that_few_examples_lack_change_no_decision():
    """At this precision v_min is 0.6 sigma2, which along directions of much variance would change most decisions."""
    num_classes, dim, rank = 12, 48, 8
    scales = torch.logspace(-0.5, -2.5, dim).double()
    means = 3 + torch.randn(num_classes, dim).double() * scales
    y, t = (torch.arange(num_classes).repeat(count) for count in (4, 30))  # three directions for each class
    X, Z = (F.normalize(means[c] + 0.5 * torch.randn(len(c), dim).double() * scales) for c in (y, t))
    head = double(X, y, rank, **{**PLAIN, 'temperature': 0.03})
    expected = 0.03 * relative(MultivariateNormal(*dense(X, y, rank, 0.3, 5.0)[:2]).log_prob(Z[:, None]))
    assert 4000 < precision(head) < 9000
    assert torch.equal(head(Z).argmax(1), expected.argmax(1)) and torch.equal(expected.argmax(1), t)
    close(relative(head(Z)), expected, rtol=0, atol=0.2 * float(expected.abs().max()))


def test_a_start_has_its_directions_where_all_classes_vary():
    """Preset finetune gives variance to directions that few examples lack, too."""
    X, y = draw(3, num_classes=6, dim=20, rank=0)
    head = double(X, y, 8, preset='finetune')
    _, own = scatters(X, y)
    leading = torch.linalg.eigh(own.sum(0))[1][:, -1]
    basis = class_gaussians_of(head).basis
    assert (basis.mT @ leading).norm(dim=1).min() > 0.9


def test_more_classes_than_dimensions_are_fitted_by_least_squares():
    X, y = draw(20, num_classes=60, dim=16)
    form = Discriminant(moments(X, y, 60, 0), 0)
    direct = next(form.candidates(0.3, [1.0])).logits(X @ form.basis)
    logits = double(X, y, 0, shrinkage=0.3)(X)
    assert (logits.argmax(1) == direct.argmax(1)).double().mean() > 0.93
    assert F.cross_entropy(logits, y) < best_temperature(direct, y)[1] + 0.05


@pytest.mark.parametrize('num_classes, dim, own, limit', [(40, 48, 0.6, 1.0), (60, 64, 1.2, 0.3), (60, 64, 0.7, 1.0)])
def test_gains_beyond_the_range_of_the_head_do_no_harm(num_classes, dim, own, limit):
    """Directions of a variance far above that of the others ask for a sigma2 and v below their minimum."""
    scales = torch.linspace(1, 0.05, dim)
    means = 1 + 0.12 * torch.randn(num_classes, dim) * scales
    axes = torch.randn(num_classes, dim, 4) / dim**0.5
    y = torch.arange(num_classes).repeat(100)
    X = means[y] + 0.5 * torch.randn(len(y), dim) * scales + own * (axes[y] @ torch.randn(len(y), 4, 1))[..., 0]
    train, test = slice(0, 80 * num_classes), slice(80 * num_classes, None)
    nll = [F.cross_entropy(fit_head(X[train], y[train], rank).eval()(X[test]), y[test]).item() for rank in (0, 4)]
    assert nll[0] > 2.5 and nll[1] < limit


# The density


def reflected(X, y):
    """Every example and its mirror image about its class's mean direction, which is the mean of both."""
    mu = F.normalize(scatters(X, y)[0])
    return torch.cat([X, 2 * mu[y] - X]).numpy(), torch.cat([y, y]).numpy()


def test_density_of_full_rank_is_qda():
    (X, y), (Z, _) = draw(30, dim=6), draw(5, dim=6)
    options = dict(solver='eigen', covariance_estimator=EmpiricalCovariance(), priors=[1 / C] * C)
    if 'solver' not in inspect.signature(QuadraticDiscriminantAnalysis).parameters:
        pytest.skip('scikit-learn before 1.8, the last for Python 3.10, takes no covariance_estimator')
    oracle = QuadraticDiscriminantAnalysis(**options).fit(*reflected(X, y))
    expected = torch.as_tensor(oracle.decision_function(Z.numpy()))
    close(relative(density(X, y, 6)(Z)), relative(expected), rtol=1e-7, atol=1e-6)


def test_density_is_pca_of_each_class():
    rank, (X, y) = 3, draw(11)  # no more than the sketches hold
    classes = class_gaussians_of(density(X, y, rank))
    noise = []
    for c in range(C):
        data = reflected(X[y == c], torch.zeros(11, dtype=torch.int64))[0]
        pca = PCA(rank).fit(data)
        scale = (len(data) - 1) / len(data)
        noise.append(scale * pca.noise_variance_)
        along = np.abs(pca.components_ @ classes.basis[c].numpy()[:, ::-1])
        np.testing.assert_allclose(along, np.eye(rank), atol=1e-7)
        total = np.sort((classes.v[c] + classes.sigma2).numpy())[::-1]
        np.testing.assert_allclose(total, scale * pca.explained_variance_, rtol=1e-8)
    assert classes.sigma2.item() == pytest.approx(np.mean(noise), rel=1e-9)
    close(classes.mu, F.normalize(scatters(X, y)[0]), rtol=0, atol=1e-12)


def test_density_shrinks_towards_the_pooled_covariance():
    X, y = draw(5)
    off = X - F.normalize(scatters(X, y)[0])[y]
    own = torch.stack([off[y == c].T @ off[y == c] / 5 for c in range(C)])
    values = torch.linalg.eigvalsh(0.5 * off.T @ off / len(y) + 0.5 * own)  # k = 5 / (5 + 5)
    classes = class_gaussians_of(density(X, y, 4, prior_count=5.0))
    # Ritz values of a subspace that is nearly invariant
    close(classes.v.sort()[0] + classes.sigma2, values[:, -4:], rtol=0.02, atol=0)
    assert classes.sigma2.item() == pytest.approx(values[:, :-4].mean().item(), rel=0.02)


# Moments


def test_moments_are_those_of_the_batch():
    X, y = draw(7)
    many, (means, own) = moments(X, y, C, 7), scatters(X, y)
    close(many.mean, means, rtol=0, atol=1e-14)
    close(many.scatter, own.sum(0), rtol=0, atol=1e-12)
    assert torch.equal(many.count, torch.full((C,), 7.0).double())
    sketches = many.sketches()
    close(sketches.mT @ sketches, own, rtol=0, atol=1e-12)  # exact: not more examples than rows
    assert torch.equal(many.sketches(), sketches) and moments(X, y, C, 0).sketches().shape == (C, 0, D)
    assert not moments(X[:C], y[:C], C, 2).scatter.any()


def test_sketches_of_many_examples_are_close_to_the_batch():
    d, k, y = 30, 12, torch.zeros(900, dtype=torch.int64)
    X = torch.randn(900, d).double() * 0.8 ** torch.arange(d)
    actual, expected = (torch.linalg.svdvals(t)[:4] for t in (moments(X, y, 1, k).sketches()[0], X - X.mean(0)))
    close(actual, expected, rtol=0.005, atol=0)
    low = X @ torch.randn(d, 5).double() @ torch.randn(5, d).double()
    sketch, expected = moments(low, y, 1, k).sketches()[0], scatters(low, y)[1][0]
    close(sketch.T @ sketch, expected, rtol=0, atol=1e-11 * expected.abs().max().item())  # exact: of rank 5


def test_held_out_are_the_latest_of_each_class():
    y = torch.tensor([0] * 12 + [1] * 2 + [2] + [0] * 3)
    x = torch.eye(len(y)).double()
    for size in (1, 5, 18):
        held_out = HeldOut(Moments(3, len(y), 0), share=0.2, most=100)
        for part, labels in zip(x.split(size), y.split(size), strict=True):
            held_out.add(part, labels)
            held_out.examples()
        kept, labels = held_out.examples()
        assert kept.argmax(1).tolist() == [13, 15, 16, 17] and labels.tolist() == [1, 0, 0, 0]
        assert held_out.moments.count.tolist() == [12, 1, 1]
    held_out = HeldOut(Moments(3, len(y), 0), share=0.2, most=4)
    held_out.add(x, y)
    assert held_out.examples()[1].tolist() == [1, 0]


@pytest.mark.parametrize('objective', ['discriminant', 'density'])
@pytest.mark.parametrize('rank', [0, 3])
def test_batches_do_not_matter(rank, objective):
    (X, y), (Z, t) = draw(30), draw(5)
    options, estimators = dict(objective=objective, dtype=torch.float64, max_holdout=24), []
    for size in (1, 7, 64, len(y)):
        estimator = ZZZFit(C, rank, **options)
        for features, labels in zip(X.split(size), y.split(size), strict=True):
            estimator.partial_fit(features, labels)
            if size == 64:
                estimator.to_head()  # goes on afterwards
        estimators.append(estimator)
    estimators.append(ZZZFit(C, rank, **options).fit(Z, t).fit(X, y))  # starts anew
    heads = [estimator.to_head().eval() for estimator in estimators]
    for estimator, head in zip(estimators, heads, strict=True):
        close(head(Z), heads[0](Z), rtol=1e-6, atol=1e-5)
        for name in ('weight', 'bias', 'sigma2_raw', *(['v_raw'] if rank else [])):
            close(getattr(head, name), getattr(heads[0], name), rtol=1e-6, atol=1e-5)
        assert estimator.temperature_ == pytest.approx(estimators[0].temperature_, rel=1e-6)
        assert estimator.n_samples_ == 30 * C and estimator.class_count_.tolist() == [30] * C


# What is chosen


def test_shrinkage_is_the_best_of_held_out_examples():
    X, y = draw(40, spread=1.5)
    held = torch.arange(len(y)) >= 32 * C
    best = {}
    for shrinkage in SHRINKAGES['discriminant']:
        oracle = LinearDiscriminantAnalysis(solver='lsqr', shrinkage=shrinkage, priors=[1 / C] * C)
        logits = torch.as_tensor(oracle.fit(X[~held].numpy(), y[~held]).decision_function(X[held].numpy()))
        best[shrinkage] = min(F.cross_entropy(t * logits, y[held]).item() for t in np.geomspace(0.05, 5, 400))
    assert ZZZFit(C, 0).fit(X, y).shrinkage_ == min(best, key=best.get)
    assert len({round(value, 4) for value in best.values()}) == len(best)


def test_temperature_is_the_best_of_held_out_examples():
    X, y = draw(40)
    estimator = ZZZFit(C, 0, shrinkage=0.3, prior_count=1.0, dtype=torch.float64).fit(X, y)
    held = torch.arange(len(y)) >= 32 * C
    head = double(X[~held], y[~held], 0, shrinkage=0.3, prior_count=1.0, temperature=1.0)
    logits, smoothing = head(X[held]).detach(), dict(label_smoothing=1 / (int(held.sum()) + 1))
    search = dict(bounds=(0.1, 10), method='bounded', options=dict(xatol=1e-6))
    best = minimize_scalar(lambda t: F.cross_entropy(t * logits, y[held], **smoothing).item(), **search).x
    # What is kept is the temperature relative to the mean within-class variance
    parts = (X[~held], y[~held]), (X, y)
    variance, of_all = (scatters(*part)[1].sum(0).trace() / (len(part[1]) - C) for part in parts)
    assert estimator.temperature_ == pytest.approx(best * (of_all / variance).item(), rel=5e-4)
    assert abs(estimator.temperature_ - 1) > 0.05


def test_temperature_is_finite_where_all_is_right():
    logits = 7 * torch.eye(5).double()
    temperature, nll = best_temperature(logits, torch.arange(5))
    p = (temperature * logits).softmax(1).diagonal()
    close(p, torch.full((5,), 1 - 1 / 6 * 0.8).double())  # (N + 1 / C) / (N + 1): labels are smoothed
    assert nll == pytest.approx(-math.log(p[0]))
    assert 0 < best_temperature(logits, torch.arange(5).roll(1))[0] < 1e-3


def test_covariance_matters_and_more_examples_help():
    torch.manual_seed(1)
    X, y = draw(120, num_classes=10, spread=1.6)

    def nll(n, *args, **options):
        head = fit_head(X[: 10 * n], y[: 10 * n], *args, **options).eval()
        return F.cross_entropy(head(X[1000:].float()), y[1000:]).item()

    score = {n: nll(n, 2) for n in (2, 5, 20, 100)}
    assert score[100] < score[20] < score[5] < score[2] < math.log(10)
    assert score[100] < 0.8 * nll(100, 0, shrinkage=1.0)


@pytest.mark.parametrize('rank', [0, 4])
def test_defaults_where_nothing_can_be_held_out(rank):
    X, y = draw(1)
    with pytest.warns(UserWarning, match='no held-out example') as caught:
        estimator = ZZZFit(C, rank, dtype=torch.float64).fit(3 * X, y)
    assert caught[0].filename == __file__
    head = estimator.to_head().eval()
    assert F.softplus(head.sigma2_raw).item() + head.sigma2_min == pytest.approx(1 / 16)
    assert (estimator.shrinkage_, estimator.prior_count_) == (0.9, 1000)
    Z, _ = draw(20)
    assert (head(Z).argmax(1) == (Z @ X.T).argmax(1)).double().mean() > (0.999 if rank == 0 else 0.97)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit_head(X, y, rank, **PLAIN)
    with pytest.warns(UserWarning, match='no held-out example'):
        estimator = ZZZFit(C, rank, holdout=0, temperature=0.5).fit(*draw(10))
    assert (estimator.shrinkage_, estimator.prior_count_, estimator.temperature_) == (0.9, 1000, pytest.approx(0.5))


# Input


def test_arrays_tensors_and_dtypes():
    X, y = draw(10)
    single = X.float()
    expected = fit_head(single, y, 2, **PLAIN)(single)
    kinds = (
        (single.numpy(), y.numpy()),
        (single.tolist(), y.tolist()),
        (single, y.to(torch.uint8)),
        (5 * single, y.int()),
    )
    for features, labels in kinds:
        head = fit_head(features, labels, 2, **PLAIN)
        close(head(single), expected, rtol=1e-4, atol=1e-4)
        assert head.weight.dtype == torch.float32 and head.weight.requires_grad
    close(fit_head(X.bfloat16(), y, 2, **PLAIN)(single), expected, rtol=0, atol=1)
    assert fit_head(X, y, 2, dtype=torch.bfloat16, **PLAIN).weight.dtype == torch.bfloat16


FINITE = 'expected a finite number from'
WRONG = [
    (dict(num_classes=0), 'num_classes: expected an int >= 1, got 0'),
    (dict(rank=-1), 'rank: expected an int >= 0, got -1'),
    (dict(rank=2.0), 'rank: expected an int'),
    (dict(objective='mle'), "objective: expected one of discriminant, density, got 'mle'"),
    (dict(class_prior='flat'), 'class_prior: expected one of uniform, empirical'),
    (dict(shrinkage=1.5), f'shrinkage: {FINITE} 0 to 1, got 1.5'),
    (dict(shrinkage='best'), f"shrinkage: {FINITE} 0 to 1, got 'best'"),
    (dict(prior_count=math.inf), f'prior_count: {FINITE}'),
    (dict(temperature=0), f'temperature: {FINITE}'),
    (dict(temperature=math.nan), f'temperature: {FINITE}'),
    (dict(holdout=0.7), f'holdout: {FINITE} 0 to 0.5'),
    (dict(sigma2=0.1, temperature=1.0), 'sigma2: it sets the temperature, give only one of them, got temperature=1.0'),
    (dict(sigma2=-1.0), f'sigma2: {FINITE}'),
    (dict(preset='flat'), "preset: expected one of frozen, finetune, got 'flat'"),
    (dict(mean_spread=1.5), f'mean_spread: {FINITE} 0 to 1'),
    (dict(v_ratio=-0.1), f'v_ratio: {FINITE}'),
    *((dict(max_precision=bound), f'max_precision: {FINITE} 0 to') for bound in (-1, math.nan, math.inf, 'most', True)),
]


@pytest.mark.parametrize('options, message', WRONG)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ZZZFit(**{'num_classes': 3, **options})


def test_wrong_examples_change_nothing():
    X, y = draw(5)
    bad, infinite = X.clone(), X.clone()
    bad[[4, 9], 2] = math.nan
    infinite[7, 0] = -math.inf
    estimator = ZZZFit(C, 3, dtype=torch.float64).partial_fit(X, y)
    expected = estimator.to_head()(X)
    for features, labels, message in (
        (bad, y, 'X: 2 of 30 rows have NaN or infinite values, the first is row 4'),
        (infinite, y, 'X: 1 of 30 rows .* the first is row 7'),
        (X[0], y, 'X: expected numbers of shape'),
        (X[:, :0], y, 'X: expected numbers of shape'),
        (X, y[:-1], 'y: expected 30 labels, one per row of X, got 29'),
        (X, y - 1, 'y: expected class indices from 0 to 5, got -1'),
        (X, y + 1, 'y: expected class indices from 0 to 5, got 6'),
        (X, y.double(), 'y: expected class indices of shape'),
        (X, F.one_hot(y), 'y: expected class indices of shape'),
        (X[:, :9], y, 'X: expected rows of 20 values as before, got 9'),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.partial_fit(features, labels)
    assert torch.equal(estimator.to_head()(X), expected) and estimator.n_samples_ == 30
    with pytest.raises(ValueError, match='rank: expected at most the width 20 of the features, got 21'):
        fit_head(X, y, 21)


def test_classes_of_few_or_no_examples(caplog):
    caplog.set_level(logging.INFO, 'timm_zzz.fit')
    fit_head(*draw(3), 3)
    assert '6 of 6 classes have at most 3 examples' in caplog.text and 'of 6 held-out examples' in caplog.text
    X, y = draw(5)
    for count, some in ((8, '2 of 8 classes have no example: 6, 7'), (20, '14 of 20 .*: 6, 7, 8, 9, 10, ...')):
        with pytest.raises(ValueError, match=f'y: {some}$'):
            fit_head(X, y, 2, num_classes=count)
    with pytest.raises(ValueError, match='no examples yet'):
        ZZZFit(3).to_head()
    with pytest.raises(ValueError, match='num_classes: expected an int >= 1, got 0'):
        fit_head(X[:0], y[:0])


def test_head_of_another_size_is_refused():
    X, y = draw(5)
    estimator = ZZZFit(C, 3, **PLAIN).fit(X, y)
    for size in ((C + 1, D, 3), (C, D + 1, 3), (C, D, 2)):
        head = ZZZHead(*size)
        before = head.weight.detach().clone()
        with pytest.raises(ValueError, match=r'head: expected classes, features and rank \(6, 20, 3\)'):
            estimator.fill(head)
        assert torch.equal(head.weight, before)
    head = ZZZHead(C, D, 3, v_min=0.01, sigma2_min=0.02)
    assert estimator.fill(head) is head and head(X.float()).isfinite().all()


def degenerate():
    X, y = draw(6)
    return {
        'zero features': (X * (y != 1)[:, None], y),
        'equal classes': (X[torch.arange(len(y)) + (y == 2)], y),
        'equal examples': (X[:C].repeat(6, 1), y),
        'all equal': (X[:1].expand(len(y), -1), y),
        'two dimensions': (X[:, :2], y),
        'one dimension': (X[:, :1], y),
        'one class': (X, torch.zeros_like(y)),
        'rank above examples': (X[: 2 * C], y[: 2 * C]),
        'one class of one example': (X[5:], y[5:]),
    }


@pytest.mark.parametrize('objective', ['discriminant', 'density'])
@pytest.mark.parametrize('name', degenerate())
def test_degenerate_examples(name, objective):
    X, y = degenerate()[name]
    for rank in (0, 1, min(4, X.shape[1])):
        head = fit_head(X, y, rank, objective=objective)
        logits = head(X.float())
        assert logits.isfinite().all() and all(p.isfinite().all() for p in head.parameters())
        logits.logsumexp(1).sum().backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
        assert F.cross_entropy(logits, y) < math.log(len(y.unique())) + 0.5


# Models


def batches(num_classes=4, count=6, size=8):
    torch.manual_seed(5)
    colours = torch.rand(num_classes, 3, 1, 1)
    y = [torch.arange(size) % num_classes for _ in range(count)]
    return [(colours[t] + 0.3 * torch.randn(size, 3, 64, 64), t) for t in y]


def test_fit_model():
    model, data = timm.create_model('test_resnet.zzz_r4', num_classes=4), batches()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert fit_model(model, data) is model
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {key for key in after if key.startswith('fc.')}

    model.eval()
    with torch.no_grad():
        features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in data])
        expected = fit_head(features, torch.cat([y for _, y in data]), 4).eval()
        x, y = data[0]
        close(model(x), expected(features[:8]), rtol=1e-4, atol=1e-4)
        assert (model(x).argmax(1) == y).double().mean() > 0.8
    fit_model(model, data, amp_dtype=torch.bfloat16, device='cpu')
    assert (model(x).argmax(1) == y).double().mean() > 0.8
    assert model.fc.weight.dtype == torch.float32 and not model.fc._forward_pre_hooks


def test_fit_model_fits_each_head_to_its_own_input():
    name = 'deit_tiny_distilled_patch16_224.zzz_r8'
    model = timm.create_model(name, num_classes=4, zzz_rank=2, depth=1, img_size=64, drop_rate=0.5).train()
    data = batches()
    fit_model(model, data, **PLAIN).eval()
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(x) for x, _ in data])
    y = torch.cat([y for _, y in data])
    for i, head in enumerate((model.head, model.head_dist)):
        close(head(tokens[:, i]), fit_head(tokens[:, i], y, 2, **PLAIN)(tokens[:, i]), rtol=1e-3, atol=1e-2)


class Tokens(nn.Module):
    """A head that gets one token of several, or all, and perhaps one that gets none."""

    def __init__(self, idle):
        super().__init__()
        self.head, self.idle = ZZZHead(4, 3, 1), ZZZHead(4, 3, 1) if idle else None

    def forward(self, x):
        x = x.flatten(2).mT
        return self.head(x if self.idle is None else x[:, 0])


def test_fit_model_refuses_what_it_cannot_fit():
    data, model = batches(), timm.create_model('test_resnet.zzz_r4', num_classes=4)
    before = model.fc.weight.detach().clone()
    for wrong, loader, message in (
        (timm.create_model('test_resnet'), data, 'model: it has no ZZZ head'),
        (model, [(x, y + 1) for x, y in data], 'y: expected class indices from 0 to 3, got 4'),
        (model, [(x, y % 2) for x, y in data], '2 of 4 classes have no example'),
        (model, [], 'no examples yet'),
        (Tokens(idle=True), data, 'head idle takes no part in eval mode'),
        (Tokens(idle=False), data, r'head head gets an input of shape \[8, 4096, 3\], not one embedding per image'),
    ):
        with pytest.raises(ValueError, match=message):
            fit_model(wrong, loader)
    assert torch.equal(model.fc.weight, before) and model.training and not model.fc._forward_pre_hooks


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('rank', [0, 3])
def test_cuda(rank):
    X, y = draw(30)
    head = double(X.cuda(), y, rank)
    assert head.weight.is_cuda
    # What all classes share is settled only up to 1e9 times rounding, on the CPU too, and no softmax sees it
    logits = head(X.cuda()).cpu(), double(X, y, rank)(X)
    close(*(each.log_softmax(1) for each in logits), rtol=1e-9, atol=1e-9)


def test_page(root, tmp_path):
    """Its examples run."""
    page = (root / 'docs' / 'fit.md').read_text(encoding='utf-8')
    snippets = re.findall(r'```python\n(.*?)```', page, re.S)
    assert len(snippets) == 4
    for c, colour in enumerate(('red', 'green', 'blue', 'white')):
        (tmp_path / str(c)).mkdir()
        for i in range(2):
            Image.new('RGB', (32 + i, 32), colour).save(tmp_path / str(c) / f'{i}.png')
    X, y = draw(10)
    names = dict(features=X.float(), targets=y, loader=batches(), batches=[(X[:30], y[:30]), (X[30:], y[30:])])
    names.update(labels=[f'class {c}' for c in y.tolist()], class_names=list('abcd'))
    for snippet in snippets:
        snippet = snippet.replace('pretrained=True', 'pretrained=False').replace('DIR/train', str(tmp_path))
        exec(compile(snippet, 'docs/fit.md', 'exec'), names)
    assert len(names['accuracy']) == 5 and names['classifier'].classes_.tolist() == list('abcd')
    assert names['head'](X.float()).shape == (60, C) and names['model'](names['loader'][0][0]).shape == (8, 4)


# A start of training


def test_a_given_sigma2_is_another_temperature():
    """The same decisions, log-odds by one common factor, and rows as long as those of the reference's start."""
    y = torch.arange(120) % 4
    X = torch.randn(120, 16) + 4 * torch.eye(4, 16)[y]
    fitted, start = (fit_head(X, y, rank=2, sigma2=sigma2).double() for sigma2 in (None, 1 / 16))
    assert 1 / precision(start) == pytest.approx(1 / 16, rel=1e-5)
    with torch.no_grad():
        odds = [head(X).diff(dim=1) for head in (fitted, start)]
    factor = (odds[0] * odds[1]).sum() / odds[0].square().sum()
    assert not 0.9 < factor < 1.1
    close(odds[1], factor * odds[0], rtol=1e-4, atol=1e-4)
    new = ZZZHead(4000, 16, rank=0, init='reference').weight.norm(dim=1).square().mean().sqrt()
    assert float(start.weight.detach().norm(dim=1).mean()) == pytest.approx(float(new.detach()), rel=0.05)


def gaussian_logits(head, x):
    """Logits at one x of any length, the head's own at length 1, by dense Gaussians."""
    mu, v, s2 = F.normalize(head.weight, dim=1), F.softplus(head.v_raw) + head.v_min, 1 / precision(head)
    U = torch.linalg.qr(head.A)[0]
    covariance = (U * v[:, None]) @ U.mT + s2 * torch.eye(len(x)).double()
    return (MultivariateNormal(mu, covariance).log_prob(x) + head.bias).detach()


@pytest.mark.parametrize('rank', [0, 2])
@pytest.mark.parametrize(
    'options', [{}, dict(mean_spread=0.6, sigma2=0.1), dict(v_ratio=0.5), dict(objective='density')]
)
def test_finetune_pulls_the_means_of_the_fit_together(options, rank):
    X, y = draw(60, own=0.5)
    (X, Z), (y, t) = X.split([240, 120]), y.split([240, 120])
    numbers = {**dict(sigma2=1 / 16, mean_spread=0.3, v_ratio=0.1), **options}
    kappa, ratio = numbers.pop('mean_spread'), numbers.pop('v_ratio')
    fitted, start = double(X, y, rank, **numbers), double(X, y, rank, preset='finetune', **options)
    apart = double(X, y, rank, v_ratio=ratio, **numbers)  # the same directions where a class has no gain
    mu = F.normalize(apart.weight.detach(), dim=1)
    m = F.normalize(mu.mean(0), dim=0)
    between = m + kappa * (mu - m)
    close(F.normalize(start.weight.detach(), dim=1), F.normalize(between, dim=1), rtol=0, atol=1e-9)
    close(start.weight.norm(dim=1), fitted.weight.norm(dim=1), rtol=1e-9, atol=0)
    assert precision(start) == pytest.approx(1 / numbers['sigma2'], rel=1e-6)
    assert start.bias.mean().abs() < 1e-9
    if rank:
        gaussians = class_gaussians_of(start)
        close(gaussians.v, torch.full_like(gaussians.v, ratio * numbers['sigma2']), rtol=1e-6, atol=0)
        assert torch.equal(start.A, apart.A)
        fraction = (kappa / between.norm(dim=1)).mean()
        at_the_mean = [gaussian_logits(head, X.mean(0)) for head in (start, fitted)]
        close(relative(at_the_mean[0][None]), fraction * relative(at_the_mean[1][None]), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        right = [(head(Z).argmax(1) == t).double().mean() for head in (start, fitted)]
        assert right[0] > right[1] - 0.1 and right[1] > 0.6
        assert start(Z).softmax(1).max() < fitted(Z).softmax(1).max()


def test_presets():
    X, y = draw(12)
    plain, frozen, spread = (
        double(X, y, 2, **options) for options in ({}, dict(preset='frozen'), dict(mean_spread=1.0))
    )
    assert all(torch.equal(value, frozen.state_dict()[key]) for key, value in plain.state_dict().items())
    assert all(torch.equal(value, spread.state_dict()[key]) for key, value in plain.state_dict().items())
    # What is given precedes the preset, a temperature its sigma2
    warm = double(X, y, 2, preset='finetune', temperature=0.5)
    assert precision(warm) == pytest.approx(precision(double(X, y, 2, temperature=0.5, max_precision='auto')), rel=1e-6)
    assert mean_cosine(warm) > mean_cosine(plain)
    # All means in one place, and two that cancel
    one = double(X, y, 2, preset='finetune', mean_spread=0.0)
    assert mean_cosine(one) == pytest.approx(1) and one(X).isfinite().all()
    opposite = torch.cat([torch.eye(2, 4).repeat(5, 1), -torch.eye(2, 4).repeat(5, 1)])
    for spread in (0.0, 0.3):
        head = fit_head(opposite, torch.arange(4).repeat_interleave(5) % 2, 0, preset='finetune', mean_spread=spread)
        assert all(value.isfinite().all() for value in head.state_dict().values())


@pytest.fixture(scope='module')
def cone():
    """Classes whose closest head has a sigma2 small enough for gains, and so means close together."""
    torch.manual_seed(2)
    num_classes, dim, count = 8, 48, 40
    y = torch.arange(num_classes * count) % num_classes
    own = 0.6 * F.normalize(torch.randn(num_classes, dim))[y] * torch.randn(len(y), 1)
    noise = torch.randn(len(y), dim) * torch.logspace(-1.5, -0.5, dim)
    return 1 + 0.3 * torch.eye(num_classes, dim)[y] + own + noise, y


def mean_cosine(head):
    mu = F.normalize(head.weight.detach().double(), dim=1)
    return float(((mu @ mu.T).sum() - len(mu)) / (len(mu) * (len(mu) - 1)))


def precision(head):
    return 1 / class_gaussians_of(head).sigma2.item()


def largest_variance(head):
    """Find the largest v / sigma2."""
    return class_gaussians_of(head).v.max().item() * precision(head)


def test_a_bound_on_the_precision_moves_the_means_apart(cone):
    """Gains that need more precision are cut off at 0.8 of it, which is v = 4 sigma2; the least is that of rank 0."""
    X, y = cone
    heads = {bound: fit_head(X, y, rank=2, max_precision=bound) for bound in (9000, 300, 0)}
    cosines = [mean_cosine(head) for head in heads.values()]
    assert cosines[0] > 0.9 and 0.3 < cosines[1] < 0.6 and cosines[2] < 0.1
    assert largest_variance(heads[9000]) == pytest.approx(1.25, rel=1e-3)  # 1.8 times the largest gain
    assert precision(heads[300]) == pytest.approx(300, rel=1e-3)
    assert largest_variance(heads[300]) == pytest.approx(4, rel=1e-3)
    assert precision(heads[0]) == pytest.approx(precision(fit_head(X, y, rank=0)), rel=0.1)
    assert all(F.cross_entropy(head(X), y) < 0.02 for head in heads.values())
    # Softened alike, the farther apart the sharper
    starts = [fit_head(X, y, rank=2, max_precision=bound, sigma2=1 / 16) for bound in heads]
    nll = [F.cross_entropy(head(X), y).item() for head in starts]
    assert nll[0] > nll[1] + 0.1 and nll[1] > nll[2] + 0.1
    assert [mean_cosine(head) for head in starts] == pytest.approx(cosines, abs=1e-5)


def test_a_bound_on_the_precision_that_cuts_nothing_changes_no_logit(cone):
    X, y = cone
    options = dict(rank=2, shrinkage=0.3, prior_count=10.0, temperature=0.1, dtype=torch.float64)
    wide = fit_head(X, y, max_precision=1e9, **options)
    apart = fit_head(X, y, max_precision=0.75 * precision(wide), **options)
    assert precision(apart) == pytest.approx(0.75 * precision(wide), rel=1e-6)
    assert mean_cosine(apart) < mean_cosine(wide) - 0.002 and largest_variance(apart) < 3.9
    close(relative(apart(X)), relative(wide(X)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('options', [dict(rank=0), dict(rank=2, objective='density')])
def test_a_bound_on_the_precision_is_of_no_use_without_gains_or_for_the_density(cone, options):
    heads = [fit_head(*cone, max_precision=bound, **options).state_dict() for bound in ('auto', 0)]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
