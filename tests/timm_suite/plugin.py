"""Pytest plugin under which timm's own tests run on ``.zzz_r8`` names; run.py starts it.

Modes: ``bare`` is timm alone, ``plain`` is timm with timm_zzz imported, ``zzz`` also replaces every architecture that a
test asks timm for by its ``.zzz_r8`` twin. Test ids keep timm's names, so the modes compare test by test.
"""

import functools
import json
import random
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import pytest
import timm
import torch
from timm.models import _factory, _registry

MODES = ('bare', 'plain', 'zzz')
RANK = 8
TWIN = f'zzz_r{RANK}'
LEFT_OUT = 'left out: '
# A test over at least so many architectures is one of timm's sweeps, to which --zzz-sample applies
SWEEP = 100


class LeftOut(NamedTuple):
    pattern: str  # fnmatch pattern of test ids
    modes: Tuple[str, ...]
    reason: str


LEFT_OUT_TESTS: List[LeftOut] = [
    LeftOut(
        'test_models.py::test_model_inference*',
        MODES,
        'downloads weights from the Hugging Face Hub, and compares with the logits that their linear head gave',
    ),
    LeftOut('test_models.py::test_model_load_pretrained*', MODES, 'downloads weights from the Hugging Face Hub'),
    LeftOut('test_models.py::test_model_features_pretrained*', MODES, 'downloads weights from the Hugging Face Hub'),
    LeftOut(
        'test_checkpoint_loading.py::test_train_pretrained_cfg_overlay*',
        MODES,
        "imports train.py, which timm's source distribution doesn't have",
    ),
    LeftOut(
        'test_optim.py::*zzzadamw*',
        ('plain', 'zzz'),
        "timm's test runs every optimiser it lists on a bare parameter; zzzadamw refuses what has no ZZZ head",
    ),
    LeftOut(
        'test_models.py::test_convit_dtype_change_after_forward',
        ('zzz',),
        'expects bfloat16 logits of a bfloat16 model; those of a ZZZ head are float32',
    ),
]

# A helper of timm's tests whose last check is left out in mode zzz; the rest of the tests that call it is not
DTYPE_CHECK = '_assert_dtype_change_after_forward'
DTYPE_REASON = 'the check for bfloat16 logits of a bfloat16 model alone; those of a ZZZ head are float32'


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup('timm_zzz')
    group.addoption('--zzz-mode', choices=MODES, default='zzz')
    group.addoption('--zzz-results', type=Path, help='file for one line of JSON per test')
    group.addoption('--zzz-sample', type=int, help='architectures to draw for the tests that sweep over all')
    group.addoption('--zzz-seed', type=int, default=0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'timeout: of pytest-timeout, not needed here')
    mode = config.getoption('--zzz-mode')
    if mode != 'bare':
        import timm_zzz  # noqa: F401
    if mode == 'zzz':
        import timm.task  # noqa: F401  # has its own reference to create_model

        _replace_everywhere(_factory.create_model, _create_twin)
        _replace_everywhere(_factory.resolve_model_input_args, _resolve_twin)
        _replace_everywhere(_registry.get_pretrained_cfg_value, _twin_cfg_value)
    config.pluginmanager.register(_Results(config), 'zzz-results')


def _replace_everywhere(original: Callable, wrap: Callable) -> None:
    """Replace a function of timm in each of its modules; the tests import it from there afterwards."""
    replacement = functools.wraps(original)(functools.partial(wrap, original))
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] == 'timm':
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, replacement)


def twin(model_name: str) -> str:
    """The ``.zzz_r8`` name of an architecture with or without a tag; other names as they are."""
    architecture, _, tag = model_name.partition('.')
    if ':' in model_name or not timm.is_model(architecture) or _is_twin(tag):
        return model_name
    return f'{model_name}.{TWIN}'


def _is_twin(tag: Optional[str]) -> bool:
    return bool(tag) and tag.rpartition('.')[2].startswith('zzz_r')


