"""What one process holds of a model's parameters, to read, overwrite, save and load without communication.

A whole parameter alone and under DDP or ZeRO-1/2, its shard under FSDP2, its partition under DeepSpeed ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class LocalShards:
    """This process's shard of each parameter.

    Args:
        model: The model as training holds it: under FSDP2 and DeepSpeed after it was prepared. Not wrapped in DDP.
        trainable: Whether to leave out what is not trained.

    Attributes:
        parameters: By name.
    """

    def __init__(self, model: nn.Module, trainable: bool = False):
        # After a forward pass without gradients FSDP2 may still show whole parameters in place of its shards.
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.reshard()
        self.parameters: dict[str, Any] = {
            name: p for name, p in model.named_parameters() if p.requires_grad or not trainable
        }

    def reshard(self) -> None:
        """Free what FSDP2 has gathered."""
        for module in self._fsdp_modules:
            module.reshard()

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Give each shard by name, in float32 on the CPU; it may share memory with the weights.

        Under ZeRO-3 these are the float32 masters that bfloat16 weights round.
        """
        self.reshard()
        for name, parameter in self.parameters.items():
            yield name, _master(parameter)

    def copies(self) -> dict[str, Tensor]:
        """Copies in the weights' own dtype, on the CPU."""
        self.reshard()
        return {
            name: _shard(p).to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, p in self.parameters.items()
        }

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the shards, and whatever DeepSpeed keeps gathered of them. All processes call it together."""
        self.reshard()
        partitioned = [p for p in self.parameters.values() if hasattr(p, "ds_id")]
        # ZeRO-3 keeps small parameters whole on every process. Its steps around saving and loading a checkpoint are
        # what drops and rebuilds those copies; a model without an optimizer gathers them anew when they are used.
        optimizers: dict[int, Any] = {id(p._z3_optimizer): p._z3_optimizer for p in partitioned if _is_optimized(p)}
        for optimizer in optimizers.values():
            optimizer.checkpoint_event_prologue()
        if partitioned and not optimizers:
            partitioned[0].partition(partitioned)
        for name, parameter in self.parameters.items():
            _shard(parameter).copy_(values[name])
        for optimizer in optimizers.values():
            optimizer.checkpoint_event_epilogue()

    def save(self, folder: str | Path, stem: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
        """Write tensors of the shards' names: one file a process, or one in all where nothing is sharded."""
        file = self._file(folder, stem)
        if self._is_sharded or _rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), file, {**metadata, "format": "pt"})

    def load(self, folder: str | Path, stem: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read what :meth:`save` wrote.

        Returns:
            The tensors, on the CPU, and the metadata.

        Raises:
            ValueError: If the folder has no file for this process, or if the file is torn or lacks a tensor, has one
                too many or one of another shape.
        """
        file = self._file(folder, stem)
        if not file.is_file():
            others = sorted(path.name for path in file.parent.glob(f"{stem}_*.safetensors"))
            raise ValueError(
                f"{file.parent} holds no {file.name} but {others or f'no {stem}s'}; continue with the number "
                "of processes and the sharding it was saved with"
            )
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                metadata = dict(stored.metadata() or {})
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is torn, use another checkpoint: {error}") from error
        self._check(file, tensors)
        return tensors, metadata

    @property
    def _is_sharded(self) -> bool:
        return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in self.parameters.values())

    def _file(self, folder: str | Path, stem: str) -> Path:
        rank, count = (_rank(), torch.distributed.get_world_size()) if self._is_sharded else (0, 1)
        return Path(folder) / f"{stem}_{rank:05d}_of_{count:05d}.safetensors"

    def _check(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(self.parameters.keys() ^ tensors.keys()):
            problem = "holds" if name in tensors else "lacks"
            raise ValueError(f"{file} {problem} the tensor {name!r}: it was saved from another model")
        for name, parameter in self.parameters.items():
            found, wanted = tuple(tensors[name].shape), tuple(_shard(parameter).shape)
            if found != wanted:
                raise ValueError(
                    f"{file} holds {name!r} with shape {found} instead of {wanted}: it was saved from another model, "
                    "or sharded in another way"
                )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _is_optimized(parameter: Any) -> bool:
    return hasattr(parameter, "_z3_optimizer")


def _shard(parameter: Any) -> Tensor:
    """What this process holds of a parameter, sharing its memory."""
    if hasattr(parameter, "ds_id"):
        return _without_padding(parameter.ds_tensor.data, parameter)
    with torch.no_grad():
        return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def _master(parameter: Any) -> Float[Tensor, " *shape"]:
    if hasattr(parameter, "ds_id") and _is_optimized(parameter) and parameter.requires_grad:
        from deepspeed.utils import safe_get_local_fp32_param

        return _without_padding(safe_get_local_fp32_param(parameter).detach(), parameter).cpu().float()
    return _shard(parameter).cpu().float()


def _without_padding(partition: Float[Tensor, " n"], parameter: Any) -> Float[Tensor, " m"]:
    """Cut a ZeRO-3 partition to the parameter's own numbers: what DeepSpeed pads it with is left uninitialised."""
    size = len(partition)
    return partition[: max(0, min(size, parameter.ds_numel - size * parameter.ds_zero_partition_rank))]
