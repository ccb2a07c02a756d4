"""Check the claims of docs/theory.md that no other test covers, most in float64 against dense matrices."""

import ast
import math
import re
import runpy
import sys

import pytest
import torch
from oracles import dense_logits, make, parts, qr_basis
from torch import nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_zzz import ZZZHead
from timm_zzz.functional import gaussian_logits, log_density, normalize, orthonormal_basis, zzz_logits

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def classes(c=4, d=9, r=3):
    """mu, U, v, sigma2"""
    return F.normalize(torch.randn(c, d)), qr_basis(torch.randn(c, d, r)), torch.rand(c, r) + 0.1, torch.tensor(0.3)


def covariance(U, v, s2):
    return (U * v.unsqueeze(-2)) @ U.mT + s2 * torch.eye(U.shape[-2])


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def posterior(x, mu, sigma, prior):
    """By Bayes's theorem from dense Gaussians."""
    joint = prior * MultivariateNormal(mu, sigma).log_prob(x.unsqueeze(-2)).exp()
    return joint / joint.sum(-1, keepdim=True)


# The inverse and the determinant


def test_woodbury_for_a_diagonal_v():
    mu, U, v, s2 = classes()
    a, identity = 1 / s2, torch.eye(9)
    inverse = torch.linalg.inv(covariance(U, v, s2))
    core = torch.linalg.inv(torch.diag_embed(1 / v) + a * U.mT @ U)
    close(a * identity - a * U @ core @ U.mT * a, inverse)
    close(a * identity - a**2 * U @ torch.diag_embed(v / (1 + a * v)) @ U.mT, inverse)
    rho, lam = a - 1 / (v + s2), v + s2
    close(rho, a * (a * v) / (1 + a * v))
    delta = unit(4, 9) - mu
    t = (U.mT @ delta.unsqueeze(-1)).squeeze(-1)
    expected = torch.einsum('ci,cij,cj->c', delta, inverse, delta)
    close(a * delta.square().sum(-1) - (rho * t * t).sum(-1), expected)
    rest = delta - (U @ t.unsqueeze(-1)).squeeze(-1)
    close(a * rest.square().sum(-1) + (t * t / lam).sum(-1), expected)


def test_determinant_lemma():
    _, U, v, s2 = classes()
    log_det = torch.linalg.slogdet(covariance(U, v, s2)).logabsdet
    close(9 * torch.log(s2) + torch.log1p(v / s2).sum(-1), log_det)
    X, Y = torch.randn(7, 3), torch.randn(3, 7)
    close(torch.linalg.det(torch.eye(7) + X @ Y), torch.linalg.det(torch.eye(3) + Y @ X))


def test_priors_are_the_softmax_of_the_biases():
    args = make(6, 4, 9, 3)
    x, mu, U, v, s2 = parts(*args)
    close(zzz_logits(*args).softmax(-1), posterior(x, mu, covariance(U, v, s2), args[2].softmax(0)))


# What a softmax does not see


def log_density_logits(*args):
    return zzz_logits(*args, log_density=True)


def class_free(d, s2):
    return -0.5 / s2 - d / 2 * torch.log(s2)


def gradients(loss, function, args):
    leaves = [t.detach().requires_grad_() for t in args]
    return torch.autograd.grad(loss(function(*leaves)), leaves)


def test_class_free_part():
    """Cross-entropy's gradients are the same without it."""
    args, y = make(6, 4, 9, 3), torch.arange(6) % 4
    close(log_density_logits(*args), dense_logits(*args, log_density=True))
    close(log_density_logits(*args) - class_free(9, parts(*args)[-1]), dense_logits(*args))
    close(class_free(768, torch.tensor(1 / 16)).item(), 1056.7, rtol=1e-4, atol=0)
    for loss in (lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, label_smoothing=0.1)):
        close(gradients(loss, log_density_logits, args), gradients(loss, zzz_logits, args))


