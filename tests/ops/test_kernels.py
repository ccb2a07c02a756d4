"""The Triton kernels: on a GPU, or on the CPU by Triton's interpreter (TRITON_INTERPRET=1, see test_interpreter.py)."""

import itertools
import logging
import math
import os
from functools import partial

import pytest
import torch
from oracles import PARAMETERS, distinct, low_rank_logits, make, qr_basis, reference_logits
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead
from timm_zzz.functional import orthonormal_basis, zzz_logits
from timm_zzz.ops import dispatch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or Triton's interpreter"
)
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason='needs a CUDA device')


def further(values, quick=()):
    """Leave values to the slow tests of the interpreter, a thousand times slower than a GPU, but for the quick ones."""
    return [pytest.param(*v, marks=[] if v in quick or not INTERPRETED else pytest.mark.slow) for v in values]


# (batch, classes, width, rank)
SHAPES = [(3, 7, 123, 3), (3, 7, 123, 5), (5, 20, 40, 8), (20, 7, 50, 13), (4, 4, 67, 16), (3, 7, 123, 32)]
REGIMES = [(0.69, 1e-4), (1 / 16, 0.7), (1e-4, 1e-4), (1e-4, 1e4)]  # sigma2, v
if not INTERPRETED:
    SHAPES += [(127, 252, 507, r) for r in (1, 3, 5, 8, 13, 16, 32)]
    SHAPES += [(1, 252, 123, 8), (127, 1, 507, 16), (3, 252, 123, 1)]
    REGIMES += [(0.69, 0.7), (1 / 16, 1e-4), (1 / 16, 1e4), (1e-4, 0.7)]
DTYPES = [None, torch.bfloat16, torch.float16]  # of autocast


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def inverse_softplus(value):
    return value if value > 30 else math.log(math.expm1(value)) if value > 0 else -20.0


def inputs(b, c, d, r, sigma2=1 / 16, v=0.7):
    args = make(b, c, d, r, torch.float32)
    args[4] = args[4] * 0.1 + inverse_softplus(v - 1e-4)
    args[5] = torch.tensor(inverse_softplus(sigma2 - 1e-4))
    return args


def triton_logits(*args, **options):
    return zzz_logits(*args, impl='triton', **options)


