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
    """Write a copy of a model, fused, in eval mode and float32, by timm's ``onnx_export``; the model stays as it is.

    Input ``input0`` has shape (B, channels, height, width), any B; output ``output0`` is what the model gives, logits
    of shape (B, C).

    Args:
        data_config: As of :func:`~timm_zzz.save_pretrained`; it has the size of the images.

    Raises:
        ValueError: Without onnx and onnxscript, or if the model can't be exported.
    """
    from timm.utils.onnx import onnx_export

    size = input_config(model, data_config)['input_size']
    fused = reparameterize_model(model).cpu().float()
    level, log = logging.getLogger('torch.onnx').level, logging.getLogger('torch.onnx')
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the tracer
            onnx_export(fused, str(path), torch.zeros(2, *size))
    except ImportError as e:
        raise ValueError(f'--onnx: pip install "timm_zzz[onnx]" ({e})') from e
    except Exception as e:  # whatever the exporter makes of a model
        raise ValueError(f"--onnx: the model can't be exported: {one_line(e)}") from e
    finally:
        log.setLevel(level)
