"""The notebook runs from beginning to end, on fewer images and epochs."""

import json
import re


def test_cells_run(root, tmp_path, capsys):
    notebook = json.loads((root / 'docs/tutorial.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert all(cell['outputs'] == [] for cell in notebook['cells'] if cell['cell_type'] == 'code')
    source = '\n'.join(cells)
    for long, short in (
        ('COARSE, 160', 'COARSE, 8'),
        (', 16, 4e-3', ', 1, 4e-3'),
        ("'validation', FINE, 40", "'validation', FINE, 4"),
        ('Path(mkdtemp())', f'Path({str(tmp_path)!r})'),
    ):
        assert source.count(long) == 1
        source = source.replace(long, short)
    found = {}
    exec(compile(source, 'tutorial.ipynb', 'exec'), found)
    out = capsys.readouterr().out
    for expected in ('zzz against linear: top-1', 'after: NLL ', 'mahalanobis ', ' % of them'):
        assert expected in out
    folders = sorted(path.name for path in (tmp_path / 'fine/train').iterdir())
    assert found['again'].pretrained_cfg['label_names'] == found['names'] == folders


def test_links_lead_somewhere(root):
    notebook = json.loads((root / 'docs/tutorial.ipynb').read_text(encoding='utf-8'))
    links = re.findall(r'\]\(([\w./]+)', ''.join(line for cell in notebook['cells'] for line in cell['source']))
    assert len(links) > 4 and all((root / 'docs' / link).exists() for link in links)