def derivatives(function, args, dtype, weights, autocast=None):
    """Logits, and per argument the gradient of their weighted sum."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in args]
    with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = function(*leaves)
    grads = torch.autograd.grad((logits * weights.to(logits.dtype)).sum(), leaves)
    return dict(zip(('logits', *PARAMETERS), [logits, *grads], strict=True))


def relative_errors(shape, dtype, sigma2, v, draws=1):
    """By name, the errors of the kernels and of the reference over some draws, for what is not zero."""
    results, errors = [], {}
    for _ in range(draws):
        args, weights = inputs(*shape, sigma2, v), torch.randn(*shape[:2])
        truth = derivatives(low_rank_logits, args, torch.float64, weights)
        both = [derivatives(f, args, torch.float32, weights, dtype) for f in (triton_logits, reference_logits)]
        results.append([truth, *both])
    for name in results[0][0]:
        truth, actual, reference = (
            torch.stack([r[name].double() for r in column]) for column in zip(*results, strict=True)
        )
        if truth.norm() > 1e-30:
            errors[name] = [((x - truth).norm() / truth.norm()).item() for x in (actual, reference)]
    return errors


@pytest.mark.parametrize('regime, dtype', further(itertools.product(REGIMES, DTYPES)))
def test_error_of_few_numbers_is_bounded_by_the_references_own(regime, dtype):
    """Few numbers, which the reference may hit by chance, are compared over many draws."""
    errors = relative_errors((1, 1, 23, 1), dtype, *regime, draws=12)
    errors['sigma2_raw'] = relative_errors((3, 2, 33, 4), dtype, *regime, draws=12)['sigma2_raw']
    for name, (error, bound) in errors.items():
        assert error <= 1.5 * bound + 1e-6, f'{name}: {error:.1e}, {bound:.1e}'


@pytest.mark.parametrize(
    'shape, dtype', further(itertools.product(SHAPES, DTYPES), [(SHAPES[0], dtype) for dtype in DTYPES[:2]])
)
def test_error_is_bounded_by_the_references_own(shape, dtype):
    for regime in REGIMES:
        for name, (error, bound) in relative_errors(shape, dtype, *regime).items():
            if name != 'sigma2_raw':
                assert error <= 1.5 * bound + 1e-6, f'{name}, (sigma2, v) = {regime}: {error:.1e}, {bound:.1e}'


def conditioned(condition, r):
    U, _, V = torch.linalg.svd(torch.randn(5, 67, r, dtype=torch.float64), full_matrices=False)
    return (U * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)) @ V


BASES = further(itertools.product([1, 1e3, 1e6], [3, 16]), quick=[(1, 3), (1e6, 3), (1e3, 16)])


@pytest.mark.parametrize('condition, r', BASES)
def test_basis(condition, r):
    A = conditioned(condition, r)
    basis = orthonormal_basis(A.float(), impl='triton')
    assert (basis.mT.double() @ basis.double() - torch.eye(r)).abs().max() < 1e-5
    assert (basis - qr_basis(A)).abs().max() < 1e-6 * max(condition, 3)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('r', further([(r,) for r in (1, 2, 3, 4, 5, 8, 13, 16, 32)], quick=[(3,), (4,), (8,)]))
def test_bases_of_the_first_kernel(r, half):
    """Well-conditioned bases come from the first kernel, not from the one that repairs them, at every padded rank."""
    from timm_zzz.ops import triton_kernels, triton_ops

    _, weight, bias, A, v_raw, s2_raw = inputs(1, 20, 70, r)
    parameters = triton_ops.Parameters(weight, bias, A, v_raw, s2_raw)
    classes = triton_ops._new_classes(parameters, not half)
    triton_ops._fill_coef(classes.coef, parameters, 1e-4, 1e-4, not half)
    triton_ops._fill_operand(classes, parameters)
    cp, R = classes.padded, classes.R
    assert (classes.coef[(2 * R + 2) * cp :][:20] == 0).all()  # flags
    rows = classes.operand.double() / triton_kernels.SCALE
    bases, means = rows[: cp * R], rows[(1 if half else 2) * cp * R :]
    if not half:
        bases = bases + rows[cp * R : 2 * cp * R]
    bases = bases.view(cp, R, -1)
    exact = qr_basis(A.double()).mT
    assert (bases[:20, :r, :70] - exact).abs().max() < (3e-4 if half else 3e-6)
    assert (bases[20:] == 0).all() and (bases[:, r:] == 0).all() and (bases[..., 70:] == 0).all()
    means = (means[:cp] + means[cp : 2 * cp])[:20, :70]
    torch.testing.assert_close(means, F.normalize(weight.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize('condition', [3, 1e2])
def test_basis_gradient(condition):
    A = conditioned(condition, 5).requires_grad_()
    A32 = A.detach().float().requires_grad_()
    direction = torch.randn(5, 67, 5)
    (expected,) = torch.autograd.grad((qr_basis(A) * direction).sum(), A)
    (actual,) = torch.autograd.grad((orthonormal_basis(A32, impl='triton') * direction).sum(), A32)
    assert (actual - expected).norm() < 2e-6 * condition * expected.norm()


@pytest.mark.parametrize('half', [False, True])
def test_degenerate_classes(half):
    """Classes of which each has something wrong, beside good ones: finite, and as PyTorch's path has them."""
    f, weight, bias, A, v_raw, s2_raw = inputs(6, 20, 40, 4)
    f[2], weight[3] = 0, 0
    A[1], A[4, :, 2], A[5, :, 1] = 0, 0, A[5, :, 0]
    A[6, :, 3] = A[6, :, 0] + 1e-6 * A[6, :, 1]
    for t in (A[7], weight[9], f[3]):
        t *= 1e37
    for t in (A[8], weight[10]):
        t *= 1e-37
    args, weights = [f, weight, bias, A, v_raw, s2_raw], torch.randn(6, 20)
    torch_out = derivatives(lambda *x: zzz_logits(*x, impl='torch'), args, torch.float32, weights)
    actual = derivatives(triton_logits, args, torch.float32, weights, torch.bfloat16 if half else None)
    tolerance = 2e-3 if half else 2e-5
    torch.testing.assert_close(actual['logits'], torch_out['logits'], rtol=tolerance, atol=20 * tolerance)
    # Tiny ones have a gradient of 1e37 by right, in either path
    good = dict.fromkeys(('weight', 'A'), [0, 2, 11, 12, 19]) | dict(features=[0, 1, 4, 5])
    for name in PARAMETERS:
        rows = good.get(name, ...)
        error = (actual[name][rows] - torch_out[name][rows]).norm()
        assert error <= 5 * tolerance * torch_out[name][rows].norm(), name
    assert all(t.isfinite().all() for t in (actual['weight'][:7], actual['A'][:7], actual['features']))
    assert (actual['A'][1] == 0).all() and (actual['A'][4, :, 2] == 0).all()


