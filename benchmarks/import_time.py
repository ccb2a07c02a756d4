"""Measure what ``import timm_zzz`` adds to ``import timm``, in fresh processes, in alternation.

    python benchmarks/import_time.py [--rounds 7] [--limit 0.3]

Exits with 1 if the median of what it adds is above the limit.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from typing import List

_PROGRAM = """
import sys, time
start = time.perf_counter()
import timm
between = time.perf_counter()
if 'timm_zzz' in sys.argv:
    import timm_zzz
print(between - start, time.perf_counter() - between)
"""

_VERSIONS = 'import timm, timm_zzz, torch; print(timm.__version__, torch.__version__, timm_zzz.__version__)'


def seconds(*modules: str) -> List[float]:
    """Seconds for ``import timm``, and for what follows it, in a new process."""
    out = subprocess.run([sys.executable, '-c', _PROGRAM, *modules], check=True, capture_output=True, text=True).stdout
    return [float(part) for part in out.split()]


def summary(values: List[float]) -> str:
    return f'{statistics.median(values):.3f} s (min {min(values):.3f}, max {max(values):.3f})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--limit', type=float, default=0.3, help='seconds that may be added')
    args = parser.parse_args()

    versions = subprocess.run([sys.executable, '-c', _VERSIONS], check=True, capture_output=True, text=True).stdout
    seconds('timm_zzz')  # bytecode and the file system's cache
    alone, together, added = [], [], []
    for _ in range(args.rounds):
        alone.append(sum(seconds()))
        timm, plugin = seconds('timm_zzz')
        together.append(timm + plugin)
        added.append(plugin)

    timm_version, torch_version, own_version = versions.split()
    print(f'timm {timm_version}, torch {torch_version}, timm_zzz {own_version}, Python {platform.python_version()}')
    print(f'{args.rounds} rounds, {os.cpu_count()} CPU cores, {platform.machine()}')
    print(f'import timm:                     {summary(alone)}')
    print(f'import timm, timm_zzz:           {summary(together)}')
    print(f'of which import timm_zzz (adds): {summary(added)}')
    if statistics.median(added) > args.limit:
        sys.exit(f'more than {args.limit} s')


if __name__ == '__main__':
    main()
