"""benchmarks/accuracy.py: crops against torchvision's and timm's, splits, starts of heads, whole runs on tiny sets."""

import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from timm_zzz.models.attach import SIGMA2_INIT

pytest.importorskip('sklearn')
pytestmark = pytest.mark.usefixtures('benchmarks')

ARCHITECTURE = 'test_efficientnet'
CLASSES = 4


def module(name):
    return importlib.import_module(name)


def smooth_image(width, height, shade):
    """A gradient with a class's shade, which JPEG and resampling keep."""
    image = Image.linear_gradient('L').resize((width, height), 2)
    channels = [image.point(lambda v, k=k: int(v * 0.6) + 25 * ((shade + k) % CLASSES)) for k in range(3)]
    return Image.merge('RGB', channels)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets') / 'gradients'
    for split, count in (('train', 6), ('validation', 3)):
        for c in range(CLASSES):
            (root / split / f'class{c}').mkdir(parents=True)
            for i in range(count):
                smooth_image(60 + 10 * i, 90 - 5 * i, c).save(root / split / f'class{c}' / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'backbone.safetensors'
    save_file({k: v.contiguous() for k, v in timm.create_model(ARCHITECTURE).state_dict().items()}, path)
    return path


def test_images_are_those_of_the_folder(folder, tmp_path):
    images = module('images').load(folder, 'train', 32, cache=tmp_path)
    assert images.classes == tuple(f'class{c}' for c in range(CLASSES))
    assert images.target.tolist() == [c for c in range(CLASSES) for _ in range(6)]
    assert images.aspect[:2].tolist() == pytest.approx([60 / 90, 70 / 85])
    again = module('images').load(folder, 'train', 32, cache=tmp_path)
    assert torch.equal(again.pixels, images.pixels) and len(list(tmp_path.iterdir())) == 1


def test_subsets(folder):
    images = module('images').load(folder, 'train', 32)
    chosen = images.of_classes([3, 1])
    assert chosen.classes == ('class3', 'class1')
    assert torch.equal(chosen.pixels[chosen.target == 0], images.pixels[images.target == 3])
    few = images.per_class(2, seed=0)
    assert few.target.bincount().tolist() == [2] * CLASSES
    assert not torch.equal(few.pixels, images.per_class(2, seed=1).pixels)
    assert images.per_class(100, seed=0).target.bincount().tolist() == [6] * CLASSES


@pytest.mark.parametrize('width, height', [(96, 96), (128, 96), (96, 144)])
def test_middle_crop_is_timms(width, height):
    images = module('images')
    image = smooth_image(width, height, 1)
    pixels = transforms.functional.pil_to_tensor(image.resize((256, 256), 2))[None]
    loaded = images.Images(pixels, torch.tensor([width / height]), torch.zeros(1, dtype=torch.int64), ('a',))
    boxes = images.center_boxes(loaded, torch.tensor([0]), 0.875)
    got = images.crop(loaded, torch.tensor([0]), boxes, 84, torch.zeros(1), torch.ones(1))[0]
    transform = timm.data.create_transform(
        (3, 84, 84), interpolation='bilinear', crop_pct=0.875, mean=(0,) * 3, std=(1,) * 3
    )
    assert (got - transform(image)).abs().max() < 0.03


def test_random_crops_have_the_area_and_aspect_of_torchvisions(folder):
    """Against torchvision's own draws, by mean and spread of the area and of the aspect ratio of the crops."""
    images = module('images')
    width, height = 120, 80
    n = 4000
    loaded = images.Images(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.tensor([width / height]),
        torch.zeros(1, dtype=torch.int64),
        ('a',),
    )
    generator = torch.Generator().manual_seed(0)
    boxes = images.random_boxes(loaded, torch.zeros(n, dtype=torch.int64), (0.35, 1.0), generator)
    half_w, half_h = boxes[:, 2].abs(), boxes[:, 3]
    torch.manual_seed(0)
    draw = transforms.RandomResizedCrop.get_params
    image = torch.zeros(3, height, width)
    reference = torch.tensor([[float(v) for v in draw(image, [0.35, 1.0], [3 / 4, 4 / 3])] for _ in range(n)])
    area, expected_area = half_w * half_h, reference[:, 2] * reference[:, 3] / (width * height)
    ratio, expected_ratio = half_w * width / (half_h * height), reference[:, 3] / reference[:, 2]
    for got, expected in ((area, expected_area), (ratio.log(), expected_ratio.log())):
        error = expected.std() / math.sqrt(n)
        assert abs(got.mean() - expected.mean()) < 5 * error + 0.003  # whole pixels there
        assert float(got.std()) == pytest.approx(float(expected.std()), rel=0.05)
    assert (boxes[:, 0].abs() + half_w <= 1 + 1e-5).all() and (boxes[:, 1].abs() + half_h <= 1 + 1e-5).all()
    assert 0.45 < (boxes[:, 2] < 0).float().mean() < 0.55


def test_mirrored_crop(folder):
    images = module('images')
    loaded = images.load(folder, 'train', 32)
    box = torch.tensor([[0.1, -0.2, 0.5, 0.6]])
    mirrored = box * torch.tensor([1.0, 1.0, -1.0, 1.0])
    args = (16, torch.zeros(1), torch.ones(1))
    a, b = (images.crop(loaded, torch.tensor([3]), each, *args) for each in (box, mirrored))
    torch.testing.assert_close(a.flip(3), b)
    assert (a - b).abs().max() > 0  # so that the comparison means something


def test_an_epoch_has_every_image():
    index = torch.cat(module('images').batches(10, 4, torch.Generator().manual_seed(0)))
    assert len(index) == 12 and set(index.tolist()) == set(range(10))
    few = module('images').batches(3, 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in few] == [8] and set(few[0].tolist()) == {0, 1, 2}


def test_head_names():
    parse = module('head_spec').parse
    assert parse('zzz_r8').rank == 8 and parse('zzz_r8').sigma2_init == SIGMA2_INIT
    spec = parse('zzz_r4:v_init=0.01,fit=1')
    assert (spec.kind, spec.rank, spec.v_init, spec.fit, spec.name) == ('zzz', 4, 0.01, 1, 'zzz_r4:v_init=0.01,fit=1')
    with pytest.raises(ValueError, match='expected linear, cosine or zzz_rN, got nearest'):
        parse('nearest')
    with pytest.raises(ValueError, match='unknown option vinit=1'):
        parse('zzz_r4:vinit=1')


def test_parameter_groups_are_timms_for_a_plain_run():
    """With factors 1, what is decayed and what is not are as timm's own filter has them."""
    module_ = module('head_spec')
    model = timm.create_model(ARCHITECTURE, num_classes=5)
    head = model.get_classifier()
    own = module_.parameter_groups(model, head, module_.parse('linear'), 0.05)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05)
    for decay in (0.0, 0.05):
        sets = [{id(p) for g in groups if g['weight_decay'] == decay for p in g['params']} for groups in (own, theirs)]
        assert sets[0] == sets[1]
    model = timm.create_model(f'{ARCHITECTURE}.zzz_r4', num_classes=5)
    head = model.get_classifier()
    groups = module_.parameter_groups(model, head, module_.parse('zzz_r4:scalar_lr=10,head_lr=3'), 0.05)
    by_id = {id(p): (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    assert by_id[id(head.v_raw)] == (10.0, 0.0) and by_id[id(head.sigma2_raw)] == (10.0, 0.0)
    assert by_id[id(head.weight)] == (3.0, 0.05) and by_id[id(head.bias)] == (3.0, 0.0)


def test_probe_is_the_logistic_regression_of_sklearn():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = (torch.randn(120, 6) + 1.5 * torch.eye(3, 6)[y]) * torch.tensor([1.0, 5.0, 0.2, 1.0, 1.0, 1.0])
    head = nn.Linear(6, 3).double()
    penalty = module('probe').fit_probe(head, x, y)
    scaled = ((x.double() - x.double().mean(0)) / x.double().std(0)).numpy()
    reference = LogisticRegression(C=1 / (penalty * len(y)), tol=1e-8, max_iter=5000).fit(scaled, y.numpy())
    expected = torch.from_numpy(reference.predict_log_proba(scaled))
    torch.testing.assert_close(F.linear(x.double(), head.weight, head.bias).log_softmax(1), expected, atol=2e-3, rtol=0)


def test_tangent_basis_is_orthogonal_to_the_means():
    head_spec = module('head_spec')
    head = head_spec.build(head_spec.parse('zzz_r2:basis=tangent'), torch.zeros(1, 12), torch.zeros(1).long(), 3)
    assert (F.normalize(head.weight, dim=1)[:, None] @ head.A).abs().max() < 1e-6


@pytest.mark.parametrize('text', ['zzz_r2:fit=1', 'zzz_r2:fit=1,fit_sigma2=0.05'])
def test_start_from_the_fit(text):
    """The first gives the fit's own logits; the second the same of another temperature, which no decision sees."""
    from timm_zzz.fit import fit_head

    head_spec = module('head_spec')
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.rand(90, 12) + torch.eye(3, 12)[y]
    head = head_spec.build(head_spec.parse(text), x, y, 3)
    expected = fit_head(x, y, rank=2, num_classes=3)(x).log_softmax(1)
    got = head(x)
    if 'fit_sigma2' in text:
        ratio = (F.softplus(head.sigma2_raw) + head.sigma2_min) / 0.05
        assert float(ratio) == pytest.approx(1, rel=1e-3)
        spread = got - got.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True)
        factor = (spread[0] * spread[1]).sum() / spread[1].square().sum()
        got = got / factor
    torch.testing.assert_close(got.log_softmax(1), expected, atol=2e-3, rtol=1e-3)


def test_a_bound_on_the_precision_of_the_fit_arrives():
    head_spec = module('head_spec')
    torch.manual_seed(0)
    y = torch.arange(160) % 8
    x = 1 + 0.3 * torch.eye(8, 48)[y] + torch.randn(160, 48) * torch.logspace(-1, 0, 48)
    cosines, nlls = [], []
    for bound in ('', ',fit_precision=0'):
        head = head_spec.build(head_spec.parse(f'zzz_r2:fit=1,fit_sigma2=0.0625{bound}'), x, y, 8)
        mu = F.normalize(head.weight, dim=1)
        cosines.append(((mu @ mu.T).sum() - 8) / 56)
        nlls.append(F.cross_entropy(head(x), y))
        assert (head(x).argmax(1) == y).double().mean() > 0.9
    assert cosines[1] < cosines[0] - 0.3 and nlls[1] < nlls[0] - 0.1


def test_the_mean_cosine_is_that_of_all_pairs_of_means():
    import timm_zzz

    mu = F.normalize(torch.randn(3, 5), dim=1)
    head = timm_zzz.ZZZHead(3, 5, rank=0)
    head.weight.data = mu * torch.tensor([[1.0], [2.0], [3.0]])
    expected = (mu[0] @ mu[1] + mu[0] @ mu[2] + mu[1] @ mu[2]) / 3
    assert module('training').spectrum(head)['mean_cosine'] == pytest.approx(float(expected), abs=1e-6)


def accuracy(folder, checkpoint, results, *arguments):
    fixed = ('--data', folder, '--checkpoint', checkpoint, '--results', results, '--backbone', ARCHITECTURE)
    module('accuracy').main([str(a) for a in (*fixed, '--epochs', 2, '--device', 'cpu', *arguments)])
    return [json.loads(line) for line in Path(results).read_text().splitlines()]


def test_whole_runs(folder, checkpoint, tmp_path, capsys):
    results = tmp_path / 'runs.jsonl'
    options = (
        '--heads',
        'linear',
        'cosine',
        'zzz_r2',
        '--seeds',
        0,
        '--hold-out-every',
        4,
        '--far',
        folder,
        '--curve',
        1,
    )
    rows = accuracy(folder, checkpoint, results, *options)
    assert [row['head'] for row in rows] == ['linear', 'cosine', 'zzz_r2']
    for row in rows:
        assert row['train_images'] == 18 and [epoch for epoch, _ in row['curve']] == [1, 2]
        assert 0 <= row['top1'] <= 100 and math.isfinite(row['nll']) and row['far'] == {}
        assert row['curve'][-1][1] == row['top1']
    assert set(rows[2]['near']) > set(rows[0]['near']) == {
        'max_logit', 'max_softmax', 'energy', 'shared_mahalanobis', 'shared_relative_mahalanobis'
    }  # fmt: skip
    assert len(rows[2]['v']) == 2 and rows[2]['sigma2'] == pytest.approx(SIGMA2_INIT, rel=0.1)
    table = capsys.readouterr().out
    assert '| linear | near |' in table and '| zzz_r2 | 1 |' in table

    again = accuracy(folder, checkpoint, results, *options, '--seeds', 0, 1)  # what is there is not run again
    assert [(row['head'], row['seed']) for row in again] == [
        *((row['head'], 0) for row in rows),
        *((row['head'], 1) for row in rows),
    ]


def test_same_seed_same_figures(folder, checkpoint, tmp_path):
    a, b = (
        accuracy(folder, checkpoint, tmp_path / f'{i}.jsonl', '--heads', 'zzz_r2', '--seeds', 3, '--shots', 2)[0]
        for i in 'ab'
    )
    assert a['train_images'] == 2 * CLASSES
    assert a['nll'] == pytest.approx(b['nll'], rel=1e-4)


def within_class_covariance(x, y):
    """By scikit-learn's own estimator of each class, of the unit vectors."""
    from sklearn.covariance import empirical_covariance

    x = F.normalize(x.double(), dim=1)
    return sum(torch.from_numpy(empirical_covariance(x[y == c].numpy())) * (y == c).sum() for c in y.unique())


def test_basis_of_the_pooled_covariance():
    """It spans the directions of the largest variance within classes, the same for all."""
    head_spec = module('head_spec')
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 12) * torch.linspace(3, 0.5, 12) + 4 * torch.eye(3, 12)[y]
    head = head_spec.build(head_spec.parse('zzz_r2:basis=pooled'), x, y, 3)
    largest = torch.linalg.eigvalsh(within_class_covariance(x, y))[-2:].sum()
    basis = head.A[0].double()
    explained = (basis.T @ within_class_covariance(x, y) @ basis).trace()
    assert explained.item() == pytest.approx(largest.item(), rel=1e-5)
    assert torch.equal(head.A, head.A[:1].expand_as(head.A))


