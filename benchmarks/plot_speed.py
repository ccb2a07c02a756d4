"""``python benchmarks/plot_speed.py RESULTS.json OUT.png``: the sweep's times over classes. Wants matplotlib."""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

Line = List[Tuple[float, float]]
# Okabe and Ito's, told apart with every kind of colour vision
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00')
GREY = '#555555'


def lines(rows: List[Dict[str, Any]], batch: int) -> Dict[Tuple[str, int], Line]:
    """Points (classes, ms) of the linear layer, and of the head and its floor for each rank."""
    found: Dict[Tuple[str, int], Line] = defaultdict(list)
    for row in rows:
        if row['batch'] == batch and row['ms'] is not None:
            found[row['method'], row['rank']].append((row['num_classes'], row['ms']))
            if row['rank']:
                found['floor', row['rank']].append((row['num_classes'], row['floor_ms']))
    return found


def spread(values: List[float], gap: float) -> List[float]:
    """Positions in the order of the values, moved up where they would be closer than ``gap``."""
    placed: Dict[int, float] = {}
    last = -math.inf
    for i in sorted(range(len(values)), key=values.__getitem__):
        last = placed[i] = max(values[i], last + gap)
    return [placed[i] for i in range(len(values))]


def plot(results: Dict[str, Any], batch: int, out: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    found = lines(results['sweep'], batch)
    if not found:
        raise SystemExit(f'No times for batch size {batch} in the sweep.')
    ranks = sorted({rank for method, rank in found if method == 'zzz'})
    color = dict(zip(ranks, COLORS, strict=False))
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout='constrained')
    classes = sorted({c for points in found.values() for c, _ in points})
    ends = []
    for (method, rank), points in found.items():
        x, y = zip(*sorted(points), strict=True)
        style: Dict[str, Any] = dict(color=color.get(rank, GREY), linewidth=1, linestyle='--')
        label = f'floor, r = {rank}'
        if method == 'zzz':
            style.update(linewidth=2, linestyle='-', marker='o', markersize=4)
            label = f'ZZZ, r = {rank}'
        elif method == 'linear':
            style.update(linestyle='-')
            label = 'linear layer'
        axes.plot(x, y, **style)
        ends.append((x[-1], y[-1], label, style['color']))
    axes.set(xscale='log', yscale='log', xlabel='classes', ylabel='ms per step, forward + backward')
    axes.set_xticks(classes, [f'{c:,}' for c in classes])
    axes.xaxis.set_minor_formatter('')
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    low, high = (math.log10(v) for v in axes.get_ylim())
    places = spread([math.log10(y) for _, y, _, _ in ends], 0.045 * (high - low))
    for (x, _, label, ink), place in zip(ends, places, strict=True):
        at = (x, 10**place)
        axes.annotate(
            label,
            at,
            xytext=(8, 0),
            textcoords='offset points',
            color=ink,
            fontsize=8,
            va='center',
            annotation_clip=False,
        )
    width = next(row['feat_dim'] for row in results['sweep'])
    axes.set_title(f'{results["environment"]["device"]}: batch size {batch}, d = {width}', fontsize=10)
    axes.grid(which='major', linewidth=0.4, alpha=0.5)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(out, dpi=105)


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='what speed.py --suite sweep --json wrote')
    parser.add_argument('out', type=Path, help='.png or .svg')
    parser.add_argument('--batch', type=int, default=256)
    args = parser.parse_args(arguments)
    plot(json.loads(args.results.read_text()), args.batch, args.out)


if __name__ == '__main__':
    main()
