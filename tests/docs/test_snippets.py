"""Run the Python snippets and the commands of the pages, on tiny models and images and on the tests' own Hub.

``COVERED`` names the test that runs a snippet or script elsewhere, ``LEFT_OUT`` says why a command is run nowhere.
"""

import argparse
import inspect
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from oracles import distinct

from timm_zzz import push_to_hub, scores
from timm_zzz.__main__ import run_command
from timm_zzz.cli.check_hparams import check
from timm_zzz.cli.recipe import NEWEST, TrainParser
from timm_zzz.fit import PRESETS
from timm_zzz.head import INIT_STD, ROW_STD, ZZZHead
from timm_zzz.models.attach import HEAD_OPTIONS
from timm_zzz.models.registry import RANKS
from timm_zzz.optim import ZZZAdamW

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for pattern in ('README.md', 'docs/**/*.md')
    for path in sorted(ROOT.glob(pattern))
}
COVERED = {
    'README.md': 'tests/docs/test_readme.py',
    'docs/calibration.md': 'tests/test_scores.py',
    'docs/extending.md': 'tests/docs/test_docs.py',
    'docs/fit.md': 'tests/fit/test_fit.py',
    'docs/outliers.md': 'tests/test_scores.py',
    'validate.py': 'tests/test_end_to_end.py',
    'onnx_export.py': 'tests/test_fused_head.py',
    'demo': 'tests/cli/test_demo.py',
    'for': 'tests/cli/test_recipes.py',  # the loop of a sweep
}
LEFT_OUT = {
    'python3.11': 'installs: .ci/run does it',
    'git': 'downloads',
    'pip': 'downloads',
    'cp': 'copies from what git downloaded',
    'torchrun': 'needs several GPUs; its options of train.py are parsed',
    'tail': 'the end of a loop',
}
CLASSES = 12  # of the beetles


