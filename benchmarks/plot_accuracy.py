"""Plots of the runs that accuracy.py wrote: accuracy against epochs and examples, reliability, variances."""

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from accuracy import read  # noqa: E402
from accuracy_table import Row, groups  # noqa: E402


def curve(axes: Any, rows: List[Row]) -> None:
    """Mean top-1 after the epochs at which it was taken."""
    points: Dict[int, List[float]] = {}
    for row in rows:
        for epoch, top1 in row['curve']:
            points.setdefault(epoch, []).append(top1)
    axes.plot(list(points), [statistics.fmean(v) for v in points.values()], 'o-', label=rows[0]['head'])


def reliability(axes: Any, rows: List[Row]) -> None:
    """Accuracy against confidence, bins of all seeds together."""
    counts = [[count for count, _, _ in row['reliability']] for row in rows]
    total = [sum(c) for c in zip(*counts, strict=True)]
    sums = [
        [sum(bins[i][0] * bins[i][k] for bins in (row['reliability'] for row in rows)) for i in range(len(total))]
        for k in (1, 2)
    ]
    kept = [i for i, count in enumerate(total) if count >= 20]
    axes.plot([sums[0][i] / total[i] for i in kept], [sums[1][i] / total[i] for i in kept], 'o-', label=rows[0]['head'])


def spectrum(axes: Any, rows: List[Row]) -> None:
    """Median over classes of v / sigma2 by direction, and the tenth to ninetieth percentile, of the first seed."""
    row = rows[0]
    low, middle, high = ([v[k] / row['sigma2'] for v in row['v']] for k in range(3))
    x = range(1, len(middle) + 1)
    axes.plot(x, middle, 'o-', label=row['head'])
    axes.fill_between(x, low, high, alpha=0.2)


def examples(axes: Any, rows: List[Row]) -> None:
    """Mean top-1 against the training images per class."""
    points = {
        statistics.fmean(r['train_images'] for r in group): statistics.fmean(r['top1'] for r in group)
        for group in groups(rows, 'shots').values()
    }
    xs = sorted(points)
    axes.plot(xs, [points[x] for x in xs], 'o-', label=rows[0]['head'])


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path)
    parser.add_argument('output', type=Path)
    options = parser.parse_args(arguments)
    rows = read(options.results)
    sets = groups(rows, 'data')
    panels = [('reliability', reliability), ('v / sigma2 by direction', spectrum)]
    if any(len(row['curve']) > 1 for row in rows):
        panels.append(('top-1 % by epoch', curve))
    if len({row['shots'] for row in rows}) > 1:
        panels.append(('top-1 % by training images', examples))
    colors = {head: matplotlib.color_sequences['tab10'][i % 10] for i, (head,) in enumerate(groups(rows, 'head'))}
    figure, grid = plt.subplots(len(sets), len(panels), figsize=(4 * len(panels), 3.4 * len(sets)), squeeze=False)
    for line, ((name,), of_set) in zip(grid, sets.items(), strict=True):
        for axes, (title, draw) in zip(line, panels, strict=True):
            axes.set_title(f'{name}: {title}', fontsize=9)
            for (head,), group in groups(of_set, 'head').items():
                axes.set_prop_cycle(color=[colors[head]])
                whole = [r for r in group if r['shots'] == 0] or group
                if draw is not spectrum or whole[0].get('v'):
                    draw(axes, group if draw is examples else whole)
        line[0].plot([0, 1], [0, 1], color='grey', linewidth=0.8)
        line[1].set_yscale('log')
    grid[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(options.output, dpi=60)


if __name__ == '__main__':
    main()
