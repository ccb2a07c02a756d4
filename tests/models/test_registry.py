import collections
import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from oracles import distinct
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, model_entrypoint, split_model_name_tag

import timm_zzz
from timm_zzz import ZZZHead
from timm_zzz.head import ROW_STD
from timm_zzz.models import registry
from timm_zzz.models.registry import RANKS, asks_for_head, did_you_mean

# As JSON what timm's registry tells of its own names before and after the import of timm_zzz, which modules the import
# loads, and how timm alone fails to load the model in the folder that is given
_PROGRAM = """
import dataclasses, json, sys, warnings
import timm
from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, is_model_in_modules, model_entrypoint

def own(names):
    return [name for name in names if 'zzz' not in name]

def called(fn, *args):
    try:
        return fn(*args)
    except (RuntimeError, KeyError) as e:
        return repr(e)

def cfg(name):
    found = timm.get_pretrained_cfg(name)
    return found and dataclasses.asdict(found)

def snapshot():
    filters = ['*', '', 'vit_*', '*resnet*', 'test_*', '*_r4*', '*8', '*in1k', 'resnet50*', 'resnet50.*', '*.a1_in1k',
               ['vit_*', 'resnet*']]
    names = timm.list_models()
    tagged = own(timm.list_models(include_tags=True))
    modules = [m for m in timm.list_modules() if m != '_registry']  # in_modules adds it to the list of older timm
    deprecated = get_deprecated_models()
    keys = 'tag', 'url', 'hf_hub_id', 'num_classes'
    every = sorted({*names, *tagged, *timm.list_pretrained(), *deprecated})
    return dict(
        listed={str(f): [timm.list_models(f), timm.list_models(f, pretrained=True), timm.list_pretrained(f),
                         timm.list_models(f, name_matches_cfg=True), timm.list_models('', exclude_filters=f),
                         own(timm.list_models(f, include_tags=True)),
                         timm.list_models(f, pretrained=True, include_tags=False)] for f in filters},
        modules={m: [timm.list_models(module=m), timm.list_models(module=m, pretrained=True),
                     timm.list_models('*_*', module=m), own(timm.list_models(module=m, include_tags=True)),
                     get_deprecated_models(m)] for m in modules},
        several=timm.list_models(module=['resnet', 'vision_transformer'], pretrained=True),
        deprecated=deprecated,
        every=every,
        names={n: [timm.is_model(n), timm.is_model_pretrained(n), called(cfg, n),
                   *(called(timm.get_pretrained_cfg_value, n, key) for key in keys)]
               for n in every},
        tags={n: {k: dataclasses.asdict(c) for k, c in get_arch_pretrained_cfgs(n).items() if 'zzz' not in k}
              for n in names},
        order={n: own(get_arch_pretrained_cfgs(n)) for n in names},
        entrypoints={n: [model_entrypoint(n).__module__, model_entrypoint(n).__qualname__] for n in every},
        in_modules={n: is_model_in_modules(n, [model_entrypoint(n).__module__.rpartition('.')[2]]) for n in every},
    )

try:
    timm.create_model('local-dir:' + sys.argv[1], pretrained=True)
    failure = ''
except Exception as e:
    failure = str(e)
before, loaded = snapshot(), set(sys.modules)
direct = timm.models.vision_transformer.vit_base_patch16_224
warnings.simplefilter('error')
import timm_zzz
warnings.simplefilter('default')
assert timm.models.vision_transformer.vit_base_patch16_224 is direct
new = {name.partition('.')[0] for name in set(sys.modules) - loaded}
result = dict(failure=failure, new=sorted(new), before=before, after=snapshot())
print(json.dumps(result, default=str))
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What the program prints, in a process of its own."""
    folder = tmp_path_factory.mktemp('model')
    model = timm.create_model('test_resnet.zzz_r4', num_classes=7)
    timm_zzz.save_pretrained(model, folder)
    command, env = [sys.executable, '-c', _PROGRAM, str(folder)], {**os.environ, 'OMP_NUM_THREADS': '1'}
    out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout)


