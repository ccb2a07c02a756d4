"""One run: a timm backbone with one of the heads, trained on images in memory."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, Generator, List, NamedTuple, Optional, Tuple, TypeVar

import timm
import torch
from baselines import CosineHead
from images import Images, batches, center_boxes, crop, jitter, random_boxes
from starts import HeadSpec, build, needs_features, parameter_groups, refit
from timm.data import resolve_data_config
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn import functional as F

_EVAL_BATCH = 512
_AHEAD = 50  # steps that are launched before the first of them has to be done

T = TypeVar('T')
Run = Generator[None, None, T]  # stops where other runs may go on, and returns a T


class Backbone(NamedTuple):
    """A timm model, where its weights are, and the side of its images, pixels; 0 and '': as timm has them."""

    name: str
    checkpoint: str = ''
    size: int = 0


@dataclass(frozen=True)
class Settings:
    """Hold the settings that all heads of a comparison share."""

    epochs: int
    min_steps: int = 0  # more epochs where a small set would give fewer steps
    batch_size: int = 64
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    smoothing: float = 0.1
    scale: Tuple[float, float] = (0.35, 1.0)
    color_jitter: float = 0.2
    compiled: bool = False  # the backbone's training step, by torch.compile


def create(backbone: Backbone, num_classes: int = 0) -> Any:
    """Create the timm model with its weights, and with a new classifier or none."""
    overlay: Any = dict(num_classes=-1)
    if backbone.checkpoint:
        overlay['file'] = backbone.checkpoint
    options: Any = dict(num_classes=num_classes, pretrained_cfg_overlay=overlay)
    cfg = timm.get_pretrained_cfg(backbone.name)
    if backbone.size and cfg is not None and cfg.fixed_input_size:
        options['img_size'] = backbone.size
    return timm.create_model(backbone.name, pretrained=True, **options)


def _features(model: Any, x: Tensor) -> Any:
    return model.forward_features(x)


class Runner:
    """A backbone on a device, and how its images are cropped."""

    def __init__(self, backbone: Backbone, settings: Settings, device: torch.device):
        self.backbone, self.settings, self.device = backbone, settings, device
        self.model = create(backbone).to(device, memory_format=torch.channels_last)
        config = resolve_data_config({}, model=self.model)
        self.features = torch.compile(_features, dynamic=False) if settings.compiled else _features
        self.heads: Dict[Tuple[int, HeadSpec, int], Tuple[Images, nn.Module]] = {}
        self.embedded: Dict[int, Tuple[Images, Tensor]] = {}
        self.size, self.crop_pct = backbone.size or config['input_size'][-1], config['crop_pct']
        self.mean, self.std = (torch.tensor(config[k], device=device).view(1, 3, 1, 1) for k in ('mean', 'std'))

    def autocast(self) -> torch.autocast:
        # The cache of weights would be filled while a CUDA graph is captured, and go stale
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == 'cuda', cache_enabled=False)

    def embed(self, model: Any, images: Images, crop_pct: Optional[float] = None) -> Tensor:
        """Compute the pooled embeddings (N, d) of the middle of each image, float32.

        Args:
            crop_pct: Side of that as a part of the short side; the model's own if None.
        """
        crop_pct = self.crop_pct if crop_pct is None else crop_pct
        model.eval()
        parts = []
        with torch.inference_mode():
            for index in torch.arange(len(images), device=self.device).split(_EVAL_BATCH):
                x = crop(images, index, center_boxes(images, index, crop_pct), self.size, self.mean, self.std)
                x = x.contiguous(memory_format=torch.channels_last)
                with self.autocast():  # not of the crops, whose places it would round to 8 bits
                    features = model.forward_head(model.forward_features(x), pre_logits=True)
                parts.append(features.float())
        return torch.cat(parts).clone()

    def frozen(self, images: Images) -> Tensor:
        """Compute the embeddings (N, d) before any training, once for all heads."""
        if id(images) not in self.embedded:
            self.embedded[id(images)] = images, self.embed(self.model, images)
            if self.device.type == 'cuda':
                torch.cuda.current_stream().synchronize()
        return self.embedded[id(images)][1]

    def start(self, images: Images, spec: HeadSpec, seed: int) -> Tuple[Any, Any]:
        """Create the backbone with the head in its place; returns the model and that head."""
        random_seed(seed)
        num_classes, path = len(images.classes), self.model.pretrained_cfg['classifier']
        if spec.kind == 'linear' and not spec.rows:
            model = create(self.backbone, num_classes).to(self.device, memory_format=torch.channels_last)
            return model, model.get_submodule(path)
        model = copy.deepcopy(self.model)
        head = self._head(images, spec, seed)
        model.set_submodule(path, head)
        return model, head

    def _head(self, images: Images, spec: HeadSpec, seed: int) -> nn.Module:
        """Build a head, or copy the one that was built for a run of the same images and other learning rates."""
        key = (id(images), spec, seed)
        if key not in self.heads:
            if needs_features(spec):
                features = self.frozen(images)
            else:
                features = torch.zeros(1, self.model.head_hidden_size, device=self.device)
            self.heads[key] = images, build(spec, features, images.target, len(images.classes))
            if self.device.type == 'cuda':
                torch.cuda.current_stream().synchronize()
        return copy.deepcopy(self.heads[key][1])

    def train(self, images: Images, spec: HeadSpec, seed: int, lr: float, head_lr: float = 1.0) -> Run[Tuple[Any, Any]]:
        """Train a head with its backbone; returns the model and that head. On a GPU, within :func:`own_stream`.

        Yields whenever steps have been launched, so that runs on other streams fill the GPU meanwhile.

        Args:
            lr: Learning rate of the backbone.
            head_lr: Factor on it for the head.
        """
        model, head = self.start(images, spec, seed)
        if not spec.train:
            return model, head
        steps = -(-len(images) // self.settings.batch_size)
        epochs = max(self.settings.epochs, -(-self.settings.min_steps // steps))
        groups = parameter_groups(model, head, spec, lr, head_lr, self.settings.weight_decay)
        rates = learning_rates([group['lr'] for group in groups], epochs, steps, self.settings)
        loop = _Loop(self, model, head, images, groups, rates.to(self.device), seed)
        for i in range(epochs * steps):
            loop.step()
            if self.device.type == 'cuda' and i % _AHEAD == 0:
                yield
                torch.cuda.current_stream().synchronize()
        loop.close()
        if spec.refit:
            refit(spec, head, self.embed(model, images), images.target)
        return model, head


def learning_rates(peaks: List[float], epochs: int, steps: int, settings: Settings) -> Tensor:
    """Compute what timm's cosine schedule gives each group of parameters, (steps in all, groups), float32."""
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=peak) for peak in peaks]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=min(settings.warmup_epochs, epochs // 2),
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    found = []
    for step in range(epochs * steps):
        scheduler.step_update(step)
        found.append([group['lr'] for group in optimizer.param_groups])
    return torch.tensor(found)


class _Loop:
    """The steps of a run. Number, batch and learning rates of a step lie on the device; on a GPU it is one CUDA graph.

    Small backbones would be bound by launches otherwise, and several runs on one GPU by each other's.
    """

    def __init__(self, runner: Runner, model: Any, head: Any, images: Images, groups: Any, rates: Tensor, seed: int):
        self.runner, self.model, self.head, self.images, self.rates = runner, model, head, images, rates
        device, batch_size = runner.device, runner.settings.batch_size
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = rates[0].clone()
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate[0], fused=True, capturable=device.type == 'cuda')
        for i, group in enumerate(self.optimizer.param_groups):
            group['lr'] = self.rate[i]
        self.generator = torch.Generator(device).manual_seed(seed)
        order: List[Tensor] = []
        while len(order) < len(rates):
            order += batches(len(images), batch_size, self.generator)
        self.order = torch.stack(order)
        self.graph: Any = None
        model.train()
        if device.type == 'cuda':
            self._capture()

    def step(self) -> None:
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()

    def close(self) -> None:
        """Give the graph's memory back."""
        if self.graph is not None:
            torch.cuda.current_stream().synchronize()
            self.graph.reset()
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _compute(self) -> None:
        runner, images, settings = self.runner, self.images, self.runner.settings
        index = self.order.index_select(0, self.number)[0]
        self.rate.copy_(self.rates.index_select(0, self.number)[0])
        boxes = random_boxes(images, index, settings.scale, self.generator)
        x = crop(images, index, boxes, runner.size, runner.mean, runner.std)
        x = jitter(x, settings.color_jitter, self.generator).contiguous(memory_format=torch.channels_last)
        target = images.target.index_select(0, index)
        if self.graph is None:
            self.optimizer.zero_grad()
        with runner.autocast():
            logits = self.model.forward_head(runner.features(self.model, x)).float()
        if isinstance(self.head, CosineHead):
            logits = self.head.with_margin(logits, target)
        F.cross_entropy(logits, target, label_smoothing=settings.smoothing).backward()
        self.optimizer.step()
        self.number += 1

    def _capture(self) -> None:
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        rates, self.rates = self.rates, torch.zeros_like(self.rates)
        generator = self.generator.get_state()
        for _ in range(3):
            self._compute()
        self.optimizer.zero_grad()
        self.rates = rates
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        self.graph = graph
        graph.capture_begin()
        try:
            self._compute()
        finally:
            graph.capture_end()
        # What those steps moved: statistics of batch norms, the optimiser's averages, the numbers drawn
        with torch.no_grad():
            for k, v in self.model.state_dict().items():
                v.copy_(state[k])
            for moments in self.optimizer.state.values():
                for v in moments.values():
                    v.zero_()
            self.number.zero_()
        self.generator.set_state(generator)


def finish(run: Run[T]) -> T:
    """Run to the end, and return what is returned there."""
    while True:
        try:
            next(run)
        except StopIteration as e:
            return e.value


def own_stream(device: torch.device) -> ContextManager[Any]:
    """Enter a CUDA stream other than the default one, which a graph can't be captured in; nothing elsewhere."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == 'cuda' else contextlib.nullcontext()
