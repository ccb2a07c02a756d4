import re

import pytest


@pytest.fixture(scope='module')
def readme(root):
    return (root / 'README.md').read_text()


def test_python_snippets_run(hub, readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r'```python\n(.*?)```', readme, re.S)
    assert snippets
    namespace = {}
    for snippet in snippets:
        # The tests have no network and a Hub of their own: the same calls without timm's weights, for a user there
        for name, here in (("zzz_r8', pretrained=True", "zzz_r8', pretrained=False"), ('USER/', 'owner/')):
            snippet = snippet.replace(name, here)
        exec(compile(snippet, 'README.md', 'exec'), namespace)
    assert namespace['model'].pretrained_cfg['label_names'] == [f'species {i}' for i in range(200)]


def test_ci_runs_the_readmes_test_command(readme, root):
    assert len(re.findall(r'^python3\.11 .*pytest.*$', readme, re.M)) == 1
