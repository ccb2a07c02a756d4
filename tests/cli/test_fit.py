"""``python -m timm_zzz fit``: what it writes starts a model as timm makes one, and timm's real train.py."""

import argparse
import csv
import os
import re
import shlex
import shutil

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.utils import ParseKwargs
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

from timm_zzz.cli.fit import TRAINING, main
from timm_zzz.data import shipped_files
from timm_zzz.fit import fit_model

NAME = 'test_resnet.zzz_r4'


@pytest.fixture(scope='module')
def colours(tmp_path_factory):
    """An ImageFolder of noise around a colour for each of 4 classes, 12 images to train and 4 to validate."""
    folder = tmp_path_factory.mktemp('colours')
    torch.manual_seed(0)
    for c, colour in enumerate(torch.rand(4, 3, 1, 1)):
        for i in range(16):
            path = folder / ('train' if i < 12 else 'validation') / f'class {c}' / f'{i:02}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image((colour + 0.2 * torch.randn(3, 64, 64)).clamp(0, 1)).save(path)
    return folder


def images_of(model, folder):
    """All images of a folder as timm prepares them for validation, and their classes."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images, targets = zip(*ImageFolder(folder, transform), strict=True)
    return torch.stack(images), torch.tensor(targets)


@pytest.fixture
def command(colours, backbone, tmp_path):
    def _command(*arguments, model=NAME, weights=('--checkpoint', backbone), data_dir=colours):
        fixed = ['--model', model, '--data-dir', data_dir, '-o', tmp_path / 'start.safetensors', '-j', 0]
        main(list(map(str, [*fixed, '--device', 'cpu', *weights, *arguments])))
        return tmp_path / 'start.safetensors'

    return _command


def refusal(command, capsys, *arguments, **kwargs):
    with pytest.raises(SystemExit) as e:
        command(*arguments, **kwargs)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith('timm_zzz: error: ') and len(error.splitlines()) == 1, error
    return error


def test_fit(command, colours, backbone, capsys):
    file = command('-b', 50, '--preset', 'frozen')
    out, _ = capsys.readouterr()
    model = timm.create_model(NAME, num_classes=4, checkpoint_path=str(file)).eval()
    x, y = images_of(model, colours / 'validation')
    with torch.no_grad():
        logits = model(x)
    top1, nll = 100 * (logits.argmax(1) == y).double().mean(), F.cross_entropy(logits, y)
    assert out.startswith(f'top-1 {top1:.2f} %, negative log-likelihood {nll:.4f} (16 images of validation)\n')
    assert top1 > 90 and nll < 0.5

    given = {k: v for k, v in load_file(backbone).items() if not k.startswith('fc.')}
    assert all(torch.equal(model.state_dict()[key], given[key]) for key in given)
    expected = timm.create_model(NAME, num_classes=4)
    expected.load_state_dict(given, strict=False)
    fit_model(expected, [images_of(model, colours / 'train')])
    with torch.no_grad():
        torch.testing.assert_close(logits.softmax(1), expected.eval()(x).softmax(1), rtol=0, atol=1e-4)
    with safe_open(file, 'pt') as f:
        assert {'format': 'pt', 'model': NAME, 'preset': 'frozen'}.items() <= f.metadata().items()


def test_one_pass_over_the_images(command, monkeypatch):
    read, real = [], timm.data.ImageDataset.__getitem__
    monkeypatch.setattr(timm.data.ImageDataset, '__getitem__', lambda self, i: read.append(i) or real(self, i))
    command('--val-split', '')
    assert sorted(read) == list(range(48))
    command('--force')
    assert len(read) == 48 + 48 + 16


def test_output_has_the_mode_of_new_files(command, monkeypatch, umask):
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda model, loader, **options: None)
    assert command('--val-split', '').stat().st_mode & 0o777 == 0o666 & ~umask


def test_options_arrive(command, monkeypatch):
    seen = {}
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda model, loader, **options: seen.update(options))
    command('--val-split', '')
    auto = dict(objective='discriminant', **dict.fromkeys(('shrinkage', 'prior_count', 'temperature'), 'auto'))
    numbers = dict(auto, max_precision='auto', sigma2=None, mean_spread=None, v_ratio=None)
    assert seen == dict(numbers, preset='finetune', device=torch.device('cpu'), amp_dtype=None)
    options = ['--objective', 'density', '--shrinkage', 0.5, '--prior-count', 7, '--temperature', 0.25]
    options += ['--max-precision', 200, '--mean-spread', 0.5, '--v-ratio', 1, '--preset', 'frozen']
    file = command(*options, '--amp', '--amp-dtype', 'bfloat16', '--val-split', '', '--img-size', 64, '--force')
    choices = dict(objective='density', shrinkage=0.5, prior_count=7.0, temperature=0.25, max_precision=200.0)
    choices.update(mean_spread=0.5, v_ratio=1.0, preset='frozen')
    assert seen == dict(choices, sigma2=None, device=torch.device('cpu'), amp_dtype=torch.bfloat16)
    with safe_open(file, 'pt') as f:
        assert {key: str(value) for key, value in choices.items()}.items() <= f.metadata().items()


def test_pretrained_path_model_kwargs_and_sigma2(command, backbone, capsys):
    options = ('--model-kwargs', 'zzz_rank=2', '--num-classes', 4, '--sigma2', 0.0625, '--val-split', '')
    file = command(*options, weights=('--pretrained-path', backbone))
    line = capsys.readouterr().out.splitlines()[-1]
    assert '--model-kwargs zzz_rank=2' in line and line.endswith(f'--initial-checkpoint {file}')
    state = load_file(file)
    assert state['fc.A'].shape[2] == 2 and torch.equal(state['conv1.0.weight'], load_file(backbone)['conv1.0.weight'])
    assert float(F.softplus(state['fc.sigma2_raw']) + 1e-4) == pytest.approx(0.0625, rel=1e-4)


def test_one_folder_of_classes(command, colours, capsys):
    command(data_dir=colours / 'train')
    out, err = capsys.readouterr()
    assert (
        'top-1' not in out
        and "--val-split ''" in out
        and f'Not evaluated: --data-dir: {colours / "train"} has no folder validation\n' in err
    )


def test_validation_classes_are_numbered_as_in_training(command, colours, tmp_path, capsys):
    data = tmp_path / 'data'
    shutil.copytree(colours, data)
    for path in sorted((data / 'validation').iterdir())[:-1]:
        shutil.rmtree(path)
    file = command('--preset', 'frozen', data_dir=data)
    model = timm.create_model(NAME, num_classes=4, checkpoint_path=str(file)).eval()
    with torch.no_grad():
        nll = F.cross_entropy(model(images_of(model, data / 'validation')[0]), torch.full((4,), 3))
    assert nll < 0.5 and f'negative log-likelihood {nll:.4f} (4 images' in capsys.readouterr().out


def test_images_of_unknown_classes_are_an_error_unless_asked_for(command, colours, tmp_path, capsys):
    data = tmp_path / 'data'
    shutil.copytree(colours, data)
    shutil.rmtree(data / 'train/class 3')
    (data / 'validation/class 4').mkdir()
    (data / 'validation/class 4/0.webp').touch()
    message = 'validation has classes that train has not: class 3 (4 images); --ignore-unknown-classes leaves them out'
    assert message in refusal(command, capsys, data_dir=data)
    command('--ignore-unknown-classes', data_dir=data)
    out, err = capsys.readouterr()
    assert '(12 images of validation)' in out
    assert [line for line in err.splitlines() if 'warning: validation' in line] == [
        'timm_zzz: warning: validation: left out 4 images of 1 class that train has not: class 3 (4 images)',
        'timm_zzz: warning: validation: class folders without images: class 4',
        'timm_zzz: warning: validation: left out files of formats that timm does not look for: .webp (1 file)',
    ]
    for i in range(3):
        shutil.rmtree(data / f'validation/class {i}')
    error = refusal(command, capsys, '--force', '--ignore-unknown-classes', data_dir=data)
    assert 'validation has classes that train has not, and no others: class 3 (4 images)' in error


def test_a_class_map_leaves_images_out_aloud(command, colours, tmp_path, capsys):
    (tmp_path / 'map.txt').write_text('class 2\nclass 0\n')
    (tmp_path / 'none.txt').write_text('x\n')
    classes = ('--class-map', tmp_path / 'map.txt')
    with pytest.raises(SystemExit) as e:
        command(*classes)
    error = 'error: validation has classes that --class-map has not: class 1 (4 images), class 3 (4 images); '
    assert e.value.code == 2 and error in capsys.readouterr().err
    command(*classes, '--ignore-unknown-classes')
    out, err = capsys.readouterr()
    for split, n in (('train', 12), ('validation', 4)):
        listed = f'class 1 ({n} images), class 3 ({n} images)'
        warning = f'{split}: left out {2 * n} images of 2 classes that --class-map has not: {listed}\n'
        assert f'timm_zzz: warning: {warning}' in err
    assert '(8 images of validation)' in out
    error = refusal(command, capsys, '--force', '--class-map', tmp_path / 'none.txt')
    assert '--class-map has none of the classes of train: class 0, class 1' in error


def test_folders_of_classes_without_images(command, colours, tmp_path, capsys):
    shutil.copytree(colours, tmp_path / 'data')
    (tmp_path / 'data/train/empty').mkdir()
    (tmp_path / 'data/train/.hidden').mkdir()
    file = command(data_dir=tmp_path / 'data')
    assert 'timm_zzz: warning: train: class folders without images: empty\n' in capsys.readouterr().err
    assert load_file(file)['fc.bias'].shape == (4,)


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(command, colours, monkeypatch, capsys):
    real = os.scandir

    def scandir(path):
        if str(path).endswith('train/class 2'):
            raise PermissionError(13, 'Permission denied', path)
        return real(path)

    monkeypatch.setattr(os, 'scandir', scandir)  # which os.walk of timm passes over in silence
    assert 'Permission denied' in refusal(command, capsys)


def test_a_validation_split_that_was_asked_for_has_to_be_there(command, colours, tmp_path, capsys):
    shutil.copytree(colours / 'train', tmp_path / 'data/train')
    error = refusal(command, capsys, '--val-split', 'validation', data_dir=tmp_path / 'data')
    assert f'--val-split: --data-dir: {tmp_path / "data"} has no folder validation, only train' in error
    command(data_dir=tmp_path / 'data')
    assert 'Not evaluated: ' in capsys.readouterr().err


def test_wrong_use(command, backbone, colours, tmp_path, capsys):
    output = tmp_path / 'start.safetensors'
    output.write_text('mine')
    (tmp_path / 'broken.pth.tar').write_text('x')
    (tmp_path / 'map.txt').write_text(''.join(f'class {i}\n' for i in range(4)))
    part = {key: value for key, value in load_file(backbone).items() if key != 'conv1.0.weight'}
    save_file(part, tmp_path / 'part.safetensors')
    assert 'exists already; give another one or --force' in refusal(command, capsys)
    force = ('--force',)
    for message, arguments in {
        'ends in .safetensors': ('-o', tmp_path / 'start.pt'),
        f'--data-dir: {colours} has no folder test, only train, validation': ('--split', 'test'),
        '--num-classes: 10, but train has 4 classes; --class-map numbers them': ('--num-classes', 10),
        '--num-classes: 3, but --class-map has 4 classes': ('--num-classes', 3, '--class-map', tmp_path / 'map.txt'),
        'model_kwargs: in_chans has an option of its own': ('--model-kwargs', 'in_chans=1'),
        '--device: warp is not available': ('--device', 'warp'),
    }.items():
        assert message in refusal(command, capsys, *force, *arguments)
    for message, name in {
        '--initial-checkpoint: no such file': 'nothing.pth.tar',
        "broken.pth.tar can't be read": 'broken.pth.tar',
        'does not fit the model: 1 tensors are missing and 0 unexpected, e.g. conv1.0.weight': 'part.safetensors',
    }.items():
        assert message in refusal(command, capsys, *force, weights=('--checkpoint', tmp_path / name))
    assert '--model: test_resnet has no ZZZ head' in refusal(command, capsys, *force, model='test_resnet')
    assert '--data-dir: no such folder' in refusal(command, capsys, *force, data_dir=tmp_path / 'nowhere')
    for message, arguments in (
        ('--pretrained: the backbone needs weights', ()),
        ('argument --max-precision: expected a number or auto, got most', ('--max-precision', 'most')),
        ('unrecognized arguments: --epoch 3; did you mean --epochs?', ('--epoch', 3)),
        ('unrecognized arguments: more', ('more',)),
        ('argument --batch-size/-b/--b', ('--batch-size', 'x')),
    ):
        assert message in refusal(command, capsys, *force, *arguments, weights=())
    assert output.read_text() == 'mine'
    command(*force, '--val-split', '')
    assert load_file(output)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--shrinkage', 2), 'shrinkage: expected a finite number from 0 to 1, got 2.0'),
        (('--prior-count', -1), 'prior_count: expected'),
        (('--temperature', 0), 'temperature: expected'),
        (('--sigma2', 'inf'), 'sigma2: expected'),
        (('--sigma2', 0.1, '--temperature', 2), 'sigma2: it sets the temperature, give only one of them'),
        (('--mean-spread', 2), 'mean_spread: expected'),
        (('--v-ratio', 'nan'), 'v_ratio: expected'),
        (('--preset', 'fine'), "argument --preset: invalid choice: 'fine'"),
        (('--lr', -1), 'lr: above 0 is needed, not -1.0'),
        (('--opt', 'adamq'), 'opt: timm knows no adamq; did you mean adam'),
        (('--opt-kwargs', 'head_lr_scale=2'), 'opt_kwargs.head_lr_scale: no option of sgd'),
        (('--sched', 'cosinus'), "sched: timm: Unknown scheduler 'cosinus'"),
        (('--workers', -1), 'workers: at least 0 is needed, not -1'),
        (('--smoothing', 'x'), 'argument --smoothing: invalid float value'),
        (('--kd-distill-type', 'x'), 'argument --kd-distill-type: invalid choice'),
        (('--head-init-scale', 0), "head_init_scale: it multiplies a ZZZ head's class means"),
        (('--model-kwargs', 'a'), 'argument --model-kwargs: expected KEY=VALUE, got a'),
        (('--model-kwargs', 'a=1j'), 'argument --model-kwargs: expected a value of a that YAML has, got 1j'),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_options_are_checked_before_the_data_is_opened(command, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr('timm_zzz.cli.fit.open_split', lambda *args, **kwargs: pytest.fail('the data was opened'))
    assert message in refusal(command, capsys, *arguments)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--device', 'warp'), '--device: warp is not available'),
        (('--resume', 'x.pth'), '--resume: train.py would put that in place of what is fitted'),
        (('--head-init-bias', 0), '--head-init-bias: train.py would put that in place of'),
        (('--input-size', 3, 5000000, 5000000), 'the model takes no images of (3, 5000000, 5000000)'),
        (('-o', '/dev/null/a.safetensors'), '/dev/null'),
        (('--train-split', 'none'), '--data-dir: '),
        (('--val-split', 'none'), '--val-split: --data-dir: '),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_everything_else_is_checked_before_the_first_pass(command, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda *args, **kwargs: pytest.fail('the pass began'))
    assert message in refusal(command, capsys, *arguments)


def test_a_class_of_the_map_without_images_is_found_before_the_pass(command, colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda *args, **kwargs: pytest.fail('the pass began'))
    (tmp_path / 'map.txt').write_text(''.join(f'class {i}\n' for i in (3, 1, 0, 2, 7)))
    assert 'train has no images of class 7' in refusal(command, capsys, '--class-map', tmp_path / 'map.txt')


RECIPE = """\
device_modules: [timm_zzz]
model: test_resnet.zzz_r4
num_classes: 4
img_size: 32
mean: [0.5, 0.4, 0.3]
model_kwargs: {zzz_v_min: 0.001, zzz_fit: DIR/train}
train_split: train
val_split: validation
opt: adamw
lr: 1.0e-3
epochs: 3
"""


def told(out):
    """The command that was printed, without the script."""
    words = shlex.split(out.splitlines()[-1])
    assert words[:2] == ['python', 'train.py']
    return words[2:]


def test_a_recipes_values_are_defaults(command, colours, backbone, tmp_path, capsys):
    config = tmp_path / 'a recipe.yaml'
    config.write_text(RECIPE)

    def start(*arguments):
        file = tmp_path / 'start.safetensors'
        fixed = ['--config', config, '--data-dir', colours, '-o', file, '--force', '--device', 'cpu', '-j', 0]
        main(list(map(str, [*fixed, '--pretrained-path', backbone, *arguments])))
        return file, told(capsys.readouterr().out)

    def agrees(file, size, mean, **options):
        kwargs = dict(num_classes=4, pretrained=True, pretrained_cfg_overlay=dict(file=str(backbone), num_classes=-1))
        model = timm.create_model(NAME, **kwargs, **options)
        model.pretrained_cfg.update(input_size=(3, size, size), mean=mean)
        x, y = images_of(model, colours / 'train')
        fit_model(model, [(x, y)], preset='finetune')
        started = timm.create_model(NAME, num_classes=4, checkpoint_path=str(file), **options)
        with torch.no_grad():
            torch.testing.assert_close(started.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)

    fixed = ['--data-dir', str(colours), '--device', 'cpu', '--workers', '0', '--pretrained-path', str(backbone)]
    file, words = start()
    agrees(file, 32, (0.5, 0.4, 0.3), zzz_v_min=0.001)
    # What is fitted already is not fitted again
    kwargs = ['--model-kwargs', 'zzz_v_min=0.001']
    assert words == ['--config', str(config), *fixed, *kwargs, '--initial-checkpoint', str(file)]
    other = ['--img-size', '48', '--mean', '0.4', '--lr', '0.0002', '--model-kwargs', 'zzz_rank=2']
    file, words = start(*other)
    agrees(file, 48, (0.4,) * 3, zzz_rank=2)
    assert words == ['--config', str(config), *fixed, *other, '--initial-checkpoint', str(file)]


@pytest.mark.parametrize(
    'change, message',
    [
        ('epoch: 3', 'recipe.yaml:12: epoch: unknown key; did you mean epochs?'),
        ('lr: [1', 'recipe.yaml:'),
        ('workers: many', 'recipe.yaml:12: workers: a whole number is needed, not many'),
        ('zzz_rank: 3', 'it belongs in model_kwargs'),
    ],
)
def test_a_wrong_recipe(command, tmp_path, change, message, capsys):
    (tmp_path / 'recipe.yaml').write_text(f'{RECIPE}{change}\n')
    assert message in refusal(command, capsys, '--config', tmp_path / 'recipe.yaml')
    assert "can't be read: No such file" in refusal(command, capsys, '--config', tmp_path / 'none.yaml')


def test_the_command_goes_on_with_what_trains(command, colours, tmp_path, monkeypatch, capsys):
    """Without a recipe by the quickstart's settings; what is given goes before."""
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda *args, **kwargs: None)
    quickstart = yaml.safe_load(shipped_files('hparams', '.yaml')['quickstart_mobilenetv2_100.zzz_r8'].read_text())
    assert {**TRAINING, 'lr': 0} == {**{key: quickstart[key] for key in TRAINING}, 'lr': 0}
    command()
    out, words = capsys.readouterr().out, []
    words = told(out)
    assert words[:4] == ['--model', NAME, '--data-dir', str(colours)]
    file = str(tmp_path / 'start.safetensors')
    start = ['--num-classes', '4', '--device-modules', 'timm_zzz']
    start += ['--opt', 'adamw', '--lr', '0.0005', '--weight-decay', '0.05', '--epochs', '20', '--warmup-epochs', '2']
    assert words[-len(start) - 2 :] == [*start, '--initial-checkpoint', file]
    assert out.splitlines()[-2].startswith('# opt, lr, weight_decay, epochs, warmup_epochs: of the quickstart recipe')
    given = ['--opt', 'sgd', '--lr-base', '0.01', '--epochs', '5', '--amp', '--opt-betas', '0.9', '0.95']
    given += ['--device-modules', 'timm_zzz', 'json', '--val-split', '', '--experiment', 'a b']
    command('--force', *given)
    assert told(capsys.readouterr().out)[8:] == [*given, '--num-classes', '4', '--initial-checkpoint', file]


