"""How many floating-point operations does a training step take? It does not travel to the Hub."""

import torch
from torch import nn

from .block_revdeq import RevDEQAttention
from .layer_revdeq import ReversibleFixedPoint, fixed_point_layers
from .modeling_revdeq import RevDEQPreTrainedModel
from .modeling_revdeq_vision import RevDEQForSemanticSegmentation, RevDEQVisionNetwork


def training_flops(model: nn.Module) -> int:
    """Floating-point operations of the last forward pass, with its number of steps and shapes, and of its backward pass.

    Matrix products, convolutions and attention (over all positions, masked or not) are counted, two operations for a multiplication and an addition; a
    backward pass as two forward passes. What a gradient mode evaluates again is not counted, so that modes compare by what they achieve. Of a network
    that is not of this package only its fixed points are counted.

    Returns:
        The operations of this rank; 0 for a model without fixed points, or before its first forward pass.

    Cost: a walk over the modules; nothing is computed on the device.
    """
    layers = [layer for _, layer in fixed_point_layers(model)]
    shapes = [_shape(layer) for layer in layers if layer.statistics is not None]
    if not layers or len(shapes) < len(layers):
        return 0
    total = 0
    for layer, shape in zip(layers, shapes, strict=True):
        assert layer.statistics is not None
        total += layer.statistics.evaluations * _products(layer.block, shape)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module not in inside]
    network = next((module for module in outside if isinstance(module, RevDEQVisionNetwork)), None)
    if network is not None:
        pooled = network.config.downsample == "max_pool"  # whose convolutions work before the resolution falls
        total += _products(network.stem, shapes[0]) * (network.config.stem_stride**2 if pooled else 1)
        total += sum(_products(part, shape) for part, shape in zip(network.downsamples, shapes[:-1] if pooled else shapes[1:], strict=True))
        shape = torch.Size((shapes[0][0], 1))  # a classifier of pooled features
        total += sum(_product(module, shape) for module in outside if isinstance(module, nn.Linear))
        heads = (module.classifier for module in outside if isinstance(module, RevDEQForSemanticSegmentation))
        total += sum(_product(head, shapes[-1]) for head in heads)  # of every pixel
    elif any(isinstance(module, RevDEQPreTrainedModel) for module in outside):
        total += sum(_product(module, shapes[0]) for module in outside)
    return 3 * total


def _shape(layer: ReversibleFixedPoint) -> torch.Size:
    assert layer.statistics is not None
    return layer.statistics.shapes[0]


def _products(module: nn.Module, shape: torch.Size) -> int:
    return sum(_product(part, shape) for part in module.modules())


def _product(module: nn.Module, shape: torch.Size) -> int:
    """Operations of one call on, or for a convolution to, hidden states (batch, seq, channels) or (batch, channels, height, width)."""
    positions = shape.numel() // shape[1 if len(shape) == 4 else -1]
    if isinstance(module, nn.Linear):
        return 2 * positions * module.in_features * module.out_features
    if isinstance(module, nn.Conv2d):
        return 2 * positions * module.weight[0].numel() * module.out_channels
    if isinstance(module, RevDEQAttention):
        return 4 * positions * shape[1] * module.config.num_attention_heads * module.head_dim
    return 0
