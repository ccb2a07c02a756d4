"""zzzadamw against a hand-built AdamW."""

import copy
import csv
import inspect
import math
import pickle
import shutil
import warnings

import pytest
import timm
import timm.optim
import torch
import yaml
from oracles import distinct
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead
from timm_zzz.optim import ZZZAdamW

LR, DECAY, SCALE, HEAD_DECAY = 1e-3, 0.05, 20.0, 0.01
DECAYED = ('head.weight', 'head.A')
# Nearly SGD: steps that show how large a gradient is, and none made of rounding errors where it should be 0
CALM = dict(eps=0.1)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=needs_cuda)]


def build(seed=0, device='cpu', **kwargs):
    torch.manual_seed(seed)
    return distinct(timm.create_model('test_vit.zzz_r4', num_classes=5, zzz_v_init=2.0, **kwargs)).to(device)


def make(model, opt='zzzadamw', **kwargs):
    options = dict(lr=LR, weight_decay=DECAY, head_lr_scale=SCALE, head_weight_decay=HEAD_DECAY)
    return timm.optim.create_optimizer_v2(model, opt, **{**options, **kwargs})


def by_hand(model, layer_decay=1.0, **kwargs):
    """A group for each parameter."""
    groups, top = [], len(model.blocks) + 1
    for name, p in model.named_parameters():
        head, kept = name.startswith('head.'), p.ndim <= 1 or name in ('cls_token', 'pos_embed')
        part, number = name.split('.')[:2] if '.' in name else (name, '')
        depth = {'blocks': int(number) + 1 if part == 'blocks' else 0, 'norm': top - 1, 'head': top}.get(part, 0)
        scale = layer_decay ** (top - depth) * (SCALE if head else 1)
        decay = HEAD_DECAY * (name in DECAYED) if head else 0 if kept else DECAY
        groups.append(dict(params=[p], lr=LR * scale, scale=scale, weight_decay=decay))
    return torch.optim.AdamW(groups, **kwargs)


def train(model, optimizer, steps, start=0, dtype=None, update=None):
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=2.0**10)
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 160, 160, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if update is not None:
            update(step + 1)


def by_updates(optimizer, **kwargs):
    """A cosine with two updates of warm-up."""
    return create_scheduler_v2(optimizer, warmup_epochs=2, step_on_epochs=False, updates_per_epoch=1, **kwargs)[0]


def assert_same_parameters(a, b, atol=1e-6, rtol=1e-6):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f'{n}: {m}')


def options_of(optimizer, p):
    (group,) = [g for g in optimizer.param_groups if any(q is p for q in g['params'])]
    return group['lr'], group['weight_decay']


def rates(model, optimizer):
    """The learning rate of every parameter."""
    return {name: options_of(optimizer, p)[0] for name, p in model.named_parameters()}


def times_scale(plain):
    return {name: lr * (SCALE if name.startswith('head.') else 1) for name, lr in plain.items()}


# Groups


@pytest.mark.parametrize(
    'device, options',
    [
        ('cpu', {}),
        ('cpu', dict(foreach=False)),
        ('cpu', dict(foreach=True)),
        ('cpu', dict(fused=True)),
        ('cpu', dict(amsgrad=True, betas=(0.8, 0.95), eps=1e-6)),
        ('cpu', dict(maximize=True)),
        pytest.param('cuda', dict(fused=True, **CALM), marks=needs_cuda),
        pytest.param('cuda', dict(capturable=True, lr=torch.tensor(LR), **CALM), marks=needs_cuda),
    ],
    ids=str,
)
def test_equals_adamw_by_hand(device, options):
    model, other, before = (build(device=device) for _ in range(3))
    assert_same_parameters(model, other, 0, 0)
    steps = 4 if options else 50
    train(model, make(model, **options), steps)
    train(other, by_hand(other, **{k: v for k, v in options.items() if k != 'lr'}), steps)
    assert_same_parameters(model, other)
    assert not torch.equal(model.head.weight, before.head.weight)


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
    groups = [dict(params=model.blocks.parameters(), lr=1.0), dict(params=head.parameters(), lr=2.0, weight_decay=3.0)]
    optimizer = ZZZAdamW(groups, head_lr_scale=5.0)
    assert options_of(optimizer, head.A) == (10.0, 3.0) and options_of(optimizer, head.v_raw) == (10.0, 0.0)
    layered = ZZZAdamW([dict(params=head.parameters(), lr_scale=0.5)], head_lr_scale=SCALE)  # as of timm's layer decay
    create_scheduler_v2(layered, sched='step')
    assert options_of(layered, head.A)[0] == pytest.approx(1e-3 * SCALE * 0.5)
    optimizer.add_param_group(dict(params=model.cls_token))
    assert options_of(optimizer, model.cls_token) == (1e-3, 1e-2)
    with pytest.raises(TypeError, match='ordered collection'):
        ZZZAdamW([dict(params=set(head.parameters()))])


