"""Read recipes for timm's train.py: keys, values as argparse converts them, and their lines in the YAML file."""

import argparse
import ast
import math
import os
import re
import runpy
import sys
import textwrap
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Set, Tuple, Union

import yaml
from timm.utils import ParseKwargs

from ..errors import nearest

__all__ = [
    'FACTS',
    'NEWEST',
    'Finding',
    'Option',
    'Recipe',
    'TrainParser',
    'TrainScript',
    'ask_script',
    'reason',
    'shorten',
]

_TYPES: Dict[str, type] = {'str': str, 'int': int, 'float': float}
_PAIRS = ('scale', 'ratio', 'cutmix_minmax')


class Option(NamedTuple):
    """An option of train.py; type is str, int, float, flag, mapping (``KEY=VALUE ...``) or any (one of the script)."""

    type: str = 'str'
    default: Any = None
    nargs: Union[None, int, str] = None
    choices: Optional[List[Any]] = None
    const: Any = None
    other_names: List[str] = []  # further names on the command line

    @property
    def is_list(self) -> bool:
        return self.type not in ('flag', 'mapping') and (self.nargs in ('+', '*') or isinstance(self.nargs, int))

    def convert(self, value: Any) -> Any:
        """Convert text, and only text, to the option's type, as argparse does with defaults; may raise a ValueError."""
        return _TYPES[self.type](value) if isinstance(value, str) and self.type in _TYPES else value


class Range(NamedTuple):
    """The range of numbers that are valid for an option."""

    low: float
    high: float
    without_low: bool = False
    without_high: bool = False

    @classmethod
    def parse(cls, text: str) -> 'Range':
        """Parse an interval in mathematical notation, such as '[0, 1)'."""
        low, high = map(float, text[1:-1].split(','))
        return cls(low, high, text[0] == '(', text[-1] == ')')

    def has(self, x: float) -> bool:
        above = x > self.low if self.without_low else x >= self.low
        return above and (x < self.high if self.without_high else x <= self.high)

    def __str__(self) -> str:
        low = f'{"above" if self.without_low else "at least"} {self.low:g}'
        if math.isinf(self.high):
            return low
        kind = '' if self.high != 1 else 'a fraction ' if self.without_low else 'a fraction of '
        return f'{kind}{low}, {"below" if self.without_high else "at most"} {self.high:.10g},'


class TrainScript(NamedTuple):
    """The options of a train.py by key, and whether it builds the model for ``img_size``."""

    options: Dict[str, Option]
    resizes_model: bool = False

    def dump(self) -> str:
        """Return YAML, without fields that have their default."""
        options = {
            name: {field: value for field, value in option._asdict().items() if value != Option._field_defaults[field]}
            for name, option in self.options.items()
        }
        return yaml.safe_dump({'resizes_model': self.resizes_model, 'options': options}, default_flow_style=None)


FACTS = yaml.safe_load(Path(__file__).with_name('train_options.yaml').read_text(encoding='utf-8'))
_RANGES = {
    key: Range.parse(text)
    for text, keys in FACTS['ranges'].items()
    for key in (keys if isinstance(keys[0], str) else chain(*keys))
}
NEWEST = TrainScript({name: Option(**fields) for name, fields in FACTS['options'].items()}, FACTS['resizes_model'])


def ask_script(path: Union[str, Path]) -> TrainScript:
    """Import a train.py, whose top level runs, and read its largest parser; raise a ValueError if that fails."""
    saved = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [str(path)], os.path.dirname(os.path.realpath(path))
    try:
        with redirect_stdout(sys.stderr):
            variables = runpy.run_path(str(path), run_name='timm_zzz_train_script')
    except (Exception, SystemExit) as e:
        raise ValueError(f"can't ask {path} for its options: {type(e).__name__}: {reason(e)}") from e
    finally:
        sys.argv, sys.path[:] = saved
    parsers = [value for value in variables.values() if isinstance(value, argparse.ArgumentParser)]
    if not parsers:
        raise ValueError(f"can't ask {path} for its options: its top level builds no argparse parser")
    actions = max((parser._actions for parser in parsers), key=len)
    options = {action.dest: _option(action) for action in actions if not isinstance(action, argparse._HelpAction)}
    return TrainScript(options, b'resolve_model_input_args' in Path(path).read_bytes())


