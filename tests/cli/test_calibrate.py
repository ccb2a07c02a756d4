"""``python -m timm_zzz calibrate``: the checkpoint and the figures, against the model's own logits and scikit-learn."""

import argparse
import random
import re

import pytest
import timm
import torch
import yaml
from oracles import distinct
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss
from timm.data import create_transform
from timm.models import load_checkpoint

from timm_zzz import from_pretrained, save_pretrained
from timm_zzz.cli import push
from timm_zzz.cli.calibrate import main
from timm_zzz.cli.run import load_run
from timm_zzz.head import heads_of
from timm_zzz.metrics import calibration_temperature, ece

MODEL, SIZE, CLASSES, EACH = 'test_vit.zzz_r4', 32, 3, 15
close = torch.testing.assert_close


def new_model(name=MODEL, **kwargs):
    model = distinct(timm.create_model(name, num_classes=CLASSES, img_size=SIZE, **kwargs)).eval()
    for head in heads_of(model).values():
        with torch.no_grad():
            head.sigma2_raw.fill_(-3.0)
            head.bias.normal_()
            head.v_raw.normal_(-3.0, 1.0)
    return model


def save(folder, model, name=MODEL, **saved):
    """Write the files of a run of train.py."""
    folder.mkdir()
    kwargs = saved.pop('model_kwargs', {})
    args = dict(model=name, img_size=SIZE, crop_pct=1.0, data_dir='birds', eval_metric='top1', model_kwargs=kwargs)
    args.update(saved.pop('args', {}))
    optimizer = dict(state={}, param_groups=[])
    saved = dict(epoch=3, arch=name, state_dict=model.state_dict(), optimizer=optimizer, metric=50.0, **saved)
    torch.save(dict(saved, args=argparse.Namespace(**args)), folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    (folder / 'summary.csv').write_text('epoch,eval_top1\n3,50.0\n')


def calibrate(folder, *options, run='run'):
    main([str(folder / run), '--data-dir', str(folder / 'birds'), '-j', '0', '--device', 'cpu', *map(str, options)])


def weights(path, **kwargs):
    model = new_model(**kwargs)
    load_checkpoint(model, str(path))  # as validate.py --checkpoint and train.py --initial-checkpoint
    return model.eval()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder of images, and the images as a model gets them, with their classes, in timm's order."""
    folder, rng = tmp_path_factory.mktemp('calibrate'), random.Random(0)
    cfg = new_model().pretrained_cfg
    keys = ('mean', 'std', 'interpolation')
    transform = create_transform((3, SIZE, SIZE), crop_pct=1.0, **{key: cfg[key] for key in keys})
    images = []
    for c in range(CLASSES):
        (folder / f'birds/validation/{c}').mkdir(parents=True)
        for i in range(EACH):
            picture = Image.new('RGB', (SIZE, SIZE), tuple(rng.randrange(256) for _ in range(3)))
            picture.save(folder / f'birds/validation/{c}/{i:02}.png')
            images.append(transform(picture))
    return folder, torch.stack(images), torch.arange(CLASSES).repeat_interleave(EACH)


@pytest.fixture
def made(data, tmp_path):
    """A run beside the images."""
    torch.manual_seed(1)
    (tmp_path / 'birds').symlink_to(data[0] / 'birds')
    model = new_model()
    save(tmp_path / 'run', model)
    return tmp_path, model, *data[1:]


@torch.no_grad()
def test_figures_and_checkpoint(made, capsys):
    folder, model, images, targets = made
    calibrate(folder, '-b', 7)
    out = capsys.readouterr().out
    logits = model(images)
    temperature = calibration_temperature(logits, targets)
    assert abs(temperature - 1) > 0.1
    divided = logits.clone()
    for half, other in ((0, 1), (1, 0)):
        divided[half::2] /= calibration_temperature(logits[other::2], targets[other::2])
    pattern = r'(?m)^{} top-1 (\S+) %, negative log-likelihood (\S+), expected calibration error (\S+) %$'
    for when, expected in (('before:', logits), ('after: ', divided)):
        top1, nll, error = map(float, re.search(pattern.format(when), out).groups())
        assert top1 == pytest.approx(100 * accuracy_score(targets, logits.argmax(1)), abs=0.006)
        assert nll == pytest.approx(log_loss(targets, expected.double().softmax(1)), abs=1e-4)
        assert error == pytest.approx(100 * ece(expected, targets), abs=0.006)
    assert f'temperature {temperature:.4g}, of 45 images of validation; "after" is of each half of them' in out

    path = folder / 'run/calibrated.pth.tar'
    assert out.endswith(f'\n{path}\n')
    close(weights(path)(images), logits / temperature, rtol=1e-4, atol=1e-4)
    old, new = (load_run(path) for path in (folder / 'run', path))
    changed = {key for key, t in old.model.state_dict().items() if not torch.equal(t, new.model.state_dict()[key])}
    assert changed == {'head.sigma2_raw', 'head.v_raw', 'head.bias'}
    assert (new.args, new.epoch, new.top1, new.notes) == (old.args, old.epoch, 50.0, [])
    saved = torch.load(path, weights_only=False)
    assert sorted(saved) == ['arch', 'args', 'calibration', 'epoch', 'metric', 'percentiles', 'state_dict']
    assert path.stat().st_mode == (folder / 'run/args.yaml').stat().st_mode


@torch.no_grad()
def test_survives_saving_fusing_and_pushing(made, capsys):
    folder, model, images, _ = made
    calibrate(folder, '--output', folder / 'other/new.pth.tar')
    calibrated = load_run(folder / 'other/new.pth.tar').model.eval()
    expected = calibrated(images)
    again = from_pretrained(save_pretrained(calibrated, folder / 'saved')).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    close(again(images), expected, rtol=0, atol=0)
    close(timm.utils.reparameterize_model(again)(images), expected, rtol=1e-4, atol=1e-4)
    push.main([str(folder / 'other/new.pth.tar'), 'owner/x', '--output', str(folder / 'pushed')])
    assert 'Calibrated: the logits were divided by' in (folder / 'pushed/README.md').read_text()
    close(from_pretrained(folder / 'pushed').eval()(images), expected, rtol=0, atol=0)


@torch.no_grad()
def test_averaged_weights(made, capsys):
    """Whoever reads the file gets them, whatever it asks for, and they keep the accuracy that train.py logged."""
    folder, _, images, targets = made
    averaged = new_model()
    save(folder / 'ema', new_model(), state_dict_ema=averaged.state_dict(), args=dict(model_ema=True))
    calibrate(folder, '--use-ema', run='ema')
    logits, path = averaged(images), folder / 'ema/calibrated.pth.tar'
    expected = logits / calibration_temperature(logits, targets)
    for use_ema in (True, False):
        model = new_model()
        load_checkpoint(model, str(path), use_ema=use_ema)
        close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert load_run(path, use_ema=True).top1 == 50
    calibrate(folder, '--output', folder / 'ema/raw.pth.tar', run='ema')
    assert 'state_dict_ema' not in torch.load(folder / 'ema/raw.pth.tar', weights_only=False)


@torch.no_grad()
def test_several_heads(made):
    """The mean of their logits is divided by one temperature."""
    folder, _, images, targets = made
    kwargs = dict(depth=1, embed_dim=48, num_heads=3)
    name = 'deit_tiny_distilled_patch16_224.zzz_r4'
    model = new_model(name, **kwargs)
    save(
        folder / 'deit', model, name, model_kwargs=dict(kwargs, img_size=SIZE), args=dict(mean=[0.5] * 3, std=[0.5] * 3)
    )
    calibrate(folder, run='deit')
    images = images * images.new_tensor(new_model().pretrained_cfg['std'])[:, None, None]
    images = (images + images.new_tensor(new_model().pretrained_cfg['mean'])[:, None, None] - 0.5) / 0.5
    logits, new = model(images), weights(folder / 'deit/calibrated.pth.tar', name=name, **kwargs)
    temperature = calibration_temperature(logits, targets)
    close(new(images), logits / temperature, rtol=1e-3, atol=1e-3)
    for path, head in heads_of(new).items():
        assert head.gaussians()[3] / heads_of(model)[path].gaussians()[3] == pytest.approx(temperature, rel=1e-3)


def test_nothing_is_overwritten(made, capsys):
    folder = made[0]
    for output, message in (
        ('run/summary.csv', 'a name that ends in .pth.tar'),
        ('run/model_best.pth.tar', 'exists already'),
    ):
        with pytest.raises(SystemExit) as e:
            calibrate(folder, '--output', folder / output)
        assert e.value.code == 2 and message in capsys.readouterr().err
    before = (folder / 'run/model_best.pth.tar').read_bytes()
    calibrate(folder)
    assert (folder / 'run/model_best.pth.tar').read_bytes() == before
    with pytest.raises(SystemExit):
        calibrate(folder)
    calibrate(folder, '--force')
    assert len(list((folder / 'run').iterdir())) == 4
