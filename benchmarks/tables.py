"""Fill the tables of README.md and docs/ from the rows in benchmarks/results.

    python benchmarks/tables.py

Between ``<!-- table NAME -->`` and ``<!-- end -->`` stands what :data:`TABLES` makes of that name.
"""

import math
import re
import statistics
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import accuracy_table
import nuisance
import tolerance_table
from accuracy import RATES, Row, read
from accuracy_table import Comparison, at_own_rates, groups, latest, markdown, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
MARKED = re.compile(r'(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)', re.DOTALL)

HEADS = {
    'linear': 'linear, as timm starts it',
    'linear:rows=zero': 'linear, from zero',
    'linear:rows=probe': 'logistic regression',
    'linear:rows=probe,train=0': 'logistic regression',
    'zzz_r8': 'ZZZ r 8, flat',
    'zzz_r0': 'ZZZ r 0, flat',
    'zzz_r8:init=reference': 'ZZZ r 8, reference start',
    'arcface:rows=flat': 'ArcFace',
    'cosface:rows=flat': 'CosFace',
    'cosine:rows=flat': 'cosine',
    'svm': 'SVM, RBF kernel',
    'zzz_r8:row_std=0.02': 'flat, rows 4 times as long',
    'zzz_r8:basis=random,spread=0.1': 'classes 0.1 apart at random',
    'zzz_r8:basis=random,spread=0.1,row_std=0.02': 'classes 0.1 apart at random, rows 4 times as long',
    'zzz_r8:v_ratio=1': 'flat, variances as large as sigma2',
    'zzz_r8:refit=frozen': 'flat, a fit of the trained features at the end',
    'zzz_r8:fit=finetune,refit=frozen': '`zzz_fit`, a fit of the trained features at the end',
    'zzz_r8:fit=finetune,basis=random': '`zzz_fit`, random subspaces',
    'zzz_r8:fit=finetune,mean_spread=0.5': '`zzz_fit`, means half as far apart as fitted',
    'zzz_r8:fit=finetune,row_std=0.02': '`zzz_fit`, rows 4 times as long',
    'zzz_r8:fit=finetune,v_ratio=1': '`zzz_fit`, variances as large as sigma2',
}
BACKBONES = {
    'mobilenetv2_100': 'MobileNetV2',
    'tf_efficientnet_lite0': 'EfficientNet-Lite0',
    'vit_small_patch14_dinov2': 'ViT-S/14',
}

TIMM, LINEAR, PROBE, FLAT = (HEADS[name] for name in ('linear', 'linear:rows=zero', 'linear:rows=probe', 'zzz_r8'))
FIT, FIT_0, FITTED, LDA = 'ZZZ r 8, `zzz_fit`', 'ZZZ r 0, `zzz_fit`', 'ZZZ r 8, fitted', 'ZZZ r 0, fitted'


def plain(head: str) -> str:
    """Name a head in words."""
    if head in HEADS:
        return HEADS[head]
    match = re.fullmatch(r'zzz_r(\d+):fit=(finetune|frozen,train=0)(?:,(.*))?', head)
    if match is None:
        return head
    start = '`zzz_fit`' if match[2] == 'finetune' else 'fitted'
    return f'ZZZ r {match[1]}, {start}' + (f', {match[3]}' if match[3] else '')


def rows_of(name: str) -> List[Row]:
    """Read the rows of a file in benchmarks/results, with plain names; the last of those that repeat a run counts."""
    rows = read(RESULTS / f'{name}.jsonl')
    return latest(
        dict(row, backbone=BACKBONES.get(row['backbone'], row['backbone']), head=plain(row['head'])) for row in rows
    )


