"""``python -m timm_zzz report``: the numbers of the page against sklearn, dense Gaussians and counts by hand."""

import argparse
import base64
import html.parser
import io
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from oracles import distinct, parts
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from timm.data import create_transform
from torch.distributions import MultivariateNormal

import timm_zzz
from timm_zzz.cli import report
from timm_zzz.cli.report import Embeddings, Lowest, main, order_of, write_report
from timm_zzz.cli.run import Run
from timm_zzz.head import ZZZHead, heads_of
from timm_zzz.metrics import calibration_temperature, ece
from timm_zzz.scores import class_gaussians_of

SIZE = 32
# In timm's order of folders
NAMES = ['a<script>alert(1)', 'b"onload=x\' &amp;', 'c {{ 7*7 }}', 'class10', 'd', 'e', 'f']
SIGMA2 = math.log1p(math.exp(-4)) + 1e-4


class Page(html.parser.HTMLParser):
    """Tags, texts and the cells of the tables of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text, self.open = [], [], '', []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'br'):
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
        data = data.replace('\xa0', ' ')
        self.text += data
        if 'td' in self.open or 'th' in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *headers):
        (found,) = [table for table in self.tables if table and table[0][: len(headers)] == [*headers]]
        return found[1:]

    def tiles(self):
        return dict(re.findall(r'\n(Images|Top-1|Top-5|NLL|ECE|s2|Rank|Classes)(\S[^\n]*)(?=\n)', self.text))

    def attributes(self, tag):
        return [attrs for other, attrs in self.tags if other == tag]


def draw(folder, names, count, split='validation'):
    rng = random.Random(split)
    for c, name in enumerate(names):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new('RGB', (40, 36), tuple(rng.randrange(256) for _ in range(3)))
            noise = Image.effect_noise((40, 36), 20.0 * c).convert('RGB')
            Image.blend(picture, noise, 0.5).save(folder / split / name / f'{i}.png')


def new_model(name='test_vit.zzz_r4', num_classes=7, **kwargs):
    model = distinct(timm.create_model(name, num_classes=num_classes, img_size=SIZE, **kwargs)).eval()
    for head in heads_of(model).values():
        with torch.no_grad():
            head.weight += 0.02  # so that some classes are closer than others
            if head.A is not None:
                head.A[..., :1] += 3 * head.A[:1, :, :1]  # and share a direction
            head.sigma2_raw.fill_(-4.0)
            head.bias.normal_()
            if head.v_raw is not None:
                head.v_raw.normal_(-3.0, 1.0)
    return model


def save(folder, model, name='test_vit.zzz_r4', state=None, **kwargs):
    """A checkpoint as train.py's."""
    folder.mkdir(parents=True, exist_ok=True)
    args = dict(model=name, img_size=SIZE, crop_pct=1.0, data_dir='/somewhere/birds', **kwargs)
    saved = dict(state_dict=model.state_dict(), args=argparse.Namespace(**args), epoch=7, arch=name, **(state or {}))
    torch.save(saved, folder / 'model_best.pth.tar')


def run_report(folder, output, *options, run='run', data='birds'):
    # No processes for loading: that would take longer than all the rest
    arguments = [folder / run, '--data-dir', folder / data, '--output', folder / output, '-j', '0', *options]
    main([str(argument) for argument in arguments])
    return Page((folder / output).read_text(encoding='utf-8'))


def fails(capsys, what, folder, *options, **where):
    with pytest.raises(SystemExit) as e:
        run_report(folder, 'new.html', *options, **where)
    err = capsys.readouterr().err
    assert e.value.code == 2 and what in err and 'timm_zzz: error: ' in err and 'Traceback' not in err, err
    assert not (folder / 'new.html').exists()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A run, its images and its page."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('report')
    draw(folder / 'birds', NAMES, 6)
    model = new_model()
    save(folder / 'run', model)
    return folder, model, run_report(folder, 'report.html', '-b', '10')


