"""`stage plan` against what is there: exact parameter counts, real tensors, counted operations, sums done by hand."""

import contextlib
import copy
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from original_janus import fixture_of
from stage_grpo import rollout as engine
from stage_grpo.checkpoints import configs
from stage_grpo.checkpoints.layout import layout_of
from stage_grpo.cli import main
from stage_grpo.config import parse_config
from stage_grpo.planning import memory, work
from stage_grpo.planning.plan import describe, levers, make_plan, warnings
from stage_grpo.planning.setting import Setting
from stage_grpo.planning.sizes import PUBLISHED, measure, policy_sizes
from stage_grpo.policy import load_policy
from stage_grpo.policy.steps import prefill
from stage_grpo.sampling import Sampling
from stage_grpo.trl_seams import lora_config

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "assets/tiny-janus-shapes")
IDS = {"bos": 0, "eos": 1, "pad": 2, "image": 3}
P, T, B = 14, 36, 2


@pytest.fixture(scope="module")
def recipe():
    return parse_config("stage plan", [str(ROOT / "configs/train/geneval.yaml")])


@pytest.fixture(scope="module")
def sizes_7b():
    return policy_sizes("deepseek-community/Janus-Pro-7B")


@pytest.fixture(scope="module")
def lora_recipe():
    return parse_config("stage plan", [str(ROOT / "configs/train/lora_1gpu.yaml")])


