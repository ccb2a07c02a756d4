"""AdamW with separate options for ZZZ heads, registered with timm as ``zzzadamw``."""

import inspect
import logging
import math
import numbers
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.optim import OptimInfo
from torch import Tensor

__all__ = ['ZZZAdamW']

_logger = logging.getLogger(__name__)

# The parameters of a head that weight decay applies to
_DECAYED = ('weight', 'A')


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise ValueError(f'{name}: expected a finite number {">" if positive else ">="} 0, got {value!r}')


class ZZZAdamW(torch.optim.AdamW):
    """AdamW with separate options for the parameters of ZZZ heads; ``opt: zzzadamw`` in timm's scripts.

    Every parameter group is split into the head's parameters and the rest. The head's groups have the learning rate of
    their original group times ``head_lr_scale``, and ``head_weight_decay``; v_raw, sigma2_raw and bias are never
    decayed.

    ``head_lr_scale`` is also the ``lr_scale`` of these groups, by which timm's schedulers multiply all learning rates,
    those from ``warmup_lr`` and ``min_lr`` included. torch's schedulers keep the factor if they continue from ``lr``.
    Those that start from ``initial_lr`` (LambdaLR, SequentialLR, CosineAnnealingWarmRestarts) lose it, and a warning
    says so.

    Args:
        params: Parameters or parameter groups of a model with at least one ZZZ head.
        lr: Learning rate of all parameters outside of ZZZ heads.
        betas, eps, weight_decay, kwargs: As in :class:`torch.optim.AdamW`.
        head_lr_scale: Factor on the learning rate of heads, > 0.
        head_weight_decay: Weight decay of the class means and of A, >= 0; that of their group if None.

    Raises:
        TypeError: For an option that neither this class nor AdamW has.
        ValueError: For an argument out of its range, or if no parameter belongs to a ZZZ head. Copies of its parameters
            do not: copy or load the model first, then create the optimiser.

    Example:
        >>> import timm, timm.optim, timm_zzz
        >>> model = timm.create_model('test_vit.zzz_r4', num_classes=5)
        >>> optimizer = timm.optim.create_optimizer_v2(model, 'zzzadamw', lr=1e-5, head_lr_scale=50.0)
        >>> sorted({group['lr'] for group in optimizer.param_groups})
        [1e-05, 0.0005]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        head_lr_scale: float = 1.0,
        head_weight_decay: Optional[float] = None,
        **kwargs: Any,
    ):
        _check_number('head_lr_scale', head_lr_scale, positive=True)
        if head_weight_decay is not None:
            _check_number('head_weight_decay', head_weight_decay)
        self._head_options = head_lr_scale, head_weight_decay
        own, torchs = inspect.signature(ZZZAdamW).parameters, inspect.signature(torch.optim.AdamW).parameters
        for name in kwargs:
            if name not in torchs:
                options = sorted({*own, *torchs} - {'params', 'kwargs'})
                raise TypeError(f'zzzadamw: unknown option {name} (there are: {", ".join(options)})')

        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs)
        if not any('head_lr_scale' in group for group in self.param_groups):
            raise ValueError(
                'zzzadamw: none of the parameters belongs to a ZZZ head (to one that is not frozen); '
                'name a model with .zzz_rN, or take adamw'
            )
        self.register_step_pre_hook(_before_step)
        agc = '--clip-mode agc leaves out sigma2_raw and bias only: use --clip-mode norm'
        _logger.info(f'zzzadamw: the lr of the head is multiplied by {head_lr_scale:g}. Of its parameters, {agc}.')

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        params = param_group['params']
        if isinstance(params, set):
            return super().add_param_group(param_group)  # it raises a TypeError
        params = [params] if isinstance(params, Tensor) else list(params)
        parts: Dict[str, List[Any]] = {'rest': [], 'decayed': [], 'kept': []}
        for p in params:
            role = getattr(p[1] if isinstance(p, tuple) else p, 'zzz_role', None)
            parts['rest' if role is None else 'decayed' if role in _DECAYED else 'kept'].append(p)
        for part, members in parts.items():
            if members or (part == 'rest' and not params):
                group = dict(param_group, params=members)
                super().add_param_group(group if part == 'rest' else self._head_group(group, part == 'decayed'))

    def _head_group(self, group: Dict[str, Any], decayed: bool) -> Dict[str, Any]:
        scale, decay = self._head_options
        group['head_lr_scale'] = scale
        if scale != 1:
            lr = group.get('lr', self.defaults['lr'])
            group.setdefault('initial_lr', lr.clone() if isinstance(lr, Tensor) else lr)
            group.update(lr=lr * scale, lr_scale=group.get('lr_scale', 1.0) * scale)
        if not decayed:
            group['weight_decay'] = 0.0
        elif decay is not None:
            group['weight_decay'] = decay
        return group

    def _warn_of_lost_scale(self) -> None:
        heads = [group for group in self.param_groups if group.get('head_lr_scale', 1) != 1]
        if not heads:
            return
        rest = {
            (group['initial_lr'], group['lr']): group.get('lr_scale', 1.0)
            for group in self.param_groups
            if 'initial_lr' in group and 'head_lr_scale' not in group
        }
        for group in heads:
            scale = rest.get((group.get('initial_lr'), group['lr']))
            if scale is not None and scale != group['lr_scale'] and group['lr'] > 0:
                warnings.warn(
                    f'zzzadamw: head_lr_scale {group["head_lr_scale"]} has no effect, the scheduler gives head and '
                    'backbone the same learning rate; take one of timm, or multiply by the lr_scale of the groups',
                    stacklevel=2,
                )

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), '_head_options': self._head_options}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if '_head_options' in state:  # a copy or unpickled optimiser, which has no hooks; not load_state_dict
            self.register_step_pre_hook(_before_step)


def _before_step(optimizer: ZZZAdamW, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
    """Run before each step, as a hook: a ``step`` method that called AdamW's would run every other hook twice."""
    optimizer._warn_of_lost_scale()


def register_optimizer() -> None:
    """Register ``zzzadamw`` with timm; importing timm_zzz does this."""
    info = OptimInfo(
        name='zzzadamw',
        opt_class=ZZZAdamW,
        description='AdamW with its own learning rate and weight decay for ZZZ heads',
        has_betas=True,
    )
    optimizer_registry().register(info)


def optimizer_registry() -> Any:
    """Return timm's private registry of optimisers, which ``create_optimizer_v2`` reads."""
    from timm.optim._optim_factory import default_registry

    return default_registry