def test_basis_of_the_last_layer():
    """No basis of rank 2 leaves less of the layer's weights."""
    head_spec = module('head_spec')
    layer = torch.randn(12, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    head = head_spec.build(head_spec.parse('zzz_r2:basis=layer'), torch.zeros(1, 12), torch.zeros(1).long(), 3, layer)
    basis, flat = head.A[1], layer.flatten(1)
    rest = (flat - basis @ (basis.T @ flat)).norm()
    assert rest.item() == pytest.approx(torch.linalg.svdvals(flat)[2:].norm().item(), rel=1e-5)


def test_the_runner_finds_the_last_layer(folder, checkpoint):
    training = module('training')
    runner = training.Runner(training.Settings(ARCHITECTURE, str(checkpoint), epochs=1), torch.device('cpu'))
    data = module('images').load(folder, 'train', 64)
    model, head = runner.start(data, module('head_spec').parse('zzz_r2:basis=layer'), seed=0)
    flat = model.conv_head.weight.detach().flatten(1)
    basis = head.A[0].detach()
    kept = (basis.T @ flat).square().sum().item()
    assert kept == pytest.approx(torch.linalg.svdvals(flat)[:2].square().sum().item(), rel=1e-4)


def test_tied_subspaces_stay_tied():
    head_spec = module('head_spec')
    torch.manual_seed(0)
    head = head_spec.build(head_spec.parse('zzz_r2:tied=1'), torch.zeros(1, 12), torch.zeros(1).long(), 3)
    before = head.A.detach().clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(head(torch.randn(6, 12)), torch.arange(6) % 3).backward()
        optimizer.step()
    for p in (head.A, head.v_raw):
        assert torch.equal(p, p[:1].expand_as(p))
    assert not torch.equal(head.A, before)


def test_factors_on_starts():
    head_spec = module('head_spec')
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 12) + 3 * torch.eye(3, 12)[y]
    none = (torch.zeros(1, 12), torch.zeros(1).long(), 3)
    v = [
        F.softplus(head.v_raw) + head.v_min
        for head in (
            head_spec.build(head_spec.parse(f'zzz_r2:{o}'), *none) for o in ('v_init=0.2', 'v_init=0.2,v_scale=0.25')
        )
    ]
    torch.testing.assert_close(v[1], v[0] / 4)
    whole, tenth = (head_spec.build(head_spec.parse(f'linear:rows=probe,row_scale={k}'), x, y, 3)(x) for k in (1, 0.1))
    torch.testing.assert_close(tenth, whole / 10)
    with pytest.raises(ValueError, match='expected a basis of fit, tangent, pooled, layer, got pool'):
        head_spec.parse('zzz_r2:basis=pool')


