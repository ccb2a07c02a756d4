"""Give the commands broken input: each prints one line on stderr and has the documented status, whatever is wrong."""

import argparse
import builtins
import io
import pathlib
import pickle
import random
import shutil
import string

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from timm_zzz.cli import calibrate, check_hparams, demo, fit, hparams, push, report

MODEL = 'test_resnet.zzz_r4'
# What YAML may hold in place of what belongs there
WRONG = [None, True, 0, -3, 1.5, 10**6, '', 'text', '[', [], [1, 2], ['a'], [None, [1]], {}, {'a': 1}, {1: [2]}]
WRONG += [float('nan'), float('inf'), b'\xff', '../..', '\x00', 'é\u2028x', {'img_size': 'a'}, {'zzz_rank': -1}]
KEYS = ['model', 'model_kwargs', 'input_size', 'img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct']
KEYS += ['crop_mode', 'gp', 'bn_momentum', 'bn_eps', 'val_split', 'train_split', 'class_map', 'dataset', 'data_dir']
KEYS += ['model_ema', 'eval_metric', 'pretrained', 'lr', 'opt', 'epochs']


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """A run of train.py, the images of its two classes, and what the commands may be given besides."""
    folder = tmp_path_factory.mktemp('good')
    for split, name in ((s, n) for s in ('train', 'validation') for n in 'ab'):
        (folder / 'data' / split / name).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((32, 32), 50.0 + i).save(folder / 'data' / split / name / f'{i}.png')
    (folder / 'run').mkdir()
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2)
    args = dict(model=MODEL, img_size=32, model_kwargs={}, data_dir='data', lr=0.1)
    saved = dict(epoch=0, state_dict=model.state_dict(), args=argparse.Namespace(**args), metric=50.0)
    torch.save(saved, folder / 'run/model_best.pth.tar')
    (folder / 'run/args.yaml').write_text(yaml.safe_dump(args))
    (folder / 'run/summary.csv').write_text('epoch,eval_top1\n0,50.0\n')
    (folder / 'classes.txt').write_text('a\nb\n')
    save_file(timm.create_model('test_resnet').state_dict(), folder / 'start.safetensors')
    return folder


