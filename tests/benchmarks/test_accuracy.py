"""Whole runs of accuracy.py and few_shot.py on tiny sets, their tables and their plots."""

import json
import math
import shutil
import statistics
from dataclasses import dataclass

import accuracy
import accuracy_table
import few_shot
import images
import probe
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starts import parse
from torch.nn import functional as F
from training import Runner, Settings

from timm_zzz import ZZZHead
from timm_zzz.head import SIGMA2_INIT

metrics = pytest.importorskip('sklearn.metrics')


@dataclass(frozen=True)
class SmallSteps(Settings):
    batch_size: int = 8


@pytest.fixture(scope='module')
def run(folder, backbone):
    """Run the command with more arguments and return the rows of its results file."""

    def run(results, *arguments):
        fixed = ('--data', folder, '--backbone', backbone[0], '--checkpoint', backbone[1], '--results', results)
        fixed += ('--seeds', 0, '--hold-out-every', 4, '--epochs', 2, '--device', 'cpu')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accuracy, 'Settings', SmallSteps)
            accuracy.main([str(a) for a in (*fixed, *arguments)])
        return [json.loads(line) for line in results.read_text().splitlines()]

    return run


@pytest.fixture(scope='module')
def kept(run, folder, tmp_path_factory):
    """A folder with runs.jsonl and what --keep writes, and its rows: two heads with all images, then with two each."""
    path = tmp_path_factory.mktemp('runs')
    options = ('--heads', 'linear', 'zzz_r2', '--shots', 0, 2, '--curve', 1, '--far', folder, '--keep', path / 'kept')
    return path, run(path / 'runs.jsonl', *options)


def test_whole_runs(run, kept, tmp_path, capsys):
    path, rows = kept
    assert [(row['head'], row['shots']) for row in rows] == [(h, k) for k in (0, 2) for h in ('linear', 'zzz_r2')]
    for row in rows:
        assert row['train_images'] == (6 if row['shots'] else 18) and [epoch for epoch, _ in row['curve']] == [1, 2]
        assert 0 <= row['top1'] <= 100 and math.isfinite(row['nll']) and row['far'] == {}
        assert row['curve'][-1][1] == row['top1']
    assert set(rows[1]['near']) > set(rows[0]['near']) > {'energy', 'shared_relative_mahalanobis'}
    assert len(rows[1]['v']) == 2 and rows[1]['sigma2'] == pytest.approx(SIGMA2_INIT, rel=0.1)

    shutil.copy(path / 'runs.jsonl', tmp_path)  # what is there is not run again
    again = run(tmp_path / 'runs.jsonl', '--heads', 'linear', 'cosine')
    assert again[:-1] == rows and again[-1]['head'] == 'cosine'
    table = capsys.readouterr().out
    assert '| linear | near |' in table and '| zzz_r2 | 1 |' in table and '| cosine | 1 |' in table


def test_same_seed_same_figures_and_label_smoothing_tells_runs_apart(run, kept, tmp_path):
    path, rows = kept
    (row,) = run(tmp_path / 'again.jsonl', '--heads', 'zzz_r2', '--shots', 2)
    assert row['nll'] == pytest.approx(rows[3]['nll'], rel=1e-4)
    shutil.copy(path / 'runs.jsonl', tmp_path)
    found = run(tmp_path / 'runs.jsonl', '--heads', 'linear', '--smoothing', 0.3)
    assert [row['smoothing'] for row in found] == [0.1] * 4 + [0.3]
    assert found[4]['nll'] != rows[0]['nll']
    assert accuracy_table.tables(found).count('| linear | 1 |') == 3


def test_kept_features_give_the_figures(kept):
    """Compute a run's accuracy and energy again from what --keep writes, by hand."""
    path, rows = kept
    found = load_file(path / 'kept' / 'gradients-zzz_r2-0-0.safetensors')
    head = ZZZHead(3, found['validation'].shape[1], rank=2).eval()
    head.load_state_dict({k[5:]: v for k, v in found.items() if k.startswith('head.')})
    with torch.no_grad():
        known, near = (head(found[k].float()) for k in ('validation', 'near'))
    assert 100 * (known.argmax(1) == found['validation_target']).double().mean() == pytest.approx(rows[1]['top1'])
    energies = [-logits.logsumexp(1) for logits in (known, near)]
    labels = [0] * len(known) + [1] * len(near)
    expected = 100 * metrics.roc_auc_score(labels, torch.cat(energies))
    assert rows[1]['near']['energy'] == pytest.approx(expected, abs=4)
    assert len(found['train']) == len(found['train_target']) == rows[1]['train_images']


