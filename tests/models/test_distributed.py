"""Training on several devices: torchrun as in README, against a plain loop in one process.

train.py itself refuses several processes on the CPU: it gives DistributedDataParallel the CPU as ``device_ids``.
"""

import math
from pathlib import Path

import ddp
import pytest
import torch
from torch.nn import functional as F

from timm_zzz.head import ROW_STD

fsdp_on_cpu = pytest.mark.skipif(
    torch.__version__.startswith(('2.6.', '2.7.')),
    reason='torch 2.6 and 2.7 crash or train wrongly under FSDP on the CPU, a linear model too',
)
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']


def plain_loop(device):
    """The whole batch at once, AdamW of torch, the schedule and the average written down."""
    model = ddp.build().to(device)
    skip, o = ('cls_token', 'pos_embed'), ddp.OPTIONS
    groups = []
    for name, p in model.named_parameters():
        head = name.startswith('head.')
        decayed = name in ('head.weight', 'head.A') if head else p.ndim > 1 and name not in skip
        decay = o['head_weight_decay'] if head else o['weight_decay']
        scale = o['head_lr_scale'] if head else 1.0
        groups.append(dict(params=[p], weight_decay=decay if decayed else 0.0, scale=scale))
    optimizer = torch.optim.AdamW(groups, eps=o['eps'])
    average = {k: v.clone() for k, v in model.state_dict().items()}
    warm, first = ddp.SCHEDULE['warmup_epochs'], ddp.SCHEDULE['warmup_lr']
    for step in range(ddp.STEPS):
        lr = o['lr'] * (1 + math.cos(math.pi * step / ddp.STEPS)) / 2
        lr = first + step * (o['lr'] - first) / warm if step < warm else lr
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        x, y = (t.to(device) for t in ddp.batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name] = ddp.EMA_DECAY * average[name] + (1 - ddp.EMA_DECAY) * value
    return model.state_dict(), average


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f'{n}: {m}')


def torchrun(run, processes, *args):
    run(*TORCHRUN, processes, '-m', 'timm_zzz', Path(ddp.__file__), *args)


def check(folder, processes, device, atol):
    """The processes have saved the same, and what the plain loop gives."""
    saved = [torch.load(folder / f'rank{rank}.pth', map_location=device) for rank in range(processes)]
    for other in saved[1:]:
        torch.testing.assert_close(other, saved[0], rtol=0, atol=0)
    model, average = plain_loop(device)
    assert_close(saved[0]['model'], model, atol)
    assert_close(saved[0]['ema'], average, atol)


@pytest.mark.integration
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(ddp.spawned, (ddp.main, tmp_path, 'cpu', torch.float32, False), nprocs=2)
    check(tmp_path, 2, 'cpu', 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['eager', 'compile'])
def test_torchrun(form, run, tmp_path):
    torchrun(run, 2, tmp_path, 'cpu', 'float32', form)
    check(tmp_path, 2, 'cpu', 1e-5)


def check_sharded(folder, kind, device, atol):
    """The same in both processes, and what AdamW gives in one; decay as ddp.sharded has it."""
    saved = [torch.load(folder / f'rank{rank}.pth', weights_only=False) for rank in range(2)]
    torch.testing.assert_close(saved[1], saved[0], rtol=0, atol=0)
    model, o = ddp.build().to(device), ddp.OPTIONS
    groups = []
    for name, p in model.named_parameters():
        head = name.startswith('head.')
        decayed = name in ('head.weight', 'head.A') if head else p.ndim > 1 and name not in ('cls_token', 'pos_embed')
        decay = o['head_weight_decay'] if head else o['weight_decay'] if kind == 'fsdp2' else 0.0
        lr = o['lr'] * (o['head_lr_scale'] if head else 1.0)
        groups.append(dict(params=[p], weight_decay=decay if decayed else 0.0, lr=lr))
    optimizer = torch.optim.AdamW(groups, eps=o['eps'])
    for step in range(ddp.STEPS):
        x, y = (t.to(device) for t in ddp.batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    actual = {name.replace('_fsdp_wrapped_module.', ''): value for name, value in saved[0]['model'].items()}
    assert_close(actual, {name: value.cpu() for name, value in model.state_dict().items()}, atol)
    with torch.no_grad():
        expected = model(ddp.batch(0)[0].to(device)).cpu()
    for logits in saved[0]['logits']:
        torch.testing.assert_close(logits, expected, rtol=0, atol=20 * atol)
    fresh = ddp.build()
    fresh.load_state_dict(actual)  # as a plain checkpoint


@pytest.mark.integration
@fsdp_on_cpu
@pytest.mark.parametrize('kind', ['fsdp1', 'fsdp2'])
def test_sharded(kind, tmp_path):
    torch.multiprocessing.spawn(ddp.spawned, (ddp.sharded, tmp_path, kind, 'cpu'), nprocs=2)
    check_sharded(tmp_path, kind, 'cpu', 1e-5)


@pytest.mark.integration
@fsdp_on_cpu
def test_shards_share_the_direction_of_a_flat_start(tmp_path):
    torch.multiprocessing.spawn(ddp.spawned, (ddp.drawn, tmp_path), nprocs=2)
    saved = [torch.load(tmp_path / f'rank{rank}.pth') for rank in range(2)]
    torch.testing.assert_close(saved[1], saved[0], rtol=0, atol=0)
    for head in saved[0]:
        for p in head.values():
            assert torch.equal(p, p[:1].expand_as(p))
        assert ROW_STD / 2 < head['weight'][0].float().std() < 2 * ROW_STD


@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['fsdp1', 'fsdp2'])
def test_sharded_over_nccl(kind, run, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip('needs 2 CUDA GPUs')
    torchrun(run, 2, tmp_path, 'cuda', 'float32', kind)
    check_sharded(tmp_path, kind, 'cuda', 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('dtype, atol', [('float32', 1e-4), ('float16', 1.5e-3)])
def test_nccl(processes, dtype, atol, run, tmp_path):
    if torch.cuda.device_count() < processes:
        pytest.skip(f'needs {processes} CUDA GPU(s)')
    torchrun(run, processes, tmp_path, 'cuda', dtype, 'eager')
    check(tmp_path, processes, 'cuda', atol)
