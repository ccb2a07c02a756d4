"""Whole runs of accuracy.py and few_shot.py on tiny sets, and their tables."""

import contextlib
import functools
import json
import math
import queue

import accuracy
import accuracy_table
import few_shot
import images
import probe
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from starts import parse
from torch.nn import functional as F
from training import Backbone, Runner, Settings, create, finish, learning_rates, own_stream

from timm_zzz import ZZZHead
from timm_zzz.fit import fit_head

metrics = pytest.importorskip('sklearn.metrics')

HEADS = ('linear', 'linear:rows=zero', 'zzz_r2')


@pytest.fixture(scope='module')
def run(folder, backbone):
    """Run the command with more arguments and return the rows of its results file."""

    def run(results, *arguments):
        fixed = ('--data', folder, '--backbone', *backbone, 0, '--results', results)
        fixed += ('--epochs', 2, '--min-steps', 0, '--device', 'cpu')
        accuracy.main([str(a) for a in (*fixed, *arguments)])
        return [json.loads(line) for line in results.read_text().splitlines()]

    return run


@pytest.fixture(scope='module')
def results(run, tmp_path_factory):
    """A results file and its rows: three heads at two rates, then at their own; all images and two a class."""
    path = tmp_path_factory.mktemp('runs') / 'runs.jsonl'
    options = ('--heads', *HEADS, '--lrs', 1e-4, 1e-3, '--head-lrs', 5, '--seeds', 0, 1)
    return path, run(path, *options, '--shots', 0, 2), options


def test_grid_then_own_rates(run, results, tmp_path):
    path, rows, options = results
    for shots, of_grid, of_final in ((0, 20, 24), (2, 8, 8)):
        own = [row for row in rows if row['shots'] == shots]
        grid, final = ([row for row in own if row['split'] == split] for split in ('inner', 'validation'))
        assert sorted((row['head'], row['lr'], row['head_lr']) for row in grid) == [
            (head, lr, 5.0) for head in HEADS for lr in (1e-4, 1e-3)
        ]
        assert [(row['head'], row['seed']) for row in final] == [(head, seed) for seed in (0, 1) for head in HEADS]
        assert {row['train_images'] for row in grid} == {of_grid}  # a fifth of 6 images of each class is left out
        assert {row['train_images'] for row in final} == {of_final}
        for row in final:
            found = {each['lr']: each['top1'] for each in grid if each['head'] == row['head']}
            assert found[row['lr']] == max(found.values())
    for row in rows:
        assert 0 <= row['top1'] <= row['top5'] == 100 and math.isfinite(row['nll']) and row['temperature'] > 0
    before = path.read_text()
    run(path, *options, '--shots', 0, 2)  # what is there is not run again
    assert path.read_text() == before
    copy = tmp_path / 'runs.jsonl'
    copy.write_text(before)
    more = run(copy, '--heads', 'zzz_r2', '--lrs', '--seeds', 2)[len(rows) :]  # no grid: rates of the rows above
    assert [(row['split'], row['lr']) for row in more] == [
        ('validation', row['lr']) for row in rows if row['split'] == 'validation' and row['head'] == 'zzz_r2'
    ][:1]
    at = run(tmp_path / 'at.jsonl', '--heads', *HEADS, '--at', 1e-4, 5, '--seeds', 0)  # no grid: the rates given
    assert [(row['head'], row['split'], row['lr'], row['head_lr']) for row in at] == [
        (head, 'validation', 1e-4, 5.0) for head in HEADS
    ]
    again = run(tmp_path / 'again.jsonl', '--heads', 'zzz_r2', '--lrs', 1e-4, '--head-lrs', 5, '--grid-only')
    first = next(row for row in rows if row['head'] == 'zzz_r2' and row['lr'] == 1e-4)
    assert len(again) == 1 and again[0]['nll'] == pytest.approx(first['nll'], rel=1e-4)


