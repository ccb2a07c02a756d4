"""``python -m timm_zzz push`` on what train.py writes; test_end_to_end.py does the same after the real train.py."""

import argparse
import json
import re
import shutil
import sys

import pytest
import timm
import timm.utils
import torch
import yaml
from oracles import distinct
from PIL import Image
from timm.data import create_transform
from timm.data.readers.class_map import load_class_map

from timm_zzz import from_pretrained
from timm_zzz.cli.push import main, public_args
from timm_zzz.cli.run import load_run
from timm_zzz.models import _timm

REPO = 'owner/beetles-zzz'


def write_run(folder, beetles, *, model='test_resnet.zzz_r4', ema=False, top1=91.0, logged=None, **kwargs):
    """Write the files of a run of train.py, with timm's own saver."""
    folder.mkdir()
    args = dict(
        model=model,
        num_classes=12,
        pretrained=True,
        data_dir=str(beetles),
        val_split='validation',
        opt='adamw',
        lr=1e-3,
        eval_metric='top1',
        model_ema=ema,
        model_kwargs={},
        img_size=None,
        mean=[0.5] * kwargs.get('in_chans', 3),
        output=str(folder.parent),
    )
    args.update(kwargs)
    trained, averaged = (distinct(timm.create_model(model, num_classes=12, **args['model_kwargs'])) for _ in range(2))
    saver = timm.utils.CheckpointSaver(
        trained,
        torch.optim.SGD(trained.parameters(), 0.1),
        args=argparse.Namespace(**args),
        model_ema=averaged if ema else None,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    for epoch, value in enumerate([50.0, top1]):
        timm.utils.update_summary(
            epoch,
            {'loss': 1.0},
            {'loss': 0.5, 'top1': logged or value, 'top5': 99.0},
            str(folder / 'summary.csv'),
            lr=0.1,
            write_header=epoch == 0,
        )
        saver.save_checkpoint(epoch, metric=value)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return trained, averaged


def test_push(hub, tmp_path, beetles, capsys):
    trained, _ = write_run(tmp_path / 'run', beetles)
    (tmp_path / 'mine.yaml').write_text('lr: 1.0e-3\n')
    main([str(tmp_path / 'run'), REPO, '--data-dir', str(beetles), '--recipe', str(tmp_path / 'mine.yaml')])
    out = capsys.readouterr()
    assert '/commit/' in out.out and 'No result' not in out.err
    files = hub.files(REPO)
    assert {'README.md', 'args.yaml', 'config.json', 'model.safetensors', 'recipe.yaml', 'summary.csv'} <= set(files)
    again = from_pretrained(REPO)
    assert torch.equal(again.get_classifier().A, trained.get_classifier().A)
    assert again.pretrained_cfg['mean'] == [0.5, 0.5, 0.5]
    assert again.pretrained_cfg['label_names'] == sorted(path.name for path in (beetles / 'train').iterdir())
    card = files['README.md'].decode()
    assert '| validation | 91.0 |' in card and 'value: 91.0' in card
    assert 'base_model: timm/test_resnet.r160_in1k' in card and 'license: apache-2.0' in card
    assert str(tmp_path).encode() not in files['args.yaml'] and str(beetles).encode() not in files['args.yaml']
    assert yaml.safe_load(files['args.yaml'])['data_dir'] == beetles.name


def test_averaged_weights(hub, tmp_path, beetles, capsys):
    trained, averaged = write_run(tmp_path / 'run', beetles, ema=True)
    checkpoint = str(tmp_path / 'run' / 'last.pth.tar')
    main([checkpoint, REPO, '--use-ema'])
    assert torch.equal(from_pretrained(REPO).get_classifier().A, averaged.get_classifier().A)
    assert 'value: 91.0' in hub.files(REPO)['README.md'].decode()
    main([checkpoint, 'owner/raw'])
    assert torch.equal(from_pretrained('owner/raw').get_classifier().A, trained.get_classifier().A)
    assert 'Not measured' in hub.files('owner/raw')['README.md'].decode()
    assert 'accuracy of the averaged weights, not of those pushed' in capsys.readouterr().err


def test_calibrated(hub, tmp_path, beetles, capsys):
    """The temperature is in the weights, and the card says so; what train.py measured stays."""
    trained, _ = write_run(tmp_path / 'run', beetles)
    images = ['--data-dir', str(beetles), '--calibrate', '-j', '0', '--device', 'cpu', '--batch-size', '20']
    main([str(tmp_path / 'run'), REPO, *images])
    card, model = hub.files(REPO)['README.md'].decode(), from_pretrained(REPO).eval()
    line = (
        r'Calibrated: the logits were divided by (\S+), the temperature of 48 images of `validation`. That takes the '
    )
    line += r'expected calibration error from \S+ % to \S+ % and the negative log-likelihood from (\S+) to (\S+), '
    temperature, before, after = map(float, re.search(line, card).groups())
    assert 'value: 91.0' in card and after < before
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        close = torch.testing.assert_close
        close(model(x), trained.eval()(x) / temperature, rtol=2e-3, atol=2e-3)
        close(timm.utils.reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert re.search(line, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main([str(tmp_path / 'run'), 'owner/as-it-is', '--dataset', 'beetles'])
    assert 'a card has --dataset-name' in capsys.readouterr().err
    main([str(tmp_path / 'run'), 'owner/as-it-is', '--data-dir', str(beetles)])
    assert 'Calibrated' not in hub.files('owner/as-it-is')['README.md'].decode()


def test_class_map(hub, tmp_path, beetles, capsys):
    write_run(tmp_path / 'run', beetles)
    names = [path.name for path in sorted((beetles / 'train').iterdir(), reverse=True)]
    (tmp_path / 'classes.txt').write_text('\n'.join(names) + '\n')
    for extra in ([], ['--data-dir', str(beetles)]):
        main([str(tmp_path / 'run'), REPO, '--class-map', str(tmp_path / 'classes.txt'), *extra])
        assert from_pretrained(REPO).pretrained_cfg['label_names'] == names
    write_run(tmp_path / 'mapped', beetles, class_map='classes.txt')
    fails(capsys, 'trained with one (classes.txt)', tmp_path / 'mapped', REPO, '--data-dir', beetles)


def test_class_counts_and_what_is_left_out(hub, tmp_path, beetles, capsys):
    write_run(tmp_path / 'run', beetles)
    names = sorted(path.name for path in (beetles / 'train').iterdir())
    for name in (*names[1:], 'empty'):
        (tmp_path / 'data/train' / name).mkdir(parents=True)
    for name in names[1:]:
        shutil.copy(beetles / 'train' / name / '0000.png', tmp_path / 'data/train' / name)
    data = ('--data-dir', tmp_path / 'data')
    fails(capsys, '--data-dir: train has 11 classes, the model has 12; --class-map', tmp_path / 'run', REPO, *data)
    (tmp_path / 'map.txt').write_text('\n'.join([*names[:-1], 'other']))
    main(list(map(str, [tmp_path / 'run', REPO, *data, '--class-map', tmp_path / 'map.txt'])))
    err = capsys.readouterr().err
    assert 'warning: train: class folders without images: empty\n' in err
    assert f'left out 1 image of 1 class that --class-map has not: {names[-1]} (1 image)\n' in err
    # As timm's load_class_map: a blank line is a class, U+2028 ends no line
    for text, count in (('\n'.join([*names, '', 'x']), 14), ('\u2028'.join(names), 1)):
        (tmp_path / 'map.txt').write_text(text, encoding='utf-8')
        assert len(load_class_map(str(tmp_path / 'map.txt'))) == count
        message = f'--class-map has {count} classes, the model has 12\n'
        fails(capsys, message, tmp_path / 'run', REPO, '--class-map', tmp_path / 'map.txt')
    (tmp_path / 'map.txt').write_text('\n'.join([*names, names[2]]))
    message = 'has no class of index 2; is its line 3 there twice?'
    fails(capsys, message, tmp_path / 'run', REPO, '--class-map', tmp_path / 'map.txt')


def test_output_folder_pushes_nothing(hub, tmp_path, beetles, capsys):
    write_run(tmp_path / 'run', beetles)
    main([str(tmp_path / 'run'), REPO, '--output', str(tmp_path / 'out')])
    assert capsys.readouterr().out.strip() == str(tmp_path / 'out')
    assert {'README.md', 'args.yaml', 'config.json', 'model.safetensors', 'summary.csv'} == {
        path.name for path in (tmp_path / 'out').iterdir()
    }
    from_pretrained(tmp_path / 'out')
    assert not hub.requests


def test_output_has_the_mode_of_new_files(hub, tmp_path, beetles, umask):
    write_run(tmp_path / 'run', beetles)
    (tmp_path / 'mine.yaml').write_text('lr: 1.0e-3\n')
    main(list(map(str, [tmp_path / 'run', REPO, '--output', tmp_path / 'out', '--recipe', tmp_path / 'mine.yaml'])))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / 'out').iterdir()}
    assert len(modes) == 6 and set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize('kwargs', [dict(model_kwargs=dict(img_size=96)), dict(img_size=96), dict(in_chans=1)])
def test_input_as_trained(hub, tmp_path, beetles, kwargs):
    size = {k: v for k, v in kwargs.items() if k != 'model_kwargs'}
    built = {**size, **kwargs.get('model_kwargs', {})}
    write_run(tmp_path / 'run', beetles, model='test_vit.zzz_r4', **{**kwargs, 'model_kwargs': built})
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    saved = torch.load(checkpoint, weights_only=False)
    saved['args'].model_kwargs = kwargs.get('model_kwargs', {})
    torch.save(saved, checkpoint)
    run = load_run(checkpoint)
    assert run.model.patch_embed.img_size == ((96, 96) if 'img_size' in built else (160, 160))
    main([str(checkpoint), REPO])
    expected = getattr(timm.data, 'resolve_input_data_config', _timm.input_config)(run.model, run.data_config)
    config = timm.data.resolve_model_data_config(from_pretrained(REPO))
    assert (*config['input_size'],) == expected['input_size'] and expected['input_size'][0] == built.get('in_chans', 3)


@pytest.mark.parametrize(
    'arguments, change, expected',
    [
        ([], {}, 'apache-2.0'),
        (['--license', 'mit'], {}, 'mit'),
        ([], dict(pretrained=False), 'unknown'),
        ([], dict(pretrained_path='backbone.safetensors'), 'unknown'),
    ],
)
def test_licence(hub, tmp_path, beetles, arguments, change, expected):
    """On the card and in config.json; that of timm's weights only where the run started from these."""
    write_run(tmp_path / 'run', beetles, **change)
    main([str(tmp_path / 'run'), REPO, *arguments])
    main([str(tmp_path / 'run'), REPO, *arguments, '--output', str(tmp_path / 'out')])
    for files in (hub.files(REPO), {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}):
        card = yaml.safe_load(files['README.md'].decode().split('---')[1])
        assert card['license'] == json.loads(files['config.json'])['pretrained_cfg']['license'] == expected
        assert ('base_model' in card) == (not change)


def test_card_says_what_acted(hub, tmp_path, beetles):
    """Options that had no effect are not listed, and the image size is that of the run."""
    args = dict(
        img_size=128, lr_base=0.1, weight_decay=0.05, sched='cosine', epochs=2, smoothing=0.0, mixup=0.2, cutmix=0.0
    )
    for mixup_prob, mixup in ((1.0, ', mixup 0.2'), (0.0, '')):
        write_run(tmp_path / f'run {mixup_prob}', beetles, mixup_prob=mixup_prob, **args)
        main([str(tmp_path / f'run {mixup_prob}'), REPO])
        card = hub.files(REPO)['README.md'].decode()
        assert f'with opt adamw, lr 0.001, weight_decay 0.05, sched cosine, epochs 2{mixup}.' in card
        assert '| image size | 128 x 128 |' in card
        # a list before timm 1.0.31, as JSON has it
        assert (*timm.data.resolve_model_data_config(from_pretrained(REPO))['input_size'],) == (3, 128, 128)
    write_run(tmp_path / 'scaled', beetles, lr=None, lr_base=0.1)
    main([str(tmp_path / 'scaled'), REPO])
    assert 'with opt adamw, lr_base 0.1.' in hub.files(REPO)['README.md'].decode()


def fails(capsys, what, *arguments):
    with pytest.raises(SystemExit) as e:
        main([*map(str, arguments)])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert what in err and 'timm_zzz: error: ' in err and 'Traceback' not in err, err


def test_mistakes(hub, tmp_path, beetles, capsys):
    write_run(tmp_path / 'run', beetles)
    run = tmp_path / 'run'
    fails(capsys, 'no such checkpoint', tmp_path / 'nothing.pth.tar', REPO)
    (tmp_path / 'x.pth.tar').write_text('not a checkpoint')
    fails(capsys, "can't be read as a checkpoint", tmp_path / 'x.pth.tar', REPO)
    torch.save({'a': 1}, tmp_path / 'x.pth.tar')
    fails(capsys, 'it has no state_dict', tmp_path / 'x.pth.tar', REPO)
    fails(capsys, 'has no averaged weights', run, REPO, '--use-ema')
    fails(capsys, 'expected a .txt file', run, REPO, '--class-map', tmp_path / 'no.pkl')
    (tmp_path / 'two.txt').write_text('a\nb\n')
    fails(capsys, '--class-map has 2 classes, the model has 12\n', run, REPO, '--class-map', tmp_path / 'two.txt')
    fails(capsys, '--data-dir: no such folder', run, REPO, '--data-dir', tmp_path / 'no')
    fails(capsys, 'has no images of a split train', run, REPO, '--data-dir', tmp_path / 'run')
    fails(capsys, '--recipe: no such file', run, REPO, '--recipe', tmp_path / 'no.yaml')
    fails(capsys, 'no right to do this', run, 'other/x')
    fails(capsys, 'does not fit the model', run, REPO, '--model', 'test_vit.zzz_r4')
    fails(capsys, 'has no ZZZ head', run, REPO, '--model', 'test_resnet')
    torch.save({'state_dict': timm.create_model('test_resnet').state_dict()}, tmp_path / 'x.pth.tar')
    fails(capsys, '--model: neither', tmp_path / 'x.pth.tar', REPO)
    (tmp_path / 'args.yaml').write_text('model: [')
    fails(capsys, 'args.yaml', tmp_path / 'x.pth.tar', REPO)
    (tmp_path / 'args.yaml').unlink()
    fails(capsys, 'the checkpoint has no ZZZ head', tmp_path / 'x.pth.tar', REPO, '--model', 'test_resnet.zzz_r4')
    assert not hub.exists(REPO)


def test_a_pickle_with_code_does_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('ran').touch, ())

    torch.save({'state_dict': Evil()}, tmp_path / 'x.pth.tar')
    fails(capsys, "can't be read", tmp_path / 'x.pth.tar', REPO)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'change, note',
    [
        (dict(logged=12.0), 'summary.csv is of another run'),
        (dict(val_split=''), 'no validation split'),
    ],
)
def test_no_result_that_was_not_measured(hub, tmp_path, beetles, capsys, change, note):
    write_run(tmp_path / 'run', beetles, **change)
    main([str(tmp_path / 'run'), REPO, '--data-dir', str(beetles)])
    assert note in capsys.readouterr().err and 'Not measured' in hub.files(REPO)['README.md'].decode()


