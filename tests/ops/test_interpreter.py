import pytest


def test_kernels_by_tritons_interpreter(run, root):
    """test_kernels.py on the CPU; in a process of its own, since Triton reads the variable as it is imported."""
    pytest.importorskip('triton', reason='Triton is not installed')
    result = run(
        *('-m', 'pytest', '-q', '-p', 'no:cacheprovider', root / 'tests/ops/test_kernels.py'),
        env={'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''},
    )
    summary = result.stdout.strip().splitlines()[-1]
    assert ' passed' in summary and 'failed' not in summary, summary