def test_bce_sees_class_free_terms():
    args, y = make(6, 4, 9, 3), F.one_hot(torch.arange(6) % 4).double()
    s2 = parts(*args)[-1]

    def loss(z):
        return F.binary_cross_entropy_with_logits(z, y)

    full, reduced = (gradients(loss, f, args) for f in (log_density_logits, zzz_logits))
    assert (loss(log_density_logits(*args)) - loss(zzz_logits(*args))).abs() > 0.1
    assert (full[-1] - reduced[-1]).abs() > 0.1 * reduced[-1].abs()
    # The posterior of one class against the isotropic Gaussian
    x, mu, U, v, _ = parts(*args)
    own = MultivariateNormal(mu, covariance(U, v, s2)).log_prob(x[:, None]).exp() * args[2].exp()
    other = MultivariateNormal(torch.zeros(9), s2 * torch.eye(9)).log_prob(x).exp()
    close(zzz_logits(*args).sigmoid(), own / (own + other[:, None]))
    wide = make(2, 3, 768, 8, torch.float32)
    wide[-1] = torch.tensor(1 / 16).expm1().log().float()
    assert (log_density_logits(*wide).sigmoid() == 1).all() and (zzz_logits(*wide).sigmoid() < 0.9).all()


def test_ood_scores_see_what_depends_on_the_input():
    """Equal covariances: linear discriminant analysis has the same softmax, but orders the inputs in another way."""
    mu, U, v, s2 = classes()
    U, v = U[:1].expand(4, 9, 3), 5 * v[:1].expand(4, 3)
    x, prior = unit(50, 9), torch.rand(4).softmax(0)
    full = log_density(x, mu, U, v, s2)
    W = torch.linalg.solve(covariance(U, v, s2)[0], mu.T).T
    linear = F.linear(x, W, -0.5 * (W * mu).sum(-1))
    for bias in (0, prior.log()):
        close((full + bias).softmax(-1), (linear + bias).softmax(-1))
    order = full.logsumexp(-1).argsort()
    assert not torch.equal(order, linear.logsumexp(-1).argsort())
    assert torch.equal(order, gaussian_logits(x, mu, U, v, s2).logsumexp(-1).argsort())