def _option(action: argparse.Action) -> Option:
    names = sorted({name.lstrip('-').replace('-', '_') for name in action.option_strings} - {action.dest})
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction | argparse._StoreFalseAction):
        return Option('flag', action.default, other_names=names)
    kind = getattr(action.type or str, '__name__', '') if isinstance(action, argparse._StoreAction) else ''
    kind = 'mapping' if isinstance(action, ParseKwargs) else kind if kind in _TYPES else 'any'
    choices = None if action.choices is None else list(action.choices)
    return Option(kind, action.default, action.nargs, choices, action.const if action.nargs == '?' else None, names)


class TrainParser(argparse.ArgumentParser):
    """Parser for the options of train.py and further options of a command.

    The result has only those options of train.py that are given. Errors are ValueErrors; for an unknown option the
    message has the nearest name.
    """

    def __init__(self, options: Mapping[str, Option], other_names: Optional[Mapping[str, str]] = None, **kwargs: Any):
        listed = ' '.join(f'--{key}'.replace('_', '-') for key in options if key != 'data')
        epilog = 'options of train.py:\n' + textwrap.indent(textwrap.fill(listed, 100, break_on_hyphens=False), '  ')
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, epilog=epilog, **kwargs)
        other_names = other_names or {}
        for key, option in options.items():
            if key == 'data':  # it has no name on the command line
                continue
            names = [key, *option.other_names, *filter(None, [other_names.get(key)])]
            flags = [f'{dashes}{name}'.replace('_', '-') for name in names for dashes in ('-', '--')[len(name) > 2 :]]
            settings: Dict[str, Any] = dict(dest=key, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            if option.type == 'flag':
                off = [flag for flag in flags if flag == f'--no-{key}'.replace('_', '-')]
                self.add_argument(*(flag for flag in flags if flag not in off), action='store_true', **settings)
                for flag in off:
                    self.add_argument(flag, action='store_false', **settings)
            elif option.type == 'mapping':
                self.add_argument(*flags, nargs='*', type=_key_value, action=_Pairs, **settings)
            else:
                settings.update(type=_TYPES.get(option.type, str), nargs=option.nargs, const=option.const)
                self.add_argument(*flags, choices=option.choices, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            near = nearest(rest[0].partition('=')[0], self._option_string_actions)
            self.error(f'unrecognized arguments: {" ".join(rest)}{near}')
        return found

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Pairs(argparse.Action):
    """Collect pairs in a dict, as timm's ParseKwargs, whose older versions fail at ``KEY=/a/path``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        setattr(namespace, self.dest, dict(values))


def _key_value(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'expected KEY=VALUE, got {text}')
    try:
        literal = ast.literal_eval(value)
        yaml.safe_dump(literal)  # as train.py does for args.yaml
    except (SyntaxError, ValueError):
        return key, value
    except (TypeError, MemoryError, RecursionError, yaml.YAMLError) as e:
        raise argparse.ArgumentTypeError(f'expected a value of {key} that YAML has, got {value}') from e
    return key, literal


class Finding(NamedTuple):
    """A finding in a line of a recipe, or in the whole file if None; the level is 'error' or 'note'."""

    line: Optional[int]
    level: str
    message: str


class Recipe:
    """The options of a recipe as train.py gets them, and the findings about them."""

    def __init__(self, script: TrainScript, places: Mapping[str, str]):
        self.script = script
        self.places = places  # the option under which each misplaced key belongs
        self.findings: List[Finding] = []
        # Lines of keys, and of keys in mappings ('model_kwargs.img_size'); None for options of the command line
        self.lines: Dict[str, Optional[int]] = {}
        self.values: Dict[str, Any] = {}  # converted values of all valid keys
        # Options that another script lacks, or has with another type than the newest, count as not given.
        known, kind = NEWEST.options, lambda option: (option.type, option.is_list)
        self._alike = {key: o for key, o in script.options.items() if kind(o) == kind(known.get(key, o))}
        self._defaults = {key: option.default for key, option in {**known, **self._alike}.items()}

    @property
    def settings(self) -> argparse.Namespace:
        """All options, with values of the file or else train.py's defaults."""
        return self.without(())

    def without(self, keys: Iterable[str]) -> argparse.Namespace:
        """Return all options without some keys, or keys in mappings such as 'model_kwargs.img_size'."""
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in self.values.items()}
        for key in keys:
            name, _, inner = key.partition('.')
            values.get(name, {}).pop(inner, None) if inner else values.pop(name, None)
        return argparse.Namespace(**{**self._defaults, **values})

    def drop(self, keys: Iterable[str]) -> None:
        """Remove keys that were found wrong."""
        settings = vars(self.without(keys))
        self.values = {key: settings[key] for key in self.values if key not in keys}

    def error(self, where: Union[str, int, None], message: str, level: str = 'error') -> None:
        """Add a finding; ``where`` is a line, or a key that then starts the message."""
        line = self.line(where) if isinstance(where, str) else where
        message = f'{where}: {message}' if isinstance(where, str) else message
        self.findings.append(Finding(line, level, ' '.join(message.split())))

    def note(self, where: Union[str, int, None], message: str) -> None:
        self.error(where, message, 'note')

    def line(self, key: str) -> Optional[int]:
        return self.lines.get(key) or self.lines.get(key.partition('.')[0], 1)

    def first(self, *keys: str) -> str:
        """Return the first of the keys that is in the file; the last key if none is."""
        return next((key for key in keys if key in self.lines), keys[-1])

    def is_wrong(self, key: str) -> bool:
        """Tell whether the file has the key with a value that can't be used."""
        return key in self.lines and key not in self.values

    def read(self, path: Union[str, Path]) -> bool:
        """Read lines and values from a file; return False if it has no mapping."""
        try:
            return self.parse(Path(path).read_text(encoding='utf-8'))
        except OSError as e:
            self.error(None, f"can't be read: {e.strerror}")
        except UnicodeDecodeError as e:
            self.error(e.object.count(b'\n', 0, e.start) + 1, 'not text in UTF-8')
        return False

    def override(self, given: Mapping[str, Any]) -> None:
        """Replace options of the file by those of a command line, which have no line."""
        other = Recipe(self.script, self.places)
        other.parse(yaml.safe_dump(dict(given), allow_unicode=True) if given else '{}')
        self.findings += [finding._replace(line=None) for finding in other.findings]
        self.lines = {key: line for key, line in self.lines.items() if key.partition('.')[0] not in given}
        self.lines.update(dict.fromkeys(other.lines))
        self.values = {**{key: value for key, value in self.values.items() if key not in given}, **other.values}

    def parse(self, text: str) -> bool:
        """Read lines and values from text; return False if it has no mapping."""
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            if isinstance(root, yaml.MappingNode) and root.tag.endswith(':map'):
                self._find_duplicates(root)
                loader.flatten_mapping(root)
                for key_node, node in root.value:
                    self._read_entry(loader, key_node, node)
                return True
            empty = 'the file is empty: train.py stops at it'
            self.error(_line(root), 'no mapping: a recipe is lines of KEY: VALUE' if root else empty)
        except yaml.reader.ReaderError as e:
            self.error(text.count('\n', 0, e.position) + 1, f'no YAML: {e.reason}')
        except (yaml.YAMLError, RecursionError) as e:
            self.error(*_yaml_error(e, None))
        return False

    def _find_duplicates(self, mapping: yaml.MappingNode, prefix: str = '') -> None:
        first: Dict[str, int] = {}
        for key_node, node in mapping.value:
            if not prefix and isinstance(node, yaml.MappingNode):
                self._find_duplicates(node, f'{key_node.value}.')
            if isinstance(key_node, yaml.ScalarNode) and not key_node.tag.endswith(':merge'):
                key, line = f'{prefix}{key_node.value}', _line(key_node)
                if key in first:
                    self.error(line, f'{key}: written twice, first in line {first[key]}; YAML takes the last')
                first.setdefault(key, line)

    def _read_entry(self, loader: yaml.SafeLoader, key_node: yaml.Node, node: yaml.Node) -> None:
        part = key_node
        try:
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, str):
                self.lines[key] = _line(key_node)
                self.values.pop(key, None)  # the key may be there twice
            part = node
            value = loader.construct_object(node, deep=True)
        except Exception as e:  # of YAML, and others of PyYAML: the 45th of a month, !!int nonsense, a list as a key
            self.error(*_yaml_error(e, part))
            return
        if not isinstance(key, str):
            self.error(_line(key_node), f'a key that is not text for YAML: {_show(key_node)}')
        elif key not in self.script.options:
            self._unknown_key(key)
        else:
            option = self.script.options[key]
            if option.type == 'mapping' and isinstance(node, yaml.MappingNode):
                self.lines.update((f'{key}.{child.value}', _line(child)) for child, _ in node.value)
            problems = list(_problems(key, option, node, value))
            for where, problem in problems:
                self.error(_line(where), f'{key}: {problem}')
            if not problems and key in self._alike:
                self.values[key] = option.convert(value)

    def _unknown_key(self, key: str) -> None:
        options = self.script.options
        others = {other: name for name, option in options.items() for other in (name, *option.other_names)}
        normal = key.lower().replace('-', '_')
        name = {**FACTS['synonyms'], **others}.get(normal, normal)
        message = f'unknown key{nearest(name, options)}'
        if key in self.places:
            message = f'unknown key; it belongs in {self.places[key]}: {{{key}: ...}}'
        elif key == 'config':
            message = 'train.py reads --config on the command line only'
        elif name in options:
            self.lines.setdefault(name, self.line(key))  # the key is present, though misspelt
        self.error(self.line(key), f'{shorten(key, 60)}: {message}')


