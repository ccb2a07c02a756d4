"""Train, validate, resume: with timm's library parts always, with its real scripts where TIMM_SCRIPTS names a clone."""

import csv
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from timm_zzz import from_pretrained
from timm_zzz.data import shipped_files


def test_library_parts(beetles, tmp_path):
    from timm_zzz.cli.demo import COARSE_RATES, images_of, train
    from timm_zzz.metrics import evaluate, predict

    device = torch.device('cpu')
    model = timm.create_model('test_resnet.zzz_r8', num_classes=12)
    train(model, beetles / 'train', 1, COARSE_RATES, device, 1)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    again = timm.create_model('test_resnet.zzz_r8', num_classes=12, checkpoint_path=str(tmp_path / 'last.pth.tar'))
    loader = images_of(beetles / 'validation', device, 1)
    assert torch.equal(*(torch.cat([logits for _, logits, _ in predict(m, loader, device)]) for m in (model, again)))
    result = evaluate(model, loader, device)
    assert 0 <= result.top1 <= 100 and result.nll.min() > 0


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    file = tmp_path_factory.mktemp('backbone') / 'mobilenetv2_100.safetensors'
    state = timm.create_model('mobilenetv2_100').state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith('classifier.')}, file)
    return file


def test_commands_of_the_readme(root, timm_scripts, beetles, backbone, tmp_path):
    """Those that train and validate, as they stand there, on fewer and smaller images."""
    blocks = re.findall(r'```sh\n(.*?)```', (root / 'README.md').read_text(), re.S)
    block = ''.join(code for code in blocks if re.search('^cp |validate.py --model', code, re.M))
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    small = f'--num-classes 12 --img-size 64 --batch-size 16 --workers 1 --device {device}'
    for there, here in (
        (r'git clone .*', ''),
        (r'pytorch-image-models/', f'{timm_scripts}/'),
        (r'hparams/', f'{root}/hparams/'),
        (r'\bDIR\b', str(beetles)),
        (r'--num-classes N', small),
        (r'--experiment mine', f'--experiment mine --epochs 1 --pretrained-path {backbone}'),
        (r'\bpython\b', shlex.quote(sys.executable)),
    ):
        block, count = re.subn(there, here, block)
        assert count
    result = subprocess.run(['bash', '-euc', block], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    (row,) = csv.DictReader((tmp_path / 'output/train/mine/summary.csv').open())
    top1 = float(re.search(r'"top1": ([\d.]+)', result.stdout)[1])
    assert top1 == pytest.approx(float(row['eval_top1']), abs=1e-3)


def test_real_scripts(hub, timm_scripts, beetles, backbone, run, tmp_path):
    for script in ('train.py', 'validate.py'):  # away from the clone, whose timm they would import
        shutil.copy(timm_scripts / script, tmp_path)
    recipe = shipped_files('hparams', '.yaml')['quickstart_mobilenetv2_100.zzz_r8']
    train = ['train.py', '--config', recipe, '--data-dir', beetles, '--num-classes', 12, '--pretrained-path', backbone]
    train += ['--img-size', 64, '--batch-size', 16, '--workers', 1, '--device', 'cpu', '--output', 'out', '--model-ema']
    run(*train, '--experiment', 'a', '--epochs', 2)
    rows = list(csv.DictReader((tmp_path / 'out/a/summary.csv').open()))
    assert len(rows) == 2 and all(float(row['train_loss']) > 0 for row in rows)

    validate = ['-m', 'timm_zzz', 'validate.py', '--model', 'mobilenetv2_100.zzz_r8', '--num-classes', 12]
    validate += ['--data-dir', beetles, '--split', 'validation', '--img-size', 64, '--workers', 1, '--device', 'cpu']
    validate += ['--amp', '--amp-dtype', 'bfloat16', '--batch-size', 16]
    out = run(*validate, '--checkpoint', 'out/a/last.pth.tar', '--use-ema').stdout  # summary.csv has the EMA's metrics
    top1 = float(re.search(r'"top1": ([\d.]+)', out)[1])
    assert top1 == pytest.approx(float(rows[-1]['eval_top1']), abs=1e-3)

    run(*train, '--experiment', 'b', '--epochs', 3, '--resume', 'out/a/last.pth.tar')
    resumed = list(csv.DictReader((tmp_path / 'out/b/summary.csv').open()))
    assert [row['epoch'] for row in resumed] == ['2']

    checkpoint = 'out/a/last.pth.tar'
    push = ['-m', 'timm_zzz', 'push', checkpoint, 'owner/beetles', '--use-ema', '--data-dir', beetles]
    run(*push, '--recipe', recipe)
    model = from_pretrained('owner/beetles')
    averaged = torch.load(tmp_path / checkpoint, weights_only=False)['state_dict_ema']
    assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())
    assert f'value: {round(float(rows[-1]["eval_top1"]), 4)}' in hub.files('owner/beetles')['README.md'].decode()
    assert model.pretrained_cfg['label_names'] == sorted(path.name for path in (beetles / 'train').iterdir())
    out = run(*validate, '--checkpoint', '', '--model', 'hf-hub:owner/beetles', '--pretrained').stdout
    assert float(re.search(r'"top1": ([\d.]+)', out)[1]) == pytest.approx(top1, abs=1e-3)