def test_16_bits_lose_what_tells_the_classes_apart():
    args = make(50, 10, 768, 0)
    args[0] = args[1][torch.arange(50) % 10] + args[1][torch.arange(50) // 10]  # between two classes
    args[-1] = torch.tensor(1 / 16).expm1().log()
    expected = zzz_logits(*args).softmax(-1)
    for dtype, least, most in ((torch.bfloat16, 0.2, 0.05), (torch.float16, 0.05, 0.01)):
        assert (log_density_logits(*args).to(dtype).double().softmax(-1) - expected).abs().max() > least
        assert (zzz_logits(*args).to(dtype).double().softmax(-1) - expected).abs().max() < most


# Rank 0


def test_a_linear_layer_with_rows_of_one_norm_is_a_rank_0_head():
    linear, f = nn.Linear(11, 5), torch.randn(6, 11)
    with torch.no_grad():
        linear.weight.copy_(20 * F.normalize(linear.weight))
    head = ZZZHead(5, 11, rank=0, sigma2_init=1 / 20)
    head.load_state_dict(linear.state_dict())
    close(head(f).softmax(-1), linear(F.normalize(f)).softmax(-1))


def test_arcface_and_cosface_without_margin():
    f, weight, _, _, _, s2_raw = make(6, 5, 11, 0)
    y, s = torch.arange(6) % 5, 1 / (F.softplus(s2_raw) + 1e-4)
    cosine, target = F.normalize(f) @ F.normalize(weight).T, F.one_hot(y, 5)
    own = F.cross_entropy(zzz_logits(f, weight, torch.zeros(5), None, None, s2_raw), y)
    for margin in (0.0, 0.3):
        for logits in (torch.cos(cosine.acos() + margin * target), cosine - margin * target):  # ArcFace, CosFace
            assert torch.isclose(F.cross_entropy(s * logits, y), own).item() == (margin == 0)


def test_integrals_over_the_circle():
    """At rank 0 the integral of the density over the circle is von Mises's, and is the same for every class."""
    angle = torch.arange(20000) / 20000 * 2 * math.pi
    x = torch.stack([angle.cos(), angle.sin()], -1)
    mu, _, _, s2 = classes(3, 2, 1)
    integral = log_density(x, mu, None, None, s2).exp().mean(0) * 2 * math.pi
    a = 1 / s2
    close(integral, (torch.special.i0(a) * torch.exp(-a) / s2).expand(3))
    U = torch.stack([mu[0], mu[0].flip(0) * torch.tensor([1, -1])]).unsqueeze(-1)  # along the mean, and across
    along, across = log_density(x, mu[:1].expand(2, 2), U, torch.ones(2, 1), s2).exp().mean(0)
    assert (along - across).abs() > 0.03 * across


# The basis


def test_rotations_matter_unless_the_variances_are_equal():
    mu, U, v, s2 = classes()
    x, Q = unit(5, 9), qr_basis(torch.randn(4, 3, 3))
    assert (gaussian_logits(x, mu, U @ Q, v, s2) - gaussian_logits(x, mu, U, v, s2)).abs().max() > 0.1
    equal = v[:, :1].expand(4, 3)
    # Two equal variances: any rotation of their plane
    plane = torch.block_diag(qr_basis(torch.randn(2, 2)), torch.ones(1, 1))
    for variances, rotation in ((equal, Q), (equal + torch.tensor([0, 0, 1]), plane)):
        close(gaussian_logits(x, mu, U @ rotation, variances, s2), gaussian_logits(x, mu, U, variances, s2))


def test_the_covariance_determines_the_basis_up_to_signs():
    _, U, v, s2 = classes()
    values, vectors = torch.linalg.eigh(covariance(U, v, s2))
    order = v.argsort(-1)
    close(values[:, -3:] - s2, v.gather(-1, order))
    close(values[:, :-3], s2.expand(4, 6))
    close((vectors[..., -3:].mT @ U).abs(), F.one_hot(order, 3).double())


def test_gradient_is_orthogonal_to_what_the_basis_ignores():
    args = [t.requires_grad_() for t in make(6, 4, 9, 3)]
    dA, dweight = torch.autograd.grad(zzz_logits(*args)[:, 0].sin().sum(), (args[3], args[1]))
    assert dA[0].abs().max() > 0.01
    ignored = (args[3].mT @ dA).triu()
    close(ignored, torch.zeros_like(ignored), rtol=0, atol=1e-12)
    along = (args[1] * dweight).sum(-1)
    close(along, torch.zeros_like(along), rtol=0, atol=1e-12)


# Gradients


def copyltu(M):
    """The lower triangle mirrored at the diagonal."""
    return M.tril() + M.tril(-1).mT


def test_gradients_in_closed_form():
    args = [t.requires_grad_() for t in make(6, 4, 9, 3)]
    f, weight, _, A, v_raw, s2_raw = args
    g = torch.randn(6, 4)
    expected = torch.autograd.grad(dense_logits(*args), args, g)
    x, mu, U, v, s2 = (t.detach() for t in parts(*args))
    a, lam = 1 / s2, v + s2
    rho = a - 1 / lam
    delta = x.unsqueeze(1) - mu
    t = torch.einsum('bcd,cdr->bcr', delta, U)
    pull = g.unsqueeze(-1) * (a * delta - torch.einsum('cdr,bcr->bcd', U, rho * t))

    def tangential(y, gradient, raw):
        return (gradient - y * (y * gradient).sum(-1, keepdim=True)) / raw.norm(dim=-1, keepdim=True)

    H = torch.einsum('bc,bci,bcj->cij', g, t, t)
    gamma = torch.einsum('bc,bcd,bcr->cdr', g, delta, rho * t)
    close(gamma.mT @ U, rho.unsqueeze(-1) * H)
    R = U.mT @ A
    along = t * t / lam**2 - 1 / lam
    orthogonal = a**2 * (delta.square().sum(-1) - t.square().sum(-1) - 1) + 3 * a
    actual = (
        tangential(x, -pull.sum(1), f),
        tangential(mu, pull.sum(0), weight),
        g.sum(0),
        (gamma - U @ copyltu(rho.unsqueeze(-1) * H)) @ torch.linalg.inv(R).mT,
        0.5 * torch.einsum('bc,bcr->cr', g, along) * v_raw.sigmoid(),
        0.5 * (g * (along.sum(-1) + orthogonal)).sum() * s2_raw.sigmoid(),
    )
    for a, e in zip(actual, expected, strict=True):
        close(a.detach(), e)


@pytest.mark.parametrize('condition', [1, 1e2, 1e4])
def test_gradient_of_the_basis_is_bounded_by_the_smallest_singular_value(condition):
    left, _, right = torch.linalg.svd(torch.randn(20, 9, 4), full_matrices=False)
    A = ((left * torch.logspace(0, -math.log10(condition), 4)) @ right).requires_grad_()
    gamma = torch.randn(20, 9, 4)
    (own,) = torch.autograd.grad(orthonormal_basis(A), A, gamma)
    (oracle,) = torch.autograd.grad(qr_basis(A), A, gamma)
    bound = math.sqrt(2) * torch.linalg.matrix_norm(gamma) * condition
    for gradient in (own, oracle):
        assert (torch.linalg.matrix_norm(gradient) < bound).all()


# Relatives


def test_scikit_learns_discriminant_analyses():
    """At rank d, where the covariances are all those with eigenvalues above sigma2."""
    analyses = pytest.importorskip('sklearn.discriminant_analysis')
    y = torch.arange(200) % 3
    mix = torch.eye(5) + 0.2 * torch.randn(3, 5, 5)
    x = torch.einsum('nij,nj->ni', mix[y], torch.randn(200, 5)) + torch.randn(3, 5)[y]
    qda = analyses.QuadraticDiscriminantAnalysis(store_covariance=True).fit(x.numpy(), y.numpy())
    lda = analyses.LinearDiscriminantAnalysis(solver='lsqr').fit(x.numpy(), y.numpy())
    for model, sigmas in ((qda, qda.covariance_), (lda, 3 * [lda.covariance_])):
        sigma = torch.stack([torch.as_tensor(s) for s in sigmas])
        values, U = torch.linalg.eigh(sigma)
        s2 = values.min() / 2
        logits = gaussian_logits(x, torch.as_tensor(model.means_), U, values - s2, s2)
        logits = logits + torch.as_tensor(model.priors_).log()
        close(logits.softmax(-1), posterior(x, torch.as_tensor(model.means_), sigma, torch.as_tensor(model.priors_)))
        close(logits.log_softmax(-1), torch.as_tensor(model.predict_log_proba(x.numpy())))


def test_probabilistic_pca_whatever_the_rotation_of_its_factors():
    mu, U, v, s2 = classes()
    W = U * v.sqrt().unsqueeze(-2) @ qr_basis(torch.randn(4, 3, 3))
    x = torch.randn(6, 9)
    expected = LowRankMultivariateNormal(mu, W, s2.expand(4, 9)).log_prob(x.unsqueeze(-2))
    close(log_density(x, mu, U, v, s2), expected)


def test_scikit_learns_pca():
    decomposition = pytest.importorskip('sklearn.decomposition')
    x = torch.randn(100, 7) * torch.linspace(0.5, 3, 7)
    pca = decomposition.PCA(3).fit(x.numpy())
    U = torch.as_tensor(pca.components_).T.unsqueeze(0)
    s2 = torch.tensor(pca.noise_variance_)
    v = torch.as_tensor(pca.explained_variance_).unsqueeze(0) - s2
    actual = log_density(x, torch.as_tensor(pca.mean_).unsqueeze(0), U, v, s2)[:, 0]
    close(actual, torch.as_tensor(pca.score_samples(x.numpy())))


def test_maximum_likelihood():
    d, r, counts = 6, 2, (40, 60, 50)
    data = [torch.randn(n, d) * torch.tensor([3, 2, 1, 1, 1, 0.9]) @ qr_basis(torch.randn(d, d)).T for n in counts]
    mu = torch.stack([x.mean(0) for x in data])
    values, vectors = torch.linalg.eigh(torch.stack([torch.cov(x.T, correction=0) for x in data]))
    weights = torch.tensor(counts) / sum(counts)
    s2 = (weights @ values[:, : d - r]).sum() / (d - r)
    best = [mu, vectors[..., d - r :], values[:, d - r :] - s2, s2]
    assert best[2].min() > 0

    def likelihood(mu, A, v, s2):
        return sum(log_density(x, mu, orthonormal_basis(A), v, s2)[:, c].sum() for c, x in enumerate(data))

    best = [t.clone().requires_grad_() for t in best]
    for gradient in torch.autograd.grad(likelihood(*best), best):
        close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
    with torch.no_grad():
        for _ in range(20):
            other = [t * (1 + 0.05 * torch.randn_like(t)) for t in best]
            assert likelihood(*other) < likelihood(*best)


def test_limits_of_small_and_of_large_equal_variances():
    mu, U, v, s2 = classes()
    x, large, a = unit(6, 9), torch.full((4, 3), 1e10), 1 / s2
    # The cosine classifier
    close(gaussian_logits(x, mu, U, 1e-12 * v, s2), gaussian_logits(x, mu, None, None, s2))
    # The distances to the subspaces
    distance = torch.stack([((x - m) @ (torch.eye(9) - B @ B.T)).norm(dim=-1) for m, B in zip(mu, U, strict=True)], -1)
    close(gaussian_logits(x, mu, U, large, s2).softmax(-1), (-a / 2 * distance**2).softmax(-1))
    # With the means in the subspaces it is the subspace classifier: the longest projection wins
    mu = normalize((U @ torch.randn(4, 3, 1)).squeeze(-1))
    projection = torch.einsum('bd,cdr->bcr', x, U).norm(dim=-1)
    close(gaussian_logits(x, mu, U, large, s2).softmax(-1), (a / 2 * projection**2).softmax(-1))


@pytest.mark.parametrize('temperature', [0.3, 4.0])
def test_temperature(temperature):
    mu, U, v, s2 = classes()
    x, bias = unit(6, 9), torch.randn(4)
    expected = ((gaussian_logits(x, mu, U, v, s2) + bias) / temperature).softmax(-1)
    bias = bias / temperature + 0.5 * (1 - 1 / temperature) * torch.log1p(v / s2).sum(-1)
    actual = gaussian_logits(x, mu, U, temperature * v, temperature * s2) + bias
    close(actual.softmax(-1), expected)


# Precision and cost


@pytest.mark.parametrize('near', [False, True])
@pytest.mark.parametrize('v', [1e-4, 0.7, 1e4])
@pytest.mark.parametrize('s2', [1e-4, 1 / 16, 0.69])
def test_float32_error_is_a_few_roundings_of_the_largest_terms(s2, v, near):
    mu, U, _, _ = classes(20, 64, 8)
    x = unit(40, 64)
    if near:  # where all digits of the distance are lost
        x[:20] = normalize(mu + 1e-5 * torch.randn(20, 64))
    args = [t.float() for t in (x, mu, U, torch.full((20, 8), v), torch.tensor(s2))]
    truth = gaussian_logits(*[t.double() for t in args])
    error = (gaussian_logits(*args) - truth).abs().max().item()
    scale = 2 / s2 + 8 / 2 * math.log1p(v / s2)
    assert error < 8 * 2**-24 * scale
    if near:
        x, mu = args[0][:20], args[1]
        expanded = (x * x).sum(-1) + (mu * mu).sum(-1) - 2 * (x * mu).sum(-1)
        distance2 = (x.double() - mu.double()).square().sum(-1)
        assert (expanded - distance2).abs().max() > distance2.max()


class _MatrixProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ('mm', 'addmm', 'bmm', 'baddbmm')
        return func(*args, **(kwargs or {}))


def test_matrix_products_take_2_b_c_d_times_r_plus_1_operations():
    c, d, r = 7, 32, 3
    head, counts = ZZZHead(c, d, r, dtype=torch.float32), {}
    for b in (10, 30):
        x = torch.randn(b, d, dtype=torch.float32, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            loss = head(x).square().sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts[b] = forward.get_total_flops(), backward.get_total_flops()
    product = 2 * 20 * c * (r + 1) * d  # for 20 further embeddings
    assert [more - less for less, more in zip(counts[10], counts[30], strict=True)] == [product, 2 * product]
    assert counts[10][1] - product <= 8 * c * r * r * d + 2 * c * r**3  # the gradient of the bases, for any batch
    fused = head.fuse()
    with FlopCounterMode(display=False) as counter, _MatrixProducts() as products:
        fused(x)
    assert counter.get_total_flops() == 2 * 30 * c * (r + 1) * d and products.count == 1


# The page and its picture


@pytest.fixture(scope='module')
def page(root):
    return (root / 'docs' / 'theory.md').read_text()


@pytest.fixture(scope='module')
def tests(root):
    """Names of the test functions by file."""
    trees = {p.name: ast.parse(p.read_text()) for p in (root / 'tests').rglob('test_*.py')}
    return {name: {d.name for d in tree.body if isinstance(d, ast.FunctionDef)} for name, tree in trees.items()}


def test_every_test_that_the_page_names_exists(page, tests):
    named = re.findall(r'tests/(?:\w+/)?(test_\w+\.py)::(\w+)', page)
    assert len(named) > 40 and len(named) == page.count('::')
    assert [name for name in named if name[1] not in tests[name[0]]] == []
    here = {function for file, function in named if file == 'test_theory.py'}
    about_the_page = {name for name in tests['test_theory.py'] if 'page' in name}
    assert {name for name in tests['test_theory.py'] if name.startswith('test_')} - about_the_page == here


def test_every_statement_of_the_page_names_a_test(page):
    statements = re.split(r'^(?=\*\*(?:Lemma|Proposition|Corollary|Claim)\b|## )', page, flags=re.M)
    statements = [s for s in statements if s.startswith('**')]
    assert len(statements) == len(re.findall(r'^\*\*', page, re.M)) > 20
    assert [s.splitlines()[0] for s in statements if '`tests/' not in s] == []


# What of LaTeX the page may use: KaTeX and MathJax know these, and GitHub does not filter them out
MACROS = """
    arg bar begin Big big cdot circ cos delta det ell end eta frac Gamma ge gt in infty kappa lambda langle
    ldots le log lt lVert lvert mapsto mathbb mathrm max mid min mu partial pi prod qquad rangle rho rVert rvert
    Sigma sigma sim sqrt square sum tau tfrac tilde times to top varepsilon
"""


def test_mathematics_of_the_page_is_what_github_renders(page):
    displays = re.findall(r'^```math\n(.*?)\n```$', page, re.M | re.S)
    rest = re.sub(r'^```math\n.*?\n```$', '', page, flags=re.M | re.S)
    # Dollars with backticks keep Markdown off the formula; GitHub wants them on one line, apart from other words
    inline = re.findall(r'(?<!\S)\$`([^`\n]+)`\$(?=[\s.,;:]|$)', rest)
    assert rest.count('$') == 2 * len(inline) and len(displays) > 10
    for formula in displays + inline:
        nested = formula.replace('\\{', '').replace('\\}', '')
        while (inner := re.sub(r'{[^{}]*}', '', nested)) != nested:
            nested = inner
        assert not re.search('[{}]', nested) and formula.count('\\begin{') == formula.count('\\end{'), formula
        assert set(re.findall(r'\\([A-Za-z]+)', formula)) <= set(MACROS.split()), formula
        assert not re.search(r'[|<>$]', formula), formula
    for number in range(1, 10):
        assert page.count(f'\\qquad ({number})') == 1


def test_picture(root, tmp_path, monkeypatch):
    """The committed picture is the script's, and its boundary is where the logits of the two classes are equal."""
    script, out = root / 'docs' / 'picture.py', tmp_path / 'out.svg'
    monkeypatch.setattr(sys, 'argv', [str(script), str(out)])
    picture = runpy.run_path(str(script), run_name='__main__')
    drawn = out.read_text(encoding='utf-8')
    assert drawn == (root / 'docs' / 'zzz.svg').read_text(encoding='utf-8') and len(drawn) < 60_000
    assert re.findall(r'(\d+) of 120', drawn)[0] > re.findall(r'(\d+) of 120', drawn)[1]
    for pair in (picture['MEANS_ALONE'], picture['CLASSES']):
        edge = torch.tensor([p for p in picture['outline'](*pair) if abs(p[0]) < 3])
        mu = torch.tensor([[g.x, g.y] for g in pair])
        U = torch.tensor([g.u for g in pair]).unsqueeze(-1)
        v = torch.tensor([[max(g.v, 1e-12)] for g in pair])
        logits = gaussian_logits(edge, mu, U, v, torch.tensor(pair[0].sigma2))
        assert len(edge) > 50
        close(logits[:, 0], logits[:, 1])