def test_several_heads():
    options = dict(num_classes=5, img_size=32, depth=1, embed_dim=48)
    model = timm.create_model('deit_tiny_distilled_patch16_224.zzz_r4', **options)
    optimizer = make(model)
    for head in (model.head, model.head_dist):
        assert options_of(optimizer, head.A) == (LR * SCALE, HEAD_DECAY)
        assert options_of(optimizer, head.v_raw) == (LR * SCALE, 0)


def test_frozen_parts():
    model, other = build(), build()
    for m in (model, other):
        for name, p in m.named_parameters():
            p.requires_grad = name.startswith('head.') and name != 'head.weight'
    optimizer = make(model, **CALM)
    assert all('head_lr_scale' in group for group in optimizer.param_groups)
    train(model, optimizer, 4)
    train(other, by_hand(other, **CALM), 4)
    assert_same_parameters(model, other)
    assert torch.equal(model.head.weight, build().head.weight) and not torch.equal(model.head.A, build().head.A)
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith('head.')
    with pytest.raises(ValueError, match='none of the parameters belongs to a ZZZ head .* not frozen'):
        make(model)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def assigned(model):
    model.load_state_dict(dict(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    'change', [copy.deepcopy, pickled, assigned, nn.Module.double, torch.jit.script, torch.compile]
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
    wrong = [('head_lr_scale', v) for v in (0, -1.0, math.nan, math.inf, '5e1', None, True)]
    wrong += [('head_weight_decay', v) for v in (-0.1, math.nan, math.inf, '1e-2')]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f'^{name}: expected a finite number >=? 0, got {value!r}$'):
            ZZZAdamW(ZZZHead(3, 8, 2).parameters(), **{name: value})
    for name in ('head_lr_scal', 'caution', 'corrected_weight_decay'):
        with pytest.raises(TypeError, match=rf'zzzadamw: unknown option {name} \(there are: .*head_lr_scale, '):
            make(build(), **{name: 5.0})
    p = nn.Parameter(torch.zeros(3, 8, 2))
    p.zzz_role = 'A'  # of a head that is gone
    assert len(ZZZAdamW([p]).param_groups) == 1


def test_says_what_gradient_clipping_leaves_out(caplog):
    """timm's agc takes the last two parameters for the classifier."""
    model = build()
    assert [n for n, _ in model.named_parameters()][-2:] == ['head.sigma2_raw', 'head.bias']
    with caplog.at_level('INFO', 'timm_zzz'):
        make(model)
    assert ['--clip-mode agc leaves out sigma2_raw and bias' in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize('duplicate', [copy.copy, lambda model: nn.ModuleList([model, copy.copy(model.head)])])
def test_a_parameter_counts_once_whatever_holds_it(duplicate):
    model, plain = build(), build()
    both = nn.ModuleList([model, duplicate(model)])
    optimizer, x = make(both, **CALM), torch.randn(2, 3, 160, 160)
    expected = by_hand(plain, **CALM)
    for _ in range(2):
        optimizer.zero_grad(), expected.zero_grad()
        model(x).square().mean().backward()
        plain(x).square().mean().backward()
        optimizer.step(), expected.step()
    for (name, value), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)


# Schedules


SCHEDULES = ['none', 'cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau']


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated')
@pytest.mark.parametrize('options', [{}, dict(layer_decay=0.7)], ids=['', 'layer_decay'])
@pytest.mark.parametrize('unit', ['epochs', 'warmup', 'updates'])
@pytest.mark.parametrize('sched', SCHEDULES)
def test_schedulers_keep_the_factor(sched, unit, options):
    """Every rate is that of timm's adamw, the head's times the factor, through warm-up, floor, noise and a resume."""
    if sched == 'plateau' and unit == 'updates':
        pytest.skip('timm steps plateau per epoch only')
    schedule = dict(sched=sched, num_epochs=9, decay_rate=0.5, decay_milestones=[3, 5], noise=[0.6], noise_seed=1)
    schedule.update(decay_epochs=2, step_on_epochs=unit != 'updates', updates_per_epoch=1)
    if sched in ('wsd', 'rsqrt', 'constant'):
        if 'stable_timescale' not in inspect.signature(create_scheduler_v2).parameters:
            pytest.skip(f'timm before 1.0.31 has no schedule {sched}')
        schedule.update(stable_timescale=2)
    if unit != 'epochs':
        schedule.update(warmup_epochs=3, warmup_lr=1e-4)
        schedule.update(dict(min_lr=1e-5) if sched != 'plateau' else {})  # torch's has one floor for all groups

    def start(saved=None):
        model = build()
        made = [make(model, **options), timm.optim.create_optimizer_v2(model, 'adamw', lr=LR, **options)]
        for optimizer, state in zip(made, saved or [], strict=False):
            optimizer.load_state_dict(state)
        return model, made, [create_scheduler_v2(o, **schedule)[0] for o in made]

    model, made, schedulers = start()
    seen = set()
    for epoch in range(9):
        if epoch == 5:
            model, made, schedulers = start([pickled(o.state_dict()) for o in made])
        for scheduler in schedulers if sched != 'none' else ():
            if unit == 'updates':
                scheduler.step_update(epoch)
            else:
                scheduler.step(epoch, metric=-epoch)
        zzz, plain = (rates(model, o) for o in made)
        assert zzz == pytest.approx(times_scale(plain))
        seen.add(plain['cls_token'])
    assert (len(seen) == 1) == (sched == 'none')


def test_schedulers_of_torch():
    schedulers = torch.optim.lr_scheduler
    for kind, option in (('ExponentialLR', 0.5), ('CosineAnnealingLR', 5), ('LinearLR', 0.3)):
        model = build()
        optimizer, plain = make(model), timm.optim.create_optimizer_v2(model, 'adamw', lr=LR)
        for o in (optimizer, plain):
            scheduler = getattr(schedulers, kind)(o, option)
            for _ in range(3):
                o.step()
                scheduler.step()
        assert rates(model, optimizer) == pytest.approx(times_scale(rates(model, plain)))
        assert rates(model, plain)['cls_token'] != LR
    optimizer = make(build())
    scheduler = schedulers.LambdaLR(optimizer, lambda epoch: 0.1 * epoch)
    optimizer.step()  # all rates are 0
    scheduler.step()
    with pytest.warns(UserWarning, match='head_lr_scale 20.0 has no effect'):
        optimizer.step()
    model = build()
    optimizer = timm.optim.create_optimizer_v2(model, 'zzzadamw', lr=LR, layer_decay=0.5)
    schedulers.LambdaLR(optimizer, lambda epoch: 1.0)  # loses the layers' scales, but there is no head_lr_scale to lose
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        optimizer.step()
    optimizer = make(build())
    schedulers.LambdaLR(optimizer, [lambda _, g=g: g.get('lr_scale', 1.0) for g in optimizer.param_groups])
    assert options_of(optimizer, optimizer.param_groups[-1]['params'][0])[0] == pytest.approx(LR * SCALE)
    optimizer.step()


@pytest.mark.parametrize('options', [{}, dict(layer_decay=0.5)], ids=['', 'layer_decay'])
def test_schedule_and_layer_decay_by_hand(options):
    model, other = build(), build()
    optimizer = make(model, **CALM, **options)
    scheduler = by_updates(optimizer, num_epochs=8, warmup_lr=1e-4)
    train(model, optimizer, 6, update=scheduler.step_update)
    plain = by_hand(other, **CALM, **options)

    def update(t):
        warm = 1e-4 + t * (LR - 1e-4) / 2
        for group in plain.param_groups:
            group['lr'] = group['scale'] * (warm if t < 2 else LR * (1 + math.cos(math.pi * t / 8)) / 2)

    update(0)
    train(other, plain, 6, update=update)
    assert_same_parameters(model, other)


def test_lookahead():
    model, other, without = build(), build(), build()
    train(model, make(model, 'lookahead_zzzadamw', **CALM), 13)
    train(other, timm.optim.Lookahead(by_hand(other, **CALM)), 13)
    assert_same_parameters(model, other)
    train(without, make(without), 13)
    assert (model.head.weight - without.head.weight).abs().max() > 1e-3


@pytest.mark.parametrize('opt', ['zzzadamw', 'lookahead_zzzadamw'])
def test_resume_is_exact(opt, tmp_path):
    def start(seed, saved=None, **kwargs):
        model = build(seed)
        optimizer = make(model, opt, layer_decay=0.5, **kwargs)
        if saved is not None:
            model.load_state_dict(saved['model'])
            optimizer.load_state_dict(saved['optimizer'])
        scheduler = by_updates(optimizer, num_epochs=9)
        scheduler.step_update(0 if saved is None else saved['step'])
        return model, optimizer, scheduler

    model, optimizer, scheduler = start(0)
    train(model, optimizer, 3, update=scheduler.step_update)
    checkpoint = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=3)
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    train(model, optimizer, 4, start=3, update=scheduler.step_update)
    # as with any optimiser the checkpoint's options win
    changed = dict(lr=0.1, weight_decay=0.5, head_lr_scale=3.0, head_weight_decay=0.4)
    for options in ({}, changed):
        resumed, optimizer2, scheduler = start(1, torch.load(tmp_path / 'checkpoint.pth'), **options)
        train(resumed, optimizer2, 4, start=3, update=scheduler.step_update)
        assert_same_parameters(model, resumed, 0, 0)
        assert optimizer2.state_dict()['param_groups'] == optimizer.state_dict()['param_groups']


