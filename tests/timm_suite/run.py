"""Run timm's own tests, of the source distribution of the installed timm, on linear and on ZZZ heads, and compare.

    python tests/timm_suite/run.py [--plain | --modes M,M] [--sample N] [--seed S] [--files F,F] [--out DIR] [...]

Other arguments go to pytest. Exits with 1 if a test passes in a mode but not in the next, or fails where only one mode
runs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

FILES = (
    'test_models.py',
    'test_factory.py',
    'test_checkpoint_loading.py',
    'test_hub.py',
    'test_model_input.py',
    'test_optim.py',
    'test_task.py',
)
MODES = ('bare', 'plain', 'zzz')
OUTCOMES = ('passed', 'failed', 'left out', 'skipped')
COLLECTED = (0, 1, 5)  # pytest's exit codes: all passed, some failed, none selected

Results = Dict[str, Dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--modes', default='plain,zzz', help='bare: timm alone, plain: with timm_zzz imported, zzz')
    parser.add_argument('--plain', action='store_const', dest='modes', const='plain', help='linear heads only')
    parser.add_argument('--files', default=','.join(FILES), help='of: %(default)s')
    parser.add_argument(
        '--sample', type=int, metavar='N', help='draw N architectures for the tests that sweep over all'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the sample (default: %(default)s)')
    parser.add_argument('--big', action='store_true', help="also the models that timm's own CI leaves out as too big")
    parser.add_argument('--cache', type=Path, default=_default_cache(), help="where timm's tests are put (%(default)s)")
    parser.add_argument('--out', type=Path, help='where results and logs are put; default: in the cache')
    args, pytest_args = parser.parse_known_args()
    modes = args.modes.split(',')
    if not set(modes) <= set(MODES):
        parser.error(f'--modes: expected some of {", ".join(MODES)}')
    out = (args.out or args.cache / 'out').resolve()
    out.mkdir(parents=True, exist_ok=True)

    root = fetch_tests(args.cache.resolve())
    files = [name for name in args.files.split(',') if (root / 'tests' / name).exists()]
    missing = [name for name in args.files.split(',') if name not in files]
    packages = ', '.join(f'{name} {version(name)}' for name in ('timm', 'torch', 'timm_zzz', 'pytest'))
    print(f'{packages}, Python {sys.version.split()[0]}')
    if missing:
        print(f'not in the source distribution: {", ".join(missing)}')
    if args.sample is not None:
        print(f'{args.sample} architectures drawn with seed {args.seed}')

    options = [*pytest_args, f'--zzz-seed={args.seed}']
    if args.sample is not None:
        options.append(f'--zzz-sample={args.sample}')
    results: Dict[str, Dict[str, Results]] = {mode: {} for mode in modes}
    seconds: Dict[str, Dict[str, float]] = {mode: {} for mode in modes}
    broken = []
    for file in files:
        for mode in modes:
            start = time.monotonic()
            code, results[mode][file] = run_file(root, file, mode, options, out, args.cache.resolve(), args.big)
            seconds[mode][file] = time.monotonic() - start
            if code not in COLLECTED:
                broken.append(f'{file} ({mode}): pytest exited with {code}')
    report = _table(files, modes, results, seconds)
    (out / 'table.md').write_text(report + '\n')
    print(report)
    print(_left_out(modes, results))
    lost = _lost(files, modes, results)
    if len(modes) == 1:  # nothing to compare with
        lost = [
            f'{record["test"]}: failed: {record["why"].partition(chr(10))[0]}'
            for file_results in results[modes[0]].values()
            for record in file_results.values()
            if record['outcome'] == 'failed'
        ]
    print('\n'.join([*broken, *lost]) or 'Nothing fails that passed before.')
    return 1 if broken or lost else 0


def _default_cache() -> Path:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_zzz' / 'timm_suite'


def fetch_tests(cache: Path) -> Path:
    """Unpack the tests of the installed timm's source distribution, which pip downloads, and return their folder."""
    name = f'timm-{version("timm")}'
    root = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    if not (root / 'tests').exists():
        requirement = name.replace('-', '==', 1)
        subprocess.run(
            [*pip, 'download', '--no-deps', '--no-binary', 'timm', '--dest', str(cache), requirement], check=True
        )
        with tarfile.open(cache / f'{name}.tar.gz') as archive:
            wanted = [m for m in archive if m.name.startswith(f'{name}/tests/') or m.name == f'{name}/pyproject.toml']
            archive.extractall(cache, wanted, filter='data')
    # torch's own test classes, which test_optim.py uses, need it
    if importlib.util.find_spec('expecttest') is None and not (cache / 'site').exists():
        subprocess.run([*pip, 'install', '--no-deps', '--target', str(cache / 'site'), 'expecttest'], check=True)
    return root


