"""The recipes in hparams/: models, equality of ZZZ file and twin, commands, two steps of train.py; their page."""

import argparse
import csv
import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import yaml
from PIL import Image
from timm.data import resolve_data_config
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

from timm_zzz import ZZZHead
from timm_zzz.cli.check_hparams import check
from timm_zzz.models._timm import input_config

FOLDER = Path(__file__).resolve().parents[2] / 'hparams'
ALL = sorted(path.stem for path in FOLDER.glob('*.yaml'))
QUICKSTART = 'quickstart_mobilenetv2_100.zzz_r8'  # of which the README's command makes the twin
RECIPES = [name for name in ALL if name != QUICKSTART]
ZZZ = '.zzz_r8'
PAIRS = [name.removesuffix(ZZZ) for name in RECIPES if name.endswith(ZZZ)]

# Classes by data set, from the data sets' papers
CLASSES = dict(cub200=200, cars196=196, aircraft100=100, dogs120=120, nabirds555=555, inat2018=8142, inat2021mini=10000)
CLASSES.update(flowers102=102, pets37=37, food101=101, imagenet1k=1000)
# Weights of each backbone
BACKBONES = {
    'vit_base_patch16_224': 'augreg_in21k',
    'vit_base_patch14_dinov2': 'lvd142m',
    'convnext_base': 'fb_in22k',
    'swin_base_patch4_window12_384': 'ms_in22k',
    'resnet50': 'a1_in1k',
}


def load(name):
    return yaml.safe_load((FOLDER / f'{name}.yaml').read_text())


def comment(name):
    """The comment head as a dictionary of its entries, without line breaks."""
    lines = (FOLDER / f'{name}.yaml').read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in lines)
    text = '\n'.join(lines[1:])
    entries = re.findall(r'^# (\w+): +(.*(?:\n#     +.*)*)', text, re.M)
    return {key: re.sub(r'\s*\\?\n# +', ' ', value) for key, value in entries}


@functools.cache
def create(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def build(recipe):
    kwargs = recipe.get('model_kwargs', {})
    return create(recipe['model'], num_classes=recipe['num_classes'], drop_path_rate=recipe.get('drop_path'), **kwargs)


def data_config(recipe, **kwargs):
    cfg = timm.get_pretrained_cfg(recipe['model']).to_dict()
    return resolve_data_config(recipe, pretrained_cfg=cfg, **kwargs)


def test_every_data_set_and_backbone_has_a_pair():
    assert sorted(RECIPES) == sorted([*PAIRS, *(pair + ZZZ for pair in PAIRS)])
    split = [pair.partition('_')[::2] for pair in PAIRS]
    assert {data for data, _ in split} == set(CLASSES) and {backbone for _, backbone in split} == set(BACKBONES)


@pytest.mark.parametrize('name', RECIPES)
def test_model(name):
    recipe = load(name)
    data, _, backbone = name.removesuffix(ZZZ).partition('_')
    base = f'{backbone}.{BACKBONES[backbone]}'
    assert recipe['model'] == base + (ZZZ if name.endswith(ZZZ) else '')
    assert base in timm.list_pretrained() and recipe['pretrained'] is True
    assert recipe['num_classes'] == CLASSES[data]
    model = build(recipe).eval()
    logits = model(torch.empty(2, *data_config(recipe)['input_size'], device='meta'))
    assert logits.shape == (2, CLASSES[data])
    head = model.get_classifier()
    assert isinstance(head, ZZZHead) == name.endswith(ZZZ)
    assert not isinstance(head, ZZZHead) or head.A.shape == (CLASSES[data], model.num_features, 8)


@pytest.mark.parametrize('name', ALL)
def test_values_have_their_types(name):
    """YAML reads 1e-5 as a word, which timm's optimisers do not take."""
    for text in re.findall('"(.*?)"', json.dumps(load(name))):
        with pytest.raises(ValueError):
            float(text)


@pytest.mark.parametrize('pair', PAIRS)
def test_twins_agree(pair):
    zzz, linear = load(pair + ZZZ), load(pair)
    assert linear.pop('head_init_scale') == 0.0  # the strongest start of a linear head
    assert zzz == {**linear, 'device_modules': ['timm_zzz'], 'model': linear['model'] + ZZZ}
    comments = comment(pair + ZZZ), comment(pair)
    for key in ('Data', 'Settings', 'Expected'):
        assert comments[0][key] == comments[1][key]
    assert [c['Twin'].partition('.yaml')[0] for c in comments] == [pair, pair + ZZZ]


def rates(recipe):
    """Learning rates early, half way and late in the run, and weight decay, by parameter, as train.py sets them."""
    settings = argparse.Namespace(**recipe)
    model = build(recipe)
    options = {key: recipe[key] for key in ('opt', 'lr', 'weight_decay', 'layer_decay')}
    options.update(recipe.get('opt_kwargs', {}), layer_decay_min_scale=recipe.get('layer_decay_min_scale', 0.0))
    optimizer = timm.optim.create_optimizer_v2(model, **options)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(settings), updates_per_epoch=10)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: [] for name in names.values()}
    for update in (1, 5 * settings.epochs, 9 * settings.epochs):
        scheduler.step_update(update)
        for group in optimizer.param_groups:
            for p in group['params']:
                found[names[id(p)]] += [group['lr'], group['weight_decay']]
    return found, [f'{path}.' for path, m in model.named_modules() if m is model.get_classifier()][0]