def by_set(rows: List[Row], nll: str = 'nll') -> str:
    """Make a table of top-1 and NLL by backbone, images a class and set; the columns are classifiers."""
    heads = [head for (head,) in groups(rows, 'head')]
    lines = []
    for (backbone, shots, data), group in sorted(groups(rows, 'backbone', 'shots', 'data').items()):
        of_head = {head: [row for row in group if row['head'] == head] for head in heads}
        cells = [
            f'{show(column(each, "top1"))}, {show(column(each, nll), 3)}' if each else '' for each in of_head.values()
        ]
        lines.append([backbone, str(shots or 'all'), data, *cells])
    return markdown(['backbone', 'images a class', 'set', *heads], lines)


def column(rows: List[Row], key: str) -> List[float]:
    return [row[key] for row in rows]


def untitled(text: str) -> str:
    """Leave out the titles of tables."""
    return '\n'.join(line for line in text.splitlines() if not line.startswith('###')).strip()


def against(comparison: Comparison) -> List[str]:
    """Write a head's mean difference in top-1 with its error over sets, the range and how many are below, the NLL."""
    top1 = list(comparison.top1().values())
    mean = f'{statistics.fmean(top1):+.1f} ± {comparison.error() or math.nan:.1f}'
    below = sum(value < 0 for value in top1)
    return [mean, f'{min(top1):+.1f} to {max(top1):+.1f}, {below} below', f'{comparison.relative("nll_t"):+.0f} %']


def differences(rows: List[Row], pairs: Sequence[Tuple[str, str]]) -> str:
    """Make a table of heads against others, by images a class and by how many kinds are one class."""
    lines = []
    kinds = [dict(row, kinds=row['data'].partition(', ')[2].partition(' ')[0] or '1') for row in rows]
    for (shots, count), group in groups(kinds, 'shots', 'kinds').items():
        of_head = groups(group, 'head')
        for head, base in pairs:
            if {(head,), (base,)} <= of_head.keys():
                cells = against(Comparison(of_head[head,], of_head[base,]))
                lines.append([str(shots or 'all'), count, head, base, *cells])
    titles = ['images a class', 'kinds a class', 'head', 'against', 'top-1, mean', 'pairs of set and backbone']
    return markdown([*titles, 'NLL at one temperature'], lines)


def summary() -> str:
    """Make the table that docs/results.md begins with: mean differences to the best-started linear head."""
    lines = []
    tuned, fitted = rows_of('accuracy'), rows_of('frozen')
    for shots, name in ((0, 'all images'), (5, 'five images a class')):
        for kind, rows, base, heads in (
            ('fine-tuned', at_own_rates(row for row in tuned if row['shots'] == shots), LINEAR, (FLAT, FIT)),
            ('frozen backbone', [row for row in fitted if row['shots'] == shots], PROBE, (FITTED,)),
        ):
            of_head = groups(rows, 'head')
            for head in heads:
                if (head,) not in of_head:
                    continue
                comparison = Comparison(of_head[head,], of_head[base,])
                count = ' × '.join(str(len(set(each))) for each in zip(*comparison.pairs, strict=True))
                lines.append([f'{name}, {kind}', head, *against(comparison), count])
    titles = ['', 'head', 'top-1, mean', 'pairs of set and backbone', 'NLL at one temperature', 'sets × backbones']
    return markdown(titles, lines)


def in_whole_seeds(rows: List[Row], pairs: int) -> Optional[float]:
    """Average the top-1 over the seeds that ran on so many pairs of set and backbone; None if there are none."""
    whole = [row['top1'] for own in groups(rows, 'seed').values() if len(own) == pairs for row in own]
    return statistics.fmean(whole) if whole else None


def percent(value: Optional[float]) -> str:
    return '' if value is None else f'{value:.1f}'


