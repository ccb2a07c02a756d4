"""Densities and outlier scores against torch.distributions, scikit-learn and dense matrices; calibration by hand."""

import itertools
import math
import re
import statistics
import sys

import numpy as np
import pytest
import timm
import torch
from oracles import PARAMETERS, dense_logits, distinct, parts
from scipy.optimize import minimize_scalar
from torch import nn
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily, MultivariateNormal
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from timm_zzz import ZZZHead, scores
from timm_zzz.head import ZZZConvHead, heads_of, record_inputs
from timm_zzz.metrics import KeptLogits, calibration_temperature, cross_calibrate
from timm_zzz.scores import (
    METHODS,
    Background,
    auroc,
    calibrate,
    class_gaussians_of,
    ece,
    energy,
    fold_temperature,
    fpr95,
    log_density,
    log_dict,
    mahalanobis,
    max_logit,
    max_softmax,
    negative_log_density,
    outlier_scores,
    relative_mahalanobis,
    reliability,
)

RANKS = [0, 1, 4, 8]
D = 12
close = torch.testing.assert_close
LOGIT_SCORES = (max_logit, max_softmax, energy)
HEAD_SCORES = (negative_log_density, mahalanobis, relative_mahalanobis)


def new_head(rank, num_classes=5, feat_dim=D, dtype=torch.float64, sigma2_raw=-1.0):
    head = ZZZHead(num_classes, feat_dim, rank, dtype=dtype)
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.fill_(sigma2_raw) if name == 'sigma2_raw' else p.normal_()
    return head.eval()


def embeddings(count=7, feat_dim=D, dtype=torch.float64):
    return (4 * torch.randn(count, feat_dim, dtype=torch.float64)).to(dtype)


def by_hand(head, f):
    """x (N, d), means (C, d), dense covariances (C, d, d) and priors (C,) in float64, from the parameters."""
    tensors = dict(head.named_parameters(), features=f)
    args = [tensors[name].detach().double() if name in tensors else None for name in PARAMETERS]
    x, mu, U, v, s2 = parts(*args)
    return x, mu, (U * v[:, None]) @ U.mT + s2 * torch.eye(mu.shape[1]).double(), args[2].exp() / args[2].exp().sum()


def distances2(x, means, covariances):
    """Squared Mahalanobis distances (N, C), by inverse matrices."""
    inverse = np.linalg.inv(covariances.numpy())
    delta = x.numpy()[:, None] - means.numpy()
    return torch.as_tensor(np.einsum('nci,cij,ncj->nc', delta, inverse, delta))


# Densities of a ZZZ head


