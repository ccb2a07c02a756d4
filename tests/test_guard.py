import os


def test_guard_refuses_other_addresses(run, tmp_path):
    """The guard of conftest.py, which fails every test that reaches for another machine."""
    script = """
import socket
for address in ('203.0.113.1', 'huggingface.co', '127.0.0.1'):
    try:
        socket.create_connection((address, 9), timeout=1)
    except OSError as e:
        print(e)
"""
    out = run('-c', script, env={'NETWORK_GUARD_LOG': str(tmp_path / 'log')}).stdout.splitlines()
    assert out[:2] == ['a test may not reach 203.0.113.1', 'a test may not reach huggingface.co']
    assert 'refused' in out[2] and 'may not' not in out[2]
    assert len((tmp_path / 'log').read_text().splitlines()) == 2
    assert os.environ['HF_ENDPOINT'].startswith('http://127.0.0.1:')
