"""What a process of test_families.test_distributed does; in a module that a spawned process can import."""

import torch
from torch import nn
from torch.nn import functional as F

from timm_zzz.attach import find_classifiers


def train(rank, name, file):
    from test_families import build, flat, image

    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build(name)[1].train()
    if hasattr(model, 'set_distilled_training'):
        model.set_distilled_training(True)
    parallel = nn.parallel.DistributedDataParallel(model)  # an error in the second step if a parameter is unused
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