@pytest.mark.parametrize('rank', RANKS)
def test_log_density(rank):
    head, f = new_head(rank), embeddings()
    x, mu, sigma, _ = by_hand(head, f)
    actual = log_density(head, f)
    assert actual.dtype == torch.float64 and not actual.requires_grad
    close(actual, MultivariateNormal(mu, sigma).log_prob(x[:, None]), rtol=1e-12, atol=1e-11)
    if rank:
        U = torch.linalg.qr(head.A.detach())[0] * (F.softplus(head.v_raw.detach()) + head.v_min).sqrt()[:, None]
        s2 = (F.softplus(head.sigma2_raw.detach()) + head.sigma2_min).expand(5, D)
        close(actual, LowRankMultivariateNormal(mu, U, s2).log_prob(x[:, None]), rtol=1e-12, atol=1e-11)
    head.log_density = True
    close(head(f), actual + D / 2 * math.log(2 * math.pi) + head.bias, rtol=1e-12, atol=1e-11)
    close(head.fuse()(f), head(f), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize('rank', RANKS)
def test_negative_log_density(rank):
    head, f = new_head(rank), embeddings()
    x, mu, sigma, prior = by_hand(head, f)
    expected = -MixtureSameFamily(Categorical(prior), MultivariateNormal(mu, sigma)).log_prob(x)
    actual = negative_log_density(head, f)
    close(actual, expected, rtol=1e-12, atol=1e-11)
    with torch.no_grad():
        shift = actual - energy(head(f))
        close(shift, shift[:1].expand(7), rtol=0, atol=1e-11)  # docs/outliers.md: a constant
        s2 = F.softplus(head.sigma2_raw).squeeze() + head.sigma2_min
        constant = 0.5 / s2 + D / 2 * torch.log(2 * math.pi * s2) + head.bias.logsumexp(0)
        close(shift[0], constant, rtol=1e-12, atol=1e-11)
        head.bias += 3.0
    close(negative_log_density(head, f), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize('rank', RANKS)
def test_mahalanobis(rank):
    head, f = new_head(rank), embeddings()
    x, mu, sigma, _ = by_hand(head, f)
    close(mahalanobis(head, f), distances2(x, mu, sigma).amin(1), rtol=1e-11, atol=1e-11)
    at_means = mahalanobis(head, 3 * head.weight.detach())
    assert (at_means >= 0).all() and at_means.max() < 1e-12


def test_mahalanobis_keeps_its_digits_where_the_log_determinant_is_large():
    head = new_head(4, 5, 768, torch.float32, sigma2_raw=-6.0)
    f = head.weight.detach() + 0.01 * torch.randn(5, 768)
    x, mu, sigma, _ = by_hand(head, f)
    expected = distances2(x, mu, sigma).amin(1)
    s2 = sigma[0].diagonal().min()
    scale = 1 / s2  # of a |x|^2, whose roundings no expansion of the distance avoids
    assert 768 * -s2.log() > 5 * scale
    close(mahalanobis(head, f).double(), expected, rtol=0, atol=8 * 2**-24 * scale.item())


@pytest.mark.parametrize('rank', RANKS)
def test_background_of_a_head(rank):
    head, f = new_head(rank), embeddings()
    x, mu, sigma, prior = by_hand(head, f)
    mixture = MixtureSameFamily(Categorical(prior), MultivariateNormal(mu, sigma))
    background = Background.of(head)
    covariance = background.factor @ background.factor.T
    close(background.mean, mixture.mean, rtol=1e-12, atol=1e-12)
    close(covariance.diagonal(), mixture.variance, rtol=1e-12, atol=1e-12)
    moment = sum(p * (s + torch.outer(m, m)) for p, m, s in zip(prior, mu, sigma, strict=True))
    close(covariance, moment - torch.outer(mixture.mean, mixture.mean), rtol=1e-12, atol=1e-12)
    expected = distances2(x, background.mean[None], covariance[None])[:, 0]
    close(background.mahalanobis(f), expected, rtol=1e-11, atol=1e-11)
    relative = distances2(x, mu, sigma).amin(1) - expected
    close(relative_mahalanobis(head, f), relative, rtol=1e-11, atol=1e-11)
    close(relative_mahalanobis(class_gaussians_of(head), f, background), relative, rtol=1e-11, atol=1e-11)


# Scores from logits


def test_scores_from_logits():
    logits = 3 * torch.randn(9, 6, dtype=torch.float64)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    close(max_logit(logits), torch.tensor([-max(row) for row in logits.tolist()]).double())
    close(max_softmax(logits), torch.as_tensor(1 - p.max(1)))
    close(energy(logits), torch.as_tensor(-np.log(np.exp(logits.numpy()).sum(1))))
    close(energy(logits, 2.5), torch.as_tensor(-2.5 * np.log(np.exp(logits.numpy() / 2.5).sum(1))))
    for score in LOGIT_SCORES:
        assert score(logits[:0]).shape == (0,)
        single = score(logits.half())
        assert single.dtype == torch.float32
        close(single, score(logits.half().double()).float())


def test_max_softmax_tells_confident_images_apart():
    gaps = torch.tensor([0.0, 1.0, 20.0, 50.0, 80.0])
    logits = torch.stack([gaps + 700, torch.full_like(gaps, 700)], 1)
    close(max_softmax(logits).tolist(), [1 / (1 + math.exp(gap)) for gap in gaps], rtol=1e-5, atol=0)
    assert max_softmax(torch.zeros(1, 10)).item() == pytest.approx(0.9)
    assert max_softmax(torch.zeros(1, 1)).item() == 0


def test_shifted_logits():
    """What is added to all logits of all images moves max-logit and energy, and no AUROC."""
    pytest.importorskip('sklearn')
    inlier, outlier = 3 * torch.randn(50, 6).double(), torch.randn(40, 6).double()
    for score, moved in ((max_logit, -7.0), (energy, -7.0), (max_softmax, 0.0)):
        close(score(inlier + 7), score(inlier) + moved)
        before = auroc(score(inlier), score(outlier))
        assert 0.5 < before < 1 and auroc(score(inlier + 7), score(outlier + 7)) == before


# Any head


@pytest.mark.parametrize('rank', RANKS)
def test_outliers_have_larger_scores_than_the_class_means(rank):
    head = new_head(rank, 4, 64, sigma2_raw=-3.0)
    with torch.no_grad():
        span = head.weight if head.A is None else torch.cat([head.weight, head.A.mT.flatten(0, 1)])
        # Orthogonal to every mean and every direction of variance
        outliers = torch.linalg.svd(span)[2][len(span) :]
        assert len(outliers) >= 28
        found = outlier_scores(head, torch.cat([head.weight, 5 * outliers]))
    assert tuple(found) == METHODS
    for name, score in found.items():
        assert score[4:].min() > score[:4].max(), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_outlier_scores(dtype):
    head, f = new_head(4, dtype=dtype), embeddings(dtype=dtype)
    background = Background.of(new_head(2, dtype=dtype))
    with torch.no_grad():
        logits = head(f)
    expected = dict(relative_mahalanobis=relative_mahalanobis(head, f, background))
    expected.update((score.__name__, score(logits)) for score in LOGIT_SCORES)
    expected.update((score.__name__, score(head, f)) for score in (mahalanobis, negative_log_density))
    found = outlier_scores(head, f, list(expected), background)
    assert list(found) == list(expected) and set(found) == set(METHODS)
    for name, score in found.items():
        assert score.shape == (7,) and score.dtype == dtype
        close(score, expected[name], rtol=1e-4, atol=1e-5)
    assert list(outlier_scores(head, f)) == list(METHODS)
    assert list(outlier_scores(head, f, ['mahalanobis'])) == ['mahalanobis']
    close(outlier_scores(head, f)['relative_mahalanobis'], relative_mahalanobis(head, f))


def test_linear_layer():
    for linear in (nn.Linear(D, 5), nn.Linear(D, 5, bias=False)):
        f = embeddings(dtype=torch.float32)
        found = outlier_scores(linear, f)
        with torch.no_grad():
            expected = {score.__name__: score(linear(f)) for score in LOGIT_SCORES}
        assert list(found) == list(expected)
        close(found, expected)
        with torch.autocast('cpu', torch.bfloat16):
            close(outlier_scores(linear, f), found, rtol=0, atol=0)
        assert list(outlier_scores(linear, f, ['energy'])) == ['energy']
        with pytest.raises(ValueError, match="max_logit, max_softmax, energy for this head, got 'mahalanobis'"):
            outlier_scores(linear, f, ['energy', 'mahalanobis'])


@pytest.mark.parametrize('score', [log_density, *HEAD_SCORES])
def test_dtypes_autocast_and_prepared_classes(score):
    head, f = new_head(4, dtype=torch.float32), embeddings(dtype=torch.float32)
    single = score(head, f)
    assert single.dtype == torch.float32 and score(head, f[:0]).shape == single[:0].shape
    double = score(head.double(), f.double())
    head.float()
    assert double.dtype == torch.float64
    close(single.double(), double, rtol=1e-4, atol=1e-4)
    close(score(head, f.double()), double, rtol=1e-12, atol=1e-10)  # all of it in float64, not only the result
    close(score(class_gaussians_of(head), f), single)
    with torch.autocast('cpu', torch.bfloat16):
        close(score(head, f), single, rtol=0, atol=0)
    low = score(head.bfloat16(), f.bfloat16())
    assert low.dtype == torch.float32
    close(low, score(head.float(), f.bfloat16().float()))


def test_in_parts(monkeypatch):
    """Thousands of embeddings and classes are gone through a few at a time."""
    head, linear, f = new_head(4), nn.Linear(D, 5).double(), embeddings(23)

    def everything():
        of_heads = [*outlier_scores(head, f).values(), *outlier_scores(linear, f).values()]
        return [*of_heads, log_density(head, f), Background.of(head).factor]

    whole, sizes, split = everything(), set(), torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, 'split', lambda t, size: sizes.add(size) or split(t, size))
    for values in (1, 100):
        monkeypatch.setattr(scores, '_VALUES', values)
        close(everything(), whole, rtol=1e-9, atol=1e-9)
    assert max(sizes) < 10


def test_gradients_flow_to_the_features():
    head, f = new_head(4), embeddings(3).requires_grad_()
    for score in HEAD_SCORES:
        assert torch.autograd.gradcheck(lambda f, score=score: score(head, f), (f,))
    negative_log_density(head, f).sum().backward()
    assert f.grad is not None and all(p.grad is None for p in head.parameters())


def test_nan_stays_nan():
    head, f = new_head(4), embeddings(3)
    f[1, 0] = math.nan
    for name, score in outlier_scores(head, f).items():
        assert score.isnan().tolist() == [False, True, False], name


# AUROC and FPR95


@pytest.mark.parametrize('values', [3, 30, 10**6])
def test_auroc_counts_pairs(values):
    pytest.importorskip('sklearn')
    inlier, outlier = torch.randint(values, (60,)) / 7, torch.randint(values // 3, values * 2, (45,)) / 7
    wins = [(a > b) + (a == b) / 2 for a in outlier.tolist() for b in inlier.tolist()]
    assert auroc(inlier, outlier) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auroc(outlier, inlier) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-12)
    for transform in (torch.Tensor.exp, lambda t: 3 * t - 1) if values < 100 else ():
        assert auroc(transform(inlier.double()), transform(outlier.double())) == pytest.approx(auroc(inlier, outlier))


@pytest.mark.parametrize('count', [1, 10, 20, 39, 40, 100, 137])
@pytest.mark.parametrize('values', [4, 1000])
def test_fpr95_by_its_definition(count, values):
    pytest.importorskip('sklearn')
    inlier, outlier = torch.randint(values, (count,)).double(), torch.randint(values // 2, values * 2, (53,)).double()
    threshold = next(t for t in sorted(inlier.tolist()) if 100 * (inlier <= t).sum() >= 95 * count)
    assert fpr95(inlier, outlier) == (outlier <= threshold).sum().item() / 53


def test_fpr95_tiny():
    pytest.importorskip('sklearn')
    inlier = torch.arange(1.0, 21.0)  # 19 accepts 19 of 20
    assert fpr95(inlier, torch.tensor([18.5, 19.0, 19.5, 30.0])) == 0.5
    assert fpr95(inlier[:19], torch.tensor([18.5, 19.0, 19.5, 30.0])) == 0.5  # 18 of 19 are 94.7 %
    assert (fpr95(inlier, inlier + 30), fpr95(inlier + 30, inlier)) == (0.0, 1.0)
    # The other convention: of the outliers 1 to 20 those from 2 on are 95 %, and one inlier of four is among them
    assert fpr95(-torch.arange(1.0, 21.0), -torch.tensor([0.0, 1.0, 1.5, 2.5])) == 0.25
    assert fpr95(list(range(20)), np.array([18.0, 19.0])) == 0.5


def test_scikit_learn_is_imported_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    for function in (auroc, fpr95):
        with pytest.raises(ImportError, match=r'scikit-learn: pip install "timm_zzz\[benchmark\]"'):
            function(torch.zeros(2), torch.ones(2))


# Calibration


def test_reliability_at_the_edges():
    confidence = torch.tensor([1.0, 1.0, 0.2, 1 / 15, 0.21, 0.06])
    bins, error = reliability(confidence, torch.tensor([True, False, True, True, False, False]))
    assert [bin.count for bin in bins] == [2, 0, 1, 1] + [0] * 10 + [2]
    assert (bins[3].low, bins[3].high) == (3 / 15, 4 / 15)
    assert error == pytest.approx((abs(1 - 1 / 15 - 0.06) + 0.8 + 0.21 + abs(1 - 2.0)) / 6)


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_ece_by_hand(bins):
    logits, targets = 2 * torch.randn(200, 4).double(), torch.randint(4, (200,))
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    gap = dict.fromkeys(range(bins), 0.0)
    for row, target in zip(p, targets.tolist(), strict=True):
        gap[math.ceil(row.max() * bins) - 1] += (row.argmax() == target) - row.max()
    expected = sum(map(abs, gap.values())) / 200
    assert 0.01 < expected and ece(logits, targets, bins) == pytest.approx(expected, abs=1e-12)
    assert ece(torch.as_tensor(p).log(), targets, bins) == pytest.approx(expected, abs=1e-12)
    assert ece(logits + 1e3, targets, bins) == pytest.approx(expected, abs=1e-9)
    if bins == 15:
        assert ece(logits, targets) == ece(logits, targets, bins)


# What to log


@pytest.mark.parametrize('rank', RANKS)
@pytest.mark.parametrize('num_classes', [1, 2, 6])
def test_log_dict(rank, num_classes):
    """By loops over pairs and classes; the share by covariances of textbook logits, with and without U."""
    head, f = new_head(rank, num_classes), embeddings()
    found = log_dict(head, f)
    p = {name: t.detach() for name, t in head.named_parameters()}
    args = [f, *(p.get(name) for name in PARAMETERS[1:])]
    _, mu, _, v, sigma2 = parts(*args)
    pairs = [
        1 - F.cosine_similarity(*mu[list(pair)], dim=0).item() for pair in itertools.combinations(range(num_classes), 2)
    ]
    assert found.pop('sigma2') == pytest.approx(sigma2.item())
    assert found.pop('mu_cosine_distance') == pytest.approx(statistics.fmean(pairs or [0.0]))
    logits = dense_logits(*args).numpy()
    means = dense_logits(*args[:3], None, None, args[5]).numpy()
    # Variance between classes, Var(l) = Cov(m, l) + Cov(q, l), averaged over the images
    shares = [np.cov(rows, bias=True) for rows in np.stack([logits - means, logits], 1)]
    variance = sum(share[1, 1] for share in shares)
    expected = sum(share[0, 1] for share in shares) / variance if num_classes > 1 else 0.0
    assert found.pop('low_rank_share') == pytest.approx(expected, abs=1e-9)
    ratios = [sorted(row, reverse=True) for row in (v / sigma2).tolist()]
    assert list(found) == [f'v_ratio_{i + 1}' for i in range(rank)]
    assert list(found.values()) == pytest.approx(
        [statistics.median_low(column) for column in zip(*ratios, strict=True)]
    )


def test_log_dict_of_a_flat_start():
    """The logits are equal, but for rounding: nothing decides."""
    found = log_dict(ZZZHead(50, 64, 4), torch.randn(20, 64))
    assert found['low_rank_share'] == pytest.approx(0, abs=1e-6) == found['mu_cosine_distance']
    assert all(type(value) is float for value in found.values())


def test_log_dict_of_models():
    """Without a ZZZ head it is empty; names of several heads start with their paths, as the inputs' do."""
    assert log_dict(timm.create_model('test_resnet')) == {}
    model = distinct(timm.create_model('test_vit.zzz_r4', num_classes=3)).eval()
    assert log_dict(model) == log_dict(model.head) and len(log_dict(model)) == 6
    model = nn.ModuleDict({'a': new_head(1), 'b': new_head(0)})
    with record_inputs(heads_of(model)) as inputs:
        model['a'](embeddings())
    found = log_dict(model, inputs)
    assert list(found) == [
        'a/sigma2',
        'a/mu_cosine_distance',
        'a/v_ratio_1',
        'a/low_rank_share',
        'b/sigma2',
        'b/mu_cosine_distance',
    ]
    assert found['a/low_rank_share'] == log_dict(model['a'], inputs['a'])['low_rank_share']


# Wrong input


def refuses(what, function, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(what)):
        function(*args, **kwargs)


@pytest.mark.parametrize('function', [log_density, *HEAD_SCORES, outlier_scores])
def test_wrong_heads_and_features(function):
    head, f = new_head(2), embeddings()
    for wrong, name in ((head.fuse(), 'FusedZZZHead'), (nn.Identity(), 'Identity'), (None, 'NoneType')):
        with pytest.raises(ValueError, match=f'head: expected a ZZZHead.*, got {name}'):
            function(wrong, f)
    for wrong in (f[:, :-1], f[0], f[None], f.long()):
        refuses(f'shape (N, 12), got {wrong.dtype} of shape {list(wrong.shape)}', function, head, wrong)
    refuses('features: expected a floating-point tensor of shape (N, 12), got list', function, head, f.tolist())


def test_wrong_arguments():
    refuses(
        'features: expected a floating-point tensor of shape (N, 12), got', log_dict, new_head(2), embeddings()[:, :3]
    )
    head, f, targets = new_head(2), embeddings(60), torch.arange(60) % 3
    logits, narrow = f[:, :3], Background.of(new_head(2, feat_dim=3))
    refuses('head: expected a ZZZHead, got Linear', class_gaussians_of, nn.Linear(3, 2))
    refuses('methods: expected names of max_logit, max_softmax, energy, negative', outlier_scores, head, f, ['x'])
    refuses('background: expected a Background, got Tensor', relative_mahalanobis, head, f, f)
    refuses('background: expected one of width 12, got 3', relative_mahalanobis, head, f, narrow)
    for wrong in (0, -1.0, math.inf, math.nan):
        refuses(f'temperature: expected a finite number > 0, got {wrong}', energy, logits, wrong)
    for score in LOGIT_SCORES:
        refuses('logits: expected a floating-point tensor of shape (N, *), got torch.float64 of shape', score, f[0])
        refuses('got torch.float64 of shape [60, 0]', score, f[:, :0])
    refuses('(N, 12), got torch.float64 of shape [60, 3]', Background.of(head).mahalanobis, logits)
    refuses('targets: expected 60 class indices, got torch.float32 of shape [60]', ece, logits, targets.float())
    refuses('targets: expected class indices >= 0 and < 3, got 3', ece, logits, targets + 1)
    refuses('targets: expected a tensor of 60 class indices, got list', ece, logits, targets.tolist())
    refuses('logits: NaN or infinite in row 0', ece, logits + math.inf, targets)
    refuses('confidence: expected shape (N,) with N >= 1, got [0]', ece, logits[:0], targets[:0])
    for wrong in (0, 1.5, True):
        refuses(f'bins: expected an int >= 1, got {wrong}', ece, logits, targets, wrong)
    confidence, correct = torch.full((3,), 0.5), torch.ones(3, dtype=torch.bool)
    refuses('correct: expected shape [3], got [2]', reliability, confidence, correct[:2])
    refuses('confidence: expected probabilities, 0 to 1, got 1.5', reliability, confidence + 1, correct)


@pytest.mark.parametrize('function', [auroc, fpr95])
def test_wrong_scores(function):
    good = torch.arange(4.0)
    for wrong in (math.nan, math.inf, -math.inf):
        bad = good.clone()
        bad[2] = wrong
        refuses(f'inlier_scores: expected finite scores, got {wrong} at index 2', function, bad, good)
        refuses(f'outlier_scores: expected finite scores, got {wrong} at index 2', function, good, bad)
    refuses('inlier_scores: expected shape (N,) with N >= 1, got [0]', function, good[:0], good)
    refuses('outlier_scores: expected shape (N,) with N >= 1, got [1, 4]', function, good, good[None])


# What is written down


def test_page(root):
    """Its examples run, and take what the head gets."""
    pytest.importorskip('sklearn')
    page = '\n'.join((root / 'docs' / name).read_text('utf-8') for name in ('outliers.md', 'calibration.md'))
    snippets = '\n'.join(re.findall(r'```python\n(.*?)```', page, re.S))
    train, test, other = (torch.randn(count, 3, 64, 64) for count in (24, 6, 8))
    names = dict(train_images=train, train_targets=torch.arange(24) % 5, test_images=test, other_images=other)
    names.update(validation_images=train, validation_targets=names['train_targets'])
    exec(compile(snippets.replace('pretrained=True', 'pretrained=False'), 'docs/outliers.md', 'exec'), names)
    with torch.no_grad():
        close(names['head'](names['features'](test)), names['model'](test))
    assert names['temperature'] > 0
    assert set(names['inlier']) == set(METHODS) == set(names['table'])
    for method in METHODS:
        assert f'`{method}`' in page


# Calibration


def task(head, count, noise=0.3):
    """Embeddings around the head's means, and their classes."""
    targets = torch.arange(count) % head.num_classes
    mu = F.normalize(head.weight.detach().double(), dim=1)
    x = mu[targets] + noise * torch.randn(count, mu.shape[1], dtype=torch.float64)
    return x.to(head.weight.dtype), targets


def best_of_scipy(logits, targets):
    """The temperature of the objective that the docstring of calibrate states, in float64."""
    z, y = logits.detach().double().numpy(), targets.numpy()

    def terms(T):
        log_p = T * z - np.logaddexp.reduce(T * z, axis=1, keepdims=True)
        return -log_p[np.arange(len(y)), y].sum(), -log_p.mean(1).sum()

    def objective(log_T):
        T = math.exp(log_T)
        loss, uniform = terms(T)
        return loss + ((uniform - terms(1.0)[1]) / len(y) if T > 1 else 10 * (T - 1 - log_T))

    found = minimize_scalar(objective, bounds=(-9.2, 9.2), options=dict(xatol=1e-10)).x
    return math.exp(-min((found, 0.0), key=objective))


@pytest.mark.parametrize('rank', RANKS)
@pytest.mark.parametrize('sigma2_raw', [-4.0, -1.0, 2.0])
def test_temperature_against_scipy(rank, sigma2_raw):
    head = new_head(rank, sigma2_raw=sigma2_raw)
    features, targets = task(head, 200)
    logits = head(features).detach()
    expected = best_of_scipy(logits, targets)
    temperature = calibrate(head, features, targets)
    assert temperature == pytest.approx(expected, rel=1e-4)
    close(head(features).softmax(1), (logits / temperature).softmax(1))
    close(head.fuse()(features).softmax(1), (logits / temperature).softmax(1))
    again = calibrate(head, features, targets)
    if temperature <= 1:
        assert again == pytest.approx(1, rel=1e-6)
    else:  # the penalty is counted from where the head is
        assert 1 <= again < temperature


@pytest.mark.parametrize('count', [1, 2, 3, 10, 1000])
@pytest.mark.parametrize('scale', [0.1, 1.0, 10.0])
@pytest.mark.parametrize('labels', ['drawn', 'right', 'wrong', 'one class'])
def test_temperature_of_few_or_odd_images_against_scipy(count, scale, labels):
    logits = 3 * torch.randn(count, 6, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1)[:, 0]
    others = dict(right=logits.argmax(1), wrong=logits.argmin(1))
    others['one class'] = torch.full((count,), 2)
    targets = others.get(labels, targets)
    temperature = calibration_temperature(scale * logits, targets)
    assert temperature == pytest.approx(best_of_scipy(scale * logits, targets), rel=1e-4)
    assert calibration_temperature((scale * logits).float() + 3, targets) == pytest.approx(temperature, rel=1e-4)
    if labels == 'drawn' and count == 1000:
        assert temperature == pytest.approx(scale, rel=0.1)


def test_temperature_where_nothing_can_be_learnt():
    assert calibration_temperature(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)) == 1
    assert calibration_temperature(torch.ones(4, 3), torch.tensor([0, 1, 2, 2])) == 1


@pytest.mark.parametrize('scale', [0.5, 1.0, 2.0])
def test_temperature_of_one_half_does_no_harm_to_the_other(scale):
    """Of nearly perfect sets, 99.8 % right and the rest wrong labels, on average and where a half has no error."""
    before, after, flawless = [], [], []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        targets = torch.randint(20, (1000,), generator=draw)
        logits = torch.randn(1000, 20, generator=draw)
        logits[range(1000), targets] += 12 + 2 * torch.randn(1000, generator=draw)
        wrong = torch.rand(1000, generator=draw) < 0.002
        targets = torch.where(wrong, torch.randint(20, (1000,), generator=draw), targets)
        logits *= scale
        for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            temperature = calibration_temperature(logits[half], targets[half])
            before.append(F.cross_entropy(logits[other], targets[other]).item())
            after.append(F.cross_entropy(logits[other] / temperature, targets[other]).item())
            if (logits[half].argmax(1) == targets[half]).all():
                flawless.append(after[-1] - before[-1])
    assert sum(after) < 1.03 * sum(before)
    assert len(flawless) >= 5 and max(flawless) < 0.05  # nats; an unbounded temperature costs tens
    assert scale != 0.5 or sum(after) < 0.5 * sum(before)


@pytest.mark.parametrize('temperature', [0.2, 1.0, 3.7])
@pytest.mark.parametrize('log_density', [False, True])
@pytest.mark.parametrize('rank', RANKS)
def test_folded_temperature_is_exact(rank, log_density, temperature):
    head, f = new_head(rank), embeddings(50)
    head.log_density = log_density

    def relative(logits):
        return logits - logits[:, :1] if log_density else logits  # a density has terms that all classes share

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        scaled = new_head(rank, dtype=dtype)
        scaled.load_state_dict(head.state_dict())
        scaled.log_density = log_density
        before = relative(scaled(f.to(torch.promote_types(dtype, torch.float32))).detach())
        taken = fold_temperature(scaled, temperature)
        assert taken == pytest.approx(temperature, rel=max(tolerance, 1e-6))
        for form in (scaled, scaled.fuse()):
            after = relative(form(f.to(before.dtype)).detach())
            close(after, before / taken, rtol=tolerance, atol=tolerance * (before / taken).abs().max().item())


def test_folded_temperature_of_a_head_in_place_of_a_convolution():
    head = distinct(ZZZConvHead(5, D, 4, dtype=torch.float64)).eval()
    nn.init.normal_(head.v_raw)
    f = embeddings(30)
    maps = f[:, :, None, None].expand(-1, -1, 2, 3)
    before = head(maps).detach()
    close(head(maps).detach()[:, :, 0, 0], head._logits(f).detach())
    temperature = calibrate(head, f, torch.arange(30) % 5)
    assert temperature != 1
    close(head(maps), before / temperature)


def test_calibrated_head_has_a_smaller_calibration_error(caplog):
    head = new_head(4, 20, 32, torch.float32, sigma2_raw=-5.0)
    (features, targets), (others, labels) = task(head, 400), task(head, 400)
    head.eval()
    with torch.no_grad():
        before = head(others)
        state = {name: p.clone() for name, p in head.named_parameters()}
        assert calibrate(head, features, targets) > 1
        after = head(others)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert ece(after, labels) < ece(before, labels) and F.cross_entropy(after, labels) < F.cross_entropy(before, labels)
    assert {name for name, p in head.named_parameters() if not torch.equal(p, state[name])} == {
        *('v_raw', 'sigma2_raw', 'bias')
    }
    assert not caplog.records


@pytest.mark.filterwarnings('ignore')
def test_calibrated_head_in_onnx(tmp_path):
    """The same modules and tensors as before, with the temperature in them."""
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    head, file = new_head(4, 5, 32, torch.float32, sigma2_raw=-4.0), str(tmp_path / 'head.onnx')
    features, targets = task(head, 100, noise=0.6)
    before, keys = head(features).detach(), head.state_dict().keys()
    temperature = calibrate(head, features, targets)
    assert abs(temperature - 1) > 0.1 and head.state_dict().keys() == keys
    torch.onnx.export(head.fuse(), (features,), file, input_names=['input'], dynamo=False)
    (logits,) = runtime.InferenceSession(file, providers=['CPUExecutionProvider']).run([], {'input': features.numpy()})
    close(torch.from_numpy(logits), before / temperature, rtol=1e-4, atol=1e-4)


def test_temperature_of_images_that_are_all_right():
    """It stays bounded, so that one wrong image elsewhere costs a few nats at most."""
    head = new_head(4, 20, 32, sigma2_raw=0.0)
    nn.init.zeros_(head.bias)
    nn.init.zeros_(head.v_raw)
    features, targets = task(head, 500, noise=0.05)
    calibrate(head, features, targets)
    logits = head(features).detach()
    assert (logits.argmax(1) == targets).all()
    worst = -logits.log_softmax(1).min()
    assert F.cross_entropy(logits, targets) < 0.01 and 1 < worst < 5 * math.log(500)


def test_temperature_below_the_bounds_of_variances(caplog):
    head = new_head(2, sigma2_raw=5.0)
    nn.init.zeros_(head.bias)
    nn.init.constant_(head.v_raw, -12.0)
    features, targets = task(head, 200, noise=0.01)
    logits = head(features).detach()
    temperature = calibrate(head, features, targets)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r'The temperature (.*) leads below v_min = 0.0001: \1 is taken', message)
    assert temperature < 1
    expected = logits / temperature
    close(head(features), expected, rtol=0, atol=1e-3 * expected.abs().max().item())  # v is far below sigma2
    caplog.clear()

    head = new_head(4, sigma2_raw=-6.0)
    nn.init.constant_(head.v_raw, -20.0)
    taken = fold_temperature(head, 0.001)
    (message,) = [record.getMessage() for record in caplog.records]
    bounds = 'sigma2_min = 0.0001 and v_min = 0.0001'
    assert message == f'The temperature 0.001 leads below {bounds}: {taken:.4g} is taken'
    assert taken == pytest.approx(1e-4 / (math.log1p(math.exp(-6)) + 1e-4), rel=2e-3)
    assert head(features).isfinite().all()