def _twin_kwargs(model_name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """timm ignores the tag of a name where it also gets a configuration: then the head's option asks for the head."""
    cfg = kwargs.get('pretrained_cfg')
    if twin(model_name) == model_name or not cfg:
        return kwargs
    if isinstance(cfg, str):
        return dict(kwargs, pretrained_cfg=cfg if _is_twin(cfg) else f'{cfg}.{TWIN}')
    tag = cfg.get('tag') if isinstance(cfg, dict) else cfg.tag
    return kwargs if _is_twin(tag) else dict(kwargs, zzz_rank=RANK)


def _create_twin(create_model: Callable, model_name: str, pretrained: bool = False, *args: Any, **kwargs: Any) -> Any:
    width = kwargs.get('embed_dim')
    if isinstance(width, int) and width < RANK:  # the rank can't exceed the width
        kwargs['zzz_rank'] = width
    head = {} if twin(model_name) == model_name else dict(zzz_init='reference')  # with classes that differ
    try:
        model = create_model(twin(model_name), pretrained, *args, **{**head, **_twin_kwargs(model_name, kwargs)})
    except ValueError:
        if twin(model_name) != model_name and not _has_classifier(
            create_model(model_name, pretrained, *args, **kwargs)
        ):
            pytest.skip(f'{LEFT_OUT}{model_name} has no classifier')
        raise
    if hasattr(model, 'zzz_options'):
        _Results.heads += 1
    elif ':' not in model_name and not kwargs.get('features_only'):
        pytest.fail(f'{twin(model_name)} was built without a ZZZ head')
    return model


def _has_classifier(model: torch.nn.Module) -> bool:
    try:
        return model.get_classifier() is not None  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False


def _resolve_twin(resolve: Callable, model_name: str, args: Any = None, **kwargs: Any) -> Any:
    return resolve(twin(model_name), args, **_twin_kwargs(model_name, kwargs))


def _twin_cfg_value(get_value: Callable, model_name: str, cfg_key: str) -> Any:
    return get_value(twin(model_name), cfg_key)


def _strip_folder(nodeid: str) -> str:
    path, sep, test = nodeid.partition('::')
    return path.rpartition('/')[2] + sep + test


def _allow_float32(check: Callable, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    try:
        check(model, *args, **kwargs)
    except AssertionError as e:
        if not str(e).startswith('output dtype torch.float32 != torch.bfloat16') or not hasattr(model, 'zzz_options'):
            raise
        _Results.unchecked = DTYPE_REASON
        model.to(torch.float32)  # as the helper does at its end


class _Results:
    """Selects the tests and writes what became of them."""

    heads = 0  # models with a ZZZ head that the running test has created
    unchecked = ''  # why a check of the running test was left out

    def __init__(self, config: pytest.Config) -> None:
        self.mode = config.getoption('--zzz-mode')
        self.path: Optional[Path] = config.getoption('--zzz-results')
        self.sample: Optional[int] = config.getoption('--zzz-sample')
        self.seed: int = config.getoption('--zzz-seed')
        self.record: Dict[str, Any] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: List[pytest.Item]) -> None:
        architectures = timm.list_models()
        if self.sample is not None and self.sample < len(architectures):
            architectures = random.Random(self.seed).sample(architectures, self.sample)
        drawn = set(architectures)
        tests = Counter(item.originalname for item in items if isinstance(item, pytest.Function))
        kept, dropped = [], []
        for item in items:
            name = str(item.callspec.params.get('model_name', '')) if hasattr(item, 'callspec') else ''
            architecture, _, tag = name.partition('.')
            # timm lists this package's tags too where it lists tags: mode zzz tests those
            swept = tests[getattr(item, 'originalname', '')] >= SWEEP and architecture and architecture not in drawn
            (dropped if swept or _is_twin(tag) else kept).append(item)
        if dropped:
            config.hook.pytest_deselected(items=dropped)
        items[:] = kept
        if self.mode == 'zzz':
            for module in {item.module for item in items if isinstance(item, pytest.Function)}:
                if hasattr(module, DTYPE_CHECK):
                    setattr(module, DTYPE_CHECK, functools.partial(_allow_float32, getattr(module, DTYPE_CHECK)))
        for item in items:
            for pattern, modes, reason in LEFT_OUT_TESTS:
                if self.mode in modes and fnmatch(_strip_folder(item.nodeid), pattern):
                    item.add_marker(pytest.mark.skip(reason=LEFT_OUT + reason))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        torch.manual_seed(0)
        _Results.heads = 0
        _Results.unchecked = ''

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == 'setup':
            self.record = dict(test=_strip_folder(report.nodeid), outcome='passed', seconds=0.0, why='')
        record = self.record
        record['seconds'] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, 'reprcrash', None)
            where = f'{Path(crash.path).name}:{crash.lineno}: {crash.message}' if crash else str(report.longrepr)
            record.update(outcome='failed', why=where)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ''
            reason = reason.removeprefix('Skipped: ')
            left_out = reason.startswith(LEFT_OUT)
            record.update(outcome='left out' if left_out else 'skipped', why=reason.removeprefix(LEFT_OUT))
        if report.when == 'teardown' and self.path:
            record.update(heads=_Results.heads, unchecked=_Results.unchecked)
            with self.path.open('a') as f:
                f.write(json.dumps(record) + '\n')

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.path:
            record = dict(
                test=report.nodeid, outcome='failed', seconds=0.0, why=str(report.longrepr), heads=0, unchecked=''
            )
            with self.path.open('a') as f:
                f.write(json.dumps(record) + '\n')
