import copy
import gc
import io
import itertools
import math
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import timm
import timm.optim
import torch
from oracles import distinct
from timm.loss import BinaryCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import timm_zzz.head
from timm_zzz import ZZZHead
from timm_zzz.functional import zzz_logits
from timm_zzz.head import ROW_STD, SIGMA2_INIT, V_RATIO, FusedZZZConvHead, FusedZZZHead, ZZZConvHead

SHAPES = {'weight': (5, 12), 'A': (5, 12, 3), 'v_raw': (5, 3), 'sigma2_raw': (1,), 'bias': (5,)}


def variances(head):
    return F.softplus(head.v_raw) + head.v_min, (F.softplus(head.sigma2_raw) + head.sigma2_min).item()


def test_parameters_and_their_first_values():
    head = ZZZHead(5, 12, rank=3)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == SHAPES
    assert head.mu is head.weight and (head.bias == 0).all()
    large = ZZZHead(100, 100)
    assert large.rank == 8 and large.A.std().item() == pytest.approx(0.02, rel=0.1)
    assert set(ZZZHead(5, 12, rank=0).state_dict()) == {'weight', 'bias', 'sigma2_raw'}


@pytest.mark.parametrize(
    'options, v, sigma2',
    [
        ({}, V_RATIO * SIGMA2_INIT, SIGMA2_INIT),
        (dict(sigma2_init=0.5), V_RATIO * 0.5, 0.5),
        (dict(v_init=2.0, sigma2_init=1e-3), 2.0, 1e-3),
        (dict(init='reference', sigma2_init=0.5), math.log(2) + 1e-4, 0.5),
        # The defaults keep clear of the floors, where softplus has no gradient left
        (dict(sigma2_init=1e-3), 2e-4, 1e-3),
        (dict(v_min=0.05, sigma2_min=0.2), 0.1, 0.4),
    ],
)
def test_first_variances(options, v, sigma2):
    head = ZZZHead(5, 12, **options)
    torch.testing.assert_close(variances(head)[0], torch.full((5, 8), v), rtol=1e-4, atol=0)
    assert variances(head)[1] == pytest.approx(sigma2, rel=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_start(dtype):
    """All classes the same Gaussian, in a random direction, with rows of ROW_STD; the next draw is another."""
    head = ZZZHead(200, 500, 2, dtype=dtype)
    first = {name: p.detach().clone() for name, p in head.named_parameters()}
    for p in head.parameters():
        assert torch.equal(p, p[:1].expand_as(p))
    assert head.weight[0].double().std().item() == pytest.approx(ROW_STD, rel=0.15)
    assert head.A[0].double().std().item() == pytest.approx(0.02, rel=0.15)
    shared = first['weight'][0].double()
    head.reset_parameters()
    assert not torch.equal(head.weight, first['weight'])
    assert F.cosine_similarity(head.weight[0].double(), shared, dim=0).abs() < 0.3  # another direction
    assert torch.equal(head.v_raw, first['v_raw']) and torch.equal(head.sigma2_raw, first['sigma2_raw'])
    torch.manual_seed(3)
    head.reset_parameters()
    again = head.weight.detach().clone()
    torch.manual_seed(3)
    assert torch.equal(ZZZHead(200, 500, 2, dtype=dtype).weight, again)


@pytest.mark.parametrize('rank', [0, 8])
def test_flat_start_pushes_the_backbone_where_the_images_point(rank):
    """No gradient to the embeddings at first; after one step of AdamW one that tells the classes apart."""
    torch.manual_seed(0)
    head = ZZZHead(20, 128, rank)
    centres, y = torch.randn(20, 128), torch.arange(400) % 20
    x = (centres[y] + torch.randn(400, 128)).requires_grad_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)

    def push():
        logits = head(x)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction='sum'), x, retain_graph=True)
        return logits, grad

    logits, grad = push()
    assert logits.std(1).max() < 1e-4 and grad.abs().max() < 1e-5
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    logits, grad = push()
    right = (logits.argmax(1) == y).double().mean()
    # Against the gradient lies the direction from the mean of all to the image's own class
    cosine = F.cosine_similarity(-grad, (centres - centres.mean(0))[y], dim=1)
    assert right > 0.9 and cosine.mean() > 0.3


