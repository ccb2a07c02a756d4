"""Tables of the rows that accuracy.py writes, in markdown."""

import math
import statistics
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

Row = Dict[str, Any]


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


def groups(rows: List[Row], *keys: str) -> Dict[Tuple[Any, ...], List[Row]]:
    """Group the rows by the values of some keys."""
    found: Dict[Tuple[Any, ...], List[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def differences(rows: List[Row], base: List[Row], value: Callable[[Row], float]) -> List[float]:
    """Differences to the base head's runs of the same seed."""
    of_seed = {row['seed']: value(row) for row in base}
    return [value(row) - of_seed[row['seed']] for row in rows if row['seed'] in of_seed]


def tables(rows: List[Row]) -> str:
    """One table for each set, number of examples per class, held-out share, and label smoothing.

    Heads are in the order of their runs.
    """
    parts = []
    keys = ('data', 'shots', 'hold_out_every', 'smoothing')
    for (data, shots, every, smoothing), group in groups(rows, *keys).items():
        title = f'{data}, ' + (f'{shots} per class' if shots else 'all examples')
        title += f', each {every}th class held out' if every else ''
        title += f', label smoothing {smoothing:g}'
        parts += [f'### {title}', '', _table(group), '']
        if every:
            parts += [_outlier_table(group), '']
    return '\n'.join(parts)


def _table(rows: List[Row]) -> str:
    heads = groups(rows, 'head')
    base = heads.get(('linear',), next(iter(heads.values())))
    lines = [
        '| head | runs | top-1 | Δ top-1 | NLL | ECE % | sigma2 | seconds | img/s |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for (head,), group in heads.items():
        delta = differences(group, base, lambda row: row['top1'])
        cells = [
            head,
            str(len(group)),
            show([r['top1'] for r in group]),
            '' if group is base else show(delta),
            show([r['nll'] for r in group], 3),
            show([r['ece'] for r in group], 1),
            show([r['sigma2'] for r in group if 'sigma2' in r], 4),
            f'{statistics.median(r["seconds"] for r in group):.1f}',
            ' '.join(f'{statistics.median(v):.0f}' for v in [[r['img_s'] for r in group if r.get('img_s')]] if v),
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _outlier_table(rows: List[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get('near', {})))
    lines = ['| head | outliers | ' + ' | '.join(names) + ' |', '|---|---|' + '---|' * len(names)]
    for (head,), group in groups(rows, 'head').items():
        kinds: Dict[str, List[Dict[str, float]]] = {'near': [row['near'] for row in group if row.get('near')]}
        for row in group:
            for name, scores in row.get('far', {}).items():
                kinds.setdefault(f'far: {name}', []).append(scores)
        for kind, found in kinds.items():
            cells = [show([scores[n] for scores in found if n in scores], 1) for n in names]
            lines.append(f'| {head} | {kind} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
