"""Linear layers whose products are oneDNN's, in training and in rewards, where PyTorch's own library is slower.

PyTorch takes float32 products on x86 from MKL. oneDNN, which it brings for convolutions, takes half the time on an AMD
EPYC of the Zen 5 generation (``benchmarks/products.py``), where MKL reaches about what vectors of 256 bits allow.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stage_grpo.devices import cpu_vendor


def onednn_available() -> bool:
    """Whether this PyTorch has oneDNN's product of a matrix and a linear layer's weight."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_pays() -> bool:
    """Whether to take oneDNN's float32 products for MKL's: with AVX-512 on a processor that is not Intel's."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return onednn_available() and wide and cpu_vendor() != "GenuineIntel"


def onednn_product(x: Float[Tensor, "*n K"], weight: Any, bias: Tensor | None = None) -> Float[Tensor, "*n N"]:
    """``nn.functional.linear`` in float32 on a CPU, without a gradient; the weight may be laid out for oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` but for the rounding: in float32 on a CPU the products of both passes are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear`` does; other dtypes and devices, autocast and empty batches are left to it."""
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or input.dim() == 1 or not input.numel():
            return super().forward(input)
        product: Any = _Linear.apply(input, self.weight, self.bias)
        return product


def use_onednn(model: nn.Module) -> None:
    """Make every ``nn.Linear`` of a model a :class:`OneDnnLinear`; its parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*n K"], weight: Float[Tensor, "N K"], bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*n N"]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            onednn_product(grad, weight.t()) if for_x else None,
            _transposed_product(grad.flatten(0, -2), x.flatten(0, -2)) if for_weight else None,
            grad.flatten(0, -2).sum(dim=0) if for_bias else None,
        )


def _transposed_product(a: Float[Tensor, "n N"], b: Float[Tensor, "n K"]) -> Float[Tensor, "N K"]:
    """``a' b``. The first factor of a product is laid out anew, so let it be the smaller one."""
    return onednn_product(a.t(), b.t()) if a.shape[1] < b.shape[1] else onednn_product(b.t(), a.t()).t()
