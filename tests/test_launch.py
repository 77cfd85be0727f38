"""Recipes, launcher configurations and `stage launch`: each read by the library it is for, and really started."""

import dataclasses
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from stage_grpo import launch, preflight, supervise, training
from stage_grpo.cli import main
from stage_grpo.config import parse_config
from stage_grpo.planning.disk import held_bytes
from stage_grpo.planning.plan import make_plan
from stage_grpo.planning.sizes import policy_sizes
from stage_grpo.policy import loading
from stage_grpo.run_checkpoints import seal

ROOT = Path(__file__).parents[1]
TINY = "assets/tiny-janus-shapes"
PROMPTS = "assets/shapes/train.jsonl"
WAYS = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
RECIPES = sorted((ROOT / "configs/train").glob("*.yaml"))
OF_OTHERS = ("t2i_r1", "ar_grpo")
"""Recipes of other methods than the paper's."""
OF_THE_PAPER = [path for path in RECIPES if path.stem not in OF_OTHERS]
HERE = {"--model": TINY, "--train_prompts": PROMPTS, "--rewards": "shapes", "--save_strategy": "no"}
"""What is on every machine that has the repository."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)


def words(**changes):
    given = {**HERE, **{f"--{name}": str(value) for name, value in changes.items()}}
    return [word for pair in given.items() for word in pair]


def prepared(recipe="configs/train/geneval.yaml", *more, **changes):
    return launch.prepare_launch("stage launch", [recipe, *more, *words(**changes)])


# Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(recipe):
    lines = recipe.read_text().splitlines()
    for i, line in enumerate(lines):
        if line and not line.startswith(("#", " ")):
            assert "# " in line or lines[i - 1].startswith("#"), f"line {i + 1}: {line}"


@pytest.mark.parametrize("recipe", OF_THE_PAPER, ids=lambda path: path.stem)
def test_recipes_have_the_papers_values(recipe):
    config = parse_config("stage train", [str(recipe)])
    name = recipe.stem.removeprefix("grpo_").removesuffix("_1b")
    learning_rate, beta, accumulation = {
        "geneval": (5e-6, 0.03, 1),
        "hps_gdino_git": (1e-6, 0.01, 2),
        "ocr": (1e-6, 0.01, 1),
        "lora_1gpu": (5e-5, 0.03, 8),
    }[name]
    assert (config.learning_rate, config.beta) == (learning_rate, beta)
    assert config.gradient_accumulation_steps == accumulation
    assert (config.num_generations, config.per_device_train_batch_size, config.max_steps) == (8, 8, 1600)
    assert (config.guidance_scale, config.temperature, config.adam_beta1, config.adam_beta2) == (5, 1, 0.9, 0.999)
    is_stage, uses_geneval = not recipe.stem.startswith("grpo_"), name in ("geneval", "lora_1gpu")
    assert config.reweight_advantages is config.reweight_kl is is_stage
    assert config.entropy_reward_weight == (0.4 if is_stage and uses_geneval else 0)
    assert config.model == f"deepseek-community/Janus-Pro-{'1B' if recipe.stem.endswith('_1b') else '7B'}"
    assert config.output_dir == f"outputs/{recipe.stem}"


def test_recipes_of_other_methods_have_their_scripts_values():
    # Typed in from run_grpo.sh of T2I-R1 and run_t2i_train.sh of AR-GRPO.
    t2i_r1, ar_grpo = (parse_config("stage train", [f"configs/train/{name}.yaml"]) for name in OF_OTHERS)
    assert (t2i_r1.learning_rate, t2i_r1.beta, t2i_r1.guidance_scale, t2i_r1.max_steps) == (1e-6, 0.01, 5, 1600)
    assert (ar_grpo.learning_rate, ar_grpo.beta, ar_grpo.guidance_scale, ar_grpo.max_steps) == (1e-5, 1, 4, 600)
    assert t2i_r1.rewards == ["hps", "git", "gdino", "orm"] and t2i_r1.reward_weights is None
    assert [t2i_r1.gradient_accumulation_steps, ar_grpo.gradient_accumulation_steps] == [2, 1]
    # Of the script's 5 cos, 5 cos, 2 score and points / 4; vlm_judge gives points / 5.
    weights = dict(zip(ar_grpo.rewards, ar_grpo.reward_weights))
    assert weights == {"clip": 5, "hps": 5, "maniqa": 2, "vlm_judge": 5 / 4}
    for config in (t2i_r1, ar_grpo):
        assert not config.reweight_advantages and not config.reweight_kl and config.entropy_reward_weight == 0
        assert (config.num_generations, config.per_device_train_batch_size, config.temperature) == (8, 8, 1)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_rewards_of_other_methods_lack_what_can_be_got(name, monkeypatch, tmp_path):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    config = parse_config("stage train", [f"configs/train/{name}.yaml"])
    remedies = {remedy for _, remedy in preflight._rewards(config)} - {"pip install 'stage-grpo[iqa]'"}
    weights = {
        "t2i_r1": {"hps-v2.1", "git-large-vqav2", "grounding-dino-tiny", "orm-t2i-r1"},
        "ar_grpo": {"clip-vit-base-patch32", "hps-v2.1", "qwen2.5-vl-7b"},
    }[name]
    assert remedies == {f"stage weights get {entry}" for entry in weights}


def test_baselines_differ_from_stage_in_the_method_alone():
    for recipe in RECIPES:
        if recipe.stem.startswith("grpo_"):
            ours, theirs = (yaml.safe_load(p.read_text()) for p in (recipe, recipe.with_name(recipe.name[5:])))
            changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
            assert changed <= {"output_dir", "preset", "entropy_reward_weight"}


# Configurations of the launcher


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("single", DistributedType.NO),
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        *((way, DistributedType.DEEPSPEED) for way in WAYS if way.startswith("zero")),
    ],
)
def test_accelerate_reads_its_configuration(way, kind):
    file = f"configs/accelerate/{way}.yaml"
    loaded = load_config_from_file(file)
    assert loaded.distributed_type == kind
    line = ["--config_file", file, "--num_processes", "2", "--num_machines", "2", "--machine_rank", "1", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    used = [args.multi_gpu, args.use_fsdp, args.use_deepspeed]
    assert used == [kind == k for k in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)]
    assert (args.num_processes, args.num_machines, args.machine_rank) == (2, 2, 1)
    assert launch.parallel_of(Path(file), yaml.safe_load(Path(file).read_text())) == (
        "ddp" if way == "single" else way
    )


def test_fsdp2_wraps_the_layers_of_the_language_model():
    fsdp = load_config_from_file("configs/accelerate/fsdp2.yaml").fsdp_config
    policy = policy_sizes(TINY).policy
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] == type(policy.backbone.layers[0]).__name__


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("zero")])
def test_transformers_fills_every_auto_of_deepspeed(way):
    file = f"configs/deepspeed/{way}.json"
    config = parse_config("stage train", ["configs/train/geneval.yaml"])
    policy = policy_sizes(TINY).policy
    assert not hasattr(policy.config, "hidden_size")  # what transformers would take sizes from
    try:
        filled = HfTrainerDeepSpeedConfig(file)
        filled.trainer_config_process(config)
        filled.trainer_config_finalize(config, policy, 1600)
        plugin = DeepSpeedPlugin(hf_ds_config=file)
    finally:
        unset_hf_deepspeed_config()
    assert '"auto"' not in json.dumps(filled.config)
    assert filled.config["train_micro_batch_size_per_gpu"] == 8
    zero = DeepSpeedZeroConfig(**filled.config["zero_optimization"])  # refuses names that it does not know
    assert zero.stage == plugin.zero_stage == (2 if way == "zero2" else 3)
    assert (zero.offload_optimizer is not None) == (zero.offload_param is not None) == (way == "zero3_offload")
    assert zero.gather_16bit_weights_on_model_save == (way != "zero2")


# What is missing


def test_a_machine_with_nothing_gets_the_whole_list_and_no_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(preflight.shutil, "which", lambda program: None)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    line = ["launch", "configs/train/geneval.yaml", "--accelerate-config", "zero3_offload", "--report_to", "wandb"]
    line += ["--attn_implementation", "flash_attention_2"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err == "" and "11 things are missing:" in out and "the command" not in out
    wanted = [
        "8 GPUs are wanted, none visible",
        "pip install 'stage-grpo[deepspeed]'",
        "g++ is not on the PATH",
        "pip install ninja",
        "pip install flash-attn",
        "pip install 'stage-grpo[wandb]'",
        "hf download deepseek-community/Janus-Pro-7B, or --model PATH",
        "stage data build-geneval --ratio 0:1:7:1:4:5 --num 12800 --seed 0 --repeat --out prompts/geneval_train.jsonl",
        "stage weights get mask2former-swin-s-coco",
        "stage weights get clip-vit-large-patch14",
        "outputs/geneval may take 298 GB, and 1 GB are free",
    ]
    assert [text for text in wanted if text not in out] == []
    main([*line, "--dry-run"])
    assert "11 things are missing:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["hps_gdino_git", "ocr"])
def test_prompt_files_of_the_recipes_come_with_their_command(recipe):
    config = parse_config("stage train", [f"configs/train/{recipe}.yaml"])
    (remedy,) = [remedy for what, remedy in preflight._prompts(config)]
    text = re.sub(r"\\?\n# *", " ", (ROOT / f"configs/train/{recipe}.yaml").read_text())
    assert remedy in re.sub(" +", " ", text)  # as the recipe itself says
    assert config.train_prompts in remedy or str(Path(config.train_prompts).parent) in remedy


def test_commands_for_prompts_are_commands(tmp_path, capsys):
    command = preflight.PROMPT_COMMANDS["geneval_train.jsonl"].format(path=tmp_path / "train.jsonl", folder=tmp_path)
    main(shlex.split(command)[1:])
    assert "12800 prompts" in capsys.readouterr().out
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 12800


def test_weights_must_be_whole(tmp_path, monkeypatch):
    def problems(model):
        return [what for what, _ in preflight._weights("model", str(model))]

    assert problems(ROOT / TINY) == []
    folder = tmp_path / "model"
    folder.mkdir()
    assert problems(folder) == [f"model {folder} lacks config.json"]
    (folder / "config.json").write_text("{}")
    assert problems(folder) == [f"model {folder} lacks its weights (*.safetensors)"]
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").touch()
    assert problems(folder) == [f"model {folder} lacks model-2.safetensors"]
    # The same, half downloaded into the cache.
    monkeypatch.setattr(preflight, "snapshot_download", lambda name, local_files_only: str(folder))
    assert "neither a folder nor whole in the hub cache" in problems("some/model")[0]
    (folder / "model-2.safetensors").touch()
    assert problems(folder) == problems("some/model") == []
    # What training refuses although it is whole.
    (folder / "config.json").write_text('{"model_type": "multi_modality"}')
    assert problems(folder) == []
    ((what, remedy),) = preflight._weights("model", "some/model")
    assert what == "model some/model is a hub name in DeepSeek's own format"
    assert remedy == "hf download some/model --local-dir model, then --model model"
    ((_, remedy),) = preflight._weights("ref_model", "deepseek-ai/Janus-Pro-7B")
    assert remedy.endswith("then --ref_model Janus-Pro-7B; or --ref_model deepseek-community/Janus-Pro-7B")
    original = {"model_type": "multi_modality"}
    monkeypatch.setattr(loading.PreTrainedConfig, "get_config_dict", lambda name: (original, {}))
    with pytest.raises(ValueError, match=r"own format; hf download some/model --local-dir model, then --model model$"):
        loading.load_policy("some/model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    ((what, remedy),) = preflight._weights("model", str(tmp_path / "run"))
    assert what.endswith("run is a LoRA adapter") and remedy.startswith(f"stage merge {tmp_path / 'run'} ")
    assert list(preflight._weights("ref_model", str(tmp_path / "run"))) == []


def test_paths_rewards_and_disk_are_named(tmp_path, gpus):
    (tmp_path / "file").touch()
    wrong = {
        "rewards": "absent_module:f",
        "output_dir": tmp_path / "file",
        "model": "./no/such/folder/Janus-Pro-7B",
        "eval_prompts": "absent.txt",
        "eval_strategy": "epoch",
    }
    found = prepared("configs/train/geneval.yaml", "--num-processes", "2", **wrong).lacking
    assert [what.split("(")[0].strip() for what, _ in found] == [
        "model ./no/such/folder/Janus-Pro-7B is no folder",
        "eval_prompts absent.txt is not there",
        "reward 'absent_module:f' cannot be imported",
        f"output_dir {tmp_path / 'file'} cannot be made: {tmp_path / 'file'} is a file",
    ]


def checkpoint_of(run, name, size):
    """A whole checkpoint of so many bytes, and a few."""
    (run / name).mkdir(parents=True)
    with (run / name / "weights").open("wb") as file:
        file.truncate(size)
    seal(run / name)


def test_a_run_that_continues_needs_room_for_what_is_not_there_yet(tmp_path, gpus, monkeypatch):
    run, recipe = tmp_path / "run", "configs/train/geneval.yaml"
    changes = {"output_dir": run, "save_strategy": "steps", "save_total_limit": 2}
    done = prepared(recipe, "--gpus", "2", **changes).plan.work
    size = done.checkpoint_bytes
    assert done.disk_bytes == 3 * size + done.final_bytes
    for name in ("checkpoint-100", "checkpoint-200"):
        checkpoint_of(run, name, size)

    def lacking(free, **more):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return prepared(recipe, "--gpus", "2", **{**changes, **more}).lacking

    # The third, before the first is deleted, and the weights at the end.
    assert lacking(size + done.final_bytes) == []
    ((what, _),) = lacking(size + done.final_bytes - 1)
    assert "GB of it are there), and" in what
    assert lacking(size + done.final_bytes, output_dir=tmp_path / "other") != []
    assert lacking(size + done.final_bytes, resume="never") == []


def test_of_what_is_there_counts_what_goes_or_stays_in_its_place(tmp_path):
    def held(num_checkpoints=3, **changes):
        config = parse_config("stage plan", ["configs/train/geneval.yaml", *words(output_dir=tmp_path, **changes)])
        plan = make_plan(config, 2)
        done = dataclasses.replace(plan.work, num_checkpoints=num_checkpoints, checkpoint_bytes=1000)
        return held_bytes(config, dataclasses.replace(done, weights_bytes=300, final_bytes=900))

    assert held() == 0
    checkpoint_of(tmp_path, "checkpoint-100", 600)
    whole = sum(path.stat().st_size for path in (tmp_path / "checkpoint-100").iterdir())
    assert 600 < whole < 1000 and held() == whole
    assert held(1) == held(0) == 0  # the only one is deleted when its successor is whole
    (tmp_path / "checkpoint-150").mkdir()
    (tmp_path / "checkpoint-150" / "weights").write_bytes(b"torn")
    assert held() == whole  # it stays, and is no part of the plan
    checkpoint_of(tmp_path, "checkpoint-157", 600)
    several = sum(path.stat().st_size for path in (tmp_path / "checkpoint-157").iterdir()) + whole
    assert held() == min(several, 2000) and held(2) == 1000  # the limit deletes it
    config = {"save_total_limit": "None"}
    assert held(16, **config) == whole  # without a limit it stays beside those of every 100 steps
    (tmp_path / ".partial" / "checkpoint-200").mkdir(parents=True)
    (tmp_path / ".partial" / "checkpoint-200" / "weights").write_bytes(b"0" * 50)
    assert held(1) == 50
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"0" * 310)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 300)
    assert held(1) == 50 + 600  # the last and the best; there must be room for a third


def test_a_reward_of_ones_own_may_stand_in_the_folder(tmp_path, gpus, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def f(images, prompts, metadata):\n    return [0.0] * len(images)\n")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    changes = {"rewards": "own_rewards:f", "model": ROOT / TINY, "train_prompts": "prompts.txt"}
    assert prepared(str(ROOT / "configs/train/geneval.yaml"), "--num-processes", "2", **changes).lacking == []


# The command


def test_a_ready_machine_starts_the_exact_command(gpus, monkeypatch, capsys):
    started = []

    def execv(program, line):
        started.append(line)
        raise SystemExit(0)  # it does not come back

    monkeypatch.setattr(launch.os, "execv", execv)
    with pytest.raises(SystemExit):
        main(["launch", "configs/train/geneval.yaml", "--num-processes", "2", *words(beta=0.02)])
    out = capsys.readouterr().out
    assert "nothing is missing" in out
    (line,) = started
    assert line[:3] == [sys.executable, "-m", "stage_grpo.supervise"]
    command = line[3:]
    assert shlex.join(command) in out
    assert command[:7] == [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml"),
        *("--num_processes", "2"),
    ]
    assert command[7:] == ["-m", "stage_grpo.cli", "train", "configs/train/geneval.yaml", *words(beta=0.02)]
    parsed = launch_command_parser().parse_args(command[3:])
    assert parsed.module and parsed.training_script == "stage_grpo.cli"
    config = parse_config("stage train", parsed.training_script_args[1:])
    assert config.beta == 0.02 and config.rewards == ["shapes"]


def test_the_way_to_spread_follows_from_recipe_and_gpus(gpus, monkeypatch):
    def chosen(*args, **changes):
        command = prepared(*args, **changes).command
        return Path(command[command.index("--config_file") + 1]).stem

    assert chosen() == "zero3"
    assert chosen("configs/train/lora_1gpu.yaml") == "single"
    assert chosen("configs/train/lora_1gpu.yaml", "--num-processes", "2") == "ddp"
    assert chosen("configs/train/geneval.yaml", "--num-processes", "1") == "single"
    assert chosen("configs/train/geneval.yaml", "--accelerate-config", "fsdp2") == "fsdp2"
    assert chosen("configs/train/geneval.yaml", "--accelerate_config", "configs/accelerate/zero2.yaml") == "zero2"
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    assert chosen("configs/train/lora_1gpu.yaml") == "single"
    assert prepared("configs/train/lora_1gpu.yaml").lacking == []


def test_too_few_gpus_are_reported_and_fewer_can_be_asked_for(gpus):
    ((what, remedy),) = prepared().lacking
    assert what == "8 GPUs are wanted, 2 visible" and "--num-processes 2" in remedy
    assert prepared("configs/train/geneval.yaml", "--num-processes", "2").lacking == []
    assert prepared("configs/train/geneval.yaml", "--gpus", "2").lacking == []


def test_a_recipe_for_one_gpu_stays_on_one(monkeypatch, caplog):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 8)
    lora = "configs/train/lora_1gpu.yaml"
    one, eight = prepared(lora), prepared(lora, "--num-processes", "8", gradient_accumulation_steps=1)
    sizes = [(ready.plan.setting.num_gpus, ready.plan.work.images_per_step) for ready in (one, eight)]
    assert sizes == [(1, 64), (8, 64)]
    assert "7 more GPUs are visible; --num-processes uses them" in one.describe()
    assert "more GPUs" not in eight.describe()
    # One process sees eight GPUs, and uses the first.
    config = parse_config("stage train", [lora, *words()])
    assert config.n_gpu == 1
    training._check_config(config)
    assert "one process trains on the first of 8 visible GPUs" in caplog.text


def test_several_machines(gpus):
    machines = ["--num-machines", "4", "--machine-rank", "3", "--main-process-ip", "10.0.0.1"]
    ready = prepared("configs/train/geneval.yaml", *machines, "--main-process-port", "29400", "--gpus", "2")
    assert ready.lacking == [] and ready.plan.setting.num_gpus == 8
    line = " ".join(ready.command)
    assert "--num_processes 8 --num_machines 4 --machine_rank 3 --main_process_ip 10.0.0.1" in line
    assert "--main_process_port 29400 -m stage_grpo.cli" in line
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(ready.command[3:]))
    assert (args.num_processes, args.num_machines, args.machine_rank) == (8, 4, 3)
    assert (args.main_process_ip, args.deepspeed_multinode_launcher) == ("10.0.0.1", "standard")


def test_batches_are_counted_over_all_machines(gpus):
    """Half a group on each of the processes, as docs/distributed.md says for twice the GPUs."""
    machines = ["--num-machines", "2", "--machine-rank", "0", "--main-process-ip", "10.0.0.1", "--num-processes", "16"]
    plan = prepared("configs/train/geneval.yaml", *machines, per_device_train_batch_size=4).plan
    assert (plan.setting.num_gpus, plan.work.prompts_per_rollout, plan.work.images_per_step) == (16, 8, 64)
    # Half a rollout on each of two.
    shared = prepared("configs/train/geneval.yaml", "--gpus", "2", generation_batch_size=64).plan
    assert (shared.setting.num_gpus, shared.setting.num_rollout_rows) == (2, 32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-machines", "2"], "num_machines=2 needs --machine-rank and --main-process-ip"),
        (["--num-processes", "3", "--num-machines", "2"], "num_processes=3 must be a multiple of num_machines=2"),
        (["--num-processes", "0"], "num_processes=0 must be a multiple"),
        (["--num-processes", "1", "--accelerate-config", "ddp"], "give --accelerate-config single"),
        (["--accelerate-config", "single"], "starts one process, not 8; give --num-processes 1"),
        (["--accelerate-config", "zero4"], "accelerate_config='zero4' is no file, and there is no zero4.yaml in"),
        (["--betta", "1"], "unknown key 'betta'"),
    ],
)
def test_wrong_words_end_in_one_line(more, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["launch", "configs/train/geneval.yaml", *more])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" and line.startswith("stage launch: error: ") and message in line


def test_the_configuration_comes_first(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--dry-run", "--beta", "0.1", "configs/train/geneval.yaml"])
    assert "name the configuration first" in capsys.readouterr().err


def test_unknown_ways_to_spread_are_refused(tmp_path):
    for content, message in (
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type='MEGATRON_LM'"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "FSDP with fsdp_version 2"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "absent.json"}},
            "absent.json",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            launch.parallel_of(tmp_path / "a/b/c.yaml", content)


def test_the_dry_run_of_a_script_shows_no_traceback(tmp_path):
    line = [sys.executable, str(ROOT / "scripts/run_training_geneval.py"), "--dry-run"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hf download deepseek-community/Janus-Pro-7B" in done.stdout


@pytest.mark.parametrize("script", ["geneval", "hps", "ocr"])
def test_scripts_work_from_any_folder(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--dry-run", "--max_steps", "7"])
    runpy.run_path(str(ROOT / f"scripts/run_training_{script}.py"), run_name="__main__")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-2:] == ["--max_steps", "7"]
    named = {Path(word).name: word for word in command if word.endswith((".yaml", ".json"))}
    recipe = {"hps": "hps_gdino_git"}.get(script, script)
    assert named.keys() == {"zero3.yaml", "zero3.json", f"{recipe}.yaml"}
    assert all((tmp_path / word).is_file() for word in named.values())


# Starting and stopping

WORKER = """
import os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
received = []
signal.signal(int(sys.argv[2]), lambda number, _: received.append(number))
(folder / f"ready_{rank}").touch()
while not received:
    time.sleep(0.02)
time.sleep(0.5 + int(rank))  # the rest of a step, and a checkpoint
(folder / f"saved_{rank}").touch()
"""


@pytest.mark.parametrize(("sent", "received"), [("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_a_signal_lets_every_process_finish_its_step(tmp_path, sent, received):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    line += ["--num_processes", "2", "--main_process_port", "0", str(worker), str(tmp_path)]
    number = getattr(signal, received).value
    # Tests that run in the background of a shell inherit an ignored SIGINT, and what was ignored stays ignored.
    process = subprocess.Popen(
        [sys.executable, "-m", "stage_grpo.supervise", *line, str(number)],
        preexec_fn=lambda: signal.signal(getattr(signal, sent), signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(getattr(signal, sent))
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert all((tmp_path / f"saved_{rank}").exists() for rank in (0, 1))


def test_exit_codes_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    assert supervise.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert supervise.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
    assert supervise.run([sys.executable, "-c", "import os, sys; sys.exit(os.getsid(0) != os.getpid())"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