@pytest.mark.parametrize('pair', PAIRS)
def test_twins_learn_alike(pair):
    (zzz, head), (linear, same_head) = rates(load(pair + ZZZ)), rates(load(pair))
    assert head == same_head
    for name, values in linear.items():
        assert zzz[name] == pytest.approx(values, rel=1e-9), name
    added = zzz.keys() - linear.keys()
    assert added == {head + name for name in ('A', 'v_raw', 'sigma2_raw')}
    for name in added:  # the matrix as the rows, the others without decay
        expected = list(linear[head + 'weight'])
        expected[1::2] = expected[1::2] if name == head + 'A' else [0.0] * 3
        assert zzz[name] == pytest.approx(expected, rel=1e-9), name
    assert max(values[2] for values in linear.values()) == linear[head + 'weight'][2]
    assert min(values[0] for values in linear.values()) > 0


@pytest.mark.parametrize('layer_decay', [0.02, None])
def test_adamw_is_zzzadamw_without_options(layer_decay):
    """Also of the head's parameters: v_raw, sigma2_raw and bias without weight decay, weight and A with it."""
    recipe = {**load('cub200_vit_base_patch16_224.zzz_r8'), 'model': 'test_vit.zzz_r4', 'layer_decay': layer_decay}
    (adamw, head), (zzzadamw, _) = rates({**recipe, 'opt': 'adamw'}), rates({**recipe, 'opt': 'zzzadamw'})
    assert adamw == zzzadamw
    decayed = {name.removeprefix(head): values[1] for name, values in adamw.items() if name.startswith(head)}
    assert decayed == {'weight': 0.05, 'A': 0.05, 'bias': 0.0, 'v_raw': 0.0, 'sigma2_raw': 0.0}


