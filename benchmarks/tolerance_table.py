"""Tables of the rows that tolerance.py writes, in markdown.

    python benchmarks/tolerance_table.py FILE.jsonl [--base linear:rows=zero] [--strengths]

Every figure is a mean over the five strengths of a corruption, and over sets, backbones and seeds with its standard
error. A head is compared with the base head of the same set, backbone and seed.
"""

import argparse
import statistics
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

from accuracy import Row, read
from accuracy_table import BASE, groups, latest, markdown, mean_and_error, show
from corruptions import STRENGTHS

RUN = ('data', 'backbone', 'size', 'seed')
SETTINGS = ('shots', 'hold_out_every', 'epochs', 'smoothing')
ALL = 'all corruptions'
DROP = 'all corruptions, less clean'

Value = Callable[[Row], float]


def mean_of(name: str, key: str) -> Value:
    """Return what computes a figure of a row: of the clean images, of a corruption, or over all of them."""

    def value(row: Row) -> float:
        if name == 'clean':
            return row[key]
        names = list(row['corruptions']) if name in (ALL, DROP) else [name]
        mean = statistics.fmean(statistics.fmean(row['corruptions'][each][key]) for each in names)
        return mean - row[key] if name == DROP else mean

    return value


def signed(values: Sequence[float], unit: str = '') -> str:
    """Write a mean with its sign, and its standard error."""
    mean, error = mean_and_error(values)
    return f'{mean:+.2f}' + ('' if error is None else f' ± {error:.2f}') + unit


def differences(rows: Sequence[Row], base: Sequence[Row], value: Value) -> List[float]:
    """Subtract from each row's figure that of the base head's run on the same set, backbone and seed."""
    of_base = {tuple(row[k] for k in RUN): row for row in base}
    both = [(row, of_base[key]) for row in rows if (key := tuple(row[k] for k in RUN)) in of_base]
    return [value(row) - value(its) for row, its in both]


def _names(rows: Sequence[Row]) -> List[str]:
    """The corruptions that no row lacks."""
    return [name for name in rows[0]['corruptions'] if all(name in row['corruptions'] for row in rows)]


def _comparison(rows: List[Row], base: str) -> List[str]:
    """Top-1 of the base head, and what the others have more; the same for the NLL at the clean images' temperature."""
    names = _names(rows)
    rows = [dict(row, corruptions={name: row['corruptions'][name] for name in names}) for row in rows]
    of_head = {head: group for (head,), group in groups(rows, 'head').items()}
    others = [head for head in of_head if head != base]
    parts = []
    for title, key, digits in (('top-1, %', 'top1', 1), ('NLL at the temperature of the clean images', 'nll_t', 3)):
        cells = []
        for name in ('clean', *names, ALL, DROP):
            value = mean_of(name, key)
            cells.append([name, show([value(row) for row in of_head[base]], digits)])
            for head in others:
                found = differences(of_head[head], of_head[base], value)
                cells[-1].append(signed(found) if found else '')
        parts += [markdown([title, base, *(f'{head}, difference' for head in others)], cells), '']
    return parts


def _strengths(rows: List[Row]) -> List[str]:
    """Top-1 of every head by corruption and strength."""
    cells = []
    for name in _names(rows):
        for (head,), group in groups(rows, 'head').items():
            by_strength = zip(*(row['corruptions'][name]['top1'] for row in group), strict=True)
            cells.append([name, head, *(show(each, 1) for each in by_strength)])
    return [markdown(['corruption', 'head', *(f'strength {i}' for i in STRENGTHS)], cells), '']


def _within(rows: List[Row]) -> List[str]:
    """Table the share of the variance within classes that lies inside their subspaces."""
    cells = []
    for (head,), group in groups((row for row in rows if 'within' in row), 'head').items():
        columns: Dict[str, List[float]] = {k: [row['within'][k] for row in group] for k in group[0]['within']}
        cells.append([head, *(show(columns[k], 1) for k in ('own', 'other', 'random')), show(columns['variance'], 3)])
    titles = ['head', 'inside its own subspace, %', "another class's", 'a random one', 'variance within classes']
    return [markdown(titles, cells), ''] if cells else []


def tables(rows: List[Row], base: str = BASE, strengths: bool = False) -> str:
    """Make the tables of every number of images a class."""
    parts = []
    for (shots, every, epochs, smoothing), group in groups(rows, *SETTINGS).items():
        title = f'{shots} images a class' if shots else 'All images'
        title += f', each {every}th class held out' if every else ''
        runs = len({tuple(row[k] for k in RUN) for row in group})
        parts += [f'### {title}, {epochs} epochs, label smoothing {smoothing:g}; {runs} runs a head', '']
        if any(row['head'] == base for row in group):
            parts += _comparison(group, base)
        parts += _within(group)
        if strengths:
            parts += _strengths(group)
    return '\n'.join(parts)


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, metavar='FILE.jsonl')
    parser.add_argument('--base', default=BASE, metavar='HEAD')
    parser.add_argument('--strengths', action='store_true', help='every strength, too')
    options = parser.parse_args(arguments)
    keys = (*RUN, *SETTINGS, 'head')
    print(tables(latest(read(options.results), keys), options.base, options.strengths))


if __name__ == '__main__':
    main()