def changed(config, **values):
    config = copy.copy(config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def run_of(config, sizes, num_gpus=8, parallel="zero3", gpu_bytes=80e9, prompt=64, mixed=True):
    return Setting(config, sizes, num_gpus, parallel, gpu_bytes, prompt, mixed)


def tiny_run(config, policy, **values):
    values = {"per_device_train_batch_size": B, "model": TINY, "dtype": "float32", **values}
    spread = {name: values.pop(name) for name in ("num_gpus", "parallel", "mixed") if name in values}
    return run_of(changed(config, **values), measure(policy), **{"num_gpus": 1, "parallel": "ddp", **spread}, prompt=P)


def by_name(parts, phase="always"):
    return {part.name: part.size for part in parts if part.phase == phase}


# Sizes


@pytest.mark.parametrize("name", ["1B", "7B"])
def test_parameters_of_the_published_checkpoints_are_exact(name):
    fixture = fixture_of(f"pro_{name.lower()}")
    tensors = {key: math.prod(shape) for key, shape in fixture["tensors"].items()}
    sizes = policy_sizes(f"deepseek-ai/Janus-Pro-{name}")
    # transformers has no counterpart of SigLIP's pooling head and of the codebook's usage count.
    left_out = layout_of(configs.to_transformers_config(fixture["config"], IDS)).original_only
    assert sizes.total == sum(tensors.values()) - sum(math.prod(shape) for shape in left_out.values())
    trained = [count for key, count in tensors.items() if key.startswith("language_model.model.")]
    assert sizes.language_model == sum(trained)
    assert sizes.largest == max(trained)
    linear = [count for key, count in tensors.items() if re.search(r"language_model\.model\.layers\..*_proj", key)]
    assert sizes.layers_matmul == sum(linear)
    head = [count for key, count in tensors.items() if re.fullmatch(r"gen_head\..*weight", key)]
    codes = [count for key, count in tensors.items() if re.fullmatch(r"gen_aligner\..*weight", key)]
    assert (sizes.head_matmul, sizes.code_matmul) == (sum(head), sum(codes))
    assert sum(sizes.parts.values()) == sizes.total


@pytest.mark.parametrize("name", ["1B", "7B"])
def test_built_in_configs_are_the_published_ones(name):
    published = configs.to_transformers_config(fixture_of(f"pro_{name.lower()}")["config"], IDS).to_dict()
    assert configs.to_transformers_config(PUBLISHED[f"Janus-Pro-{name}"], IDS).to_dict() == published


def test_sizes_of_a_folder_are_those_of_the_loaded_policy():
    policy = load_policy(TINY)
    found, loaded = policy_sizes(TINY), measure(policy)
    assert all(p.is_meta for p in found.policy.parameters())
    assert found.total == loaded.total == sum(p.numel() for p in policy.parameters())
    assert found.language_model == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert (found.parts, found.layers_matmul, found.head_matmul) == (
        loaded.parts,
        loaded.layers_matmul,
        loaded.head_matmul,
    )


def test_adapters_are_counted_as_peft_makes_them(lora_recipe):
    policy = load_policy(TINY)
    run = tiny_run(lora_recipe, policy, lora_r=5)
    wrapped = get_peft_model(policy, lora_config(run.config))
    assert run.trainable == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_an_unknown_model_says_how_to_get_its_config():
    with pytest.raises(ValueError, match=r"'someone/else' is no folder.*hf download someone/else config.json"):
        policy_sizes("someone/else")


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """Puts a config into an empty hub cache, under a name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(name, config):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "snapshots/abc").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("abc")
        (repository / "snapshots/abc/config.json").write_text(json.dumps(config))

    return put


def test_a_cached_name_is_read_in_either_format(hub_cache):
    hub_cache("someone/tuned", fixture_of("pro_1b")["config"])
    hub_cache("someone/small", json.loads(Path(TINY, "config.json").read_text()))
    tuned = policy_sizes("someone/tuned")
    assert tuned.source == "someone/tuned in the hub cache"
    assert tuned.total == policy_sizes("deepseek-ai/Janus-Pro-1B").total
    assert policy_sizes("someone/small").total == policy_sizes(TINY).total
    hub_cache("someone/flow", {"model_type": "multi_modality"})
    with pytest.raises(ValueError, match=r"not a Janus or Janus-Pro checkpoint: its config.json lacks vision_config"):
        policy_sizes("someone/flow")
    hub_cache("someone/text", {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"'someone/text' is a 'llama'; supported families: \['janus'\]"):
        policy_sizes("someone/text")


# Memory


def test_weights_gradients_and_optimizer_equal_the_real_tensors(recipe):
    policy = load_policy(TINY)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    sum(p.sum() for p in policy.parameters()).backward()
    optimizer.step()
    parts = by_name(memory.components(tiny_run(recipe, policy)))
    assert parts["policy weights"] == sum(p.nbytes for p in policy.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert parts["optimizer"] == sum(value.nbytes for value in moments)
    assert parts["reference policy"] == parts["policy weights"]
    assert "gradient buckets of DDP" not in parts


def test_zero3_by_hand(recipe, sizes_7b):
    parts = memory.components(run_of(recipe, sizes_7b))
    # 6,490,935,296 trained of 7,407,773,323; an eighth of each, rounded up: 811,366,912 and 114,604,754 frozen.
    always = by_name(parts)
    assert always["policy weights"] == 2 * (811_366_912 + 114_604_754)
    assert always["gradients"] == 2 * 811_366_912
    assert always["optimizer"] == 12 * 811_366_912
    assert always["reference policy"] == 2 * 925_971_666
    assert by_name(parts, "rollout")["gathered weights"] == 2 * 7_407_773_323
    assert by_name(parts, "update")["gradients on their way"] == 2 * 102_400 * 4_096
    assert by_name(parts, "optimizer step") == {"float32 gradients": 4 * 811_366_912}
    # 30 layers x 8 sequences of 64 + 576 tokens x 4096 numbers of 2 bytes
    assert by_name(parts, "update")["activations kept"] == 30 * 8 * 640 * 4096 * 2


def test_zero3_agrees_with_deepspeeds_own_estimate(recipe, sizes_7b):
    parts = memory.components(run_of(recipe, sizes_7b))
    trained, always = sizes_7b.language_model, by_name(parts)
    _, estimate, layer = estimate_zero3_model_states_mem_needs(trained, sizes_7b.layer, 8, cpu_offload=False)
    # DeepSpeed counts 18 bytes: 16-bit weights, float32 gradients, master and moments; the 16-bit gradients it leaves.
    frozen = 2 * -(-(sizes_7b.total - trained) // 8)
    float32 = by_name(parts, "optimizer step")["float32 gradients"]
    assert always["policy weights"] - frozen + always["optimizer"] + float32 == estimate - layer


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "optimizer", "reference"),
    [
        ("ddp", 2 * 7_407_773_323, 2 * 6_490_935_296, 4 * 6_490_935_296, 2 * 7_407_773_323),
        ("zero2", 2 * 7_407_773_323, 2 * 3_245_467_648, 12 * 3_245_467_648, 2 * 7_407_773_323),
        ("fsdp2", 4 * 3_245_467_648 + 2 * 458_419_014, 4 * 3_245_467_648, 8 * 3_245_467_648, 2 * 3_703_886_662),
    ],
)
def test_other_ways_by_hand(recipe, sizes_7b, parallel, weights, gradients, optimizer, reference):
    always = by_name(memory.components(run_of(recipe, sizes_7b, num_gpus=2, parallel=parallel)))
    assert always["policy weights"] == weights
    assert always["gradients"] == gradients
    assert always["optimizer"] == optimizer
    assert always["reference policy"] == reference
    assert always.get("gradient buckets of DDP") == (gradients if parallel == "ddp" else None)


def test_offload_moves_every_state_to_the_machine(recipe, sizes_7b):
    run = run_of(recipe, sizes_7b, parallel="zero3_offload")
    assert by_name(memory.components(run)).keys() == {"reward models", "reserve"}
    assert memory.host_bytes(run) == 2 * 7_407_773_323 + 16 * 6_490_935_296 + 2 * 7_407_773_323
    assert memory.host_bytes(run_of(recipe, sizes_7b)) == 0


def test_adapters_need_no_second_model_and_little_state(lora_recipe, sizes_7b):
    run = run_of(lora_recipe, sizes_7b, num_gpus=1, parallel="ddp")
    # rank 32 x (inputs + outputs) of q, k, v, o (4096 + 4096) and gate, up, down (4096 + 11008), 30 layers
    trained = 30 * 32 * (4 * 8192 + 3 * 15104)
    always = by_name(memory.components(run))
    assert always["policy weights"] == 2 * 7_407_773_323 + 4 * trained
    assert always["gradients"] == 4 * trained and always["optimizer"] == 8 * trained
    assert "reference policy" not in always


@pytest.mark.parametrize("guided", [False, True])
def test_cache_equals_the_rollouts_own_tensors(recipe, guided):
    policy = load_policy(TINY)
    policy.config.get_text_config().pad_token_id = 0
    state = prefill(policy, [[1] * P] * 3, guided)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)
    branches = 2 if guided else 1
    logits = (branches + 6) * 512 * 4
    run = tiny_run(recipe, policy, per_device_train_batch_size=3, guidance_scale=5.0 if guided else 1.0)
    planned = by_name(memory.components(run), "rollout")["cache and logits"]
    assert planned == real + 3 * logits


@pytest.mark.parametrize(("num_rows", "fit"), [(8, 100), (8, 8), (8, 7), (8, 3), (7, 2), (5, 1), (64, 0)])
def test_chunks_are_those_of_the_rollout(num_rows, fit):
    largest = max(rows.stop - rows.start for rows in engine._chunks(num_rows, fit))
    assert memory.rows_in_chunk(num_rows, fit * 1000 + 1, 1000) == largest


def test_rollout_gets_half_of_what_is_free(recipe, sizes_7b):
    run = run_of(changed(recipe, per_device_train_batch_size=512), sizes_7b)
    parts = memory.components(run)
    free = 80e9 - sum(by_name(parts).values()) - by_name(parts, "rollout")["gathered weights"]
    row = engine.bytes_per_row(sizes_7b.policy, 64, True)
    assert by_name(parts, "rollout")["cache and logits"] == row * math.ceil(512 / math.ceil(512 / (free / 2 // row)))
    told = run_of(changed(recipe, per_device_train_batch_size=512, rollout_memory_gb=3.0), sizes_7b)
    assert by_name(memory.components(told), "rollout")["cache and logits"] <= 3e9


@pytest.mark.parametrize(
    ("dtype", "autocast", "lora"),
    [("bfloat16", False, False), ("float32", True, False), ("float32", False, False), ("bfloat16", True, True)],
)
def test_activations_of_a_layer_equal_what_autograd_saves(recipe, lora_recipe, dtype, autocast, lora):
    policy = load_policy(TINY, dtype)
    # Only DeepSpeed computes in 16 bits without autocast.
    parallel = "zero3" if dtype == "bfloat16" and not autocast else "ddp"
    config = lora_recipe if lora else recipe
    run = tiny_run(config, policy, dtype=dtype, lora_r=5, parallel=parallel, mixed=autocast or dtype == "bfloat16")
    if lora:
        get_peft_model(policy, lora_config(run.config))
    layer = policy.backbone.layers[0]
    hidden = torch.randn(B, P + T, 192, dtype=policy.dtype, requires_grad=True)
    place = torch.arange(P + T).repeat(B, 1)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    saved = {}
    with context:
        angles = policy.backbone.rotary_emb(hidden, place)
        # Not of this layer alone: weights, and the angles that all layers share.
        shared = {t.untyped_storage()._cdata for t in (*layer.parameters(), *angles)}

        def keep(tensor):
            storage = tensor.untyped_storage()
            # Autocast's copies of the weights are a line of their own.
            is_activation = math.prod(tensor.shape) % (B * (P + T)) == 0
            if storage._cdata not in shared and is_activation:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, attention_mask=None, position_embeddings=angles, position_ids=place)
    assert memory.layer_bytes(run) == sum(storage.nbytes() for storage in saved.values())


def test_peak_is_what_stays_and_the_largest_phase():
    parts = [
        memory.Component("a", 10, "always", ""),
        memory.Component("b", 5, "rollout", ""),
        memory.Component("c", 4, "update", ""),
        memory.Component("d", 3, "update", ""),
    ]
    assert memory.peak(parts) == (17, "update")


# Work


def eager(policy):
    """Attention as plain matrix products, which the counter counts on a CPU."""
    policy.set_attn_implementation("eager")
    policy.config.get_text_config().pad_token_id = 0
    return policy.eval()


@pytest.mark.parametrize("guided", [False, True])
def test_operations_of_scoring_equal_the_counted_ones(recipe, guided):
    policy = eager(load_policy(TINY))
    policy.scoring_guidance = 3.0 if guided else None
    ids = torch.ones(1, P + T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = policy.head_features(ids, torch.ones_like(ids))
        policy.image_logits(features)
    run = tiny_run(recipe, policy, guidance_in_scoring=guided)
    assert work.forward_flops(run) == counter.get_total_flops()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_operations_of_a_rollout_equal_the_counted_ones(recipe, guidance):
    policy = eager(load_policy(TINY))
    with FlopCounterMode(display=False) as counter:
        engine.rollout(policy, [[1] * P] * 2, torch.full((2, T), 0.5), Sampling(guidance))
    run = tiny_run(recipe, policy, guidance_scale=guidance)
    assert 2 * work.decode_flops(run) + work.prefill_flops(run) == counter.get_total_flops()


def test_counts_of_the_recipe_are_the_papers(recipe, sizes_7b):
    done = work.work(run_of(recipe, sizes_7b))
    assert (done.num_steps, done.prompts_per_step, done.images_per_step) == (1600, 8, 64)
    assert done.num_steps * done.images_per_step == 102_400
    # Forward, backward (twice as much) and the forward pass again for checkpointing.
    assert done.update_flops == 4 * done.reference_flops == 4 * 64 * work.forward_flops(run_of(recipe, sizes_7b))


def test_operations_follow_the_configuration(recipe, lora_recipe, sizes_7b):
    forward = work.forward_flops(run_of(recipe, sizes_7b))
    plain = work.work(run_of(changed(recipe, gradient_checkpointing=False, beta=0.0), sizes_7b))
    assert (plain.reference_flops, plain.update_flops) == (0, 3 * 64 * forward)
    adapters = work.work(run_of(lora_recipe, sizes_7b, num_gpus=1, parallel="ddp"))
    assert (adapters.images_per_step, adapters.update_flops) == (64, 3 * 64 * forward)
    twice = work.work(run_of(changed(recipe, num_iterations=2), sizes_7b))
    assert (twice.images_per_step, twice.prompts_per_step) == (32, 4)
    assert twice.update_flops == 4 * 64 * forward


def test_steps_follow_from_the_prompt_file(recipe, sizes_7b, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n" * 83)
    epochs = {"max_steps": -1, "num_train_epochs": 3, "train_prompts": str(prompts)}
    assert work.work(run_of(changed(recipe, **epochs), sizes_7b)).num_steps == 30
    prompts.unlink()
    assert work.work(run_of(changed(recipe, **epochs), sizes_7b)).num_steps is None


def test_rollouts_that_serve_several_steps(recipe, sizes_7b, tmp_path):
    """Of 83 prompts 80 fill rollouts of 16: five of them, each cut into two batches, each batch used three times."""
    (tmp_path / "prompts.txt").write_text("a dog\n" * 83)
    epochs = {"max_steps": -1, "num_train_epochs": 3, "train_prompts": str(tmp_path / "prompts.txt")}
    served = {"steps_per_generation": 2, "num_iterations": 3, "gradient_accumulation_steps": 4, **epochs}
    done = work.work(run_of(changed(recipe, **served), sizes_7b))
    # 5 x 2 x 3 = 30 passes are 8 steps of 4, the last one short.
    assert (done.num_steps, done.images_per_rollout, done.prompts_per_rollout) == (3 * 8, 128, 16)
    assert done.rollouts_per_step == Fraction(4, 6) and done.num_rollouts == 16
    assert (done.images_per_step, done.prompts_per_step) == (Fraction(256, 3), Fraction(32, 3))


def test_disk_by_hand(recipe, lora_recipe, sizes_7b):
    done = work.work(run_of(recipe, sizes_7b))
    # 16-bit weights, DeepSpeed's master and moments, and the frozen parameters that it holds once more.
    assert done.checkpoint_bytes == 2 * 7_407_773_323 + 12 * 6_490_935_296 + 2 * 916_838_027
    assert done.num_checkpoints == 3  # two kept, one on its way
    assert done.disk_bytes == 3 * done.checkpoint_bytes + 2 * 7_407_773_323
    averaged = work.work(run_of(changed(recipe, ema_decay=0.999), sizes_7b))
    assert averaged.checkpoint_bytes - done.checkpoint_bytes == 4 * 6_490_935_296
    adapters = work.work(run_of(lora_recipe, sizes_7b, num_gpus=1, parallel="ddp"))
    assert adapters.checkpoint_bytes == 12 * 30 * 32 * (4 * 8192 + 3 * 15104)
    assert work.work(run_of(changed(recipe, save_strategy="no"), sizes_7b)).num_checkpoints == 0
    # checkpoint-0, and that of the best held-out test beside the limit.
    rollback = {"guard": "rollback", "max_steps": 100, "save_steps": 50}
    counts = [
        work.work(run_of(changed(recipe, **rollback, **limit), sizes_7b)).num_checkpoints
        for limit in ({"save_total_limit": None}, {"save_total_limit": 1}, {"save_total_limit": 2})
    ]
    assert counts == [3, 2, 3]
    tested = changed(recipe, **rollback, save_total_limit=1, heldout_benchmark="geneval")
    assert work.work(run_of(tested, sizes_7b)).num_checkpoints == 3


def test_disk_of_weights_alone_by_hand(recipe, lora_recipe, sizes_7b):
    def checkpoint(config, **spread):
        return work.work(run_of(changed(config, save_only_model=True), sizes_7b, **spread)).checkpoint_bytes

    assert checkpoint(recipe) == checkpoint(recipe, parallel="zero2") == 2 * 7_407_773_323
    # FSDP2 trains in float32, and so it saves.
    assert checkpoint(recipe, parallel="fsdp2") == 4 * 6_490_935_296 + 2 * 916_838_027
    assert checkpoint(changed(recipe, ema_decay=0.999)) == 2 * 7_407_773_323 + 4 * 6_490_935_296
    assert checkpoint(lora_recipe, num_gpus=1, parallel="ddp") == 4 * 30 * 32 * (4 * 8192 + 3 * 15104)


# The plan


def test_a_plan_that_fits_warns_of_nothing(recipe, lora_recipe):
    plan = make_plan(recipe)
    assert plan.fits and warnings(plan) == []
    small = parse_config("stage plan", [str(ROOT / "configs/train/lora_1gpu_1b.yaml")])
    assert make_plan(lora_recipe).fits and make_plan(small, gpu_memory=24).fits


def test_a_plan_that_does_not_fit_names_the_largest_lever(recipe):
    plan = make_plan(changed(recipe, gradient_checkpointing=False, per_device_train_batch_size=16), gpu_memory=48)
    assert not plan.fits
    best, size = levers(plan)[0]
    assert best == "--gradient_checkpointing true"
    assert size == make_plan(changed(recipe, per_device_train_batch_size=16), gpu_memory=48).peak
    assert f"the largest lever is {best}: {size / 1e9:,.1f} GB" in warnings(plan)[0]


def test_bfloat16_optimizer_states_are_warned_of(recipe):
    assert "rounded away" in warnings(make_plan(recipe, 1))[0]
    assert not any("rounded away" in line for line in warnings(make_plan(changed(recipe, dtype="float32"), 1)))


def test_groups_that_do_not_fit_the_gpus_are_refused(recipe):
    with pytest.raises(ValueError, match="4 GPUs x 1 images are no multiple of num_generations=8; change per_device"):
        make_plan(changed(recipe, per_device_train_batch_size=1), 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel", "zero4"], "parallel='zero4' is unknown; use one of zero3, zero2, ddp, fsdp2, zero3_offload"),
        (["--gpus", "0"], "gpus=0"),
        (["--gpus", "many"], "invalid int value"),
        (["--model", "someone/else"], "hf download someone/else config.json"),
        (["--betta", "1"], "unknown key 'betta'"),
        (
            ["--gpus", "3", "--per_device_train_batch_size", "4"],
            "(12) must be divisible by num_generations (8). It is per_device_train_batch_size=4 x "
            "gradient_accumulation_steps=1 x 3 processes",
        ),
    ],
)
def test_wrong_words_end_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(ROOT / "configs/train/geneval.yaml"), *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("stage plan: error: ") and message in line


def test_overrides_and_flags_reach_the_plan(capsys):
    words = ["--gpus", "2", "--gpu-memory", "48", "--parallel", "zero2", "--max_steps", "7", "--prompt-tokens", "32"]
    main(["plan", str(ROOT / "configs/train/geneval_1b.yaml"), *words])
    out = capsys.readouterr().out
    assert "2 x 48.0 GB, zero2" in out and "steps: 7" in out and "8 of 8 images x" in out
    assert f"{2 * 8 * 576 * 7:,}" in out


def planned(capsys, *words):
    """Lines that the command prints of a small model, by their first word, as words."""
    main(["plan", str(ROOT / "configs/train/geneval.yaml"), "--model", TINY, *words])
    lines = (re.split(r"  +|: ", line) for line in capsys.readouterr().out.splitlines())
    return {name: rest for name, *rest in lines}


def test_batches_are_counted_over_all_gpus(capsys):
    halved = planned(capsys, "--gpus", "8", "--per_device_train_batch_size", "4")
    assert halved["prompts"] == ["4", "6,400"] and halved["images"] == ["32", "51,200"]
    shared = planned(capsys, "--gpus", "8", "--generation_batch_size", "64")
    assert shared["cache and logits"][2].startswith("8 of 8 images x")
    assert planned(capsys, "--per_device_train_batch_size", "4") == halved  # eight GPUs are what it is meant for


def test_a_rollout_for_two_steps_is_planned(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n" * 10)
    words = ["--gpus", "1", "--num_iterations", "2", "--train_prompts", str(tmp_path / "prompts.txt")]
    epochs = planned(capsys, *words, "--max_steps", "-1", "--num_train_epochs", "3")
    assert (epochs["steps"], epochs["prompts"], epochs["images"]) == (["60"], ["0.5", "30"], ["4", "240"])
    assert planned(capsys, *words, "--max_steps", "7")["prompts"] == ["0.5", "4"]


def test_documented_plan_is_what_the_command_prints(recipe):
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    assert describe(make_plan(recipe)) in text


def test_constants_are_those_of_the_deepspeed_files():
    zero = {
        name: json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())["zero_optimization"]
        for name in ("zero2", "zero3", "zero3_offload")
    }
    assert {entry["reduce_bucket_size"] for entry in zero.values()} == {memory.REDUCE_BUCKET}
    for name in ("zero3", "zero3_offload"):
        assert zero[name]["stage3_max_live_parameters"] == memory.MAX_LIVE_PARAMETERS
        assert zero[name]["sub_group_size"] == memory.SUB_GROUP
