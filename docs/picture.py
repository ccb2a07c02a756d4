"""``python docs/picture.py [OUT.svg]`` draws zzz.svg, the README's picture, with the standard library alone.

Two classes with subspaces of rank 1 on a piece of the unit sphere that is small enough to be flat, and the boundary
between them: by the means alone, which is what a head of rank 0 has, and by the whole Gaussians. All is to scale.
"""

import math
import random
import sys
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence, Tuple

Point = Tuple[float, float]


class Gaussian(NamedTuple):
    """Mean, angle of the basis vector in degrees, variance along it, isotropic variance."""

    x: float
    y: float
    angle: float
    v: float
    sigma2: float

    @property
    def u(self) -> Point:
        return math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))

    @property
    def tip(self) -> Point:
        """One standard deviation from the mean along the basis vector."""
        length = math.sqrt(self.v + self.sigma2)
        return self.x + length * self.u[0], self.y + length * self.u[1]

    def polynomial(self, y: float) -> Tuple[float, float, float]:
        """(c2, c1, c0): on the line of height y the log-density is c2 x^2 + c1 x + c0, and what both classes share."""
        (ux, uy), a, dy = self.u, 1 / self.sigma2, y - self.y
        rho = a * a * self.v / (1 + a * self.v)
        # In dx = x - self.x: -a/2 (dx^2 + dy^2) + rho/2 (ux dx + uy dy)^2 - 1/2 log(1 + a v)
        p2, p1 = -a / 2 + rho / 2 * ux * ux, rho * ux * uy * dy
        p0 = -a / 2 * dy * dy + rho / 2 * (uy * dy) ** 2 - math.log1p(a * self.v) / 2
        return p2, p1 - 2 * p2 * self.x, p0 - p1 * self.x + p2 * self.x**2

    def logit(self, x: float, y: float) -> float:
        c2, c1, c0 = self.polynomial(y)
        return c2 * x * x + c1 * x + c0

    def sample(self, count: int, rng: random.Random) -> Iterator[Point]:
        ux, uy = self.u
        for _ in range(count):
            t, s = rng.gauss(0, math.sqrt(self.v + self.sigma2)), rng.gauss(0, math.sqrt(self.sigma2))
            yield self.x + t * ux - s * uy, self.y + t * uy + s * ux


V, SIGMA2 = 0.42, 0.04
CLASSES = Gaussian(-0.42, 0.3, 22, V, SIGMA2), Gaussian(0.42, -0.3, 48, V, SIGMA2)
# Without subspaces: the same means, and a sigma2 that keeps the whole variance
MEANS_ALONE = tuple(g._replace(v=0.0, sigma2=SIGMA2 + V / 2) for g in CLASSES)

NAMES = ('blue', 'orange')
SCALE = 108  # pixels per unit
WIDTH, HEIGHT, TOP = 406, 318, 50  # of a panel
LEFTS = (16, 438)
NO_BREAK = '&#160;'  # unlike a space it stays at the end of a tspan
STYLE = """
text { font: 15px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
text.title { font-size: 17px; font-weight: 600 }
text.label { font-size: 19px; stroke: #fff; stroke-width: 4px; paint-order: stroke; stroke-linejoin: round }
.i, .s { font-family: Cambria, Georgia, "Times New Roman", "DejaVu Serif", serif }
.i { font-style: italic } .s { font-size: 75% }
.blue { color: #0072b2 } .orange { color: #c65102 }
.page { fill: #fff } .frame { fill: none; stroke: #d0d7de }
.region { fill: currentColor; fill-opacity: .13 }
.boundary { fill: none; stroke: #1f2328; stroke-width: 2.2 }
.point { fill: currentColor } .wrong { fill: #fff; stroke: currentColor; stroke-width: 2 }
.mean { fill: currentColor; stroke: #fff; stroke-width: 2 }
.ellipse { fill: none; stroke: currentColor; stroke-width: 1.3; stroke-opacity: .75 }
.axis { stroke: currentColor; stroke-width: 1.3; stroke-dasharray: 5 4 }
.arrow { stroke: currentColor; stroke-width: 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } text.label { stroke: #0d1117 }
  .blue { color: #58b4f0 } .orange { color: #f0a04b }
  .page, .wrong { fill: #0d1117 } .mean { stroke: #0d1117 } .frame { stroke: #3d444d } .boundary { stroke: #e6edf3 }
}
"""
TITLE = (
    'Two classes whose examples vary along different directions. By the means alone the boundary is straight and many '
    'examples lie on its wrong side; with a basis vector for each class it bends between them.'
)


def between(first: Gaussian, second: Gaussian, y: float) -> Point:
    """From where to where on the line of height y the second class has the larger log-density."""
    c2, c1, c0 = (q - p for p, q in zip(first.polynomial(y), second.polynomial(y), strict=True))
    if abs(c2) < 1e-9:  # a straight boundary
        return -c0 / c1, math.inf
    root = math.sqrt(c1 * c1 - 4 * c2 * c0)
    return (-c1 + root) / (2 * c2), (-c1 - root) / (2 * c2)


def outline(first: Gaussian, second: Gaussian) -> List[Point]:
    """The edge of the second class's region, which goes on beyond the panel."""
    rows = [i / 40 for i in range(-64, 65)]
    edges = [between(first, second, y) for y in rows]
    left = [(max(start, -3.0), y) for (start, _), y in zip(edges, rows, strict=True)]
    right = [(min(stop, 3.0), y) for (_, stop), y in zip(edges, rows, strict=True)]
    return left + right[::-1]