@pytest.mark.parametrize('lr', [0.01, 0.1])
def test_sgd_trains_a_flat_start_with_warm_up(lr):
    torch.manual_seed(0)
    centres, y = torch.randn(20, 128), torch.arange(400) % 20
    x, head = centres[y] + 2 * torch.randn(400, 128), ZZZHead(20, 128, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, nesterov=True)
    for step in range(100):
        optimizer.param_groups[0]['lr'] = lr * min(1, (step + 1) / 40)
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
    assert (head(centres).argmax(1) == torch.arange(20)).all() and variances(head)[1] < 1


def test_start_of_the_reference():
    """Means, then A, from 0.02 N(0, 1); variances of softplus(0); a Gaussian of torch with that covariance."""
    torch.manual_seed(1)
    weight, A = 0.02 * torch.randn(7, 12), 0.02 * torch.randn(7, 12, 3)
    torch.manual_seed(1)
    head = ZZZHead(7, 12, 3, init='reference', log_density=True)
    expected = dict(weight=weight, A=A, v_raw=torch.zeros(7, 3), sigma2_raw=torch.zeros(1), bias=torch.zeros(7))
    torch.testing.assert_close(dict(head.state_dict()), expected, rtol=0, atol=0)
    x, variance = torch.randn(4, 12), torch.tensor(math.log(2) + 1e-4)
    factor, diagonal = torch.linalg.qr(A)[0] * variance.sqrt(), variance.expand(7, 12)
    density = torch.distributions.LowRankMultivariateNormal(F.normalize(weight, dim=1), factor, diagonal)
    log_prob = density.log_prob(F.normalize(x, dim=1)[:, None]) + 6 * math.log(2 * math.pi)
    torch.testing.assert_close(head(x), log_prob)


@pytest.mark.parametrize('num_classes, feat_dim, rank', [(1, 12, 3), (5, 1, 0), (5, 1, 1), (5, 4, 4), (1, 1, 1)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_flat_start_of_the_smallest_heads(num_classes, feat_dim, rank, dtype):
    head, x = ZZZHead(num_classes, feat_dim, rank, dtype=dtype), torch.randn(3, feat_dim, requires_grad=True)
    assert head.weight.isfinite().all() and (head.weight != 0).any()
    head(x).logsumexp(1).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *head.parameters()))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_classes=0), 'num_classes: expected at least 1, got 0'),
        (dict(feat_dim=0), 'feat_dim: expected at least 1, got 0'),
        (dict(rank=-1), 'rank: .*got -1'),
        (dict(rank=13), 'rank: expected 0 <= rank <= feat_dim = 12, got 13'),
        (dict(rank=2.0), 'rank: expected an int, got 2.0'),
        (dict(v_min=0.0), 'v_min: .*got 0.0'),
        (dict(sigma2_min=float('nan')), 'sigma2_min: .*got nan'),
        (dict(sigma2_init=1e-5), 'sigma2_init: .*above the minimum 0.0001, got 1e-05'),
        (dict(sigma2_init=float('nan')), 'sigma2_init: .*got nan'),
        (dict(v_init=float('inf')), 'v_init: .*got inf'),
        (dict(init='random'), "init: expected 'flat' or 'reference', got 'random'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ZZZHead(**{**dict(num_classes=5, feat_dim=12), **kwargs})


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_never_materialises_batch_times_classes_times_width():
    b, c, d, r = 64, 32, 48, 2
    head, x = ZZZHead(c, d, r), torch.randn(b, d, requires_grad=True)
    with _LargestTensor() as largest:
        F.cross_entropy(head(x), torch.zeros(b, dtype=torch.long)).backward()
    assert c * d * r <= largest.numel <= max(b * c * r, c * d * r) < b * c * d


@pytest.mark.parametrize('rank', [0, 3])
@pytest.mark.parametrize('layer', [nn.Linear(12, 5), nn.Conv2d(12, 5, 1)], ids=['linear', 'convolution'])
def test_state_dict_of_a_layer_warm_starts_the_means(layer, rank):
    head = ZZZHead(5, 12, rank)
    before = copy.deepcopy(head.state_dict())
    head.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(head.weight, layer.weight.flatten(1)) and torch.equal(head.bias, layer.bias)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items() if k not in ('weight', 'bias'))