def test_logits_that_are_kept(monkeypatch):
    """Every logit of few images, of many those of every k-th image; the same whatever the batches."""
    logits, targets = 3 * torch.randn(101, 5), torch.randint(5, (101,))
    for limit, step in ((10**9, 1), (300, 2), (60, 16)):
        monkeypatch.setattr('timm_zzz.metrics.KEPT', limit)
        for batch in (1, 7, 64, 101):
            kept, start = KeptLogits(), 0
            for part in logits.split(batch):
                kept.add(start, part)
                start += len(part)
            assert kept.step == step and torch.equal(kept.logits, logits[::step])
    monkeypatch.setattr(scores, 'KEPT', 250)
    head, f = new_head(2), embeddings(101)
    expected = calibration_temperature(head(f[::3]).detach(), targets[::3])
    assert calibrate(head, f, targets) == pytest.approx(expected, rel=1e-6)


def test_halves_under_the_temperature_of_the_other(monkeypatch):
    logits, targets = 3 * torch.randn(101, 5), torch.randint(5, (101,))
    divided = logits.clone()
    for half, other in ((0, 1), (1, 0)):
        divided[half::2] /= calibration_temperature(logits[other::2], targets[other::2])
    for values in (2**22, 30):
        monkeypatch.setattr('timm_zzz.metrics._VALUES', values)
        found = cross_calibrate(logits, targets)
        assert found.temperature == pytest.approx(calibration_temperature(logits, targets))
        assert found.ece == pytest.approx((ece(logits, targets), ece(divided, targets)))
        for result, expected in zip(found[1:3], (logits, divided), strict=True):
            assert result.mean_nll == pytest.approx(F.cross_entropy(expected, targets).item())
            assert torch.equal(result.target, targets) and torch.equal(result.prediction, logits.argmax(1))
    for count in (1, 2):
        assert cross_calibrate(logits[:count], targets[:count]).after.mean_nll < 20