def test_the_command_names_the_cpu_where_there_is_no_gpu(colours, backbone, tmp_path, monkeypatch, capsys):
    """Or train.py would stop."""
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    given = ['--model', NAME, '--data-dir', colours, '--val-split', '', '--checkpoint', backbone, '-j', 0]
    main([*map(str, given), '-o', str(tmp_path / 'start.safetensors')])
    words = told(capsys.readouterr().out)
    assert words[words.index('--device') + 1] == 'cpu'


def test_model_kwargs_come_back_as_they_were(command, monkeypatch, capsys):
    monkeypatch.setattr('timm_zzz.cli.fit.fit_model', lambda *args, **kwargs: None)
    monkeypatch.setattr('timm_zzz.cli.fit.build_model', lambda name, **kwargs: timm.create_model(NAME, num_classes=4))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)
    given = ['a=1', 'b=x', "c='1'", 'd=[1, 2]', "e={'f': None}", 'g=True', "h=it's", 'i=1e-05', 'zzz_fit=DIR/train']
    command('--val-split', '', '--model-kwargs', *given)
    words = told(capsys.readouterr().out)
    printed = parser.parse_known_args(words)[0].model_kwargs
    expected = parser.parse_args(['--model-kwargs', *given[:-1]]).model_kwargs
    assert printed == expected and {type(value) for value in expected.values()} == {int, str, list, dict, bool, float}