def readme() -> str:
    """Make the table of README.md: top-1 by its own commands, and by backbone, mean over six sets."""
    heads = (TIMM, LINEAR, FLAT, FIT)
    lines = []
    for (data,), rows in groups(trained(), 'data').items():
        means = [statistics.fmean(column([row for row in rows if row['head'] == head], 'top1')) for head in heads]
        lines.append([f'{data}, all images, MobileNetV2, by the commands below', *map(percent, means)])
    few, every = (at_own_rates([*of_shots('accuracy', shots), *of_shots('heads', shots)]) for shots in (5, 0))
    for backbone in BACKBONES.values():
        own = groups((row for row in few if row['backbone'] == backbone), 'head')
        means = [in_whole_seeds(own.get((head,), []), 6) for head in heads]
        lines.append([f'six sets, five images a class, {backbone}', *map(percent, means)])
    own = groups(every, 'head')
    means = [in_whole_seeds(own.get((head,), []), 18) for head in heads]
    lines.append(['six sets, all images, mean of these backbones', *map(percent, means)])
    return markdown(['top-1', 'linear, as timm starts it', 'linear, from zero', 'ZZZ', 'ZZZ, `zzz_fit`'], lines)


def trained() -> List[Row]:
    """Read the rows of train_script.py, with plain names."""
    return [
        dict(row, head=plain(row['head']), data=row['data'].replace('grocery81', 'groceries'))
        for row in read(RESULTS / 'train.jsonl')
    ]


def train() -> str:
    """Make the table of the runs through timm's train.py."""
    lines = []
    for (data, head), rows in groups(trained(), 'data', 'head').items():
        lines.append([data, head, str(len(rows)), show(column(rows, 'top1')), show(column(rows, 'nll'), 3)])
    return markdown(['set', 'head', 'seeds', 'top-1', 'NLL'], sorted(lines))


def ranks_tuned() -> str:
    """Make the table of ranks after fine-tuning; the rows of rank 8 are those of the same rates in accuracy.jsonl."""
    others = rows_of('ranks')
    keys = ('data', 'backbone', 'shots', 'split', 'seed', *RATES)
    runs = {tuple(row[k] for k in keys) for row in others}
    rank_8 = [row for row in rows_of('accuracy') if row['head'] == FIT and tuple(row[k] for k in keys) in runs]
    return by_set(sorted([*others, *rank_8], key=lambda row: int(row['head'].split()[2].strip(','))), 'nll_t')


def search() -> str:
    """Make the table of changes to a start against the start itself: same sets, rates and seed, inner split."""
    inner = groups((row for row in rows_of('accuracy') if row['split'] == 'inner'), 'head', 'shots', *RATES)
    lines = []
    for (shots, head, *rates), rows in sorted(groups(rows_of('search'), 'shots', 'head', *RATES).items()):
        comparison = Comparison(rows, inner[(FIT if 'zzz_fit' in head else FLAT, shots, *rates)])
        lines.append([str(shots or 'all'), head, str(len(comparison.pairs)), *against(comparison)])
    titles = ['images a class', 'start', 'sets', 'top-1 against the start without that, mean', 'each set']
    return markdown([*titles, 'NLL at one temperature'], lines)


def forgiving() -> str:
    """Make the table of differences to linear over all pairs of learning rates that the heads ran at, inner split."""
    lines = []
    runs = accuracy_table.shared_runs(rows_of('accuracy'))
    for shots, name in ((0, 'all images'), (5, 'five images a class')):
        for head in (FLAT, FIT):
            pairs = [
                list(zip(runs[shots, backbone][head], runs[shots, backbone][LINEAR], strict=True))
                for backbone in BACKBONES.values()
            ]
            differences = [[own['top1'] - base['top1'] for own, base in each] for each in pairs]
            logs = [statistics.fmean(math.log(own['nll_t'] / base['nll_t']) for own, base in each) for each in pairs]
            cells = [f'{statistics.fmean(each):+.1f} ({statistics.median(each):+.1f})' for each in differences]
            mean = [statistics.fmean(map(average, differences)) for average in (statistics.fmean, statistics.median)]
            cells += [f'{mean[0]:+.1f} ({mean[1]:+.1f})', f'{100 * math.expm1(statistics.fmean(logs)):+.0f} %']
            lines.append([name, head, *cells])
    return markdown(['fine-tuned', 'head', *BACKBONES.values(), 'mean', 'NLL at one temperature'], lines)


