"""Linear layers with weights laid out once for many calls on a few rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stage_grpo.onednn_linear import onednn_available, onednn_product

LinearFunction = Callable[[Tensor], Tensor]
"""From (R, K) to (R, N)."""


def linear_function(weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> LinearFunction:
    """A linear layer as a function of its input, as fast as this machine has it.

    In float32 on a CPU the weight is copied into oneDNN's own layout. The usual call sorts the whole weight anew for
    each product, which costs as much as the product itself where the input has as few rows as a decoding step. The
    order of additions is then also the same for any number of rows and threads, so that a row's result does not depend
    on the batch. Elsewhere the weight is used as it stands.

    Args:
        weight: Weight, copied or kept by reference: it must not change while the function is used.
        bias: Bias, or None.
    """
    if not can_pack(weight):
        return partial(nn.functional.linear, weight=weight, bias=bias)
    # No hint of the number of rows: one layout, and so one order of additions, for all of them.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return partial(_packed_linear, packed=packed, bias=None if bias is None else bias.detach())


def can_pack(weight: Tensor) -> bool:
    """Whether a weight gets a layout of its own, and so a copy."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and onednn_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _packed_linear(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    # A single row would go to a matrix-vector kernel, which adds in another order.
    rows = x.expand(2, -1) if x.shape[0] == 1 else x
    return onednn_product(rows, packed, bias)[: x.shape[0]]
