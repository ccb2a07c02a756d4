"""``python -m timm_zzz check-hparams``, with argparse itself and timm's train.py to compare with."""

import argparse
import random
import re
import runpy
import string
import sys
from pathlib import Path

import pytest
import timm
import yaml
from timm.data import create_dataset

from timm_zzz.cli import check_hparams
from timm_zzz.cli.check_hparams import check, main
from timm_zzz.cli.recipe import NEWEST, Option, Recipe, TrainParser, ask_script

RECIPES = sorted((Path(__file__).resolve().parents[2] / 'hparams').glob('*.yaml'))
GOOD = """\
device_modules: [timm_zzz]
model: test_vit.zzz_r4
num_classes: 5
train_split: train
val_split: validation
opt: zzzadamw
opt_kwargs: {head_lr_scale: 50.0}
lr: 1e-5
warmup_lr: 0.0
"""
PLAIN = """\
model: test_vit
num_classes: 5
train_split: train
val_split: validation
opt: adamw
"""
FIXED = PLAIN.replace('test_vit', 'vit_tiny_patch16_224')
TINY = "vit_tiny_patch16_224: Input height (128) doesn't match model (224)."


def findings(tmp_path, text, **kwargs):
    file = tmp_path / 'recipe.yaml'
    file.write_text(text)
    return check(file, **kwargs)


def changed(recipe, change):
    """A recipe with lines added, or replaced where they have its keys; a key alone takes its line out."""
    entries = {line.partition(':')[0]: line for line in recipe.splitlines()}
    for entry in re.split(r'\n(?! )', change):
        key, colon, _ = entry.partition(':')
        if colon:
            entries[key] = entry
        else:
            del entries[key]
    return '\n'.join(entries.values()) + '\n'