def reason(e: BaseException) -> str:
    """Return an error's message in one line, or its type if it has none."""
    return shorten(str(e), 300) or type(e).__name__


def shorten(text: str, width: int) -> str:
    """Shorten text to one line of at most ``width`` characters."""
    return textwrap.shorten(text[: 10 * width], width, placeholder=' ...')[:width]


def _yaml_error(e: Exception, node: Optional[yaml.Node]) -> Tuple[int, str]:
    if isinstance(e, yaml.MarkedYAMLError):
        mark: Any = e.problem_mark or e.context_mark
        return mark.line + 1, f'no YAML: {shorten(", ".join(filter(None, (e.context, e.problem))), 200)}'
    if node is None or isinstance(e, RecursionError):
        return _line(node), 'no YAML: nested too deeply'
    return _line(node), f"YAML can't read {_show(node)}: {reason(e)}"


def _line(node: Optional[yaml.Node]) -> int:
    return node.start_mark.line + 1 if node else 1


def _show(node: yaml.Node) -> str:
    """Return a value as it is written in the file."""
    if not isinstance(node, yaml.ScalarNode):
        return 'a mapping' if isinstance(node, yaml.MappingNode) else 'a list'
    quote = node.style if node.style in ('"', "'") else '' if node.value else "'"
    return f'{quote}{shorten(node.value, 60)}{quote}'


