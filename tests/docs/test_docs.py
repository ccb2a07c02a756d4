"""Check links, tests, files, commands and options that the pages name, and the examples of docstrings."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import itertools
import pkgutil
import re
from pathlib import Path

import pytest
import timm.optim  # noqa: F401  (an example's line after `import timm`)

import timm_zzz
from timm_zzz.__main__ import COMMANDS, run_command

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ('*.md', 'docs/**/*.md', 'benchmarks/*.md', 'hub_cards/README.md')
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))

_FENCE = re.compile(r'^```.*?^```$', re.M | re.S)
_CODE = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
_LINK = re.compile(r'!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*)\)|<(?:a|img)\s[^>]*?(?:href|src)="([^"]*)"')
_PATH = re.compile(r'(?<![\w/.$-])(?:\.ci|benchmarks|docs|hparams|hub_cards|tests|timm_zzz)/[\w./{},*-]*[\w*}/]')
_TEST = re.compile(r'(tests/[\w/]+\.py)((?:::\w+)+)')
_COMMAND = re.compile(r'-m (timm_zzz[.\w]*) +(\S+)([^\n`]*)')


def text_of(page):
    return (ROOT / page).read_text(encoding='utf-8')


def links(page):
    """Relative links of a page: the file from the root of the checkout, and the anchor."""
    paragraphs = _FENCE.sub('', text_of(page)).split('\n\n')
    for match in _LINK.findall('\n\n'.join(_CODE.sub('', paragraph) for paragraph in paragraphs)):
        file, _, anchor = ''.join(match).partition('#')
        if not re.match(r'[a-z]+:', file):
            path = (ROOT / page).parent / file if file else ROOT / page
            yield path.resolve().relative_to(ROOT).as_posix(), anchor


def anchors(page):
    """Anchors of the headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r'^#+ +(.+?) *#*$', _FENCE.sub('', text_of(page)), re.M):
        heading = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower().strip()).replace(' ', '-')
        found.add(
            next(s for s in itertools.chain([slug], (f'{slug}-{n}' for n in itertools.count(1))) if s not in found)
        )
    return found


def expanded(path):
    """Paths that ``tests/test_{head,hub}.py`` stands for."""
    before, brace, rest = path.partition('{')
    words, _, after = rest.partition('}')
    return [full for word in words.split(',') for full in expanded(before + word + after)] if brace else [path]


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    for path, anchor in links(page):
        assert (ROOT / path).exists(), path
        assert not anchor or path.endswith('.md') and anchor in anchors(path), f'{path}#{anchor}'


@pytest.mark.parametrize('page', PAGES)
def test_files_and_tests_that_are_named_exist(page):
    text = text_of(page)
    paths = [
        path for path in _PATH.findall(text) if not re.search(r'[A-Z]{3}', path.replace('README', ''))
    ]  # NAME.yaml
    missing = [path for name in paths for path in expanded(name) if not list(ROOT.glob(path.rstrip('/')))]
    for file, names in _TEST.findall(text):
        defined = re.findall(r'^ *(?:def|class) (\w+)', text_of(file), re.M) if (ROOT / file).is_file() else []
        missing += [f'{file}::{name}' for name in names.split('::')[1:] if name not in defined]
    assert not missing, missing


@pytest.fixture(scope='module')
def helps():
    """The help of each command."""
    found = {}
    for command in COMMANDS:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
            run_command(command, ['--help'])
        found[command] = out.getvalue()
    return found


@pytest.mark.parametrize('page', PAGES)
def test_commands_that_are_named_exist(page, helps):
    for module, command, rest in _COMMAND.findall(re.sub(r' *\\\n *', ' ', text_of(page))):
        command = command.strip('`).,:;')
        if module != 'timm_zzz':
            assert importlib.util.find_spec(module) is not None, module
        elif not (command.endswith('.py') or command.isupper() or command in ('--help', '--version')):
            assert command in helps, command
            for option in re.findall(r'(?<=\s)--?[a-z][\w-]*', re.split('#| && ', rest)[0]):
                assert re.search(rf'(?<![\w-]){option}(?![\w-])', helps[command]), f'{command} {option}'


def test_a_model_of_ones_own(run, tmp_path):
    """The script in docs/extending.md; in a process of its own, for it registers a model."""
    (snippet,) = re.findall(r'```python\n(.*?)```', text_of('docs/extending.md'), re.S)
    (tmp_path / 'stripe.py').write_text(snippet + 'assert model.get_classifier().rank == 4\n')
    run('stripe.py')


def examples():
    names = [info.name for info in pkgutil.walk_packages(timm_zzz.__path__, 'timm_zzz.')]
    modules = [importlib.import_module(name) for name in names if 'triton' not in name and '__main__' not in name]
    tests = [test for module in modules for test in doctest.DocTestFinder().find(module, module.__name__)]
    return [test for test in tests if test.examples]


@pytest.mark.parametrize('example', examples(), ids=lambda example: example.name)
def test_examples_of_docstrings(example, capsys):
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