def dense_gaussians(head):
    """Means (C, d), covariances (C, d, d) and bases, in float64."""
    weight, bias, *rest = (t.detach().double() for t in (head.weight, head.bias, head.A, head.v_raw, head.sigma2_raw))
    _, mu, U, v, sigma2 = parts(weight, weight, bias, *rest)
    return mu, (U * v[:, None]) @ U.mT + sigma2 * torch.eye(mu.shape[1], dtype=mu.dtype), U


@pytest.fixture(scope='module')
def by_hand(made):
    """The head's Gaussians; file names, labels, probabilities (N, C) and log-densities (N, C), an image at a time."""
    folder, model, _ = made
    cfg = {key: model.pretrained_cfg[key] for key in ('mean', 'std', 'interpolation')}
    transform = create_transform((3, SIZE, SIZE), crop_pct=1.0, **cfg)
    mu, cov, basis = dense_gaussians(model.get_classifier())
    files, labels, densities, embeddings = [], [], [], []
    for label, name in enumerate(NAMES):
        for path in sorted((folder / 'birds' / 'validation' / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                x = transform(image.convert('RGB'))[None]
                f = model.forward_head(model.forward_features(x), pre_logits=True).double()
            files.append(f'{name}/{path.name}')
            labels.append(label)
            densities.append(MultivariateNormal(mu, cov).log_prob(f / f.norm()))
            embeddings.append((f / f.norm())[0].numpy())
    densities = torch.stack(densities)
    p = (densities + model.get_classifier().bias.detach()).softmax(1).numpy()
    found = SimpleNamespace(mu=mu, cov=cov, basis=basis, files=files, labels=np.array(labels), p=p, page=made[2])
    found.densities, found.x = densities.numpy(), np.stack(embeddings)
    return found


def close(text, value, digits):
    return abs(float(text.rstrip(' %').replace(',', '')) - value) <= 0.5001 * 10**-digits + 2e-5 * abs(value)


def test_accuracy_and_calibration(by_hand):
    page, labels, p = by_hand.page, by_hand.labels, by_hand.p
    tiles, correct, confidence = page.tiles(), p.argmax(1) == labels, p.max(1)
    assert 0 < correct.sum() < len(labels)
    assert (tiles['Images'], tiles['Classes'], tiles['Rank']) == ('42', '7', '4 of 64')
    assert close(tiles['Top-1'], 100 * accuracy_score(labels, p.argmax(1)), 2)
    assert close(tiles['Top-5'], 100 * top_k_accuracy_score(labels, p, k=5), 2)
    assert close(tiles['NLL'], log_loss(labels, p), 4)
    assert close(tiles['s2'], SIGMA2, 4)
    bins = [(confidence > k / 15) & (confidence <= (k + 1) / 15) for k in range(15)]
    rows = [(inside.sum(), confidence[inside].mean(), correct[inside].mean()) for inside in bins if inside.any()]
    assert close(tiles['ECE'], 100 * sum(n * abs(mean - accuracy) for n, mean, accuracy in rows) / 42, 2)
    table = page.table('Confidence, %', 'Images')
    assert len(table) == len(rows) > 2
    for row, (count, mean, accuracy) in zip(table, rows, strict=True):
        assert int(row[1]) == count and close(row[2], 100 * mean, 1) and close(row[3], 100 * accuracy, 1)


def test_pairs_of_classes(by_hand):
    page, labels, p, mu, basis = by_hand.page, by_hand.labels, by_hand.p, by_hand.mu, by_hand.basis
    counts = confusion_matrix(labels, p.argmax(1), labels=range(7))
    wrong = sorted((-counts[t, c], t, c) for t in range(7) for c in range(7) if t != c and counts[t, c])
    cosine = (mu @ mu.T).fill_diagonal_(-2).numpy()
    table = page.table('True class', 'Predicted')
    assert [(row[0], row[1]) for row in table] == [(NAMES[t], NAMES[c]) for _, t, c in wrong]
    for row, (n, t, c) in zip(table, wrong, strict=True):
        assert int(row[2]) == -n and row[3] == f'{-100 * n / 6:.0f} %'
        assert int(row[4]) == 1 + sorted(cosine[t], reverse=True).index(cosine[t, c])
        assert close(row[5], cosine[t, c], 3)
        assert close(row[6], float(torch.linalg.svdvals(basis[t].mT @ basis[c]).square().mean()), 2)
    near = sum(int(row[2]) for row in table if row[4] == '1')
    assert f'{100 * near / (42 - np.trace(counts)):.0f} % of the errors went to the class nearest' in page.text
    closest = sorted({tuple(sorted((c, int(other)))) for c, other in enumerate(cosine.argmax(1))}, key=cosine.item)
    table = page.table('Class', 'and')[::-1]
    assert [(row[0], row[1]) for row in table] == [(NAMES[a], NAMES[b]) for a, b in closest]
    assert [(int(row[4]), int(row[5])) for row in table] == [(counts[a, b], counts[b, a]) for a, b in closest]


def test_maps(by_hand):
    """The opacity of a cell is linear in its value; the diagonal is grey, a share of 0 invisible."""
    page, labels, p, mu = by_hand.page, by_hand.labels, by_hand.p, by_hand.mu
    order, off = order_of(mu), ~np.eye(7, dtype=bool)
    cosine = (mu @ mu.T).numpy()[order][:, order][off]
    share = confusion_matrix(labels, p.argmax(1), labels=order)[off] / 6
    expected = [
        0.1 + 0.9 * (cosine - cosine.min()) / (cosine.max() - cosine.min()),
        np.where(share > 0, 0.1 + 0.9 * share / share.max(), 0),
    ]
    shown = [attrs['xlink:href'] for attrs in page.attributes('image') if attrs['width'] == '7']
    for source, opacity in zip(shown, expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))) as image:
            np.testing.assert_allclose(np.asarray(image)[..., 3][off] / 255, opacity, atol=0.01)
    for name in NAMES:  # as labels of rows and columns
        assert page.text.count(f'\n{name}\n') >= 4


