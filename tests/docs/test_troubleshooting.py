"""docs/troubleshooting.md has every message that the package raises, warns of or exits with, and no other.

In the page's tables, the first cell holds messages as code, as they stand in the source with … for what is filled in.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Calls that take a message first: exceptions, warnings, and what prints one and exits
CALLS = re.compile(
    r'(.*\.)?(\w*Error|Corrupt|fail|_refuse|warn|warning|unsupported|parser\.error|(notes|error_msgs)\.append)'
)
# Caught where it is raised, or a protocol of Python
INTERNAL = {'not arithmetic', 'fuse'}


def texts(node):
    """List the texts that an expression may print, with … for parts known only when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in texts(node.left) for b in texts(node.right)]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return ['…']


def normal(text):
    return re.sub('…[…]+', '…', ' '.join(text.split()))


def messages():
    """Messages in the calls that take one, and every text of the package."""
    found, every = {}, set()
    for path in sorted((ROOT / 'timm_zzz').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            every |= {normal(text) for text in texts(node)} if isinstance(node, ast.expr) else set()
            if isinstance(node, ast.Call) and node.args and CALLS.fullmatch(ast.unparse(node.func)):
                for text in map(normal, texts(node.args[0])):
                    if re.search('[a-z]', text) and text not in INTERNAL:  # one without words passes on another's
                        found[text] = f'{path.name}:{node.lineno}'
    return found, every


def listed():
    """Messages on the page, but for those of timm, PyTorch and the Hub's client."""
    page = re.sub(r'^## timm.*?(^## |\Z)', '', (ROOT / 'docs/troubleshooting.md').read_text('utf-8'), flags=re.M | re.S)
    for row in re.findall(r'^\| (?!---)(.*?)(?<!\\) \| ', page, re.M):
        yield from (match[1] for match in re.findall(r'(`+) ?(.+?) ?\1', row.replace('\\|', '|')))


def test_the_page_has_every_message_and_no_other():
    found, every = messages()
    assert len(found) > 120
    missing = [f'{place}: {text}' for text, place in found.items() if text not in {*listed()}]
    stale = {*listed()} - every
    assert not missing and not stale, '\n'.join(['missing:', *missing, 'no longer in the source:', *stale])
