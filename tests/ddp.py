"""Run the processes of distributed tests; in a module that a spawned process can import.

Also a script for torchrun, of which test_distributed.py compares what it saves with a plain loop in one process:
torchrun --nproc-per-node N -m timm_zzz tests/ddp.py FOLDER DEVICE DTYPE compile|eager|fsdp1|fsdp2
It leaves it to timm_zzz's command line to import the plugin.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import timm
import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH, ACCUMULATE, EMA_DECAY = 6, 8, 2, 0.5
OPTIONS = dict(lr=1e-3, weight_decay=0.05, eps=0.1, head_lr_scale=20.0, head_weight_decay=0.01)
SCHEDULE = dict(num_epochs=STEPS, warmup_epochs=2, warmup_lr=1e-4, step_on_epochs=False, updates_per_epoch=1)


def build():
    torch.manual_seed(0)
    return timm.create_model('test_vit.zzz_r4', num_classes=5, zzz_init='reference', zzz_v_init=2.0)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 160, 160, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def fit(model, parallel, average, device, dtype):
    """A user's loop with what train.py takes of timm: each process has its share of the batch, in several parts."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = timm.optim.create_optimizer_v2(model, 'zzzadamw', **OPTIONS)
    scheduler, _ = create_scheduler_v2(optimizer, **SCHEDULE)
    scaler = NativeScaler(device.type)
    scaler.load_state_dict(torch.amp.GradScaler(device.type, init_scale=2.0**10).state_dict())
    for step in range(STEPS):
        shares = [t.chunk(world_size)[rank].to(device).chunk(ACCUMULATE) for t in batch(step)]
        optimizer.zero_grad()
        for i, (x, y) in enumerate(zip(*shares, strict=True)):
            last = i == ACCUMULATE - 1
            with nullcontext() if last else parallel.no_sync():
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss = F.cross_entropy(parallel(x), y) / ACCUMULATE
                scaler(loss, optimizer, need_update=last)
        scheduler.step_update(step + 1)
        average.update(model)
    return optimizer


def main(folder, device, dtype, compiled):
    device = torch.device(device)
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    torch.set_num_threads(1)
    model = build().to(device)
    average = ModelEmaV3(model, decay=EMA_DECAY)
    forward = torch.compile(model, backend='aot_eager') if compiled else model  # then DDP, as train.py does
    parallel = DistributedDataParallel(forward, device_ids=[device] if device.type == 'cuda' else None)
    optimizer = fit(model, parallel, average, device, dtype)
    saved = dict(model=model.state_dict(), ema=average.module.state_dict(), optimizer=optimizer.state_dict())
    torch.save(saved, Path(folder) / f'rank{torch.distributed.get_rank()}.pth')
    torch.distributed.destroy_process_group()


