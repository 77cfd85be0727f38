"""A decoding step as CUDA graphs: launched at once instead of kernel by kernel."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stage_grpo.policy.decode_cache import Decoder, FixedCache

WINDOW = 128
"""Attention reads the cache in windows that grow by this many tokens; each has a graph of its own."""


class FixedStep:
    """The step with fixed shapes and addresses, captured and replayed on a GPU, run as it is elsewhere.

    Args:
        decoder: The decoder.
        cache: Its cache.
        num_rows: B: images.
    """

    def __init__(self, decoder: Decoder, cache: FixedCache, num_rows: int):
        self.decoder, self.cache = decoder, cache
        device = cache.positions.device
        self.codes = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.num_filled = int(cache.positions.max())
        self.is_graphed = device.type == "cuda"
        self._graphs: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, codes: Int[Tensor, " B"]) -> Float[Tensor, "R E"]:
        """Feed one code a row and advance; on a GPU the result is overwritten by the next call."""
        self.codes.copy_(codes)
        self.num_filled += 1
        self.cache.window = min(-(-self.num_filled // WINDOW) * WINDOW, self.cache.capacity)
        features = self._replayed() if self.is_graphed else self.decoder.step(self.codes, self.cache)
        self.cache.advance()
        return features

    def _replayed(self) -> Tensor:
        if self.cache.window not in self._graphs:
            self._graphs[self.cache.window] = self._captured()
        graph, features = self._graphs[self.cache.window]
        graph.replay()
        return features

    def _captured(self) -> tuple[Any, Tensor]:
        # A graph must not be the first to run a kernel. Running the step twice writes the same token twice.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decoder.step(self.codes, self.cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        # Thread-local: other threads, such as NCCL's watchdog, may go on calling CUDA.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            features = self.decoder.step(self.codes, self.cache)
        return graph, features