# Loops


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('clip', [None, 0.1])
def test_native_scaler(clip, accumulate):
    """timm's NativeScaler as train.py calls it."""
    model, other = build(), build()
    optimizer, plain = make(model, **CALM), by_hand(other, **CALM)
    scaler, scaler2 = NativeScaler('cpu'), torch.amp.GradScaler('cpu', init_scale=2.0**10)
    scaler.load_state_dict(scaler2.state_dict())
    for _ in range(4):
        x, y = torch.randn(4, 3, 160, 160), torch.randint(5, (4,))
        optimizer.zero_grad()
        plain.zero_grad()
        for i, (xs, ys) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
            with torch.autocast('cpu', torch.float16):
                loss = F.cross_entropy(model(xs), ys) / accumulate
                loss2 = F.cross_entropy(other(xs), ys) / accumulate
            last = i == accumulate - 1
            scaler(loss, optimizer, clip_grad=clip, parameters=model.parameters(), need_update=last)
            scaler2.scale(loss2).backward()
        scaler2.unscale_(plain)
        if clip is not None:
            assert nn.utils.clip_grad_norm_(other.parameters(), clip) > clip
        scaler2.step(plain)
        scaler2.update()
    assert_same_parameters(model, other, 1e-4)


@pytest.mark.parametrize('fused', [False, True], ids=['', 'fused'])
def test_overflow_skips_the_step(fused):
    model = build()
    optimizer, before = make(model, fused=fused), copy.deepcopy(model)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    scaler.scale(model(torch.randn(2, 3, 160, 160)).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_parameters(model, before, 0, 0)
    assert scaler.get_scale() == 2.0**9 and all(state['step'] == 0 for state in optimizer.state.values())


def test_compiled_model_and_average():
    model, other = build(), build()
    optimizer, plain = make(model, **CALM), by_hand(other, **CALM)
    average, average2 = ModelEmaV3(model, decay=0.5), copy.deepcopy(other)  # copies made after the optimiser
    compiled = torch.compile(model, backend='aot_eager')
    compiled.head = model.head

    def update(_):
        with torch.no_grad():
            for p, q in zip(average2.parameters(), other.parameters(), strict=True):
                p.copy_(0.5 * p + 0.5 * q)

    train(compiled, optimizer, 4, update=lambda _: average.update(model))
    train(other, plain, 4, update=update)
    assert_same_parameters(model, other, 1e-5)
    assert_same_parameters(average.module, average2, 1e-5)


def test_compiled_step():
    head = distinct(ZZZHead(5, 12, 3))
    other = copy.deepcopy(head)
    optimizer, eager = (ZZZAdamW(h.parameters()) for h in (head, other))
    step = torch.compile(optimizer.step, backend='eager')
    for _ in range(3):
        x = torch.randn(4, 12)
        for h, o in ((head, optimizer), (other, eager)):
            o.zero_grad()
            h(x).logsumexp(1).sum().backward()
        step()
        eager.step()
    assert_same_parameters(head, other)


def test_closure_and_hooks():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # after which torch has put its hooks into AdamW.step too
    head = distinct(ZZZHead(5, 12, 3))
    other = copy.deepcopy(head)
    optimizer = ZZZAdamW(head.parameters(), weight_decay=0.0)
    plain = torch.optim.AdamW(other.parameters(), weight_decay=0.0)
    calls, x = [], torch.randn(4, 12)
    optimizer.register_step_pre_hook(lambda *_: calls.append('pre'))
    optimizer.register_step_post_hook(lambda *_: calls.append('post'))
    assert optimizer.step() is None  # no gradient yet

    def closure():
        optimizer.zero_grad()
        loss = head(x).logsumexp(1).sum()
        loss.backward()
        return loss

    for form in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        plain.zero_grad()
        loss = other(x).logsumexp(1).sum()
        loss.backward()
        torch.testing.assert_close(form(), loss)
        plain.step()
    assert_same_parameters(head, other, 1e-5)
    assert calls == ['pre', 'post'] * 3


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled])
def test_copied_optimizer_goes_on(copied):
    model = build()
    optimizer = make(model)
    train(model, optimizer, 2)
    model2, optimizer2 = copied((model, optimizer))
    train(model2, optimizer2, 2)
    before = copy.deepcopy(model)
    train(model, optimizer, 2)
    assert_same_parameters(model, model2, 0, 0)
    assert not torch.equal(model.head.v_raw, before.head.v_raw)


