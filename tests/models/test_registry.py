import collections
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, split_model_name_tag

import timm_zzz
from timm_zzz import ZZZHead
from timm_zzz.head import SIGMA2_INIT
from timm_zzz.models.registry import RANKS

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
    filters = ['*', '', 'vit_*', '*resnet*', 'test_*', '*_r4*', '*8', '*in1k', 'resnet50*', 'resnet50.*', '*.a1_in1k']
    filters.append(['vit_*', 'resnet*'])
    names = timm.list_models()
    tagged = own(timm.list_models(include_tags=True))
    modules = timm.list_modules()
    deprecated = get_deprecated_models()
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
        pretrained={n: timm.is_model_pretrained(n) for n in every},
        models={n: timm.is_model(n) for n in every},
        cfgs={n: called(cfg, n) for n in every},
        values={n: [called(timm.get_pretrained_cfg_value, n, key) for key in ('tag', 'url', 'hf_hub_id', 'num_classes')]
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
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
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
    plain, every, deprecated = (
        found['before']['listed']['*'][0],
        found['before']['every'],
        found['before']['deprecated'],
    )
    assert names == plain
    listed = collections.Counter(timm.list_models(include_tags=True))
    assert max(listed.values()) == 1
    for name in every:
        if name in deprecated:
            continue
        architecture, tag = split_model_name_tag(name)
        base = timm.get_pretrained_cfg(name)
        for rank in RANKS:
            new = f'{name}.zzz_r{rank}'
            zzz_tag = f'{tag}.zzz_r{rank}' if tag else f'zzz_r{rank}'
            assert timm.is_model(new) and split_model_name_tag(new) == (architecture, zzz_tag), new
            assert new in listed and not timm.is_model_pretrained(new), new
            assert model_entrypoint(new) is model_entrypoint(name), new
            cfg = timm.get_pretrained_cfg(new, allow_unregistered=False)
            assert (cfg.architecture, cfg.tag) == (architecture, zzz_tag) and not cfg.has_weights, new
            assert timm.models.get_pretrained_cfg_value(new, 'input_size') == base.input_size, new
            assert (cfg.num_classes, cfg.mean, cfg.first_conv) == (base.num_classes, base.mean, base.first_conv), new
    for name in plain:
        assert all(key in listed for key in get_arch_pretrained_cfgs(name)), name


def test_registering_twice_changes_nothing():
    names = timm.list_models('test_*', include_tags=True)
    timm_zzz.register(timm.list_models('test_*'))
    assert timm.list_models('test_*', include_tags=True) == names


@pytest.mark.integration
def test_import_loads_little_else(found):
    """The rest of import time is measured by benchmarks/import_time.py, on a machine without other work."""
    assert {*found['new']} <= {'timm', 'timm_zzz', 'huggingface_hub', 'yaml'}


@pytest.mark.integration
def test_without_the_plugin_a_zzz_folder_fails_by_name(found):
    assert 'zzz_' in found['failure']


def test_names():
    model = timm.create_model('test_vit.zzz_r4', num_classes=5)
    assert model.head.rank == 4 and model.pretrained_cfg['tag'] == 'zzz_r4'
    assert model._model_args == {'num_classes': 5, 'zzz_rank': 4, 'zzz_sigma2_init': SIGMA2_INIT}
    model = timm.create_model('test_vit.r160_in1k.zzz_r16')
    assert model.head.rank == 16 and model.num_classes == 1000 and model.pretrained_cfg['tag'] == 'r160_in1k.zzz_r16'
    assert type(timm.create_model('test_vit').head) is torch.nn.Linear


def test_options():
    model = timm.create_model('test_vit.zzz_r8', num_classes=5, zzz_rank=3, zzz_sigma2_init=0.5, zzz_v_min=1e-3)
    assert (model.head.rank, model.head.v_min) == (3, 1e-3)
    assert isinstance(timm.create_model('test_vit', zzz_rank=2).head, ZZZHead)  # as a config.json asks for it
    with pytest.raises(TypeError, match='Unknown argument zzz_foo .*zzz_rank'):
        timm.create_model('test_vit.zzz_r8', zzz_foo=1)


def test_features():
    assert timm.create_model('test_vit.zzz_r8', num_classes=0)(torch.randn(1, 3, 160, 160)).ndim == 2
    model = timm.create_model('test_vit.zzz_r8', num_classes=0)
    model.reset_classifier(3)
    assert model.head.rank == 8
    assert len(timm.create_model('test_resnet.zzz_r8', features_only=True)(torch.randn(1, 3, 64, 64))) > 1


@pytest.mark.parametrize('base', ['test_vit', 'test_vit.r160_in1k'])
@pytest.mark.parametrize(
    'tag', ['zzz_', 'zzz', 'zzz_r', 'zzz_r-1', 'zzz_x', 'zzz_r08', 'zzz_r8.5', 'zzz-r8', 'zzz_r8x', 'zzzr8', 'ZZZ_r8']
)
def test_malformed_tags(base, tag):
    """The error shows the name that was asked for and the right one, with the base tag."""
    with pytest.raises(ValueError) as e:
        timm.create_model(f'{base}.{tag}')
    right = base if tag != 'zzz_r8.5' else 'test_vit'
    assert str(e.value) == (
        f'Invalid tag in {base}.{tag}: a ZZZ head is asked for as {right}.zzz_r8, with rank 4, 8 or 16'
    )


@pytest.mark.parametrize('tag', ['zzz_r8.r160_in1k', 'r160_in1k_zzz_r8', 'nope.zzz_x', 'zzz_r8.zzz_r8'])
def test_tags_in_the_wrong_place(tag):
    with pytest.raises(ValueError, match=rf'Invalid tag in test_vit\.{tag}: .* as test_vit\.(r160_in1k\.)?zzz_r8'):
        timm.create_model(f'test_vit.{tag}')


@pytest.mark.parametrize('base', ['test_vit', 'test_vit.r160_in1k', 'test_efficientnet'])
def test_ranks_above_the_width(base):
    width = timm.create_model(base).num_features
    assert width < 99999
    with pytest.raises(
        ValueError, match=rf'{base}\.zzz_r99999: .*the width of the embeddings, {width};.* {base}\.zzz_r8'
    ):
        timm.create_model(f'{base}.zzz_r99999')
    with pytest.raises(ValueError, match=rf'{base}.zzz_r{width} is not registered: .*zzz_rank={width}.*register'):
        timm.create_model(f'{base}.zzz_r{width}', num_classes=0)
    with pytest.raises(ValueError, match=rf'rank: .* feat_dim = {width}, got 99999'):
        timm.create_model(f'{base}.zzz_r8', zzz_rank=99999)


def test_the_width_is_that_of_the_arguments():
    with pytest.raises(ValueError, match='width of the embeddings, 96;'):
        timm.create_model('test_vit.zzz_r99999', embed_dim=96)
    with pytest.raises(ValueError, match='levit_128s.zzz_r99999'):
        timm.create_model('levit_128s.zzz_r99999')
    with pytest.raises(ValueError, match='test_vit.zzz_r99999 is not registered'):
        timm.create_model('test_vit.zzz_r99999', nonsense=1)


def test_unregistered_ranks_and_tags():
    with pytest.raises(ValueError, match=r'test_vit.zzz_r5 is not registered: .*zzz_rank=5.*register'):
        timm.create_model('test_vit.zzz_r5')
    with pytest.raises(ValueError, match=r'timm knows no test_vit.nope.* test_vit.zzz_r8.*\(tags: r160_in1k\)'):
        timm.create_model('test_vit.nope.zzz_r8')
    with pytest.raises(RuntimeError, match='Unknown model .nope'):
        timm.create_model('nope.zzz_r8')


@pytest.mark.parametrize('tag', ['zzz_r', 'zzz_r-1', 'zzz_r99999', 'zzz_x', 'zzz_r08'])
def test_where_timm_looks_a_name_up_itself_its_error_names_the_tag(tag):
    """timm's scripts do before they build a model, so what they print is timm's own."""
    with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \({tag}\) for test_vit'):
        timm.models.resolve_model_input_args(f'test_vit.{tag}')


def test_other_tags_are_left_to_timm():
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(nope\) for test_vit'):
        timm.create_model('test_vit.nope')


def test_register():
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


def test_pretrained_backbone(stock):
    file, state = stock
    model = create(file, num_classes=7)
    loaded = model.state_dict()
    backbone = [k for k in state if not k.startswith('fc.') and not k.startswith('head.')]
    assert all(torch.equal(loaded[k], state[k]) for k in backbone) and len(backbone) > 20
    head = model.get_classifier()
    assert head.num_classes == 7 and head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_pretrained_with_the_same_classes_warm_starts(stock):
    file, state = stock
    head = create(file).get_classifier()
    weight = next(v for k, v in state.items() if v.shape == head.weight.shape)
    assert torch.equal(head.weight, weight)


def test_pretrained_other_channels(stock):
    model = create(stock[0], num_classes=7, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_truncated_backbone_is_an_error(stock, tmp_path):
    file, state = stock
    gone = [k for k in state if 'layer4' in k and k.endswith('weight')]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, tmp_path / 'cut.safetensors')
    for kwargs in (dict(num_classes=7), dict(num_classes=0), {}):
        with pytest.raises(RuntimeError, match=re.escape(gone[0])):
            create(tmp_path / 'cut.safetensors', **kwargs)


def test_zzz_checkpoint_as_pretrained(stock, tmp_path, caplog):
    trained = timm.create_model('test_resnet.zzz_r8', num_classes=7)
    torch.nn.init.normal_(trained.get_classifier().v_raw)
    save_file(trained.state_dict(), tmp_path / 'zzz.safetensors')
    overlay = dict(file=str(tmp_path / 'zzz.safetensors'), num_classes=7)
    model = timm.create_model('test_resnet.zzz_r8', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    for k, v in trained.state_dict().items():
        assert torch.equal(model.state_dict()[k], v), k
    with caplog.at_level(logging.INFO):
        other = timm.create_model('test_resnet.zzz_r8', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert other.get_classifier().num_classes == 3 and 'starts anew' in caplog.text
    assert torch.equal(other.state_dict()['conv1.0.weight'], trained.state_dict()['conv1.0.weight'])


def test_checkpoint_path_and_ema(stock, tmp_path):
    trained = timm.create_model('test_resnet.zzz_r8', num_classes=7)
    averaged = timm.create_model('test_resnet.zzz_r8', num_classes=7)
    torch.save({'state_dict': trained.state_dict(), 'state_dict_ema': averaged.state_dict()}, tmp_path / 'last.pth.tar')
    model = timm.create_model('test_resnet.zzz_r8', num_classes=7, checkpoint_path=str(tmp_path / 'last.pth.tar'))
    assert torch.equal(model.get_classifier().A, averaged.get_classifier().A)
    timm.models.load_checkpoint(model, str(tmp_path / 'last.pth.tar'), use_ema=False)
    assert torch.equal(model.get_classifier().A, trained.get_classifier().A)
    with pytest.raises(RuntimeError, match='classes 7 -> 3'):
        timm.create_model('test_resnet.zzz_r8', num_classes=3, checkpoint_path=str(tmp_path / 'last.pth.tar'))
    # a linear checkpoint of the same classes warm-starts
    model = timm.create_model('test_resnet.zzz_r8', checkpoint_path=str(stock[0]))
    assert model.get_classifier().rank == 8


def test_local_dir_round_trip_and_no_trace_of_the_hooks(tmp_path):
    model = timm.create_model('test_resnet.zzz_r4', num_classes=7, zzz_v_init=0.3).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and again.pretrained_cfg['tag'] == 'zzz_r4'
    for module in again.modules():
        if not isinstance(module, ZZZHead):
            assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks
