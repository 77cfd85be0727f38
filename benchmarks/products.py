"""Linear layers by oneDNN (`OneDnnLinear`) against PyTorch's own, forward and backward, paired, on a CPU.

    python benchmarks/products.py --threads 2 --repeats 15 --out outputs/products.json

One layer at a time, of the sizes in which the tiny and the mid Janus train. In each repeat the two run one after the
other; seconds are medians, ratios medians of the ratios of a repeat, theirs over ours. The last column is the largest
difference between the two in any gradient, as a share of the largest gradient.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stage_grpo.devices import cpu_vendor
from stage_grpo.onednn_linear import onednn_available, onednn_pays, use_onednn

SHAPES = {
    "tiny, attention": (64 * 36, 192, 192),
    "tiny, gate and up": (64 * 36, 192, 512),
    "tiny, down": (64 * 36, 512, 192),
    "mid, attention": (8 * 576, 512, 512),
    "mid, gate and up": (8 * 576, 512, 2048),
    "mid, down": (8 * 576, 2048, 512),
}
"""Tokens, inputs, outputs."""
PASSES = ("forward", "both")


def passes(layer: nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: the forward pass alone, as of the reference, and both passes."""

    def both() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {"forward": forward, "both": both}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    layers = {side: nn.Linear(inputs, outputs, bias=False) for side in ("ours", "theirs")}
    layers["ours"].load_state_dict(layers["theirs"].state_dict())
    use_onednn(layers["ours"])
    x, grad = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    work = {side: passes(layer, x, grad) for side, layer in layers.items()}
    gradients = {}
    for side, parts in work.items():
        parts["both"]()
        gradients[side] = [x.grad, layers[side].weight.grad]
    row: dict[str, Any] = {"shape": shape}
    pairs = zip(*gradients.values())
    row["difference"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    for name, factor in zip(PASSES, (2, 6)):
        times = [{side: seconds(parts[name]) for side, parts in work.items()} for _ in range(repeats)]
        row[name] = {side: statistics.median(each[side] for each in times) for side in work}
        row[name]["ratio"] = statistics.median(each["theirs"] / each["ours"] for each in times)
        row[name]["gflops_a_second"] = factor * tokens * inputs * outputs / row[name]["ours"] / 1e9
    return row


def as_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'layer':18}{'pass':>9}{'ours, ms':>10}{'theirs, ms':>12}{'ratio':>7}{'GFLOP/s':>9}{'difference':>12}"]
    for name, row in rows.items():
        for part in PASSES:
            ours, theirs, ratio, rate = row[part].values()
            cells = f"{part:>9}{1e3 * ours:10.2f}{1e3 * theirs:12.2f}{ratio:7.2f}{rate:9.0f}"
            lines.append(f"{name:18}{cells}{row['difference']:12.1e}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args(words)
    if not onednn_available():
        parser.error("this PyTorch has no oneDNN; install one of its own wheels for CPUs")
    torch.set_num_threads(options.threads)
    rows = {name: compare(shape, options.repeats) for name, shape in SHAPES.items()}
    result = {
        "layers": rows,
        "used_here": onednn_pays(),
        "threads": options.threads,
        "repeats": options.repeats,
        "processor": f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(as_table(rows))
    print(f"{result['processor']}: training takes {'oneDNN' if onednn_pays() else 'PyTorch'}'s products here")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
