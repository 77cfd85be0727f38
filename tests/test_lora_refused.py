"""LoRA on disk: adapters and places to merge into that cannot be used, each refused in one line with a remedy."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from original_janus import write_original
from stage_grpo.cli import main
from stage_grpo.merge import merge
from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy import load_policy
from stage_grpo.policy.adapters import check_no_adapter
from test_trainer import logged, trainer_for

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter that changes every layer, to be damaged."""
    model = get_peft_model(load_policy(checkpoint), LoraConfig(r=16, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def edit_tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def same_weights(policy, other):
    two = other.state_dict()
    return all(torch.equal(tensor, two[name]) for name, tensor in policy.state_dict().items())


def without(word):
    return lambda tensors: {n: t for n, t in tensors.items() if word not in n}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "torn weights": (lambda a: cut(a / WEIGHTS), WEIGHTS, "is not a whole safetensors file"),
    "torn config": (lambda a: cut(a / CONFIG), CONFIG, "is not valid JSON"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), WEIGHTS, "copy the whole folder again"),
    "pickle": (lambda a: (a / WEIGHTS).rename(a / "adapter_model.bin"), "adapter_model.bin", "writes safetensors"),
    "tensor lost": (lambda a: edit_tensors(a, without("layers.1.mlp.up_proj.lora_B")), "up_proj.lora_B", "it lacks"),
    "other rank": (lambda a: edit_config(a, r=4), "(16, 512), the base needs (4, 512)", "trained on"),
    "other modules": (lambda a: edit_config(a, target_modules=["q_proj"]), "down_proj", "has no place"),
    "no such modules": (lambda a: edit_config(a, target_modules=["c_attn"]), "c_attn", "does not fit its base"),
    "NaN": (lambda a: edit_tensors(a, lambda ts: {n: t * torch.nan for n, t in ts.items()}), "NaN", "another"),
    "not LoRA": (lambda a: edit_config(a, peft_type="IA3"), "peft_type='IA3'", "only LORA"),
    "DoRA": (lambda a: edit_config(a, use_dora=True), "use_dora=True", "merge this adapter with peft"),
    "bias": (lambda a: edit_config(a, bias="all"), "bias='all'", "merge this adapter with peft"),
    "wrong rank": (lambda a: edit_config(a, r=-1), "the value passed is -1", "should be a positive"),
    "no base": (lambda a: edit_config(a, base_model_name_or_path=None), "names no base", "--base PATH"),
    "base is gone": (lambda a: edit_config(a, base_model_name_or_path="./gone"), "'./gone'", "--base PATH"),
    "base not a checkpoint": (
        lambda a: edit_config(a, base_model_name_or_path=str(a.parent)),
        "config.json",
        "--base",
    ),
    "base is itself": (lambda a: edit_config(a, base_model_name_or_path=str(a)), "an adapter itself", "--base OUT"),
    "two in one": (lambda a: (a / "config.json").write_text("{}"), "config.json", "move one of them away"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_adapters_that_cannot_be_merged_are_refused_in_one_line(case, adapter, tmp_path, capsys):
    damage, named, remedy = DAMAGE[case]
    damage(adapter)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(adapter), str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and len(message.splitlines()) == 1, message
    assert named in message and remedy in message and str(adapter) in message, message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_smaller_base_is_refused(adapter, weights, tmp_path):
    """Another width, and fewer layers than the adapter has."""
    with pytest.raises(ValueError, match=r"does not fit its base .*original.*; give the checkpoint it was trained on"):
        load_policy(adapter, base=write_original(tmp_path / "original", weights))


def test_a_base_of_another_place_is_asked_for_and_taken(adapter, checkpoint, tmp_path, monkeypatch):
    """Runs are started in a folder of their own, with paths relative to it."""
    expected = load_policy(adapter)
    edit_config(adapter, base_model_name_or_path="base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"'base', cannot be loaded from here; say where it is: `stage merge \S+ OUT "
    ):
        load_policy(adapter)
    assert same_weights(load_policy(adapter, base=checkpoint), expected)
    main(["merge", str(adapter), "out", "--base", checkpoint])
    assert same_weights(load_policy("out"), expected)
    with pytest.raises(ValueError, match=r"base='x' is for adapters, and model='out' is none"):
        load_policy("out", base="x")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["ADAPTER", "full"], "full is not empty; choose another folder"),
        (["ADAPTER", "file"], "file is a file; name a folder"),
        (["full", "out"], "full holds no adapter_config.json; give the output folder of a LoRA run"),
        (["ADAPTER", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["ADAPTER"], "the following arguments are required: out"),
    ],
)
def test_wrong_words_to_merge_are_refused(words, named, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("full/notes", "file"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["merge", *[str(adapter) if word == "ADAPTER" else word for word in words]])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and len(err.splitlines()) == 1 and named in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_that_fails_half_way_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("stage_grpo.merge.write_json", full)
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        merge(adapter, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_drowns_in_rounding_is_named(adapter, checkpoint, caplog):
    edit_tensors(adapter, lambda tensors: {n: 1e-4 * t if "lora_B" in n else t for n, t in tensors.items()})
    load_policy(adapter)
    assert not caplog.records
    load_policy(adapter, "bfloat16")
    (record,) = caplog.records
    assert str(adapter) in record.getMessage() and "bfloat16" in record.getMessage()


def test_training_from_an_adapter_asks_for_a_merge_first(adapter, tmp_path):
    """TRL would load the reference by name: the un-merged base, and the KL would be silently wrong."""
    with pytest.raises(ValueError, match=r"model='\S+' is a LoRA adapter.*run `stage merge \S+ OUT`, then set model"):
        check_no_adapter("model", str(adapter))
    with pytest.raises(ValueError, match="the reference policy is loaded from where the policy came from"):
        trainer_for(str(adapter), tmp_path / "run")
    merged = str(merge(adapter, tmp_path / "merged"))
    check_no_adapter("model", merged)
    stage = trainer_for(merged, tmp_path / "run", max_steps=1)
    assert same_weights(stage.ref_model, load_policy(adapter))
    stage.train()
    assert logged(tmp_path / "run")[0]["kl"] == 0.0
