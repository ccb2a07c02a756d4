"""The options of timm's train.py: of the newest from ``train_options.yaml``, of any other from its source.

A script is read, never run: its calls that build a parser are found in the syntax tree and repeated with the arguments
that are plain values. Options that a script takes from another file are not seen.
"""

import argparse
import ast
import functools
import operator
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import yaml

__all__ = ['Option', 'TrainScript', 'newest', 'read_script']

_Statement = ast.Assign | ast.AnnAssign | ast.Expr
_TYPES: Dict[str, Callable[[str], Any]] = {'str': str, 'int': int, 'float': float}
# Of a call to add_argument: what says which values an option takes
_KEPT = ('action', 'choices', 'const', 'default', 'dest', 'nargs', 'type')
_OPERATORS: Dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Option(NamedTuple):
    """What a parser knows of one option.

    ``type`` is str, int, float, flag (true or false), mapping (``KEY=VALUE ...`` on the command line) or any (not told
    by the script's source).
    """

    type: str = 'str'
    default: Any = None
    nargs: Union[None, int, str] = None
    choices: Optional[List[Any]] = None
    const: Any = None
    other_names: List[str] = []  # on the command line, besides the key

    @property
    def is_list(self) -> bool:
        return self.type not in ('flag', 'mapping') and (self.nargs in ('+', '*') or isinstance(self.nargs, int))

    def is_like(self, other: 'Option') -> bool:
        """Whether values for one are values for the other."""
        return (self.type, self.is_list) == (other.type, other.is_list)

    def convert(self, value: Any) -> Any:
        """What argparse makes of a default: it passes text, and only text, to the option's type; raises ValueError."""
        return _TYPES[self.type](value) if isinstance(value, str) and self.type in _TYPES else value


class TrainScript(NamedTuple):
    """A train.py: its options by key, and whether it builds the model for ``img_size``."""

    options: Dict[str, Option]
    resizes_model: bool = False

    def dump(self) -> str:
        """As YAML, an option a line; :func:`newest` reads it back."""
        defaults = Option()._asdict()
        lines = [f'resizes_model: {str(self.resizes_model).lower()}', 'options:']
        for name, option in sorted(self.options.items()):
            fields = {key: value for key, value in option._asdict().items() if value != defaults[key] or key == 'type'}
            text = yaml.safe_dump(fields, default_flow_style=True, width=10**6, sort_keys=False).strip()
            lines.append(f'  {name}: {text}')
        return '\n'.join(lines) + '\n'


@functools.cache
def newest() -> TrainScript:
    """The facts kept in this package."""
    facts = yaml.safe_load(Path(__file__).with_name('train_options.yaml').read_text(encoding='utf-8'))
    return TrainScript({name: Option(**fields) for name, fields in facts['options'].items()}, facts['resizes_model'])


def read_script(path: Union[str, Path]) -> TrainScript:
    """Read the options of a train.py from its source, without running it.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is not Python, or builds no argparse parser.
    """
    source = Path(path).read_bytes()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as e:
        raise ValueError(f'not a Python script: {path}: {e}') from e
    reader = _Reader()
    statements = [node for node in ast.walk(tree) if isinstance(node, _Statement)]
    for node in sorted(statements, key=lambda node: (node.lineno, node.col_offset)):
        reader.read(node)
    parser = max(reader.parsers, key=lambda parser: len(parser._actions), default=None)
    if parser is None or not parser._actions:
        raise ValueError(f'no options found: {path} builds no argparse parser')
    options = {action.dest: _option(action) for action in parser._actions}
    return TrainScript(options, b'resolve_model_input_args' in source)


class _Mapping(argparse.Action):
    """Stands for timm's ``ParseKwargs``."""

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError


class _AnyAction(argparse.Action):
    """Stands for an action that the source doesn't tell."""

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError


def _any_type(text: str) -> str:
    """Stands for a type that the source doesn't tell."""
    return text


def _option(action: argparse.Action) -> Option:
    names = {name.lstrip('-').replace('-', '_') for name in action.option_strings} - {action.dest}
    kind = 'any'
    if isinstance(action, _Mapping):
        kind = 'mapping'
    elif isinstance(action, argparse._StoreAction):
        kind = getattr(action.type or str, '__name__', 'any')
    elif isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction | argparse._StoreFalseAction):
        return Option('flag', action.default, other_names=sorted(names))
    choices = None if action.choices is None else list(action.choices)
    const = action.const if action.nargs == '?' else None
    kind = kind if kind in (*_TYPES, 'mapping') else 'any'
    return Option(kind, action.default, action.nargs, choices, const, sorted(names))


class _Reader:
    """Repeats a script's calls that build parsers."""

    def __init__(self) -> None:
        self.names: Dict[str, Any] = {}  # variables that hold a parser or a group of one
        self.parsers: List[argparse.ArgumentParser] = []

    def read(self, node: _Statement) -> None:
        # A comma at the end of the line makes a tuple of a call.
        for value in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
            result = self._call(value)
            targets = [] if isinstance(node, ast.Expr) else getattr(node, 'targets', [getattr(node, 'target', None)])
            if result is not None:
                self.names.update({target.id: result for target in targets if isinstance(target, ast.Name)})

    def _call(self, node: Optional[ast.AST]) -> Any:
        """The parser or group that an expression stands for, None if it is something else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if not isinstance(node, ast.Call):
            return None
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', None)
        if name == 'ArgumentParser':
            # Where a script has two branches that add the same option, the later stands.
            self.parsers.append(argparse.ArgumentParser(add_help=False, conflict_handler='resolve'))
            return self.parsers[-1]
        owner = self._call(function.value) if isinstance(function, ast.Attribute) else None
        if owner is None:
            return None
        if name in ('add_argument_group', 'add_mutually_exclusive_group'):
            return getattr(owner, name)()
        if name == 'add_argument':
            _add_argument(owner, node)
        return None


def _add_argument(owner: Any, node: ast.Call) -> None:
    kwargs: Dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg == 'type':
            kwargs['type'] = _TYPES.get(getattr(keyword.value, 'id', ''), _any_type)
        elif keyword.arg == 'action' and not isinstance(keyword.value, ast.Constant):
            action = ast.unparse(keyword.value).rpartition('.')[2]
            known = {'ParseKwargs': _Mapping, 'BooleanOptionalAction': argparse.BooleanOptionalAction}
            kwargs['action'] = known.get(action, _AnyAction)
        elif keyword.arg in _KEPT:
            try:
                kwargs[keyword.arg] = _constant(keyword.value)
            except ValueError:
                pass  # argparse's own default, None
    try:
        owner.add_argument(*[_constant(arg) for arg in node.args], **kwargs)
    except (TypeError, ValueError):
        pass  # a name that is only known when the script runs, or an action with arguments of its own


def _constant(node: ast.AST) -> Any:
    """The value of an expression of constants, such as ``[3. / 4., 4. / 3.]``; raises ValueError for any other."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        values = _constant(node.left), _constant(node.right)
        if all(isinstance(value, int | float) for value in values) and not (
            isinstance(node.op, ast.Div) and not values[1]
        ):
            return _OPERATORS[type(node.op)](*values)
        raise ValueError('not arithmetic')
    if isinstance(node, ast.List):
        return [_constant(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_constant(element) for element in node.elts)
    return ast.literal_eval(node)