def blocks(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```', PAGES[page], re.M | re.S)


def commands(page):
    """Split the sh blocks of a page into command lines."""
    for block in blocks(page, 'sh'):
        if block.startswith('for '):
            yield 'for'
            continue
        lines = re.sub(r' *\\\n *', ' ', block).splitlines()
        yield from filter(None, (line.partition('  #')[0].strip() for line in lines))


def write_run(folder, name):
    """Write a checkpoint as train.py does."""
    folder.mkdir(parents=True)
    model = distinct(timm.create_model(name, num_classes=CLASSES))
    args = dict(model=name, num_classes=CLASSES, data_dir='DIR', val_split='validation', img_size=64, model_kwargs={})
    state = dict(epoch=0, arch=name, state_dict=model.state_dict(), metric=50.0, args=argparse.Namespace(**args))
    torch.save(state, folder / 'model_best.pth.tar')
    (folder / 'summary.csv').write_text('epoch,eval_top1\n0,50.0\n')
    return model


@pytest.fixture
def place(hub, beetles, backbone, tmp_path, monkeypatch):
    """A folder with all that the commands name."""
    monkeypatch.chdir(tmp_path)
    Path('DIR').symlink_to(beetles)
    Path('hparams').symlink_to(ROOT / 'hparams')
    for experiment, name in (('linear', 'test_resnet'), ('mine', 'test_resnet.zzz_r4'), ('zzz', 'test_resnet.zzz_r4')):
        model = write_run(Path('output/train', experiment), name)
    names = sorted(path.name for path in (beetles / 'train').iterdir())
    Path('names.txt').write_text('\n'.join(names))
    Path('RECIPE.yaml').write_text('lr: 1.0e-3\n')
    shutil.copytree(beetles / 'validation' / names[0], 'photos')
    push_to_hub(model, 'owner/bird-zzz', label_names=names)
    return tmp_path


def here(text):
    """Replace what a user fills in, and large models."""
    for there, mine in (
        (r'\bUSER/', 'owner/'),
        (r'--reject 0.01', '--reject 0.1'),  # of few validation images
        (r'--num-classes N\b', f'--num-classes {CLASSES}'),
        (r'\b(mobilenetv2_100|resnet50|resnet18)\.zzz_r8(?!\.yaml)', 'test_resnet.zzz_r8'),
    ):
        text = re.sub(there, mine, text)
    return text


def options_of_train(line):
    """Parse what follows train.py; an option that it lacks is a ValueError."""
    return TrainParser(NEWEST.options).parse_args(shlex.split(re.sub(r'.*train.py|--config \S+', '', line)))


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'sh')])
def test_commands(page, place, backbone, monkeypatch, capsys):
    for line in commands(page):
        line, small = here(line), ['--workers', '0', '--device', 'cpu']
        _, pipe, last = line.rpartition(' | ')
        monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(map(str, Path('photos').iterdir()))))
        first, *arguments = shlex.split(last if pipe else line)
        if 'train.py' in line and 'cp ' not in line:
            assert options_of_train(line).data_dir == 'DIR', line
        elif first != 'python':
            assert first in {*COVERED, *LEFT_OUT}, line
        elif arguments[0].startswith('benchmarks/'):  # take hours: their options exist, tests/benchmarks runs them
            script = (ROOT / arguments[0]).read_text()
            script += (ROOT / 'benchmarks/accuracy.py').read_text() if 'shared_parser' in script else ''
            assert all(f"'{option}'" in script for option in arguments if option.startswith('--')), line
        else:
            assert arguments[:2] == ['-m', 'timm_zzz'], line
            command, *rest = arguments[2:]
            if command in COVERED:
                continue
            if command == 'fit':
                small += ['--pretrained-path', str(backbone), '--model', 'test_resnet.zzz_r8', '--img-size', '64']
            elif command == 'push':
                small = small if '--calibrate' in rest else []
            elif command == 'hparams':
                small = []
            elif command == 'check-hparams':
                small = ['--dataset', '', '--val-split', 'validation', '--num-classes', str(CLASSES)]
            with pytest.raises(SystemExit) as status:
                run_command(command, [*rest, *small])
            assert not status.value.code, f'{line}\n{capsys.readouterr().out}'


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python') and page not in COVERED])
def test_python(page, place, monkeypatch):
    model = timm.create_model('test_resnet.zzz_r8', num_classes=CLASSES)
    shutil.copy('output/train/zzz/model_best.pth.tar', 'output/train/zzz/last.pth.tar')
    for i, path in enumerate(sorted(Path('photos').iterdir())[:2]):
        shutil.copy(path, f'{"ab"[i]}.jpg')

    class Writer:  # W&B and TensorBoard
        log = add_scalar = lambda self, *args: None

    names = dict(model=model, names=Path('names.txt').read_text().split('\n'), wandb=Writer(), writer=Writer(), epoch=0)
    for snippet in blocks(page, 'python'):
        if snippet.startswith('from pathlib'):  # the folders from lists, in tests/cli/test_recipes.py
            continue
        for there, mine in (("revision='v1', ", ''), ("'cuda'", "'cpu'"), ('224, 224', '64, 64')):
            snippet = snippet.replace(there, mine)
        exec(compile(here(snippet), page, 'exec'), names)


def test_recipe_of_ones_own(place):
    """The YAML of docs/recipes.md, with a tiny model, has no error."""
    (text,) = blocks('docs/recipes.md', 'yaml')
    Path('mine.yaml').write_text(text.replace('vit_base_patch16_224.augreg_in21k', 'test_vit'))
    given = dict(data_dir='DIR', num_classes=CLASSES, val_split='validation')
    assert [finding for finding in check('mine.yaml', given=given) if finding.level == 'error'] == []


def test_every_snippet_is_run_somewhere():
    for page in PAGES:
        if page in COVERED:
            assert Path(page).name in (ROOT / COVERED[page]).read_text(encoding='utf-8')
    assert {*scores.METHODS} <= {*re.findall(r'^\| `(\w+)` \|', PAGES['docs/outliers.md'], re.M)}


def test_options():
    """docs/options.md has every option of a head and of the optimiser, and their defaults."""
    head, optimiser = PAGES['docs/options.md'].split('## Arguments of a head')[1].split('## The optimiser')
    rows = dict(re.findall(r'^\| (`.*?) \| (.*?) \|', head, re.M))
    assert sorted(re.findall(r'`(\w+)`', ''.join(rows))) == sorted(HEAD_OPTIONS)
    parameters = inspect.signature(ZZZHead).parameters
    assert rows['`init`'] == f'`{parameters["init"].default!r}`'
    assert float(rows['`sigma2_min`, `v_min`']) == parameters['v_min'].default == parameters['sigma2_min'].default
    for init, sigma2, v in (('flat', 1 / 16, 1 / 160), ('reference', 0.69, 0.69)):
        new = scores.class_gaussians_of(ZZZHead(4, 8, 2, init=init))
        assert (new.sigma2.item(), new.v.mean().item()) == pytest.approx((sigma2, v), rel=0.01)
    rows = dict(re.findall(r'^\| `(\w+)` \| (.*?) \|', optimiser, re.M))
    own = {*inspect.signature(ZZZAdamW).parameters} - {*inspect.signature(torch.optim.AdamW).parameters} - {'kwargs'}
    assert {*rows} == own
    for name in own - {'head_weight_decay'}:
        assert float(rows[name]) == inspect.signature(ZZZAdamW).parameters[name].default


def test_numbers():
    """Numbers in the pages that the code has too."""
    assert 'Ranks 4, 8, 16 and 0' in PAGES['README.md'] and sorted(RANKS) == [0, 4, 8, 16]
    (row,) = re.findall(r'^\| `finetune` \| .*', PAGES['docs/fit.md'], re.M)
    preset = PRESETS['finetune']
    assert re.findall(r'`(\w+)` ([\d.]+)', row) == [(name, str(preset[name])) for name in ('mean_spread', 'v_ratio')]
    assert row.endswith('| 1/16 |') and preset['sigma2'] == 1 / 16
    assert f'Rows start at {ROW_STD} per coordinate' in PAGES['docs/recipes.md'] and INIT_STD / ROW_STD == 4
    recipes = {path.stem.partition('_')[0] for path in (ROOT / 'hparams').glob('*.yaml')} - {'quickstart'}
    assert len(recipes) == 11 and 'eleven' in PAGES['README.md']