def test_the_runner_finds_the_last_layer(folder, backbone):
    runner = Runner(Settings(*backbone, epochs=1), torch.device('cpu'))
    model, head = runner.start(images.load(folder, 'train', 64), parse('zzz_r2:basis=layer'), seed=0)
    flat, basis = model.blocks[-1].mlp.fc2.weight.detach(), head.A[0].detach()
    kept = (basis.T @ flat).square().sum().item()
    assert kept == pytest.approx(torch.linalg.svdvals(flat)[:2].square().sum().item(), rel=1e-4)


def test_table_has_means_and_standard_errors():
    shared = dict(data='birds', shots=0, hold_out_every=0, smoothing=0.1, nll=1.0, ece=2.0, seconds=3.0)
    top1 = {'linear': [80.0, 82.0, 81.0], 'zzz_r8': [82.0, 82.5, 83.0]}
    rows = [dict(shared, head=head, seed=i, top1=v) for head, values in top1.items() for i, v in enumerate(values)]
    difference = [b - a for a, b in zip(*top1.values(), strict=True)]
    mean, error = statistics.fmean(difference), statistics.stdev(difference) / math.sqrt(3)
    expected = f'| zzz_r8 | 3 | 82.50 ± {0.5 / math.sqrt(3):.2f} | {mean:.2f} ± {error:.2f} |'
    assert expected in accuracy_table.tables(rows)


def test_few_shot_draws_and_table(folder, backbone, tmp_path, capsys, monkeypatch):
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    index = few_shot.draw(target, 2, seed=0)
    assert target[index].tolist() == [0, 0, 1, 1] and len(set(index.tolist())) == 4
    assert sorted(few_shot.draw(target, 0, seed=0).tolist()) == list(range(7))
    monkeypatch.setattr(probe, 'PENALTIES', (1e-3, 1e-1))
    arguments = ('--data', folder, '--backbone', backbone[0], '--checkpoint', backbone[1], '--cache', tmp_path)
    for _ in range(2):  # the second time from the cache
        few_shot.main([str(a) for a in (*arguments, '--shots', 3, 0, '--seeds', 0, 1)])
    first, second = capsys.readouterr().out.split('| set |')[1:]
    assert first == second
    lines = first.splitlines()[2:]
    names = ['linear probe, tuned', 'fit, rank 0', 'fit, rank 8']
    assert [line.split(' | ')[1:3] for line in lines] == [[k, name] for k in ('3', 'all') for name in names]
    assert ' ± ' in lines[0] and ' ± ' not in lines[3]


def test_plots(kept, tmp_path):
    pytest.importorskip('matplotlib')
    import plot_accuracy

    plot_accuracy.main([str(kept[0] / 'runs.jsonl'), str(tmp_path / 'plot.png')])
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.width > 3.5 * image.height  # four panels of one set


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_a_graph_trains_as_eager_steps_do(folder, tmp_path):
    name, file, device = 'test_efficientnet', tmp_path / 'backbone.safetensors', torch.device('cuda')
    save_file({k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()}, file)
    runner = Runner(Settings(name, str(file), epochs=1), device)
    data = images.load(folder, 'train', 64).to(device)
    spec = parse('zzz_r2')
    x = torch.randn(64, 3, runner.size, runner.size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(64, device=device) % 4
    grads = []
    for graphed in (False, True):
        model, head = runner.start(data, spec, seed=0)
        model.train()
        if graphed:
            runner._step(model, head, spec, data)(x, y)
        else:
            with torch.autocast('cuda', torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y, label_smoothing=0.1)
            loss.backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for k, eager in grads[0].items():
        torch.testing.assert_close(grads[1][k], eager, atol=0.02 * eager.abs().max().item() + 1e-6, rtol=0.05)
