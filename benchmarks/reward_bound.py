"""What no batching can take away from a reward's time: its matrix products, and what happens outside its networks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "convolution",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)  # fmt: skip
"""Operations of torch that are matrix products; convolutions and attention are made of them."""
TRIES = 10


class _Shape(NamedTuple):
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fill(self) -> torch.Tensor:
        length = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride))  # expanded ones overlap
        make = torch.randn if self.dtype.is_floating_point else torch.zeros
        return make(length, dtype=self.dtype, device=self.device).as_strided(self.size, self.stride)


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside, by operation and shapes."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[Any, tuple, tuple]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # some operations are made of others, and reach this place whole in inference mode
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        if func._opname in PRODUCTS:
            self.found[func, tuple(map(_frozen, args)), tuple((k, _frozen(v)) for k, v in kwargs.items())] += 1
        return func(*args, **kwargs)

    def seconds(self) -> float:
        """Of all products once more, with random numbers and nothing between them."""
        return sum(count * _fastest(*product) for product, count in self.found.items())


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return value.fill() if isinstance(value, _Shape) else value


@torch.inference_mode()
def _fastest(func: Callable, args: tuple, kwargs: tuple) -> float:
    given = [_thawed(value) for value in args]
    named = {key: _thawed(value) for key, value in kwargs}
    times = []
    for _ in range(1 + TRIES):
        wait()
        start = clock()
        func(*given, **named)
        wait()
        times.append(clock() - start)
    return min(times[1:])


def clock() -> float:
    """Seconds; on a single CPU thread only those that this process computes, whatever else the machine does."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def wait() -> None:
    """Until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def time_in_networks() -> Iterator[list[float]]:
    """Gives a list, to which the seconds of every outermost call of a network inside are added."""
    calls, depth, start = [], 0, 0.0

    def enter(module, inputs):
        nonlocal depth, start
        if depth == 0:
            wait()
            start = clock()
        depth += 1

    def leave(module, inputs, outputs):
        nonlocal depth
        depth -= 1
        if depth == 0:
            wait()
            calls.append(clock() - start)

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