@pytest.mark.integration
def test_import_changes_nothing_else(found):
    before, after = found['before'], found['after']
    assert len(before['listed']['*'][0]) > 1000 and len(before['deprecated']) > 100 and len(before['modules']) > 50
    assert before.keys() == after.keys()
    for what, expected in before.items():
        if isinstance(expected, dict):
            assert expected.keys() == after[what].keys(), what
            changed = [key for key in expected if expected[key] != after[what][key]]
            assert not changed, f'{what}: {changed[:5]} of {len(changed)}'
        assert expected == after[what], what


@pytest.mark.integration
def test_every_name_has_its_zzz_names(found):
    """By timm's own functions, without building; listed once each, and none of them claims weights."""
    names = timm.list_models()
    assert names == found['before']['listed']['*'][0]
    listed = collections.Counter(timm.list_models(include_tags=True))
    assert max(listed.values()) == 1
    for name in set(found['before']['every']) - set(found['before']['deprecated']):
        architecture, tag = split_model_name_tag(name)
        base = timm.get_pretrained_cfg(name)
        for rank in RANKS:
            new = f'{name}.zzz_r{rank}'
            zzz_tag = f'{tag}.zzz_r{rank}'.lstrip('.')
            assert timm.is_model(new) and split_model_name_tag(new) == (architecture, zzz_tag), new
            assert new in listed and not timm.is_model_pretrained(new), new
            assert model_entrypoint(new) is model_entrypoint(name), new
            cfg = timm.get_pretrained_cfg(new, allow_unregistered=False)
            assert (cfg.architecture, cfg.tag) == (architecture, zzz_tag) and not cfg.has_weights, new
            assert timm.models.get_pretrained_cfg_value(new, 'input_size') == base.input_size, new
            assert (cfg.num_classes, cfg.mean, cfg.first_conv) == (base.num_classes, base.mean, base.first_conv), new
    for name in names:
        assert all(key in listed for key in get_arch_pretrained_cfgs(name)), name


@pytest.mark.integration
def test_import_loads_little_else(found):
    """The rest of import time is measured by benchmarks/import_time.py, on a machine without other work."""
    assert {*found['new']} <= {'timm', 'timm_zzz', 'huggingface_hub', 'yaml'}
    assert 'zzz_' in found['failure']  # of a folder without the plugin


def test_names_and_options():
    model = timm.create_model('test_vit.zzz_r4', num_classes=5)
    assert model.head.rank == 4 and model.pretrained_cfg['tag'] == 'zzz_r4'
    assert model._model_args == {'num_classes': 5, 'zzz_rank': 4}
    model = timm.create_model('test_vit.r160_in1k.zzz_r16')
    assert model.head.rank == 16 and model.num_classes == 1000 and model.pretrained_cfg['tag'] == 'r160_in1k.zzz_r16'
    assert type(timm.create_model('test_vit').head) is torch.nn.Linear
    model = timm.create_model('test_vit.zzz_r8', num_classes=5, zzz_rank=3, zzz_sigma2_init=0.5, zzz_v_min=1e-3)
    assert (model.head.rank, model.head.v_min) == (3, 1e-3)
    assert isinstance(timm.create_model('test_vit', zzz_rank=2).head, ZZZHead)  # as a config.json asks for it
    with pytest.raises(TypeError, match='Unknown argument zzz_foo .*zzz_rank'):
        timm.create_model('test_vit.zzz_r8', zzz_foo=1)
    model = timm.create_model('test_vit.zzz_r8', num_classes=0)
    assert model(torch.randn(1, 3, 160, 160)).ndim == 2
    model.reset_classifier(3)
    assert model.head.rank == 8


MALFORMED = 'zzz_ zzz zzz_r zzz_r-1 zzz_x zzz_r08 zzz_r8.5 zzz-r8 zzz_r8x zzzr8 ZZZ_r8 zz_r8 z_r8 zz-r16'.split()


@pytest.mark.parametrize('base', ['test_vit', 'test_vit.r160_in1k'])
def test_malformed_tags(base):
    """The error shows the name that was asked for and the right one, with the base tag."""
    for tag in MALFORMED:
        right = base if tag != 'zzz_r8.5' else 'test_vit'
        asked = f'Invalid tag in {base}.{tag}: a ZZZ head is asked for as {right}.zzz_r8, with rank 0, 4, 8 or 16'
        with pytest.raises(ValueError, match=f'^{re.escape(asked)}$'):
            timm.create_model(f'{base}.{tag}')
    for tag in ('zzz_r8.r160_in1k', 'r160_in1k_zzz_r8', 'nope.zzz_x', 'zzz_r8.zzz_r8'):  # in the wrong place
        with pytest.raises(ValueError, match=rf'Invalid tag in {base}\.{tag}: .* as test_vit\.(r160_in1k\.)?zzz_r8'):
            timm.create_model(f'{base}.{tag}')


