import copy
import pickle

import pytest
import timm
import timm.optim
import timm.utils
import torch
from oracles import distinct
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead, attach
from timm_zzz.fit import fit_model
from timm_zzz.head import ZZZConvHead, heads_of
from timm_zzz.models import _timm

# One small architecture per way of holding the classifier
ARCHITECTURES = ['test_vit', 'test_resnet', 'test_efficientnet', 'test_convnext']
ARCHITECTURES += ['mobilenetv3_small_050', 'densenet121']


def image(model, batch=2):
    return torch.randn(batch, *model.pretrained_cfg['input_size'])


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_model_keeps_its_shape(name):
    plain = timm.create_model(name, num_classes=5).eval()
    model = distinct(attach(copy.deepcopy(plain), rank=3))
    x = image(model)
    head = model.get_classifier()
    assert isinstance(head, ZZZHead) and head.rank == 3 and not head.training
    assert torch.equal(model.forward_features(x), plain.forward_features(x))
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, plain.forward_head(features, pre_logits=True))
    torch.testing.assert_close(model(x), head(pooled))
    assert model.num_features == plain.num_features and model.head_hidden_size == plain.head_hidden_size
    path = next(k for k, m in model.named_modules() if m is head)
    assert isinstance(plain.get_submodule(path), nn.Linear)
    assert {f'{path}.v_raw', f'{path}.sigma2_raw'} <= set(model.no_weight_decay())


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_reset_classifier(name):
    model = attach(timm.create_model(name, num_classes=5), rank=3, v_init=0.5).to(torch.float64).eval()
    model.reset_classifier(7)
    head = model.get_classifier()
    linear = timm.create_model(name, num_classes=5).to(torch.float64)
    linear.reset_classifier(7)
    dtype = linear.get_classifier().weight.dtype  # float32 before timm 1.0.29
    assert (head.num_classes, head.rank, head.weight.dtype, head.training) == (7, 3, dtype, False)
    model.to(torch.float64)
    assert model.num_classes == 7 and model(image(model).double()).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model(image(model).double()).ndim == 2
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm.utils.ModelEmaV3(model).module
    for each in (model, *copies):
        each.reset_classifier(4)
        assert each.get_classifier().rank == 3


def test_convolutional_classifier():
    """Its logits, and TorchScript, are in test_families.py."""
    plain = timm.create_model('dla46_c', num_classes=5).eval()
    model = attach(copy.deepcopy(plain), rank=3, warm_start=True)
    head = model.get_classifier()
    assert isinstance(head, ZZZConvHead) and torch.equal(head.weight, plain.get_classifier().weight.flatten(1))
    x = image(model)
    features = model.forward_features(x)
    dense = head(features)  # one embedding per position
    assert dense.shape == (2, 5, *features.shape[2:])
    torch.testing.assert_close(dense[1, :, 0, 2], ZZZHead.forward(head, features[1, :, 0, 2]))
    model.reset_classifier(7)
    assert isinstance(model.get_classifier(), ZZZConvHead) and model(x).shape == (2, 7)
    model.load_state_dict({**model.state_dict(), 'fc.weight': torch.randn_like(model.fc.weight)})
    model.reset_classifier(0)
    assert model(x).shape == plain.forward_head(features, pre_logits=True).flatten(1).shape


def test_pairs_of_classifiers():
    model = attach(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5), rank=3).eval()
    model.reset_classifier(7)
    assert [(head.num_classes, head.rank) for head in model.get_classifier()] == [(7, 3)] * 2
    model.reset_classifier(0)
    assert model(image(model)).shape == (2, model.num_features)
    model = attach(timm.create_model('efficientformerv2_s0', num_classes=5, distillation=False), rank=3).eval()
    assert [type(head) for head in model.get_classifier()] == [ZZZHead, type(None)]
    if not _timm.SAVES_ARGS:
        pytest.skip('timm before 1.0.31 calls the classifier that this model has not got')
    assert model(image(model)).shape == (2, 5)


def test_class_of_a_model_stays_in_timms_module():
    """There timm looks up checkpoint filters; and TorchScript the annotations of the class itself."""
    model = attach(timm.create_model('test_vit', num_classes=5), rank=3)
    assert type(model).__module__ == 'timm.models.vision_transformer'
    assert 'dynamic_img_size' in type(model).__annotations__


def test_reset_classifier_changes_the_pooling():
    model = attach(timm.create_model('test_resnet', num_classes=5), rank=3)
    model.reset_classifier(4, 'catavgmax')
    assert model.get_classifier().feat_dim == 2 * model.num_features and model(image(model)).shape == (2, 4)


def test_layer_decay_groups_are_timms():
    plain = timm.create_model('test_vit', num_classes=5)
    model = attach(copy.deepcopy(plain), rank=3)

    def groups(model):
        found = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
        names = {id(p): n for n, p in model.named_parameters()}
        scales = {names[id(p)]: group['lr_scale'] for group in found for p in group['params']}
        return {'head' if name.startswith('head.') else name: scale for name, scale in scales.items()}

    assert groups(model) == groups(plain)