def tiles_of(page, count, order):
    """The pictures of the classes beside the confusions, (C, size, size, 4), by index of the class."""
    (source,) = [attrs['xlink:href'] for attrs in page.attributes('image') if attrs['width'] == str(36 * count)]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))) as image:
        tiles = np.split(np.asarray(image), count, 1)
    return np.stack(tiles)[np.argsort(order)]


def test_pictures_of_confusions(made, by_hand):
    """The most confident mistake beside the two images that suit the other class best, which the matrix shows too."""
    folder, model, page = made
    files, labels, p = by_hand.files, by_hand.labels, by_hand.p
    shown = [attrs['alt'] for attrs in page.attributes('img')[:-24]]
    typical = []
    for c in range(7):
        mine = np.flatnonzero(labels == c)
        typical.append([files[i] for i in mine[np.argsort(-by_hand.densities[mine, c])][:2]])
    for k, row in enumerate(page.table('True class', 'Predicted')[:6]):
        t, c = (NAMES.index(name) for name in row[:2])
        taken = np.flatnonzero((labels == t) & (p.argmax(1) == c))
        assert shown[3 * k : 3 * k + 3] == [files[taken[p[taken, c].argmax()]], *typical[c]]
        assert f'taken for {NAMES[c]}: {len(taken)} image' in page.text
    assert len(shown) == 18
    for tile, names in zip(tiles_of(page, 7, order_of(by_hand.mu)), typical, strict=True):
        with Image.open(folder / 'birds' / 'validation' / names[0]) as image:
            large = image.resize((36, SIZE)).crop((2, 0, 34, SIZE))
        np.testing.assert_allclose(tile[1:-1, 1:-1, :3].mean((0, 1)), np.mean(large, (0, 1)), atol=4)


@pytest.mark.parametrize('kept', [1, 3])
def test_few_pictures_of_confusions_are_kept(tmp_path, monkeypatch, kept):
    """Those of the most frequent, where the images come class by class."""
    monkeypatch.setattr(report, 'KEPT_PAIRS', kept)
    model, labels = Bare(6, 400, 1), torch.arange(6).repeat_interleave(30)
    torch.nn.init.normal_(model.head.A)
    page = page_of(tmp_path, model, torch.randn(180, 3, 12, 12), labels, 'uvwxyz')
    first = page.table('True class', 'Predicted')[0]
    assert f'\n{first[0]}taken for {first[1]}: {first[2]} images' in page.text
    assert 24 + 3 <= len(page.attributes('img')) <= 24 + 3 * 2 * kept
    assert 'Overlap' not in page.text  # as all directions are nearly orthogonal


