"""Recipes for timm's train.py with the lines of their keys: the file, the keys, and values as argparse takes them."""

import difflib
import math
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import yaml

from .train_options import Option, TrainScript, newest

__all__ = ['Finding', 'Recipe', 'nearest', 'reason', 'shorten']

# Values that train.py knows but its parser doesn't check
_WORDS = {
    'amp_dtype': ('float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'eval_metric': ('top1', 'top5', 'loss'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'model_dtype': ('float32', 'float16', 'bfloat16'),
}
_PAIRS = ('scale', 'ratio', 'cutmix_minmax')
# What others call an option
_SYNONYMS = {
    'learning_rate': 'lr',
    'optimizer': 'opt',
    'scheduler': 'sched',
    'wd': 'weight_decay',
    'label_smoothing': 'smoothing',
    'dropout': 'drop',
    'image_size': 'img_size',
    'num_workers': 'workers',
    'num_epochs': 'epochs',
}
_FAILED = object()


class Finding(NamedTuple):
    """A line of a recipe, None for the whole file; 'error' or 'note'; what it is."""

    line: Optional[int]
    level: str
    message: str


class Recipe:
    """A recipe's options as train.py will have them, and what is wrong with them.

    Args:
        script: The train.py that reads it.
        places: The option in which a name belongs that is none, for whoever writes it on the top level.
    """

    def __init__(self, script: TrainScript, places: Optional[Mapping[str, str]] = None):
        self.script = script
        self.places = places or {}
        self.findings: List[Finding] = []
        self.lines: Dict[str, int] = {}  # of keys; of keys within a mapping as 'model_kwargs.img_size'
        self.values: Dict[str, Any] = {}  # what argparse makes of the keys that are right
        # Of a script that isn't timm's or is old: what it lacks or means otherwise counts as not given.
        self._known = newest().options
        self._alike = {key for key, option in script.options.items() if option.is_like(self._known.get(key, option))}

    def error(self, where: Union[str, int, None], message: str) -> None:
        """``where``: a line, or a key, which then starts the message."""
        self._add(where, 'error', message)

    def note(self, where: Union[str, int, None], message: str) -> None:
        self._add(where, 'note', message)

    def _add(self, where: Union[str, int, None], level: str, message: str) -> None:
        line = where if not isinstance(where, str) else self.line(where)
        message = f'{where}: {message}' if isinstance(where, str) else message
        self.findings.append(Finding(line, level, ' '.join(message.split())))

    def line(self, key: str) -> int:
        return self.lines.get(key) or self.lines.get(key.partition('.')[0], 1)

    def given(self, key: str) -> Any:
        """The file's value, None without one."""
        return self.values.get(key) if key in self._alike else None

    def get(self, key: str) -> Any:
        """The file's value or train.py's default."""
        if key in self._alike:
            return self.values.get(key, self.script.options[key].default)
        return self._known[key].default

    def settings(self) -> Namespace:
        """All options, as train.py has them."""
        return Namespace(**{key: self.get(key) for key in self._known})

    def is_wrong(self, key: str) -> bool:
        """Whether the file has the key with a value that was found wrong."""
        return key in self.lines and key not in self.values

    def read(self, path: Union[str, Path]) -> bool:
        """Fill in lines and values; False if there is nothing to go on with."""
        try:
            text = Path(path).read_text(encoding='utf-8')
        except OSError as e:
            self.error(None, f"can't be read: {e.strerror}")
            return False
        except UnicodeDecodeError as e:
            self.error(e.object.count(b'\n', 0, e.start) + 1, 'not text in UTF-8')
            return False
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            if root is None:
                self.error(1, 'the file is empty: train.py stops at it')
            elif not isinstance(root, yaml.MappingNode) or not root.tag.endswith(':map'):
                self.error(_line(root), 'no mapping: a recipe is lines of KEY: VALUE')
            else:
                _find_duplicates(self, root)
                loader.flatten_mapping(root)
                for key_node, node in root.value:
                    _read_entry(self, loader, key_node, node)
                return True
        except (yaml.YAMLError, RecursionError) as e:
            self.error(*_yaml_error(e, text))
        return False


def nearest(word: str, words: Iterable[str], n: int = 1) -> str:
    """The end of a message: which of the known words may have been meant, if any."""
    return _suggest(difflib.get_close_matches(word, list(words), n))


def _suggest(words: Sequence[str]) -> str:
    return f'; did you mean {", ".join(words[:-1])}{" or " if words[1:] else ""}{words[-1]}?' if words else ''


def reason(e: BaseException) -> str:
    """An error's message in one line, its type if it has none."""
    return shorten(str(e), 300) or type(e).__name__


def shorten(text: str, width: int) -> str:
    """One line of text, not longer than ``width``."""
    return textwrap.shorten(text[: 10 * width], width, placeholder=' ...')[:width]


# Keys


def _read_entry(recipe: Recipe, loader: yaml.SafeLoader, key_node: yaml.Node, node: yaml.Node) -> None:
    key = _construct(recipe, loader, key_node)
    if key is _FAILED:
        return
    if not isinstance(key, str):
        recipe.error(_line(key_node), f'a key that is not text for YAML: {_show(key_node)}')
        return
    recipe.lines[key] = _line(key_node)
    recipe.values.pop(key, None)  # of a key that is written twice
    option = recipe.script.options.get(key)
    if option is None:
        _unknown_key(recipe, key)
        return
    value = _construct(recipe, loader, node)
    if value is _FAILED:
        return
    if option.type == 'mapping' and isinstance(node, yaml.MappingNode):
        for child, _ in node.value:
            recipe.lines[f'{key}.{child.value}'] = _line(child)
    problems = list(_problems(key, option, node, value))
    for where, problem in problems:
        recipe.error(_line(where), f'{key}: {problem}')
    if not problems:
        recipe.values[key] = option.convert(value)


def _construct(recipe: Recipe, loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, RecursionError) as e:
        recipe.error(*_yaml_error(e, '', _line(node)))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        # PyYAML's own errors: the 45th of a month, !!int nonsense, a list as a key
        recipe.error(_line(node), f"YAML can't read {_show(node)}: {reason(e)}")
    return _FAILED


def _yaml_error(e: Exception, text: str, line: int = 1) -> Tuple[int, str]:
    if isinstance(e, RecursionError):
        return line, 'no YAML: nested too deeply'
    mark = getattr(e, 'problem_mark', None) or getattr(e, 'context_mark', None)
    if mark is not None:
        parts = (getattr(e, 'context', None), getattr(e, 'problem', None))
        return mark.line + 1, 'no YAML: ' + shorten(', '.join(part for part in parts if part), 200)
    position = getattr(e, 'position', 0)  # of a character that YAML forbids
    return text.count('\n', 0, position) + 1, f'no YAML: {getattr(e, "reason", e)}'


def _find_duplicates(recipe: Recipe, root: yaml.MappingNode) -> None:
    mappings = [('', root)]
    mappings += [(f'{key.value}.', node) for key, node in root.value if isinstance(node, yaml.MappingNode)]
    for prefix, mapping in mappings:
        first: Dict[str, int] = {}
        for key_node, _ in mapping.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(':merge'):
                continue
            key = f'{prefix}{key_node.value}'
            if key in first:
                message = f'{key}: written twice, first in line {first[key]}; YAML takes the last'
                recipe.error(_line(key_node), message)
            first.setdefault(key, _line(key_node))


def _unknown_key(recipe: Recipe, key: str) -> None:
    options = recipe.script.options
    if key == 'config':
        recipe.error(key, 'train.py reads --config on the command line only')
        return
    if key in recipe.places:
        recipe.error(key, f'unknown key; it belongs in {recipe.places[key]}: {{{key}: ...}}')
        return
    normal = key.lower().replace('-', '_')
    names = {other: name for name, option in options.items() for other in option.other_names}
    found = [name for name in (normal, names.get(normal), _SYNONYMS.get(normal)) if name in options]
    for name in found[:1]:
        recipe.lines.setdefault(name, recipe.line(key))  # there, though wrong
    recipe.error(shorten(key, 60), 'unknown key' + (_suggest(found[:1]) or nearest(normal, options)))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _show(node: yaml.Node) -> str:
    """A value as the file has it."""
    if not isinstance(node, yaml.ScalarNode):
        return 'a mapping' if isinstance(node, yaml.MappingNode) else 'a list'
    quote = node.style if node.style in ('"', "'") else '' if node.value else "'"
    return f'{quote}{shorten(node.value, 60)}{quote}'


# Values: argparse passes text through the option's type; anything else stays as YAML reads it


def _problems(key: str, option: Option, node: yaml.Node, value: Any) -> Iterator[Tuple[yaml.Node, str]]:
    """What is wrong with a value, and where in it."""
    if value is None:
        # Where its default is empty train.py asks only whether there is something; not so of the data set.
        empty = option.default is None or option.default is False or option.default == ''
        if not (empty and key != 'dataset') and option.type != 'any' and key != 'val_split':
            yield node, f'null in place of a value; without the line it would be {option.default!r}'
    elif option.type == 'flag':
        if not isinstance(value, bool):
            yield node, f'a switch: write true or false, not {_show(node)}; any text counts as true'
    elif option.type == 'mapping':
        if not isinstance(value, dict):
            yield node, f'a mapping {{KEY: VALUE, ...}} is needed, not {_show(node)}'
        elif not all(isinstance(name, str) for name in value):
            yield node, 'the keys of the mapping have to be text'
        else:
            yield from _numbers_as_text(node, set())
    elif option.is_list:
        yield from _list_problems(key, option, node, value)
    elif option.type != 'any':
        problem = _scalar_problem(option, node, value)
        allowed = option.choices or _WORDS.get(key)
        if problem:
            yield node, problem
        elif allowed and option.convert(value) not in allowed:
            yield node, f'{_show(node)} is none of {", ".join(map(repr, allowed))}'


def _list_problems(key: str, option: Option, node: yaml.Node, value: Any) -> Iterator[Tuple[yaml.Node, str]]:
    if not isinstance(value, list):
        inner = _show(node) if isinstance(node, yaml.ScalarNode) else '...'
        why = ': text is taken apart letter by letter' if isinstance(value, str) and option.type == 'str' else ''
        yield node, f'a list is needed, write [{inner}]{why}'
        return
    length = option.nargs if isinstance(option.nargs, int) else 2 if key in _PAIRS else None
    if length is not None and len(value) != length:
        yield node, f'{length} numbers are needed, not {len(value)}'
    if option.type == 'any':
        return
    for child, item in zip(node.value, value, strict=True):
        problem = _scalar_problem(option, child, item)
        if not problem and isinstance(item, str) and option.type != 'str':  # argparse leaves lists alone
            problem = f'{_show(child)} stays text in a list{_as_number(item)}'
        if not problem and option.choices and item not in option.choices:
            problem = f'{_show(child)} is none of {", ".join(map(repr, option.choices))}'
        if problem:
            yield child, problem


def _scalar_problem(option: Option, node: yaml.Node, value: Any) -> str:
    """What is wrong with a single value of type str, int or float; '' if nothing."""
    shown = _show(node)
    if isinstance(value, list | dict | set | tuple) or value is None:
        return f'one value is needed, not {shown}'
    if isinstance(value, bool):
        if option.const is not None and value:
            return f'{shown} is not the name that it takes: write {option.const}'
        return f'YAML reads {shown} as {str(value).lower()}' + ('; quote it' if option.type == 'str' else '')
    if option.type == 'str':
        kind = 'a number' if isinstance(value, int | float) else 'a date' if hasattr(value, 'year') else 'bytes'
        return '' if isinstance(value, str) else f'YAML reads {shown} as {kind}; quote it'
    if not isinstance(value, int | float | str):
        return f'a number is needed, not {shown}'
    if not isinstance(value, str) and _misread(node, value):
        return f'YAML reads {shown} as {value!r}'
    if isinstance(value, float) and option.type == 'int':
        return f'a whole number is needed, not {shown}' + (f': write {value:.0f}' if value.is_integer() else '')
    try:
        number = option.convert(value)
    except ValueError:
        return f'{"a whole number" if option.type == "int" else "a number"} is needed, not {shown}'
    return '' if isinstance(number, int) or math.isfinite(number) else f'not a finite number: {shown}'


def _misread(node: yaml.Node, value: Union[int, float]) -> bool:
    """Whether YAML has another idea of a number than its reader: 010 is 8, 1:30 is 90."""
    text = node.value.replace('_', '').lower()
    if text.lstrip('+-').startswith(('0x', '0b', '.inf', '.nan')):
        return False
    try:
        return float(text) != float(value)
    except (OverflowError, ValueError):
        return True


def _numbers_as_text(node: yaml.Node, seen: Set[int]) -> Iterator[Tuple[yaml.Node, str]]:
    """Unquoted numbers within lists and mappings that YAML reads as text, such as 1e-5."""
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
    """The end of a message: how to write a number so that YAML takes it for one; '' for what is none."""
    try:
        if not math.isfinite(float(text)):
            return ''
    except ValueError:
        return ''
    mantissa, e, exponent = text.strip().lower().replace('_', '').partition('e')
    if not e:
        return f': write {mantissa}'
    return f': write {mantissa if "." in mantissa else mantissa + ".0"}e{int(exponent):+d}'
