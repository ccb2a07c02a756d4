"""docs/troubleshooting.md has every message that the package raises, warns of or exits with, and no other.

In the page's tables, the first cell holds messages as code, as they stand in the source with … for what is filled in.
``python tests/test_troubleshooting.py`` prints the rows that are missing and those that are no longer true.
"""

import ast
import builtins
import itertools
import re
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Set, Tuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'troubleshooting.md'
# Caught where it is raised, or a protocol of Python
INTERNAL = {'not arithmetic', 'fuse'}
# What prints a message besides an exception, by the end of the call and the place of the message
CALLS = {'_fail': 0, 'parser.error': 0, 'parser.exit': 1, 'error_msgs.append': 0, 'unsupported': 0}
WARNINGS = {'run.notes.append': 0, 'warnings.warn': 0, '_logger.warning': 0}


def sources() -> Dict[str, ast.Module]:
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding='utf-8'))
        for path in sorted((ROOT / 'timm_zzz').rglob('*.py'))
    }


def exceptions(trees: Dict[str, ast.Module]) -> Set[str]:
    """Names of exception classes: Python's own and those of the package."""
    names = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    names.add('ArgumentTypeError')
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in classes:  # often enough for any depth of inheritance
        names |= {node.name for node in classes if any(ast.unparse(base) in names for base in node.bases)}
    return names


def texts(node: ast.AST) -> List[str]:
    """What an expression may print, with … for what is only known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a, b in itertools.product(texts(node.left), texts(node.right))]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'format':
        return [re.sub(r'\{[^{}]*\}', '…', text) for text in texts(node.func.value)]
    return ['…']


def within_functions(tree: ast.AST, function: Optional[ast.AST] = None) -> Iterator[Tuple[ast.AST, ast.AST]]:
    """Every node with the function around it."""
    for node in ast.iter_child_nodes(tree):
        yield function or tree, node
        yield from within_functions(node, node if isinstance(node, ast.FunctionDef) else function)


def assigned(function: ast.AST, node: ast.AST) -> List[ast.AST]:
    """The values of a variable in a function; what is no variable stands for itself."""
    values = [
        statement.value
        for statement in ast.walk(function)
        if isinstance(statement, ast.Assign) and isinstance(node, ast.Name)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id == node.id
    ]
    return list(values) or [node]


def messages() -> Dict[str, str]:
    """Messages with the first place where each stands."""
    trees = sources()
    classes = exceptions(trees)
    found: Dict[str, str] = {}

    def add(file: str, node: ast.AST) -> None:
        for text in texts(node):
            text = re.sub('…[…]+', '…', ' '.join(text.split()))
            # One that has no words of its own passes on another's
            if re.search('[a-z]', text) and text not in INTERNAL:
                found.setdefault(text, f'{file}:{node.lineno}')  # type: ignore[attr-defined]

    for file, tree in trees.items():
        for function, node in within_functions(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                where = 0 if name.rpartition('.')[2] in classes else {**CALLS, **WARNINGS}.get(name)
                if where is not None and len(node.args) > where:
                    for value in assigned(function, node.args[where]):
                        add(file, value)
            elif isinstance(node, ast.FunctionDef) and node.name.endswith('refusal'):  # why a kernel can't run
                for part in ast.walk(node):
                    if isinstance(part, ast.Return) and part.value is not None:
                        add(file, part.value)
    return found


def rows(page: str) -> Iterator[str]:
    """First cells of the tables but for those of messages that others raise."""
    for section in re.split(r'^## ', page, flags=re.M)[1:]:
        if not section.startswith('timm'):
            for line in re.findall(r'^\| (?!---)(.*?)(?<!\\) \| ', section, re.M):
                yield line.replace('\\|', '|')


def listed() -> List[str]:
    page = PAGE.read_text(encoding='utf-8')
    return [match[1] for row in rows(page) for match in re.findall(r'(`+) ?(.+?) ?\1', row)]


def test_the_collector_sees_every_kind_of_message():
    found = messages()
    assert len(found) > 120
    for text in (
        'num_classes: expected at least 1, got …',  # raise
        'A ZZZ head replaces linear classifiers; … has ….',  # returned, and raised elsewhere
        'no such script or command: … (see python -m timm_zzz --help)',  # _fail
        '… exists already; give another --output',  # argparse
        '…: a … of another size (checkpoint -> model): ….',  # what load_state_dict raises
        '… is gated: ask for access on its page, then pass a token of that account (or hf auth login)',
        'no held-out example to choose shrinkage, prior_count or temperature by: defaults are taken',  # in a variable
        'width … exceeds …',  # why a kernel can't run
    ):
        assert text in found, text


def test_every_message_is_on_the_page():
    missing = {text: place for text, place in messages().items() if text not in set(listed())}
    assert not missing, 'python tests/test_troubleshooting.py prints these as rows:\n' + '\n'.join(missing)


def test_the_page_has_no_other_message():
    stale = set(listed()) - messages().keys()
    assert not stale, '\n'.join(sorted(stale))


def test_no_message_has_two_rows():
    assert len(listed()) == len(set(listed()))


def main() -> None:
    found, page = messages(), set(listed()) if PAGE.exists() else set()
    for text, place in found.items():
        if text not in page:
            fence = '``' if '`' in text else '`'
            print(f'missing, {place}:\n| {fence}{text}{fence} | | |'.replace(' | | |', ' | MEANING | WHAT TO DO |'))
    for text in sorted(page - found.keys()):
        print(f'no longer raised: {text}')


if __name__ == '__main__':
    main()
