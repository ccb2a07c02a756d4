"""zzzadamw against a hand-built AdamW, and the regularisers against the penalty in the loss."""

import copy
import pickle

import pytest
import timm
import timm.optim
import torch
from oracles import qr_basis
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead
from timm_zzz.optim import ZZZAdamW, mean_decoupling, variance_shrinkage

LR, DECAY, SCALE, HEAD_DECAY = 1e-3, 0.05, 20.0, 0.01


def build(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('test_vit.zzz_r4', num_classes=5, zzz_v_init=2.0)


def make(model, **kwargs):
    options = dict(lr=LR, weight_decay=DECAY, head_lr_scale=SCALE, head_weight_decay=HEAD_DECAY)
    return timm.optim.create_optimizer_v2(model, 'zzzadamw', **{**options, **kwargs})


def by_hand(model):
    """Two groups and what of each is not decayed."""
    skip = model.no_weight_decay()
    groups = {}
    for name, p in model.named_parameters():
        head = name.startswith('head.')
        kept = name in skip or p.ndim <= 1 or name.endswith('.bias')
        groups.setdefault((head, kept), []).append(p)
    return torch.optim.AdamW(
        [
            dict(params=ps, lr=LR * (SCALE if head else 1), weight_decay=0 if kept else HEAD_DECAY if head else DECAY)
            for (head, kept), ps in groups.items()
        ]
    )


def train(model, optimizer, steps, scheduler=None, penalty=None, start=0, dtype=None):
    scaler = torch.amp.GradScaler('cpu', enabled=dtype == torch.float16, init_scale=2.0**10)
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 160, 160, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty(model.head)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step_update(step + 1)
            scheduler.step(step + 1)


def assert_same_parameters(a, b, atol=1e-6):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=atol, msg=lambda m, n=name: f'{n}: {m}')


def options_of(optimizer, p):
    (group,) = [g for g in optimizer.param_groups if any(q is p for q in g['params'])]
    return group['lr'], group['weight_decay']


def test_equals_two_groups_by_hand():
    model, other = build(), build()
    assert_same_parameters(model, other, 0)
    train(model, make(model), 50)
    train(other, by_hand(other), 50)
    assert_same_parameters(model, other)
    assert not torch.equal(model.head.weight, build().head.weight)


def test_groups():
    model = build()
    optimizer = make(model)
    head = model.head
    assert options_of(optimizer, head.weight) == options_of(optimizer, head.A) == (LR * SCALE, HEAD_DECAY)
    for p in (head.v_raw, head.sigma2_raw, head.bias):
        assert options_of(optimizer, p) == (LR * SCALE, 0)
    assert options_of(optimizer, model.blocks[0].mlp.fc1.weight) == (LR, DECAY)
    assert options_of(optimizer, model.blocks[0].mlp.fc1.bias) == (LR, 0)
    every = [p for g in optimizer.param_groups for p in g['params']]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    assert options_of(make(model, head_weight_decay=None), head.A) == (LR * SCALE, DECAY)
    assert options_of(make(model, weight_decay=0.0), head.A) == (LR * SCALE, HEAD_DECAY)
    assert options_of(ZZZAdamW(model.named_parameters(), head_lr_scale=2.0), head.v_raw) == (2e-3, 0)


def test_layer_decay_and_lookahead():
    model = build()
    optimizer = make(model, layer_decay=0.5)
    scales = {g['lr_scale'] for g in optimizer.param_groups}
    assert len(scales) > 2 and options_of(optimizer, model.head.A)[0] == LR * SCALE
    lookahead = timm.optim.create_optimizer_v2(model, 'lookahead_zzzadamw', lr=LR, head_lr_scale=SCALE)
    train(model, lookahead, 7)
    assert options_of(lookahead, model.head.A)[0] == LR * SCALE


