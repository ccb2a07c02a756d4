"""Images in memory and their crops, against torchvision's and timm's."""

import math

import images
import pytest
import timm
import torch
from torchvision import transforms

PLAIN = torch.zeros(1), torch.ones(1)  # mean and standard deviation


def one(pixels, aspect):
    return images.Images(pixels, torch.tensor([aspect]), torch.zeros(1, dtype=torch.int64), ('a',))


def test_images_and_subsets_are_those_of_the_folder(folder, tmp_path):
    loaded = images.load(folder, 'train', 32, cache=tmp_path)
    assert loaded.classes == tuple(f'class{c}' for c in range(4))
    assert loaded.target.tolist() == [c for c in range(4) for _ in range(6)]
    assert loaded.aspect[:2].tolist() == pytest.approx([60 / 90, 70 / 85])
    again = images.load(folder, 'train', 32, cache=tmp_path)
    assert torch.equal(again.pixels, loaded.pixels) and len(list(tmp_path.iterdir())) == 1
    chosen = loaded.of_classes([3, 1])
    assert chosen.classes == ('class3', 'class1')
    assert torch.equal(chosen.pixels[chosen.target == 0], loaded.pixels[loaded.target == 3])
    few = loaded.per_class(2, seed=0)
    assert few.target.bincount().tolist() == [2] * 4
    assert not torch.equal(few.pixels, loaded.per_class(2, seed=1).pixels)
    assert loaded.per_class(100, seed=0).target.bincount().tolist() == [6] * 4


@pytest.mark.parametrize('width, height', [(96, 96), (128, 96), (96, 144)])
def test_middle_crop_is_timms(smooth_image, width, height):
    image = smooth_image(width, height, 1)
    loaded = one(transforms.functional.pil_to_tensor(image.resize((256, 256), 2))[None], width / height)
    first = torch.tensor([0])
    got = images.crop(loaded, first, images.center_boxes(loaded, first, 0.875), 84, *PLAIN)[0]
    plain = dict(interpolation='bilinear', mean=(0,) * 3, std=(1,) * 3)
    transform = timm.data.create_transform((3, 84, 84), crop_pct=0.875, **plain)
    assert (got - transform(image)).abs().max() < 0.03


def test_random_crops_have_the_area_and_aspect_of_torchvisions():
    """By mean and spread over torchvision's own draws."""
    width, height, n = 120, 80, 4000
    loaded = one(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), width / height)
    generator = torch.Generator().manual_seed(0)
    boxes = images.random_boxes(loaded, torch.zeros(n, dtype=torch.int64), (0.35, 1.0), generator)
    half_w, half_h = boxes[:, 2].abs(), boxes[:, 3]
    draw, image = transforms.RandomResizedCrop.get_params, torch.zeros(3, height, width)
    reference = torch.tensor([[float(v) for v in draw(image, [0.35, 1.0], [3 / 4, 4 / 3])] for _ in range(n)])
    area, expected_area = half_w * half_h, reference[:, 2] * reference[:, 3] / (width * height)
    ratio, expected_ratio = half_w * width / (half_h * height), reference[:, 3] / reference[:, 2]
    for got, expected in ((area, expected_area), (ratio.log(), expected_ratio.log())):
        error = expected.std() / math.sqrt(n)
        assert abs(got.mean() - expected.mean()) < 5 * error + 0.003  # torchvision crops whole pixels
        assert float(got.std()) == pytest.approx(float(expected.std()), rel=0.05)
    assert (boxes[:, 0].abs() + half_w <= 1 + 1e-5).all() and (boxes[:, 1].abs() + half_h <= 1 + 1e-5).all()
    assert 0.45 < (boxes[:, 2] < 0).float().mean() < 0.55


def test_mirrored_crop(folder):
    loaded, box = images.load(folder, 'train', 32), torch.tensor([[0.1, -0.2, 0.5, 0.6]])
    mirrored = box * torch.tensor([1.0, 1.0, -1.0, 1.0])
    a, b = (images.crop(loaded, torch.tensor([3]), each, 16, *PLAIN) for each in (box, mirrored))
    torch.testing.assert_close(a.flip(3), b)
    assert (a - b).abs().max() > 0  # so that the comparison means something


def test_an_epoch_has_every_image():
    index = torch.cat(images.batches(10, 4, torch.Generator().manual_seed(0)))
    assert len(index) == 12 and set(index.tolist()) == set(range(10))
    few = images.batches(3, 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in few] == [8] and set(few[0].tolist()) == {0, 1, 2}