def _problems(key: str, option: Option, node: yaml.Node, value: Any) -> Iterator[Tuple[yaml.Node, str]]:
    """Yield the problems of a value, each with its node; argparse converts only text, and leaves YAML's other types."""
    shown = _show(node)
    if value is None:
        # If the default is empty, train.py only asks whether there is a value, except for the data set.
        empty = option.default is None or option.default is False or option.default == ''
        if not (empty and key != 'dataset') and option.type != 'any' and key != 'val_split':
            yield node, f'null in place of a value; without the line it would be {option.default!r}'
    elif option.type == 'flag':
        if not isinstance(value, bool):
            yield node, f'a switch: write true or false, not {shown}; any text counts as true'
    elif option.type == 'mapping':
        if not isinstance(value, dict):
            yield node, f'a mapping {{KEY: VALUE, ...}} is needed, not {shown}'
        elif not all(isinstance(name, str) for name in value):
            yield node, 'the keys of the mapping have to be text'
        else:
            yield from _numbers_as_text(node, set())
    elif option.is_list and not isinstance(value, list):
        inner = shown if isinstance(node, yaml.ScalarNode) else '...'
        why = ': text is taken apart letter by letter' if isinstance(value, str) and option.type == 'str' else ''
        yield node, f'a list is needed, write [{inner}]{why}'
    elif option.type != 'any':
        length = option.nargs if isinstance(option.nargs, int) else 2 if key in _PAIRS else None
        if length is not None and len(value) != length:
            yield node, f'{length} numbers are needed, not {len(value)}'
        for child, item in zip(node.value, value, strict=True) if option.is_list else [(node, value)]:
            problem = _scalar_problem(key, option, child, item)
            if problem:
                yield child, problem