def test_no_tag_of_timm_asks_for_a_head():
    tags = {name.partition('.')[2] for name in timm.list_pretrained()}
    assert len(tags) > 100 and not [tag for tag in tags if asks_for_head(tag)]


@pytest.mark.parametrize(
    'name, right',
    [
        ('resent50.zzz_r8', 'resnet50.zzz_r8'),
        ('resnet50_zzz_r8', 'resnet50.zzz_r8'),
        ('resent50', 'resnet50'),
        ('vit_base_patch_16_224.augreg_in21k.zzz_r16', 'vit_base_patch16_224.augreg_in21k.zzz_r16'),
    ],
)
def test_nearest_name(name, right):
    assert did_you_mean(name) == f'; did you mean {right}?' and timm.is_model(right) and did_you_mean(right) == ''


def test_no_name_is_near():
    assert [did_you_mean(name) for name in ('q', 'hf-hub:timm/resnet50.zzz_r8')] == ['', '']


@pytest.mark.parametrize('base', ['test_vit', 'test_vit.r160_in1k', 'test_efficientnet'])
def test_ranks_above_the_width(base):
    width = timm.create_model(base).num_features
    assert width < 99999
    above = rf'{base}\.zzz_r99999: .*the width of the embeddings, {width};.* {base}\.zzz_r8'
    with pytest.raises(ValueError, match=above):
        timm.create_model(f'{base}.zzz_r99999')
    with pytest.raises(ValueError, match=rf'{base}.zzz_r{width} is not registered: .*zzz_rank={width}.*register'):
        timm.create_model(f'{base}.zzz_r{width}', num_classes=0)
    with pytest.raises(ValueError, match=rf'rank: .* feat_dim = {width}, got 99999'):
        timm.create_model(f'{base}.zzz_r8', zzz_rank=99999)