def test_spread(by_hand):
    """Medians over the classes of the deviations along their directions, the neighbour's, and all but their own."""
    page, labels, x, cov, basis = by_hand.page, by_hand.labels, by_hand.x, by_hand.cov, by_hand.basis.numpy()
    nearest = (by_hand.mu @ by_hand.mu.T).fill_diagonal_(-2).argmax(1)
    ratios = []
    for c in range(7):
        scatter = np.cov(x[labels == c].T)
        own, other = (np.trace(basis[k].T @ scatter @ basis[k]) / 4 for k in (c, nearest[c]))
        rest = (np.trace(scatter) - 4 * own) / (64 - 4)
        ratios.append((math.sqrt(own / other), math.sqrt(own / rest)))
    found = re.search(r'it is ([\d.]+) times as large .*? and ([\d.]+) times', page.text).groups()
    assert all(close(text, value, 2) for text, value in zip(found, np.sort(ratios, 0)[3], strict=True))
    drawn = page.text.partition('Standard deviation of the images of the widest classes')[2].partition('Reliability')[0]
    total = cov.diagonal(dim1=1, dim2=2).sum(1)
    places = [drawn.index(f'\n{NAMES[c]}\n') for c in total.argsort(descending=True).tolist()]
    assert places == sorted(places)
    values = torch.linalg.eigvalsh(cov).flip(1)[:, [0, 3]].median(0)[0].tolist()
    assert 'median {:.3g} for the first, {:.3g} for the last of 4'.format(*values) in page.text


def test_map_of_the_embeddings():
    """The principal components of the class means."""
    classes = class_gaussians_of(distinct(ZZZHead(9, 16, 2)))
    embeddings, x, target = Embeddings(classes), torch.randn(40, 16), torch.arange(40) % 9
    for part in (slice(0, 13), slice(13, 40)):
        embeddings.add(3 * x[part], target[part])
    x = torch.nn.functional.normalize(x)
    axes = torch.from_numpy(PCA(2).fit(classes.mu.numpy()).components_).T
    torch.testing.assert_close(torch.cat(embeddings.points).abs(), (x @ axes).abs(), atol=1e-5, rtol=0)
    assert embeddings.count.flatten().tolist() == target.bincount().tolist()
    torch.testing.assert_close(embeddings.sum[4], x[target == 4].sum(0))


def test_outliers(made, by_hand):
    folder, page, files, labels, p = made[0], made[2], by_hand.files, by_hand.labels, by_hand.p
    score = by_hand.densities.max(1)
    order = np.argsort(score, kind='stable')[:24]
    shown = page.attributes('img')[-24:]
    alt = [f'{files[i]}: {NAMES[labels[i]]}, predicted {NAMES[p[i].argmax()]}' for i in order]
    assert [attrs['alt'] for attrs in shown] == alt
    logged = [float(text) for text in re.findall(r'log-density (-?[\d.]+)', page.text)]
    np.testing.assert_allclose(logged, score[order], atol=0.02)
    assert f'median over all images is {np.sort(score)[20]:.2f}' in page.text
    for attrs, i in zip(shown, order, strict=True):
        kind, _, data = attrs['src'].partition(',')
        assert kind == 'data:image/jpeg;base64' and len(data) < 6000
        with Image.open(io.BytesIO(base64.b64decode(data))) as small:
            with Image.open(folder / 'birds' / 'validation' / files[i]) as image:
                large = image.resize((36, SIZE)).crop((2, 0, 34, SIZE))
            assert small.size == (SIZE, SIZE)
            np.testing.assert_allclose(np.mean(small, (0, 1)), np.mean(large, (0, 1)), atol=4)


