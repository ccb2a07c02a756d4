"""Export a model to ONNX, with its head as one matrix product, for programs without this package."""

import logging
import warnings
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..errors import one_line
from ..models._timm import input_config

__all__ = ['export_onnx']


def export_onnx(model: nn.Module, path: Path, data_config: Optional[Dict[str, Any]] = None) -> None:
    """Export a fused copy of a model, in eval mode and float32, by timm's ``onnx_export``; the model is not changed.

    The input ``input0`` has shape (B, channels, height, width) for any B; the output ``output0`` is that of the model,
    logits of shape (B, C).

    Args:
        data_config: As in :func:`~timm_zzz.save_pretrained`; determines the size of the images.

    Raises:
        ValueError: If onnx or onnxscript is missing, or if the model can't be exported.
    """
    from timm.utils.onnx import onnx_export

    size = input_config(model, data_config)['input_size']
    fused = reparameterize_model(model).cpu().float()
    level, log = logging.getLogger('torch.onnx').level, logging.getLogger('torch.onnx')
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # warnings of the tracer
            onnx_export(fused, str(path), torch.zeros(2, *size))
    except ImportError as e:
        raise ValueError(f'--onnx: pip install "timm_zzz[onnx]" ({e})') from e
    except Exception as e:  # the exporter may raise anything
        raise ValueError(f"--onnx: the model can't be exported: {one_line(e)}") from e
    finally:
        log.setLevel(level)