def test_no_summary(hub, tmp_path, beetles, capsys):
    write_run(tmp_path / 'run', beetles)
    (tmp_path / 'run' / 'summary.csv').unlink()
    main([str(tmp_path / 'run'), REPO])
    assert 'no summary.csv' in capsys.readouterr().err
    assert 'Not measured' in hub.files(REPO)['README.md'].decode() and 'summary.csv' not in hub.files(REPO)


def test_public_args(tmp_path):
    args = dict(a='/home/me/data/birds/', b=[str(tmp_path)], c={'d': '/x/y.pth'}, e='adamw', f='hfds/org/set', g=None)
    assert yaml.safe_load(public_args(args)) == dict(
        a='birds', b=[tmp_path.name], c={'d': 'y.pth'}, e='adamw', f='hfds/org/set', g=None
    )


def test_a_run_that_started_from_images_is_read_without_them(tmp_path, beetles):
    write_run(tmp_path / 'run', beetles)
    file = tmp_path / 'run' / 'model_best.pth.tar'
    saved = torch.load(file, weights_only=False)
    saved['args'].model_kwargs = dict(zzz_fit=str(tmp_path / 'gone'), zzz_fit_preset='frozen', zzz_v_min=0.01)
    torch.save(saved, file)
    model = load_run(tmp_path / 'run').model
    assert model.fc.v_min == 0.01
    assert all(torch.equal(value, saved['state_dict'][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('channels', [3, 1])
def test_onnx(channels, tmp_path, beetles, capsys, monkeypatch):
    """The card's own lines run model.onnx, for one image and for several, and give the model's logits."""
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    std = [0.25] * channels
    trained, _ = write_run(
        tmp_path / 'run', beetles, model_kwargs=dict(in_chans=channels), in_chans=channels, img_size=48, std=std
    )
    output = tmp_path / 'pushed'
    main([str(tmp_path / 'run'), REPO, '--output', str(output), '--onnx'])
    card = (output / 'README.md').read_text()
    code = re.search(r'```python\n(import numpy.*?)```', card, re.S)[1]
    image = Image.effect_noise((70, 50), 80).convert('RGB')
    image.save(output / 'image.png')
    monkeypatch.chdir(output)
    found = {}
    exec(code.replace('image.jpg', 'image.png'), found)
    transform = create_transform(
        (channels, 48, 48), interpolation='bicubic', crop_mode='squash', crop_pct=1.0, mean=[0.5] * channels, std=std
    )
    x = transform(image.convert('RGB' if channels == 3 else 'L'))[None]
    with torch.no_grad():
        expected = trained.eval()(x)
        torch.testing.assert_close(torch.from_numpy(found['x']), x, atol=0.02, rtol=0)
        close = dict(atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(found['logits']), trained(torch.from_numpy(found['x']))[0], **close)
        images = torch.cat([x, torch.randn(4, channels, 48, 48)])
        (logits,) = runtime.InferenceSession('model.onnx').run(None, {'input0': images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), trained(images), **close)
    assert expected.argmax() == found['logits'].argmax()


def test_onnx_that_is_not_installed(tmp_path, beetles, capsys, monkeypatch):
    write_run(tmp_path / 'run', beetles)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(SystemExit):
        main([str(tmp_path / 'run'), REPO, '--output', str(tmp_path / 'pushed'), '--onnx'])
    assert '--onnx: pip install "timm_zzz[onnx]"' in capsys.readouterr().err and not (tmp_path / 'pushed').exists()
