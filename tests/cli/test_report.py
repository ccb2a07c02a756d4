"""``python -m timm_zzz report``: what the page says, against dense Gaussians and counts made by hand."""

import argparse
import base64
import html.parser
import io
import math
import random
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from timm_zzz import __main__
from timm_zzz.cli import report
from timm_zzz.cli.report import Axis, Lowest, Map, contents, evaluate, main, order_of, render
from timm_zzz.head import ZZZHead

SIZE = 32
# In timm's order of folders
NAMES = ['a<script>alert(1)', 'b"onload=x\' &amp;', 'c {{ 7*7 }}', 'class10', 'd', 'e', 'f']


class Page(html.parser.HTMLParser):
    """Tags, texts and the cells of the tables of a page."""

    VOID = {'meta', 'img', 'br', 'path', 'circle', 'rect'}

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text, self.open = [], [], '', []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if 'td' in self.open or 'th' in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *headers):
        found = [table for table in self.tables if table and table[0][: len(headers)] == [*headers]]
        assert len(found) == 1, headers
        return found[0][1:]

    def tiles(self):
        return dict(re.findall(r'\n(Images|Top-1|Top-5|NLL|ECE|s2|Rank|Classes)(\S[^\n]*)(?=\n)', self.text))


def draw(folder, names, count, split='validation'):
    rng = random.Random(split)
    for c, name in enumerate(names):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            color = tuple(rng.randrange(256) for _ in range(3))
            picture = Image.blend(
                Image.new('RGB', (40, 36), color),
                Image.effect_noise((40, 36), 20.0 * c).convert('RGB'),
                0.5,
            )
            picture.save(folder / split / name / f'{i}.png')


def new_model(name='test_vit.zzz_r4', num_classes=7, **kwargs):
    model = timm.create_model(name, num_classes=num_classes, img_size=SIZE, **kwargs).eval()
    for head in model.modules():
        if isinstance(head, ZZZHead):
            with torch.no_grad():
                head.weight += 0.02  # so that some classes are closer than others
                head.sigma2_raw.fill_(-4.0)
                head.bias.normal_()
                if head.v_raw is not None:
                    head.v_raw.normal_(-3.0, 1.0)
    return model


def save(folder, model, name='test_vit.zzz_r4', **kwargs):
    """A checkpoint as train.py's."""
    folder.mkdir(parents=True, exist_ok=True)
    args = dict(model=name, img_size=SIZE, crop_pct=1.0, data_dir='/somewhere/birds', model_kwargs={})
    args.update(kwargs)
    state = dict(state_dict=model.state_dict(), args=argparse.Namespace(**args), epoch=7, arch=name)
    torch.save(state, folder / 'model_best.pth.tar')
    return folder


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A run, its images and its page."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('report')
    draw(folder / 'birds', NAMES, 6)
    model = new_model()
    save(folder / 'run', model)
    run_report(folder, 'report.html', '-b', '10')
    return folder, model, Page((folder / 'report.html').read_text(encoding='utf-8'))


def run_report(folder, output, *options, run='run', data='birds'):
    # No processes for loading: that would take longer than all the rest
    arguments = [folder / run, '--data-dir', folder / data, '--output', folder / output, '-j', '0', *options]
    main([str(argument) for argument in arguments])
    return (folder / output).read_text(encoding='utf-8')


def dense_gaussians(head):
    """Means (C, d) and covariances (C, d, d) as float64, by the definition."""
    weight = head.weight.detach().double()
    mu = weight / weight.norm(dim=1, keepdim=True)
    sigma2 = head.sigma2_raw.detach().double().exp().log1p() + head.sigma2_min
    cov = sigma2 * torch.eye(mu.shape[1], dtype=torch.float64).expand(len(mu), -1, -1).clone()
    basis = None
    if head.A is not None:
        basis = torch.linalg.qr(head.A.detach().double())[0]
        v = head.v_raw.detach().double().exp().log1p() + head.v_min
        cov += basis @ torch.diag_embed(v) @ basis.mT
    return mu, cov, basis


