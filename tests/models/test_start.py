"""``create_model(..., zzz_fit=...)``: heads that start from images, compared with torchvision's pass over them."""

import copy
import inspect
import json
import logging
import pickle
import re
import shutil
import threading
from functools import partial

import ddp
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import timm_zzz.data
from timm_zzz import from_pretrained, save_pretrained
from timm_zzz.errors import ConfigError
from timm_zzz.fit import PRESETS, fit_head
from timm_zzz.head import ZZZConvHead, heads_of, record_inputs

NAME = 'test_resnet.zzz_r4'
CLASSES = [f'class {c}' for c in (0, 2, 10)]  # timm counts 10 after 2


@pytest.fixture(scope='module')
def colours(tmp_path_factory):
    """Folders of 11 images each, of noise around a colour."""
    folder = tmp_path_factory.mktemp('colours') / 'train'
    torch.manual_seed(0)
    for name, colour in zip(CLASSES, torch.rand(3, 3, 1, 1), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(11):
            to_pil_image((colour + 0.3 * torch.randn(3, 64, 64)).clamp(0, 1)).save(folder / name / f'{i:02}.png')
    return folder


@pytest.fixture(autouse=True)
def _one_process_on_the_cpu(monkeypatch, request):
    monkeypatch.setattr('timm_zzz.models.start.MAX_WORKERS', 0)
    if not any(request.node.iter_markers('gpu')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.fixture
def create(colours, backbone):
    def _create(name=NAME, **kwargs):
        overlay = dict(file=str(backbone), num_classes=-1)
        kwargs = {'zzz_fit': str(colours), 'num_classes': 3, 'pretrained_cfg_overlay': overlay, **kwargs}
        return timm.create_model(name, **{'pretrained': True, **kwargs})

    return _create


def images_of(model, folder, channels=3):
    """All images as timm prepares them for validation, and their classes, in timm's order."""
    config = timm.data.resolve_data_config(model=model)
    if channels == 1:
        config['mean'], config['std'] = ([sum(config[key]) / 3] for key in ('mean', 'std'))
    transform = timm.data.create_transform(**config)
    mode = {1: 'L', 3: 'RGB'}[channels]
    found = ImageFolder(folder, transform, loader=lambda path: Image.open(path).convert(mode))
    images, targets = zip(*found, strict=True)
    targets = torch.tensor([CLASSES.index(found.classes[t]) for t in targets])
    order = targets.argsort(stable=True)
    return torch.stack(images)[order], targets[order]


def same_heads(model, images, targets, preset='finetune', atol=1e-3):
    """Every head gives the logits of fit_head on what it is given itself."""
    heads = heads_of(model)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), record_inputs(heads) as inputs:
        model.eval()(images)
        assert heads and inputs.keys() == heads.keys()
        for path, head in heads.items():
            x = inputs[path]
            expected = fit_head(x, targets, head.rank, preset=preset).eval()
            shape = (len(x), -1, *[1] * (2 if isinstance(head, ZZZConvHead) else 0))
            actual = head(x.reshape(shape)).flatten(1)
            torch.testing.assert_close(actual, expected(x), rtol=1e-3, atol=atol)
            assert (actual.argmax(1) == targets).double().mean() > 0.8
    for module, mode in modes:
        module.training = mode


def test_the_head_is_the_fit_to_the_images(create, colours, backbone, caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr('timm_zzz.models.start.tqdm', partial(tqdm, ascii=True))  # the Hub's is off in tests
    model = create()
    assert model.training and 'zzz_fit: 100%' in capfd.readouterr().err
    assert 'fc: fitted to 33 images of 3 classes, finetune' in caplog.text and 'random' not in caplog.text
    given = load_file(backbone)
    assert all(torch.equal(v, given[k]) for k, v in model.state_dict().items() if not k.startswith('fc.'))
    images, targets = images_of(model, colours)
    same_heads(model, images, targets)
    same_heads(create(zzz_fit_preset='frozen'), images, targets, preset='frozen', atol=0.05)
    assert {*PRESETS} == {'frozen', 'finetune'}


def test_kinds_of_sources(create, colours, monkeypatch):
    model = create()
    images, targets = images_of(model, colours)
    loader = [(images[i : i + 8], targets[i : i + 8]) for i in range(0, 33, 8)]
    parent = str(colours.parent)
    for source in (
        colours,
        dict(data_dir=parent),
        dict(data_dir=parent, split='train', class_map=CLASSES),
        loader,
        iter(loader),
    ):
        other = create(zzz_fit=source)
        with torch.no_grad():
            logits = [each.eval()(images) for each in (other, model)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        assert not any(key.startswith('zzz_fit') for key in other._model_args)
    # torchvision numbers folders by their names as text
    other = create(zzz_fit=dict(data_dir=parent, dataset='torch/image_folder', split='train'))
    order = [CLASSES.index(name) for name in sorted(CLASSES)]
    assert order != [0, 1, 2]
    torch.testing.assert_close(other.fc.weight, model.fc.weight[order], rtol=1e-2, atol=1e-3)

    seen = {}

    def create_dataset(name, **kwargs):
        seen.update(kwargs, name=name)
        return ImageFolder(colours)

    monkeypatch.setattr(timm_zzz.data, 'create_dataset', create_dataset)
    create(zzz_fit='tfds/flowers:train[:80%]')
    assert (seen['name'], seen['split'], seen['root']) == ('tfds/flowers', 'train[:80%]', None)
    create(zzz_fit=dict(dataset='hfds/some/one', data_dir='cache', split='a', input_key='jpg', target_key='fine'))
    assert (seen['name'], seen['root'], seen['input_key'], seen['target_key']) == (
        'hfds/some/one',
        'cache',
        'jpg',
        'fine',
    )


def test_class_map(create, colours, tmp_path, caplog):
    turned = CLASSES[::-1]
    (tmp_path / 'classes.txt').write_text('\n'.join(turned))
    weight = create().fc.weight
    for given in (str(tmp_path / 'classes.txt'), turned):
        torch.testing.assert_close(create(zzz_fit_class_map=given).fc.weight, weight.flip(0), rtol=1e-2, atol=1e-3)
    caplog.clear()
    assert create(zzz_fit_class_map=CLASSES[:2], num_classes=2).num_classes == 2
    message = f'zzz_fit: {colours}: left out 11 images of 1 class that zzz_fit_class_map has not: class 10 (11 images)'
    assert message in caplog.text


def test_grey_images(create, colours):
    model = create(in_chans=1)
    same_heads(model, *images_of(model, colours, channels=1))


@pytest.mark.parametrize(
    'name, kwargs, count',
    [
        ('deit_tiny_distilled_patch16_224.zzz_r4', dict(depth=1, img_size=64, global_pool='token'), 2),
        ('dla46_c.zzz_r4', dict(), 1),  # a 1x1 convolution
    ],
)
def test_other_heads(name, kwargs, count, create, colours, caplog):
    kwargs = dict(kwargs, pretrained=False, pretrained_cfg_overlay=dict(input_size=(3, 64, 64), crop_pct=1.0))
    torch.manual_seed(1)
    model = create(name, **kwargs)
    assert 'zzz_fit: the backbone has random weights (pretrained=False), and the head is fitted to them' in caplog.text
    assert len(heads_of(model)) == count
    same_heads(model, *images_of(model, colours))


def test_nothing_of_it_is_recorded(create, colours, tmp_path):
    """Neither in what timm writes nor in copies; a lock within the loader can't be pickled."""

    class Loader(list):
        lock = threading.Lock()

    model = create()
    loader = Loader([images_of(model, colours)])
    for options in (dict(zzz_fit=loader), dict(zzz_fit=loader, name='test_resnet', zzz_rank=4)):
        model = create(**options, zzz_fit_preset='frozen')
        expected = {k: v for k, v in create(zzz_fit=None)._model_args.items() if not k.startswith('pretrained')}
        assert model._model_args == expected
        with pytest.raises(TypeError, match='pickle'):
            pickle.dumps(loader.lock)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module]
        for each in copies:
            assert each._model_args == expected
            assert all(torch.equal(value, each.state_dict()[key]) for key, value in model.state_dict().items())
    timm.create_model('test_resnet.zzz_r4', num_classes=3)  # no property of it is compiled:
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))

    save_pretrained(model, tmp_path / 'a')
    timm.models.save_for_hf(model, str(tmp_path / 'b'), safe_serialization=True)
    folders = (tmp_path / 'a', tmp_path / 'b') if timm_zzz.models._timm.SAVES_ARGS else (tmp_path / 'a',)
    for folder in folders:
        assert 'zzz_fit' not in (folder / 'config.json').read_text()
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    # What was saved may itself be the start of a fit to other images
    if timm_zzz.models._timm.SAVES_ARGS:
        other = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True, zzz_fit=str(colours))
        same_heads(other, *images_of(other, colours))