def test_no_decay_on_variances():
    model = attach(timm.create_model('test_vit', num_classes=5), rank=3)
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1)
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    head = model.head
    assert [decay[id(p)] for p in (head.v_raw, head.sigma2_raw, head.bias)] == [0, 0, 0]
    assert decay[id(head.weight)] == decay[id(head.A)] == 0.1


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])  # with and without a no_weight_decay of its own
def test_no_decay_on_variances_of_a_scripted_model(name):
    """Script the model before the optimizer is created, which is the order of train.py --torchscript."""
    model = attach(timm.create_model(name, num_classes=5, scriptable=True), rank=3)
    scripted = torch.jit.script(model)
    expected = {f'{path}.{n}' for path in (model.pretrained_cfg['classifier'],) for n in ('v_raw', 'sigma2_raw')}
    assert set(scripted.no_weight_decay()) == set(model.no_weight_decay()) >= expected
    optimizer = timm.optim.create_optimizer_v2(scripted, 'adamw', lr=1e-3, weight_decay=0.1)
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    actual = {name: decay[id(p)] for name, p in scripted.named_parameters()}
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1)
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert actual == {name: decay[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize('used', [False, True])
@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel])
def test_wrappers_that_are_looked_into(wrap, used):
    model = timm.create_model('test_vit', num_classes=5).eval()
    wrapped, x = wrap(model), image(model)
    with torch.no_grad():
        if used:
            wrapped(x)
        assert attach(wrapped, rank=3) is wrapped and isinstance(distinct(model).head, ZZZHead)
        torch.testing.assert_close(wrapped(x), model(x))
        model.reset_classifier(7)
        assert isinstance(model.head, ZZZHead) and wrapped(x).shape == (2, 7)
    fit_model(wrapped, [(image(model, 14), torch.arange(14) % 7)])
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), model(x))


class _Saved(nn.Module):
    """Wrap a module the way PEFT wraps those in ``modules_to_save``."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(module) for name in ('default', 'other')})
        self.active_adapters, self.disable_adapters = ['default'], False

    def forward(self, x):
        return self.modules_to_save['default'](x)


def test_copies_that_peft_trains(tmp_path):
    model, plain = (distinct(attach(timm.create_model('test_vit', num_classes=5), rank=3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model.head = _Saved(model.head)
    before = copy.deepcopy(model.head.state_dict())
    loader = [(image(model, 20), torch.arange(20) % 5)]
    fit_model(model, loader), fit_model(plain, loader)
    for name, value in model.head.state_dict().items():
        path, _, parameter = name.rpartition('.')
        expected = plain.head.state_dict()[parameter] if path == 'modules_to_save.default' else before[name]
        torch.testing.assert_close(value, expected, msg=name)
    with pytest.raises(ValueError, match='PEFT holds the parameters already: attach the ZZZ head first'):
        attach(model)
    model.head.disable_adapters = True
    assert list(heads_of(model)) == ['head.original_module']


def test_other_wrappers_are_refused():
    model = timm.create_model('test_vit', num_classes=5)
    for wrapper in (timm.utils.ModelEmaV3(model), torch.compile(timm.utils.ModelEmaV3(model), backend='eager')):
        with pytest.raises(ValueError, match='ModelEmaV3 holds the parameters already: attach the ZZZ head first'):
            attach(wrapper)
    assert type(model.head) is nn.Linear


def is_flat(head):
    """Say whether all classes are the same Gaussian."""
    return all(torch.equal(p, p[:1].expand_as(p)) for p in head.parameters()) and not head.bias.any()


def test_warm_start_on_request():
    model = timm.create_model('test_resnet', num_classes=5)
    linear = model.get_classifier()
    head = attach(copy.deepcopy(model), rank=3).get_classifier()
    assert is_flat(head)
    head = attach(model, rank=3, warm_start=True).get_classifier()
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)
    again = attach(model, rank=2, warm_start=True).get_classifier()  # another rank, the same means
    assert again.rank == 2 and torch.equal(again.weight, linear.weight)
    assert is_flat(attach(model).get_classifier())
    nn.init.zeros_(model.get_classifier().weight)
    assert is_flat(attach(model, warm_start=True).get_classifier())


def test_reset_classifier_starts_as_the_first_head_did():
    model = attach(timm.create_model('test_vit', num_classes=5), rank=3, warm_start=True, v_init=0.5)
    model.reset_classifier(4)
    assert is_flat(model.head)
    torch.testing.assert_close(F.softplus(model.head.v_raw) + model.head.v_min, torch.full((4, 3), 0.5))
    model = attach(model, rank=3, init='reference')
    for num_classes in (4, 6):
        model.reset_classifier(num_classes)
        assert not is_flat(model.head) and not model.head.v_raw.any()
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_unsupported_classifiers_are_named():
    model = timm.create_model('test_resnet')
    model.get_classifier = lambda: nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match='test_resnet has a Bilinear as its classifier'):
        attach(model)
    model.get_classifier = lambda: nn.Linear(2, 2)
    with pytest.raises(ValueError, match='test_resnet has a classifier that is no part of it'):
        attach(model)
    del model.get_classifier
    model.fc = nn.Conv2d(2, 2, 3)
    with pytest.raises(ValueError, match='a convolution over .3, 3. positions as its classifier .fc.'):
        attach(model)


def test_models_without_a_classifier_and_wrong_options():
    for name in filter(timm.is_model, ('deepseek_vit_412m_enc', 'gemma4_vit_167m_enc')):  # not in timm 1.0.28
        with torch.device('meta'), pytest.raises(ValueError, match=f'{name} has no classifier'):
            attach(timm.create_model(name))
    with pytest.raises(ValueError, match='Linear has no classifier'):
        attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no classifier'):
        attach(timm.create_model('test_resnet', features_only=True))
    with pytest.raises(TypeError, match='Unknown option .*: foo'):
        attach(timm.create_model('test_vit'), foo=1)
    with pytest.raises(ValueError, match='rank: .*got 1000'):
        attach(timm.create_model('test_vit'), rank=1000)
