"""The public names and their signatures are those of public_api.txt; ``python tests/docs/test_api.py`` writes it anew.

Signatures are read from the source, so that they do not depend on how a Python version prints types.
"""

import ast
import difflib
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Iterator, List

import timm_zzz
from timm_zzz.__main__ import COMMANDS
from timm_zzz.models.attach import HEAD_OPTIONS, OPTION_PREFIX
from timm_zzz.models.registry import RANKS

SNAPSHOT = Path(__file__).with_name('public_api.txt')
# Of the package itself first: what is named there is documented there
PUBLIC = ('functional', 'errors', 'head', 'optim', 'fit', 'scores', 'hub.cards')
MODULES = ('timm_zzz', *(f'timm_zzz.{name}' for name in PUBLIC))


def definition(obj: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def signature(node: Any) -> str:
    returns = f' -> {ast.unparse(node.returns)}' if node.returns is not None else ''
    return f'({ast.unparse(node.args)}){returns}'


def describe(name: str, obj: Any) -> Iterator[str]:
    if inspect.ismodule(obj):
        yield f'{name}: module'
    elif inspect.isclass(obj):
        node = definition(obj)
        yield f'{name}({", ".join(map(ast.unparse, node.bases))})'
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and (member.name == '__init__' or not member.name.startswith('_')):
                kinds = [ast.unparse(decorator) for decorator in member.decorator_list]
                kind = next((f'{kind} ' for kind in kinds if kind.endswith(('property', 'setter', 'method'))), '')
                yield f'{name}: {kind}{member.name}{signature(member)}'
            elif isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith('_'):
                yield f'{name}: {ast.unparse(member)}'
    elif inspect.isfunction(obj):
        yield f'{name}{signature(definition(obj))}'
    else:
        yield f'{name} = {obj!r}' if isinstance(obj, tuple) else f'{name}: {type(obj).__name__}'


def public_api() -> List[str]:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            full = f'{module_name}.{name}'
            obj = getattr(module, name)
            if module is timm_zzz or getattr(timm_zzz, name, None) is not obj:
                lines += describe(full, obj)
    lines += [f'python -m timm_zzz {command}' for command in COMMANDS]
    lines += [f'create_model name .{OPTION_PREFIX}r{rank}' for rank in RANKS]
    lines += [f'create_model argument {OPTION_PREFIX}{option}' for option in HEAD_OPTIONS]
    return sorted(lines)


def test_public_names_and_signatures_are_those_of_the_snapshot():
    difference = list(
        difflib.unified_diff(SNAPSHOT.read_text().splitlines(), public_api(), 'snapshot', 'now', n=0, lineterm='')
    )
    assert not difference, (
        'the public interface changed. If that is meant, run `python tests/docs/test_api.py` and say so in\n'
        'CHANGELOG.md:\n' + '\n'.join(difference)
    )


def test_public_names_have_docstrings_and_stand_in_the_reference(root):
    index = (root / 'docs/api/index.rst').read_text()
    documented = set(re.findall(r'^\.\. auto\w+:: (\S+)$', index, re.M))
    assert set(MODULES) <= documented
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            obj = getattr(module, name)
            if inspect.isclass(obj) or inspect.isfunction(obj):
                assert inspect.getdoc(obj), f'{module_name}.{name}'
    shown = {f'timm_zzz.{name}' for name in timm_zzz.__all__ if not name.startswith('__')}
    assert shown <= documented, sorted(shown - documented)


if __name__ == '__main__':
    SNAPSHOT.write_text('\n'.join(public_api()) + '\n')
    print(SNAPSHOT)