def test_old_name_loads():
    head, other = distinct(ZZZHead(5, 12, 3)), ZZZHead(5, 12, 3)
    other.load_state_dict({'mu' if k == 'weight' else k: v for k, v in head.state_dict().items()})
    assert torch.equal(other.weight, head.weight) and torch.equal(other.A, head.A)


@pytest.mark.parametrize(
    'source, figures',
    [
        (nn.Linear(12, 7), 'classes 7 -> 5, features 12 -> 12'),
        (nn.Linear(10, 5), 'classes 5 -> 5, features 10 -> 12'),
        (ZZZHead(7, 12, 3), 'classes 7 -> 5, features 12 -> 12, rank 3 -> 3'),
        (ZZZHead(5, 12, 4), 'classes 5 -> 5, features 12 -> 12, rank 4 -> 3'),
        (ZZZHead(7, 12, 0), 'classes 7 -> 5, features 12 -> 12'),
    ],
)
@pytest.mark.parametrize('strict', [True, False])
def test_other_sizes_are_refused_with_both_figures(source, figures, strict):
    head = ZZZHead(5, 12, 3)
    with pytest.raises(RuntimeError, match=re.escape(figures)) as error:
        nn.Sequential(head).load_state_dict({f'0.{k}': v for k, v in source.state_dict().items()}, strict=strict)
    assert 'size mismatch' not in str(error.value)  # said once


def test_rank_0_into_a_rank():
    """It may be a shard, so only a strict load can refuse it."""
    head, source = ZZZHead(5, 12, 3), distinct(ZZZHead(5, 12, 0))
    with pytest.raises(RuntimeError, match='Missing key.*"A", "v_raw"'):
        head.load_state_dict(source.state_dict())
    assert head.load_state_dict(source.state_dict(), strict=False).missing_keys == ['A', 'v_raw']
    assert torch.equal(head.weight, source.weight)


@pytest.mark.parametrize('gone', list(SHAPES))
def test_truncated_state_dict_is_an_error(gone):
    state = ZZZHead(5, 12, 3).state_dict()
    state.pop(gone)
    with pytest.raises(RuntimeError, match='Missing key|another size'):
        ZZZHead(5, 12, 3).load_state_dict(state)


@pytest.mark.parametrize('names', [['A', 'v_raw', 'sigma2_raw'], ['A'], ['weight'], ['weight', 'sigma2_raw'], ['bias']])
def test_a_part_of_a_head_is_loaded_as_it_is(names):
    head, other = distinct(ZZZHead(5, 12, 3)), distinct(ZZZHead(5, 12, 3, v_init=0.1, sigma2_init=0.1))
    before, part = copy.deepcopy(head.state_dict()), {name: other.state_dict()[name] + 1 for name in names}
    result = head.load_state_dict(part, strict=False)
    assert not result.unexpected_keys
    for name, value in head.state_dict().items():
        assert torch.equal(value, part.get(name, before[name])), name
    if 'weight' not in names:
        assert set(result.missing_keys) == SHAPES.keys() - set(names)
        with pytest.raises(RuntimeError, match='Missing key'):
            head.load_state_dict(part, strict=True)


@pytest.mark.parametrize('shard', [300, 1000])  # bytes
def test_shards(shard, tmp_path):
    """As huggingface_hub writes and reads them."""
    model, loaded = (nn.Sequential(nn.Linear(12, 12), distinct(ZZZHead(5, 12, 3))) for _ in range(2))
    huggingface_hub.save_torch_model(model, tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    # 0.x holds each shard against the whole model when strict
    strict = not hasattr(huggingface_hub, 'configure_http_backend')
    huggingface_hub.load_torch_model(loaded, tmp_path, strict=strict)
    for (name, expected), actual in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_shards_of_a_head_without_memory():
    """In any order, as accelerate and huggingface_hub fill a model from the meta device."""
    state = distinct(ZZZHead(5, 12, 3, v_init=0.1, sigma2_init=0.1)).state_dict()
    for order in itertools.permutations(state):
        head = ZZZHead(5, 12, 3, device='meta')
        for name in order:
            head.load_state_dict({name: state[name]}, strict=False, assign=True)
        assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items()), order


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(
        RuntimeError, match=r'a linear classifier of another size .*: weight shape \[5\] -> \[5, 12\]|classes 5'
    ):
        ZZZHead(5, 12, 3).load_state_dict(nn.LayerNorm(5).state_dict())


