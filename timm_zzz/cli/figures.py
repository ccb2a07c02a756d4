"""The figures of a report: drawn by matplotlib, as inline SVG in the colours of the page."""

import html
import io
import math
import re
from typing import Any, Dict, Sequence

import torch
from torch import Tensor

from ..metrics import Bin

__all__ = ['STYLE', 'draw_bars', 'draw_histogram', 'draw_map', 'draw_reliability', 'draw_spectra', 'shorten']


def shorten(text: str, size: int = 24) -> str:
    """Drop the middle of a text that is too long: its ends tell classes apart."""
    text = ' '.join(text.split())
    return text if len(text) <= size else f'{text[: size // 2]}…{text[-(size - 1) // 2 :]}'


# Figures, in inches of 96 pixels. In the SVG, variables of the page's CSS stand for these colours.

TEXT, PAGE, FAINT, LINE, BLUE, ORANGE = '#000000', '#ffffff', '#59636e', '#d1d9e0', '#0072b2', '#b45f00'
_VARIABLES = {TEXT: 'text', PAGE: 'page', FAINT: 'faint', LINE: 'line', BLUE: 'blue', ORANGE: 'orange'}
_SHADES = [(0.17, 0.55, 0.78, 0.1), (0.17, 0.55, 0.78, 1)]  # the same on a light and on a dark page
STYLE: Any = {
    'svg.fonttype': 'none',
    'font.size': 9,
    'patch.facecolor': LINE,
    'legend.frameon': False,
    'axes.axisbelow': True,
    'axes.edgecolor': FAINT,
    'axes.formatter.useoffset': False,
    'axes.grid': True,
    'axes.grid.axis': 'y',
    'axes.grid.which': 'both',
    'axes.spines.right': False,
    'axes.spines.top': False,
    'grid.color': LINE,
    'xtick.color': FAINT,
    'ytick.color': FAINT,
}
# What the page has no use for: XML, metadata, a style for all elements, ids that repeat, and fonts
_DROPPED = re.compile(
    r'^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"| xmlns(:xlink)?="[^"]*"'
    '|; font-family: [^;"]*',
    re.S,
)


def _figure(width: float, height: float, **kwargs: Any) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), **kwargs)