def by_hand(folder, model):
    """File names, labels, probabilities (N, C) and log-densities (N, C), an image at a time and without the head."""
    cfg = model.pretrained_cfg
    transform = create_transform(
        (3, SIZE, SIZE), mean=cfg['mean'], std=cfg['std'], interpolation=cfg['interpolation'], crop_pct=1.0
    )
    head = model.get_classifier()
    mu, cov, _ = dense_gaussians(head)
    gaussian = torch.distributions.MultivariateNormal(mu, cov)
    files, labels, densities = [], [], []
    for label, name in enumerate(NAMES):
        for path in sorted((folder / 'birds' / 'validation' / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                x = transform(image.convert('RGB'))[None]
                f = model.forward_head(model.forward_features(x), pre_logits=True).double()
            files.append(f'{name}/{path.name}')
            labels.append(label)
            densities.append(gaussian.log_prob(f / f.norm()).numpy())
    densities = np.stack(densities)
    logits = densities + head.bias.detach().double().numpy()
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return files, np.array(labels), odds / odds.sum(1, keepdims=True), densities


def close(text, value, digits):
    return abs(float(text.rstrip(' %').replace(',', '')) - value) <= 0.5001 * 10**-digits + 2e-5 * abs(value)


def test_accuracy_and_calibration(made):
    folder, model, page = made
    _, labels, p, _ = by_hand(folder, model)
    tiles = page.tiles()
    order = np.argsort(-p, 1)
    correct = order[:, 0] == labels
    assert 0 < correct.sum() < len(labels)
    assert (tiles['Images'], tiles['Classes'], tiles['Rank']) == ('42', '7', '4 of 64')
    assert close(tiles['Top-1'], 100 * correct.mean(), 2)
    assert close(tiles['Top-5'], 100 * (order[:, :5] == labels[:, None]).any(1).mean(), 2)
    assert close(tiles['NLL'], -np.log(p[np.arange(42), labels]).mean(), 4)
    assert close(tiles['s2'], math.log1p(math.exp(-4)) + 1e-4, 4)
    ece, rows = 0.0, []
    confidence = p.max(1)
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
            rows.append((inside.sum(), 100 * confidence[inside].mean(), 100 * correct[inside].mean()))
    assert close(tiles['ECE'], 100 * ece, 2)
    table = page.table('Confidence, %', 'Images')
    assert len(table) == len(rows) > 2
    for row, (count, mean, accuracy) in zip(table, rows, strict=True):
        assert int(row[1]) == count and close(row[2], mean, 1) and close(row[3], accuracy, 1)


def test_confusions(made):
    folder, model, page = made
    _, labels, p, _ = by_hand(folder, model)
    predictions = p.argmax(1)
    counts = {
        (t, c): n
        for t in range(7)
        for c in range(7)
        if t != c and (n := int(((labels == t) & (predictions == c)).sum()))
    }
    mu, _, basis = dense_gaussians(model.get_classifier())
    cosine = (mu @ mu.T).numpy()
    table = page.table('True class', 'Predicted')
    expected = sorted(counts, key=lambda pair: (-counts[pair], pair))
    assert [(row[0], row[1]) for row in table] == [(NAMES[t], NAMES[c]) for t, c in expected]
    for row, (t, c) in zip(table, expected, strict=True):
        assert int(row[2]) == counts[t, c] and row[3] == f'{100 * counts[t, c] / 6:.0f} %'
        others = [cosine[t, k] for k in range(7) if k != t]
        assert int(row[4]) == 1 + sorted(others, reverse=True).index(cosine[t, c])
        assert close(row[5], cosine[t, c], 3)
        angles = torch.linalg.svdvals(basis[t].mT @ basis[c])
        assert close(row[6], float(angles.square().mean()), 2)
    near = sum(counts[pair] for pair, row in zip(expected, table, strict=True) if row[4] == '1')
    assert f'{100 * near / sum(counts.values()):.0f} % of the errors went to the class nearest' in page.text


def test_nearest_classes(made):
    folder, model, page = made
    _, labels, p, _ = by_hand(folder, model)
    mu, _, _ = dense_gaussians(model.get_classifier())
    cosine = (mu @ mu.T).fill_diagonal_(-2)
    nearest = cosine.argmax(1).tolist()
    pairs = {tuple(sorted((c, other))) for c, other in enumerate(nearest)}
    table = page.table('Class', 'and')
    expected = sorted(pairs, key=lambda pair: -cosine[pair])
    assert [(row[0], row[1]) for row in table] == [(NAMES[a], NAMES[b]) for a, b in expected]
    for row, (a, b) in zip(table, expected, strict=True):
        assert int(row[4]) == ((labels == a) & (p.argmax(1) == b)).sum()
        assert int(row[5]) == ((labels == b) & (p.argmax(1) == a)).sum()


def test_spectra(made):
    folder, model, page = made
    _, labels, p, _ = by_hand(folder, model)
    _, cov, _ = dense_gaussians(model.get_classifier())
    total = cov.diagonal(dim1=1, dim2=2).sum(1)
    order = total.argsort(descending=True).tolist()
    table = page.table('Class', 'Variance')
    assert [row[0] for row in table] == [NAMES[c] for c in order]
    assert [row[1] for row in table] == ['large'] * 4 + ['small'] * 3
    sigma2 = math.log1p(math.exp(-4)) + 1e-4
    for row, c in zip(table, order, strict=True):
        assert row[2] == f'{total[c]:.3g}'
        assert row[3] == f'{100 * (1 - 64 * sigma2 / total[c]):.0f} %'
        assert row[4] == '6' and row[5] == f'{100 * (p.argmax(1) == labels)[labels == c].mean():.0f} %'
        values = [float(text) for text in row[6].removeprefix('variances ').split()]
        largest = torch.linalg.eigvalsh(cov[c]).flip(0)[:4]
        np.testing.assert_allclose(values, largest, rtol=6e-3)


def test_outliers(made):
    folder, model, page = made
    files, labels, p, densities = by_hand(folder, model)
    score = densities.max(1)
    order = np.argsort(score, kind='stable')[:24]
    shown = [attrs for tag, attrs in page.tags if tag == 'img']
    assert [attrs['alt'] for attrs in shown] == [
        f'{files[i]}: {NAMES[labels[i]]}, predicted {NAMES[p[i].argmax()]}' for i in order
    ]
    logged = [float(text) for text in re.findall(r'log-density (-?[\d.]+)', page.text)]
    np.testing.assert_allclose(logged, score[order], atol=0.02)
    assert f'median over all images is {np.sort(score)[20]:.2f}' in page.text
    assert all(attrs['src'].startswith('data:image/jpeg;base64,') for attrs in shown)
    assert max(len(attrs['src']) for attrs in shown) < 6000
    for attrs, i in zip(shown, order, strict=True):
        jpeg = io.BytesIO(base64.b64decode(attrs['src'].partition(',')[2]))
        with Image.open(jpeg) as small, Image.open(folder / 'birds' / 'validation' / files[i]) as image:
            assert small.size == (SIZE, SIZE)
            large = image.resize((36, SIZE)).crop((2, 0, 34, SIZE))
            np.testing.assert_allclose(np.mean(small, (0, 1)), np.mean(large, (0, 1)), atol=4)


def test_the_page_loads_nothing_and_is_accessible(made):
    folder, _, page = made
    text = (folder / 'report.html').read_text(encoding='utf-8')
    assert text.lstrip().startswith('<!DOCTYPE html>')
    assert not re.search(r'https?:|//\w|@import|url\(', re.sub(r'base64,[^"]*', '', text))
    tags = [tag for tag, _ in page.tags]
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'a', 'form', 'b'} & set(tags)
    for tag, attrs in page.tags:
        assert not any(name.startswith('on') or name == 'href' for name in attrs)
        assert tag != 'th' or attrs['scope'] in ('row', 'col')
        assert tag != 'svg' or attrs['role'] == 'img'
    assert dict(page.tags)['html'] == {'lang': 'en'} and tags.count('h1') == 1
    ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs['aria-labelledby'] for _, attrs in page.tags if 'aria-labelledby' in attrs} <= set(ids)
    assert tags.count('title') == 1 + tags.count('svg')
    # Nothing of the user's folders but the names that were asked for
    assert str(folder) not in text and '/somewhere' not in text