def test_the_page_loads_nothing_and_is_accessible(made):
    folder, _, page = made
    text = (folder / 'report.html').read_text(encoding='utf-8')
    assert text.lstrip().startswith('<!DOCTYPE html>') and "content=\"default-src 'none'; img-src data:;" in text
    assert not re.search(r'https?:|//\w|@import|url\((?!#)', re.sub(r'base64,[^"]*', '', text))
    tags = [tag for tag, _ in page.tags]
    assert tags.count('style') == tags.count('h1') == 1 and dict(page.tags)['html'] == {'lang': 'en'}
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'a', 'form', 'b', 'metadata'} & set(tags)
    ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert not any(name.startswith('on') or name == 'href' for name in attrs)
        assert tag != 'th' or attrs['scope'] in ('row', 'col')
        assert tag != 'svg' or attrs['role'] == 'img'
        assert attrs.get('aria-labelledby') in (None, *ids)
        link = attrs.get('xlink:href', 'data:image/png;base64,')
        assert link.startswith('data:image/png;base64,') or link[1:] in ids
        # A figure has the colours of the page, which its style defines
        assert not re.search('(fill|stroke): #', attrs.get('style', ''))
    assert tags.count('title') - 1 == tags.count('svg') == 6
    assert '<script' not in text and all(name in page.text for name in NAMES)
    # Nothing of the user's folders but the names that were asked for
    assert str(folder) not in text and '/somewhere' not in text


def test_same_bytes_twice_and_no_overwriting(made, capsys):
    folder, _, _ = made
    before = (folder / 'report.html').read_bytes()
    with pytest.raises(SystemExit):
        run_report(folder, 'report.html')
    assert 'report.html exists already; give another one or --force' in capsys.readouterr().err
    run_report(folder, 'report.html', '-b', '10', '--force')
    assert capsys.readouterr().out == f'{folder / "report.html"}\n'
    assert (folder / 'report.html').read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ['birds', 'report.html', 'run']


def test_mistakes(made, capsys, tmp_path):
    folder, model, _ = made
    fails(capsys, 'no such file or folder', folder, run='nothing')
    with pytest.raises(SystemExit):  # although the page exists
        run_report(folder, 'report.html', run='nothing')
    assert 'no such file or folder' in capsys.readouterr().err
    fails(capsys, '--data-dir: no such folder', folder, data='nothing')
    fails(capsys, 'has no folder test, only validation', folder, '--split', 'test')
    fails(capsys, '--class-map: expected a .txt file', folder, '--class-map', 'none.txt')
    fails(capsys, '--device: nonsense is not available', folder, '--device', 'nonsense')
    fails(capsys, 'has no averaged weights', folder, '--use-ema')
    fails(capsys, 'has no images of a split', folder, data='run')
    fails(capsys, 'has no images of a split', folder, '--dataset', 'hfds/none')
    save(tmp_path / 'mapped', model, class_map='classes.txt')
    fails(capsys, '--class-map: the model was trained with one', folder, run=tmp_path / 'mapped')
    save(tmp_path / 'amp', model, amp=True, amp_dtype='int8')
    fails(capsys, 'amp_dtype: not a value that train.py takes', folder, run=tmp_path / 'amp')
    broken = new_model()
    torch.nn.init.constant_(broken.get_classifier().bias, math.nan)
    save(tmp_path / 'broken', broken)
    fails(capsys, 'the logits of image 0 are NaN', folder, run=tmp_path / 'broken')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'matplotlib', None)
        fails(capsys, 'report needs matplotlib: pip install "timm_zzz[report]"', folder, run='nothing')


def test_linear_heads(made, tmp_path):
    """The page leaves out what only Gaussians have; similar classes are those of similar rows."""
    folder, _, _ = made
    model = distinct(timm.create_model('test_vit', num_classes=7, img_size=SIZE)).eval()
    save(tmp_path / 'run', model, 'test_vit')
    page = run_report(folder, tmp_path / 'page.html', run=tmp_path / 'run')
    assert page.tiles().keys() == {'Images', 'Classes', 'Top-1', 'Top-5', 'NLL', 'ECE'}
    assert 'has no ZZZ head' in page.text and 'log-density' not in page.text and 'Variance spectra' not in page.text
    rows = torch.nn.functional.normalize(model.head.weight.detach(), dim=1)
    cosine = (rows @ rows.T).fill_diagonal_(-1)
    closest = page.table('Class', 'and')[0]
    assert f'{cosine.max():.4f}' in closest, closest