def test_a_copy_outlives_the_original():
    original, state = ZZZHead(5, 12, 3), distinct(ZZZHead(5, 12, 3)).state_dict()
    head = copy.copy(original)
    del original
    gc.collect()
    head.load_state_dict(state)
    assert torch.equal(head.weight, state['weight'])


@torch.no_grad()
def test_what_is_put_in_a_parameters_place_is_seen():
    """As FSDP does, with memory of which no version counter tells that it was written to."""
    head, x = distinct(ZZZHead(5, 12, 3)).eval(), torch.randn(4, 12)
    whole, before = nn.Parameter(head.weight.detach().clone()), head(x)
    head.weight = whole
    assert torch.equal(head(x), before)
    with torch.autograd._unsafe_preserve_version_counter(whole):
        whole.normal_()
    head.weight = whole
    torch.testing.assert_close(head(x), fresh_logits(head, x))
    assert not torch.allclose(head(x), before)


@pytest.mark.parametrize('names', [['weight'], ['weight', 'A'], ['A', 'v_raw'], ['weight', 'A', 'v_raw']])
def test_a_pruned_head(names):
    head, loaded = distinct(ZZZHead(5, 12, 3)), ZZZHead(5, 12, 3)
    for each in (head, loaded):
        for name in names:
            prune.random_unstructured(each, name, amount=0.5)
    loaded.load_state_dict(head.state_dict())
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.randn(4, 12)
    torch.testing.assert_close(loaded(x), head(x))
    roles = {name.removesuffix('_orig'): p.zzz_role for name, p in head.named_parameters()}
    assert roles == {name: name for name in SHAPES}


@pytest.mark.parametrize('assign', [False, True])
def test_sigma2_without_dimensions_is_read(assign):
    head, loaded = distinct(ZZZHead(5, 12, 3, sigma2_init=0.1)), ZZZHead(5, 12, 3)
    state = {**head.state_dict(), 'sigma2_raw': head.sigma2_raw.detach().squeeze()}
    loaded.load_state_dict(state, assign=assign)
    assert state['sigma2_raw'].shape == () and loaded.sigma2_raw.shape == (1,)
    assert torch.equal(loaded.sigma2_raw, head.sigma2_raw)


def test_meta_device():
    head = ZZZHead(5, 12, 3, device='meta', sigma2_init=0.1)
    linear = nn.Linear(12, 5)
    head.load_state_dict(linear.state_dict(), assign=True)
    assert not any(p.is_meta for p in head.parameters())
    assert torch.equal(head.weight, linear.weight) and head.A.std() > 0
    assert head(torch.randn(2, 12)).isfinite().all()