def _scalar_problem(key: str, option: Option, node: yaml.Node, value: Any) -> str:
    """Return the problem of a single value of type str, int or float; '' if there is none."""
    shown, quote_it = _show(node), '; quote it' if option.type == 'str' else ''
    if value is None or isinstance(value, list | dict | set | tuple):
        return f'one value is needed, not {shown}'
    if isinstance(value, bool):
        if value and option.const is not None:
            return f'{shown} is not the name that it takes: write {option.const}'
        return f'YAML reads {shown} as {str(value).lower()}{quote_it}'
    if quote_it and not isinstance(value, str):
        kind = 'a number' if isinstance(value, int | float) else 'a date' if hasattr(value, 'year') else 'bytes'
        return f'YAML reads {shown} as {kind}{quote_it}'
    octal = re.fullmatch('[-+]?0[0-7_]+', node.value)
    differs = ':' in node.value or (octal and int(node.value.replace('_', ''), 10) != value)
    if isinstance(value, int | float) and differs:  # YAML and the reader differ: 010 is 8, 1:30 is 90
        return f'YAML reads {shown} as {value!r}'
    try:
        taken = option.convert(value)
    except ValueError:
        taken = None
    if not isinstance(taken, (int, _TYPES[option.type])):
        needed = 'a whole number' if option.type == 'int' else 'a number'
        rounded = f': write {taken:.0f}' if isinstance(taken, float) and taken.is_integer() else ''
        return f'{needed} is needed, not {shown}{rounded}'
    if isinstance(taken, float) and not math.isfinite(taken):
        return f'not a finite number: {shown}'
    if option.is_list and taken != value:  # argparse does not convert lists
        return f'{shown} stays text in a list{_as_number(value)}'
    if key in _RANGES and isinstance(taken, int | float) and not _RANGES[key].has(taken):
        return f'{_RANGES[key]} is needed, not {shown}'
    allowed = option.choices or FACTS['words'].get(key)
    return f'{shown} is none of {", ".join(map(repr, allowed))}' if allowed and taken not in allowed else ''


def _numbers_as_text(node: yaml.Node, seen: Set[int]) -> Iterator[Tuple[yaml.Node, str]]:
    """Yield unquoted numbers in lists and mappings that YAML reads as text, such as 1e-5."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.tag.endswith(':str') and _as_number(node.value):
            yield node, f'YAML reads {_show(node)} as text{_as_number(node.value)}'
    elif isinstance(node, yaml.CollectionNode):
        for child in node.value:
            yield from _numbers_as_text(child[1] if isinstance(child, tuple) else child, seen)


def _as_number(text: str) -> str:
    """Return the end of a message on how to write a number for YAML; '' if the text is not a number."""
    try:
        if not math.isfinite(float(text)):
            return ''
    except ValueError:
        return ''
    mantissa, e, exponent = text.strip().lower().replace('_', '').partition('e')
    if e:
        mantissa = mantissa if '.' in mantissa else f'{mantissa}.0'
        exponent = f'e{int(exponent):+d}'
    return f': write {mantissa}{exponent}'