def test_mistakes_in_calibrate():
    head = new_head(2)
    features, targets = task(head, 10)
    for args, match in (
        ((nn.Linear(D, 5), features, targets), 'head: expected a ZZZHead, got Linear'),
        ((head, features[:, 1:], targets), r'features: expected .* \(N, 12\)'),
        ((head, features, targets[1:]), 'targets: expected 10 class indices'),
        ((head, features, targets + 1), 'targets: expected class indices >= 0 and < 5, got 5'),
        ((head, features[:0], targets[:0]), 'features: expected at least one row'),
        ((head, features / 0, targets), 'logits: NaN or infinite in row 0'),
        ((head.fuse(), features, targets), 'head: expected a ZZZHead, got FusedZZZHead'),
        ((head, features, targets - 1), 'targets: expected class indices >= 0 and < 5, got -1'),
        ((head, features, targets.double()), 'targets: expected 10 class indices, got torch.float64'),
    ):
        state = {name: p.clone() for name, p in head.named_parameters()}
        with pytest.raises(ValueError, match=match):
            calibrate(*args)
        assert all(torch.equal(p, state[name]) for name, p in head.named_parameters())
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f'temperature: expected a finite number > 0, got {wrong}'):
            fold_temperature(head, wrong)
    with pytest.raises(ValueError, match='head: expected a ZZZHead, got Linear'):
        fold_temperature(nn.Linear(D, 5), 1.0)
    with pytest.raises(ValueError, match='logits: expected at least one row'):
        calibration_temperature(features[:0], targets[:0])


def test_heads_that_are_pruned_or_parametrized():
    """What a mask or a parametrization derives can't be written to; the means and bases are only read."""
    features, targets = task(new_head(2), 10)
    for name in ('bias', 'v_raw', 'sigma2_raw'):
        pruned, parametrized = new_head(2), new_head(2)
        prune.random_unstructured(pruned, name, amount=1)
        parametrize.register_parametrization(parametrized, name, nn.Identity())
        for head in (pruned, parametrized):
            state = {key: p.clone() for key, p in head.state_dict().items()}
            with pytest.raises(ValueError, match=f'head: its {name} is pruned or parametrized; make that permanent'):
                calibrate(head, features, targets)
            assert all(torch.equal(p, state[key]) for key, p in head.state_dict().items())
        prune.remove(pruned, name)
        calibrate(pruned, features, targets)
    head = new_head(2)
    for name in ('weight', 'A'):
        prune.random_unstructured(head, name, amount=0.5)
    before = head(features).detach()
    temperature = calibrate(head, features, targets)
    close(head(features), before / temperature)
