"""timm's private names: one file of the package uses them, and they are still where it looks for them."""

import ast
import importlib
import inspect
import re
from collections import deque
from pathlib import Path

import pytest
import timm
import torch
from timm.models import DefaultCfg, PretrainedCfg, model_entrypoint
from torch import nn

import timm_zzz
from timm_zzz.models import _timm

PACKAGE = Path(timm_zzz.__file__).parent
TIMM = Path(timm.__file__).parent
HOME = '_timm.py'
PRIVATE = re.compile(r'_(?!_)\w+')
# Public by its spelling, but in no documentation
UNDOCUMENTED = {'default_cfgs'}
PYTORCH = re.compile(r'(torch|nn)\.')
ACCESSORS = {'getattr', 'hasattr', 'setattr', 'delattr'}


def timms_names():
    """Every private name in timm's sources, less what any module or tensor of PyTorch has."""
    found = set()
    for path in TIMM.rglob('*.py'):
        found.update(re.findall(r'\b_(?!_)\w+', path.read_text(encoding='utf-8')))
    return {n for n in found if not any(hasattr(o, n) for o in (nn.Module(), torch.empty(0), torch.optim.Optimizer))}


def own_names(trees):
    """Private names that the package defines: functions, classes, variables, and attributes of self."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == 'self':
                found.add(node.attr)
    return found


def uses(tree, timms):
    """Line and text of each use of a private name of timm: imports, attributes, and strings given to getattr & co."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split('.')[0] == 'timm' and re.search(r'\._', a.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or '').split('.')[0] == 'timm':
            dotted = [f'{node.module}.{a.name}' for a in node.names]
            names = [n for n in dotted if any(PRIVATE.fullmatch(part) for part in n.split('.'))]
        elif isinstance(node, ast.Attribute) and node.attr in timms and not PYTORCH.match(ast.unparse(node)):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ACCESSORS:
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            names = [ast.unparse(node) for value in constants if value in timms]
        for name in names:
            yield node.lineno, name


def found_in(sources):
    """Uses of timm's private names in sources by file name, as lines to read."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    timms = (timms_names() - own_names(trees.values())) | UNDOCUMENTED
    return [f'{name}:{line}: {use}' for name, tree in trees.items() for line, use in sorted(uses(tree, timms))]


def test_one_file_uses_private_names():
    sources = {str(p.relative_to(PACKAGE)): p.read_text(encoding='utf-8') for p in sorted(PACKAGE.rglob('*.py'))}
    assert len(sources) > 10 and HOME in sources
    elsewhere = [use for use in found_in(sources) if not use.startswith(f'{HOME}:')]
    assert not elsewhere, (
        f'private names of timm outside {HOME} (give it a function for what is needed, and this file a test that the '
        f'name exists):\n' + '\n'.join(elsewhere)
    )


@pytest.mark.parametrize(
    'text',
    [
        'from timm.models import _registry',
        'from timm.models._registry import is_model',
        'import timm.models._hub as hub',
        'import timm\ntimm.models._registry._model_entrypoints',
        'model._model_args',
        'model._model_args = {}',
        "getattr(model, '_model_args', None)",
        "hasattr(model, '_model_args')",
        "getattr(module, 'default_cfgs', {})",
        'module.default_cfgs',
    ],
)
def test_private_names_are_found(text):
    assert found_in({'x.py': text})


def test_other_names_are_not():
    own = 'import torch, timm\nclass A:\n    def f(self):\n        self._registry = 1\n\ndef g(a):\n    a._registry'
    other = 'torch._C._x\nnn.modules.batchnorm._BatchNorm\nt._version\nm._buffers\ntimm.models.resnet50'
    assert found_in({'own.py': own, 'other.py': other}) == []


def test_every_private_name_is_listed():
    """What _timm.py uses and this file checks below are the same names."""
    tree = ast.parse((PACKAGE / HOME).read_text(encoding='utf-8'))
    used = set()
    for _, use in uses(tree, timms_names() | UNDOCUMENTED):
        used.update(n for n in re.findall(r'\w+', use) if PRIVATE.fullmatch(n) or n in UNDOCUMENTED)
    assert used == {'_model_args', 'default_cfgs', '_optim_factory'}


def moved(what):
    return f'timm {timm.__version__} has moved or changed {what}: mend timm_zzz/{HOME} and docs/versions.md'


def test_model_args():
    model = timm.create_model('test_resnet', num_classes=3)
    where = moved("model._model_args, create_model's record of its arguments")
    assert isinstance(getattr(model, '_model_args', None), dict), where
    assert _timm.recorded_args(model) == {'num_classes': 3}, where
    _timm.record_args(model, {'zzz_rank': 2})
    assert _timm.recorded_args(model) == model._model_args == {'num_classes': 3, 'zzz_rank': 2}
    assert _timm.recorded_args(nn.Linear(1, 1)) is None
    kept = timm.create_model('test_resnet.zzz_r8', num_classes=3)._model_args
    assert kept.keys() >= {'num_classes', 'zzz_rank'}, where + ' (what the entrypoint put there is gone)'


def test_model_args_reach_config_json(tmp_path):
    import json

    model = timm.create_model('test_resnet', num_classes=3)
    _timm.record_args(model, {'zzz_rank': 2})
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    written = json.loads((tmp_path / 'config.json').read_text())
    assert written.get('model_args', {}).get('zzz_rank') == 2, moved('what save_for_hf writes of model._model_args')


def test_default_cfgs():
    for name in timm.list_models():
        cfg = _timm.default_cfgs(model_entrypoint(name)).get(name)
        assert isinstance(cfg, DefaultCfg), moved(f'default_cfgs in the module of {name}')
        assert isinstance(cfg.tags, deque) and isinstance(cfg.cfgs, dict), moved('DefaultCfg.tags or .cfgs')
        assert set(cfg.tags) == set(cfg.cfgs), moved('DefaultCfg: a configuration for each tag')
        assert all(isinstance(each, PretrainedCfg) for each in cfg.cfgs.values()), moved('DefaultCfg.cfgs')
    assert _timm.default_cfgs(nn.Linear) == {}


def test_optimizer_registry():
    try:
        registry = importlib.import_module('timm.optim._optim_factory').default_registry
    except (ImportError, AttributeError) as e:
        pytest.fail(f'{moved("timm.optim._optim_factory.default_registry")}: {e}')
    assert _timm.optimizer_registry() is registry
    assert inspect.ismethod(registry.register) and 'adamw' in registry.list_optimizers(), moved('OptimizerRegistry')


def test_split_folders_are_those_that_timm_takes_for_each_other():
    factory = importlib.import_module('timm.data.dataset_factory')
    assert _timm.SPLIT_FOLDERS == (tuple(factory._TRAIN_SYNONYM), tuple(factory._EVAL_SYNONYM))