def test_a_saved_folder(made, tmp_path):
    folder, model, page = made
    config = dict(input_size=(3, SIZE, SIZE), crop_pct=1.0)
    timm_zzz.save_pretrained(model, tmp_path / 'bird-zzz', label_names=NAMES, data_config=config)
    again = run_report(folder, tmp_path / 'page.html', run=tmp_path / 'bird-zzz')
    assert again.tiles() == page.tiles() and 'bird-zzz' in again.text and 'epoch' not in again.text


def test_rank_0(tmp_path):
    draw(tmp_path / 'birds', NAMES, 2)
    (tmp_path / 'birds' / 'validation' / 'd' / '0.png').write_bytes(b'no picture')  # timm takes the next one
    save(tmp_path / 'run', new_model(zzz_rank=0), model_kwargs=dict(zzz_rank=0))
    page = run_report(tmp_path, 'new/report.html', '--amp', '--amp-dtype', 'bfloat16')
    names = [attrs['alt'] for attrs in page.attributes('img')]
    assert "d/1.png (in the place of d/0.png, which can't be read): d, predicted" in ' '.join(names)
    assert not any(name.startswith('d/0.png') for name in names)
    assert 'This head has rank 0: no class has directions of its own' in page.text
    assert 'Overlap' not in page.text and page.tiles()['Rank'] == '0 of 64' and page.tiles()['Images'] == '14'
    assert page.table('True class', 'Predicted', 'Images', 'Of the class', 'Place', 'Cosine of means')
    assert 'mixed precision, bfloat16, as asked for' in page.text


def test_precision_is_that_of_the_run(tmp_path):
    draw(tmp_path / 'birds', NAMES, 1)
    model = new_model()
    save(tmp_path / 'run', model, amp=True, amp_dtype='bfloat16')
    page, whole = run_report(tmp_path, 'a.html'), run_report(tmp_path, 'b.html', '--no-amp')
    assert 'mixed precision, bfloat16, as in training' in page.text and 'float32, as asked for' in whole.text
    save(tmp_path / 'run', model, amp=False)
    assert 'cpu, float32, as in training' in run_report(tmp_path, 'c.html').text
    asked = run_report(tmp_path, 'd.html', '--amp', '--amp-dtype', 'bfloat16')
    assert page.tiles() == asked.tiles() != whole.tiles()


def test_classes_are_numbered_as_in_training(tmp_path, capsys):
    model = new_model(num_classes=4)
    save(tmp_path / 'run', model)
    draw(tmp_path / 'birds', 'acd', 3)
    fails(capsys, 'validation has 3 classes, the model has 4; --class-map', tmp_path)
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\n')
    mapped = run_report(tmp_path, 'mapped.html', '--class-map', str(tmp_path / 'classes.txt'))
    draw(tmp_path / 'birds', 'abcd', 1, 'train')
    numbered = run_report(tmp_path, 'numbered.html')
    assert mapped.tags == numbered.tags and mapped.text == numbered.text
    images = [attrs['alt'] for attrs in numbered.attributes('img')[-9:]]
    assert sorted({(alt[0], alt.split(': ')[1][0]) for alt in images}) == [('a', 'a'), ('c', 'c'), ('d', 'd')]
    assert [tile.any() for tile in tiles_of(numbered, 4, order_of(dense_gaussians(model.get_classifier())[0]))] == [
        1,
        0,
        1,
        1,
    ]
    for name in 'acd':
        (tmp_path / 'birds' / 'validation' / name).rename(tmp_path / 'birds' / 'validation' / f'z{name}')
    fails(capsys, 'validation has classes that train has not', tmp_path)


