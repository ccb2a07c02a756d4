"""timm's private names: each is used in one file of the package, and is still where that file looks for it."""

import ast
import json
import re
from collections import deque
from pathlib import Path

import timm
import torch
from timm.data import dataset_factory
from timm.models import DefaultCfg, PretrainedCfg, get_deprecated_models, model_entrypoint
from timm.optim import _optim_factory
from torch import nn

import timm_zzz
from timm_zzz import data, optim
from timm_zzz.models import _timm

PACKAGE = Path(timm_zzz.__file__).parent
# default_cfgs is public by its spelling, but in no documentation
HOMES = {
    '_model_args': 'models/_timm.py',
    '_model_entrypoints': 'models/_timm.py',
    '_optim_factory': 'optim.py',
    '_registry': 'models/_timm.py',
    'default_cfgs': 'models/_timm.py',
}


def timms_names():
    """Every private name in timm's sources, less what any module, tensor or optimizer of PyTorch has."""
    text = '\n'.join(path.read_text(encoding='utf-8') for path in Path(timm.__file__).parent.rglob('*.py'))
    objects = nn.Module(), torch.empty(0), torch.optim.Optimizer
    return {name for name in re.findall(r'\b_(?!_)\w+', text) if not any(hasattr(o, name) for o in objects)} | {*HOMES}


def own_names(tree):
    """Names that a source defines: functions, classes, variables, and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(getattr(node, 'ctx', None), ast.Store):
            yield ast.unparse(node).removeprefix('self.')


def uses(tree):
    """Names in a source that may be timm's: in its imports from timm, as attributes, and as strings (for getattr)."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            paths = [f'{getattr(node, "module", "")}.{alias.name}'.strip('.') for alias in node.names]
            yield from (part for path in paths if path.startswith('timm.') for part in path.split('.'))
        elif isinstance(node, ast.Attribute) and not re.match(r'(torch|nn|_timm)\.', ast.unparse(node)):
            yield node.attr
        elif isinstance(node, ast.Constant):
            yield node.value


def found_in(sources):
    """Each private name of timm that sources use, with the files that use it."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    timms = timms_names() - {name for tree in trees.values() for name in own_names(tree) if name not in HOMES}
    pairs = [(use, file) for file, tree in trees.items() for use in {*uses(tree)} & timms]
    return {name: [file for use, file in pairs if use == name] for name, _ in pairs}


def test_each_private_name_has_one_home():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text('utf-8') for path in PACKAGE.rglob('*.py')}
    assert found_in(sources) == {name: [home] for name, home in HOMES.items()}


def test_the_finder():
    for text in ('from timm.models import _hub', 'import timm.models._hub as hub', "getattr(timm.models, '_hub')"):
        assert found_in({'x.py': text, 'y.py': 'timm.models._hub'}) == {'_hub': ['x.py', 'y.py']}, text
    own = 'class A:\n    def f(self):\n        self._manipulate = 1\n'
    assert found_in({'own.py': own, 'other.py': 'a._manipulate\nnn.modules.batchnorm._BatchNorm\nm._buffers'}) == {}


def test_model_args(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    assert _timm.recorded_args(model) == {'num_classes': 3} and _timm.recorded_args(nn.Linear(1, 1)) is None
    _timm.record_args(model, {'zzz_rank': 2})
    if _timm.SAVES_ARGS:
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
        assert json.loads((tmp_path / 'config.json').read_text())['model_args']['zzz_rank'] == 2


def test_default_cfgs():
    for name in timm.list_models():
        cfg = _timm.default_cfgs(model_entrypoint(name)).get(name)
        assert isinstance(cfg, DefaultCfg) and isinstance(cfg.tags, deque), name
        assert isinstance(cfg.cfgs, dict) and set(cfg.tags) == set(cfg.cfgs), name
        assert all(isinstance(each, PretrainedCfg) for each in cfg.cfgs.values()), name
    assert _timm.default_cfgs(nn.Linear) == {}


def test_entrypoints():
    names = [*timm.list_models(), *get_deprecated_models()]
    assert all(_timm.entrypoints()[name] is model_entrypoint(name) for name in names)


def test_optimizer_registry_and_split_folders():
    assert optim.optimizer_registry() is _optim_factory.default_registry
    assert data.SPLIT_FOLDERS == (tuple(dataset_factory._TRAIN_SYNONYM), tuple(dataset_factory._EVAL_SYNONYM))