@pytest.mark.parametrize('sched', ['none', 'cosine', 'step', 'multistep', 'tanh', 'poly'])
def test_schedulers_keep_the_factor(sched):
    model = build()
    optimizer = make(model)
    options = {} if sched == 'none' else dict(decay_epochs=2, decay_milestones=[2], decay_rate=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, sched=sched, num_epochs=6, min_lr=0.0, warmup_epochs=0, **options)
    rates = []
    for epoch in range(6):
        if scheduler is not None:
            scheduler.step(epoch)
        body, head = (options_of(optimizer, p)[0] for p in (model.cls_token, model.head.A))
        assert head == pytest.approx(SCALE * body)
        rates.append(body)
    assert (len(set(rates)) == 1) == (sched == 'none')
    optimizer = make(model)
    torch_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    torch_scheduler.step()
    assert max(torch_scheduler.get_last_lr()) == pytest.approx(SCALE * LR * 0.5)


def test_resume_is_exact():
    model = build()
    optimizer = make(model)
    train(model, optimizer, 3)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, start=3)
    resumed = build(seed=1)
    again = make(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, 3, start=3)
    assert_same_parameters(model, resumed, 0)


@pytest.mark.parametrize(
    'change',
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.load_state_dict(dict(m.state_dict()), assign=True), m)[1],
        lambda m: m.to(torch.float64),
        torch.jit.script,
        torch.compile,
    ],
    ids=['deepcopy', 'pickle', 'assign', 'to', 'script', 'compile'],
)
def test_knows_the_head_after(change):
    model = change(build())
    parameters = {n.removeprefix('_orig_mod.'): p for n, p in model.named_parameters()}
    optimizer = ZZZAdamW(parameters.values(), head_lr_scale=SCALE)
    assert options_of(optimizer, parameters['head.A'])[0] == pytest.approx(1e-3 * SCALE)
    assert options_of(optimizer, parameters['cls_token'])[0] == 1e-3


def test_refusals():
    with pytest.raises(ValueError, match='none of the parameters belongs to a ZZZ head'):
        timm.optim.create_optimizer_v2(timm.create_model('test_vit'), 'zzzadamw')
    for name, value in (('head_lr_scale', 0), ('head_weight_decay', -1), ('v_shrinkage', -1), ('mu_decoupling', -0.1)):
        with pytest.raises(ValueError, match=f'{name}: expected'):
            ZZZAdamW(ZZZHead(3, 8, 2).parameters(), **{name: value})
    p = nn.Parameter(torch.zeros(3, 8, 2))
    p.zzz_role = 'A'  # of a head that is gone
    assert len(ZZZAdamW([p]).param_groups) == 1
    with pytest.raises(ValueError, match='the regularisers need the ZZZ head as a module'):
        ZZZAdamW([p], v_shrinkage=0.1)


def test_regularisers_by_definition():
    head = ZZZHead(7, 20, 4).double()
    nn.init.normal_(head.v_raw)
    head = head.float()
    v = F.softplus(head.v_raw) + head.v_min
    torch.testing.assert_close(variance_shrinkage(head), v.sum(1).mean())
    projected = torch.linalg.vecdot(qr_basis(head.A).mT, F.normalize(head.weight)[:, None])
    torch.testing.assert_close(mean_decoupling(head), projected.square().sum(1).mean())
    empty = ZZZHead(7, 20, 0)
    assert variance_shrinkage(empty) == mean_decoupling(empty) == 0


@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name, function', [('v_shrinkage', variance_shrinkage), ('mu_decoupling', mean_decoupling)])
def test_regularisers_equal_the_penalty_in_the_loss(name, function, dtype):
    model, other, without = build(), build(), build()
    train(model, make(model, **{name: 3.0}), 8, dtype=dtype)
    train(other, make(other), 8, penalty=lambda head: 3.0 * function(head), dtype=dtype)
    train(without, make(without), 8, dtype=dtype)
    assert_same_parameters(model, other, 1e-4)
    assert function(model.head) < 0.97 * function(without.head)


def test_pickled_optimizer_goes_on():
    model = build()
    model2, optimizer = pickle.loads(pickle.dumps((model, make(model, v_shrinkage=0.5))))
    train(model2, optimizer, 1)
    train(model, make(model, v_shrinkage=0.5), 1)
    assert_same_parameters(model, model2)
