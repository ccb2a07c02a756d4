"""The tables of README.md and docs/ against the committed rows."""

import re

import pytest
import tables

PAGES = [page.relative_to(tables.ROOT).as_posix() for page in tables.pages() if '<!-- table ' in page.read_text()]


@pytest.mark.parametrize('page', PAGES)
def test_tables_are_those_of_the_rows(page):
    text = (tables.ROOT / page).read_text()
    assert text.count('<!-- table ') == text.count('<!-- end -->') == len(tables.MARKED.findall(text))
    assert tables.filled(text) == text, 'run python benchmarks/tables.py'


def test_filled():
    text = 'a\n<!-- table rates -->\nold\n<!-- end -->\nb'
    assert tables.filled(text) == tables.filled(tables.filled(text))
    assert re.fullmatch(r'a\n<!-- table rates -->\n(\|.*\|\n)+<!-- end -->\nb', tables.filled(text))
    with pytest.raises(KeyError):
        tables.filled(text.replace('rates', 'none'))


def test_plain_names():
    assert [
        tables.plain(name) for name in ('linear:rows=zero', 'zzz_r16:fit=frozen,train=0', 'zzz_r0:fit=finetune')
    ] == [
        'linear, from zero',
        'ZZZ r 16, fitted',
        'ZZZ r 0, `zzz_fit`',
    ]
    for name in ('arcface', 'zzz_r8:fit=frozen'):
        assert tables.plain(name) == name