# timm's train.py


@pytest.mark.parametrize(
    'device, dtype',
    [('cpu', 'float32'), ('cpu', 'bfloat16'), pytest.param('cuda', 'float16', marks=needs_cuda)],  # CPU: no GradScaler
)
def test_train_script(device, dtype, timm_scripts, beetles, run, tmp_path):
    """The groups, rates and steps of a run are those of the recipe, and go on with --resume."""
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    recipe = dict(model='test_vit.zzz_r4', num_classes=12, model_kwargs=dict(zzz_v_init=2.0), no_aug=True, seed=1)
    recipe.update(opt='zzzadamw', lr=LR, weight_decay=DECAY, opt_eps=CALM['eps'], layer_decay=0.7, grad_accum_steps=2)
    recipe.update(epochs=1, warmup_epochs=0, sched_on_updates=True, batch_size=16, workers=1, output='out')
    recipe.update(device=device, amp=dtype != 'float32', amp_dtype=dtype)
    scales = dict(head_lr_scale=SCALE, head_weight_decay=HEAD_DECAY)

    def train_py(experiment, *arguments):
        recipe.update(experiment=experiment, opt_kwargs=scales, device_modules=['timm_zzz'])
        (tmp_path / f'{experiment}.yaml').write_text(yaml.safe_dump(recipe))
        command = ['train.py', '--config', f'{experiment}.yaml', '--data-dir', beetles]
        run(*command, *arguments, env={'OMP_NUM_THREADS': '1'})
        rows = list(csv.DictReader((tmp_path / 'out' / experiment / 'summary.csv').open()))
        checkpoint = torch.load(tmp_path / 'out' / experiment / 'last.pth.tar', weights_only=False, map_location='cpu')
        return rows, checkpoint

    rows, zzz = train_py('zzz')
    assert [row['epoch'] for row in rows] == ['0'] and math.isfinite(float(rows[0]['train_loss']))
    groups, names = zzz['optimizer']['param_groups'], list(zzz['state_dict'])
    head = [group for group in groups if 'head_lr_scale' in group]
    assert {group['weight_decay'] for group in head} == {HEAD_DECAY, 0.0}
    assert sum(len(group['params']) for group in head) == 5 and sum(len(g['params']) for g in groups) == len(names)
    assert {group['lr_scale'] for group in head} == {SCALE} and len({group['lr_scale'] for group in groups}) > 4
    assert len({round(group['lr'] / group['lr_scale'], 12) for group in groups}) == 1
    updates = {int(state['step']) for state in zzz['optimizer']['state'].values()}
    if dtype == 'bfloat16':
        rows, resumed = train_py('again', '--resume', 'out/zzz/last.pth.tar', '--epochs', 2)
        assert [row['epoch'] for row in rows] == ['1']
        (step,) = {int(state['step']) for state in resumed['optimizer']['state'].values()}
        assert {step} == {2 * n for n in updates}
        assert [g['lr_scale'] for g in resumed['optimizer']['param_groups']] == [g['lr_scale'] for g in groups]


