"""Top-1 and NLL of README.md's own commands: the quickstart recipe and its linear twin, by timm's train.py.

    python benchmarks/train_script.py --scripts CLONE --data-dir DIR --num-classes N --results FILE.jsonl \
        [further options of train.py]

CLONE is one of huggingface/pytorch-image-models; its train.py is copied, or it would import the clone's timm. Each head
and seed is a line of the results file, with the figures of the last epoch; runs that it has are not repeated.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Optional

import torch
from accuracy import Row, append, read
from measure import environment_line

RECIPE = Path(__file__).resolve().parent.parent / 'hparams' / 'quickstart_mobilenetv2_100.zzz_r8.yaml'
LINEAR = ('--model', 'mobilenetv2_100')
# Options of each head behind the recipe's; DIR is the data's folder
HEADS: Dict[str, List[str]] = {
    'linear': [*LINEAR],
    'linear:rows=zero': [*LINEAR, '--head-init-scale', '0.0'],
    'zzz_r8': [],
    'zzz_r8:fit=finetune': ['--model-kwargs', 'zzz_fit=DIR/train'],
}
JOB = ('data', 'head', 'seed', 'options')  # what tells rows apart


def run(job: Row, options: argparse.Namespace, folder: Path, index: int) -> Row:
    """Train once in a process of its own; returns the job with its figures, or with an ``error``."""
    data, name = options.data_dir.resolve(), f'{index}'
    command = [sys.executable, 'train.py', '--config', str(RECIPE), '--data-dir', str(data)]
    command += ['--num-classes', str(options.num_classes), '--seed', str(job['seed']), '--experiment', name]
    if options.pretrained_path:
        command += ['--pretrained-path', str(options.pretrained_path.resolve())]
    command += ['--output', str(folder), *(word.replace('DIR', str(data)) for word in HEADS[job['head']])]
    env = dict(os.environ)
    if torch.cuda.device_count() > 1:
        env['CUDA_VISIBLE_DEVICES'] = str(index % torch.cuda.device_count())
    done = subprocess.run([*command, *options.rest], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        return dict(job, error=done.stderr[-1000:])
    with (folder / name / 'summary.csv').open() as f:
        last = list(csv.DictReader(f))[-1]
    return dict(job, epoch=int(last['epoch']), top1=float(last['eval_top1']), nll=float(last['eval_loss']))


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--scripts', type=Path, required=True, metavar='CLONE', help='folder with train.py')
    add('--data-dir', type=Path, required=True, metavar='DIR', help='ImageFolder: train, validation')
    add('--num-classes', type=int, required=True, metavar='N')
    add('--results', type=Path, required=True, metavar='FILE.jsonl')
    add('--heads', nargs='+', choices=tuple(HEADS), default=list(HEADS), metavar='HEAD')
    add('--seeds', type=int, nargs='+', default=[42, 43, 44])
    add('--processes', type=int, default=1, metavar='N', help='runs at the same time, over all GPUs')
    add('--pretrained-path', type=Path, metavar='FILE', help="weights of the backbone, in place of timm's own")
    options, options.rest = parser.parse_known_args(arguments)
    shared = dict(data=options.data_dir.name, options=' '.join(options.rest))
    jobs = [dict(shared, head=head, seed=seed) for seed, head in product(options.seeds, options.heads)]
    done = [{k: row[k] for k in JOB} for row in read(options.results)]
    jobs = [job for job in jobs if job not in done]
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    failed = []
    with TemporaryDirectory() as temporary, ThreadPoolExecutor(options.processes) as pool:
        shutil.copy(options.scripts / 'train.py', temporary)
        for done_run in as_completed(
            [pool.submit(run, job, options, Path(temporary), i) for i, job in enumerate(jobs)]
        ):
            row = done_run.result()
            if 'error' in row:
                failed.append(row)
                continue
            append(options.results, dict(row, environment=environment_line(device)))
            print(*(row[k] for k in JOB), f'{row["top1"]:.2f} {row["nll"]:.3f}', file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f'{len(failed)} runs failed, the first with\n{failed[0]["error"]}')


if __name__ == '__main__':
    main()
