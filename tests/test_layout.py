"""The package's layout: few entries at the top, imports that point one way, and a short way for a batch."""

import ast
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_zzz

PACKAGE = Path(timm_zzz.__file__).parent
# A module may import from its own layer and from those before it; the package itself and its command line from all.
LAYERS = [{'errors', 'ops'}, {'functional'}, {'head', 'metrics'}, {'scores'}, {'data', 'fit', 'optim'}, {'models'}]
LAYERS += [{'hub'}, {'cli'}, {'__init__', '__main__'}]
ENTRIES = {name for layer in LAYERS for name in layer}


def layer_of(entry):
    return next(i for i, layer in enumerate(LAYERS) if entry in layer)


def imports_of(path):
    """Entries of the package that a file imports, also where it runs a function."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*parts[: len(parts) - node.level], *(node.module or '').split('.')]
            target = [name for name in target if name]
            for name in target[:1] or [alias.name for alias in node.names]:
                yield name if name in ENTRIES else '__version__'
        elif isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (name.split('.')[1] for name in names if name.startswith('timm_zzz.'))


def test_at_most_fifteen_entries_at_the_top():
    entries = {p.stem for p in PACKAGE.iterdir() if p.suffix == '.py' or list(p.glob('*.py'))}
    assert entries == ENTRIES and len(entries | {'py.typed'}) <= 15


def test_imports_point_one_way():
    found = 0
    for path in sorted(PACKAGE.rglob('*.py')):
        own = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        for name in imports_of(path):
            found += 1
            if name != '__version__':
                assert layer_of(name) <= layer_of(own), f'{path.relative_to(PACKAGE)} imports {name}'
    assert found > 80


# Distributions by the name of their module, where the two differ
DISTRIBUTIONS = {'PIL': 'pillow', 'sklearn': 'scikit-learn', 'yaml': 'pyyaml'}


def modules_imported(node, top=True):
    """Modules of others that a source imports, each with whether it does so as soon as it is imported itself."""
    for child in ast.iter_child_nodes(node):
        names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
        if isinstance(child, ast.ImportFrom) and not child.level:
            names = [child.module]
        yield from ((name.partition('.')[0], top) for name in names)
        yield from modules_imported(child, top and not isinstance(child, (ast.FunctionDef, ast.Lambda)))


def test_every_import_is_declared(root):
    """In pyproject.toml: what functions import may be in an extra. Triton is looked for before it is imported."""
    tomllib = pytest.importorskip('tomllib', reason='Python 3.10 reads no TOML')
    project = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    always, extra = (
        {re.match(r'[\w-]+', requirement)[0] for requirement in requirements}
        for requirements in (project['dependencies'], sum(project['optional-dependencies'].values(), []))
    )
    found = set()
    for path in PACKAGE.rglob('*.py'):
        for module, top in modules_imported(ast.parse(path.read_text(encoding='utf-8'))):
            if module not in {*sys.stdlib_module_names, 'timm_zzz'}:
                name = DISTRIBUTIONS.get(module, module)
                found.add(name)
                kernels = {'triton'} if path.parent.name == 'ops' else set()
                declared = always | kernels if top else always | kernels | extra
                assert name in declared, f'{path.relative_to(PACKAGE)} imports {module}'
    assert always <= found


def files_of(function):
    """Files of the package in which Python functions run."""
    files = set()

    def note(frame, event, arg):
        if event == 'call' and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def test_the_way_of_a_batch():
    """CONTRIBUTING.md describes it; ops/tracing.py is asked what kind of tensors they are."""
    model = timm.create_model('test_vit.zzz_r4', num_classes=5)
    x = torch.randn(2, 3, 160, 160)
    way = {'head.py', 'ops/dispatch.py', 'ops/reference.py', 'ops/tracing.py'}
    assert files_of(lambda: model.train()(x)) == way
    assert files_of(lambda: model(x).sum().backward()) == way
    with torch.no_grad():
        # A new module, the fused form, also meets the hook that waits for models under construction.
        assert files_of(lambda: model.eval()(x)) == way | {'models/loading.py'}
        assert files_of(lambda: model(x)) == way