@pytest.mark.parametrize(
    'name, kwargs, error, message',
    [
        # The width is that of the arguments
        ('test_vit.zzz_r99999', dict(embed_dim=96), ValueError, 'width of the embeddings, 96;'),
        ('levit_128s.zzz_r99999', {}, ValueError, 'levit_128s.zzz_r99999'),
        ('test_vit.zzz_r99999', dict(nonsense=1), ValueError, 'test_vit.zzz_r99999 is not registered'),
        ('test_vit.zzz_r5', {}, ValueError, r'test_vit.zzz_r5 is not registered: .*zzz_rank=5.*register'),
        ('test_vit.nope.zzz_r8', {}, ValueError, r'timm knows no test_vit.nope.* test_vit.zzz_r8.*\(tags: r160_in1k\)'),
        ('nope.zzz_r8', {}, RuntimeError, 'Unknown model .nope'),
        ('test_vit.nope', {}, RuntimeError, r'Invalid pretrained tag \(nope\) for test_vit'),  # left to timm
    ],
)
def test_unregistered_ranks_and_tags(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


def test_where_timm_looks_a_name_up_itself_its_error_names_the_tag():
    """timm's scripts do before they build a model, so what they print is timm's own."""
    resolve = getattr(timm.models, 'resolve_model_input_args', None)
    if resolve is None:
        pytest.skip('timm before 1.0.31 looks no name up before it builds the model')
    for tag in ('zzz_r', 'zzz_r-1', 'zzz_r99999', 'zzz_x', 'zzz_r08'):
        with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \({tag}\) for test_vit'):
            resolve(f'test_vit.{tag}')


@pytest.mark.parametrize('option, value', [('v_min', 0.5), ('sigma2_min', 0.01), ('log_density', True)])
def test_older_timm_would_leave_out_an_option(option, value, caplog):
    registry._warn_of_timms_save.cache_clear()
    timm.create_model('test_vit.zzz_r4', zzz_v_init=0.7)
    assert not caplog.records
    for _ in range(2):
        timm.create_model('test_vit.zzz_r4', **{f'zzz_{option}': value})
    warned = [f'leaves out zzz_{option}: save with timm_zzz.save_pretrained' in r.getMessage() for r in caplog.records]
    assert warned == ([] if registry.SAVES_ARGS else [True])


def test_register():
    names = timm.list_models('test_*', include_tags=True)
    timm_zzz.register(timm.list_models('test_*'))  # again
    assert timm.list_models('test_*', include_tags=True) == names
    timm_zzz.register('test_vit', ranks=[5])
    assert timm.create_model('test_vit.zzz_r5').head.rank == 5
    assert timm.create_model('test_vit.r160_in1k.zzz_r5').head.rank == 5
    with pytest.raises(ValueError, match='no architecture named nope'):
        timm_zzz.register('nope')
    with pytest.raises(ValueError, match='ranks: .*-1'):
        timm_zzz.register('test_vit', ranks=[-1])


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """A stock timm checkpoint: the state dict of test_resnet with its 1000-class linear head."""
    folder = tmp_path_factory.mktemp('stock')
    state = timm.create_model('test_resnet').state_dict()
    save_file(state, folder / 'stock.safetensors')
    return folder / 'stock.safetensors', state


def create(file, **kwargs):
    return timm.create_model(
        'test_resnet.zzz_r8', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs
    )


def test_pretrained_other_channels_and_no_trace_of_the_hooks(stock):
    """The weights that arrive are compared in test_families.py::test_pretrained."""
    model = create(stock[0], num_classes=7, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    assert model.get_classifier().weight.std().item() == pytest.approx(ROW_STD, rel=0.3)
    for module in model.modules():
        if not isinstance(module, ZZZHead):
            assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks


@pytest.mark.parametrize('num_classes', [7, 5])
def test_numpy_files_warm_start_where_timm_reads_the_classifier(num_classes, tmp_path, monkeypatch):
    """By the model's own reader, once, which leaves the linear layer of another class count as it was drawn."""
    state = {key: value.numpy() for key, value in timm.create_model('test_vit', depth=0).state_dict().items()}
    rows, bias = torch.randn(7, 64), torch.randn(7)
    np.savez(
        tmp_path / 'weights.npz',
        **{
            'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
            'embedding/bias': state['patch_embed.proj.bias'],
            'cls': state['cls_token'],
            'Transformer/posembed_input/pos_embedding': state['pos_embed'],
            'Transformer/encoder_norm/scale': state['norm.weight'],
            'Transformer/encoder_norm/bias': state['norm.bias'],
            'head/kernel': rows.numpy().T,
            'head/bias': bias.numpy(),
        },
    )
    overlay = dict(file=str(tmp_path / 'weights.npz'), custom_load=True)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, depth=0)
    opened, load = [], np.load
    monkeypatch.setattr(np, 'load', lambda *args, **kwargs: opened.append(args) or load(*args, **kwargs))
    model = timm.create_model('test_vit.zzz_r4', **options)
    assert len(opened) == 1 and 'load_pretrained' not in vars(model)
    assert torch.equal(model.pos_embed, torch.from_numpy(state['pos_embed']))
    if num_classes == 7:
        assert torch.equal(model.head.weight, rows) and torch.equal(model.head.bias, bias)
    else:
        assert (model.head.weight == model.head.weight[0]).all() and not model.head.bias.any()  # the flat start


def test_truncated_backbone_is_an_error(stock, tmp_path):
    file, state = stock
    gone = [k for k in state if 'layer4' in k and k.endswith('weight')]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, tmp_path / 'cut.safetensors')
    for kwargs in (dict(num_classes=7), dict(num_classes=0), {}):
        with pytest.raises(RuntimeError, match=re.escape(gone[0])):
            create(tmp_path / 'cut.safetensors', **kwargs)


def test_checkpoint_path_and_ema(stock, tmp_path):
    trained, averaged = (distinct(timm.create_model('test_resnet.zzz_r8', num_classes=7)) for _ in range(2))
    path = str(tmp_path / 'last.pth.tar')
    torch.save({'state_dict': trained.state_dict(), 'state_dict_ema': averaged.state_dict()}, path)
    model = timm.create_model('test_resnet.zzz_r8', num_classes=7, checkpoint_path=path)
    assert torch.equal(model.get_classifier().A, averaged.get_classifier().A)
    timm.models.load_checkpoint(model, path, use_ema=False)
    assert torch.equal(model.get_classifier().A, trained.get_classifier().A)
    with pytest.raises(RuntimeError, match='classes 7 -> 3'):
        timm.create_model('test_resnet.zzz_r8', num_classes=3, checkpoint_path=path)
    # a linear checkpoint of the same classes warm-starts
    model = timm.create_model('test_resnet.zzz_r8', checkpoint_path=str(stock[0]))
    assert model.get_classifier().rank == 8


