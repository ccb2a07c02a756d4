import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))  # its modules import each other by name

ARCHITECTURE = 'test_vit'
CLASSES = 4


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def smooth_image():
    """Draw a gradient with a class's shade, which JPEG and resampling keep."""

    def draw(width, height, shade):
        image = Image.linear_gradient('L').resize((width, height), 2)
        channels = [image.point(lambda v, k=k: int(v * 0.6) + 25 * ((shade + k) % CLASSES)) for k in range(3)]
        return Image.merge('RGB', channels)

    return draw


@pytest.fixture(scope='session')
def folder(tmp_path_factory, smooth_image):
    """An ImageFolder of 4 classes with 6 images for training and 3 for validation each."""
    root = tmp_path_factory.mktemp('sets') / 'gradients'
    for split, count in (('train', 6), ('validation', 3)):
        for c in range(CLASSES):
            (root / split / f'class{c}').mkdir(parents=True)
            for i in range(count):
                smooth_image(60 + 10 * i, 90 - 5 * i, c).save(root / split / f'class{c}' / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def backbone(tmp_path_factory):
    """Name and checkpoint of a small random model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'backbone.safetensors'
    save_file({k: v.contiguous() for k, v in timm.create_model(ARCHITECTURE).state_dict().items()}, path)
    return ARCHITECTURE, str(path)