@pytest.mark.slow
@pytest.mark.parametrize('recipe', [(), ('--config', 'recipe.yaml')], ids=('without', 'with'))
def test_train_py_starts_from_it(timm_scripts, colours, run, tmp_path, recipe):
    """With a learning rate of next to nothing it logs the accuracy and the likelihood that were printed.

    With the one that was printed it stays as accurate as it starts.
    """
    (tmp_path / 'recipe.yaml').write_text(RECIPE)
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    save_file(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.safetensors')
    fit = ['-m', 'timm_zzz', 'fit', '--model', 'test_vit.zzz_r4', '--checkpoint', 'vit.safetensors', '-j', 0]
    printed = run(*fit, '--data-dir', colours, '-o', 'a start.safetensors', '--device', 'cpu', *recipe).stdout
    top1, nll = re.search(r'^top-1 (.*) %, negative log-likelihood (\S+)', printed, re.M).groups()
    train = ['train.py', *told(printed), '--workers', 1, '-b', 16, '--output', 'out']
    assert 'a start.safetensors' in train
    run(*train, '--epochs', 1, '--warmup-epochs', 0, '--lr', 1e-12, '--weight-decay', 0, '--experiment', 'a')
    (row,) = csv.DictReader((tmp_path / 'out/a/summary.csv').open())
    assert float(row['eval_top1']) == pytest.approx(float(top1), abs=0.01) and float(top1) > 50
    assert float(row['eval_loss']) == pytest.approx(float(nll), abs=2e-4)
    run(*train, '--epochs', 4, '--experiment', 'b')
    *_, row = csv.DictReader((tmp_path / 'out/b/summary.csv').open())
    assert float(row['eval_top1']) > float(top1) - 7 and float(row['eval_loss']) < float(nll) + 0.1
