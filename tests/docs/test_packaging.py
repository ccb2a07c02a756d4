"""The wheel and the sdist: their contents, their metadata, and that they work where they are unpacked.

PyTorch is several GB, so they are unpacked into folders in front of this environment instead of an empty one; that
``pip install .`` fills an empty one is the first step of .ci/run. Builds take hatchling from this environment, since an
isolated one would download it.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import timm_zzz

pytestmark = pytest.mark.slow

DATA = ('timm_zzz/py.typed', 'timm_zzz/cli/report.html.jinja', 'timm_zzz/cli/train_options.yaml')


@pytest.fixture(scope='module')
def dist(root, tmp_path_factory):
    """Folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp('dist')
    command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, root]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f'needs pip install ".[dev]"\n{result.stdout[-2000:]}{result.stderr[-2000:]}'
    return folder


@pytest.fixture(scope='module')
def wheel(dist):
    (file,) = dist.glob('*.whl')
    return file


@pytest.fixture(scope='module')
def sdist(dist, tmp_path_factory):
    """The unpacked sdist."""
    (file,) = dist.glob('*.tar.gz')
    folder = tmp_path_factory.mktemp('sdist')
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter='data')
    (root,) = folder.iterdir()
    return root


def files(folder: Path):
    """List the files of a folder that are no caches."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def test_twine_check(dist, run):
    run('-m', 'twine', 'check', '--strict', *sorted(dist.iterdir()))


def test_version_is_in_one_place(root, dist, wheel):
    version = timm_zzz.__version__
    assert {file.name for file in dist.iterdir()} == {
        f'timm_zzz-{version}.tar.gz',
        f'timm_zzz-{version}-py3-none-any.whl',
    }
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f'timm_zzz-{version}.dist-info/METADATA').decode()
    assert f'\nVersion: {version}\n' in metadata
    homes = ['timm_zzz', 'tests', 'docs', 'benchmarks', 'pyproject.toml', 'setup.cfg', 'README.md', 'CONTRIBUTING.md']
    paths = [
        path for home in homes for path in ([root / home] if (root / home).is_file() else (root / home).rglob('*'))
    ]
    text = ('.py', '.md', '.toml', '.cfg', '.rst')
    literal = re.compile(rf'(?<![\w.]){re.escape(version)}(?![\w.])')
    found = [path for path in paths if path.suffix in text and literal.search(path.read_text(encoding='utf-8'))]
    assert found == [root / 'timm_zzz' / '__init__.py']


def test_contents_of_the_wheel(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        licences = [name for name in archive.namelist() if name.endswith('.dist-info/licenses/LICENSE')]
    expected = {f'timm_zzz/{name}' for name in files(root / 'timm_zzz')}
    for folder in ('hparams', 'hub_cards'):
        expected |= {f'timm_zzz/{folder}/{name}' for name in files(root / folder)}
    assert names == expected and len(licences) == 1
    assert names.issuperset(DATA) and not [name for name in names if 'test' in name]


def test_contents_of_the_sdist(root, sdist):
    names = files(sdist)
    for folder in ('timm_zzz', 'hparams', 'hub_cards', 'tests', 'benchmarks', 'docs'):
        assert {name for name in names if name.startswith(f'{folder}/')} == {
            f'{folder}/{name}' for name in files(root / folder)
        }
    others = {'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'LICENSE', 'pyproject.toml', 'setup.cfg', '.ci/run'}
    assert others <= names
    assert {name for name in names if '/' not in name} <= others | {'PKG-INFO', '.gitignore'}


def in_front(folder):
    """Environment variables that put a folder before what is installed, and before the guard of conftest.py."""
    return {'PYTHONPATH': os.pathsep.join([str(folder), os.environ['PYTHONPATH']])}


def test_wheel_works_where_it_is_installed(wheel, tmp_path, run):
    target = tmp_path / 'target'
    run('-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', target, wheel)
    program = """
import importlib.metadata, timm, timm_zzz
timm.create_model('test_vit.zzz_r4', num_classes=2)
print(timm_zzz.__file__, importlib.metadata.version('timm_zzz'), timm_zzz.__version__)
"""
    file, *versions = run('-c', program, env=in_front(target)).stdout.split()
    assert Path(file).is_relative_to(target) and set(versions) == {timm_zzz.__version__}
    recipe = ('hparams', 'quickstart_mobilenetv2_100.zzz_r8')
    path = run('-m', 'timm_zzz', *recipe, env=in_front(target)).stdout.strip()
    assert Path(path).is_relative_to(target)


def collected(run, folder, **kwargs):
    out = run('-m', 'pytest', '-q', '--collect-only', '-m', 'slow or not slow', folder / 'tests', **kwargs).stdout
    return sorted(line.rpartition('tests/')[2] for line in out.splitlines() if '::' in line)


def test_sdist_has_all_tests_and_passes_some(root, sdist, run):
    """Those run that look at most files, and some of the mathematics; with the sdist's own package."""
    env = in_front(sdist)
    assert run('-c', 'import timm_zzz; print(timm_zzz.__file__)', env=env).stdout.startswith(str(sdist))
    tests = collected(run, sdist, env=env)
    assert len(tests) > 1000 and tests == collected(run, root)
    fast = [
        sdist / 'tests' / f'{name}.py' for name in ('docs/test_api', 'docs/test_docs', 'hub/test_cards', 'test_head')
    ]
    summary = run('-m', 'pytest', '-q', '-p', 'no:cacheprovider', *fast, env=env).stdout.splitlines()[-1]
    assert ' passed' in summary and 'failed' not in summary, summary