def test_kept_features_give_the_figures(folder, checkpoint, tmp_path):
    """What --keep writes is enough to get a run's accuracy and energy again, here by hand."""
    from safetensors.torch import load_file
    from sklearn.metrics import roc_auc_score

    import timm_zzz

    options = ('--heads', 'zzz_r2', '--seeds', 0, '--hold-out-every', 4, '--keep', tmp_path / 'kept')
    (row,) = accuracy(folder, checkpoint, tmp_path / 'runs.jsonl', *options)
    (file,) = (tmp_path / 'kept').iterdir()
    kept = load_file(file)
    head = timm_zzz.ZZZHead(3, kept['validation'].shape[1], rank=2).eval()
    head.load_state_dict({k[5:]: v for k, v in kept.items() if k.startswith('head.')})
    with torch.no_grad():
        known, near = (head(kept[k].float()) for k in ('validation', 'near'))
    assert 100 * (known.argmax(1) == kept['validation_target']).double().mean() == pytest.approx(row['top1'])
    energies = [-logits.logsumexp(1) for logits in (known, near)]
    labels = [0] * len(known) + [1] * len(near)
    assert 100 * roc_auc_score(labels, torch.cat(energies)) == pytest.approx(row['near']['energy'], abs=4)
    assert len(kept['train']) == len(kept['train_target']) == row['train_images']