def svg(figure: Any, title: str, **kwargs: Any) -> str:
    """Write a figure as an SVG element of an HTML page, always the same bytes."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({'svg.hashsalt': title}):  # ids derive from it
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None}, **kwargs)
    text = re.sub(r'\n *', '\n', _DROPPED.sub('', file.getvalue()))
    for color, variable in _VARIABLES.items():
        text = text.replace(f': {color}', f': var(--{variable})')
    return text.replace('>', f' role="img"><title>{html.escape(title)}</title>', 1)


def draw_histogram(values: Tensor, title: str, xlabel: str) -> str:
    """Draw how many classes have which value."""
    figure = _figure(5.2, 2, layout='constrained')
    ax = figure.subplots()
    ax.hist(values.numpy().round(6), 24, color=BLUE, rwidth=0.93)  # without the noise of classes that are equal
    ax.locator_params('y', integer=True, nbins=4)
    ax.yaxis.set_major_formatter('{x:,.0f}')
    ax.set(xlabel=xlabel, ylabel='classes')
    return svg(figure, f'{title}, from {values.min():.3g} to {values.max():.3g}')


def draw_map(values: Tensor, labels: Sequence[str], title: str, shares: bool = False) -> str:
    """Draw values of all pairs of classes as shades; the diagonal is left out, and so are shares of 0."""
    from matplotlib.colors import LinearSegmentedColormap

    side = len(labels) * max(11, min(24, 360 // len(labels))) / 96
    figure = _figure(side, side)
    ax = figure.add_axes((0, 0, 1, 1))  # what lies outside is saved too
    others = values[~torch.eye(len(labels), dtype=torch.bool)]
    low, high = (1e-9, max(0.01, float(others.max()))) if shares else (float(others.min()), float(others.max()))
    colors = LinearSegmentedColormap.from_list('shades', _SHADES).with_extremes(bad=(0.5, 0.5, 0.5, 0.3), under='none')
    pairs = values.clone().fill_diagonal_(math.nan).numpy()
    image = ax.imshow(pairs, colors, vmin=low, vmax=high, interpolation='none')
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(len(labels)), labels, fontsize=7.5, parse_math=False)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.tick_params('x', labelrotation=90)
    ax.grid(False)
    ax.spines[:].set(visible=True, color=LINE)
    scale = ax.inset_axes((0, -0.25 / side, 1.5 / side, 0.1 / side))
    ends = ['0 %', f'{100 * high:.0f} %'] if shares else [f'{low:.2f}', f'{high:.2f}']
    bar = figure.colorbar(image, scale, orientation='horizontal')
    bar.set_ticks([low, high], labels=ends)
    bar.outline.set_edgecolor(LINE)
    return svg(figure, title, bbox_inches='tight', pad_inches=0.1)


def draw_spectra(values: Tensor, sigma2: float) -> str:
    """Draw how the variances (C, r) of each direction are spread over the classes."""
    rank = values.shape[1]
    figure = _figure(5.2, 2.7, layout='constrained')
    ax = figure.subplots()
    colors: Dict[str, Any] = {f'{part}props': dict(color=BLUE) for part in ('whisker', 'cap', 'box')}
    colors['medianprops'] = dict(color=BLUE, linewidth=2)
    ax.boxplot(values.numpy(), whis=(0, 100), showfliers=False, patch_artist=True, manage_ticks=False, **colors)
    ax.axhline(sigma2, color=ORANGE, linestyle='--', label='s2')
    ax.set_yscale('log', subs=(2, 5))
    ax.yaxis.set_major_formatter('{x:g}')
    ax.yaxis.set_minor_formatter('{x:g}' if values.max() < 30 * sigma2 else '')
    ax.locator_params('x', integer=True)
    ax.set(xlim=(0.4, rank + 0.6), xlabel='direction', ylabel='variance')
    ax.legend()
    first, last = values.quantile(0.5, 0)[[0, -1]].tolist()
    title = f'Variance along the directions of the classes: median {first:.3g} for the first, {last:.3g} for the last'
    return svg(figure, f'{title} of {rank}; s2 is {sigma2:.3g}')


def draw_bars(values: Tensor, largest: float) -> str:
    """Draw the variances (r,) of one class, without axes."""
    from matplotlib.patches import StepPatch

    figure = _figure(0.07 * len(values), 0.25)
    heights = (values / largest).clamp(min=0.02).numpy()
    edges = torch.linspace(0, 1, len(values) + 1).numpy()
    figure.add_artist(StepPatch(heights, edges, transform=figure.transFigure, color=BLUE))
    return svg(figure, f'variances {" ".join(f"{value:.3g}" for value in values.tolist())}')


def draw_reliability(bins: Sequence[Bin]) -> str:
    """Draw accuracy and number of images by confidence, of bins with images."""
    middle, width = [50 * (each.low + each.high) for each in bins], 93 * (bins[0].high - bins[0].low)
    figure = _figure(4, 4.5, layout='constrained')
    ax, below = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    ax.bar(middle, [100 * each.accuracy for each in bins], width, color=BLUE, label='accuracy')
    ax.plot(middle, [100 * each.confidence for each in bins], 'o', color=ORANGE, mec=PAGE, label='mean confidence')
    ax.plot((0, 100), (0, 100), '--', color=ORANGE, label='perfect calibration')
    ax.set(xlim=(0, 100), ylim=(0, 102), ylabel='correct, %')
    ax.legend(loc='upper left')
    below.bar(middle, [each.count for each in bins], width, color=BLUE)
    below.locator_params('y', integer=True, nbins=2)
    below.yaxis.set_major_formatter('{x:,.0f}')
    below.set(xlabel='confidence, %', ylabel='images')
    title = 'Reliability diagram: accuracy by confidence, and below it the number of images by confidence'
    return svg(figure, f'{title}; the table has the values')