def test_compiled_steps_train_as_others_do(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    options = ('--heads', 'zzz_r2', 'linear', '--lrs', 1e-3, '--head-lrs', 1, '--grid-only')
    rows = [run(tmp_path / name, *options, *more) for name, more in (('a', ()), ('b', ('--compile',)))]
    for plain, compiled in zip(*rows, strict=True):
        assert compiled['nll'] == pytest.approx(plain['nll'], rel=1e-4)


def test_no_run_begins_after_the_time_is_over(run, tmp_path):
    (tmp_path / 'runs.jsonl').touch()
    assert run(tmp_path / 'runs.jsonl', '--heads', 'linear', '--seconds', 0) == []


def test_a_failed_run_is_named(run, tmp_path):
    with pytest.raises(SystemExit, match='1 runs failed, the first with ValueError: head zzz'):
        run(tmp_path / 'runs.jsonl', '--heads', 'zzz', 'linear', '--lrs', 1e-3, '--head-lrs', 1)
    assert json.loads((tmp_path / 'runs.jsonl').read_text())['head'] == 'linear'


def test_runs_take_turns():
    """Two at a time, each on a stream of its own, and the next one as soon as one is done."""
    turns, rows, jobs = [], queue.SimpleQueue(), queue.SimpleQueue()

    class Stream(contextlib.nullcontext):
        def __enter__(self):
            turns.append(self.enter_result)

    def worker(job):
        for _ in range(job):
            turns[-1] += str(job)
            yield
        return job

    for job in (3, 1, 2, None):
        jobs.put(job)
    accuracy.serve(worker, [Stream('a'), Stream('b')], jobs, rows)
    assert turns == ['b3', 'b3', 'a1', 'b3', 'a', 'b', 'a2', 'a2', 'a']
    assert [rows.get() for _ in range(3)] == [1, 3, 2]


def test_quality_is_cross_fitted():
    """Mend logits that are ten times too large by one temperature, without a change of top-1."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    target = torch.distributions.Categorical(logits=logits).sample()
    right, wrong = accuracy.quality(logits, target), accuracy.quality(10 * logits, target)
    assert right['nll'] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert right['top1'] == wrong['top1'] == pytest.approx(100 * metrics.accuracy_score(target, logits.argmax(1)))
    assert wrong['nll_t'] == pytest.approx(right['nll'], rel=0.01) and wrong['nll'] > 2 * right['nll']
    assert right['temperature'] == pytest.approx(1, abs=0.05) and wrong['temperature'] == pytest.approx(0.1, abs=0.01)
    assert right['ece'] < 3 < 10 < wrong['ece'] and wrong['ece_t'] < 3
    assert right['top5'] == 100


def test_masks_as_text():
    for count in (1, 7, 8, 21):
        mask = torch.rand(count) > 0.4
        assert torch.equal(accuracy.unpacked(accuracy.packed(mask), count), mask)


def test_kept_features_give_the_figures(run, folder, tmp_path):
    """Compute a run's accuracy again from what --keep writes, by hand."""
    options = ('--heads', 'zzz_r2', '--lrs', 1e-3, '--head-lrs', 1, '--seeds', 0, '--hold-out-every', 4)
    _, row = run(tmp_path / 'runs.jsonl', *options, '--keep', tmp_path, '--far', folder)
    found = load_file(tmp_path / 'gradients-test_vit-zzz_r2-0-0.safetensors')
    head = ZZZHead(3, found['validation'].shape[1], rank=2).eval()
    head.load_state_dict({k[5:]: v for k, v in found.items() if k.startswith('head.')})
    with torch.no_grad():
        predicted = head(found['validation'].float()).argmax(1)
    assert 100 * (predicted == found['validation_target']).double().mean() == pytest.approx(row['top1'])
    assert len(found['near']) == 3 and not any(key.startswith('far') for key in found)  # the set itself is not far
    assert len(found['train']) == len(found['train_target']) == row['train_images'] == 18
    assert len(row['v']) == 2


def test_refit_after_training(run, tmp_path):
    """The kept head is the fit of the kept features, not the one that was trained."""
    run(tmp_path / 'runs.jsonl', '--heads', 'zzz_r2:refit=frozen', '--at', 1e-3, 1, '--seeds', 0, '--keep', tmp_path)
    found = load_file(tmp_path / 'gradients-test_vit-zzz_r2_refit_frozen-0-0.safetensors')
    expected = fit_head(found['train'].float(), found['train_target'], rank=2, num_classes=4)
    torch.testing.assert_close(found['head.weight'], expected.weight.detach(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found['head.sigma2_raw'], expected.sigma2_raw.detach(), atol=1e-2, rtol=1e-2)


def test_heads_that_stay_as_they_start_have_no_rates(run, tmp_path):
    """One run each, without a grid, of the features that they share."""
    heads = ('linear:rows=probe,train=0', 'zzz_r2:fit=frozen,train=0')
    rows = run(tmp_path / 'runs.jsonl', '--heads', *heads, '--seeds', 0)
    assert [(row['head'], row['split'], row['lr']) for row in rows] == [(head, 'validation', 0) for head in heads]


def test_timms_own_weights(backbone, monkeypatch):
    """Without a file, those that timm downloads."""
    (name, file), asked = backbone, []

    def download(repo_id, filename, **options):
        asked.append(repo_id)
        return file

    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    found = create(Backbone(name)).state_dict()
    assert set(asked) == {f'timm/{name}.{timm.get_pretrained_cfg(name).tag}'}
    expected = load_file(file)
    assert found and all(torch.equal(v, expected[k]) for k, v in found.items())


def test_learning_rates_are_timms():
    """Warm-up from 0 to the peak over two epochs, then the half cosine of timm's scheduler, in proportion."""
    rates = learning_rates([0.1, 0.5], epochs=6, steps=10, settings=Settings(6))
    assert rates.shape == (60, 2) and rates[0].tolist() == [0, 0]
    torch.testing.assert_close(rates[:, 1], 5 * rates[:, 0])
    assert rates[10, 0].item() == pytest.approx(0.05, rel=0.01) and rates[:, 0].argmax() in (19, 20)
    for step in (30, 45, 59):
        assert rates[step, 0].item() == pytest.approx(0.05 * (1 + math.cos(math.pi * step / 60)), rel=1e-3)


def row(head, seed, top1, split='validation', data='birds', backbone='net', lr=1e-3, right=None, **more):
    count = 200
    right = torch.arange(count) < top1 * count / 100 if right is None else right
    shared = dict(size=0, shots=0, hold_out_every=0, epochs=20, smoothing=0.1, ece=4.0, ece_t=2.0, head_lr=1.0)
    return dict(
        shared,
        **dict(data=data, backbone=backbone, head=head, seed=seed, split=split, lr=lr, top1=top1),
        **dict(dict(nll=1.0, nll_t=0.5, right=accuracy.packed(right)), **more),
    )


def test_table():
    """Means over pairs at each head's own rates, changes of the NLL as ratios, and what the test says."""
    base = 'linear:rows=zero'
    rows = [row(base, seed, 50.0, data=data) for data in ('birds', 'cars') for seed in (0, 1)]
    rows += [row('zzz_r8', seed, 80.0 + seed, nll=0.5, nll_t=0.4) for seed in (0, 1)]
    rows += [row('zzz_r8', seed, 50.5, data='cars', nll=2.0, nll_t=0.4) for seed in (0, 1)]
    rows += [row('zzz_r8', 0, 99.0, lr=1e-4)]  # not its own rate
    for head, values in ((base, (60, 40)), ('zzz_r8', (61, 55))):
        for lr, top1 in zip((1e-3, 1e-4), values, strict=True):
            rows.append(row(head, 0, top1, 'inner', lr=lr, nll_t=0.4 if (head, lr) == ('zzz_r8', 1e-3) else 0.5))
    (line,) = [line for line in accuracy_table.tables(rows).splitlines() if line.startswith(('| zzz_r8', f'| {base}'))]
    cells = [cell.strip() for cell in line.split('|')[1:-1]]
    assert cells[:5] == ['zzz_r8', '2', '+15.50 ± 15.00', '+0.50', '1, 0']  # +30.5 on one set and +0.5 on the other
    assert cells[5:] == ['+15.50', '+0.0 %', '-20.0 %', '2.0 (2.0)']
    final = accuracy_table.groups(accuracy_table.at_own_rates(rows), 'head')
    comparison = accuracy_table.Comparison(final['zzz_r8',], final[base,])
    assert comparison.error() == pytest.approx((30.5 - 0.5) / 2)
    (runs,) = accuracy_table.shared_runs([*rows, row('zzz_r8', 1, 9, 'inner')]).values()  # linear lacks that one
    assert {head: [each['top1'] for each in own] for head, own in runs.items()} == {base: [40, 60], 'zzz_r8': [55, 61]}
    assert '| net | cars | zzz_r8 | 0.001 × 1 | 50.50 ± 0.00 |' in accuracy_table.tables(rows, pairs=True)
    assert accuracy_table.choice_table(rows).splitlines()[2:] == [
        f'| all | net | {base} | 0.001 × 1 | 60.0 | 50.0 |  |  |',
        '| all | net | zzz_r8 | 0.001 × 1 | 61.0 | 58.0 | -20 % | -11 % |',
    ]
    twice = [*rows, row('zzz_r8', 0, 55, 'inner', lr=1e-4), row(base, 0, 90, 'inner', data='cars')]
    assert accuracy.chosen_rates(twice) == accuracy.chosen_rates(rows)  # a run that was repeated counts once
    table = accuracy_table.grid_table(rows).splitlines()
    assert table[0].endswith('| head | 0.0001 × 1 | 0.001 × 1 | mean |')
    assert table[3] == '| all | net | birds | zzz_r8 | 55.0 | 61.0 | 58.0 |'


def test_bootstrap_and_holm():
    """Near McNemar's test for one seed; Holm's numbers by hand."""
    stats = pytest.importorskip('scipy.stats')
    difference = torch.zeros(1, 400)
    difference[0, :30], difference[0, 30:45] = 1, -1
    assert accuracy_table.p_value(difference) == pytest.approx(stats.binomtest(30, 45).pvalue, abs=0.012)
    assert accuracy_table.p_value(-difference) == pytest.approx(accuracy_table.p_value(difference), abs=0.005)
    assert accuracy_table.p_value(torch.zeros(3, 50)) == 1
    seeds = torch.tensor([1.0, 1, -1])[:, None].expand(3, 50)  # of 27 draws of seeds, 7 have two or three of the last
    assert accuracy_table.p_value(seeds) == pytest.approx(2 * 7 / 27, abs=0.02)
    assert accuracy_table.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_few_shot(folder, backbone, tmp_path, monkeypatch):
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    index = few_shot.draw(target, 2, seed=0)
    assert target[index].tolist() == [0, 0, 1, 1] and len(set(index.tolist())) == 4
    assert sorted(few_shot.draw(target, 0, seed=0).tolist()) == list(range(7))
    monkeypatch.setattr(probe, 'PENALTIES', (1e-3, 1e-1))
    results, cache = tmp_path / 'rows.jsonl', tmp_path / 'features'
    arguments = ('--data', folder, '--backbone', *backbone, 0, '--cache', cache, '--results', results)
    few_shot.main([str(a) for a in (*arguments, '--shots', 3, 0, '--seeds', 0, 1)])
    text = results.read_text()
    few_shot.main([str(a) for a in (*arguments, '--shots', 3, 0, '--seeds', 0, 1)])
    assert results.read_text() == text  # what is there is not computed again
    rows = [json.loads(line) for line in text.splitlines()]
    names = ['linear:rows=probe', 'zzz_r0:fit=frozen,train=0', 'zzz_r8:fit=frozen,train=0']
    draws = [(3, 0), (3, 1), (0, 0)]
    assert [(row['shots'], row['seed'], row['head']) for row in rows] == [(*d, name) for d in draws for name in names]
    (file,) = cache.iterdir()
    (x, y), (test_x, test_y) = torch.load(file).values()
    regression = pytest.importorskip('sklearn.linear_model').LogisticRegression(C=1e9, max_iter=5000)
    spread = x.std(0)
    found = regression.fit(x / spread, y).score(test_x / spread, test_y)
    assert rows[6]['top1'] == pytest.approx(100 * found, abs=10)  # the penalties are small here
    few_shot.main([str(a) for a in (*arguments, '--shots', 0, '--merge', 2, '--ranks', 1)])
    machine, merged = [json.loads(line) for line in results.read_text().splitlines()][-2:]
    order = few_shot.draw(y // 2, 0, seed=0)
    with torch.no_grad():
        right = fit_head(x[order], y[order] // 2, rank=1, num_classes=2)(test_x).argmax(1) == test_y // 2
    svm = pytest.importorskip('sklearn.svm')
    scaled = [(each - x.mean(0)) / x.std(0) for each in (x, test_x)]
    found = [svm.SVC(C=c).fit(scaled[0], y // 2).score(scaled[1], test_y // 2) for c in few_shot.SVM_PENALTIES]
    assert machine['head'] == 'svm' and any(machine['top1'] == pytest.approx(100 * share) for share in found)
    assert merged['data'] == 'gradients, 2 in one' and merged['top1'] == pytest.approx(100 * right.float().mean())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_a_graph_trains_as_eager_steps_do(folder, tmp_path, monkeypatch):
    name, file, device = 'test_efficientnet', tmp_path / 'backbone.safetensors', torch.device('cuda')
    save_file({k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()}, file)
    runner = Runner(Backbone(name, str(file)), Settings(epochs=4), device)
    data = images.load(folder, 'train', 64).to(device)
    weights = []
    for graphed in (True, False):
        if not graphed:
            monkeypatch.setattr('training._Loop._capture', lambda loop: None)
        with own_stream(device):
            model, _ = finish(runner.train(data, parse('zzz_r2'), 0, 1e-3, 5.0))
        weights.append(dict(model.named_parameters()))
    for k, eager in weights[1].items():
        torch.testing.assert_close(weights[0][k], eager, atol=1e-4, rtol=1e-2)