def test_label_smoothing_tells_runs_apart(folder, checkpoint, tmp_path):
    for smoothing in (0.1, 0.3):
        options = ('--heads', 'linear', '--seeds', 0, '--smoothing', smoothing)
        rows = accuracy(folder, checkpoint, tmp_path / 'runs.jsonl', *options)
    assert module('accuracy_table').tables(rows).count('| linear | 1 |') == 2
    assert [row['smoothing'] for row in rows] == [0.1, 0.3]
    assert rows[0]['nll'] != rows[1]['nll']


def test_table_has_means_and_standard_errors():
    table = module('accuracy_table')
    shared = dict(data='birds', shots=0, hold_out_every=0, smoothing=0.1, nll=1.0, ece=2.0, seconds=3.0)
    top1 = {'linear': [80.0, 82.0, 81.0], 'zzz_r8': [82.0, 82.5, 83.0]}
    rows = [
        dict(shared, head=head, seed=seed, top1=value)
        for head, values in top1.items()
        for seed, value in enumerate(values)
    ]
    text = table.tables(rows)
    difference = [b - a for a, b in zip(*top1.values(), strict=True)]
    error = statistics.stdev(difference) / math.sqrt(3)
    assert (
        f'| zzz_r8 | 3 | 82.50 ± {0.5 / math.sqrt(3):.2f} | {statistics.fmean(difference):.2f} ± {error:.2f} |' in text
    )


