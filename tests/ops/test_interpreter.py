import pytest


def run_kernels(run, root, marker):
    """test_kernels.py on the CPU; in a process of its own, since Triton reads the variable as it is imported."""
    pytest.importorskip('triton', minversion='3.6', reason='Triton is not installed, or too old')
    result = run(
        *('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', marker, root / 'tests/ops/test_kernels.py'),
        env={'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'},
        timeout=3600,
    )
    summary = result.stdout.strip().splitlines()[-1]
    assert ' passed' in summary and 'failed' not in summary, summary


def test_kernels_by_tritons_interpreter(run, root):
    run_kernels(run, root, 'not slow')


@pytest.mark.slow
def test_more_kernels_by_tritons_interpreter(run, root):
    run_kernels(run, root, 'slow')