def rates() -> str:
    """Make the table of inner top-1 by learning rates, means over the sets that all heads with these rates ran on."""
    inner = [row for row in rows_of('accuracy') if row['split'] == 'inner']
    heads = [LINEAR, FLAT, FIT, FIT_0]
    lines = []
    for (shots, backbone, lr, head_lr), group in sorted(groups(inner, 'shots', 'backbone', *RATES).items()):
        of_head = {head: {row['data']: row['top1'] for row in own} for (head,), own in groups(group, 'head').items()}
        sets = set.intersection(*map(set, of_head.values()))
        means = [statistics.fmean(of_head[head][name] for name in sets) if head in of_head else None for head in heads]
        if LINEAR in of_head and len(of_head) > 2 and len(sets) > 1:
            lines.append([str(shots or 'all'), backbone, f'{lr:g} × {head_lr:g}', *map(percent, means)])
    return markdown(['images a class', 'backbone', 'rates', *heads], lines)


def of_shots(name: str, shots: int) -> List[Row]:
    return [row for row in rows_of(name) if row['shots'] == shots]


TABLES: Dict[str, Callable[[], str]] = {
    'readme': readme,
    'summary': summary,
    'forgiving': forgiving,
    'all-images': lambda: accuracy_table.comparison_table(of_shots('accuracy', 0), LINEAR),
    'five-images': lambda: accuracy_table.comparison_table(of_shots('accuracy', 5), LINEAR),
    'all-images-pairs': lambda: accuracy_table.pair_table(of_shots('accuracy', 0)),
    'five-images-pairs': lambda: accuracy_table.pair_table(of_shots('accuracy', 5)),
    'rates': lambda: accuracy_table.choice_table(rows_of('accuracy'), LINEAR),
    'every-rate': rates,
    'start': lambda: accuracy_table.grid_table(rows_of('start')),
    'frozen': lambda: by_set([row for row in rows_of('frozen') if row['head'] in (PROBE, LDA, FITTED)]),
    'nuisance': lambda: nuisance.table(read(RESULTS / 'nuisance.jsonl')),
    'outliers': lambda: untitled(accuracy_table.outlier_tables(rows_of('outliers'), PROBE)),
    'outliers-tuned': lambda: untitled(accuracy_table.outlier_tables(rows_of('tuned_outliers'), LINEAR)),
    'tolerance': lambda: untitled(tolerance_table.tables(rows_of('tolerance'), LINEAR)),
    'train': train,
    'other-heads': lambda: accuracy_table.comparison_table(
        [*of_shots('heads', 5), *(row for row in of_shots('accuracy', 5) if row['head'] == LINEAR)], LINEAR
    ),
    'against-cosface': lambda: differences(
        at_own_rates([*of_shots('heads', 5), *of_shots('accuracy', 5)]), [(FLAT, 'CosFace'), (FIT, 'CosFace')]
    ),
    'fitted': lambda: differences(
        [*of_shots('frozen', 0), *of_shots('frozen', 5), *rows_of('kinds')],
        [(FITTED, PROBE), (FITTED, HEADS['svm']), (LDA, PROBE), (FITTED, LDA), ('ZZZ r 16, fitted', FITTED)],
    ),
    'ranks-tuned': ranks_tuned,
    'kinds': lambda: by_set(rows_of('kinds'), 'nll_t'),
    'few': lambda: by_set(
        [dict(row, head=f'{row["head"]}, {row["lr"]:g} × {row["head_lr"]:g}') for row in rows_of('few')], 'nll_t'
    ),
    'search': search,
    'ranks': lambda: by_set(
        [row for row in rows_of('frozen') if row['backbone'] == 'MobileNetV2' and row['shots'] in (0, 5)]
    ),
}


def filled(text: str) -> str:
    """Fill the tables of a page."""
    return MARKED.sub(lambda match: f'{match[1]}{TABLES[match[2]]()}\n{match[3]}', text)


def pages() -> List[Path]:
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


if __name__ == '__main__':
    for page in pages():
        page.write_text(filled(page.read_text()))
