"""AdamW with options and regularisers of its own for ZZZ heads, in timm's registry as ``zzzadamw``."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from timm.optim import OptimInfo
from torch import Tensor, nn

from . import _timm
from .functional import orthonormal_basis
from .head import ZZZHead, live_heads

__all__ = ['ZZZAdamW', 'mean_decoupling', 'variance_shrinkage']

# Of a head's parameters those that weight decay may pull towards zero
_DECAYED = ('weight', 'A')


def variance_shrinkage(head: ZZZHead) -> Tensor:
    """The mean over classes of the sum of the variances v along the basis, (), to keep them from growing without bound.

    Add a multiple of it to the loss; ``zzzadamw`` takes the multiple as ``v_shrinkage``. 0 at rank 0.
    """
    if head.v_raw is None:
        return head.weight.new_zeros(())
    return (nn.functional.softplus(head.v_raw.float()) + head.v_min).sum(1).mean()


def mean_decoupling(head: ZZZHead) -> Tensor:
    """The mean over classes of |U_c^T mu_c|^2, (), between 0 and 1: how much of the mean lies in its class's subspace.

    Add a multiple of it to the loss; ``zzzadamw`` takes the multiple as ``mu_decoupling``. 0 at rank 0.
    """
    if head.A is None:
        return head.weight.new_zeros(())
    with torch.autocast(head.A.device.type, enabled=False):
        mu = nn.functional.normalize(head.weight.float(), dim=1)
        return torch.einsum('cdr,cd->cr', orthonormal_basis(head.A.float()), mu).square().sum(1).mean()


class ZZZAdamW(torch.optim.AdamW):
    """AdamW that treats the parameters of ZZZ heads apart from the others, in timm's scripts ``opt: zzzadamw``.

    Every parameter group is split into the head's parameters and the rest. A group of the head has the learning rate of
    the group that it comes from times ``head_lr_scale``, which every scheduler keeps, and ``head_weight_decay``; v_raw,
    sigma2_raw and bias are never decayed. The regularisers' gradients are added where the step is taken: after loss
    scaling is undone and gradients are clipped, once per step whatever the number of accumulated batches.

    Args:
        params: Parameters or parameter groups of a model with at least one ZZZ head.
        lr: Learning rate of what is no ZZZ head.
        betas, eps, weight_decay, kwargs: As in :class:`torch.optim.AdamW`.
        head_lr_scale: Factor of the head's learning rate, > 0.
        head_weight_decay: Weight decay of the class means and of A, >= 0; that of their group if None.
        v_shrinkage: Multiple of :func:`variance_shrinkage` in the loss, >= 0.
        mu_decoupling: Multiple of :func:`mean_decoupling` in the loss, >= 0.

    Raises:
        ValueError: For an argument out of its range, or if no parameter belongs to a ZZZ head: copy or load a model
            before the optimiser is made, not between.

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
        v_shrinkage: float = 0.0,
        mu_decoupling: float = 0.0,
        **kwargs: Any,
    ):
        if not head_lr_scale > 0:
            raise ValueError(f'head_lr_scale: expected a number > 0, got {head_lr_scale}')
        numbers = dict(head_weight_decay=head_weight_decay, v_shrinkage=v_shrinkage, mu_decoupling=mu_decoupling)
        for name, value in numbers.items():
            if value is not None and not value >= 0:
                raise ValueError(f'{name}: expected a number >= 0, got {value}')
        self._head_options = head_lr_scale, head_weight_decay
        self._penalties = dict(v_shrinkage=v_shrinkage, mu_decoupling=mu_decoupling)
        self._any_head = False
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs)
        if not self._any_head:
            raise ValueError(
                'zzzadamw: none of the parameters belongs to a ZZZ head; name a model with .zzz_rN, or take adamw'
            )
        if any(self._penalties.values()):
            self._heads()
            self._step_supports_amp_scaling = False  # so that a GradScaler unscales before the step, also a fused one

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        params = param_group['params']
        params = [params] if isinstance(params, Tensor) else list(params)
        lr_scale, decay = self._head_options
        # A mark stays where the module is gone, as after torch.jit.script; the module is there where the mark is lost,
        # as after load_state_dict(assign=True).
        roles = {id(p): name for head in live_heads() for name, p in head.named_parameters(recurse=False)}
        parts: Dict[str, List[Any]] = {'rest': [], 'decayed': [], 'kept': []}
        for p in params:
            tensor = p[1] if isinstance(p, tuple) else p
            role = getattr(tensor, 'zzz_role', None) or roles.get(id(tensor))
            parts['rest' if role is None else 'decayed' if role in _DECAYED else 'kept'].append(p)
        for part, members in parts.items():
            if not members and (part != 'rest' or params):
                continue
            group = dict(param_group, params=members)
            if part != 'rest':
                self._any_head = True
                group['lr'] = param_group.get('lr', self.defaults['lr']) * lr_scale
                if part == 'kept':
                    group['weight_decay'] = 0.0
                elif decay is not None:
                    group['weight_decay'] = decay
            super().add_param_group(group)

    def _heads(self) -> List[ZZZHead]:
        mine = {id(p) for group in self.param_groups for p in group['params']}
        heads = [head for head in live_heads() if id(head.weight) in mine]
        if not heads:
            raise ValueError('zzzadamw: the regularisers need the ZZZ head as a module, not a scripted or copied one')
        return heads

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Add the regularisers' gradients and take a step."""
        if not any(self._penalties.values()):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for head in self._heads():
            parameters = [p for p in head.parameters() if p.requires_grad]
            penalty = head.weight.new_zeros(())
            with torch.enable_grad():
                if self._penalties['v_shrinkage']:
                    penalty = penalty + self._penalties['v_shrinkage'] * variance_shrinkage(head)
                if self._penalties['mu_decoupling']:  # takes the bases
                    penalty = penalty + self._penalties['mu_decoupling'] * mean_decoupling(head)
            if not penalty.requires_grad:
                continue
            grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad.add_(grad)
        super().step()
        return loss

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), '_head_options': self._head_options, '_penalties': self._penalties}


def register_optimizer() -> None:
    """Make timm know ``zzzadamw``; importing timm_zzz did."""
    info = OptimInfo(
        name='zzzadamw',
        opt_class=ZZZAdamW,
        description='AdamW with its own learning rate, weight decay and regularisers for ZZZ heads',
        has_betas=True,
    )
    _timm.optimizer_registry().register(info)
