"""Fold a temperature from held-out images into a checkpoint of train.py: ``python -m timm_zzz calibrate``."""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from ..head import heads_of, record_inputs
from ..metrics import Calibration, KeptLogits, Predictions, cross_calibrate, evaluate
from ..models.predict import measure_percentiles, percentiles_of
from ..scores import fold_temperature
from .common import amp_dtype_of, check_output, device_of, exit_on_error, progress, written_whole
from .run import Run, add_run_arguments, load_run, open_images, read_checkpoint

__all__ = ['calibrate_run', 'main', 'write_checkpoint']


def calibrate_run(run: Run, options: argparse.Namespace) -> Calibration:
    """Fit a temperature to a run's model on held-out images, and fold it into every head that is used.

    Percentiles of the outlier score on these images, under the calibrated heads, are attached to the model. timm's
    models with several heads return the mean of their logits, so one temperature for all heads is right.
    ``run.calibration`` gets a line that describes the calibration.

    Args:
        options: Those of :func:`~timm_zzz.cli.run.add_images_arguments`, and data_dir and class_map.

    Raises:
        ValueError: If the images can't be opened, if no ZZZ head is used in eval mode, and as
            :func:`timm_zzz.metrics.evaluate`.
    """
    device, heads, kept = device_of(options), heads_of(run.model), KeptLogits()
    features: Dict[str, KeptLogits] = {}
    _, loader, _ = open_images(options, run, device)
    model = run.model.to(device)

    def keep(_: Tensor, logits: Tensor, __: Predictions, start: int) -> None:
        kept.add(start, logits)
        for path, x in inputs.items():
            features.setdefault(path, KeptLogits()).add(start, x)

    with record_inputs(heads) as inputs, progress(loader, 'images') as batches:
        predictions = evaluate(model, batches, device, amp_dtype_of(options, run.args), keep)
    if not inputs:
        raise ValueError('no ZZZ head takes part when the model is evaluated')
    calibration = cross_calibrate(kept.logits, predictions.target[:: kept.step])
    temperature = [fold_temperature(heads[path], calibration.temperature) for path in inputs][0]
    measure_percentiles(model, {path: each.logits for path, each in features.items()})
    model.cpu()
    (before, after), (nll, new_nll) = calibration.ece, (each.mean_nll for each in calibration[1:3])
    line = (
        f'Calibrated: the logits were divided by {temperature:.4g}, the temperature of '
        f'{len(calibration.before.target)} images of `{options.split}`. That takes the expected calibration error from '
        f'{100 * before:.2f} % to {100 * after:.2f} % and the negative log-likelihood from {nll:.4f} to {new_nll:.4f}, '
        'measured on each half of the images with the temperature of the other half.'
    )
    run.calibration = '\n'.join(filter(None, [run.calibration, line]))
    return calibration


def write_checkpoint(run: Run, path: Path) -> None:
    """Write the model of a run as a checkpoint of train.py, without the parts that only ``--resume`` needs."""
    saved = read_checkpoint(run.checkpoint)
    state = {key: value.detach().cpu().contiguous() for key, value in run.model.state_dict().items()}
    new: Dict[str, Any] = {key: saved[key] for key in ('epoch', 'arch', 'version', 'metric') if key in saved}
    new.update(state_dict=state, args=argparse.Namespace(**run.args), calibration=run.calibration)
    percentiles = percentiles_of(run.model)
    if percentiles is not None:
        new['percentiles'] = percentiles._asdict()
    if run.averaged:  # readers that ask for averaged weights find them, and summary.csv matches them
        new['state_dict_ema'] = state
    with written_whole(path) as draft:
        torch.save(new, draft)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz calibrate',
        description='Divide the logits of a model that train.py trained by the temperature that suits held-out images '
        'best, within the parameters of its ZZZ head, and write a checkpoint that validate.py --checkpoint, train.py '
        '--initial-checkpoint, report and push read like the one of the run. What is printed as "after" is measured on '
        'each half of the images with the temperature of the other half.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)
    add = parser.add_argument
    help = 'the new checkpoint; if not given, calibrated.pth.tar beside the old one, where push finds summary.csv'
    add('-o', '--output', type=Path, metavar='FILE', help=help)
    add('--force', action='store_true', help='replace the file if it exists')
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    with exit_on_error(parser):
        _calibrate(options)


def _calibrate(options: argparse.Namespace) -> None:
    checkpoint: Path = options.checkpoint
    output: Path = options.output or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / 'calibrated.pth.tar'
    check_output(output, options.force, '.pth.tar')
    run = load_run(checkpoint, use_ema=options.use_ema, model_name=options.model)
    if options.model:
        run.args = {**run.args, 'model': options.model}
    calibration = calibrate_run(run, options)
    pairs = (('before:', calibration.before), ('after: ', calibration.after))
    for (when, result), ece in zip(pairs, calibration.ece, strict=True):
        figures = f'negative log-likelihood {result.mean_nll:.4f}, expected calibration error {100 * ece:.2f} %'
        print(f'{when} top-1 {result.top1:.2f} %, {figures}')
    print(
        f'temperature {calibration.temperature:.4g}, of {len(calibration.before.target)} images of {options.split}; '
        '"after" is of each half of them with the temperature of the other half'
    )
    write_checkpoint(run, output)
    print(output)