def pixel(point: Point) -> Tuple[float, float]:
    return round(WIDTH / 2 + SCALE * point[0], 1), round(HEIGHT / 2 - SCALE * point[1], 1)


def text(x: float, y: float, content: str, style: str = '') -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" class="{style}">{content}</text>'


def circle(point: Point, radius: float, style: str) -> str:
    x, y = pixel(point)
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{style}"/>'


def ellipse(g: Gaussian, deviations: int, style: str) -> str:
    x, y = pixel((g.x, g.y))
    along, across = (SCALE * deviations * math.sqrt(v) for v in (g.v + g.sigma2, g.sigma2))
    return (
        f'<ellipse rx="{along:.1f}" ry="{across:.1f}" class="ellipse {style}" '
        f'transform="translate({x:g} {y:g}) rotate({-g.angle:g})"/>'
    )


def runs(*parts: str) -> str:
    """Text with ``_`` before a subscript, ``^`` before a superscript and ``*`` before what is set in italics."""
    spans, level = [], 0
    for part in parts:
        kind, content = (part[0], part[1:]) if part[0] in '_^*' else ('', part)
        style = {'_': ' class="s"', '^': ' class="s"', '*': ' class="i"'}.get(kind, '')
        new_level = {'_': 4, '^': -6}.get(kind, 0)
        shift = f' dy="{new_level - level}"' if new_level != level else ''
        back = ' dx="-5"' if kind == '^' and level > 0 else ''  # above the subscript
        spans.append(f'<tspan{style}{back}{shift}>{content.replace(" ", NO_BREAK)}</tspan>')
        level = new_level
    return ''.join(spans)


def regions(first: Gaussian, second: Gaussian) -> List[str]:
    path = 'M' + 'L'.join(f'{x:g},{y:g}' for x, y in map(pixel, outline(first, second))) + 'Z'
    return [
        f'<rect width="{WIDTH}" height="{HEIGHT}" class="region {NAMES[0]}"/>',
        f'<path d="{path}" class="page"/>',
        f'<path d="{path}" class="region {NAMES[1]}"/>',
        f'<path d="{path}" class="boundary"/>',
    ]


def mean_and_subspace(g: Gaussian, name: str, index: str, label: Point) -> List[str]:
    parts = []
    x, y = pixel((g.x, g.y))
    if g.v:
        length = SCALE * math.sqrt(g.v + g.sigma2)
        parts.append(
            f'<g transform="translate({x:g} {y:g}) rotate({-g.angle:g})" class="{name}">'
            f'<path d="M{-2.3 * length:.1f},0H{2.3 * length:.1f}" class="axis"/>'
            f'<path d="M0,0H{length - 8:.1f}" class="arrow"/><path d="M{length:.1f},0l-11,-5v10z" class="point"/></g>'
        )
        tip = pixel(g.tip)
        parts.append(text(tip[0] + label[0], tip[1] + label[1], runs('*u', '_' + index), 'label'))
    return [*parts, circle((g.x, g.y), 6, f'mean {name}'), text(x - 12, y + 21, runs('*&#956;', '_' + index), 'label')]


def panel(classes: Sequence[Gaussian], points: Sequence[Sequence[Point]]) -> Tuple[List[str], int]:
    """The elements of one panel, and how many points lie on the wrong side of the boundary."""
    parts, wrong = regions(*classes), 0
    for name, own, other, members in zip(NAMES, classes, classes[::-1], points, strict=True):
        parts += [ellipse(own, 1, name), ellipse(own, 2, name)]
        for point in members:
            right = own.logit(*point) > other.logit(*point)
            parts.append(circle(point, 3, f'point {name}') if right else circle(point, 4, f'wrong {name}'))
            wrong += not right
    for name, g, index, label in zip(NAMES, classes, '12', ((2, -12), (14, 13)), strict=True):
        parts += mean_and_subspace(g, name, index, label)
    return parts, wrong


def draw() -> str:
    rng = random.Random(4)
    points = [list(g.sample(60, rng)) for g in CLASSES]
    width, height = LEFTS[1] + WIDTH + 16, TOP + HEIGHT + 74
    isotropic = ('*&#963;', '^2', '* I')
    low_rank = ('*U', '_c', ' diag(', '*v', '_c', ') ', '*U', '_c', '^T', ' + ', *isotropic)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="t">\n<title id="t">{TITLE}</title>\n<style>{STYLE}</style>',
        f'<clipPath id="c"><rect width="{WIDTH}" height="{HEIGHT}" rx="6"/></clipPath>',
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" class="page"/>',
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" class="frame"/>',
    ]
    for left, title, covariance, classes in (
        (LEFTS[0], 'Means alone: cosine classifier', isotropic, MEANS_ALONE),
        (LEFTS[1], 'Means and subspaces: ZZZ', low_rank, CLASSES),
    ):
        elements, wrong = panel(classes, points)
        parts += [f'<g transform="translate({left} {TOP})"><g clip-path="url(#c)">', *elements, '</g>']
        parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" class="frame"/></g>')
        middle, bottom = left + WIDTH / 2, TOP + HEIGHT
        parts.append(text(middle, 33, title, 'title'))
        parts.append(text(middle, bottom + 30, runs('*&#931;', '_c', ' = ', *covariance)))
        parts.append(text(middle, bottom + 57, f'{wrong} of {sum(map(len, points))} on the wrong side (hollow)'))
    return '\n'.join([*parts, '</svg>', ''])


if __name__ == '__main__':
    out = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name('zzz.svg')
    out.write_text(draw(), encoding='utf-8')
