"""Averages a small network that two processes share, by FSDP2 or ZeRO-3; run by test_averaging.py."""

import copy
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stage_grpo.averaging import WeightAverage

DECAY = 0.6
STEPS = 5


class Net(nn.Module):
    """Rows that two processes cannot share evenly, or at all; parameters that ZeRO-3 keeps whole; a frozen layer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.frozen = nn.Linear(4, 6, bias=False).requires_grad_(False)
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(self.frozen(x)))))


def data(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + step))


def loss_of(output):
    return (output.float() - 1).square().mean()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def alone():
    """The same in one process with torch's own average: its weights and output, and the weights at the end."""
    model = Net()
    optimizer = optimizer_of(model)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    for step in range(STEPS):
        loss_of(model(data(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.multi_avg_fn = get_ema_multi_avg_fn(min(DECAY, (2 + step) / (11 + step)))
        averaged.update_parameters(model)
    with torch.no_grad():
        results = {f"inside.{name}": p.clone() for name, p in averaged.module.named_parameters()}
        results["output"] = averaged(data(0))
    for step in range(STEPS, STEPS + 2):
        loss_of(model(data(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results | {f"end.{name}": p.detach() for name, p in model.named_parameters()}


class Fsdp2:
    def __init__(self):
        from torch.distributed.fsdp import fully_shard

        self.model = Net()
        for layer in (self.model.frozen, self.model.first):
            fully_shard(layer)
        fully_shard(self.model)  # the root stays gathered after a forward pass
        self.optimizer = optimizer_of(self.model)

    def step(self, x):
        loss_of(self.model(x)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self, x):
        return self.model(x)

    def full(self):
        for module in (self.model, self.model.first, self.model.frozen):
            module.reshard()
        return {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}

    masters = full

    def keeps_small_whole(self):
        return True  # there is no such thing


class Zero3:
    def __init__(self, bf16=False):
        import deepspeed

        model = Net().bfloat16() if bf16 else Net()
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "bf16": {"enabled": bf16},
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told
            "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 6},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.model, self.bf16 = model, bf16
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]

    def step(self, x):
        self.engine.backward(loss_of(self(x)))
        self.engine.step()

    def __call__(self, x):
        return self.engine(x.bfloat16() if self.bf16 else x)

    def full(self):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def masters(self):
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def keeps_small_whole(self):
        return self.model.norm.weight.ds_status.name == "AVAILABLE"


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def run(make, folder):
    """Train, swap, train on; against a twin that never swaps, and an average of the gathered float32 weights."""
    shared, twin = make(), make()
    average = WeightAverage(shared.model, DECAY)
    gathered = shared.masters()
    for step in range(STEPS):
        shared.step(data(step))
        twin.step(data(step))
        weight = 1 - average.next_decay
        average.update()
        gathered = {
            name: value.lerp(new, weight) for (name, value), new in zip(gathered.items(), shared.masters().values())
        }
    own = shared.full()
    with torch.no_grad():
        before = shared(data(0))
        assert shared.keeps_small_whole()
        with average.swapped():
            assert shared.keeps_small_whole()
            output = shared(data(0))
            inside = {f"inside.{name}": value for name, value in shared.full().items()}
        assert shared.keeps_small_whole()
        assert torch.equal(shared(data(0)), before) and not torch.equal(output, before)
    assert_equal(shared.full(), own)
    for name, value in gathered.items():
        assert torch.equal(inside[f"inside.{name}"], value.to(own[name].dtype)), name
    average.save(folder)
    stored = copy.deepcopy(average.averages)
    for step in range(STEPS, STEPS + 2):
        shared.step(data(step))
        twin.step(data(step))
    assert_equal(shared.full(), twin.full())
    again = WeightAverage(shared.model, DECAY)
    again.load(folder)
    assert again.num_updates == STEPS
    assert_equal(again.averages, stored)
    return inside | {"output": output} | {f"end.{name}": value for name, value in shared.full().items()}


def whole_on_every_process(folder):
    """Parameters that are not sharded are saved once."""
    WeightAverage(Net(), DECAY).save(folder)
    torch.distributed.barrier()
    assert [file.name for file in folder.iterdir()] == ["average_00000_of_00001.safetensors"]


def main(kind, out):
    if kind == "zero3":
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler
        deepspeed.init_distributed(dist_backend="gloo")
        results = run(Zero3, out / "average")
        run(lambda: Zero3(bf16=True), out / "bf16")
    else:
        torch.distributed.init_process_group("gloo")
        results = run(Fsdp2, out / "average")
        whole_on_every_process(out / "whole")
    if torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in results.items()}, out / "results.safetensors")
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that leaves by the ordinary way


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(sys.argv[1], Path(sys.argv[2]))
