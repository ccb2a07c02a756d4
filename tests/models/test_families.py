"""Every way in which timm's models hold a classifier: values against the head's formula, and the hooks timm offers."""

import copy
import pickle
import shutil
import warnings

import ddp
import numpy as np
import pytest
import sweep
import timm
import timm.utils
import torch
from oracles import distinct, low_rank_logits
from timm.utils import reparameterize_model
from torch import nn

from timm_zzz import ZZZHead, attach
from timm_zzz.head import FusedZZZHead, ZZZConvHead
from timm_zzz.models.attach import find_classifiers

# A small architecture for each, and a size of its images
FAMILIES = {
    'test_vit': 160,
    'test_resnet': 160,
    'dla46_c': 64,  # a 1x1 convolution
    'deit_tiny_distilled_patch16_224': 224,  # two, averaged
    'levit_128s': 224,  # two behind batch norms
    'shvit_s1': 64,  # one behind a batch norm
    'repvit_m0_9': 64,  # a module of two behind batch norms
    'crossvit_9_240': 240,  # a list
    'efficientvim_m1_dist': 64,  # two lists
    'volo_d1_224': 224,  # a second one for tokens
    'caformer_s18': 64,  # the last layer of an MLP
    'cpubone_b0_bfrobust': 64,  # wrapped
    'sequencer2d_s': 224,  # get_classifier() is the module around it
    'resnet50_clip': 224,  # in an attention pool
}
LARGE = {'sequencer2d_s', 'resnet50_clip', 'volo_d1_224'}
SMALL = [name for name in FAMILIES if name not in LARGE]
# Those whose heads are easiest to miss
SEVERAL = ['crossvit_9_240', 'repvit_m0_9', 'caformer_s18', 'levit_128s', 'efficientvim_m1_dist']


def families(*quick, of=FAMILIES):
    """The architectures for a test, of which those that are not named are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


def build(name, **kwargs):
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name}')
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = timm.create_model(name, num_classes=5, **kwargs)
        model = distinct(attach(copy.deepcopy(plain), rank=3))
    return plain, model


def image(name, batch=2, channels=3):
    return torch.randn(batch, channels, FAMILIES[name], FAMILIES[name])


class Formula(nn.Module):
    """A head's logits by its density, from torch.distributions in float64."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        h = self.head
        tensors = [t.detach().double() for t in (h.weight, h.bias, h.A, h.v_raw, h.sigma2_raw)]
        last = x.movedim(1, -1) if isinstance(h, ZZZConvHead) else x
        logits = low_rank_logits(last.double(), *tensors).float()
        return logits.movedim(-1, 1) if isinstance(h, ZZZConvHead) else logits


def flat(out):
    return [t for part in out for t in flat(part)] if isinstance(out, (tuple, list)) else [out]


def assert_same(actual, expected, **tolerance):
    assert sweep.structure(actual) == sweep.structure(expected)
    for a, e in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize('name', families(*SMALL))
def test_values(name):
    """timm's own model with the formula in place of its linear layers gives what the ZZZ model gives."""
    plain, model = build(name)
    heads = find_classifiers(model)
    assert heads and list(heads) == list(find_classifiers(plain))
    for path, head in heads.items():
        plain.set_submodule(path, Formula(head))
    x = image(name)
    for train in (False, True):
        for m in (plain, model):
            m.train(train)
            if hasattr(m, 'set_distilled_training'):
                m.set_distilled_training(train)
        outputs = []
        for m in (plain, model):
            torch.manual_seed(1)  # dropout and the like
            np.random.seed(1)  # VOLO's mixing of tokens
            outputs.append(m(x))
        assert_same(outputs[1], outputs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    'name', families('test_vit', 'test_resnet', 'dla46_c', of=[*SMALL, 'volo_d1_224', 'resnet50_clip'])
)
def test_architecture(name):
    """Structure of outputs, resets and distilled training, as the sweep over all architectures checks them."""
    assert sweep.check(name)['outcome'].startswith('passes')


@pytest.mark.parametrize('name', families('test_vit', 'dla46_c', 'repvit_m0_9', 'efficientvim_m1_dist'))
def test_gradients_reach_every_parameter_that_timms_reach(name):
    """Find no unused parameters but timm's own; DistributedDataParallel fails on others."""
    unused = []
    for m in build(name):
        m.train()
        if hasattr(m, 'set_distilled_training'):
            m.set_distilled_training(True)
        out = [t for t in flat(m(image(name))) if isinstance(t, torch.Tensor) and t.requires_grad]
        sum(t.square().sum() for t in out).backward()
        heads = list(find_classifiers(m))
        without = {n: n.rpartition('.')[0] for n, p in m.named_parameters() if p.grad is None}
        unused.append({above if above in heads else n for n, above in without.items()})
    assert unused[1] == unused[0]