def test_names_are_escaped(made):
    folder, _, page = made
    text = (folder / 'report.html').read_text(encoding='utf-8')
    for name in NAMES:
        assert name in page.text
    assert '<script' not in text


def test_same_bytes_twice_and_no_overwriting(made, capsys):
    folder, _, _ = made
    before = (folder / 'report.html').read_bytes()
    fails(capsys, 'exists already', folder, 'report.html')
    run_report(folder, 'report.html', '-b', '10', '--force')
    assert (folder / 'report.html').read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ['birds', 'report.html', 'run']


def fails(capsys, what, folder, output='new.html', *options, **where):
    with pytest.raises(SystemExit) as e:
        run_report(folder, output, *options, **where)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert what in err and 'timm_zzz: error: ' in err and 'Traceback' not in err, err


def test_mistakes(made, capsys):
    folder, model, _ = made
    fails(capsys, 'no such checkpoint', folder, run='nothing')
    fails(capsys, '--data-dir: no such folder', folder, data='nothing')
    fails(capsys, 'has no test, only validation', folder, 'new.html', '--split', 'test')
    fails(capsys, '--device: nonsense is not available', folder, 'new.html', '--device', 'nonsense')
    fails(capsys, 'has no averaged weights', folder, 'new.html', '--use-ema')
    fails(capsys, 'has no images of a split', folder, data='run')
    fails(capsys, 'has no images of a split', folder, 'new.html', '--dataset', 'hfds/none')
    save(folder / 'mapped', model, class_map='classes.txt')
    fails(capsys, '--class-map: the model was trained with one', folder, run='mapped')
    with torch.no_grad():
        model.get_classifier().bias[0] = math.nan
        save(folder / 'broken', model)
        model.get_classifier().bias[0] = 0
    fails(capsys, 'the logits of image 0 are NaN', folder, run='broken')
    assert not (folder / 'new.html').exists()