def run_file(
    root: Path, file: str, mode: str, options: Sequence[str], out: Path, cache: Path, big: bool
) -> Tuple[int, Results]:
    """Run one file of timm's tests in a process of its own; the exit code and what became of each test."""
    records = out / f'{Path(file).stem}.{mode}.jsonl'
    records.unlink(missing_ok=True)
    path = [str(Path(__file__).resolve().parent.parent), str(cache / 'site'), os.environ.get('PYTHONPATH')]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)), HF_HUB_OFFLINE='1')
    env.pop('GITHUB_ACTIONS', None)
    if not big:
        env['GITHUB_ACTIONS'] = 'true'  # by which timm's tests choose their shorter lists
    command = [sys.executable, '-m', 'pytest', f'tests/{file}', '-q', '-W', 'ignore', '-p', 'no:cacheprovider']
    command += ['-p', 'timm_suite.plugin', f'--zzz-mode={mode}', f'--zzz-results={records}', *options]
    with (out / f'{Path(file).stem}.{mode}.log').open('w') as log:
        code = subprocess.run(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    lines = records.read_text().splitlines() if records.exists() else []
    return code, {record['test']: record for record in map(json.loads, lines)}


def _table(files: List[str], modes: List[str], results: dict, seconds: dict) -> str:
    lines = [
        '| file | ' + ' | '.join(f'{mode}: passed / failed / left out / skipped, s' for mode in modes) + ' |',
        '|' + '---|' * (len(modes) + 1),
    ]
    totals = {mode: Counter() for mode in modes}
    for file in files:
        cells = []
        for mode in modes:
            counts = Counter(record['outcome'] for record in results[mode][file].values())
            totals[mode].update(counts)
            cells.append(_cell(counts, seconds[mode][file]))
        lines.append(f'| {file} | ' + ' | '.join(cells) + ' |')
    cells = [_cell(totals[mode], sum(seconds[mode].values())) for mode in modes]
    return '\n'.join([*lines, '| all | ' + ' | '.join(cells) + ' |'])


def _cell(counts: Counter, seconds: float) -> str:
    return ' / '.join(str(counts[outcome]) for outcome in OUTCOMES) + f', {seconds:.0f} s'


def _left_out(modes: List[str], results: dict) -> str:
    """Each reason for leaving tests out, with their number in each mode."""
    counts: Dict[str, Counter] = {}
    for mode in modes:
        for file_results in results[mode].values():
            for record in file_results.values():
                why = record['why'] if record['outcome'] == 'left out' else record['unchecked']
                if why:
                    counts.setdefault(why, Counter())[mode] += 1
    return '\n'.join(
        ['Left out:']
        + [f'  {why}: ' + ', '.join(f'{n} ({mode})' for mode, n in by.items()) for why, by in sorted(counts.items())]
    )


def _lost(files: List[str], modes: List[str], results: dict) -> List[str]:
    """The tests that pass in a mode, and in the next neither pass nor are left out."""
    lines = []
    for before, after in zip(modes, modes[1:], strict=False):
        for file in files:
            for test, record in results[before][file].items():
                then = results[after][file].get(test, dict(outcome='not run', why=''))
                if record['outcome'] == 'passed' and then['outcome'] not in ('passed', 'left out'):
                    why = then['why'].splitlines()
                    lines.append(f'{test}: passes {before}, {then["outcome"]} {after}: {why[0] if why else ""}')
    return lines


if __name__ == '__main__':
    sys.exit(main())
