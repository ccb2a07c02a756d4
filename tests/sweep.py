"""Every architecture of timm with a ZZZ head beside its own: ``python tests/sweep.py [--sample N] [--out FILE]``.

On the meta device, so it checks shapes and structure, not values; prints a table by kind of classifier.
"""

import argparse
import collections
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
import torch
from torch import nn

import timm_zzz
from timm_zzz.models.attach import find_classifiers

CLASSES, RANK = 10, 8
RESETS: Tuple[Tuple[Any, ...], ...] = ((7,), (0,), (7, 'avg'))


def sample(size: int, seed: int = 0) -> List[str]:
    """Draw some of timm's architectures."""
    return random.Random(seed).sample(timm.list_models(), size)


def structure(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return tuple(out.shape), str(out.dtype)
    if isinstance(out, (tuple, list)):
        return [structure(part) for part in out]
    if isinstance(out, dict):
        return {key: structure(part) for key, part in out.items()}
    return type(out).__name__


def attempt(function: Any, *args: Any) -> Tuple[str, Any]:
    """What a call gives, by structure, or the type of its exception."""
    try:
        return 'gives', structure(function(*args))
    except Exception as e:
        return 'raises', type(e).__name__


def kind(model: nn.Module, heads: Dict[str, nn.Module]) -> str:
    """How the classifiers hang in a model: their paths, with numbers and convolutions marked."""
    conv = any(isinstance(head, timm_zzz.head.ZZZConvHead) for head in heads.values())
    return ' + '.join(heads) + (' (1x1 convolution)' if conv else '')


def check(name: str) -> Dict[str, Any]:
    """Compare an architecture's ZZZ twin with it; raises an AssertionError that says where they differ."""
    start = time.perf_counter()
    result: Dict[str, Any] = dict(name=name)
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = timm.create_model(name, num_classes=CLASSES)
        result['family'] = type(plain).__module__.rpartition('.')[2]
        try:
            model = timm.create_model(f'{name}.zzz_r{RANK}', num_classes=CLASSES)
        except ValueError as e:
            assert name in str(e) and 'no classifier' in str(e), str(e)
            assert not hasattr(plain, 'get_classifier'), str(e)
            return dict(result, kind='none', outcome='ValueError: no classifier', seconds=time.perf_counter() - start)
        both = plain, model
        heads = find_classifiers(model)
        result['kind'] = kind(model, heads)
        assert heads and all(isinstance(head, timm_zzz.ZZZHead) for head in heads.values()), list(heads)
        assert list(heads) == list(find_classifiers(plain))
        images = torch.randn(2, *plain.pretrained_cfg['input_size'])
        outputs = 0
        for mode in (False, True):
            for m in both:
                m.train(mode)
            expected, actual = (attempt(m, images) for m in both)
            assert actual == expected, f'train={mode}: {actual}, timm {expected}'
            outputs += expected[0] == 'gives'
        if hasattr(plain, 'set_distilled_training'):
            for m in both:
                m.set_distilled_training(True)
            expected, actual = (attempt(m, images) for m in both)
            assert actual == expected, f'distilled: {actual}, timm {expected}'
            for m in both:
                m.set_distilled_training(False)
        for m in both:
            m.eval()
        try:
            features = [m.forward_features(images) for m in both]
        except Exception:
            features = []
        for args in RESETS:
            expected, actual = (attempt(m.reset_classifier, *args) for m in both)
            assert actual == expected, f'reset_classifier{args}: {actual}, timm {expected}'
            if expected[0] == 'raises':
                continue
            assert model.num_classes == plain.num_classes == args[0]
            heads = find_classifiers(model)
            assert all(isinstance(h, timm_zzz.ZZZHead) and h.num_classes == args[0] for h in heads.values())
            assert list(heads) == list(find_classifiers(plain)), f'reset_classifier{args}'
            if features:
                expected, actual = (attempt(m.forward_head, f) for m, f in zip(both, features, strict=True))
                assert actual == expected, f'after reset_classifier{args}: {actual}, timm {expected}'
                outputs += expected[0] == 'gives'
    result['outcome'] = 'passes' if outputs else 'passes, without outputs (no meta kernels)'
    return dict(result, seconds=time.perf_counter() - start)


def result_of(name: str) -> Dict[str, Any]:
    """What :func:`check` returns, or an outcome that begins with FAILS and says how."""
    try:
        return check(name)
    except Exception as e:
        return dict(name=name, family='', kind='', outcome=f'FAILS: {type(e).__name__}: {e}'[:400], seconds=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sample', type=int, help='this many architectures instead of all')
    parser.add_argument('--seed', type=int, default=0, help='of the sample (default: %(default)s)')
    parser.add_argument('--part', default='0/1', help='K/N: every N-th from the K-th, to share the work')
    parser.add_argument('--out', type=Path, help='a line of JSON for each, written as they come; what is there is kept')
    args = parser.parse_args()
    names = sample(args.sample, args.seed) if args.sample else timm.list_models()
    k, n = map(int, args.part.split('/'))
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    known = {r['name'] for r in results}
    for name in [name for name in names[k::n] if name not in known]:
        results.append(result_of(name))
        if results[-1]['outcome'].startswith('FAILS'):
            print(name, results[-1]['outcome'], flush=True)
        if args.out:
            with args.out.open('a') as f:
                f.write(json.dumps(results[-1]) + '\n')
    print(f'timm {timm.__version__}, torch {torch.__version__}, {len(results)} of {len(timm.list_models())}')
    groups: Dict[Tuple[str, str], List[Dict[str, Any]]] = collections.defaultdict(list)
    for r in results:
        groups[r['kind'], r['outcome']].append(r)
    print('| classifier | count | families | outcome | seconds |\n|---|---|---|---|---|')
    for (classifier, outcome), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        families = sorted({r['family'] for r in found})
        shown = ', '.join(families[:6]) + (f', {len(families) - 6} more' if len(families) > 6 else '')
        print(f'| {classifier} | {len(found)} | {shown} | {outcome} | {sum(r["seconds"] for r in found):.0f} |')


if __name__ == '__main__':
    main()