def test_images_of_unknown_classes_are_an_error_unless_asked_for(tmp_path, capsys):
    save(tmp_path / 'run', new_model(num_classes=3))
    draw(tmp_path / 'birds', 'abc', 1, 'train')
    draw(tmp_path / 'birds', 'bcz', 2)  # as many classes as in training, other ones
    (tmp_path / 'birds/validation/empty').mkdir()
    (tmp_path / 'map.txt').write_text('b\nc\na\n')
    for known, options in (('train', ()), ('--class-map', ('--class-map', str(tmp_path / 'map.txt')))):
        message = f'validation has classes that {known} has not: z (2 images); --ignore-unknown-classes leaves them out'
        fails(capsys, message, tmp_path, *options)
        page = run_report(tmp_path, 'new.html', '--ignore-unknown-classes', *options)
        assert page.tiles()['Images'] == '4'
        assert 'warning: validation: class folders without images: empty\n' in capsys.readouterr().err
        (tmp_path / 'new.html').unlink()
    (tmp_path / 'birds/train').rename(tmp_path / 'birds/training')  # which timm takes for it
    fails(capsys, 'validation has classes that train has not: z (2 images)', tmp_path)
    (tmp_path / 'map.txt').write_text('b\nc\na\nd\n')
    fails(capsys, '--class-map has 4 classes, the model has 3\n', tmp_path, '--class-map', str(tmp_path / 'map.txt'))


def test_averaged_weights_and_a_folder_of_classes(tmp_path):
    """The folder that holds the classes itself, as validate.py takes it too."""
    draw(tmp_path / 'birds', NAMES, 1)
    averaged = new_model()
    torch.nn.init.constant_(averaged.get_classifier().sigma2_raw, 0.0)
    save(tmp_path / 'run', new_model(), state=dict(state_dict_ema=averaged.state_dict()))
    page = run_report(tmp_path, 'report.html', '--use-ema', data='birds/validation')
    assert close(page.tiles()['s2'], math.log(2) + 1e-4, 3) and 'averaged, after epoch 7' in page.text


# Models that no checkpoint has, and images of noise


class Bare(torch.nn.Module):
    """A model that is nothing but a head."""

    def __init__(self, num_classes, feat_dim, rank):
        super().__init__()
        self.head = distinct(ZZZHead(num_classes, feat_dim, rank))
        if rank:
            torch.nn.init.normal_(self.head.v_raw)

    def forward(self, x):
        return self.head(x.flatten(1)[:, : self.head.feat_dim])


def page_of(folder, model, images, labels, names=()):
    data = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    run = Run(checkpoint=folder, model=model, averaged=False, args={}, data_config=data, epoch=None, summary=None)
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    write_report(run, batches, folder / 'report.html', torch.device('cpu'), names=names)
    return Page((folder / 'report.html').read_text(encoding='utf-8'))


@pytest.mark.parametrize('num_classes, rank', [(2000, 2), (60, 40), (2, 1), (1, 1)])
def test_size(tmp_path, num_classes, rank):
    channels = 1 if num_classes == 2 else 3
    images, labels = torch.randn(320, channels, 96, 96), torch.randint(num_classes, (320,))
    names = [f'{c} $x^{{{"long name " * 10}' for c in range(num_classes)]
    page = page_of(tmp_path, Bare(num_classes, 48, rank), images, labels, names)
    assert (tmp_path / 'report.html').stat().st_size < 800_000
    assert len(page.attributes('img')) <= 24 + 6 * 3
    for headers in (('True class', 'Predicted'), ('Class', 'and')) if num_classes > 1 else ():
        assert len(page.table(*headers)) <= 30
    regions = {attrs.get('aria-label') for attrs in page.attributes('div')}
    assert ('Map of the cosines' in regions) == (1 < num_classes <= 60)


@pytest.mark.parametrize('v_raw', [-50.0, 30.0])
def test_extreme_variances(tmp_path, v_raw):
    """Variances that are all equal or large; images that are neither grey nor RGB."""
    model, labels = Bare(5, 8, 3), torch.arange(20) % 5
    torch.nn.init.constant_(model.head.v_raw, v_raw)
    page = page_of(tmp_path, model, torch.randn(20, 2, 4, 4), labels, ['鳥', '', '$', '\n', '\\'])
    assert 'nan' not in page.text.lower() and not page.attributes('img')


