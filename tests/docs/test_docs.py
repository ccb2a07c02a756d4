"""What the pages promise: links, names of tests and files, commands and their options; and the docstrings' examples."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import itertools
import pkgutil
import re
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest
import timm.optim  # noqa: F401  (an example's line after `import timm`)

import timm_zzz
from timm_zzz.__main__ import _COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ('*.md', 'docs/*.md', 'benchmarks/*.md', 'hub_cards/README.md')
    for path in ROOT.glob(pattern)
)
# Names timm's tests by their files
OTHERS_TESTS = {'docs/timm_tests.md'}

_FENCE = re.compile(r'^```.*?^```$', re.M | re.S)
_CODE = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
_LINK = re.compile(r'!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*)\)')
_HTML_LINK = re.compile(r'<(?:a|img)\s[^>]*?(?:href|src)="([^"]*)"')
_PATH = re.compile(r'(?<![\w/.$-])(?:\.ci|benchmarks|docs|hparams|hub_cards|tests|timm_zzz)/[\w./{},*-]*[\w*}/]')
_TEST = re.compile(r'(tests/test_\w+\.py)((?:::\w+)+)')


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding='utf-8')


def links(page: str) -> List[str]:
    paragraphs = _FENCE.sub('', text_of(page)).split('\n\n')
    prose = '\n\n'.join(_CODE.sub('', paragraph) for paragraph in paragraphs)
    return _LINK.findall(prose) + _HTML_LINK.findall(prose)


def anchors(page: str) -> Set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: Set[str] = set()
    for heading in re.findall(r'^#+ +(.+?) *#*$', _FENCE.sub('', text_of(page)), re.M):
        heading = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower().strip()).replace(' ', '-')
        name = next(s for s in itertools.chain([slug], (f'{slug}-{n}' for n in itertools.count(1))) if s not in found)
        found.add(name)
    return found


def targets(page: str) -> Iterator[Tuple[str, str, str]]:
    """Relative links of a page: as written, the file from the root of the checkout, the anchor."""
    for link in links(page):
        if re.match(r'[a-z]+:', link):
            continue
        file, _, anchor = link.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        yield link, path.resolve().relative_to(ROOT).as_posix(), anchor


def expanded(path: str) -> Iterator[str]:
    """Paths that ``tests/test_{head,hub}.py`` stands for."""
    braces = re.search(r'\{([^{}]*)\}', path)
    if braces is None:
        yield path
        return
    for word in braces[1].split(','):
        yield from expanded(path[: braces.start()] + word + path[braces.end() :])


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    for link, path, anchor in targets(page):
        assert (ROOT / path).exists(), f'{page}: {link}'
        if anchor:
            assert path.endswith('.md') and anchor in anchors(path), f'{page}: {link}'


@pytest.mark.parametrize('page', PAGES)
def test_files_and_tests_that_are_named_exist(page):
    text = text_of(page)
    for match in _PATH.finditer(text):
        if re.search(r'[A-Z]{3}', match[0].replace('README', '')):  # a placeholder such as hparams/NAME.yaml
            continue
        for path in expanded(match[0]):
            assert list(ROOT.glob(path.rstrip('/'))), f'{page}: {match[0]}'
    for file, names in _TEST.findall(text):
        nodes = [
            node.name
            for node in ast.walk(ast.parse(text_of(file)))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        for name in names.split('::')[1:]:
            assert name in nodes, f'{page}: {file}::{name}'
    if page not in OTHERS_TESTS:
        for file in re.findall(r'(?<![\w/])(?<!--files )test_\w+\.py', text):  # of timm_suite/run.py, timm's own
            assert (ROOT / 'tests' / file).is_file(), f'{page}: {file}'


def test_every_page_is_reached_from_the_readme():
    """By a link, or by a page that the README links."""
    first = {path for _, path, _ in targets('README.md')}
    second = {path for page in first & set(PAGES) for _, path, _ in targets(page)}
    missing = {*PAGES, 'docs/api/index.rst'} - {'README.md'} - first - second
    assert not missing, sorted(missing)


@pytest.fixture(scope='module')
def options() -> Dict[str, str]:
    """The help of every command."""
    found = {}
    for name, command in _COMMANDS.items():
        out = io.StringIO()
        with pytest.raises(SystemExit), contextlib.redirect_stdout(out):
            command(['--help'])
        found[name] = out.getvalue()
    return found


@pytest.mark.parametrize('page', PAGES)
def test_commands_that_are_named_exist(page, options):
    text = re.sub(r' *\\\n *', ' ', text_of(page))
    for module, command, rest in re.findall(r'-m (timm_zzz[.\w]*) +(\S+)([^\n`]*)', text):
        if module != 'timm_zzz':
            assert importlib.util.find_spec(module) is not None, f'{page}: {module}'
            continue
        command = command.strip('`).,:;')
        if command.endswith('.py') or command.isupper() or command in ('--help', '--version'):
            continue
        assert command in _COMMANDS, f'{page}: python -m timm_zzz {command}'
        for option in re.findall(r'(?<=\s)--?[a-z][\w-]*', rest.partition('#')[0].partition(' && ')[0]):
            assert re.search(rf'(?<![\w-]){re.escape(option)}(?![\w-])', options[command]), (
                f'{page}: {command} {option}'
            )


def test_a_model_of_ones_own(run, tmp_path):
    """The script in docs/extending.md."""
    (snippet,) = re.findall(r'```python\n(.*?)```', text_of('docs/extending.md'), re.S)
    (tmp_path / 'stripe.py').write_text(snippet + 'assert model.get_classifier().rank == 4\n')
    run('stripe.py')


def modules() -> Iterator[str]:
    for info in pkgutil.walk_packages(timm_zzz.__path__, 'timm_zzz.'):
        if '.kernels' not in info.name and '__main__' not in info.name:  # of the kernels none has an example
            yield info.name


def examples() -> List[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for name in modules() for test in finder.find(importlib.import_module(name), name) if test.examples]


@pytest.mark.parametrize('example', examples(), ids=lambda example: example.name)
def test_examples_of_docstrings(example):
    out = io.StringIO()
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=out.write)
    assert not out.getvalue(), out.getvalue()