def test_a_config_cannot_ask_for_it(create, colours, tmp_path, monkeypatch):
    save_pretrained(create(), tmp_path)
    file = tmp_path / 'config.json'
    config = json.loads(file.read_text())

    def opened(*args, **kwargs):
        raise AssertionError('opened')

    monkeypatch.setattr('timm_zzz.models.start.open_split', opened)
    for key in ('zzz_fit', 'zzz_fit_class_map', 'zzz_fit_preset'):
        file.write_text(json.dumps(dict(config, model_args=dict(config['model_args'], **{key: str(colours)}))))
        with pytest.raises(ConfigError, match=f'model_args: {key} is not allowed there'):
            from_pretrained(tmp_path)
        for pretrained in (True, False):
            for kwargs in ({}, dict(zzz_fit=str(colours))):
                with pytest.raises(ValueError, match='zzz_fit'):
                    timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained, **kwargs)


def test_a_checkpoint_precedes(create, tmp_path):
    trained = timm.create_model(NAME, num_classes=3)
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'last.pth.tar')
    model = create(checkpoint_path=str(tmp_path / 'last.pth.tar'))
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())


def test_plain_and_deprecated_names(create, colours):
    model = create('test_resnet')  # the option alone asks for a ZZZ head
    assert model.fc.rank == 8
    same_heads(model, *images_of(model, colours))
    with pytest.warns(UserWarning, match='deprecated'):
        model = create('tv_resnet34.zzz_r4', pretrained=False, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    assert model.fc.rank == 4
    same_heads(model, *images_of(model, colours))
    cfg = dict(timm.get_pretrained_cfg('test_resnet').to_dict(), input_size=(3, 48, 48))
    model = create(pretrained_cfg=dict(cfg, tag='zzz_r4'))
    same_heads(model, *images_of(model, colours))


def test_where_it_runs_and_what_is_restored(create, colours, monkeypatch):
    seen = {}
    fit_model = timm_zzz.models.start.fit_model

    def recorded(model, images, **options):
        seen.update(options, device=next(model.parameters()).device)
        return fit_model(model, images, **{**options, 'amp_dtype': None})

    monkeypatch.setattr('timm_zzz.models.start.fit_model', recorded)
    model = create()
    assert seen['device'].type == 'cpu' and seen['amp_dtype'] is None
    kwargs = dict(pretrained=False, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)), img_size=64)
    if 'device' in inspect.signature(timm.models.VisionTransformer).parameters:
        model = create('test_vit.zzz_r4', device='cpu', dtype=torch.bfloat16, **kwargs)
        assert seen['device'].type == 'cpu' and {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.head.weight.norm(dim=1).std() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_on_a_gpu_and_back(create, colours, monkeypatch):
    seen = {}
    fit_model = timm_zzz.models.start.fit_model

    def recorded(model, images, **options):
        seen.update(device=next(model.parameters()).device)
        return fit_model(model, images, **options)

    monkeypatch.setattr('timm_zzz.models.start.fit_model', recorded)
    model = create()
    assert seen['device'].type == 'cuda' and {p.device.type for p in model.parameters()} == {'cpu'}
    images, targets = images_of(model, colours)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == targets).double().mean() > 0.8
    create(pretrained=False, device='cuda', name='test_vit.zzz_r4', pretrained_cfg_overlay=None)
    assert seen['device'].type == 'cuda'