def test_several_classifiers(tmp_path):
    """A distilled model answers with the mean of two heads, each with Gaussians of its own."""
    model = new_model('deit_tiny_distilled_patch16_224.zzz_r4', num_classes=5, depth=1)
    images, labels = torch.randn(36, 3, SIZE, SIZE), torch.arange(36) % 5
    page = page_of(tmp_path, model, images, labels)
    assert 'answers with 2 classifiers together: head, head_dist' in page.text
    with torch.no_grad():
        assert close(page.tiles()['Top-1'], 100 * accuracy_score(labels, model(images).argmax(1)), 2)
        tokens = model.forward_features(images)[:, :2].double()
    x, expected = tokens / tokens.norm(dim=2, keepdim=True), 0
    for i, head in enumerate((model.head, model.head_dist)):
        mu, cov, _ = dense_gaussians(head)
        expected = expected + MultivariateNormal(mu, cov).log_prob(x[:, i, None]).amax(1) / 2
    shown = [float(text) for text in re.findall(r'log-density (-?[\d.]+)', page.text)]
    np.testing.assert_allclose(shown, expected.sort()[0][:24], atol=0.02)


def test_one_temperature(tmp_path):
    """NLL and ECE before and after, each half of the images under the temperature of the other; the model stays."""
    model, images, labels = Bare(5, 8, 2), torch.randn(101, 3, 4, 4), torch.randint(5, (101,))
    torch.nn.init.constant_(model.head.sigma2_raw, -3.0)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    page = page_of(tmp_path, model, images, labels)
    logits = model(images).detach()
    divided = logits.clone()
    for half, other in ((0, 1), (1, 0)):
        divided[half::2] /= calibration_temperature(logits[other::2], labels[other::2])
    rows = {row[0]: row[1:] for row in page.table('One temperature')}
    for when, expected in (('before', logits), ('after', divided)):
        assert close(rows[when][0], log_loss(labels, expected.double().softmax(1), labels=range(5)), 4)
        assert close(rows[when][1], 100 * ece(expected, labels), 2)
    assert f'That of these images is {calibration_temperature(logits, labels):.3g}.' in page.text
    assert float(rows['after'][0]) < float(rows['before'][0])
    assert (page.tiles()['NLL'], page.tiles()['ECE']) == (rows['before'][0], rows['before'][1] + ' %')
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert 'One temperature' in page_of(tmp_path, model, images[:1], labels[:1]).text


def test_what_write_report_refuses(tmp_path):
    model, images, labels = Bare(5, 8, 2), torch.randn(10, 3, 4, 4), torch.arange(10) % 5
    with pytest.raises(ValueError, match='label 5, the model has 5 classes'):
        page_of(tmp_path, model, images, labels + 1)
    # A head that is used at every position, the mean of which is the answer
    model.forward = lambda x: model.head(x.flatten(1)[:, :32].unflatten(1, (4, 8))).mean(1)
    assert 'not given one embedding per image' in page_of(tmp_path, model, images, labels).text
    model.forward = lambda x: x.flatten(1)[:, :5]
    with pytest.raises(ValueError, match='no ZZZ head takes part'):
        page_of(tmp_path, model, images, labels)


@pytest.mark.parametrize('batch', [1, 2, 4, 9])
def test_lowest(batch):
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 2.0, -1.0, 1.0, 5.0])
    lowest = Lowest(4)
    for start in range(0, 9, batch):
        part = scores[start : start + batch]
        lowest.update(start, part, torch.arange(start, start + len(part)).half())
    found = [(score, i, int(image)) for score, i, image in lowest.items]
    assert found == [(-1.0, 6, 6), (0.0, 4, 4), (1.0, 1, 1), (1.0, 3, 3)]


def test_like_classes_side_by_side():
    angles = torch.linspace(0, 1.5, 12)[torch.randperm(12)]
    order = order_of(torch.stack([angles.cos(), angles.sin()], 1))
    in_order = angles[order].tolist()
    assert in_order in (sorted(in_order), sorted(in_order, reverse=True))