@pytest.mark.parametrize('rank', [0, 3])
@pytest.mark.parametrize('kind, shape', [(ZZZHead, (4, 12)), (ZZZConvHead, (4, 12, 2, 3))])
@pytest.mark.parametrize('fuse', [False, True])
def test_other_forms_give_the_same_logits(fuse, kind, shape, rank):
    head, loaded, x = distinct(kind(5, 12, rank)), kind(5, 12, rank), torch.randn(shape)
    nn.init.normal_(head.bias)
    expected = head(x)
    if fuse:
        head, loaded = head.fuse(), loaded.fuse()
        assert type(head) is (FusedZZZHead if kind is ZZZHead else FusedZZZConvHead)
        torch.testing.assert_close(head(x), expected)
    loaded.load_state_dict(head.state_dict())
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    forms = {
        'deepcopy': copy.deepcopy(head),
        'pickle': pickle.loads(pickle.dumps(head)),
        'torch.save': torch.load(buffer, weights_only=False),
        'state_dict': loaded,
        'script': torch.jit.script(head),
        'trace': torch.jit.trace(head, x),
        'fx': torch.fx.symbolic_trace(head),
        'export': torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module(),
        'compile': torch.compile(head, fullgraph=True, backend='aot_eager'),
    }
    expected = head(x)
    for name, form in forms.items():
        torch.testing.assert_close(form(x), expected, msg=lambda m, name=name: f'{name}: {m}')
        torch.testing.assert_close(form(x[:3]), expected[:3], msg=lambda m, name=name: f'{name}: {m}')
    if not fuse and kind is ZZZHead:
        parameters = list(head.parameters())
        compiled, eager = (torch.autograd.grad(f(x).square().sum(), parameters) for f in (forms['compile'], head))
        for actual, expected in zip(compiled, eager, strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_functional_transforms():
    head, x = distinct(ZZZHead(5, 12, 3)), torch.randn(4, 12)
    params = dict(head.named_parameters())

    def loss(params, row):
        return torch.func.functional_call(head, params, (row,)).logsumexp(-1)

    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    (head(x).logsumexp(-1)).sum().backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(per_row[name].sum(0), p.grad)


def fresh_logits(head, x):
    """Straight from the parameters as they are now."""
    parameters = (head.weight, head.bias, head.A, head.v_raw, head.sigma2_raw)
    with torch.no_grad():
        return zzz_logits(x, *parameters, head.v_min, head.sigma2_min)


@torch.no_grad()
def assert_up_to_date(head, x):
    for _ in range(2):  # derived, then kept
        torch.testing.assert_close(head(x), fresh_logits(head, x), rtol=1e-5, atol=1e-5)


def evaluated_head(rank=3, **kwargs):
    """A head in eval mode that has kept what it derived, and embeddings."""
    head, x = distinct(ZZZHead(5, 12, rank, **kwargs)).eval(), torch.randn(4, 12)
    assert_up_to_date(head, x)
    return head, x


@pytest.fixture
def derivations(monkeypatch):
    """Calls of the function that derives the bases, one entry each."""
    calls = []
    derive = timm_zzz.head.class_gaussians
    monkeypatch.setattr(timm_zzz.head, 'class_gaussians', lambda *args: calls.append(1) or derive(*args))
    return calls


@pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('rank', [0, 3])
def test_eval_derives_the_bases_once(no_grad, rank, derivations):
    head = distinct(ZZZHead(5, 12, rank)).eval()
    with no_grad():
        for batch in (4, 1, 7):
            x = torch.randn(batch, 12)
            torch.testing.assert_close(head(x), fresh_logits(head, x))
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(head(x), fresh_logits(head, x))
    assert len(derivations) == 1
    with torch.no_grad():
        head(x)
        assert len(derivations) == 1
        assert head(x.double()).dtype == torch.float64 and len(derivations) == 2
        torch.testing.assert_close(head(x.double()), fresh_logits(head, x.double()))
        assert torch.equal(head(x), head.fuse()(x))
    for mode in (torch.no_grad, torch.enable_grad):
        with pytest.raises(ValueError, match='features: expected a last dimension of 12'), mode():
            head(torch.randn(2, 11))
    conv, x = distinct(ZZZConvHead(5, 12, rank)).eval(), torch.randn(2, 12, 3, 3)
    expected = conv(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)
        count = len(derivations)
        conv(x)
        assert len(derivations) == count


def test_nothing_is_kept_in_training_or_with_gradients(derivations):
    head, x = distinct(ZZZHead(5, 12, 3)), torch.randn(4, 12)
    with torch.no_grad():
        head(x)
    assert not derivations
    head.eval()
    head(x).square().sum().backward()
    assert not derivations and all(p.grad.abs().sum() > 0 for p in head.parameters())
    head, x = evaluated_head()
    kept = weakref.ref(head._kept.fused)
    head.train()
    gc.collect()
    assert kept() is None  # its memory is free for training


def _step(head, optimizer):
    for p in head.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def _optimizer(kind, **kwargs):
    return lambda head: _step(head, kind(head.parameters(), lr=0.1, **kwargs))


class _DataSGD(torch.optim.Optimizer):
    """As some of timm's optimisers do, it writes past the parameters' version counters."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    def step(self, closure=None):
        for p in [p for group in self.param_groups for p in group['params']]:
            p.data.sub_(p.grad, alpha=0.1)


def _lookahead(head):
    optimizer = timm.optim.Lookahead(torch.optim.SGD(head.parameters(), lr=0.1), k=2)
    for _ in range(3):
        _step(head, optimizer)
        assert_up_to_date(head, torch.randn(4, 12))


@torch.no_grad()
def _scale(p):
    p.mul_(torch.rand(p.shape))


@torch.inference_mode()
def _inference_in_place(head):
    _scale(head.weight)


def _ema(head):
    ema = ModelEmaV3(head, decay=0.5)
    _scale(head.A)
    ema.module.eval()
    for _ in range(2):
        ema.update(head)
        assert_up_to_date(ema.module, torch.randn(4, 12))


def _averaged(head):
    averaged = torch.optim.swa_utils.AveragedModel(head).eval()
    for _ in range(3):
        _optimizer(torch.optim.SGD)(head)
        averaged.update_parameters(head)
        assert_up_to_date(averaged.module, torch.randn(4, 12))


def _vector(head):
    vector = nn.utils.parameters_to_vector(head.parameters())
    nn.utils.vector_to_parameters(vector.detach() + torch.randn_like(vector), head.parameters())


def _empty(head):
    head.to_empty(device='cpu')
    head.reset_parameters()


def _parametrize(head):
    nn.utils.parametrizations.weight_norm(head, 'weight')
    _scale(head.parametrizations.weight.original1)


def _swap(head):
    torch.utils.swap_tensors(head.A, nn.Parameter(torch.randn(5, 12, 3)))


def _transpose(head):
    """Other strides over the same memory."""
    square = distinct(ZZZHead(5, 5, 2)).eval()
    x = torch.randn(4, 5)
    assert_up_to_date(square, x)
    square.weight.data = square.weight.data.t()
    assert_up_to_date(square, x)


def _view(head):
    head.bfloat16()
    assert_up_to_date(head, torch.randn(4, 12))
    head.weight.data = head.weight.data.view(torch.float16)


@torch.no_grad()
def _copied(head):
    torch._foreach_copy_(list(head.parameters()), [torch.rand_like(p) for p in head.parameters()])


CHANGES = {
    'sgd': _optimizer(torch.optim.SGD, foreach=False),
    'foreach': _optimizer(torch.optim.AdamW, foreach=True),
    'fused': _optimizer(torch.optim.AdamW, fused=True),
    'through data': _optimizer(_DataSGD),
    'Lookahead': _lookahead,
    'in place': lambda head: _scale(head.A[2, 3]),
    'in place in inference mode': _inference_in_place,
    'data = new': lambda head: setattr(head.A, 'data', torch.randn(5, 12, 3)),
    'data = transposed': _transpose,
    'data = other dtype over the same memory': _view,
    'data = other dtype': lambda head: [setattr(p, 'data', p.data.double()) for p in head.parameters()],
    'setattr': lambda head: setattr(head, 'A', nn.Parameter(torch.randn(5, 12, 3))),
    'register_parameter': lambda head: head.register_parameter('A', nn.Parameter(torch.randn(5, 12, 3))),
    'in the dict': lambda head: head._parameters.update(A=nn.Parameter(torch.randn(5, 12, 3))),
    'swap_tensors': _swap,
    'foreach copy': _copied,
    'load_state_dict': lambda head: head.load_state_dict(distinct(ZZZHead(5, 12, 3)).state_dict()),
    'assign': lambda head: head.load_state_dict(distinct(ZZZHead(5, 12, 3)).state_dict(), assign=True),
    'double and back': lambda head: head.to(torch.float64).to(torch.float32),
    'double': lambda head: head.double(),
    'half': lambda head: head.half(),
    'to_empty': _empty,
    'reset_parameters': lambda head: head.reset_parameters(),
    'ModelEmaV3': _ema,
    'AveragedModel': _averaged,
    'vector_to_parameters': _vector,
    'v_min': lambda head: setattr(head, 'v_min', 3.0),
    'prune': lambda head: prune.random_unstructured(head, 'weight', 0.5),
    'parametrize': _parametrize,
}


@pytest.mark.parametrize('change', CHANGES)
def test_eval_sees_every_change_of_the_parameters(change):
    head, x = evaluated_head()
    for _ in range(1 if change in ('prune', 'parametrize') else 2):
        CHANGES[change](head)
        assert_up_to_date(head, x)


def _timm_optimizers():
    """Those that this environment can build, but for Adahessian, whose step wants second derivatives."""
    names = [name for name in timm.optim.list_optimizers() if not name.startswith(('bnb', 'fused', 'adahessian'))]
    assert len(names) > 60
    return names


@pytest.mark.parametrize('name', _timm_optimizers())
def test_eval_sees_the_steps_of_timms_optimizers(name):
    """Some of them write through ``.data``, which no version counter sees."""
    head, x = evaluated_head()
    optimizer = timm.optim.create_optimizer_v2(head, name, lr=0.1)
    for _ in range(2):
        _step(head, optimizer)
        assert_up_to_date(head, x)


@pytest.mark.parametrize('clear', [lambda head: head.eval(), lambda head: head.train().eval()])
def test_eval_or_train_drops_what_no_version_counter_sees(clear):
    head, x = evaluated_head()
    for p in head.parameters():
        p.data.add_(torch.rand(p.shape))
    head.sigma2_raw.detach().numpy()[...] = -2.0
    clear(head)
    assert_up_to_date(head, x)


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_eval_of_copies(copied):
    head, x = evaluated_head()
    other = copied(head)
    if other.A is not head.A:
        assert other._kept is None
    for changed in (other, head):
        _scale(changed.weight)
        for h in (other, head, other):
            assert_up_to_date(h, x)
    assert set(head.state_dict()) == set(SHAPES)
    torch.jit.script(head)


def test_eval_with_other_tensors():
    head, x = evaluated_head()
    other = {name: torch.randn_like(p) for name, p in head.named_parameters()}
    replaced = copy.deepcopy(head)
    replaced.load_state_dict(other)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(torch.func.functional_call(head, other, (x,)), fresh_logits(replaced, x))
            assert_up_to_date(head, x)
        stacked = {name: torch.stack([p, other[name]]) for name, p in head.named_parameters()}
        both = torch.func.vmap(lambda p: torch.func.functional_call(head, p, (x,)))(stacked)
        torch.testing.assert_close(both, torch.stack([fresh_logits(head, x), fresh_logits(replaced, x)]))


@torch.no_grad()
def test_forward_mode_derivatives_in_eval():
    head, x = evaluated_head(rank=0)
    params = {name: p.detach() for name, p in head.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    double, logits = copy.deepcopy(head).double(), []
    for step in (0, 1e-8):
        moved = {name: p.double() + step * tangents[name] for name, p in params.items()}
        logits.append(torch.func.functional_call(double, moved, (x.double(),)))
    expected = ((logits[1] - logits[0]) / step).float()
    _, derivative = torch.func.jvp(lambda p: torch.func.functional_call(head, p, (x,)), (params,), (tangents,))
    torch.testing.assert_close(derivative, expected, rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()}
        logits = torch.func.functional_call(head, dual, (x,))
        torch.testing.assert_close(forward_ad.unpack_dual(logits).tangent, derivative)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        head, x = distinct(ZZZHead(5, 12, 3)).eval(), torch.randn(4, 12)
        assert_up_to_date(head, x)
        head.A.mul_(torch.rand(5, 12, 3))
        assert_up_to_date(head, x)


@torch.no_grad()
def test_what_is_traced_keeps_nothing(derivations):
    head, x = evaluated_head()
    forms = {
        'script': torch.jit.script(head),
        'trace': torch.jit.trace(head, x),
        'fx': torch.fx.symbolic_trace(head),
        'compile': torch.compile(head, fullgraph=True, backend='aot_eager'),
    }
    for form in forms.values():
        form(x)
    exported = torch.export.export(head, (x,))
    assert set(exported.state_dict) == set(SHAPES) and not exported.constants
    parameters = dict(head.named_parameters())
    graph = make_fx(lambda x, p: torch.func.functional_call(head, p, (x,)))(x, parameters)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert head(mode.from_tensor(x)).shape == (4, 5)
    count = len(derivations)
    for p in head.parameters():
        _scale(p)
    for name, form in forms.items():
        torch.testing.assert_close(form(x), fresh_logits(head, x), msg=lambda m, name=name: f'{name}: {m}')
    torch.testing.assert_close(graph(x, parameters), fresh_logits(head, x))
    assert len(derivations) == count


def test_eval_lets_go_of_other_tensors():
    """And of the graphs that they belong to."""
    head, x = evaluated_head()
    other = {name: 2 * p for name, p in head.named_parameters()}
    references = [weakref.ref(t) for t in other.values()]
    with torch.no_grad():
        torch.func.functional_call(head, other, (x,))
    del other
    gc.collect()
    assert not any(ref() is not None for ref in references)


@pytest.mark.parametrize('change', [lambda head: setattr(head, 'v_min', 0.9), lambda head: head.eval()])
def test_eval_sees_what_changes_while_it_derives(change, monkeypatch):
    """As another thread may: here within the derivation."""
    head, x = distinct(ZZZHead(5, 12, 3)).eval(), torch.randn(4, 12)
    derive = timm_zzz.head.class_gaussians

    def change_meanwhile(*args):
        gaussians = derive(*args)
        head.sigma2_raw.data.add_(1)
        change(head)
        return gaussians

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(timm_zzz.head, 'class_gaussians', change_meanwhile)
        head(x)
    assert_up_to_date(head, x)


def test_eval_in_threads():
    head, x = evaluated_head()
    expected, wrong = fresh_logits(head, x), []

    def evaluate():
        with torch.no_grad():
            for i in range(50):
                if i % 7 == 0:
                    head.eval()
                if not torch.allclose(head(x), expected, rtol=1e-5, atol=1e-5):
                    wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(evaluate) for _ in range(4)]:
            future.result()
    assert not wrong


def test_non_finite_parameters_in_eval():
    head, x = evaluated_head()
    with torch.no_grad():
        head.weight[2, 3] = float('nan')
        for _ in range(2):
            assert head(x).isfinite().all(0).tolist() == [True, True, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@torch.no_grad()
def test_cuda_eval_and_graph_capture():
    head, x = distinct(ZZZHead(5, 12, 3)).cuda().eval(), torch.randn(4, 12, device='cuda')
    assert_up_to_date(head, x)
    for p in head.parameters():
        p.add_(torch.randn_like(p))
    assert_up_to_date(head, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = head(x)
    for p in head.parameters():
        p.add_(torch.randn_like(p))
    graph.replay()
    torch.testing.assert_close(logits, fresh_logits(head, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(head.cpu()(x.cpu()), head(x.cpu()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_agrees_and_never_synchronises():
    head, x = distinct(ZZZHead(50, 123, 8, sigma2_init=0.05)), torch.randn(33, 123)
    expected = zzz_logits(
        x.double(), *[p.double() for p in (head.weight, head.bias, head.A, head.v_raw, head.sigma2_raw)]
    )
    head, x, y = head.cuda(), x.cuda(), torch.arange(33, device='cuda')
    F.cross_entropy(head(x), y).backward()  # loads the kernels
    head.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        logits = head(x)
        F.cross_entropy(logits, y).backward()
        with torch.autocast('cuda', torch.bfloat16):
            half = head(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(p.grad.isfinite().all() for p in head.parameters())
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=2e-5, atol=2e-4)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logits, rtol=2e-4, atol=2e-3)  # unit vectors rounded to float16


def test_a_head_that_transformers_fills_in_part():
    """It marks what it has loaded, and then lets modules fill in what they know of."""
    head = ZZZHead(5, 12, 3)
    head.init_non_persistent_buffers()  # timm calls it too
    for p in head.parameters():
        p._is_hf_initialized = True
    head.init_non_persistent_buffers()
    del head.A._is_hf_initialized
    with pytest.raises(RuntimeError, match='leaves A of a ZZZ head without values: .*num_classes=N'):
        head.init_non_persistent_buffers()


@pytest.mark.parametrize('num_classes', [20, 200])
def test_binary_cross_entropy_starts_below_1(num_classes):
    """As train.py --bce-loss; with log-densities for logits it starts at hundreds."""
    model, x = timm.create_model('test_vit.zzz_r8', num_classes=num_classes), torch.randn(8, 3, 160, 160)
    loss, target = BinaryCrossEntropy(), torch.randint(num_classes, (8,))
    assert loss(model(x), target) < 1
    model.head.log_density = True
    assert loss(model(x), target) > 50


def test_learns_several_labels():
    """Two of twenty classes in each example, by binary cross-entropy, as well as a linear layer does."""
    directions = F.normalize(torch.randn(20, 32))

    def draw(count):
        target = F.one_hot(torch.rand(count, 20).topk(2)[1], 20).sum(1).float()
        return target @ directions + 0.1 * torch.randn(count, 32), target

    (x, target), (test_x, test_target), correct = draw(500), draw(500), {}
    for head in (ZZZHead(20, 32, 2, sigma2_init=1 / 16), nn.Linear(32, 20)):
        optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(x), target).backward()
            optimizer.step()
        found = torch.zeros_like(test_target).scatter(1, head(test_x).topk(2)[1], 1.0)
        correct[type(head)] = (found == test_target).all(1).double().mean().item()
    assert correct[ZZZHead] > 0.9 and correct[ZZZHead] >= correct[nn.Linear] - 0.02