def compiled(m, x):
    torch._dynamo.reset()
    return torch.compile(m, backend='eager', fullgraph=True)(x)


def checkpointed(m, x):
    m = copy.deepcopy(m)
    m.set_grad_checkpointing(True)
    return m(x)


LAST = dict(memory_format=torch.channels_last)
FORMS = {
    'deepcopied': lambda m, x: copy.deepcopy(m)(x),
    'pickled': lambda m, x: pickle.loads(pickle.dumps(m))(x),
    'ema': lambda m, x: timm.utils.ModelEmaV3(m).module(x),
    'fx_traced': lambda m, x: torch.fx.symbolic_trace(m)(x),
    'channels_last': lambda m, x: copy.deepcopy(m).to(**LAST)(x.to(**LAST)),
    'checkpointed': checkpointed,
    'scripted': lambda m, x: torch.jit.script(m)(x),
}
TRACED_FORMS = {
    'traced': lambda m, x: torch.jit.trace(m, x)(x),
    'compiled': compiled,
    'exported': lambda m, x: torch.export.export(m, (x,)).module()(x),
}


def assert_form(name, form):
    """What works on timm's own model works, and gives the logits of the model itself."""
    plain, model = build(name)
    plain.eval(), model.eval()
    x = image(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            form(plain, x)
        except Exception as e:
            pytest.skip(f"timm's own model raises {type(e).__name__}")
        assert_same(form(model, x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', families('test_vit', 'test_resnet', 'dla46_c', of=SMALL))
def test_forms(name, form):
    assert_form(name, FORMS[form])


@pytest.mark.parametrize('form', TRACED_FORMS)
@pytest.mark.parametrize('name', families('test_resnet', of=SMALL))
def test_traced_forms(name, form):
    assert_form(name, TRACED_FORMS[form])


@pytest.mark.parametrize('name', families('test_resnet', 'shvit_s1', of=SMALL))
def test_reparameterized(name):
    """Every head is fused by itself; what is around it stays."""
    plain, model = build(name)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
    x = image(name)
    expected = model(x)  # with gradients a head does not fuse itself
    with torch.no_grad():
        fused = reparameterize_model(model)
        assert reparameterize_model(fused, inplace=True) is fused
        assert_same(copy.deepcopy(fused)(x), fused(x))
        for form in (fused, torch.jit.trace(fused, x)):
            assert_same(form(x), expected, rtol=1e-4, atol=1e-3)
    heads = sum(isinstance(m, FusedZZZHead) for m in fused.modules())
    for path in find_classifiers(model):  # no norm before a head is left
        above = fused.get_submodule(path.rpartition('.')[0])
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in above.children()) or above is fused
    assert heads == len(find_classifiers(model)) and not any(isinstance(m, ZZZHead) for m in fused.modules())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('name', families('test_vit', 'dla46_c', of=SMALL))
def test_model_dtypes(name, dtype):
    plain, model = build(name)
    x = image(name).to(dtype)
    with torch.no_grad():
        try:
            plain.to(dtype).eval()(x)
        except RuntimeError as e:
            pytest.skip(f"timm's own model raises {type(e).__name__}")
        out = model.to(dtype).eval()(x)
    assert out.shape == (2, 5) and out.isfinite().all()
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize('name', families('test_vit', 'dla46_c', 'efficientvim_m1_dist'))
def test_meta_then_empty(name):
    with torch.device('meta'):
        model = build(name)[1]
    state = build(name)[1].state_dict()
    model.to_empty(device='cpu').load_state_dict(state)
    assert {k for k, t in model.state_dict().items() if not torch.equal(t, state[k])} == set()


@pytest.mark.parametrize('classes', [5, 7])
@pytest.mark.parametrize('name', families('repvit_m0_9', 'test_resnet', of=['test_resnet', *SEVERAL]))
def test_pretrained(name, classes, tmp_path):
    """Stock weights fill the backbone, and the means where the classes agree; a ZZZ checkpoint comes back."""
    torch.manual_seed(1)
    stock = timm.create_model(name, num_classes=5)
    for head in find_classifiers(stock).values():
        nn.init.normal_(head.weight)
    torch.save(stock.state_dict(), tmp_path / 'stock.pth')
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'stock.pth'), num_classes=5))
    model = timm.create_model(f'{name}.zzz_r4', num_classes=classes, **options)
    heads = tuple(f'{path}.' for path in find_classifiers(model))
    state = model.state_dict()
    assert all(torch.equal(state[k], t) for k, t in stock.state_dict().items() if not k.startswith(heads))
    for path, linear in find_classifiers(stock).items():
        assert torch.equal(state[f'{path}.weight'], linear.weight) == (classes == 5)
    torch.save(distinct(model).state_dict(), tmp_path / 'zzz.pth')
    again = timm.create_model(f'{name}.zzz_r4', num_classes=classes, checkpoint_path=tmp_path / 'zzz.pth')
    assert all(torch.equal(state[k], t) for k, t in again.state_dict().items())