def shard(kind, model):
    if kind == 'fsdp1':
        device, policy = next(model.parameters()).device, ModuleWrapPolicy({type(model.head)})
        return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=device)
    for module in (*model.blocks, model.head, model):
        fully_shard(module)
    return model


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(folder, kind, device):
    """Steps, a checkpoint as torch.distributed writes it, and further steps with a model and optimiser made anew."""
    from timm_zzz import attach

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    # FSDP1 makes flat parameters, of which timm would take none for a matrix. On the CPU torch 2.14 does not restore
    # the state of its optimisers, so all steps are taken before the checkpoint.
    flat = kind == 'fsdp1'
    options = dict(OPTIONS, weight_decay=0.0) if flat else OPTIONS
    model_state, optimizer_state = None, None
    for steps in (range(STEPS), range(0)) if flat else (range(STEPS // 2), range(STEPS // 2, STEPS)):
        model = shard(kind, build().to(device))
        try:
            attach(model)
        except ValueError as e:
            assert 'attach the ZZZ head first' in str(e)
        else:
            raise AssertionError('attached to a sharded model')
        optimizer = timm.optim.create_optimizer_v2(model, 'zzzadamw', **options)
        if model_state is not None:
            set_model_state_dict(model, model_state, options=WHOLE)
            if not flat:
                set_optimizer_state_dict(model, optimizer, optimizer_state, options=WHOLE)
        for step in steps:
            x, y = (t.chunk(world_size)[rank].to(device) for t in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        saved = [*get_state_dict(model, optimizer, options=WHOLE)]
        torch.distributed.broadcast_object_list(saved, 0)  # only the first process has got it
        model_state, optimizer_state = saved
    with torch.no_grad():
        logits = [model.train(mode)(batch(0)[0].to(device)).cpu() for mode in (True, False)]
    torch.save(dict(model=model_state, logits=logits), Path(folder) / f'rank{rank}.pth')
    torch.distributed.barrier()


def drawn(folder):
    """Draw sharded heads that were made without memory; the processes' random numbers differ."""
    from timm_zzz import ZZZHead

    rank, mesh = torch.distributed.get_rank(), init_device_mesh('cpu', (2,))
    torch.manual_seed(rank)
    saved = []
    for size in ((5, 300, 3), (1, 300, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            head = ZZZHead(*size, device='meta', dtype=dtype)
            fully_shard(head, mesh=mesh).to_empty(device='cpu')
            head.reset_parameters()
            saved.append({name: p.full_tensor().detach() for name, p in head.named_parameters()})
    torch.save(saved, Path(folder) / f'rank{rank}.pth')
    torch.distributed.destroy_process_group()


def main_sharded(folder, kind):
    """Run the tests' processes on GPUs; torchrun calls this."""
    device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    torch.cuda.set_device(device)
    torch.distributed.init_process_group('nccl')
    sharded(folder, kind, device)
    torch.distributed.destroy_process_group()


def spawned(rank, function, folder, *args):
    """Call a function in one of two processes that torch.multiprocessing has started, in place of torchrun."""
    import timm_zzz  # noqa: F401

    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    function(folder, *args)


def train(folder, name):
    """Train in a process of test_families.test_distributed."""
    sys.path.append(str(Path(__file__).parent / 'models'))
    from test_families import build, flat, image

    from timm_zzz.models.attach import find_classifiers

    rank = torch.distributed.get_rank()
    torch.set_num_threads(1)
    model = build(name)[1].train()
    if hasattr(model, 'set_distilled_training'):
        model.set_distilled_training(True)
    parallel = DistributedDataParallel(model)  # an error in the second step if a parameter is unused
    torch.manual_seed(rank)
    for _ in range(2):
        parallel.zero_grad()
        outputs = flat(parallel(image(name)))
        sum(F.cross_entropy(out, torch.tensor([rank, 2])) for out in outputs).backward()
    grads = torch.cat([head.A.grad.flatten() for head in find_classifiers(model).values()])
    others = [torch.empty_like(grads) for _ in range(2)]
    torch.distributed.all_gather(others, grads)
    assert grads.abs().max() > 0 and torch.equal(others[0], others[1])
    torch.distributed.destroy_process_group()


def start(folder, images, backbone):
    """Make models with zzz_fit in a process of test_start.test_two_processes."""
    from timm_zzz.models import start as module

    rank = torch.distributed.get_rank()
    torch.set_num_threads(1)
    module.BATCH_SIZE, module.MAX_WORKERS = 7, 0
    torch.cuda.is_available = lambda: False
    tqdm, bars = module.tqdm, []

    def counted(*args, **kwargs):
        bars.append(not kwargs['disable'])
        return tqdm(*args, **kwargs)

    module.tqdm = counted

    def create(source):
        torch.manual_seed(rank)
        overlay = dict(file=backbone, num_classes=-1)
        kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
        return timm.create_model('test_resnet.zzz_r4', zzz_fit=source, **kwargs)

    def failed(source):
        try:
            create(source)
        except Exception as e:
            return f'{type(e).__name__}: {e}'

    model = create(images)
    saved = dict(folder=model.state_dict(), bars=sum(bars))
    dataset = timm.data.create_dataset('', root=images, search_split=False)
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x, y = (torch.stack([torch.as_tensor(each) for each in part]) for part in zip(*dataset, strict=True))
    share = slice(rank, None, 2)
    saved['loader'] = create([*zip(x[share].split(5), y[share].split(5), strict=True)]).state_dict()
    saved['one'] = create([(x, y)] if rank else []).state_dict()
    saved['missing'] = failed(images if rank else 'nowhere')

    def breaks():
        yield x[:5], y[:5]
        raise OSError('gone')

    saved['late'] = failed(breaks() if rank else [(x[:5], y[:5])] * 4)
    torch.save(saved, Path(folder) / f'rank{rank}.pth')
    torch.distributed.barrier()


if __name__ == '__main__' and sys.argv[4].startswith('fsdp'):
    main_sharded(sys.argv[1], sys.argv[4])
elif __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]), sys.argv[4] == 'compile')
