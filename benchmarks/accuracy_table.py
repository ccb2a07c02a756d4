"""Tables of the rows that accuracy.py and outliers.py write, in markdown.

    python benchmarks/accuracy_table.py FILE.jsonl [--base linear:rows=zero] [--pairs] [--grid] [--outliers]

For each number of images a class: every head against the base head, as means over the pairs of set and backbone that
both have, at each one's own learning rates. The pairs where it is above or below are those of which a paired test
says so.

With ``--outliers``, rows of outliers.py: which of its scores a head is judged by on a set is chosen by the highest mean
AUROC on the other sets and all backbones, for near and far outliers each. The base head's are the standard detectors.
"""

import argparse
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy
import torch
from accuracy import JOB, RATES, Row, chosen_rates, read, unpacked
from torch import Tensor

BASE = 'linear:rows=zero'
RESAMPLES = 10000
LEVEL = 0.05

Pair = Tuple[str, str]  # set and backbone


def mean_and_error(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean and its standard error, None for fewer than two values."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def show(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return ''
    mean, error = mean_and_error(values)
    return f'{mean:.{digits}f}' + ('' if error is None else f' ± {error:.{digits}f}')


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ['| ' + ' | '.join(titles) + ' |', '|' + '---|' * len(titles)]
    return '\n'.join([*lines, *('| ' + ' | '.join(cells) + ' |' for cells in rows)])


def latest(rows: Iterable[Row], keys: Sequence[str] = JOB) -> List[Row]:
    """Keep the last of the rows that repeat a run."""
    return list({tuple(row.get(k) for k in keys): row for row in rows}.values())


def groups(rows: Iterable[Row], *keys: str) -> Dict[Tuple[Any, ...], List[Row]]:
    """Group the rows by the values of some keys."""
    found: Dict[Tuple[Any, ...], List[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def rights(rows: Sequence[Row]) -> Tensor:
    """Which images are classified correctly, (seeds, N); a row's top-1 says how many of N."""
    masks = []
    for row in sorted(rows, key=lambda row: row['seed']):
        every = unpacked(row['right'], 8 * len(row['right']) * 3 // 4)
        count = round(100 * int(every.sum()) / row['top1']) if row['top1'] else len(every)
        masks.append(every[:count])
    return torch.stack(masks)


def p_value(difference: Tensor) -> float:
    """Two-sided bootstrap test of a mean of 0 for paired differences (seeds, N), over images and seeds.

    Images that differ alike in all seeds are drawn together, by their number, which is much faster than one by one.
    """
    generator = numpy.random.default_rng(0)
    seeds, count = difference.shape
    patterns, sizes = difference.unique(dim=1, return_counts=True)
    drawn = generator.multinomial(count, sizes.double().numpy() / count, RESAMPLES)
    of_seed = drawn @ patterns.double().numpy().T / count  # (resamples, seeds)
    chosen = generator.integers(seeds, size=(RESAMPLES, seeds))
    means = numpy.take_along_axis(of_seed, chosen, 1).mean(1)
    least = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> List[float]:
    """Adjust p-values for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - position) * p_values[i]))
        adjusted[i] = least
    return adjusted


class Comparison:
    """A head against the base head, at their own rates, pair by pair."""

    def __init__(self, rows: List[Row], base: List[Row]):
        of_pair, of_base = groups(rows, 'data', 'backbone'), groups(base, 'data', 'backbone')
        self.pairs: List[Pair] = [pair for pair in of_pair if pair in of_base]  # type: ignore[misc]
        self.matched = {pair: _same_seeds(of_pair[pair], of_base[pair]) for pair in self.pairs}

    def mean_difference(self, pair: Pair, value: Callable[[Row], float]) -> float:
        own, base = self.matched[pair]
        return statistics.fmean(value(a) - value(b) for a, b in zip(own, base, strict=True))

    def top1(self) -> Dict[Pair, float]:
        return {pair: self.mean_difference(pair, lambda row: row['top1']) for pair in self.pairs}

    def error(self) -> Optional[float]:
        """Standard error over sets of the mean over pairs, None for one: the backbones of a set share its images."""
        of_set: Dict[str, List[float]] = {}
        for (data, _), value in self.top1().items():
            of_set.setdefault(data, []).append(value)
        return mean_and_error([statistics.fmean(values) for values in of_set.values()])[1]

    def relative(self, key: str) -> float:
        """Mean over pairs of the difference in the logarithm of a value, as a change in percent."""
        return 100 * (
            math.exp(
                statistics.fmean(self.mean_difference(pair, lambda row: math.log(row[key])) for pair in self.pairs)
            )
            - 1
        )

    def significant(self) -> Tuple[List[Pair], List[Pair]]:
        """The pairs where the head is above, and where it is below, by the paired test with Holm's correction."""
        differences = []
        for pair in self.pairs:
            own, base = map(rights, self.matched[pair])
            differences.append(own.double() - base.double())
        adjusted = holm([p_value(d) for d in differences])
        found: Tuple[List[Pair], List[Pair]] = ([], [])
        for pair, difference, p in zip(self.pairs, differences, adjusted, strict=True):
            if p < LEVEL:
                found[bool(difference.mean() < 0)].append(pair)
        return found


def _same_seeds(rows: List[Row], base: List[Row]) -> Tuple[List[Row], List[Row]]:
    ours, theirs = ({row['seed']: row for row in each} for each in (rows, base))
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def shared_runs(rows: Iterable[Row]) -> Dict[Tuple[int, str], Dict[str, List[Row]]]:
    """List by (images a class, backbone) and head the inner runs whose set, rates and seed all heads have."""
    found = {}
    inner = groups((row for row in rows if row['split'] == 'inner'), 'shots', 'backbone')
    for (shots, backbone), group in sorted(inner.items()):
        by_run = {
            head: {tuple(row[k] for k in ('data', *RATES, 'seed')): row for row in own}
            for (head,), own in groups(group, 'head').items()
        }
        keys = sorted(set.intersection(*map(set, by_run.values())))
        found[shots, backbone] = {head: [own[key] for key in keys] for head, own in by_run.items()}
    return found


def tables(rows: List[Row], base: str = BASE, pairs: bool = False) -> str:
    """One table for each number of images a class, and with ``pairs`` one of all pairs."""
    parts = []
    for (shots, every, epochs, smoothing), group in groups(
        rows, 'shots', 'hold_out_every', 'epochs', 'smoothing'
    ).items():
        title = f'{shots} images a class' if shots else 'All images'
        title += f', each {every}th class held out' if every else ''
        parts += [f'### {title}, {epochs} epochs, label smoothing {smoothing:g}', '', comparison_table(group, base), '']
        if pairs:
            parts += [pair_table(group), '']
    return '\n'.join(parts)


def at_own_rates(rows: Iterable[Row]) -> List[Row]:
    """Select the rows on the validation images at the chosen rates."""
    rows = list(rows)
    chosen = chosen_rates(rows)
    found = []
    for row in rows:
        rates = chosen.get((row['backbone'], row['head'], row['shots']), {})
        if row['split'] == 'validation' and all(row[k] == rates.get(k, row[k]) for k in RATES):
            found.append(row)
    return found


def comparison_table(rows: List[Row], base: str) -> str:
    """Every head against the base at their own rates; in brackets the base's ECE on the same pairs."""
    final = groups(at_own_rates(rows), 'head')
    backbones = list(dict.fromkeys(row['backbone'] for row in rows))
    titles = ['head', 'pairs', 'top-1', 'least', 'above, below', *backbones]
    titles += ['NLL', 'NLL at one temperature', 'ECE at it']
    lines = []
    for (name,) in final:
        if name == base or (base,) not in final:
            continue
        comparison = Comparison(final[name,], final[base,])
        top1 = comparison.top1()
        error = comparison.error()
        mean = f'{statistics.fmean(top1.values()):+.2f}' + ('' if error is None else f' ± {error:.2f}')
        cells = [name, str(len(top1)), mean, f'{min(top1.values()):+.2f}']
        cells.append(', '.join(str(len(each)) for each in comparison.significant()))
        for backbone in backbones:
            found = [value for (_, its), value in top1.items() if its == backbone]
            cells.append(f'{statistics.fmean(found):+.2f}' if found else '')
        cells += (f'{comparison.relative(key):+.1f} %' for key in ('nll', 'nll_t'))
        ours, theirs = ([row for pair in comparison.matched.values() for row in pair[i]] for i in (0, 1))
        errors = [statistics.fmean(row['ece_t'] for row in each) for each in (ours, theirs)]
        lines.append([*cells, f'{errors[0]:.1f} ({errors[1]:.1f})'])
    return markdown(titles, lines)


def pair_table(rows: List[Row]) -> str:
    titles = ['backbone', 'set', 'head', 'rates', 'top-1', 'NLL', 'at one temperature', 'ECE %']
    lines = []
    for (backbone, data, head), group in sorted(groups(at_own_rates(rows), 'backbone', 'data', 'head').items()):
        rates = f'{group[0]["lr"]:g} × {group[0]["head_lr"]:g}'
        figures = (
            show([row[key] for row in group], digits)
            for key, digits in (('top1', 2), ('nll', 3), ('nll_t', 3), ('ece', 1))
        )
        lines.append([backbone, data, head, rates, *figures])
    return markdown(titles, lines)


def grid_table(rows: List[Row]) -> str:
    """Inner top-1 of every pair of set and backbone by learning rates, and their mean."""
    inner = [row for row in rows if row['split'] == 'inner']
    rates = sorted({tuple(row[k] for k in RATES) for row in inner})
    titles = ['images a class', 'backbone', 'set', 'head', *(f'{lr:g} × {head_lr:g}' for lr, head_lr in rates), 'mean']
    lines = []
    by_head = groups(inner, 'shots', 'backbone', 'data', 'head')
    for (shots, backbone, data, head), group in sorted(by_head.items(), key=lambda item: item[0][:3]):
        of_rates = groups(group, *RATES)
        means = {rate: statistics.fmean(row['top1'] for row in each) for rate, each in of_rates.items()}
        cells = [f'{means[rate]:.1f}' if rate in means else '' for rate in rates]
        cells.append(f'{statistics.fmean(means.values()):.1f}' if len(means) == len(rates) else '')
        lines.append([str(shots or 'all'), backbone, data, head, *cells])
    return markdown(titles, lines)


def choice_table(rows: List[Row], base: str = BASE) -> str:
    """By backbone, what heads reach on the inner split: at their own rates, and over the runs that all have."""
    titles = ['images a class', 'backbone', 'head', 'own rates', 'top-1 at them', 'over the grid']
    titles += ['NLL at one temperature, own rates', 'over the grid']
    lines = []
    chosen = chosen_rates(rows)
    for (shots, backbone), grid in shared_runs(rows).items():
        own = {}
        for head in grid:
            rates = dict(chosen[backbone, head, shots], split='inner', shots=shots, backbone=backbone, head=head)
            own[head] = [row for row in rows if all(row[k] == v for k, v in rates.items())]
        sets = set.intersection(*({row['data'] for row in each} for each in own.values()))
        own = {head: [row for row in each if row['data'] in sets] for head, each in own.items()}
        if base not in grid or not sets or not grid[base]:
            continue
        for head in grid:
            cells = [str(shots or 'all'), backbone, head, f'{own[head][0]["lr"]:g} × {own[head][0]["head_lr"]:g}']
            cells += [f'{statistics.fmean(row["top1"] for row in each[head]):.1f}' for each in (own, grid)]
            for each in (own, grid):
                logs = [statistics.fmean(math.log(row['nll_t']) for row in each[name]) for name in (head, base)]
                cells.append('' if head == base else f'{100 * math.expm1(logs[0] - logs[1]):+.0f} %')
            lines.append(cells)
    return markdown(titles, lines)


def outlier_values(row: Row, kind: str, without: str = '') -> Dict[str, List[float]]:
    """List AUROC and FPR95 by score: of near outliers, or of far ones, as the mean over the sets but one."""
    if kind == 'near':
        return row.get('near', {})
    sets = [values for name, values in row['far'].items() if name != without]
    names = sets[0] if sets else ()
    return {name: [statistics.fmean(each[name][i] for each in sets) for i in (0, 1)] for name in names}


def chosen_score(rows: Sequence[Row], kind: str, data: str) -> Optional[str]:
    """Choose the score of the highest mean AUROC without the images of one set; None if there are no others."""
    found: Dict[str, List[float]] = {}
    for row in rows:
        if row['data'] != data:
            for name, (auroc, _) in outlier_values(row, kind, without=data).items():
                found.setdefault(name, []).append(auroc)
    return max(found, key=lambda name: statistics.fmean(found[name]), default=None)


def judged(rows: Sequence[Row], kind: str) -> Dict[Pair, Tuple[str, List[float]]]:
    """Find a head's chosen score on each pair of set and backbone, and its AUROC and FPR95 there."""
    found = {}
    for (data, backbone), own in groups(rows, 'data', 'backbone').items():
        name = chosen_score(rows, kind, data)
        if name is not None:
            values = [outlier_values(row, kind)[name] for row in own]
            found[data, backbone] = name, [statistics.fmean(each) for each in zip(*values, strict=True)]
    return found


def outlier_tables(rows: Sequence[Row], base: str = BASE) -> str:
    """Every head by its chosen scores, against the base head by its; then every score of every head."""
    parts = []
    for (shots, every), group in groups(rows, 'shots', 'hold_out_every').items():
        title = f'{shots} images a class' if shots else 'All images'
        titles = ['outliers', 'head', 'pairs', 'scores', 'AUROC', 'FPR95', 'AUROC against the base', 'least', 'above']
        lines = []
        by_head = groups(group, 'head')
        for kind in ('near', 'far'):
            of_base = judged(by_head.get((base,), []), kind)
            for (head,), own in by_head.items():
                found = judged(own, kind)
                if not found:
                    continue
                scores = Counter(name for name, _ in found.values()).most_common()
                cells = [kind, head, str(len(found)), ', '.join(f'{name} ({count})' for name, count in scores)]
                cells += (f'{statistics.fmean(values[i] for _, values in found.values()):.1f}' for i in (0, 1))
                differences = [found[pair][1][0] - of_base[pair][1][0] for pair in found if pair in of_base]
                cells += [''] * 3
                if differences and head != base:
                    cells[-3:] = show(differences, 1), f'{min(differences):.1f}', str(sum(d > 0 for d in differences))
                lines.append(cells)
        parts += [f'### {title}, each {every}th class held out', '', markdown(titles, lines), '']
        lines = []
        for (head,), own in by_head.items():
            columns = [[outlier_values(row, kind) for row in own] for kind in ('near', 'far')]
            for name in columns[0][0] or columns[1][0]:
                cells = [head, name]
                for column in columns:
                    values = [each[name] for each in column if name in each]
                    cells += (f'{statistics.fmean(v[i] for v in values):.1f}' if values else '' for i in (0, 1))
                lines.append(cells)
        parts += [markdown(['head', 'score', 'near: AUROC', 'FPR95', 'far: AUROC', 'FPR95'], lines), '']
    return '\n'.join(parts)


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, metavar='FILE.jsonl')
    parser.add_argument('--base', default=BASE, metavar='HEAD')
    parser.add_argument('--pairs', action='store_true', help='every pair of set and backbone, too')
    parser.add_argument('--grid', action='store_true', help='only the runs by which rates are chosen')
    parser.add_argument('--outliers', action='store_true', help='of the rows of outliers.py')
    options = parser.parse_args(arguments)
    rows = latest(read(options.results))
    if options.outliers:
        print(outlier_tables(rows, options.base))
        return
    grids = f'{choice_table(rows, options.base)}\n\n{grid_table(rows)}'
    print(grids if options.grid else tables(rows, options.base, options.pairs))


if __name__ == '__main__':
    main()
