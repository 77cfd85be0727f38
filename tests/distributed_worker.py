"""Trains the tiny Janus in however many processes it is started with; run by test_distributed.py.

How the weights are spread over the processes comes from the environment that `accelerate launch` makes of a file in
configs/accelerate, exactly as on GPUs. What stands in for the GPUs themselves is in `without_gpus` and `arguments`.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers.training_args
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoProcessor

from conftest import PROMPTS
from stage_grpo.benchmarks import get_benchmark
from stage_grpo.data import load_rows
from stage_grpo.heldout import HeldoutEvaluation
from stage_grpo.heldout_plan import HeldoutPlan
from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy import load_policy
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.trainer import StageTrainer
from test_trainer import brightness, config

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED" in os.environ
FSDP = "ACCELERATE_USE_FSDP" in os.environ


def without_gpus():
    """Take GPUs for granted where the libraries ask for them."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if DEEPSPEED:
        import deepspeed.ops

        # DeepSpeed would compile an all-reduce of its own for CPUs; without it, it takes gloo's.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def arguments(folder, **changes):
    values = {
        "num_generations": 8,
        "max_steps": 4,
        "optim": "adamw_torch",
        # A large epsilon makes Adam's step proportional to the gradient, so that rounding errors stay as small as they
        # are, and the optimizer still has a state that a checkpoint must hold.
        "adam_epsilon": 1.0,
        "learning_rate": 0.1,
        "gradient_checkpointing": True,
        "guidance_in_scoring": True,
        # Rounding can tip a draw that falls between two codes, and a different image follows. Few codes, few edges.
        "top_k": 2,
        "sample_steps": 1,
        "bf16": False,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "use_cpu": not (DEEPSPEED or FSDP),  # with it, accelerate would silently switch sharding off
    }
    args = config(folder, **{**values, **changes})
    if FSDP:
        # accelerate shards between GPUs only, and goes by this name alone.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # The tiny matrices would all be too small to be worth sharding.
        args.deepspeed_plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return args


def share_held(model):
    """Share of the trained weights that this process holds between two steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    held = [getattr(weight, "ds_tensor", getattr(weight, "_local_tensor", weight)).numel() for weight in weights]
    return sum(held) / sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def score_held_out_prompts(trainer, checkpoint, folder):
    """At steps 0 and 4, three images a process, and the best policy kept."""
    rows = load_rows(Path(__file__).parents[1] / "assets" / "shapes" / "heldout.jsonl")[::100]
    prompts = Path(folder, "heldout_prompts.jsonl")
    if trainer.accelerator.is_main_process:
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(json.dumps(row.metadata) + "\n" for row in rows))
    plan = HeldoutPlan(get_benchmark("shapes"), "graded", tuple(rows), trainer.args.sampling, prompts=str(prompts))
    trainer.add_callback(HeldoutEvaluation(trainer, plan, 4, AutoProcessor.from_pretrained(checkpoint)))


def brightness_beside_a_model(checkpoint):
    """A reward of one's own that loads a model by transformers on its first images."""
    loaded = []

    def score(images, prompts, metadata):
        if not loaded:
            loaded.append(load_policy(checkpoint))
            assert all(weight.numel() for weight in loaded[0].parameters()), "the reward's model was split"
        return brightness(images, prompts, metadata)

    score.__name__ = brightness.__name__
    return score


@contextmanager
def decoders_of_rollouts():
    """Names of the classes that took the decoding steps."""
    found, make = set(), JanusPolicy.make_decoder

    def make_and_tell(policy, capacity):
        decoder = make(policy, capacity)
        found.add(type(decoder).__name__)
        return decoder

    with mock.patch.object(JanusPolicy, "make_decoder", make_and_tell):
        yield found


def train(checkpoint, folder, resume=None, lora=False, heldout=False, **changes):
    if lora and FSDP:
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"  # accelerate's default
    args = arguments(folder, **changes)
    rows = Dataset.from_dict({"prompt": PROMPTS, "metadata": ["{}"] * 4})
    adapters = LoraConfig(r=4, target_modules=LORA_TARGETS) if lora else None
    held_out = rows.select([3]) if args.do_eval else None
    reward = brightness_beside_a_model(checkpoint)
    trainer = StageTrainer(load_policy(checkpoint), reward, args, rows, held_out, peft_config=adapters)
    if heldout:
        score_held_out_prompts(trainer, checkpoint, folder)
    with decoders_of_rollouts() as decoders:
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    if args.sync_ref_model:
        reference = trainer.accelerator.get_state_dict(trainer.ref_model)
        if trainer.accelerator.is_main_process:
            save_file({name: tensor.clone() for name, tensor in reference.items()}, f"{folder}/reference.safetensors")
    if trainer.accelerator.is_main_process:
        Path(folder, "share_held.txt").write_text(str(share_held(trainer.model)))
        Path(folder, "decoders.txt").write_text(" ".join(decoders))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    without_gpus()
    for job in json.loads(sys.argv[1]):
        train(**job)
    # Without it, the process that ends first may bring the other down.
    torch.distributed.destroy_process_group()