@pytest.mark.parametrize(
    'value, half', further(itertools.product((math.nan, math.inf), (False, True)), quick=[(math.inf, True)])
)
def test_non_finite_input_gives_non_finite_logits_where_it_is(value, half):
    args = inputs(3, 20, 11, 3)
    for index, where in ((0, (1, ...)), (1, (..., 2)), (3, (..., 2))):
        broken = [t.clone() for t in args]
        broken[index][1 if index == 0 else 2, 0] = value
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            logits = triton_logits(*broken)
        wrong = torch.zeros(3, 20, dtype=torch.bool)
        wrong[where] = True
        assert torch.equal(~logits.isfinite(), wrong), index


SCALES = itertools.product((0.0, 1e-30, 1e-8, 65536.0, 1e30), (False, True))


@pytest.mark.parametrize('scale, half', further(SCALES, quick=[(0.0, True), (65536.0, False)]))
def test_gradients_of_any_size(scale, half):
    """Gradients of the logits far outside float16's range, as a GradScaler or a mean over many samples makes them."""
    args = inputs(4, 5, 33, 3)
    w = torch.randn(4, 5)
    autocast = torch.bfloat16 if half else None
    one = derivatives(triton_logits, args, torch.float32, w, autocast)
    actual = derivatives(triton_logits, args, torch.float32, w * scale, autocast)
    for name in PARAMETERS:
        expected = one[name].double() * scale
        tolerance = 2e-3 if half else 1e-5
        assert (actual[name] - expected).norm() <= tolerance * expected.norm() + 1e-44, name


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_overflowed_gradients_are_seen(value):
    args = [t.requires_grad_() for t in inputs(4, 5, 33, 3)]
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == 'cuda' else torch.bfloat16):
        logits = triton_logits(*args)
    grad = torch.ones_like(logits)
    grad[1, 2] = value
    logits.backward(grad)
    assert not any(t.grad.isfinite().all() for t in args)


@pytest.mark.parametrize('half', further([(False,), (True,)]))
def test_chunks_of_classes_change_nothing(half, monkeypatch):
    from timm_zzz.ops import triton_ops

    args, weights = inputs(4, 70, 33, 3), torch.randn(4, 70)
    autocast = torch.bfloat16 if half else None
    whole = derivatives(triton_logits, args, torch.float32, weights, autocast)
    monkeypatch.setattr(triton_ops, 'keep_bytes', lambda device: 1000)
    monkeypatch.setattr(triton_ops, 'CHUNK_BYTES', 2 * 33 * 4 * 30)
    assert len(triton_ops._chunks(args[3])) == 3
    chunked = derivatives(triton_logits, args, torch.float32, weights, autocast)
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-5, atol=1e-5 * whole[name].abs().max().item())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_features_and_parameters(dtype):
    args = [t.to(dtype) for t in inputs(4, 5, 33, 3)]
    exact = [t.double() for t in args]
    logits = triton_logits(*[t.requires_grad_() for t in args])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), low_rank_logits(*exact), rtol=2e-3, atol=2e-2)
    logits.sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.shape == t.shape for t in args)


def test_layouts_leading_dimensions_and_empty_batch():
    f, weight, bias, A, v_raw, s2_raw = inputs(6, 5, 33, 3)
    rest = weight, bias, A, v_raw, s2_raw
    expected = triton_logits(f, *rest)
    strided = weight.T.contiguous().T, bias, A.mT.contiguous().mT, v_raw.T.contiguous().T, s2_raw
    torch.testing.assert_close(triton_logits(f.T.contiguous().T, *strided), expected)
    offset = torch.cat([torch.zeros(1), f.flatten()])[1:].view(6, 33)  # not aligned
    torch.testing.assert_close(triton_logits(offset, *rest), expected)
    torch.testing.assert_close(triton_logits(f.view(2, 3, 33), *rest), expected.view(2, 3, 5))
    empty = triton_logits(f[:0].requires_grad_(), *rest)
    assert empty.shape == (0, 5) and empty.dtype == torch.float32
    empty.sum().backward()


