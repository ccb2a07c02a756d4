"""The suites of speed.py on tiny shapes, and one of the cases of its numerics."""

import json

import numerics
import speed
import torch


def test_quick_suites(tmp_path, capsys):
    file = tmp_path / 'speed.json'
    fast = ['--quick', '--device', 'cpu', '--rounds', '1', '--round-s', '0']
    speed.main(['--suite', 'head', 'eval', 'sweep', *fast, '--json', str(file)])
    found = json.loads(file.read_text())
    assert found['environment']['device'] in capsys.readouterr().out
    for suite in ('head', 'eval', 'sweep'):
        assert all((row['ms'] or 0) > 0 for row in found[suite] if 'triton' not in row['method'])
    assert all(row['floor_ms'] > 0 for row in found['sweep'])


def test_numerics_of_a_case():
    case = numerics.Case(batch=16, num_classes=7, feat_dim=33, rank=3, sigma2=1 / 16, v=0.7)
    errors = numerics.compare(case, 0, torch.device('cpu'), {})
    assert {(dtype, quantity) for path, dtype, quantity in errors if path == 'zzz torch'} == {
        (dtype, quantity) for dtype in numerics.DTYPES for quantity in numerics.QUANTITIES
    }
    for error in errors.values():
        assert 0 < error.reference < 0.1 and error.norm_ratio < numerics.LIMIT
