"""Training from random weights, where ZZZ heads were behind: the demo's coarse beetles, by heads and learning rates.

    python benchmarks/scratch.py [--heads linear linear:zero zzz_r8 zzz_r0] [--lrs 2e-3 4e-3 8e-3] [--seeds 0 1 2]

Top-1 in percent and NLL on validation images, means over the seeds. A CPU takes half a minute for a run.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from measure import environment_line
from timm.utils import random_seed
from torch import nn

import timm_zzz.cli.demo as demo
from timm_zzz.metrics import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--heads', nargs='+', default=['linear', 'linear:zero', 'zzz_r8', 'zzz_r0'])
    add('--lrs', type=float, nargs='+', default=[2e-3, 4e-3, 8e-3])
    add('--head-lrs', type=float, nargs='+', default=[1.0, 3.0], metavar='X', help='factors on it for the head')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--epochs', type=int, default=demo.COARSE_EPOCHS)
    options = parser.parse_args()
    device = torch.device('cpu')
    torch.set_num_threads(1)
    print(environment_line(device))
    print('| head | learning rate | head | top-1 | NLL |\n|---|---|---|---|---|', flush=True)
    with TemporaryDirectory() as temporary:
        for split, images in (('train', demo.COARSE_IMAGES), ('validation', demo.TEST_IMAGES)):
            demo.draw_classes(Path(temporary) / split, demo.COARSE, images, split)
        judged = list(demo.images_of(Path(temporary) / 'validation', device, 0))
        for lr, head_lr, head in itertools.product(options.lrs, options.head_lrs, options.heads):
            found = []
            for seed in options.seeds:
                random_seed(seed)
                name = demo.ARCHITECTURE + (f'.{head}' if head.startswith('zzz') else '')
                model = timm.create_model(name, num_classes=len(demo.COARSE))
                if head == 'linear:zero':
                    nn.init.zeros_(model.get_classifier().weight)
                rates = demo.Rates(lr, lr * head_lr)
                demo.train(model, Path(temporary) / 'train', options.epochs, rates, device, workers=1)
                found.append(evaluate(model, judged, device))
            top1, nll = (statistics.fmean(getattr(each, key) for each in found) for key in ('top1', 'mean_nll'))
            print(f'| {head} | {lr:g} | × {head_lr:g} | {top1:.1f} | {nll:.3f} |', flush=True)


if __name__ == '__main__':
    main()
