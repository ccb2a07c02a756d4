"""Draw the figures of a report with matplotlib, as inline SVG in the colours of the page."""

import html
import io
import math
import re
from typing import Any, Dict, Mapping, Optional, Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..metrics import Bin

__all__ = [
    'MAX_COLORS',
    'STYLE',
    'draw_map',
    'draw_points',
    'draw_reliability',
    'draw_spectra',
    'draw_spread',
    'shorten',
]

MAX_COLORS = 20  # largest number of classes with a colour of their own and a name beside the map


def shorten(text: str, size: int = 24) -> str:
    """Drop the middle of a text longer than ``size``: class names mostly differ at the ends."""
    text = ' '.join(text.split())
    return text if len(text) <= size else f'{text[: size // 2]}…{text[-(size - 1) // 2 :]}'


# Sizes are in inches of 96 pixels. In the SVG, these colours are replaced by CSS variables of the page.

TEXT, PAGE, FAINT, LINE, BLUE, ORANGE = '#000000', '#ffffff', '#59636e', '#d1d9e0', '#0072b2', '#b45f00'
_VARIABLES = {TEXT: 'text', PAGE: 'page', FAINT: 'faint', LINE: 'line', BLUE: 'blue', ORANGE: 'orange'}
_SHADES = [(0.17, 0.55, 0.78, 0.1), (0.17, 0.55, 0.78, 1)]  # the same on light and dark pages
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
# Parts that are dropped from the SVG: XML header, metadata, the global style, repeated ids and fonts
_DROPPED = re.compile(
    r'^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"| xmlns(:xlink)?="[^"]*"'
    '|; font-family: [^;"]*',
    re.S,
)


def _figure(width: float, height: float, **kwargs: Any) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), **kwargs)


def svg(figure: Any, title: str, **kwargs: Any) -> str:
    """Return a figure as an SVG element for an HTML page, reproducibly."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({'svg.hashsalt': title}):  # ids are derived from it
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None}, **kwargs)
    text = re.sub(r'\n *', '\n', _DROPPED.sub('', file.getvalue()))
    for color, variable in _VARIABLES.items():
        text = text.replace(f': {color}', f': var(--{variable})')
    return text.replace('>', f' role="img"><title>{html.escape(title)}</title>', 1)


def draw_map(
    values: Tensor,
    labels: Sequence[str],
    title: str,
    pictures: Sequence[Optional[bytes]] = (),
    shares: bool = False,
) -> str:
    """Draw values (C, C) of all pairs of classes as shades, with pictures of the classes if they are given.

    The diagonal and, with ``shares``, values of 0 are left out.
    """
    from matplotlib.colors import LinearSegmentedColormap

    count = len(labels)
    cell = max(13, min(24, 360 // count))  # pixels
    side = count * cell / 96
    figure = _figure(side, side)
    ax = figure.add_axes((0, 0, 1, 1))  # bbox_inches keeps what lies outside
    others = values[~torch.eye(count, dtype=torch.bool)]
    low, high = (1e-9, max(0.01, float(others.max()))) if shares else (float(others.min()), float(others.max()))
    colors = LinearSegmentedColormap.from_list('shades', _SHADES).with_extremes(bad=(0.5, 0.5, 0.5, 0.3), under='none')
    pairs = values.clone().fill_diagonal_(math.nan).numpy()
    image = ax.imshow(pairs, colors, vmin=low, vmax=high, interpolation='none')
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(count), labels, fontsize=7.5, parse_math=False)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.tick_params('x', labelrotation=90)
    ax.grid(False)
    ax.spines[:].set(visible=True, color=LINE)
    if any(pictures):
        for down, extent in ((False, (-0.5, count - 0.5, -0.6, -1.5)), (True, (-1.5, -0.6, count - 0.5, -0.5))):
            strip = _strip(pictures, 3 * cell // 2, down)
            ax.imshow(strip, extent=extent, interpolation='none', clip_on=False)
        ax.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
        ax.tick_params(pad=3 + 0.75 * cell)
    scale = ax.inset_axes((0, -0.25 / side, min(1.0, 1.5 / side), 0.1 / side))
    ends = ['0 %', f'{100 * high:.0f} %'] if shares else [f'{low:.3f}', f'{high:.3f}']
    bar = figure.colorbar(image, scale, orientation='horizontal')
    bar.set_ticks([low, high], labels=ends)
    bar.outline.set_edgecolor(LINE)
    return svg(figure, title, bbox_inches='tight', pad_inches=0.1)


def _strip(pictures: Sequence[Optional[bytes]], size: int, down: bool) -> Any:
    """Join pictures to a strip of squares, to the right or down; a missing picture leaves a transparent square."""
    shape = (size * len(pictures), size)
    strip = Image.new('RGBA', shape[::-1] if down else shape)
    for i, picture in enumerate(pictures):
        if picture is not None:
            place = (i * size + 1, 1)
            with Image.open(io.BytesIO(picture)) as image:
                strip.paste(ImageOps.fit(image.convert('RGB'), (size - 2, size - 2)), place[::-1] if down else place)
    return strip


def draw_spectra(values: Tensor, sigma2: float) -> str:
    """Draw box plots of the variances (C, r) over classes, one for each direction."""
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


def draw_spread(deviations: Tensor, labels: Sequence[str]) -> str:
    """Draw standard deviations (C, 3): along a class's directions, those of the nearest class, all but its own."""
    figure = _figure(6.6, 0.9 + 0.24 * len(labels), layout='constrained')
    ax = figure.subplots()
    markers = {"the class's own directions": 'o', 'those of the nearest class': 'D', 'all but its own': '|'}
    for column, (label, marker), color in zip(deviations.T, markers.items(), (BLUE, ORANGE, FAINT), strict=True):
        ax.plot(column, range(len(labels)), marker, color=color, label=label, clip_on=False)
    ax.set_yticks(range(len(labels)), labels, parse_math=False)
    ax.grid(axis='both')
    ax.set(xlim=(0, None), ylim=(len(labels) - 0.5, -0.5), xlabel='standard deviation per direction')
    figure.legend(loc='outside upper left', ncols=3, handletextpad=0.2)
    return svg(figure, 'Standard deviation of the images of the widest classes, by direction')