def test_only_what_asks_for_it_gets_a_gradient():
    args = inputs(4, 5, 33, 3)
    args[3].requires_grad_()
    triton_logits(*args).sum().backward()
    assert args[3].grad is not None and all(t.grad is None for t in args if t is not args[3])


def test_second_derivatives_are_refused():
    args = [t.requires_grad_() for t in inputs(4, 5, 33, 3)]
    (grad,) = torch.autograd.grad(triton_logits(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_compiled():
    head, x = distinct(ZZZHead(20, 33, 3, impl='triton')), torch.randn(4, 33, requires_grad=True)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager' if INTERPRETED else 'inductor')
    weights, leaves = torch.randn(4, 20), [x, *head.parameters()]
    expected, logits = head(x), compiled(x)
    torch.testing.assert_close(logits, expected)
    grads = [torch.autograd.grad((z * weights).sum(), leaves) for z in (logits, expected)]
    torch.testing.assert_close(*grads)
    compiled(torch.randn(7, 33))  # another batch size
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def test_operator_for_the_compiler():
    from timm_zzz.ops import triton_ops

    features, *parameters = inputs(4, 20, 33, 3)
    tests = dict(test_utils=['test_schema', 'test_faketensor'])
    torch.library.opcheck(torch.ops.timm_zzz.logits, (features, parameters, 1e-4, 1e-4, True), **tests)
    kept = triton_ops.forward(features, parameters, 1e-4, 1e-4, True)[1:]
    args = (torch.randn(4, 20), features, parameters, kept, 1e-4, 1e-4, True)
    torch.library.opcheck(torch.ops.timm_zzz.logits_grad, args, **tests)


def test_eval_sees_changes():
    head, x = distinct(ZZZHead(20, 33, 3, impl='triton')).eval(), torch.randn(4, 33)
    expected = head(x)
    with torch.no_grad():
        torch.testing.assert_close(head(x), expected)
        assert torch.equal(head(x), head(x))
        head.A.mul_(torch.rand_like(head.A))
        torch.testing.assert_close(head(x), zzz_logits(x, *_parameters(head), impl='torch'), rtol=1e-5, atol=1e-5)


def _parameters(head):
    return head.weight, head.bias, head.A, head.v_raw, head.sigma2_raw


def plan_of(fused, split):
    from timm_zzz.ops.triton_ops import FusedLogits

    return FusedLogits(fused.linear.weight, fused.linear.bias, fused.sigma2, fused.num_classes, split)


@pytest.mark.parametrize('r', further([(1,), (3,), (8,)], quick=[(3,)]))
@pytest.mark.parametrize('half', [False, True])
def test_fused(r, half):
    head, x = distinct(ZZZHead(20, 33, r, sigma2_init=0.05)), torch.randn(4, 33)
    fused = head.fuse()
    logits = plan_of(fused, not half)(x)
    expected = zzz_logits(x.double(), *(p.detach().double() for p in _parameters(head)))
    tolerance = 1e-3 if half else 1e-5
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


def test_log_density():
    """The same kernels, and a term that they don't see."""
    args, weights = inputs(3, 7, 67, 3), torch.randn(3, 7)
    functions = (partial(triton_logits, log_density=True), partial(low_rank_logits, log_density=True))
    actual, truth = (
        derivatives(f, args, dtype, weights) for f, dtype in zip(functions, (torch.float32, torch.float64), strict=True)
    )
    for name, expected in truth.items():
        assert (actual[name].double() - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_repeated(dtype):
    """Features through launches kept from others like them, against float64."""
    head = distinct(ZZZHead(20, 33, 3, sigma2_init=0.05)).to(DEVICE)
    fused = head.fuse()
    x = torch.randn(3, 2, 33, device=DEVICE, dtype=dtype)
    repeat = plan_of(fused, False)
    repeat(x)
    for size in (1, 1e-4, 1e4):
        other = (size * torch.randn(3, 2, 33, device=DEVICE)).to(dtype)
        other[0, 0] = 0
        logits = repeat(other)
        assert logits.shape == (3, 2, 20) and logits.dtype == torch.float32
        expected = zzz_logits(other.double(), *(p.detach().double() for p in _parameters(head)))
        # What remains is float16's rounding of the bases and, for float32, of x in t = U (x - mu)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(logits, plan_of(fused, False)(other))  # a first call
    other[1, 1, 5] = float('nan')
    other[2, 0, 5] = float('inf')
    assert repeat(other).isfinite().all(-1).tolist() == [[True, True], [True, False], [False, True]]


@pytest.mark.parametrize('width', [32, 34, 40])
@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_another_width_after_a_launch_was_kept(fused, width):
    """The kernels would read and write past the ends of what the kept plan is for."""
    head = ZZZHead(20, 33, 3, impl='triton').to(DEVICE).eval()
    head = head.fuse() if fused else head
    head(torch.randn(4, 33, device=DEVICE))
    with pytest.raises(ValueError, match='features: expected a last dimension of 33'):
        head(torch.randn(4, width, device=DEVICE))


def test_launches_are_kept_within_bounds(monkeypatch):
    """Batches of many sizes, through first launches and kept ones, against plain PyTorch."""
    from timm_zzz.ops import triton_ops

    monkeypatch.setattr(triton_ops, 'compiled', {})
    monkeypatch.setattr(triton_ops, 'MAX_COMPILED', 10)
    _, *parameters = inputs(1, 20, 33, 3)
    for size in (*range(1, 9), 8, 3):
        features = torch.randn(size, 33, device=DEVICE)
        logits = zzz_logits(features, *parameters, impl='triton')
        torch.testing.assert_close(logits, zzz_logits(features, *parameters, impl='torch'), rtol=1e-5, atol=1e-5)
        assert 0 < len(triton_ops.compiled) <= 10


@gpu
@torch.no_grad()
def test_fused_launches_see_changes():
    head, other = (distinct(ZZZHead(20, 40, 3, sigma2_init=sigma2)) for sigma2 in (0.05, 0.1))
    fused = head.fuse()

    def check(x, head=head, tolerance=1e-5):
        expected = zzz_logits(x.double(), *(p.double() for p in _parameters(head)), impl='torch')
        torch.testing.assert_close(fused(x).double(), expected, rtol=tolerance, atol=tolerance)

    for x in (torch.randn(4, 40), torch.randn(4, 40), torch.randn(2, 2, 40), torch.randn(1, 40)):
        check(x)
    check(torch.randn(4, 41)[:, 1:])  # not contiguous
    check(torch.randn(161)[1:].view(4, 40))  # not at a multiple of 16 bytes
    assert fused(torch.randn(0, 40)).shape == (0, 20)
    x = torch.randn(4, 40)
    check(x.bfloat16(), tolerance=1e-3)
    with torch.autocast('cuda', torch.bfloat16):
        check(x, tolerance=1e-3)
    check(x)
    with torch.inference_mode():
        check(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        check(x.clone())
    fused.load_state_dict(other.fuse().state_dict())
    check(x, other)
    fused.cpu().cuda()
    check(x, other)
    fused.linear.weight[:20].mul_(0)
    assert not torch.allclose(fused(x), other(x), atol=1e-3)
    for _ in range(40):
        check_shape = torch.randn(torch.randint(1, 99, ()).item(), 40)
        assert fused(check_shape).shape == (len(check_shape), 20)
    x.requires_grad_()
    with torch.enable_grad():
        assert torch.autograd.grad(fused(x).sum(), x)[0].isfinite().all()


def test_choice(caplog):
    dispatch._log_once.cache_clear()
    head = ZZZHead(5, 12, 5)
    with caplog.at_level(logging.DEBUG, 'timm_zzz'):
        # The interpreter only where it is asked for
        assert head.impl == 'auto' and head.active_impl == ('torch' if INTERPRETED else 'triton')
        head(torch.randn(2, 12))
    assert len([r for r in caplog.records if r.message.startswith('impl: ')]) == 1
    for impl in ('triton', 'torch'):
        head.impl = impl
        assert head.impl == head.active_impl == impl
    with pytest.raises(ValueError, match="impl: expected one of auto, torch, triton, got 'cuda'"):
        head.impl = 'cuda'
    refused = {'rank 0': dict(rank=0), 'rank 33': dict(rank=33), 'float64': dict(rank=3, dtype=torch.float64)}
    for reason, options in refused.items():
        other = ZZZHead(5, 40, **options)
        assert other.active_impl == 'torch'
        other.impl = 'triton'
        with pytest.raises(ValueError, match=f"impl='triton' can't run: .*{reason}"):
            other(torch.randn(2, other.feat_dim))


def test_wrong_shapes_do_not_reach_a_kernel():
    f, weight, bias, A, v_raw, s2_raw = inputs(4, 5, 33, 3)
    with pytest.raises(ValueError, match="impl='triton' can't run: the shapes of the parameters disagree"):
        triton_logits(f, weight, bias[:3], A, v_raw, s2_raw)
    with pytest.raises(ValueError, match='features: expected a last dimension of 33'):
        triton_logits(f[:, :30], weight, bias, A, v_raw, s2_raw)


def test_training_steps_agree_with_torch():
    x, y = torch.randn(24, 33), torch.arange(24, device=DEVICE) % 6
    heads = [distinct(ZZZHead(6, 33, 3, sigma2_init=0.1, impl=impl)) for impl in ('torch', 'triton')]
    heads[1].load_state_dict(heads[0].state_dict())
    for head in heads:
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
    for p, q in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# What needs a GPU


def _cuda_step(half=True):
    head = distinct(ZZZHead(50, 123, 8, sigma2_init=0.05))
    x, y = torch.randn(33, 123, requires_grad=True), torch.arange(33) % 50

    def step():
        with torch.autocast('cuda', torch.bfloat16, enabled=half):
            loss = F.cross_entropy(head(x), y)
        loss.backward()
        return loss

    return head, x, step


@gpu
@pytest.mark.parametrize('half', [False, True])
def test_training_never_synchronises(half):
    head, _, step = _cuda_step(half)
    with torch.no_grad():
        head.A[3] = 0  # to be repaired
    step()  # loads the kernels
    head.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert head.active_impl == 'triton' and all(p.grad.isfinite().all() for p in head.parameters())


@gpu
def test_cuda_graph():
    head, x, step = _cuda_step()
    expected = step().detach().clone()
    grads = [p.grad.clone() for p in (*head.parameters(), x)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            head.zero_grad(set_to_none=True)
            x.grad = None
            step()
    torch.cuda.current_stream().wait_stream(stream)
    head.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        x.mul_(-1)
    graph.replay()
    assert not torch.equal(loss, expected)
    with torch.no_grad():
        x.mul_(-1)
    graph.replay()
    torch.testing.assert_close(loss, expected)
    for p, grad in zip((*head.parameters(), x), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


@gpu
def test_same_bits_twice(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    try:
        head, x, step = _cuda_step()
        results = []
        for _ in range(2):
            head.zero_grad()
            x.grad = None
            results.append([step().detach(), x.grad, *(p.grad for p in head.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@gpu
def test_accumulation_and_checkpointing():
    head, x, _ = _cuda_step()
    y = torch.arange(33) % 50
    F.cross_entropy(head(x), y, reduction='sum').backward()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    for part in (slice(0, 16), slice(16, 33)):
        logits = torch.utils.checkpoint.checkpoint(head, x[part], use_reentrant=False)
        F.cross_entropy(logits, y[part], reduction='sum').backward()
    for p, grad in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@gpu
def test_grad_scaler():
    head, x, _ = _cuda_step()
    y = torch.arange(33) % 50
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler('cuda', init_scale=2.0**16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            loss = F.cross_entropy(head(x.half()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**16 and losses[-1] < 0.7 * losses[0]


@gpu
def test_backward_inside_autocast():
    head, x, step = _cuda_step()
    step()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    with torch.autocast('cuda', torch.bfloat16):
        F.cross_entropy(head(x), torch.arange(33) % 50).backward()
    for p, grad in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@gpu
def test_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        head, x, step = _cuda_step(False)
        step()
        expected = [p.grad.clone() for p in head.parameters()]
        head.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(head)
        F.cross_entropy(parallel(x), torch.arange(33) % 50).backward()
        for p, grad in zip(head.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


@gpu
@pytest.mark.parametrize('half', [False, True])
def test_fused_module(half):
    head, x = distinct(ZZZHead(50, 123, 8, sigma2_init=0.05)).eval(), torch.randn(33, 123)
    fused = head.fuse()
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, enabled=half):
        torch.testing.assert_close(fused(x), head(x), rtol=1e-4, atol=1e-4)
        fused.load_state_dict(distinct(ZZZHead(50, 123, 8)).fuse().state_dict())
        assert not torch.allclose(fused(x), head(x))