def test_training_draws_what_it_would_without(create, colours):
    drawn = []
    for source in (None, str(colours)):
        torch.manual_seed(0)
        create(zzz_fit=source)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_linear_model_is_left_alone():
    model = timm.create_model('test_resnet', zzz_fit=None)
    assert isinstance(model.fc, torch.nn.Linear)


@pytest.fixture
def broken(tmp_path):
    for name in CLASSES:
        (tmp_path / 'broken' / name).mkdir(parents=True)
        (tmp_path / 'broken' / name / '0.png').write_bytes(b'no image')
    return tmp_path / 'broken'


def test_errors_name_the_option(create, colours, broken, tmp_path):
    (tmp_path / 'empty').mkdir()
    for split in ('eval', 'test', 'train'):
        shutil.copytree(colours, tmp_path / 'data' / split)
    shutil.copytree(colours, tmp_path / 'named' / 'train')  # a class of that name is no split
    shutil.move(tmp_path / 'named' / 'train' / CLASSES[0], tmp_path / 'classes' / 'train')
    (tmp_path / 'two.txt').write_text('\n'.join(CLASSES[:2]))
    (tmp_path / 'others.txt').write_text('a\nb\nc')
    (tmp_path / 'four.txt').write_text('\n'.join([*CLASSES, 'class 11']))
    for kwargs, message in (
        (
            dict(num_classes=5),
            f'zzz_fit: {colours} has 3 classes, but num_classes is 5; give num_classes=3, '
            'or zzz_fit_class_map to number them',
        ),
        (
            dict(zzz_fit=dict(data_dir=str(colours.parent)), num_classes=5),
            'zzz_fit: train has 3 classes, but num_classes is 5',
        ),
        (
            dict(zzz_fit_class_map=str(tmp_path / 'two.txt')),
            'zzz_fit: zzz_fit_class_map has 2 classes, but num_classes is 3',
        ),
        (dict(zzz_fit_class_map=['a', 'b', 'c']), f'zzz_fit_class_map has none of the classes of {colours}: class 0'),
        (dict(zzz_fit_class_map='nowhere.txt'), 'zzz_fit_class_map: expected a .txt file'),
        (
            dict(zzz_fit_class_map=str(tmp_path / 'four.txt'), num_classes=4),
            'zzz_fit: y: 1 of 4 classes have no example: 3',
        ),
        (dict(zzz_fit='nowhere'), 'zzz_fit: no such folder: nowhere (a data set of timm is TYPE/NAME:SPLIT)'),
        (dict(zzz_fit='some/data:train'), 'zzz_fit: no such folder: some/data:train'),
        (
            dict(zzz_fit='torch/cifar10:train'),
            'needs its folder: {dataset: torch/cifar10, data_dir: DIR, split: train}',
        ),
        (dict(zzz_fit=dict(data_dir='nowhere')), 'zzz_fit: no such folder: nowhere'),
        (dict(zzz_fit=dict(split='train')), 'zzz_fit: no such folder'),
        (
            dict(zzz_fit=dict(data_dir=str(colours.parent), split='test')),
            f'zzz_fit: {colours.parent} has no folder test',
        ),
        (dict(zzz_fit=str(tmp_path / 'empty')), f'zzz_fit: {tmp_path / "empty"} has no images: '),
        (dict(zzz_fit=str(tmp_path / 'data')), f'name one, such as {tmp_path / "data" / "train"}'),
        (dict(zzz_fit=str(broken)), "zzz_fit: the images can't be read: "),
        (dict(zzz_fit=dict(folder='x')), 'zzz_fit: unknown keys folder (known: data_dir, dataset, split,'),
        (dict(zzz_fit=3), 'zzz_fit: expected a folder, TYPE/NAME:SPLIT, a dict or a loader, got 3'),
        (
            dict(zzz_fit=[(torch.zeros(2, 3, 64, 64), torch.tensor([0, 3]))]),
            'zzz_fit: y: expected class indices from 0',
        ),
        (dict(zzz_fit=[]), 'zzz_fit: no examples yet'),
        (dict(zzz_fit_preset='best'), "zzz_fit: preset: expected one of frozen, finetune, got 'best'"),
        (dict(num_classes=0), 'zzz_fit: num_classes=0 leaves the model no classifier to fit'),
        (dict(features_only=True), 'zzz_fit: it needs a classifier, features_only=True leaves none'),
        (dict(zzz_fit=None, zzz_fit_preset='frozen'), 'zzz_fit_preset: it goes with zzz_fit, the images to fit to'),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as e:
            create(**kwargs)
        assert '--' not in str(e.value)
    with torch.device('meta'), pytest.raises(ValueError, match='zzz_fit: a model on the meta device has no values'):
        create(pretrained=False)
    with pytest.raises(TypeError, match='Unknown argument zzz_fits .*zzz_fit, zzz_fit_class_map, zzz_fit_preset'):
        create(zzz_fits='x')
    for path in (tmp_path / 'classes').iterdir():  # folders of images
        assert path.name == 'train'
    shutil.copytree(colours / CLASSES[1], tmp_path / 'classes' / CLASSES[1])
    assert create(zzz_fit=str(tmp_path / 'classes'), num_classes=2).num_classes == 2


@pytest.mark.integration
def test_two_processes(create, colours, tmp_path, backbone):
    """33 images: one process has 17 and 3 batches, the other 16 and 2."""
    arguments = (ddp.start, tmp_path, str(colours), str(backbone))
    torch.multiprocessing.spawn(ddp.spawned, arguments, nprocs=2)
    saved = [torch.load(tmp_path / f'rank{rank}.pth') for rank in range(2)]
    for kind in ('folder', 'loader', 'one'):
        states = [each[kind] for each in saved]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    model = create()
    x, _ = images_of(model, colours)
    with torch.no_grad():
        expected = model.eval()(x)
        for kind in ('folder', 'loader'):
            model.load_state_dict(saved[0][kind])
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    for rank, each in enumerate(saved):
        assert each['bars'] == (1 if rank == 0 else 0)
        assert (
            each['missing']
            == (
                'ValueError: zzz_fit: no such folder: nowhere (a data set of timm is TYPE/NAME:SPLIT)',
                'RuntimeError: process 0 failed: ValueError: zzz_fit: no such folder: nowhere (a '
                'data set of timm is TYPE/NAME:SPLIT)',
            )[rank]
        )
        assert each['late'] == ('RuntimeError: process 1 failed: OSError: gone', 'OSError: gone')[rank]