def validate_parser():
    """Parse the options of validate.py that the recipes use."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ('model', 'data-dir', 'dataset', 'split', 'checkpoint', 'amp-dtype'):
        parser.add_argument(f'--{name}', default='')
    for name, kind in (('num-classes', int), ('img-size', int), ('crop-pct', float)):
        parser.add_argument(f'--{name}', type=kind)
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    return parser


@pytest.mark.parametrize('name', RECIPES)
def test_comment_gives_the_commands(name):
    recipe, entries = load(name), comment(name)
    assert {'Data', 'Settings', 'Expected', 'Cost'} < entries.keys()
    assert ('Fit' in entries) == name.endswith(ZZZ)
    assert entries['Train'] == f'python train.py --config hparams/{name}.yaml --data-dir DIR --experiment {name}'
    plugin = '-m timm_zzz ' if name.endswith(ZZZ) else ''
    command, _, options = entries['Validate'].partition('.py ')
    assert command == f'python {plugin}validate'
    args = validate_parser().parse_args(shlex.split(options))
    assert (args.model, args.num_classes) == (recipe['model'], recipe['num_classes'])
    assert (args.dataset, args.split) == (recipe.get('dataset', ''), recipe['val_split'])
    assert (args.amp, args.amp_dtype) == (recipe['amp'], recipe['amp_dtype'])
    assert args.model_kwargs == recipe.get('model_kwargs', {})
    assert args.checkpoint == f'output/train/{name}/last.pth.tar'
    # validate.py prefers a model's size for tests, train.py has the one for training
    assert data_config(dict(vars(args)), use_test_size=True) == data_config(recipe)


@pytest.mark.parametrize('name', [name for name in ALL if name.endswith(ZZZ)])
def test_comment_gives_the_command_that_starts_from_the_data(name, tmp_path, monkeypatch):
    """It fits to the images of training as training prepares them, and keeps what the recipe asks of the model."""
    recipe, entries = load(name), comment(name)
    command, _, pairs = entries['Fit'].partition(' --model-kwargs ')
    assert command in (f'{entries["Train"]}.fit', entries['Train'].partition(' without')[0])
    parser = argparse.ArgumentParser()
    parser.add_argument('model_kwargs', nargs='*', action=ParseKwargs)
    model_kwargs = parser.parse_args(shlex.split(pairs)).model_kwargs
    fit = model_kwargs.pop('zzz_fit')
    if recipe.get('dataset'):
        assert fit == dict(dataset=recipe['dataset'], data_dir='DIR', split=recipe['train_split'])
    else:
        assert fit == f'DIR/{recipe["train_split"]}'
    assert model_kwargs.items() >= recipe.get('model_kwargs', {}).items()
    with torch.device('meta'):
        model = timm.create_model(recipe['model'], num_classes=5, **model_kwargs)
    assert input_config(model) == data_config(recipe)

    monkeypatch.chdir(tmp_path)
    for split in (recipe['train_split'], recipe['val_split']) if 'dataset' not in recipe else ():
        for index in range(recipe.get('num_classes', 1)):
            (tmp_path / 'DIR' / split / str(index)).mkdir(parents=True)
            (tmp_path / 'DIR' / split / str(index) / '0.jpg').touch()
    given = dict(data_dir='DIR', model_kwargs={**model_kwargs, 'zzz_fit': fit})
    found = check(FOLDER / f'{name}.yaml', build_model=False, given=given)
    assert found == []


# The page about them


@pytest.fixture(scope='module')
def page(root):
    return (root / 'docs' / 'recipes.md').read_text()


def test_folders_from_lists(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        'fgvc-aircraft-2013b/data/images_variant_trainval.txt': '11 F/A-18\n12 Gulfstream IV\n',
        'fgvc-aircraft-2013b/data/images_variant_test.txt': '13 F/A-18\n',
        'nabirds/images.txt': 'a-1 0817/a1.jpg\nb-2 0817/b2.jpg\n',
        'nabirds/image_class_labels.txt': 'a-1 817\nb-2 817\n',
        'nabirds/train_test_split.txt': 'a-1 1\nb-2 0\n',
        **{f'fgvc-aircraft-2013b/data/images/{number}.jpg': str(number) for number in (11, 12, 13)},
        **{f'nabirds/images/0817/{name}.jpg': name for name in ('a1', 'b2')},
    }
    for path, text in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    exec(compile(re.search(r'```python\n(from pathlib.*?)```', page, re.S)[1], 'recipes.md', 'exec'), {})
    expected = ['train/F-A-18/11', 'train/Gulfstream IV/12', 'test/F-A-18/13', 'train/817/a1', 'test/817/b2']
    made = {str(path.relative_to('DIR').with_suffix('')): path.read_text() for path in Path('DIR').rglob('*.jpg')}
    assert made == {path: path.rpartition('/')[2] for path in expected}


@pytest.mark.slow
def test_sweep(page, timm_scripts, images, tmp_path):
    """The page's loop over two configurations of a tiny model."""
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    recipe = load('cub200_vit_base_patch16_224.zzz_r8')
    here = dict(model='test_vit.zzz_r8', pretrained=False, num_classes=2, dataset='', val_split='validation')
    here.update(batch_size=2, workers=1, epochs=1, warmup_epochs=0, device='cpu')
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump({**recipe, **here}))
    (loop,) = (code for code in re.findall(r'```sh\n(.*?)```', page, re.S) if 'for rank' in code)
    for there, mine in (
        ('in 4 8 16;', 'in 4 16;'),
        ('in 0.5 1.0 2.0;', 'in 2.0;'),
        ('hparams/cub200_vit_base_patch16_224.zzz_r8.yaml', 'recipe.yaml'),
        ('vit_base_patch16_224.augreg_in21k', 'test_vit'),
        ('DIR', str(images)),
        ('python train.py', f'{shlex.quote(sys.executable)} train.py'),
    ):
        assert loop.count(there) == 1
        loop = loop.replace(there, mine)
    out = subprocess.run(['bash', '-euc', loop], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    assert re.findall(r'^==> output/train/(.*)/summary.csv', out.stdout, re.M) == ['rank16-scale2.0', 'rank4-scale2.0']
    for rank in (4, 16):
        checkpoint = torch.load(tmp_path / f'output/train/rank{rank}-scale2.0/last.pth.tar', weights_only=False)
        assert checkpoint['state_dict']['head.A'].shape[-1] == rank
        assert checkpoint['args'].opt_kwargs == {'head_lr_scale': 2.0}


# Through the real scripts


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images of noise in two classes for training, four for validation."""
    folder = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(0)
    for split in ('train', 'validation'):
        for index in range(4):
            path = folder / split / f'class{index % 2}' / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (96, 128, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL)
def test_two_steps_of_train_and_validate(timm_scripts, images, run, tmp_path, name):
    """With random weights, on images of noise in batches of 2, without warm-up, so that both steps change weights."""
    for script in ('train.py', 'validate.py'):  # away from the clone, whose timm they would import
        shutil.copy(timm_scripts / script, tmp_path)
    recipe = load(name)
    here = dict(pretrained=False, dataset='', train_split='train', val_split='validation')
    here['num_classes'] = recipe.get('num_classes', 5)  # the quickstart has it from the command line
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump({**recipe, **here}))
    options = ['--data-dir', images, '--workers', 1, '--device', 'cpu']
    train = ['train.py', '--config', 'recipe.yaml', '--batch-size', 2, '--epochs', 1, '--warmup-epochs', 0]
    threads = dict(OMP_NUM_THREADS='1')
    run(*train, '--grad-accum-steps', 1, '--output', 'out', '--experiment', 'a', *options, env=threads)
    (row,) = csv.DictReader((tmp_path / 'out/a/summary.csv').open())
    assert math.isfinite(float(row['train_loss'])) and math.isfinite(float(row['eval_loss']))
    checkpoint = torch.load(tmp_path / 'out/a/last.pth.tar', weights_only=False)
    assert {float(state['step']) for state in checkpoint['optimizer']['state'].values()} == {2.0}
    bases = [value.shape[::2] for key, value in checkpoint['state_dict'].items() if key.split('.')[-1] == 'A']
    assert bases == ([(here['num_classes'], 8)] if name.endswith(ZZZ) else [])

    if name == QUICKSTART:  # test_end_to_end.py validates it
        shutil.rmtree(tmp_path / 'out')
        return
    options += ['--dataset', '', '--split', 'validation', '--checkpoint', 'out/a/last.pth.tar', '--batch-size', 4]
    command = shlex.split(comment(name)['Validate'])[1:]
    result = run(*command, *options, env=threads)
    loss = float(re.findall(r'Loss: +[\d.]+ \( *([\d.]+)\)', result.stdout + result.stderr)[-1])
    assert loss == pytest.approx(float(row['eval_loss']), rel=0.01)  # matrix products of bfloat16 in other batches
    assert float(re.search(r'"top1": ([\d.]+)', result.stdout)[1]) == pytest.approx(float(row['eval_top1']), abs=1e-3)
    shutil.rmtree(tmp_path / 'out')  # up to 3 GB, which pytest would keep


@pytest.mark.slow
def test_train_starts_from_the_data_by_a_recipe(timm_scripts, images, run, tmp_path):
    """Run train.py by a recipe that check-hparams passes, at the size that the recipe repeats for the fit."""
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.pth')
    fit = dict(zzz_fit=str(images / 'train'), zzz_fit_preset='frozen')
    fit['pretrained_cfg_overlay'] = dict(file=str(tmp_path / 'vit.pth'), num_classes=-1, input_size=[3, 96, 96])
    here = dict(model='test_vit.zzz_r8', num_classes=2, img_size=96, batch_size=2, workers=1, lr=1e-12, amp=False)
    here.update(epochs=1, warmup_epochs=0, weight_decay=0.0, device='cpu')
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({**load(QUICKSTART), **here, 'model_kwargs': fit}))
    assert check(recipe) == []
    log = run(
        'train.py', '--config', 'recipe.yaml', '--data-dir', images, '--output', 'out', '--experiment', 'a'
    ).stderr
    assert 'head: fitted to 4 images of 2 classes, frozen' in log
    state = torch.load(tmp_path / 'out/a/last.pth.tar', weights_only=False)['state_dict']
    model = timm.create_model(here['model'], pretrained=True, num_classes=2, **fit)
    torch.testing.assert_close(state['head.weight'], model.head.weight.detach(), rtol=1e-3, atol=1e-3)