@pytest.mark.parametrize(
    'name, present',
    [
        ('tv_resnet50.zzz_r8', 'resnet50.tv_in1k.zzz_r8'),
        ('tv_resnet50.a1_in1k.zzz_r4', 'resnet50.a1_in1k.zzz_r4'),  # as of timm, a tag that is given wins
        ('tv_resnet50.zzz_r0', 'resnet50.tv_in1k.zzz_r0'),
        ('vit_tiny_patch16_224_in21k.zzz_r4', 'vit_tiny_patch16_224.augreg_in21k.zzz_r4'),
    ],
)
def test_deprecated_names_give_the_twin_of_what_they_mean(name, present):
    with torch.device('meta'):
        with pytest.warns(
            UserWarning, match=f'Mapping deprecated model name {name.partition(".")[0]} to current {present}'
        ):
            model = timm.create_model(name, num_classes=5)
        expected = timm.create_model(present, num_classes=5)
    assert isinstance(model.get_classifier(), ZZZHead)
    assert model.get_classifier().rank == expected.get_classifier().rank
    assert model.pretrained_cfg == expected.pretrained_cfg and model.pretrained_cfg['hf_hub_id']
    assert timm_zzz.models._timm.recorded_args(model) == timm_zzz.models._timm.recorded_args(expected)


def test_a_deprecated_name_with_a_configuration():
    cfg = dict(architecture='resnet50', tag='tv_in1k.zzz_r4')
    with torch.device('meta'), pytest.warns(UserWarning, match='to current resnet50.tv_in1k.zzz_r4'):
        assert timm.create_model('tv_resnet50', pretrained_cfg=cfg).fc.rank == 4


def test_every_deprecated_name(monkeypatch):
    def built(name, **kwargs):
        """What timm is asked to build in the end."""
        arguments = []
        monkeypatch.setattr(
            registry, 'model_entrypoint', lambda architecture: lambda **k: arguments.append((architecture, k))
        )
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model_entrypoint(name)(**kwargs)
        return arguments[0][0], arguments[0][1]['pretrained_cfg']

    count = 0
    for name, current in get_deprecated_models().items():
        if current is None:
            with pytest.raises(AssertionError, match='has been removed'):
                timm.create_model(f'{name}.zzz_r8')
            continue
        architecture, _, tag = current.partition('.')
        assert built(name, pretrained_cfg='zzz_r8') == (architecture, f'{tag}.zzz_r8' if tag else 'zzz_r8')
        assert built(name, zzz_rank=2) == (architecture, tag or None)
        if timm.models.get_arch_pretrained_cfgs(architecture).keys() >= {
            current
        }:  # timm maps one to a tag that it lacks
            timm.get_pretrained_cfg(f'{current}.zzz_r8')
            count += 1
    assert count > 150


def test_a_plain_deprecated_name_stays_timms():
    with torch.device('meta'), pytest.warns(UserWarning, match='Mapping deprecated') as caught:
        model = timm.create_model('tv_resnet50', num_classes=5)
    assert type(model.fc) is torch.nn.Linear and len(caught) == 1
    with torch.device('meta'), pytest.warns(UserWarning, match='Mapping deprecated'):
        assert timm.create_model('tv_resnet50', num_classes=5, zzz_rank=2).fc.rank == 2


def test_finding_names():
    """README: by tag, or from the plain names; timm's own listings of weights stay as they were."""
    listed = timm.list_models('resnet50.*zzz_r8', include_tags=True)
    assert 'resnet50.a1_in1k.zzz_r8' in listed and 'resnet50.zzz_r8' in listed
    for name in timm.list_pretrained()[::97]:
        assert f'{name}.zzz_r8' in timm.list_models(f'{name}.zzz_r8', include_tags=True)
    assert not timm.list_pretrained('*zzz*')
