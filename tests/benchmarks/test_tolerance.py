"""Corruptions against PIL, SciPy and by hand; runs of tolerance.py and nuisance.py on tiny sets, and their tables."""

import argparse
import functools
import json
import math
import statistics

import corruptions
import images
import nuisance
import numpy as np
import pytest
import subspaces
import tolerance
import tolerance_table
import torch
from corruptions import CORRUPTIONS, corrupt
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from timm_zzz.cli import demo
from timm_zzz.fit import fit_head
from timm_zzz.scores import ClassGaussians, class_gaussians_of

SIZE = 80
HEADS = ('linear:rows=zero', 'zzz_r2:fit=finetune')


@pytest.fixture(scope='module')
def pixels(smooth_image):
    """Eight images of two classes with colours and a texture."""
    torch.manual_seed(0)
    smooth = [tv.pil_to_tensor(smooth_image(SIZE, SIZE, i // 4)) for i in range(8)]
    texture = tv.gaussian_blur(torch.rand(8, 3, SIZE, SIZE), [5, 5]) - 0.5
    return (torch.stack(smooth) + 200 * texture).clamp(0, 255).to(torch.uint8)


def changed(before, after):
    return (after != before).any(1)


def amount(name, strength):
    return CORRUPTIONS[name][1][strength - 1]


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_strengths_grow_and_draws_are_fixed(name, pixels):
    state = torch.get_rng_state()
    found = [corrupt(pixels, name, strength) for strength in (1, 3, 5)]
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing had been drawn
    distances = [(each.float() - pixels.float()).abs().mean().item() for each in found]
    assert 0 < distances[0] < distances[1] < distances[2]
    torch.rand(1)
    assert torch.equal(corrupt(pixels, name, 3), found[1])
    assert found[0].shape == pixels.shape and found[0].dtype == torch.uint8


@pytest.mark.parametrize(
    'name, changes',
    [
        ('brightness', lambda image, by: [tv.adjust_brightness(image, 1 + sign * by) for sign in (-1, 1)]),
        ('contrast', lambda image, by: [tv.adjust_contrast(image, 1 - by)]),
        ('saturation', lambda image, by: [tv.adjust_saturation(image, 1 - by)]),
        ('hue', lambda image, by: [tv.adjust_hue(image, sign * by) for sign in (-1, 1)]),
    ],
)
def test_colours_are_pils(name, changes, pixels):
    """PIL's own enhancement of each image; either sign where it is drawn, and both occur."""
    found, signs = corrupt(pixels, name, 3), set()
    for before, after in zip(pixels, found, strict=True):
        expected = changes(tv.to_pil_image(before), amount(name, 3))
        errors = [(tv.pil_to_tensor(image).float() - after.float()).abs().mean().item() for image in expected]
        assert min(errors) < 2.5
        signs.add(errors.index(min(errors)))
    assert len(signs) == len(expected)


def test_jpeg_is_pils(pixels, tmp_path):
    found = corrupt(pixels, 'JPEG', 4)
    for before, after in zip(pixels, found, strict=True):
        tv.to_pil_image(before).save(tmp_path / 'image.jpg', quality=int(amount('JPEG', 4)))
        with Image.open(tmp_path / 'image.jpg') as image:
            assert (tv.pil_to_tensor(image).float() - after.float()).abs().mean() < 1.5


def test_patches_cover_a_square_of_their_area(pixels):
    others = pixels.roll(4, 0)
    for name, fill in (('grey patch', torch.full_like(pixels, 127)), ('patch of another image', others)):
        found = corrupt(pixels, name, 3)
        places = set()
        for before, after, its in zip(pixels, found, fill, strict=True):
            covered = changed(before[None], after[None])[0]
            rows, columns = (covered.any(dim).nonzero()[:, 0] for dim in (1, 0))
            side = round(math.sqrt(amount(name, 3)) * SIZE)
            assert abs(len(rows) - side) <= 1 and abs(len(columns) - side) <= 1  # an edge may be alike in both
            assert torch.equal(after[:, covered], its[:, covered])
            places.add((int(rows[0]), int(columns[0])))
        assert len(places) > 4


def test_borders_keep_the_middle(pixels):
    edge = round(amount('border of another image', 5) * SIZE)
    middle = np.s_[:, :, edge:-edge, edge:-edge]
    expected = pixels.roll(4, 0).clone()
    expected[middle] = pixels[middle]
    assert torch.equal(corrupt(pixels, 'border of another image', 5), expected)
    found = corrupt(pixels, 'blurred border', 5)
    assert torch.equal(found[middle], pixels[middle])
    textures = [each[:, :, :edge].float().diff().abs().mean() for each in (found, pixels)]
    assert textures[0] < 0.5 * textures[1]


def test_blur_is_scipys_and_noise_has_its_deviation(pixels):
    ndimage = pytest.importorskip('scipy.ndimage')
    found, sigma = corrupt(pixels, 'blur', 5), amount('blur', 5) * SIZE
    expected = ndimage.gaussian_filter(pixels.numpy().astype(float), sigma, axes=(2, 3), mode='mirror')
    assert np.abs(expected - found.numpy()).mean() < 2
    grey = torch.full((8, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    noise = corrupt(grey, 'noise', 2).float() - 128
    assert noise.std().item() == pytest.approx(255 * amount('noise', 2), rel=0.02)


def test_rotation_and_crop_are_pils(pixels):
    angle, side = amount('rotation', 4), round(amount('crop', 4) * SIZE)
    high = SIZE - side
    corners = [(x, y) for x in (0, high) for y in (0, high)] + [(high // 2, high // 2)]
    for name in ('rotation', 'crop'):
        drawn = set()
        for before, after in zip(pixels, corrupt(pixels, name, 4), strict=True):
            if name == 'rotation':
                wide = np.pad(before.permute(1, 2, 0).numpy(), [(SIZE, SIZE)] * 2 + [(0, 0)], mode='reflect')
                turned = [Image.fromarray(wide).rotate(sign * angle, Image.Resampling.BILINEAR) for sign in (-1, 1)]
                expected = [image.crop((SIZE, SIZE, 2 * SIZE, 2 * SIZE)) for image in turned]
            else:
                image = tv.to_pil_image(before)
                parts = [image.crop((x, y, x + side, y + side)) for x, y in corners]
                expected = [part.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for part in parts]
            errors = [(tv.pil_to_tensor(image).float() - after.float()).abs().mean().item() for image in expected]
            assert min(errors) < 3 < 2 * statistics.median(errors)
            drawn.add(errors.index(min(errors)))
        assert len(drawn) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('name', CORRUPTIONS)
def test_a_gpu_corrupts_alike(name, pixels):
    found, expected = (corrupt(pixels.to(device), name, 3).cpu().float() for device in ('cuda', 'cpu'))
    if name == 'noise':  # drawn on the device
        assert (found - expected).mean().abs() < 2
    else:
        assert (found - expected).abs().mean() < 1


def test_middle_crops_are_what_a_model_is_evaluated_on(folder):
    loaded = images.load(folder, 'validation', 64)
    index = torch.arange(len(loaded))
    boxes = images.center_boxes(loaded, index, 0.9)
    expected = images.crop(loaded, index, boxes, 32, torch.zeros(1), torch.ones(1))
    found = corruptions.middle_crops(loaded, 32, 0.9)
    assert found.shape == (12, 3, 32, 32) and (found / 255 - expected).abs().max() < 1 / 255


def test_shares_of_known_subspaces():
    """Class 0 has the axes 1 and 2, class 1 has 2 and 3, class 2 has 5 and 6; all means lie on axis 0."""
    d = 8
    mu = torch.eye(d)[[0, 0, 0]]
    basis = torch.stack([torch.eye(d)[:, axes] for axes in ((1, 2), (2, 3), (5, 6))])
    v = torch.tensor([[1.0, 3.0], [1.0, 1 / 3], [1.0, 1.0]])  # v / (v + 1) is 1/2 and 3/4, 1/2 and 1/4
    classes = ClassGaussians(mu, basis, v, torch.tensor(1.0), torch.zeros(3))
    delta = torch.zeros(2, d)
    delta[0, [0, 1, 2, 4]] = torch.tensor(
        [7.0, 3.0, 1.0, 2.0]
    )  # of class 0: 9 + 1 of 14 inside; 1 and 0 in the others'
    delta[1, [3, 5]] = torch.tensor([1.0, 1.0])  # of class 1: 1 of 2; 0 and 1
    found = subspaces.shares(delta, torch.tensor([0, 1]), classes)
    expected = dict(own=100 * 11 / 16, other=100 * (1 + 1) / 2 / 16, random=100 * 2 / d, variance=8.0)
    expected.update(tolerated=100 * (9 / 2 + 1 * 3 / 4 + 1 / 4) / 16, tolerated_random=100 * (5 / 4 + 3 / 4) / 2 / d)
    assert found == pytest.approx(expected)
    rotation = torch.linalg.qr(torch.randn(d, d))[0]
    turned = classes._replace(mu=mu @ rotation, basis=rotation.T @ basis)
    assert subspaces.shares(delta @ rotation, torch.tensor([0, 1]), turned) == pytest.approx(expected, rel=1e-4)


def test_a_random_subspace_holds_its_part_and_a_fitted_one_more():
    torch.manual_seed(0)
    y = torch.arange(600) % 3
    axes = torch.randn(3, 2, 30)
    x = (
        5 * torch.randn(3, 30)[y]
        + torch.einsum('nr,nrd->nd', torch.randn(600, 2), axes[y])
        + 0.3 * torch.randn(600, 30)
    )
    classes = class_gaussians_of(fit_head(x, y, rank=2, num_classes=3))
    x = torch.nn.functional.normalize(x, dim=1)
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    fitted = subspaces.shares(x - means[y], y, classes)
    assert fitted['own'] > 3 * fitted['other'] and fitted['own'] > 60
    drawn = torch.linalg.qr(torch.randn(200, 3, 30, 2))[0]
    own = [subspaces.shares(x - means[y], y, classes._replace(basis=basis))['own'] for basis in drawn]
    assert statistics.fmean(own) == pytest.approx(fitted['random'], rel=0.15)


def inner(head, shots, lr, top1=50.0, data='gradients', backbone='test_vit'):
    found = dict(head=head, shots=shots, lr=lr, head_lr=5.0, top1=top1, data=data, backbone=backbone)
    return dict(found, seed=0, split='inner')


@pytest.fixture(scope='module')
def run(folder, backbone, tmp_path_factory):
    """Run the command with more arguments and return the rows of its results file."""
    rates = tmp_path_factory.mktemp('rates') / 'accuracy.jsonl'
    rows = [inner(head, 0, lr, top1) for head in HEADS for lr, top1 in ((1e-4, 50.0), (2e-3, 60.0))]
    rates.write_text(''.join(json.dumps(row) + '\n' for row in rows))

    def run(results, *arguments):
        fixed = ('--data', folder, '--backbone', *backbone, 32, '--heads', *HEADS, '--results', results)
        fixed += ('--rates', rates, '--epochs', 2, '--min-steps', 30, '--device', 'cpu')
        tolerance.main([str(a) for a in (*fixed, *arguments)])
        return [json.loads(line) for line in results.read_text().splitlines()]

    return run


def test_run(run, tmp_path, monkeypatch, capsys):
    """A corruption that fails is named, and the others stay; more of one hurts more; nothing is repeated."""

    def broken(x, other, by):
        raise RuntimeError('out of order')

    monkeypatch.setitem(CORRUPTIONS, 'broken', (broken, (1, 2, 3, 4, 5)))
    path = tmp_path / 'tolerance.jsonl'
    rows = run(path, '--seeds', 0)
    assert [(row['head'], row['lr'], row['split']) for row in rows] == [(head, 2e-3, 'validation') for head in HEADS]
    for row in rows:
        assert row['failed'] == {'broken': 'RuntimeError: out of order'}
        assert row['corruptions'].keys() == CORRUPTIONS.keys() - {'broken'}
        assert row['top1'] > 75
        for figures in row['corruptions'].values():
            assert figures.keys() == {'top1', 'nll', 'nll_t'} and {len(each) for each in figures.values()} == {5}
        by_strength = [
            [row['corruptions'][name][key][i] for name in row['corruptions']] for key in ('nll', 'top1') for i in (0, 4)
        ]
        weak, strong, right, wrong = map(statistics.fmean, by_strength)
        assert max(row['nll'], weak) < strong and right > wrong
        assert 0.1 < row['corruptions']['blur']['nll_t'][0] / row['nll_t'] < 10
    assert 'within' not in rows[0] and rows[1]['within']['random'] == pytest.approx(100 * 2 / 64)
    before = path.read_text()
    more = run(path, '--seeds', 0, 1)
    assert path.read_text().startswith(before) and [row['seed'] for row in more] == [0, 0, 1, 1]
    capsys.readouterr()
    tolerance_table.main([str(path), '--strengths'])
    table = capsys.readouterr().out
    assert '### All images, 2 epochs, label smoothing 0.1; 2 runs a head' in table
    assert table.count('| blur | ') == 4  # in each comparison, and twice by strengths


def test_heads_take_their_own_rates_for_that_many_images(folder, tmp_path, capsys):
    """A head may have more pairs of rates than another; a backbone without rates of a head is left out."""
    rows = [inner(HEADS[0], 0, lr, top1) for lr, top1 in ((1, 50.0), (2, 60.0))]
    rows += [inner(HEADS[1], 0, lr, top1) for lr, top1 in ((1, 70.0), (2, 60.0), (3, 50.0))]
    rows += [inner(head, 5, 4) for head in HEADS] + [inner(HEADS[0], 0, 1, backbone='test_resnet')]
    fixed = dict(data=[folder], heads=HEADS, seeds=[0, 1], at=None, hold_out_every=0, epochs=20, smoothing=0.1)
    backbones = [(name, '', 32) for name in ('test_vit', 'test_resnet')]
    found = tolerance.jobs(argparse.Namespace(**fixed, shots=[0, 5], backbone=backbones), rows)
    keys = ('seed', 'shots', 'head', 'lr', 'backbone')
    own = [(0, HEADS[0], 2), (0, HEADS[1], 1), (5, HEADS[0], 4), (5, HEADS[1], 4)]
    expected = [(seed, *each, 'test_vit') for seed in (0, 1) for each in own]
    assert [tuple(job[k] for k in keys) for job in found] == expected
    message = capsys.readouterr().err
    assert f'test_resnet, all images: no learning rates of {HEADS[1]}\n' in message
    assert f'test_resnet, 5 images a class: no learning rates of {", ".join(HEADS)}\n' in message


def row(head, seed, top1, corrupted, data='birds'):
    found = {name: dict(top1=corrupted, nll=[1.0] * 5, nll_t=[0.5] * 5) for name in ('blur', 'hue')}
    job = dict(data=data, backbone='net', size=32, head=head, seed=seed, shots=0, hold_out_every=0)
    return dict(job, epochs=20, smoothing=0.1, top1=top1, nll=0.9, nll_t=0.4, corruptions=found)


def test_table():
    """Differences between runs of the same set and seed, and what is left of all corruptions less clean images."""
    base = 'linear:rows=zero'
    rows = [row(base, seed, 80.0, [70.0, 60, 50, 40, 30]) for seed in (0, 1)]
    rows += [row('zzz_r8', 0, 81.0, [71.0, 61, 51, 41, 31]), row('zzz_r8', 1, 82.0, [75.0, 65, 55, 45, 35])]
    rows += [row('zzz_r8', 0, 99.0, [99.0] * 5, data='cars')]  # which the base has not
    rows[0]['corruptions']['rare'] = rows[0]['corruptions']['blur']
    lines = tolerance_table.tables(rows).splitlines()
    assert lines[0] == '### All images, 20 epochs, label smoothing 0.1; 3 runs a head'
    assert lines[2:9] == [
        f'| top-1, % | {base} | zzz_r8, difference |',
        '|---|---|---|',
        '| clean | 80.0 ± 0.0 | +1.50 ± 0.50 |',
        '| blur | 50.0 ± 0.0 | +3.00 ± 2.00 |',
        '| hue | 50.0 ± 0.0 | +3.00 ± 2.00 |',
        '| all corruptions | 50.0 ± 0.0 | +3.00 ± 2.00 |',
        '| all corruptions, less clean | -30.0 ± 0.0 | +1.50 ± 1.50 |',
    ]


def test_drawn_beetles_differ_in_one_thing():
    """The corners show the background alone, the middle pixel the beetle."""
    deviation = {}
    for varied in ('color', 'background', 'noise', 'class'):
        drawn = nuisance.draw(varied, '0', settings=1, draws=4).float()
        assert drawn.shape == ((12, 4, 1) if varied == 'class' else (12, 1, 4)) + (3, 64, 64)
        dim = 0 if varied == 'class' else 2
        place = drawn.flatten(-2)[..., [0, 63, 64 * 32 + 30]]
        edge, middle = (place[..., k].std(dim).mean().item() for k in ([0, 1], 2))
        deviation[varied] = edge, middle
    still = 8  # what noise makes of fixed pixels at most
    assert deviation['color'][0] < still < deviation['color'][1]
    assert deviation['background'][1] < still < deviation['background'][0]
    assert max(deviation['class'][:1]) < still and max(deviation['noise']) < 2 * still


def test_deviations_of_draws_and_of_classes():
    x = torch.randn(3, 2, 4, 5)
    found = nuisance.deviations(x)
    torch.testing.assert_close(found[1, 6], x[1, 1, 2] - x[1, 1].mean(0))
    x = torch.randn(3, 2, 1, 5)
    found = nuisance.deviations(x)
    assert found.shape == (3, 4, 5)
    expected = [x[k, s, 0] - x[1, s, 0] for s in (0, 1) for k in (0, 2)]
    assert sorted(found[1].tolist()) == sorted(torch.stack(expected).tolist())


def test_nuisance_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nuisance, 'draw', functools.partial(nuisance.draw, settings=1, draws=2))
    monkeypatch.setattr(demo, 'COARSE_IMAGES', 4)
    path = tmp_path / 'nuisance.jsonl'
    options = [f'--results={path}', '--images=3', '--rank=4', '--coarse-epochs=1', '--epochs=1']
    nuisance.main([*options, '--seeds', '0'])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row['head'] for row in rows] == list(nuisance.HEADS)
    for each in rows:
        for varied in nuisance.VARIED:
            assert 0 <= each[varied]['own'] <= 100 and each[varied]['random'] == pytest.approx(
                400 / each['width'], rel=1e-4
            )
    before = path.read_text()
    nuisance.main([*options, '--seeds', '0'])
    assert path.read_text() == before
    first, second = capsys.readouterr().out.split('| images a class |')[1:]
    assert first == second and first.count('| 3 | ZZZ, fitted') == 3 * len(nuisance.VARIED)
