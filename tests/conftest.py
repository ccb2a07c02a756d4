import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ['HF_HUB_OFFLINE'] = '1'  # no test may reach a network
os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def root():
    """The checkout that the tests belong to."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def beetles(tmp_path_factory):
    """An ImageFolder tree of a dozen tiny images per class for training, four for validation; 12 classes."""
    from timm_zzz.demo import draw_dataset

    folder = tmp_path_factory.mktemp('beetles')
    draw_dataset(folder, {'train': 12, 'validation': 4}, seed=0)
    return folder


@pytest.fixture
def run(tmp_path):
    """Run a command line with this Python in a process of its own, away from the checkout."""

    def _run(*args, check=True, **kwargs):
        env = {**os.environ, 'OMP_NUM_THREADS': '2', **kwargs.pop('env', {})}
        result = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
            **kwargs,
        )
        if check:
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return _run


@pytest.fixture(scope='session')
def timm_scripts():
    """Folder with timm's train.py and validate.py."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip('TIMM_SCRIPTS does not name a clone of huggingface/pytorch-image-models')
    assert (Path(folder) / 'train.py').is_file(), f'TIMM_SCRIPTS={folder} has no train.py'
    return Path(folder)