def test_linear_classifier(tmp_path, capsys):
    draw(tmp_path / 'birds', NAMES[4:], 1)
    save(tmp_path / 'run', timm.create_model('test_vit', num_classes=3, img_size=SIZE), 'test_vit')
    fails(capsys, 'the checkpoint has no ZZZ head', tmp_path)
    fails(capsys, 'of a model such as resnet50.zzz_r8', tmp_path)


def test_rank_0(tmp_path):
    draw(tmp_path / 'birds', NAMES, 2)
    save(tmp_path / 'run', new_model(zzz_rank=0), model_kwargs=dict(zzz_rank=0))
    page = Page(run_report(tmp_path, 'new/report.html', '--amp', '--amp-dtype', 'bfloat16'))
    assert 'This head has rank 0: no class has directions of its own' in page.text
    assert 'Overlap' not in page.text and page.tiles()['Rank'] == '0 of 64'
    assert page.table('True class', 'Predicted', 'Images', 'Of the class', 'Place', 'Cosine of means')
    assert 'mixed precision, bfloat16' in page.text


def test_classes_are_numbered_as_in_training(tmp_path, capsys):
    model = new_model(num_classes=4)
    save(tmp_path / 'run', model)
    draw(tmp_path / 'birds', 'acd', 3)
    fails(capsys, 'validation has 3 classes, the model has 4; --class-map', tmp_path)
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\n')
    mapped = run_report(tmp_path, 'mapped.html', '--class-map', str(tmp_path / 'classes.txt'))
    draw(tmp_path / 'birds', 'abcd', 1, 'train')
    numbered = run_report(tmp_path, 'numbered.html')
    assert mapped == numbered
    images = [attrs['alt'] for tag, attrs in Page(numbered).tags if tag == 'img']
    assert sorted({(alt[0], alt.split(': ')[1][0]) for alt in images}) == [('a', 'a'), ('c', 'c'), ('d', 'd')]
    assert ['b', '–'] in [[row[0], row[5]] for row in Page(numbered).table('Class', 'Variance')]
    draw(tmp_path / 'birds', 'z', 1, 'val2')
    (tmp_path / 'birds' / 'val2' / 'z').rename(tmp_path / 'birds' / 'validation' / 'z')
    (tmp_path / 'birds' / 'validation' / 'c').rename(tmp_path / 'c')
    (tmp_path / 'birds' / 'validation' / 'd').rename(tmp_path / 'd')
    fails(capsys, 'validation has classes that train has not', tmp_path)