def test_train_script_with_torchscript(timm_scripts, beetles, run, tmp_path):
    """With a model of which timm's own form gets through; test_vit does not, in torch 2.14."""
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    recipe = dict(model='test_resnet.zzz_r4', num_classes=12, no_aug=True, torchscript=True)
    recipe.update(device_modules=['timm_zzz'])
    recipe.update(lr=LR, weight_decay=DECAY, epochs=1, warmup_epochs=0, batch_size=16, workers=1, output='out')
    for opt in ('adamw', 'zzzadamw'):
        (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(dict(recipe, opt=opt, experiment=opt, device='cpu')))
        run('train.py', '--config', 'recipe.yaml', '--data-dir', beetles, env={'OMP_NUM_THREADS': '1'})
        saved = torch.load(tmp_path / 'out' / opt / 'last.pth.tar', weights_only=False, map_location='cpu')
        groups = saved['optimizer']['param_groups']
        decayed = sum(len(group['params']) for group in groups if group['weight_decay'])
        matrices = [name for name, t in saved['state_dict'].items() if t.ndim > 1]
        assert decayed == len([name for name in matrices if not name.endswith('v_raw')])


def test_parameters_keep_their_mark_and_stay_plain_tensors(tmp_path):
    """Checkpoints of trainable parameters load without this package's classes."""
    head = distinct(ZZZHead(5, 12, 3))
    torch.save({name: p for name, p in head.named_parameters()}, tmp_path / 'parameters.pth')
    loaded = torch.load(tmp_path / 'parameters.pth', weights_only=True)
    assert all(torch.equal(loaded[name], p) for name, p in head.named_parameters())
    assigned = ZZZHead(5, 12, 3)
    assigned.load_state_dict(head.state_dict(), assign=True)
    for h in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head)), assigned, head.to(torch.float64)):
        assert all(p.zzz_role == name for name, p in h.named_parameters())
