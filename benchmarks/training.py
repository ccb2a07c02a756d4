"""One run: a timm backbone with one of the heads, trained on images in memory."""

import time
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import timm
import torch
from images import Images, batches, center_boxes, crop, jitter, random_boxes
from starts import HeadSpec, build, needs_features, parameter_groups
from timm.data import resolve_data_config
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn import functional as F

from timm_zzz.head import ZZZHead
from timm_zzz.metrics import Predictions, evaluate
from timm_zzz.optim import mean_decoupling, variance_shrinkage
from timm_zzz.scores import class_gaussians_of

_EVAL_BATCH = 512


@dataclass(frozen=True)
class Settings:
    """Hold the settings that all heads of a comparison share."""

    backbone: str
    checkpoint: Optional[str]
    epochs: int
    batch_size: int = 64
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    smoothing: float = 0.1
    scale: Tuple[float, float] = (0.35, 1.0)
    color_jitter: float = 0.2
    min_steps: int = 0  # more epochs where a small set would give fewer steps


def backbone(settings: Settings, num_classes: int = 0) -> nn.Module:
    """The timm model without its classifier, with the checkpoint's weights or, without one, timm's pretrained ones."""
    overlay: Any = dict(num_classes=-1)
    if settings.checkpoint:
        overlay['file'] = settings.checkpoint
    return timm.create_model(
        settings.backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
    )


class Runner:
    """Images of one set on a device, and what its crops need."""

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        config = resolve_data_config({}, model=backbone(settings))
        self.size, self.crop_pct = config['input_size'][-1], config['crop_pct']
        self.mean, self.std = (torch.tensor(config[k], device=device).view(1, 3, 1, 1) for k in ('mean', 'std'))

    def _autocast(self) -> torch.autocast:
        # The cache of weights would be filled while a CUDA graph is captured, and go stale
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == 'cuda', cache_enabled=False)

    def embed(self, model: nn.Module, images: Images) -> Tensor:
        """The backbone's pooled embeddings (N, d) of the middle of each image, float32."""
        model.eval()
        parts = []
        with torch.inference_mode(), self._autocast():
            for index in torch.arange(len(images), device=self.device).split(_EVAL_BATCH):
                x = crop(images, index, center_boxes(images, index, self.crop_pct), self.size, self.mean, self.std)
                x = x.contiguous(memory_format=torch.channels_last)
                parts.append(model.forward_head(model.forward_features(x), pre_logits=True).float())  # type: ignore
        return torch.cat(parts).clone()

    def start(self, train_images: Images, spec: HeadSpec, seed: int) -> Tuple[nn.Module, nn.Module]:
        """Backbone with the head in its place, and that head."""
        random_seed(seed)
        num_classes = len(train_images.classes)
        model: Any = backbone(self.settings, num_classes).to(self.device, memory_format=torch.channels_last)
        path = model.pretrained_cfg['classifier']
        if needs_features(spec):
            features = self.embed(model, train_images)
        else:
            features = torch.zeros(1, model.head_hidden_size, device=self.device)
        layers = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(f'{path}.')]
        layer = next((p.detach() for p in reversed(layers) if len(p) == features.shape[1]), None)
        head = build(spec, features, train_images.target, num_classes, layer)
        model.set_submodule(path, head)
        return model, head

    def train(
        self, train_images: Images, spec: HeadSpec, seed: int, watch: Any = None
    ) -> Tuple[nn.Module, nn.Module, float]:
        """Train; ``watch(epoch, model)`` is called after every epoch. Returns model, head and seconds of training."""
        model, head = self.start(train_images, spec, seed)
        if not spec.train:
            return model, head, 0.0
        settings = self.settings
        generator = torch.Generator(self.device).manual_seed(seed)
        steps = -(-len(train_images) // settings.batch_size)
        epochs = max(settings.epochs, -(-settings.min_steps // steps))
        groups = parameter_groups(model, head, spec, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, fused=self.device.type == 'cuda')
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=epochs,
            warmup_epochs=min(settings.warmup_epochs, epochs // 2),
            warmup_lr=0.0,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        scheduler.step_update(0)
        step = self._step(model, head, spec, train_images)
        seconds = 0.0
        for epoch in range(epochs):
            model.train()
            start = time.perf_counter()
            for i, index in enumerate(batches(len(train_images), settings.batch_size, generator)):
                boxes = random_boxes(train_images, index, settings.scale, generator)
                x = crop(train_images, index, boxes, self.size, self.mean, self.std)
                x = jitter(x, settings.color_jitter, generator)
                step(x.contiguous(memory_format=torch.channels_last), train_images.target[index])
                optimizer.step()
                scheduler.step_update(epoch * steps + i + 1)
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            if watch is not None:
                watch(epoch + 1, model)
        return model, head, seconds

    def _step(self, model: nn.Module, head: Any, spec: HeadSpec, images: Images) -> Any:
        """Forward and backward on one batch; on a GPU a CUDA graph of it, or small models would be launch bound."""
        smoothing = self.settings.smoothing

        def compute(x: Tensor, target: Tensor) -> None:
            with self._autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
            if spec.v_shrinkage:
                loss = loss + spec.v_shrinkage * variance_shrinkage(head)
            if spec.mu_decoupling:
                loss = loss + spec.mu_decoupling * mean_decoupling(head)
            loss.backward()

        if self.device.type != 'cuda':

            def eager(x: Tensor, target: Tensor) -> None:
                model.zero_grad()
                compute(x, target)

            return eager
        return _Graph(model, compute, self.settings.batch_size, self.size, self.device)


class _Graph:
    """A CUDA graph of a step; the gradients lie where the graph put them, and every replay overwrites them."""

    def __init__(self, model: nn.Module, compute: Any, batch_size: int, size: int, device: torch.device):
        self.x = torch.zeros(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        self.target = torch.zeros(batch_size, dtype=torch.int64, device=device)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad()
                compute(self.x, self.target)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            compute(self.x, self.target)
        with torch.no_grad():  # the statistics of batch norms saw zeros
            for k, v in model.state_dict().items():
                v.copy_(state[k])

    def __call__(self, x: Tensor, target: Tensor) -> None:
        self.x.copy_(x)
        self.target.copy_(target)
        self.graph.replay()


def predictions(head: nn.Module, features: Tensor, target: Tensor) -> Predictions:
    """Predict the classes of embeddings (N, d) with a head."""
    return evaluate(head, zip(features.split(_EVAL_BATCH), target.split(_EVAL_BATCH), strict=True), features.device)


def spectrum(head: nn.Module) -> Dict[str, Any]:
    """Describe a ZZZ head: sigma2, the mean cosine of two means, and quantiles over classes of the sorted variances."""
    if not isinstance(head, ZZZHead):
        return {}
    classes, count = class_gaussians_of(head), head.num_classes
    cosines = classes.mu.double().sum(0).square().sum() - count
    result: Dict[str, Any] = dict(
        sigma2=classes.sigma2.item(), mean_cosine=(cosines / max(1, count * (count - 1))).item()
    )
    if classes.v is not None:
        v = classes.v.sort(1, descending=True)[0]
        result['v'] = v.quantile(torch.tensor([0.1, 0.5, 0.9], device=v.device), 0).T.tolist()
    return result
