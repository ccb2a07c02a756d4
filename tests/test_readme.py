import re

import pytest


@pytest.fixture(scope='module')
def readme(root):
    return (root / 'README.md').read_text()


def test_python_snippets_run(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r'```python\n(.*?)```', readme, re.S)
    assert snippets
    namespace = {}
    for snippet in snippets:
        # The tests have no network: the same call without the download
        exec(compile(snippet.replace('pretrained=True', 'pretrained=False'), 'README.md', 'exec'), namespace)


def test_commands_exist(readme, run):
    for command in set(re.findall(r'-m timm_zzz (\w+)(?=\s|`|$)', readme)) - {'SCRIPT'}:
        run('-m', 'timm_zzz', command, '--help')


def test_ci_runs_the_readmes_test_command(readme, root):
    assert 'tests/test_readme.py' not in readme
    assert len(re.findall(r'^python3\.11 .*pytest.*$', readme, re.M)) == 1