def draw_points(points: Tensor, target: Tensor, correct: Tensor, means: Tensor, labels: Mapping[int, str]) -> str:
    """Draw points (N, 2) by class and the class means (C, 2), with ``labels`` of some classes in the margins."""
    from matplotlib import colormaps

    figure = _figure(9, 5)
    ax = figure.add_axes((0.21, 0.01, 0.58, 0.98))
    many = len(means) > MAX_COLORS
    palette = colormaps['tab10' if len(means) <= 10 else 'tab20'](range(len(means)))
    for right, marker in ((True, 'o'), (False, 'x')):
        xy, classes = points[correct == right], target[correct == right]
        colors = [_SHADES[1][:3] if right else (0.85, 0.45, 0.1)] if many else palette[classes.numpy()]
        ax.scatter(*xy.T, 14, colors, marker=marker, alpha=0.7, linewidths=0 if right else 1, rasterized=True)
    ax.scatter(*means.T, 16 if many else 60, 'gray' if many else palette, edgecolors='gray', rasterized=True)
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=LINE)
    by_x = sorted(labels, key=lambda c: float(means[c, 0]))
    for side, align, part in ((-0.02, 'right', by_x[: len(by_x) // 2]), (1.02, 'left', by_x[len(by_x) // 2 :])):
        line = dict(arrowstyle='-', color=FAINT, linewidth=0.6, relpos=(float(side < 0), 0.5), shrinkA=2, shrinkB=0)
        style: Any = dict(textcoords='axes fraction', ha=align, va='center', parse_math=False, arrowprops=line)
        for i, c in enumerate(sorted(part, key=lambda c: float(means[c, 1]))):
            ax.annotate(labels[c], means[c].tolist(), (side, (i + 0.5) / len(part)), **style)
    return svg(figure, 'Map of the embeddings in two dimensions', dpi=150)


def draw_reliability(bins: Sequence[Bin]) -> str:
    """Draw accuracy and number of images by confidence; ``bins`` are those with images."""
    middle, width = [50 * (each.low + each.high) for each in bins], 93 * (bins[0].high - bins[0].low)
    figure = _figure(4, 4.5, layout='constrained')
    ax, below = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    ax.bar(middle, [100 * each.accuracy for each in bins], width, color=BLUE, label='accuracy')
    ax.plot(middle, [100 * each.confidence for each in bins], 'o', color=ORANGE, mec=PAGE, label='mean confidence')
    ax.plot((0, 100), (0, 100), '--', color=ORANGE, label='perfect calibration')
    ax.set(xlim=(0, 100), ylim=(0, 102), ylabel='correct, %')
    figure.legend(loc='outside upper left')
    below.bar(middle, [each.count for each in bins], width, color=BLUE)
    below.locator_params('y', integer=True, nbins=2)
    below.yaxis.set_major_formatter('{x:,.0f}')
    below.set(xlabel='confidence, %', ylabel='images')
    title = 'Reliability diagram: accuracy by confidence, and below it the number of images by confidence'
    return svg(figure, f'{title}; the table has the values')
