"""Several threads at once, with a switch of threads every 10 us: each goes on as if it were alone."""

import sys
import threading
import time

import pytest
import timm
import torch
from oracles import distinct
from safetensors.torch import save_file
from torch import nn

from timm_zzz import ZZZHead
from timm_zzz.optim import ZZZAdamW

SECONDS = 4


@pytest.fixture
def often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_loading_building_and_training_at_once(often, tmp_path):
    plain = timm.create_model('test_resnet', num_classes=5)
    save_file(plain.state_dict(), tmp_path / 'weights.safetensors')
    overlay = dict(file=str(tmp_path / 'weights.safetensors'), num_classes=5)
    head = distinct(ZZZHead(5, 12, 2))
    optimizer, x = ZZZAdamW(head.parameters()), torch.randn(4, 12)
    errors, done = [], dict.fromkeys(('load', 'build', 'heads', 'train', 'evaluate'), 0)
    end = time.monotonic() + SECONDS

    def load():
        model = timm.create_model('test_resnet.zzz_r4', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.fc.weight, plain.fc.weight) and isinstance(model.fc, ZZZHead)

    def build():
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
        assert type(model[-1]) is nn.Linear and not model._load_state_dict_pre_hooks

    def heads():
        kept = [ZZZHead(3, 4, 2) for _ in range(20)]
        assert len(kept) == 20

    def train():
        optimizer.zero_grad()
        head(x).square().mean().backward()
        optimizer.step()

    def evaluate():
        own = distinct(ZZZHead(5, 12, 2)).eval()
        with torch.no_grad():
            first = own(x)
            own.weight.data.add_(1)  # as some optimisers write: by their step alone is it seen
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
            assert not torch.equal(own(x), first)

    def repeat(function):
        while time.monotonic() < end and not errors:
            try:
                function()
            except BaseException as e:
                errors.append((function.__name__, repr(e)))
            done[function.__name__] += 1

    threads = [threading.Thread(target=repeat, args=(f,)) for f in (load, load, build, build, heads, train, evaluate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert min(done.values()) > 1