def test_averaged_weights_and_a_folder_of_classes(tmp_path):
    """The folder that holds the classes itself, as validate.py takes it too."""
    draw(tmp_path / 'birds', NAMES, 1)
    model, averaged = new_model(), new_model()
    with torch.no_grad():
        averaged.get_classifier().sigma2_raw.fill_(0.0)
    file = save(tmp_path / 'run', model) / 'model_best.pth.tar'
    saved = torch.load(file, weights_only=False)
    torch.save(dict(saved, state_dict_ema=averaged.state_dict()), file)
    page = Page(run_report(tmp_path, 'report.html', '--use-ema', data='birds/validation'))
    assert close(page.tiles()['s2'], math.log(2) + 1e-4, 3) and 'averaged, after epoch 7' in page.text


def synthetic(num_classes, feat_dim, rank, count):
    """A model that is nothing but a head, and N images of noise."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = ZZZHead(num_classes, feat_dim, rank)

        def forward(self, x):
            return self.head(x.flatten(1)[:, :feat_dim])

    model = Model()
    if rank:
        torch.nn.init.normal_(model.head.v_raw)
    images = torch.randn(count, 3, 96, 96)
    labels = torch.randint(num_classes, (count,))
    return model, list(zip(images.split(32), labels.split(32), strict=True))


def page_of(model, batches, names):
    results = evaluate(model, batches, torch.device('cpu'))
    config = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    context = contents(argparse.Namespace(model=model), results, config, None, names)
    return render(dict(context, model='m', dataset='d', split='s', about={}))


@pytest.mark.parametrize('num_classes, rank', [(300, 4), (3000, 0), (60, 40), (2, 1), (1, 1)])
def test_size(num_classes, rank):
    torch.manual_seed(0)
    model, batches = synthetic(num_classes, 48, rank, 320)
    text = page_of(model, batches, [f'{c} {"long name " * 10}' for c in range(num_classes)])
    assert len(text.encode()) < 600_000
    page = Page(text)
    assert sum(tag == 'img' for tag, _ in page.tags) == 24
    for headers in (('True class', 'Predicted'), ('Class', 'and')) if num_classes > 1 else ():
        assert len(page.table(*headers)) <= 30
    assert ('Map of the cosines' in text) == (1 < num_classes <= 60)


def test_extreme_variances():
    """Heads as they begin, all classes equal, and far from it."""
    model, batches = synthetic(5, 8, 3, 20)
    for v_raw in (0.0, -50.0, 30.0):
        model.head.v_raw.data.fill_(v_raw)
        assert 'nan' not in Page(page_of(model, batches, 'abcde')).text.lower()


def test_several_classifiers():
    """A distilled model answers with the mean of two heads, each with Gaussians of its own."""
    torch.manual_seed(0)
    model = new_model('deit_tiny_distilled_patch16_224.zzz_r4', num_classes=5, depth=1)
    images, labels = torch.randn(6, 3, SIZE, SIZE), torch.arange(6) % 5
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    results = evaluate(model, batches, torch.device('cpu'))
    with torch.no_grad():
        assert torch.equal(results.prediction, model(images).argmax(1))
        tokens = model.forward_head(model.forward_features(images), pre_logits=True)
        tokens = tokens if isinstance(tokens, tuple) else model.forward_features(images)[:, :2].unbind(1)
    expected = 0
    for head, token in zip((model.head, model.head_dist), tokens, strict=True):
        mu, cov, _ = dense_gaussians(head)
        x = token.double() / token.double().norm(dim=1, keepdim=True)
        expected = expected + torch.distributions.MultivariateNormal(mu, cov).log_prob(x[:, None]).amax(1) / 2
    torch.testing.assert_close(results.density.double(), expected, rtol=1e-4, atol=1e-2)
    assert 'answers with 2 classifiers together: head, head_dist' in page_of(model, batches, 'abcde')


def test_no_embedding_per_image():
    """A head that is used at every position, the mean of which is the answer."""
    model, batches = synthetic(5, 8, 2, 10)
    model.forward = lambda x: model.head(x.flatten(1)[:, :32].unflatten(1, (4, 8))).mean(1)
    assert 'not one embedding per image' in page_of(model, batches, 'abcde')


def test_what_evaluate_refuses():
    model, batches = synthetic(5, 8, 2, 10)
    with pytest.raises(ValueError, match='label 5, the model has 5 classes'):
        evaluate(model, [(batches[0][0], torch.full((10,), 5))], torch.device('cpu'))
    with pytest.raises(ValueError, match='no images'):
        evaluate(model, [], torch.device('cpu'))
    with pytest.raises(ValueError, match='one row of logits'):
        evaluate(model, [(batches[0][0], torch.zeros(10, 5))], torch.device('cpu'))


def test_lowest():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 2.0, -1.0, 1.0, 5.0])
    for batch in (1, 2, 4, 9):
        lowest = Lowest(4)
        for start in range(0, 9, batch):
            part = scores[start : start + batch]
            lowest.update(start, part, torch.arange(start, start + len(part)).half())
        assert [(score, i, int(image)) for score, i, image in lowest.items] == [
            (-1.0, 6, 6),
            (0.0, 4, 4),
            (1.0, 1, 1),
            (1.0, 3, 3),
        ]


def test_classes_in_parts(monkeypatch):
    """Means that are held against all others a few at a time."""
    mu = torch.nn.functional.normalize(torch.randn(20, 6))
    cosine = (mu @ mu.T).fill_diagonal_(-2)
    monkeypatch.setattr(report, '_ROWS', 7)
    found = report.neighbours_of(mu)
    assert found.nearest.tolist() == cosine.argmax(1).tolist()
    torch.testing.assert_close(found.cosine, cosine.amax(1))
    first, second = torch.triu_indices(20, 20, 1)
    places = report._places(mu, first, second).tolist()
    ranked = cosine.argsort(1, descending=True).tolist()
    assert places == [1 + ranked[a].index(b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def test_like_classes_side_by_side():
    angles = torch.linspace(0, 1.5, 12)[torch.randperm(12)]
    order = order_of(torch.stack([angles.cos(), angles.sin()], 1))
    in_order = angles[order].tolist()
    assert in_order in (sorted(in_order), sorted(in_order, reverse=True))


def test_map():
    shown = Map.of(torch.tensor([[9.0, 0.0, 1.0], [0.5, 9.0, 0.0], [0.2, 0.0, 9.0]]), least=0.0)
    cells = {tuple(cell): level for level, cells in enumerate(shown.shades) for cell in cells}
    assert cells == {(2, 0): 8, (0, 1): 4, (0, 2): 1} and (shown.least, shown.largest) == (0.0, 1.0)
    assert sum(map(len, Map.of(torch.ones(4, 4)).shades)) == 12


@pytest.mark.parametrize(
    'low, high, kwargs, texts',
    [
        (0, 1, dict(unit=100), ['0', '20', '40', '60', '80', '100']),
        (0, 2, dict(kind='count'), ['0', '1', '2']),
        (0, 4000, dict(kind='count'), ['0', '1,000', '2,000', '3,000', '4,000']),
        (12.301, 12.334, {}, ['12.31', '12.32', '12.33']),
        (-0.2, 0.5, {}, ['-0.2', '0.0', '0.2', '0.4']),
        (1e-4, 0.5, dict(kind='log'), ['0.0001', '0.001', '0.01', '0.1']),
        (0.3, 0.6, dict(kind='log'), ['0.3', '0.6']),
    ],
)
def test_axis(low, high, kwargs, texts):
    axis = Axis(low, high, 10, 110, **kwargs)
    assert [text for _, text in axis.ticks] == texts
    assert (axis.at(low), axis.at(high)) == (10, 110)


def test_command(made, monkeypatch, capsys):
    folder, _, page = made
    monkeypatch.chdir(folder)
    arguments = ['report', 'run', '--data-dir', 'birds', '--output', 'command.html', '-j', '1']
    monkeypatch.setattr('sys.argv', ['timm_zzz', *arguments])
    __main__.main()
    assert capsys.readouterr().out.strip() == 'command.html'
    tiles, expected = Page((folder / 'command.html').read_text(encoding='utf-8')).tiles(), page.tiles()
    # Another batch size rounds otherwise
    assert float(tiles.pop('NLL')) == pytest.approx(float(expected.pop('NLL')), abs=1e-3)
    assert tiles == expected
    (folder / 'command.html').unlink()