@pytest.mark.parametrize('name', families('dla46_c', of=['dla46_c', *SEVERAL[:4]]))
def test_onnx_export_script(name, timm_scripts, run, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    shutil.copy(timm_scripts / 'onnx_export.py', tmp_path)
    model = distinct(timm.create_model(f'{name}.zzz_r8', num_classes=5)).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth')
    script = ['-m', 'timm_zzz', 'onnx_export.py', 'out.onnx', '--model', f'{name}.zzz_r8', '--num-classes', 5]
    size = ['--img-size', FAMILIES[name], '--batch-size', 2]
    run(*script, '--checkpoint', 'checkpoint.pth', '--reparam', *size)
    x = image(name)
    session = runtime.InferenceSession(str(tmp_path / 'out.onnx'), providers=['CPUExecutionProvider'])
    logits = torch.from_numpy(session.run([], {'input0': x.numpy()})[0])
    torch.testing.assert_close(logits, model(x).detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', families('test_vit', of=['test_vit', *SEVERAL[:3]]))
def test_arguments_of_create_model(name):
    """Device and dtype factory arguments, input channels, dropout."""
    full = f'{name}.zzz_r4'
    model = timm.create_model(full, num_classes=5, in_chans=1, drop_rate=0.5)
    assert model.eval()(image(name, channels=1)).shape == (2, 5)
    try:
        timm.create_model(name, device='meta', dtype=torch.bfloat16)
    except TypeError:
        pytest.skip('this architecture of timm takes no device')
    model = timm.create_model(full, num_classes=5, device='meta', dtype=torch.bfloat16)
    for head in find_classifiers(model).values():
        assert head.weight.is_meta and head.A.dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_efficientnet', 'test_convnext'])
def test_intermediates(name):
    plain, model = (m.eval() for m in build(name))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert_same(model.forward_intermediates(x, indices=2), plain.forward_intermediates(x, indices=2))
        features = [timm.create_model(n, features_only=True).eval()(x) for n in (f'{name}.zzz_r4', name)]
        assert sweep.structure(features[0]) == sweep.structure(features[1])
        for m in (plain, model):
            m.prune_intermediate_layers(1, prune_head=False)
        assert model(x).shape == plain(x).shape == (2, 5)
        for m in (plain, model):
            m.prune_intermediate_layers(1, prune_head=True)
        assert_same(model(x), plain(x))
        assert not any(isinstance(m, ZZZHead) for m in model.modules())


def test_other_input_sizes():
    dynamic, model = build('test_vit', dynamic_img_size=True)[1], build('test_vit')[1]
    model.set_input_size(img_size=96)
    assert dynamic(torch.randn(2, 3, 96, 128)).shape == model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_naflexvit():
    plain, model = build('naflexvit_base_patch16_gap', depth=2, embed_dim=96, num_heads=3)
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1)
    valid = torch.ones(2, 9, dtype=torch.bool)
    patches = dict(patches=torch.randn(2, 9, 16 * 16 * 3), patch_coord=coordinates, patch_valid=valid)
    plain.eval(), model.eval()
    with torch.no_grad():
        plain.set_submodule('head', Formula(model.head))
        assert_same(model(patches), plain(patches), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_all_architectures():
    failed = [r for r in map(sweep.result_of, timm.list_models()) if r['outcome'].startswith('FAILS')]
    assert not failed, '\n'.join(f'{r["name"]}: {r["outcome"]}' for r in failed)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize('name', ['test_vit', 'repvit_m0_9', 'efficientvim_m1_dist'])
def test_distributed(name, tmp_path):
    torch.multiprocessing.spawn(ddp.spawned, (ddp.train, tmp_path, name), nprocs=2)