@pytest.mark.parametrize('file', RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_pass(file, capsys):
    twin = [] if 'zzz' in file.stem else ['--no-model']  # test_recipes.py builds every model
    assert main([str(file), *twin]) == 0
    assert capsys.readouterr().out == f'{file}: OK\n'


@pytest.mark.parametrize(
    'text',
    [
        GOOD,
        PLAIN,
        'val_split: test\n',
        changed(PLAIN, 'model: hf-hub:user/model'),
        changed(PLAIN, 'model_kwargs: {device: cuda}'),
        changed(GOOD, 'model_kwargs: {zzz_init: reference}'),
        changed(PLAIN, 'head_init_scale: 0.0'),
        changed(PLAIN, 'opt: Lookahead_AdamW\nopt_kwargs: {betas: [0.9, 0.95]}\nlayer_decay: 0.7'),
        changed(PLAIN, "dataset: HFDS/user/set\nval_split: test[:50%]+extra\nepochs: '20'\nseed: 0x10"),
        changed(PLAIN, 'img_size: 128'),  # test_vit takes any size that its patches divide
        changed(FIXED, 'img_size: 128\nmodel_kwargs: {img_size: 128}'),
        changed(FIXED, 'pretrained: true\ninput_size: [1, 224, 224]\nmean: [0.5]'),
    ],
)
def test_clean(tmp_path, text, capsys):
    (tmp_path / 'a.yaml').write_text(text)
    assert main([str(tmp_path / 'a.yaml')]) == 0
    assert capsys.readouterr().out == f'{tmp_path}/a.yaml: OK\n'


# The line, level and text of the only finding, without a model
ONE = [
    # keys
    (GOOD, 'val-split: test\nval_split', 9, 'error', 'val-split: unknown key; did you mean val_split?'),
    (GOOD, 'learning_rate: 0.1', 10, 'error', 'did you mean lr?'),
    (GOOD, 'j: 4', 10, 'error', 'did you mean workers?'),
    (GOOD, 'qqqqqq: 4', 10, 'error', 'qqqqqq: unknown key'),
    (GOOD, 'zzz_rank: 4', 10, 'error', 'it belongs in model_kwargs: {zzz_rank: ...}'),
    (GOOD, 'head_weight_decay: 0.1', 10, 'error', 'it belongs in opt_kwargs'),
    (GOOD, 'config: other.yaml', 10, 'error', 'command line only'),
    (GOOD, 'on: true', 10, 'error', 'a key that is not text for YAML: on'),
    (GOOD, '[a, b]: 3', 10, 'error', 'not text for YAML: a list'),
    # values
    (GOOD, 'lr: fast', 8, 'error', 'lr: a number is needed, not fast'),
    (GOOD, 'epochs: 1e2', 10, 'error', 'epochs: a whole number is needed, not 1e2'),
    (GOOD, 'epochs: 20.0', 10, 'error', 'not 20.0: write 20'),
    (GOOD, 'epochs: null', 10, 'error', 'epochs: null in place of a value; without the line it would be 300'),
    (GOOD, 'epochs: [20]', 10, 'error', 'one value is needed, not a list'),
    (GOOD, 'lr: .nan', 8, 'error', 'not a finite number: .nan'),
    (GOOD, 'seed: 042', 10, 'error', 'YAML reads 042 as 34'),
    (GOOD, 'epochs: 1:30', 10, 'error', 'YAML reads 1:30 as 90'),
    (GOOD, 'experiment: 42', 10, 'error', 'YAML reads 42 as a number; quote it'),
    (GOOD, 'experiment: 2024-01-31', 10, 'error', 'as a date; quote it'),
    (GOOD, 'aa: off', 10, 'error', 'YAML reads off as false; quote it'),
    (GOOD, "amp: 'false'", 10, 'error', "write true or false, not 'false'; any text counts as true"),
    (GOOD, 'torchcompile: true', 10, 'error', 'write inductor'),
    (GOOD, 'mean: 0.5', 10, 'error', 'mean: a list is needed, write [0.5]'),
    (GOOD, 'mean: [0.5, 0.5]', 10, 'error', 'mean: 3 numbers are needed, one for each channel, or 1, not 2'),
    (GOOD, 'scale: [1e-1, 1.0]', 10, 'error', '1e-1 stays text in a list: write 1.0e-1'),
    (GOOD, 'scale: [0.5]', 10, 'error', '2 numbers are needed, not 1'),
    (GOOD, 'scale:\n  - 0.5\n  - true', 12, 'error', 'YAML reads true as true'),
    (GOOD, 'input_size: [3, 160]', 10, 'error', '3 numbers are needed, not 2'),
    (GOOD, 'device_modules: timm_zzz', 1, 'error', 'write [timm_zzz]: text is taken apart letter by letter'),
    (GOOD, 'train_size_schedule: fast', 10, 'error', "fast is none of 'constant', 'progressive'"),
    (GOOD, 'amp_dtype: bf16', 10, 'error', "bf16 is none of 'float16', 'bfloat16'"),
    (GOOD, 'model_kwargs: a=1', 10, 'error', 'a mapping {KEY: VALUE, ...} is needed, not a=1'),
    (GOOD, 'opt_kwargs: {head_lr_scale: 5e1}', 7, 'error', 'YAML reads 5e1 as text: write 5.0e+1'),
    (GOOD, 'lr: 1.0e-4\nlr : 2.0e-4', 10, 'error', 'lr: written twice, first in line 8'),
    (GOOD, 'opt_kwargs: {eps: 1.0e-8, eps: 1.0e-7}', 7, 'error', 'opt_kwargs.eps: written twice'),
    (GOOD, 'experiment: 2024-13-45', 10, 'error', "YAML can't read 2024-13-45"),
    (GOOD, 'experiment: !!python/name:os.system x', 10, 'error', 'could not determine a constructor'),
    # plugin
    (GOOD, 'device_modules', 1, 'error', 'model: the plugin is not imported: add the line device_modules: [timm_zzz]'),
    (PLAIN, 'model_kwargs: {zzz_rank: 4}', 6, 'error', 'model_kwargs.zzz_rank: the plugin is not imported'),
    (GOOD, 'device_modules: [timm_zzz, nowhere]', 1, 'note', 'Python finds no module nowhere here'),
    # data
    (PLAIN, 'val_split', 3, 'error', 'val_split is missing'),
    (PLAIN, 'val_split\ndataset: hfds/user/set', 3, 'note', 'the data set needs a split named validation'),
    (PLAIN, 'val_split: training', 4, 'error', 'evaluates on the images of train_split'),
    (PLAIN, "val_split: 'test[:50%]'", 4, 'error', 'slices'),
    (PLAIN, 'dataset: hfds/user/set\nval_split: train', 4, 'error', 'evaluates on images of train_split, train'),
    (PLAIN, 'dataset: tfds/set\ntrain_split: train+validation', 4, 'error', 'evaluates on images'),
    (PLAIN, "val_split: ''", 4, 'note', 'no evaluation'),
    (PLAIN, 'dataset: torch/cifar', 6, 'error', 'timm knows no torch/cifar; did you mean cifar10'),
    (PLAIN, 'dataset: imagenet', 6, 'error', 'does not start with torch/, hfds/'),
    (PLAIN, 'dataset: hfds/user/set\nnum_classes', 5, 'note', 'num_classes is missing'),
    (PLAIN, 'data_dir: /nowhere', 6, 'note', 'only --data-dir beats it'),
    # files
    (PLAIN, 'initial_checkpoint: none.pth', 6, 'error', 'initial_checkpoint: no such file here: none.pth'),
    (PLAIN, 'resume: /', 6, 'error', 'resume: no such file here: /'),
    (PLAIN, 'pretrained: true\npretrained_path: none.pth', 7, 'error', 'pretrained_path: no such file here: none.pth'),
    (PLAIN, 'pretrained_path: THIS_FILE', 6, 'error', 'without pretrained: true train.py does not load it'),
    (PLAIN, 'class_map: /none.txt', 6, 'error', 'class_map: no such file here: /none.txt'),
    (PLAIN, 'class_map: none.txt', 6, 'note', 'no such file here: none.txt; train.py looks in the folders'),
    (PLAIN, 'class_map: THIS_FILE', 6, 'error', 'class_map: expected a .txt file'),
    # numbers that no training can do with, each on its own line
    *(
        (PLAIN, f'{key}: {value}', 6, 'error', f'{key}: {wanted} is needed, not {shown}')
        for key, value, wanted, shown in (
            ('smoothing', 2, 'a fraction of at least 0, below 1,', 2),
            ('smoothing', -0.1, 'a fraction of at least 0, below 1,', -0.1),
            ('smoothing', 1.0, 'a fraction of at least 0, below 1,', 1.0),
            ('drop_path', 1, 'a fraction of at least 0, below 1,', 1),
            ('opt_betas', [0.9, 1.0], 'a fraction of at least 0, below 1,', 1.0),
            ('model_ema_decay', 1.5, 'a fraction of at least 0, below 1,', 1.5),
            ('reprob', 1.5, 'a fraction of at least 0, at most 1,', 1.5),
            ('mixup_prob', -1, 'a fraction of at least 0, at most 1,', -1),
            ('scale', [0.5, 1.5], 'a fraction above 0, at most 1,', 1.5),
            ('layer_decay', 0, 'a fraction above 0, at most 1,', 0),
            ('lr', 0, 'above 0', 0),  # train.py takes lr_base for it
            ('lr', -0.1, 'above 0', -0.1),
            ('clip_grad', 0.0, 'above 0', 0.0),
            ('decay_epochs', 0, 'above 0', 0),
            ('weight_decay', -0.01, 'at least 0', -0.01),
            ('warmup_lr', -1, 'at least 0', -1),
            ('mixup', -0.2, 'at least 0', -0.2),
            ('cutmix', -1, 'at least 0', -1),
            ('batch_size', 0, 'at least 1', 0),
            ('epochs', -1, 'at least 1', -1),
            ('grad_accum_steps', 0, 'at least 1', 0),
            ('val_interval', 0, 'at least 1', 0),
            ('log_interval', 0, 'at least 1', 0),
            ('seed', -1, 'at least 0, at most 4294967295,', -1),
        )
    ),
    (PLAIN, 'aug_splits: 1', 6, 'error', 'aug_splits: 0 or at least 2 is needed, not 1'),
    (PLAIN, 'jsd_loss: true', 6, 'error', 'jsd_loss: it needs aug_splits, at least 2'),
    (PLAIN, 'interpolation: bilinar', 6, 'error', "bilinar is none of '', 'nearest', 'bilinear'"),
    (PLAIN, 'aa: rnd-m9', 6, 'error', 'aa: timm: Unknown AutoAugment config section'),
    # learning rates: of Adam and its kin from 0.1 on, of the head too
    (
        PLAIN,
        'lr: 100.0',
        6,
        'note',
        'lr: a learning rate of 100 is large for adamw: each update moves weights',
    ),
    (PLAIN, 'opt: lion\nlr: 0.2', 6, 'note', 'a learning rate of 0.2'),
    (PLAIN, 'lr_base: 0.2\nbatch_size: 1024\nlr_base_scale: sqrt', 6, 'note', 'lr_base: a learning rate of 0.4'),
    (GOOD, 'lr: 0.01', 7, 'note', 'opt_kwargs.head_lr_scale: a learning rate of 0.5 for the head is'),
]
# The whole text of a file that is no recipe
ONE += [
    ('', text, line, 'error', message)
    for text, line, message in (
        ('a: 1\nb: [1\nc: 2\n', 3, 'no YAML: '),
        ('a: 1\n\tb: 2\n', 2, 'no YAML: '),
        ('a: *b\n', 1, 'undefined alias'),
        ('a: 1\n\x07\n', 2, 'not allowed'),
        ('a: 1\n---\nb: 1\n', 2, 'single document'),
        ('\n# text\nmodel\n', 3, 'no mapping'),
        ('# only a comment\n', 1, 'empty'),
        ('<<: 3\n', 1, 'no YAML: '),
        ('[' * 1000, 1, 'nested too deeply'),
    )
]
# The same, with a model
BUILT = [
    # model
    (PLAIN, 'model: test_vot', 1, 'error', 'timm knows no test_vot; did you mean test_vit'),
    (PLAIN, 'model: resnet50.a1_in2k', 1, 'error', 'timm knows no weights a1_in2k of resnet50; did you mean a1_in1k'),
    (GOOD, 'model: test_vot.zzz_r4', 2, 'error', 'did you mean test_vit.zzz_r4?'),
    (GOOD, 'model: test_vit.zzz_r5', 2, 'error', 'model_kwargs: {zzz_rank: 5}'),
    (PLAIN, 'model: timm/resnet50', 1, 'error', 'hf-hub:timm/resnet50'),
    (PLAIN, 'pretrained: true\nmodel: vit_base_patch32_plus_256', 6, 'error', 'timm has no weights for'),
    (GOOD, 'model_kwargs: {zzz_ranc: 4}', 10, 'error', 'no option of a ZZZ head; did you mean zzz_rank?'),
    (GOOD, 'model_kwargs:\n  zzz_rank: 4000', 11, 'error', 'rank'),
    (GOOD, 'model_kwargs:\n  zzz_init: random', 11, 'error', "init: expected 'flat' or 'reference', got 'random'"),
    (PLAIN, 'model_kwargs:\n  a: 1', 7, 'error', "unexpected keyword argument 'a'"),
    (PLAIN, 'model_kwargs: {num_classes: 3}', 6, 'error', 'num_classes has an option of its own'),
    (PLAIN, 'drop_block: 0.1', 6, 'error', "unexpected keyword argument 'drop_block_rate'"),
    (PLAIN, 'num_classes: 0', 2, 'error', 'at least 1 is needed, not 0'),
    (
        GOOD,
        'opt: adamw\nopt_kwargs\nmodel: vit_base_patch16_224_in21k.zzz_r8',
        2,
        'note',
        'the present one is vit_base_patch16_224.augreg_in21k.zzz_r8',
    ),
    # sizes
    (FIXED, 'img_size: 128', 6, 'error', f'images of 128 x 128 do not fit {TINY}; add model_kwargs: {{img_size: 128}}'),
    (FIXED, 'input_size: [3, 128, 160]', 6, 'error', 'add model_kwargs: {img_size: [128, 160]}'),
    (FIXED, 'model_kwargs:\n  img_size: 128', 7, 'error', 'train.py needs img_size: 128 too'),
    (FIXED, 'train_img_sizes: [224, 128]', 6, 'error', 'images of 128 x 128'),
    (FIXED, 'img_size: 130\nmodel_kwargs: {dynamic_img_size: true}', 6, 'error', 'divisible'),
    (FIXED, 'img_size: -16', 6, 'error', 'img_size: at least 1 is needed, not -16'),
    (GOOD, 'model: vit_tiny_patch16_224.zzz_r8\nimg_size: 128', 10, 'error', 'images of 128 x 128 do not fit'),
    (PLAIN, 'img_size: 160\ninput_size: [3, 64, 64]', 6, 'error', 'one of the two'),
    (PLAIN, 'in_chans: 1\ninput_size: [3, 160, 160]', 6, 'error', 'one of the two'),
    (PLAIN, 'crop_pct: 87.5', 6, 'error', 'a fraction above 0, at most 1, is needed, not 87.5'),
    # optimiser and schedule
    (GOOD, 'opt: 3', 6, 'error', 'YAML reads 3 as a number'),
    (GOOD, 'opt: zzadamw', 6, 'error', 'timm knows no zzadamw; did you mean zzzadamw?'),
    (PLAIN, 'opt: fused_adamw', 5, 'error', 'timm knows no fused_adamw'),
    (GOOD, 'opt_kwargs: {head_lr: 50.0}', 7, 'error', 'no option of zzzadamw; did you mean head_lr_scale?'),
    (PLAIN, 'opt_kwargs: {head_lr_scale: 50.0}', 6, 'error', 'no option of adamw'),
    (GOOD, 'opt_kwargs:\n  eps: 1.0e-8\n  head_lr_scale: -1.0', 9, 'error', 'opt_kwargs.head_lr_scale: timm: '),
    (GOOD, "opt_kwargs: {head_lr_scale: '5'}\nwarmup_lr: 0.1", 7, 'error', 'expected a finite number > 0'),
    (GOOD, 'model: test_vit\nopt_kwargs', 6, 'error', 'none of the parameters belongs to a ZZZ head'),
    (GOOD, 'sched: cosinus', 10, 'error', "Unknown scheduler 'cosinus'"),
    (PLAIN, 'opt_kwargs:\n  foreach: true\n  betas: [0.9, 2.0]', 8, 'error', 'opt_kwargs.betas: timm: Invalid beta'),
    (PLAIN, 'sched: wsd\nepochs: 20\ndecay_epochs: 30', 7, 'error', 'epochs: timm: wsd schedule requires'),
    (PLAIN, 'epochs: 20\nsched: plateau\nsched_on_updates: true', 8, 'error', 'sched_on_updates: timm: Plateau LR'),
    (GOOD, 'sched: none', 10, 'error', 'none stops train.py'),
    (GOOD, 'warmup_lr: 1e-6', 9, 'note', 'warmup_lr is 1e-06, and 5e-05 for the head; write warmup_lr: 0.0'),
    (GOOD, 'warmup_lr', 7, 'note', 'warmup_lr is 1e-05, and 0.0005 for the head'),
    (GOOD, 'min_lr: 1.0e-7', 10, 'note', 'min_lr: min_lr is 1e-07'),
    (GOOD, 'epochs: 4', 10, 'note', '5 epochs of warm-up out of 4 in all'),
    (
        GOOD,
        'clip_grad: 1.0\nclip_mode: agc',
        11,
        'note',
        'sigma2_raw and bias of a ZZZ head, and clips its others: take norm',
    ),
    (GOOD, 'head_init_scale: 0.0', 10, 'error', "it multiplies a ZZZ head's class means and biases after"),
    (PLAIN, 'model_ema: true', 6, 'note', 'picks the best checkpoint'),
    (PLAIN, 'workers: 0', 6, 'note', 'within the training process'),
]


CASES = [(False, *case) for case in ONE] + [(True, *case) for case in BUILT]


@pytest.mark.parametrize(
    'build_model, recipe, change, line, level, text', CASES, ids=[f'{i}-{c[2]!r:.40}' for i, c in enumerate(CASES)]
)
def test_one_finding(tmp_path, build_model, recipe, change, line, level, text):
    if 'wsd' in change and not hasattr(timm.models, 'resolve_model_input_args'):
        pytest.skip('timm before 1.0.31 has no schedule wsd')
    change = change.replace('THIS_FILE', __file__)
    found = findings(tmp_path, changed(recipe, change) if recipe else change, build_model=build_model)
    assert [(f.line, f.level) for f in found] == [(line, level)], found
    assert text in found[0].message


@pytest.mark.parametrize(
    'text, lines',
    [
        # one wrong option of the head or the optimiser hides nothing
        (changed(FIXED, 'device_modules: [timm_zzz]\nmodel_kwargs:\n  zzz_ranc: 4\n  a: 1\nimg_size: 128'), [8, 9, 10]),
        (changed(GOOD, 'model: test_vit\nmodel_kwargs: {zzz_ranc: 4}\nsched: cosinus'), [10, 11]),
        (changed(PLAIN, 'opt_kwargs:\n  head_lr: 2\n  betas: [2.0, 0.9]\n  eps: -1.0'), [7, 8, 9]),
        (changed(PLAIN, 'model_kwargs:\n  a: 1\n  num_classes: 3\nsmoothing: 2\nsched: x'), [7, 8, 9, 10]),
    ],
)
def test_one_error_hides_no_other(tmp_path, text, lines):
    found = findings(tmp_path, text)
    assert [(f.line, f.level) for f in found] == [(line, 'error') for line in lines], found


@pytest.mark.parametrize('dataset', ['torch/cifar10', 'torch/imagenet', 'torch/inaturalist'])
def test_timm_finds_the_default_validation_split_of_torch_data_sets(tmp_path, dataset):
    assert findings(tmp_path, changed(PLAIN, f'val_split\ndataset: {dataset}')) == []


def test_the_class_map_is_counted_as_timm_counts(tmp_path):
    (tmp_path / 'data/train').mkdir(parents=True)
    (tmp_path / 'data/validation').mkdir()
    (tmp_path / 'data/train/near.txt').write_text('a\nb\n\nd\ne\n')  # a blank line is a class
    (tmp_path / 'map.txt').write_text('a\nb\nc\nd\ne\nf\n')
    near = changed(PLAIN, f'data_dir: {tmp_path}/data\nclass_map: near.txt')
    assert [f.level for f in findings(tmp_path, near)] == ['note']  # that of data_dir
    for count, level in ((5, 'error'), (6, None), (7, 'note')):
        found = findings(tmp_path, changed(PLAIN, f'num_classes: {count}\nclass_map: {tmp_path}/map.txt'))
        text = f'class_map: 6 classes, num_classes says {count}'
        assert [(f.level, f.message) for f in found] == ([(level, text)] if level else [])
    (tmp_path / 'map.txt').write_text('a\na\n')
    found = findings(tmp_path, changed(PLAIN, f'class_map: {tmp_path}/map.txt'))
    assert [(f.line, f.level) for f in found] == [(6, 'error')] and 'is its line 1 there twice?' in found[0].message


def test_all_in_one_pass_by_line(tmp_path):
    text = 'lr: fast\nmodel: test_vit.zzz_r4\nepoch: 3\nmean: 0.5\nopt: adam_w\nval_split: train\nworkers: 0\n'
    levels = [(f.line, f.level) for f in findings(tmp_path, text)]
    assert levels == [*((line, 'error') for line in range(1, 7)), (7, 'note')]


def test_unreadable_files_and_the_count(tmp_path, capsys):
    good, bad, latin = tmp_path / 'good.yaml', tmp_path / 'bad.yaml', tmp_path / 'latin.yaml'
    good.write_text(GOOD)
    bad.write_text(changed(GOOD, 'workers: 0\nepoch: 3'))
    latin.write_bytes('a: 1\nb: caf\xe9\n'.encode('latin-1'))
    assert main([str(path) for path in (good, bad, tmp_path / 'none.yaml', tmp_path, latin)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f'{good}: OK',
        f'{bad}:10: note: workers: 0 loads the images within the training process, and stops older versions of timm',
        f'{bad}:11: error: epoch: unknown key; did you mean epochs?',
        f"{tmp_path}/none.yaml: error: can't be read: No such file or directory",
        f"{tmp_path}: error: can't be read: Is a directory",
        f'{latin}:2: error: not text in UTF-8',
        '4 errors, 1 note in 5 files',
    ]
    bad.write_text(changed(GOOD, 'workers: 0'))
    assert main([str(bad)]) == 0
    note, *rest = capsys.readouterr().out.splitlines()
    assert note.startswith(f'{bad}:10: note: ') and rest == [f'{bad}: OK', '0 errors, 1 note in 1 file']


def test_merged_mappings_are_no_duplicates_and_shared_values_are_read_once(tmp_path):
    merged = changed(GOOD, 'opt_kwargs: &o {head_lr_scale: 2.0}').replace('&o {', '{<<: &o {eps: 1.0e-8}, ')
    assert findings(tmp_path, merged) == []
    assert findings(tmp_path, GOOD + '<<: {epochs: 20}\n<<: {seed: 1}\nepochs: 30\n') == []
    levels = ''.join(f'\n  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]' for i in range(1, 60))
    found = findings(tmp_path, changed(PLAIN, f'model_kwargs:\n  a0: &a0 [1e-5]{levels}'))
    assert [f.line for f in found] == [7] and 'write 1.0e-5' in found[0].message


@pytest.mark.parametrize(
    'script, message',
    [
        ('def\n', 'SyntaxError: invalid syntax'),
        ('import timm_zzz_nowhere\n', "ModuleNotFoundError: No module named 'timm_zzz_nowhere'"),
        ("import sys\nsys.exit('no GPU')\n", 'SystemExit: no GPU'),
        ('options = 3\n', 'its top level builds no argparse parser'),
    ],
)
def test_wrong_command_line_is_status_2(tmp_path, script, message, capsys):
    file, nowhere = tmp_path / 'train.py', tmp_path / 'nowhere.py'
    file.write_text(script)
    before = sys.argv[:], sys.path[:]
    for arguments, error in (
        (['--train-script', str(file), 'a.yaml'], f"can't ask {file} for its options: {message}"),
        (['--train-script', str(nowhere), 'a.yaml'], f"can't ask {nowhere} for its options: FileNotFoundError: "),
        ([], 'no FILE'),
        (['--x'], '--x'),
    ):
        with pytest.raises(SystemExit) as e:
            main(arguments)
        assert e.value.code == 2 and error in capsys.readouterr().err
    assert (sys.argv, sys.path) == before


def test_no_model_is_built_on_request(tmp_path, monkeypatch):
    def create_model(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(check_hparams.timm, 'create_model', create_model)
    assert findings(tmp_path, changed(FIXED, 'img_size: 128'), build_model=False) == []
    found = findings(tmp_path, changed(GOOD, 'opt_kwargs: {head_lr: 1.0}\nmodel: test_vit.zzz_r4.x'), build_model=False)
    assert {f.line for f in found} == {2, 7}


@pytest.mark.parametrize(
    'folders, change, line',
    [
        (('train', 'val'), '', None),
        (('train', 'test'), '', 4),
        (('train', 'test'), 'val_split: test', None),
        (('a', 'b'), '', 3),
        (('validation',), '', 3),
        (('a', 'b'), "val_split: ''", None),
        (('train', 'val'), 'val_split', None),
        (('train', 'test'), 'val_split', 5),
    ],
)
def test_folders_of_the_splits(tmp_path, folders, change, line):
    for folder in folders:
        (tmp_path / 'data' / folder / 'x').mkdir(parents=True)
        (tmp_path / 'data' / folder / 'x/1.png').touch()
    found = findings(tmp_path, changed(PLAIN, f'{change}\ndata_dir: {tmp_path}/data'.strip()))
    errors = [f for f in found if f.level == 'error']
    assert errors[0].line == line if line else not errors, found
    # What timm does: whether a split takes in every image
    recipe = {'val_split': 'validation', **yaml.safe_load(changed(PLAIN, change) if change else PLAIN)}
    sizes = {s: len(create_dataset('', str(tmp_path / 'data'), recipe[f'{s}_split'])) for s in ('train', 'val')}
    everything = [s for s in sizes if sizes[s] == len(folders) > 1]
    assert bool(errors) == bool(recipe['val_split'] and (everything or len(folders) == 1))


SCRIPT = """
import argparse, os, sys
from timm import utils
from neighbour import DEFAULT
assert sys.argv == [__file__]
print('imported')
config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='training')
group = parser.add_argument_group('data').add_mutually_exclusive_group()
if __name__ == '__main__':
    raise SystemExit('training')
"""
OPTIONS = [
    ('parser', "'data', nargs='?', const=None", 'data', Option('str', nargs='?')),
    ('group', "'-b', '--batch-size', '--bs', type=int, default=DEFAULT", 'batch_size', Option('int', 128)),
    ('parser', "'--ratio', type=float, nargs='+', default=[0.75, 2]", 'ratio', Option('float', [0.75, 2], '+')),
    ('group', "'--script', dest='scripted', action='store_true'", 'scripted', Option('flag', False)),
    ('parser', "'--compile', nargs='?', const='inductor'", 'compile', Option('str', None, '?', const='inductor')),
    ('parser', "'--kind', default='a', choices=('a', 'b')", 'kind', Option('str', 'a', choices=['a', 'b'])),
    ('parser', "'--no-x', action='store_false', dest='x'", 'x', Option('flag', True)),
    ('parser', "'--flag', action=argparse.BooleanOptionalAction, default=True", 'flag', Option('flag', True)),
    ('parser', "'--size', type=int, nargs=3", 'size', Option('int', nargs=3)),
    ('parser', "'--kw', nargs='*', default={}, action=utils.ParseKwargs", 'kw', Option('mapping', {}, '*')),
    ('parser', "'--own', type=lambda text: text, default=os.sep", 'own', Option('any', '/')),
    ('parser', "'--many', action='append', type=int", 'many', Option('any')),
    ('parser', "'--model'", 'model', Option('str')),
    ('parser', "'--val-split', type=float", 'val_split', Option('float')),
]


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'neighbour.py').write_text('DEFAULT = 2 * 64\n')
    (tmp_path / 'train.py').write_text(SCRIPT + ''.join(f'{o[0]}.add_argument({o[1]})\n' for o in OPTIONS))
    yield tmp_path / 'train.py'
    del sys.modules['neighbour']


def test_script_is_asked_and_does_not_train(script, capsys):
    options, resizes_model = ask_script(script)
    assert capsys.readouterr() == ('', 'imported\n') and not resizes_model
    assert {key: option._replace(other_names=[]) for key, option in options.items()} == {o[2]: o[3] for o in OPTIONS}
    names = {key: option.other_names for key, option in options.items() if option.other_names}
    assert names == {'batch_size': ['b', 'bs'], 'scripted': ['script'], 'x': ['no_x'], 'flag': ['no_flag']}


def test_options_of_the_given_script(script, tmp_path, capsys):
    # The script has no device_modules, and a val_split that means something else than timm's.
    recipe = tmp_path / 'a.yaml'
    recipe.write_text('model: test_vit.zzz_r4\nval_split: 0.1\nbatch_size: 8\nopt: sgd\nown: [1]\n')
    assert main(['--train-script', str(script), str(recipe)]) == 1
    out = capsys.readouterr().out
    assert 'a.yaml:1: note: model: this train.py has no option that imports the plugin' in out
    assert 'a.yaml:4: error: opt: unknown key' in out and '1 error, 1 note' in out
    # The model is built for the size by scripts that do it themselves.
    recipe.write_text(changed(FIXED, 'img_size: 128'))
    resizing = NEWEST._replace(resizes_model=True)
    assert [f.line for f in check(recipe)] == [6]
    if hasattr(timm.models, 'resolve_model_input_args'):  # of timm 1.0.31, as such scripts are
        assert check(recipe, resizing) == []


def test_printed_options_are_the_end_of_the_file_in_the_package(capsys):
    assert main(['--print-options']) == 0
    text = capsys.readouterr().out
    assert Path(check_hparams.__file__).with_name('train_options.yaml').read_text().endswith(text) and len(text) > 5000


def test_options_in_the_package_are_those_of_train_py(timm_scripts):
    refresh = 'python -m timm_zzz check-hparams --print-options --train-script train.py'
    assert ask_script(timm_scripts / 'train.py') == NEWEST, f'train_options.yaml is not of this train.py: see {refresh}'


def test_args_yaml_of_train_py_passes(tmp_path):
    """Check the args.yaml that train.py writes beside its checkpoints, which names every option."""
    options = {name: option.default for name, option in NEWEST.options.items()}
    options.update(yaml.safe_load(GOOD), lr=1e-5, device_modules=['timm_zzz'], val_split='test')
    assert findings(tmp_path, yaml.safe_dump(options)) == []


TYPES = {'flag': [bool], 'mapping': [dict], 'str': [str], 'int': [int], 'float': [int, float]}
SCALARS = [
    *"0 1 -1 3.5 -.5 1e-5 1.0e-5 1e5 .inf .nan inf 0x1F 0x_ 010 1:30 1_000 9999999999999999999999 '1' '1e-5'".split(),
    *"true no off null ~ '' = << - ? : | > , [ { } ] ! @ `x` %y & * 'a \x00 \u00e9 2024-01-31 2024-13-45".split(),
    *'text test_vit test_vit.zzz_r4 adamw zzzadamw cosine train hfds/x torch/x a.b.c a/b hf-hub:a .. . _'.split(),
    *("!!int ''", '!!float x', '!!bool x', '!!binary x', '!!timestamp x', '!!null x', '!!str 3', '!!set {a}', '!x y'),
    *('[]', '[1]', '[0.5, 0.5]', '[1e-1, 2]', "['0.1']", '[a, b]', '[null]', '[[1]]', '[true]', '[3, 8, 8]', '&a [*a]'),
    *('{}', '{a: 1}', '{a: 1e-5}', '{1: a}', '{[a]: 1}', '{zzz_rank: x}', "{head_lr_scale: '5'}", '{img_size: a}'),
    *('{lr: 1}', '{a: [1e-5, {b: 2e3}]}', '&a {b: *a}', '{<<: 3}', '{a: 1, a: 2}', '*a', 'x: y', 'x # y'),
]


def scalars(rng):
    return rng.choice(SCALARS) if rng.random() < 0.8 else ''.join(rng.choices(string.printable, k=5))


@pytest.mark.parametrize('seed', range(3))
def test_random_values_give_findings_and_no_traceback(tmp_path, seed):
    rng = random.Random(seed)
    names = sorted(NEWEST.options)
    file = tmp_path / 'a.yaml'
    for _ in range(40):
        keys = rng.sample(names, 4) + rng.sample(['model', 'opt', 'dataset', 'model_kwargs', 'opt_kwargs', 'sched'], 2)
        file.write_text(''.join(f'{key}: {scalars(rng)}\n' for key in keys), encoding='utf-8')
        found = check(file, build_model=rng.random() < 0.1)
        assert all(f.level in ('error', 'note') and '\n' not in f.message for f in found)
        lines = len(file.read_text(encoding='utf-8').splitlines()) + 1
        assert all(f.line is None or 1 <= f.line <= lines for f in found), found


def test_values_are_those_of_argparse(tmp_path):
    """No finding: what argparse has is of the right type, and what the checks go on with."""
    file = tmp_path / 'a.yaml'
    kinds = {(o.type, o.nargs, not o.choices, not o.default): (name, o) for name, o in NEWEST.options.items()}
    passed = []
    for name, option in kinds.values():
        kind = {'int': int, 'float': float}.get(option.type)
        how = dict(action='store_true') if option.type == 'flag' else dict(type=kind, nargs=option.nargs)
        for text in SCALARS:
            file.write_text(f'{name}: {text}\n', encoding='utf-8')
            recipe = Recipe(NEWEST, {})
            recipe.read(file)
            if recipe.findings:
                continue
            parser = argparse.ArgumentParser(exit_on_error=False)
            parser.add_argument(f'--{name}', default=option.default, **how)
            parser.set_defaults(**yaml.safe_load(file.read_text(encoding='utf-8')))
            value = getattr(parser.parse_args([]), name)
            assert recipe.values == {name: value}
            items = value if option.nargs in ('+', 3) and value is not None else [value]
            assert value is None or all(type(item) in TYPES[option.type] for item in items), (name, text, value)
            passed.append(option.type)
    assert set(passed) == {'flag', 'int', 'float', 'str', 'mapping'} and len(passed) > 100


# The fit when the model is made


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Two folders of three classes each, the second with others, and class maps, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for split, classes in (('data/train', 'abc'), ('data/validation', 'abc'), ('other/train', 'abd'), ('two', 'ab')):
        for name in classes:
            Path(split, name).mkdir(parents=True)
            Path(split, name, '0.png').touch()
    for name, lines in (('map', 'bac'), ('same', 'bac'), ('sorted', 'abc'), ('four', 'abcd')):
        Path(f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return tmp_path


FIT = """\
device_modules: [timm_zzz]
model: vit_tiny_patch16_224.zzz_r8
pretrained: true
num_classes: 3
train_split: train
val_split: validation
model_kwargs: {zzz_fit: data/train}
"""
FITS = [
    # the options alone
    ('model_kwargs: {zzz_fit: data/train, zzz_fit_preset: frozen}', None, None, ''),
    ('model_kwargs: {zzz_fit: data/train, zzz_fit_preset: fine}', 7, 'error', "'fine' is none of 'frozen', 'finetune'"),
    ('model_kwargs: {zzz_fit_preset: frozen}', 7, 'error', 'zzz_fit_preset: it goes with zzz_fit'),
    ('model_kwargs: {zzz_fit: none/train}', 7, 'error', 'model_kwargs.zzz_fit: no such folder: none/train'),
    ('model_kwargs: {zzz_fit: data}', 7, 'error', 'has splits in it, not classes'),
    ('model_kwargs: {zzz_fit: 3}', 7, 'error', 'expected a folder, TYPE/NAME:SPLIT, a dict or a loader, got 3'),
    ('model_kwargs: {zzz_fit: {folder: x}}', 7, 'error', 'unknown keys folder'),
    ('model_kwargs: {zzz_fit: {data_dir: none}}', 7, 'error', 'no such folder: none'),
    ('model_kwargs: {zzz_fit: {data_dir: data}}', None, None, ''),
    ('model_kwargs: {zzz_fits: data/train}', 7, 'error', 'no option of a ZZZ head; did you mean zzz_fit?'),
    ('pretrained: false', 7, 'error', 'without pretrained: true the heads are fitted to what a random backbone says'),
    ('initial_checkpoint: map.txt', 7, 'note', 'the head of initial_checkpoint takes the place'),
    ('resume: map.txt', 7, 'note', 'the head of resume takes the place'),
    ('head_init_scale: 0.0', 8, 'error', "multiplies a ZZZ head's class means"),
    ('head_init_bias: 0.0', 8, 'error', 'it replaces the biases of the fit'),
    # a model without the ending gets a head of rank 8, which DEFAULT_RANK is
    ('model: vit_tiny_patch16_224\nopt: zzzadamw', None, None, ''),
    # classes and their numbers
    ('num_classes: 4', 7, 'error', '3 classes, num_classes says 4'),
    ('class_map: map.txt', 7, 'error', 'number the classes differently; model_kwargs needs zzz_fit_class_map: map.txt'),
    (
        'model_kwargs: {zzz_fit: data/train, zzz_fit_class_map: map.txt}',
        7,
        'error',
        'zzz_fit_class_map: training and the fit number the classes differently; class_map: map.txt is needed',
    ),
    ('class_map: map.txt\nmodel_kwargs: {zzz_fit: data/train, zzz_fit_class_map: same.txt}', None, None, ''),
    ('class_map: map.txt\nmodel_kwargs: {zzz_fit: data/train, zzz_fit_class_map: [b, a, c]}', None, None, ''),
    ('class_map: map.txt\nmodel_kwargs: {zzz_fit: {data_dir: data, class_map: same.txt}}', None, None, ''),
    (
        'class_map: map.txt\nmodel_kwargs: {zzz_fit: data/train, zzz_fit_class_map: sorted.txt}',
        7,
        'error',
        'zzz_fit_class_map: its classes are not those of training, in another order',
    ),
    ('class_map: map.txt\nmodel_kwargs: {zzz_fit: data/train, zzz_fit_class_map: four.txt}', 7, 'error', 'training: d'),
    ('class_map: map.txt\nmodel_kwargs: {zzz_fit: data/train, zzz_fit_class_map: no.txt}', 7, 'error', 'no.txt'),
    ('model_kwargs: {zzz_fit: data/train, zzz_fit_class_map: 3}', 7, 'error', 'a file or a list of names, not 3'),
    # data sets by name, which are not downloaded
    ('dataset: hfds/a/b\nmodel_kwargs: {zzz_fit: hfds/a/b:train}', None, None, ''),
    ('dataset: hfds/a/b\nmodel_kwargs: {zzz_fit: hfds/a/b:extra}', 7, 'note', 'fitted to extra, trained on train'),
    ('dataset: hfds/a/b\nmodel_kwargs: {zzz_fit: hfds/a/b:validation}', 7, 'error', 'the images of val_split'),
    ('model_kwargs: {zzz_fit: data/validation}', 7, 'error', 'fitted to the images of val_split, validation'),
    (
        'dataset: hfds/a/b\nmodel_kwargs: {zzz_fit: hfds/a/c:train}',
        7,
        'error',
        'the classes of hfds/a/c may',
    ),
    ('dataset: hfds/a/b', 7, 'error', "the classes of a folder may have other numbers than those of 'hfds/a/b'"),
    # sizes and preprocessing
    (
        'img_size: 96\nmodel: vit_tiny_patch16_224.zzz_r8\nmodel_kwargs: {zzz_fit: data/train, dynamic_img_size: true}',
        7,
        'error',
        'at 224 x 224, training at 96 x 96; add model_kwargs: {pretrained_cfg_overlay: {input_size: [3, 96, 96]}}',
    ),
    ('img_size: 96\nmodel_kwargs: {zzz_fit: data/train, img_size: 96}', None, None, ''),
    (
        'model: test_resnet.zzz_r4\nimg_size: 96',
        7,
        'error',
        'training at 96 x 96; add model_kwargs: {pretrained_cfg_overlay: {input_size: [3, 96, 96]}}',
    ),
    (
        'model: test_resnet.zzz_r4\nimg_size: 96\n'
        'model_kwargs: {zzz_fit: data/train, pretrained_cfg_overlay: {input_size: [3, 96, 96]}}',
        None,
        None,
        '',
    ),
    ('input_size: [1, 224, 224]', None, None, ''),
    ('in_chans: 1', None, None, ''),
    (
        'model: test_resnet.zzz_r4\nimg_size: 96\npretrained_path: map.txt',
        7,
        'error',
        '{input_size: [3, 96, 96], file: map.txt, num_classes: -1}} in place of pretrained_path',
    ),
    (
        'mean: [0.1, 0.2, 0.3]',
        7,
        'note',
        'images with mean (0.5, 0.5, 0.5), unlike training; '
        'add model_kwargs: {pretrained_cfg_overlay: {mean: [0.1, 0.2, 0.3]}}',
    ),
    ('crop_pct: 1.0\ninterpolation: bilinear', 7, 'note', 'interpolation bicubic, crop_pct 0.9, unlike training'),
    (
        'pretrained_path: map.txt\nmodel_kwargs: {zzz_fit: data/train, pretrained_cfg_overlay: {crop_pct: 0.9}}',
        7,
        'error',
        'pretrained_cfg_overlay has an option of its own, and train.py passes both',
    ),
]


@pytest.mark.parametrize('change, line, level, text', FITS, ids=[f'{i}-{f[0]!r:.50}' for i, f in enumerate(FITS)])
def test_the_fit(images, change, line, level, text):
    found = findings(images, changed(FIT, change))
    assert [(f.line, f.level) for f in found] == ([(line, level)] if level else []), found
    assert all(text in f.message for f in found)
    if level == 'error' and 'add model_kwargs' in text and 'in place' not in text:  # what it says helps
        entry = re.search(r'add model_kwargs: \{(.*)\}$', found[0].message)[1]
        recipe = changed(FIT, change)
        assert findings(images, recipe.replace('zzz_fit: data/train', f'zzz_fit: data/train, {entry}')) == []


def test_options_behind_a_recipe_beat_it(images, capsys):
    """Findings about them have no line; those of the file keep theirs."""
    Path('a.yaml').write_text(changed(FIT, 'img_size: 96\nmodel_kwargs: {img_size: 96}\nworkers: 0'))
    assert main(['a.yaml']) == 0
    capsys.readouterr()
    assert main(['a.yaml', '--data-dir', 'data', '--model-kwargs', 'zzz_fit=data/train', '--lr', '0', '-b', '32']) == 1
    out = capsys.readouterr().out.splitlines()
    assert 'a.yaml: error: lr: above 0 is needed, not 0.0' in out
    assert any(line.startswith('a.yaml:9: note: workers') for line in out), out
    assert 'the fit runs at 224 x 224, training at 96 x 96; add model_kwargs: {img_size: 96}' in '\n'.join(out)
    good = ['--model-kwargs', 'img_size=96', 'zzz_fit=data/train', '--data-dir', 'data', '--workers', '2']
    assert main(['--config', 'a.yaml', *good]) == 0
    assert capsys.readouterr().out == 'a.yaml: OK\n'
    assert main(['a.yaml', *good, '--data-dir', 'other']) == 1
    assert 'model_kwargs.zzz_fit: its classes are not those of training: c' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(['a.yaml', '--zzz-fit', 'x'])
    assert e.value.code == 2 and 'unrecognized arguments: --zzz-fit' in capsys.readouterr().err


def test_options_of_a_command_line_are_read_as_train_py_reads_them(timm_scripts):
    """Compare with the parser of timm's script; options that are not given are not in ours."""
    given = '--img-size 96 -b 7 -j 2 -vb 3 --amp --mean 0.1 0.2 --input-size 3 4 5 --dr 0.5 --torchcompile --aa x'
    given += ' --model-kwargs a=1 b=x --opt-kwargs c=1e-3 --scale 0.1 1 --lr 1e-3 --no-aug --val-split test'
    ours = vars(TrainParser(NEWEST.options, add_help=False).parse_args(given.split()))
    theirs = vars(runpy.run_path(str(timm_scripts / 'train.py'))['parser'].parse_args(given.split()))
    assert ours == {key: theirs[key] for key in ours} and len(ours) == 16