def test_few_shot_table(folder, checkpoint, tmp_path, capsys):
    arguments = ('--data', folder, '--backbone', ARCHITECTURE, '--checkpoint', checkpoint, '--cache', tmp_path)
    few_shot = module('few_shot')
    for _ in range(2):  # the second time from the cache
        few_shot.main([str(a) for a in (*arguments, '--shots', 3, 0, '--seeds', 0, 1)])
    first, second = capsys.readouterr().out.split('| set |')[1:]
    assert first == second
    lines = first.splitlines()[2:]
    names = ['linear probe, tuned', 'fit, rank 0', 'fit, rank 8']
    assert [line.split(' | ')[1:3] for line in lines] == [[k, name] for k in ('3', 'all') for name in names]
    assert ' ± ' in lines[0] and ' ± ' not in lines[3]


def test_few_shot_draws():
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    index = module('few_shot').draw(target, 2, seed=0)
    assert target[index].tolist() == [0, 0, 1, 1] and len(set(index.tolist())) == 4
    assert sorted(module('few_shot').draw(target, 0, seed=0).tolist()) == list(range(7))


def test_plots(folder, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    heads = ('--heads', 'linear', 'zzz_r2', '--seeds', 0, '--shots', 0, 2, '--curve', 1)
    accuracy(folder, checkpoint, tmp_path / 'runs.jsonl', *heads)
    monkeypatch.setattr(sys, 'argv', ['plot_accuracy.py', str(tmp_path / 'runs.jsonl'), str(tmp_path / 'plot.png')])
    module('plot_accuracy').main()
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.width > 3.5 * image.height  # four panels of one set


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_a_graph_trains_as_eager_steps_do(folder, checkpoint):
    training, images = module('training'), module('images')
    device = torch.device('cuda')
    runner = training.Runner(training.Settings(ARCHITECTURE, str(checkpoint), epochs=1), device)
    data = images.load(folder, 'train', 64).to(device)
    spec = module('head_spec').parse('zzz_r2')
    x = torch.randn(64, 3, runner.size, runner.size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(64, device=device) % CLASSES
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