def test_start_from_the_data(hub, timm_scripts, beetles, run, tmp_path):
    """By train.py's own options; a checkpoint precedes, and what reads the run later needs no images."""
    shutil.copy(timm_scripts / 'train.py', tmp_path)
    shutil.copytree(beetles / 'train', tmp_path / 'images')
    file = tmp_path / 'backbone.safetensors'
    state = timm.create_model('test_resnet').state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith('fc.')}, file)
    train = ['train.py', '--device-modules', 'timm_zzz', '--model', 'test_resnet.zzz_r4', '--num-classes', 12]
    train += ['--data-dir', beetles, '--pretrained', '--pretrained-path', file, '--batch-size', 16, '--workers', 1]
    train += ['--device', 'cpu', '--output', 'out', '--model-kwargs', 'zzz_fit=images']
    still = ['--lr', 1e-12, '--warmup-epochs', 0, '--weight-decay', 0, '--epochs', 1]

    def head(experiment):
        saved = torch.load(tmp_path / f'out/{experiment}/last.pth.tar', weights_only=False)['state_dict']
        return saved['fc.weight'], saved['fc.sigma2_raw'], saved['fc.bias']

    log = run(*train, *still, '--experiment', 'a').stderr
    assert 'fc: fitted to 144 images of 12 classes, finetune' in log
    model = timm.create_model(
        'test_resnet.zzz_r4',
        num_classes=12,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(file), num_classes=-1),
        zzz_fit=beetles / 'train',
    )
    expected = model.fc.weight, model.fc.sigma2_raw, model.fc.bias
    torch.testing.assert_close(head('a'), tuple(t.detach() for t in expected), rtol=1e-3, atol=1e-3)

    run(*train, '--lr', 0.1, '--warmup-epochs', 0, '--epochs', 1, '--experiment', 'b')
    assert (head('b')[0] - head('a')[0]).abs().max() > 0.02
    run(*train, *still, '--experiment', 'c', '--initial-checkpoint', 'out/b/last.pth.tar')
    torch.testing.assert_close(head('c'), head('b'), rtol=1e-4, atol=1e-4)
    resume = ['--resume', 'out/b/last.pth.tar', '--epochs', 2]
    run(*train, *still[:-2], *resume, '--experiment', 'd', '--no-resume-opt')
    torch.testing.assert_close(head('d'), head('b'), rtol=1e-4, atol=1e-4)

    shutil.rmtree(tmp_path / 'images')
    run('-m', 'timm_zzz', 'push', 'out/b/last.pth.tar', 'owner/fitted', '--data-dir', beetles)
    torch.testing.assert_close(from_pretrained('owner/fitted').fc.weight, head('b')[0], rtol=0, atol=0)
    assert 'zzz_fit' not in hub.files('owner/fitted')['config.json'].decode()


@pytest.mark.parametrize(
    'device, changes',
    [
        ('cpu', dict(model='test_vit.zzz_r8', img_size=160)),
        pytest.param(
            'cuda',
            dict(torchcompile='inductor'),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
        ),
    ],
)
def test_recipe_from_training_to_export(timm_scripts, beetles, run, tmp_path, device, changes):
    """A recipe with random weights: bf16, EMA and on a GPU torch.compile; train, resume, validate, export."""
    pytest.importorskip('onnx')
    for script in ('train.py', 'validate.py', 'onnx_export.py'):
        shutil.copy(timm_scripts / script, tmp_path)
    with open(shipped_files('hparams', '.yaml')['cub200_vit_base_patch16_224.zzz_r8']) as f:
        recipe = yaml.safe_load(f)
    recipe.update(pretrained=False, dataset='', val_split='validation', num_classes=12, warmup_epochs=1, **changes)
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    train = ['train.py', '--config', 'recipe.yaml', '--data-dir', beetles, '--device', device, '--output', 'out']
    train += ['--batch-size', 16, '--workers', 1, '--model-ema', '--model-ema-decay', 0.9]
    run(*train, '--experiment', 'a', '--epochs', 2)
    run(*train, '--experiment', 'b', '--epochs', 3, '--resume', 'out/a/last.pth.tar')
    rows = list(csv.DictReader((tmp_path / 'out/b/summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['2']

    model = ['--model', recipe['model'], '--num-classes', 12, '--checkpoint', 'out/b/last.pth.tar']
    validate = ['-m', 'timm_zzz', 'validate.py', *model, '--use-ema', '--data-dir', beetles, '--split', 'validation']
    validate += ['--amp', '--amp-dtype', 'bfloat16', '--device', device, '--batch-size', 16, '--workers', 1]
    for options in ([], ['--reparam']):
        top1 = float(re.search(r'"top1": ([\d.]+)', run(*validate, *options).stdout)[1])
        # 48 images; fused logits are rounded otherwise
        assert top1 == pytest.approx(float(rows[0]['eval_top1']), abs=3 if options else 1e-3)
    run('-m', 'timm_zzz', 'onnx_export.py', 'model.onnx', *model, '--reparam')
    assert (tmp_path / 'model.onnx').stat().st_size > 1e5
