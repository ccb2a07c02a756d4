"""Keeps a test's process, and any Python process that it starts, off the network: only this machine may be reached.

Found by its name through PYTHONPATH at the start of a process. Attempts are refused and noted in NETWORK_GUARD_LOG,
which fails the test even if the code under test swallows the refusal.
"""

import os
import sys

_LOCAL = ('127.', '::1', 'localhost', '0.0.0.0')


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode()
    return not host or host.startswith(_LOCAL)


def _hook(event, args):
    if event in ('socket.connect', 'socket.sendto'):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # not a tuple: a socket of the file system
    elif event == 'socket.getaddrinfo':
        host = args[0]
    else:
        return
    if not _is_local(host):
        with open(os.environ['NETWORK_GUARD_LOG'], 'a') as log:
            log.write(f'{event} {host}\n')
        raise ConnectionRefusedError(f'a test may not reach {host}')


if 'NETWORK_GUARD_LOG' in os.environ:
    sys.addaudithook(_hook)
