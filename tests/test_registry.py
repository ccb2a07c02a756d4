import logging
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_zzz
from timm_zzz import ZZZHead
from timm_zzz.attach import SIGMA2_INIT
from timm_zzz.head import ZZZConvHead

_SNAPSHOT = """
import warnings; warnings.simplefilter('error')
import timm
def snapshot():
    names = timm.list_models()
    return dict(
        models=names,
        pretrained=timm.list_pretrained(),
        modules={m: timm.list_models(module=m) for m in timm.list_modules()},
        tags=[n for n in timm.list_models(include_tags=True) if 'zzz' not in n],
        cfgs={n: timm.get_pretrained_cfg(n) for n in [*names, *timm.list_pretrained()]},
        direct=timm.models.vision_transformer.vit_base_patch16_224,
    )
before = snapshot()
import timm_zzz
after = snapshot()
for key in before:
    assert before[key] == after[key], key
for name in [*before['models'], *before['tags']]:
    for rank in (4, 8, 16):
        assert timm.get_pretrained_cfg(f'{name}.zzz_r{rank}').tag.endswith(f'zzz_r{rank}'), name
"""


def test_import_changes_nothing_else(run):
    run('-c', _SNAPSHOT)


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


@pytest.mark.parametrize('tag', ['zzz_', 'zzz_r', 'zzz_r-1', 'zzz_x', 'zzz_r08'])
def test_malformed_tags(tag):
    with pytest.raises(ValueError, match=rf'Invalid tag in test_vit.{tag}: .* test_vit.zzz_r8'):
        timm.create_model(f'test_vit.{tag}')


def test_unregistered_ranks_and_tags():
    with pytest.raises(ValueError, match=r'test_vit.zzz_r5 is not registered: .*zzz_rank=5.*register'):
        timm.create_model('test_vit.zzz_r5')
    with pytest.raises(ValueError, match='timm knows no test_vit.nope'):
        timm.create_model('test_vit.nope.zzz_r8')


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


def test_without_the_plugin_a_zzz_folder_fails_by_name(tmp_path, run):
    timm.models.save_for_hf(
        timm.create_model('test_resnet.zzz_r4', num_classes=7), str(tmp_path), safe_serialization=True
    )
    result = run('-c', f'import timm; timm.create_model("local-dir:{tmp_path}", pretrained=True)', check=False)
    assert result.returncode != 0 and 'zzz_' in result.stderr


@pytest.mark.slow
def test_sweep_over_all_architectures():
    """Every architecture on the meta device: a ZZZ head fed (B, d), or a ValueError that names the architecture."""
    counts = {'head': 0, 'refused': 0}
    for name in timm.list_models():
        shapes = []
        with torch.device('meta'):
            try:
                model = timm.create_model(f'{name}.zzz_r4', num_classes=10).eval()
            except ValueError as e:
                assert name in str(e)
                counts['refused'] += 1
                continue
            heads = [module for module in model.modules() if isinstance(module, ZZZHead)]
            classifier = model.get_classifier()
            assert heads == (list(classifier) if isinstance(classifier, tuple) else [classifier]), name
            for head in heads:
                head.register_forward_pre_hook(lambda m, args, shapes=shapes: shapes.append(args[0].shape))
            try:
                model(torch.randn(2, *model.pretrained_cfg['input_size']))
            except (NotImplementedError, RuntimeError):  # no meta kernel: the shape is checked on the CPU elsewhere
                shapes = shapes or [(2, heads[0].feat_dim)]
            model.reset_classifier(7)
            assert {m.num_classes for m in model.modules() if isinstance(m, ZZZHead)} == {7}, name
        pooled = (2, heads[0].feat_dim, 1, 1)[: 4 if isinstance(heads[0], ZZZConvHead) else 2]
        assert all(tuple(shape) == pooled for shape in shapes), name
        counts['head'] += 1
    print(counts)
    assert counts['head'] >= 1268