class Caller:
    """Calls commands with a copy of the good input of which a part is broken."""

    def __init__(self, good, folder, capsys):
        self.good, self.folder, self.capsys = good, folder, capsys
        self.run = folder / 'run'
        self.run.mkdir()
        self.restore()

    def restore(self):
        for path in self.run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (self.good / 'run').iterdir():
            (self.run / path.name).write_bytes(path.read_bytes())

    def saved(self):
        return torch.load(self.good / 'run/model_best.pth.tar', weights_only=False)

    def save(self, saved, **changes):
        torch.save({**saved, **changes} if isinstance(saved, dict) else saved, self.run / 'model_best.pth.tar')

    def fit(self, *arguments, checkpoint=None, data=None):
        data, weights = data or self.good / 'data', checkpoint or self.good / 'start.safetensors'
        fixed = ['--model', MODEL, '--data-dir', data, '--checkpoint', weights, '--img-size', 32, '--device', 'cpu']
        return self.call(fit, *fixed, '-j', 0, '--sigma2', 0.1, '-o', self.folder / 'out.safetensors', *arguments)

    def push(self, *arguments, checkpoint=None):
        return self.call(push, checkpoint or self.run, 'owner/x', '--output', self.folder / 'out', *arguments)

    def report(self, *arguments, checkpoint=None, data=None):
        fixed = ['--data-dir', data or self.good / 'data', '--output', self.folder / 'out.html', '--device', 'cpu']
        return self.call(report, checkpoint or self.run, *fixed, '-j', 0, *arguments)

    def calibrate(self, *arguments, checkpoint=None, data=None):
        fixed = ['--data-dir', data or self.good / 'data', '--output', self.folder / 'out.pth.tar', '--device', 'cpu']
        return self.call(calibrate, checkpoint or self.run, *fixed, '-j', 0, *arguments)

    def call(self, module, *arguments):
        """Return the error, '' if there was none."""
        for path in self.folder.glob('out*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        status = 0
        try:
            status = module.main(list(map(str, arguments))) or 0
        except SystemExit as e:
            status = e.code
        out, err = self.capsys.readouterr()
        assert 'Traceback' not in out + err
        if module is check_hparams and status == 1:
            assert ': error: ' in out
            return out
        lines = [line for line in err.replace('\r', '\n').split('\n') if line.startswith('timm_zzz: error: ')]
        assert (status, len(lines)) in ((0, 0), (2, 1)), (status, err)
        return err if not lines else lines[0] if err.endswith(f'{lines[0]}\n') else pytest.fail(err)

    def fails(self, error, what=''):
        assert error.startswith('timm_zzz: error: ') and what in error, error


@pytest.fixture
def caller(good, tmp_path, capsys):
    return Caller(good, tmp_path, capsys)


def broken_bytes(rng, content):
    """Truncated, empty, flipped, random and foreign content of a file."""
    yield b''
    for n in (1, len(content) // 2, len(content) - 1):
        yield content[:n]
    for _ in range(4):
        flipped = bytearray(content)
        for i in rng.sample(range(len(content)), min(len(content), 8)):
            flipped[i] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    yield rng.randbytes(200)
    yield b'{"__metadata__": {}}'
    yield (2**40).to_bytes(8, 'little') + b'{}'
    yield pickle.dumps([1, 2])
    yield b'\x00' * 64


def unreadable(monkeypatch, path):
    """Let nobody open a file, not even root."""
    real = builtins.open

    def refuse(file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, 'open', refuse)
    monkeypatch.setattr(io, 'open', refuse)  # pathlib's
    if hasattr(pathlib, '_NormalAccessor'):  # Python 3.10
        monkeypatch.setattr(pathlib._NormalAccessor, 'open', staticmethod(refuse))


@pytest.mark.parametrize('command', ['push', 'report', 'calibrate'])
def test_checkpoints(caller, command, monkeypatch):
    rng, call = random.Random(0), getattr(caller, command)
    assert 'error' not in call()
    file = caller.run / 'model_best.pth.tar'
    content = file.read_bytes()
    for bad in broken_bytes(rng, content):
        caller.restore()
        file.write_bytes(bad)
        call()  # a flipped bit of a weight may pass
    for bad in ([1], 'text', 3, None, torch.zeros(2), {}, {1: 2}, {'state_dict': 3}, {'state_dict': {'a': 1}}):
        caller.restore()
        caller.save(bad)
        caller.fails(call())
    saved = caller.saved()
    state = saved['state_dict']
    states = [{}, {1: torch.zeros(1)}, {**state, 'fc.bias': torch.tensor(1.0)}, {**state, 'fc.A': 'x'}]
    states += [{**state, 'fc.sigma2_raw': torch.zeros(3)}, {**state, 'conv1.0.weight': torch.zeros(2, 2)}]
    states += [{**state, 'fc.weight': torch.zeros(2, 9)}, {k: v for k, v in state.items() if k != 'fc.A'}, [state]]
    for bad in states:
        caller.save(saved, state_dict=bad)
        caller.fails(call())
    for bad in ([1], 'model', 3, {1: 2}, {'model': 7}, torch.zeros(2), argparse.Namespace(model=['x'])):
        caller.save(saved, args=bad)
        caller.fails(call())
    for bad in ({'epoch': 'x'}, {'epoch': [1]}, {'metric': {}}, {'calibration': [1]}, {'args': vars(saved['args'])}):
        caller.restore()
        caller.save(saved, **bad)
        assert 'error' not in call()
    caller.save(saved, state_dict_ema=[1])
    caller.fails(call('--use-ema'))
    file.unlink()
    caller.fails(call(), 'no such ')
    file.mkdir()
    caller.fails(call(), 'no such checkpoint')
    caller.restore()
    unreadable(monkeypatch, file)
    caller.fails(call(), 'Permission denied')


@pytest.mark.parametrize('command', ['push', 'report'])
def test_args(caller, command, monkeypatch):
    rng, call = random.Random(1), getattr(caller, command)
    file, saved = caller.run / 'args.yaml', caller.saved()
    saved.pop('args')
    args = yaml.safe_load(file.read_text())
    for bad in ('[1, 2]', 'text', '3', 'model: [', '{1: 2}', '\x00', '&a [*a]', '{? [a] : b}', '- model: x\n'):
        caller.restore()
        caller.save(saved)
        file.write_text(bad)
        caller.fails(call())
    for bad in broken_bytes(rng, file.read_bytes()):
        caller.restore()
        caller.save(saved)
        file.write_bytes(bad)
        call()
    for key, bad in (('model', 3), ('model', ['x']), ('model', '!'), ('model_kwargs', [1]), ('model_kwargs', 'x')):
        caller.restore()
        caller.save(saved, args=argparse.Namespace(**{**args, key: bad}))
        caller.fails(call())
    for key, bad in [(key, bad) for key in KEYS for bad in rng.sample(WRONG, 1 + (command == 'push'))]:
        caller.restore()
        caller.save(saved, args={**args, key: bad})
        call()
    if command == 'report':
        for bad in ({'std': [1.0, 1.0]}, {'mean': [0.5] * 4}, {'interpolation': 'x'}, {'input_size': [1, 32, 32]}):
            caller.save(saved, args={**args, **bad})
            caller.fails(call())
    for key in ('input_size', 'mean', 'model_kwargs', 'in_chans'):
        caller.restore()
        caller.save(saved, args={**args, key: 'text'})
        caller.fails(call(), key)
    caller.save(saved)
    unreadable(monkeypatch, file)
    caller.fails(call(), 'Permission denied')


@pytest.mark.parametrize('command', ['push', 'report', 'fit'])
def test_class_maps(caller, command, monkeypatch):
    rng, call = random.Random(2), getattr(caller, command)
    data = ('--data-dir', caller.good / 'data')
    for bad in broken_bytes(rng, b'a\nb\n'):
        for suffix in ('.txt', '.pkl'):
            caller.restore()
            file = caller.folder / f'map{suffix}'
            file.write_bytes(bad)
            call('--class-map', file, *(data if rng.random() < 0.5 else ()))
    for bad in ({'a': 0}, {'a': 0, 'b': 2}, {'a': 0, 'b': 0}, {'a': 'x', 'b': 0}, {'a': 0.0, 'b': 1.0}, [0], {}):
        caller.restore()
        file.write_bytes(pickle.dumps(bad))
        caller.fails(call('--class-map', file))
    for bad in ('a\nb\nc\n', 'a\n', 'a\na\n', 'a\nb\n\n', '\n\na\n', 'a\u2028b\n'):
        file = caller.folder / 'map.txt'
        file.write_text(bad, encoding='utf-8')
        caller.fails(call('--class-map', file))
    caller.fails(call('--class-map', caller.folder))
    caller.fails(call('--class-map', caller.folder / 'none.txt'))
    (caller.folder / 'folder.txt').mkdir()
    caller.fails(call('--class-map', caller.folder / 'folder.txt'))
    file.write_text('a\nb\n')
    unreadable(monkeypatch, file)
    caller.fails(call('--class-map', file), 'Permission denied')


def test_summaries(caller, monkeypatch):
    rng, file = random.Random(3), caller.run / 'summary.csv'
    for bad in broken_bytes(rng, file.read_bytes()):
        caller.restore()
        file.write_bytes(bad)
        caller.push()
    for bad in ('epoch,eval_top1\n0,x\n', 'epoch,eval_top1\n0,nan\n', 'epoch,eval_top1\n0,5000\n', 'epoch\n0,1,2,3\n'):
        caller.restore()
        file.write_text(bad)
        assert 'No result on the card' in caller.push()
    for bad in (b'epoch,eval_top1\n0,\xff\n', b'epoch,' + b'x' * 200_000):
        caller.restore()
        file.write_bytes(bad)
        caller.fails(caller.push(), 'summary.csv')
    caller.restore()
    unreadable(monkeypatch, file)
    caller.fails(caller.push(), 'Permission denied')


def test_weights_to_start_from(caller, monkeypatch):
    rng, file = random.Random(4), caller.folder / 'start.safetensors'
    content = (caller.good / 'start.safetensors').read_bytes()
    for bad in broken_bytes(rng, content):
        for name in ('a.safetensors', 'a.pth.tar'):
            caller.restore()
            (caller.folder / name).write_bytes(bad)
            caller.fit(checkpoint=caller.folder / name)
    for bad in ([1], 'x', 3, None, {}, {1: 2}, {'state_dict': 3}, {'state_dict': {'a': 1}}, {'model': [1]}):
        torch.save(bad, caller.folder / 'a.pth.tar')
        caller.fails(caller.fit(checkpoint=caller.folder / 'a.pth.tar'))
    for bad in (caller.folder, caller.folder / 'none.safetensors', caller.good / 'classes.txt'):
        caller.fails(caller.fit(checkpoint=bad))
    unreadable(monkeypatch, caller.folder / 'a.pth.tar')
    caller.fails(caller.fit(checkpoint=caller.folder / 'a.pth.tar'), 'Permission denied')
    for bad in (file, caller.folder):
        options = ['--model', MODEL, '--data-dir', caller.good / 'data', '-o', file, '--pretrained-path', bad]
        caller.fails(caller.call(fit, *options, '--device', 'cpu'))


@pytest.mark.parametrize('command', ['fit', 'report', 'calibrate'])
def test_images(caller, command, tmp_path):
    call, bad = getattr(caller, command), tmp_path / 'bad'
    for split in ('train', 'validation'):
        for name in 'ab':
            (bad / split / name).mkdir(parents=True)
            (bad / split / name / '0.png').write_bytes(b'no picture')
    for workers in (0, 1) if command == 'fit' else (0,):
        error = call('-j', workers, data=bad)
        caller.fails(error, "--data-dir: the images can't be read: ")
        assert len(error) < 150 and 'consecutive samples' in error
    for data in (tmp_path / 'none', tmp_path / 'run', caller.good / 'classes.txt', caller.good / 'data/train/a/0.png'):
        caller.fails(call(data=data))
    for options in (('--split', ''), ('--split', 'x/y'), ('--dataset', 'hfds/x'), ('--dataset', 'torch/nothing')):
        call(*options)
        caller.restore()
    caller.fails(call('--device', 'nowhere'))


FIT = [
    *(('--model', name) for name in ('', '.', 'x', 'test_resnet', 'test_resnet.zzz_r5', 'hf-hub:', 'local-dir:none')),
    *(('--img-size', 10**8), ('--input-size', 3, 0, 0), ('--input-size', -1, 9, 9), ('--num-classes', 3)),
    *(('--model', 'test_vit.zzz_r4', '--checkpoint', 'x'), ('--val-split', 'none'), ('--split', 'none')),
    *(('--model-kwargs', text) for text in ('zzz_rank=x', 'zzz_rank=-1', 'name=x', 'a=1', 'pretrained=True', 'a b=c')),
    *(('--model-kwargs', text) for text in ('num_classes=3', 'in_chans=1', 'checkpoint_path=x', 'zzz_rank=[1]')),
    *(('--shrinkage', 2), ('--shrinkage', 'nan'), ('--prior-count', -1), ('--temperature', 0), ('--max-precision', -1)),
    *(
        ('--mean-spread', 2),
        ('--v-ratio', -1),
        ('--preset', 'x'),
        ('--preset',),
        ('--sigma2', 'x'),
        ('--lr', 'x'),
        ('x',),
    ),
    *(('--config', 'none.yaml'), ('--config', '.'), ('--epoch', 3), ('--opt', 'x'), ('--sched', 'x'), ('--aa', 'x')),
    *(('--resume', 'x'), ('--mean', 0.1, 0.2), ('--gp', 'x'), ('--interpolation', 'x'), ('--initial-checkpoint', 'x')),
    *(('--model-kwargs', text) for text in ('a', 'a={[]: 1}', 'a=1j', 'zzz_fits=x', '=', 'a=' + '(' * 500)),
    *(('--sigma2', 0), ('--sigma2', 'inf'), ('--output', '/dev/null/x.safetensors'), ('--output', 'x.txt')),
]


@pytest.mark.parametrize('options', FIT, ids=lambda options: ' '.join(map(str, options)))
def test_options_of_fit(caller, options, monkeypatch):
    monkeypatch.chdir(caller.folder)
    caller.fails(caller.fit(*options))


def test_recipes_of_fit(caller, tmp_path):
    rng, file = random.Random(6), tmp_path / 'a.yaml'
    good = f'model: {MODEL}\nval_split: validation\nopt: adamw\nlr: 1.0e-3\n'.encode()
    for content in [*broken_bytes(rng, good), *(rng.randbytes(rng.randrange(60)) for _ in range(5))]:
        file.write_bytes(content)
        caller.fit('--config', file)
    for key in KEYS:
        file.write_text(yaml.safe_dump({'model': MODEL, key: rng.choice(WRONG)}, allow_unicode=True))
        caller.fit('--config', file)
    file.write_bytes(good)
    assert 'error' not in caller.fit('--config', file)
    file.write_bytes(good + b'epoch: 3\n')
    caller.fails(caller.fit('--config', file), 'a.yaml:5: epoch: unknown key; did you mean epochs?')


@pytest.mark.parametrize('command', ['push', 'report', 'calibrate'])
@pytest.mark.parametrize(
    'options', [('--model', 'x'), ('--model', ''), ('--output', '/dev/null/x'), ('--use-ema',), ('--recipe', '.')]
)
def test_options(caller, command, options):
    if options[0] == '--recipe' and command != 'push':
        options = ('--split', 'none')
    if options == ('--model', ''):  # as if it were not given
        caller.saved()
        caller.save({k: v for k, v in caller.saved().items() if k != 'args'})
        (caller.run / 'args.yaml').unlink()
    caller.fails(getattr(caller, command)(*options))


@pytest.mark.parametrize('command', ['push', 'report', 'calibrate', 'fit'])
def test_misspelt_model(caller, command):
    """The message has the right name; check-hparams has it for the line of a recipe."""
    recipe = caller.folder / 'a.yaml'
    for name in ('test_renset.zzz_r4', 'test_resnet_zzz_r4', 'test_resnet.zz_r4', 'test_resnet.zzz-r4'):
        right = 'did you mean test_resnet.zzz_r4?' if 'zzz_' in name else 'asked for as test_resnet.zzz_r8'
        caller.fails(getattr(caller, command)('--model', name), right)
        recipe.write_text(f'device_modules: [timm_zzz]\nmodel: {name}\nval_split: validation\n')
        out = caller.call(check_hparams, recipe)
        assert out.startswith(f'{recipe}:2: error: model: ') and right in out


def test_options_of_push_with_calibrate(caller):
    data = ('--calibrate', '--data-dir', caller.good / 'data', '-j', 0, '--device', 'cpu')
    assert 'timm_zzz: error' not in caller.push(*data)
    caller.fails(caller.push('--calibrate'), '--calibrate: it needs held-out images, give --data-dir')
    caller.fails(caller.push(*data, '--split', 'none'), 'has no folder none')
    caller.fails(caller.push(*data, '--device', 'nowhere'), '--device: nowhere is not available')


@pytest.mark.parametrize('arguments', ['--workers -1', '--epochs x', '--images -1', '--rank 5', 'x'])
def test_wrong_arguments_are_errors_of_argparse(arguments, capsys):
    for module in (demo, hparams):
        with pytest.raises(SystemExit) as e:
            module.main(arguments.split())
        assert e.value.code == 2 and ': error: ' in capsys.readouterr().err


def test_demo(caller, tmp_path):
    (tmp_path / 'file').touch()
    for output in (tmp_path, tmp_path / 'file', tmp_path / 'file/x', '/dev/null/x'):
        caller.fails(caller.call(demo, '--output', output))
    caller.fails(caller.call(demo, '--output', tmp_path / 'x', '--device', 'nowhere'))


def test_recipes(caller, tmp_path, monkeypatch):
    rng, file = random.Random(5), tmp_path / 'a.yaml'
    good = b'model: test_resnet\nval_split: validation\nopt: adamw\nlr: 1.0e-3\n'

    def value(depth=0):
        kind = rng.random()
        if kind < 0.1 and depth < 3:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        if kind < 0.2 and depth < 3:
            return {rng.choice(KEYS): value(depth + 1) for _ in range(rng.randrange(3))}
        return rng.choice(WRONG) if kind < 0.9 else ''.join(rng.choices(string.printable, k=6))

    contents = [*broken_bytes(rng, good), *(rng.randbytes(rng.randrange(60)) for _ in range(10))]
    for _ in range(40):
        keys = rng.sample(KEYS, 4)
        contents.append(yaml.safe_dump({key: value() for key in keys}, allow_unicode=True).encode())
    for content in contents:
        file.write_bytes(content)
        caller.call(check_hparams, file, *(['--no-model'] if rng.random() < 0.7 else []))
    data = caller.good / 'data'
    (tmp_path / 'x/y').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'x/y')  # '../..' is a folder
    for bad in [
        *WRONG,
        str(data),
        str(data / 'train'),
        {'data_dir': str(data), 'class_map': 3},
        'hfds/x:y',
        {'split': 3},
    ]:
        for extra in ({}, {'class_map': str(caller.good / 'classes.txt')}, {'data_dir': str(data), 'num_classes': 2}):
            fit = dict(
                zzz_fit=bad, **rng.choice([{}, {'zzz_fit_class_map': rng.choice(WRONG)}, {'zzz_fit_preset': bad}])
            )
            file.write_text(yaml.safe_dump(dict(model=MODEL, model_kwargs=fit, **extra), allow_unicode=True))
            caller.call(check_hparams, file, '--no-model')
    for option in ('--lr', '--lr=x', '--x', '--model-kwargs=a', '-b', '--opt-kwargs=a={[]: 1}'):
        caller.fails(caller.call(check_hparams, file, option))
    for path in (tmp_path / 'none.yaml', tmp_path):
        assert "can't be read" in caller.call(check_hparams, path)
    for script in (tmp_path / 'none.py', tmp_path, caller.good / 'classes.txt'):
        caller.fails(caller.call(check_hparams, '--train-script', script, file), "can't ask")
