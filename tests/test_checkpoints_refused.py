"""The cache of converted checkpoints, the command, and everything that a conversion refuses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import JanusConfig

from original_janus import write_as_bin, write_original
from stage_grpo.checkpoints import as_transformers, configs, convert
from stage_grpo.checkpoints.command import main_convert
from stage_grpo.checkpoints.layout import CODES_USED
from stage_grpo.checkpoints.shards import read_tensors
from stage_grpo.policy import load_policy

# The cache


def test_original_checkpoint_is_converted_once(weights, tmp_path):
    source = write_original(tmp_path / "Janus", weights)
    first = as_transformers(source)
    assert first == tmp_path / "Janus.transformers"
    assert load_policy(first).grid == (4, 4)
    stamp = (first / "model.safetensors").stat().st_ino
    config = source / "config.json"
    config.touch()  # another time, the same bytes
    assert as_transformers(str(source)) == first and (first / "model.safetensors").stat().st_ino == stamp
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    assert as_transformers(source) == first and (first / "model.safetensors").stat().st_ino != stamp
    assert load_policy(first).config.text_config.rms_norm_eps == 1e-6
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["Janus", "Janus.transformers"]


def test_other_folders_are_left_alone(checkpoint, tmp_path):
    assert as_transformers(checkpoint) == Path(checkpoint)
    assert as_transformers(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_folder_that_is_no_conversion_is_not_replaced(weights, tmp_path):
    source = write_original(tmp_path / "original", weights)
    (tmp_path / "original.transformers").mkdir()
    with pytest.raises(ValueError, match="is no earlier conversion and is not replaced; move it away"):
        as_transformers(source)


def test_pytorch_files_of_before_2020_are_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    read = dict(read_tensors(tmp_path / "old.bin"))
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


# What is refused


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(weights, tmp_path):
    source = write_original(tmp_path / "original", weights)
    (source / "model.safetensors").unlink()
    torch.save({**weights, "trap": Trap(tmp_path / "sprung")}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is torn, or holds more than tensors, and is refused"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"extra.weight": torch.ones(1)}}, "tensor 'extra.weight' has no place in the model"),
        ({"tensors": {NORM: None}}, f"lacks 1 tensors: '{NORM}'; download the whole checkpoint"),
        ({"tensors": {CODES_USED: None}}, f"lacks 1 tensors: '{CODES_USED}'"),
        ({"tensors": {NORM: torch.ones(47)}}, rf"'{NORM}' has shape \(47,\), but config.json makes it \(48,\)"),
        ({"config": {"model_type": "llava"}}, r"is a 'llava' checkpoint; Janus and Janus-Pro are"),
        ({"config": {"model_type": "janus"}}, "is in transformers format already; use it as it is"),
        ({"config": {"gen_vision_config": {"cls": "VQ-8"}}}, "gen_vision_config.cls is 'VQ-8'; only 'VQ-16'"),
        (
            {"config": {"vision_config": {"cls": "CLIPVisionTower", "params": {"model_name": "sam_b"}}}},
            r"vision_config.model_name is 'sam_b'; known towers: \['siglip_large_patch16_384'\]",
        ),
        ({"config": {"language_config": {"model_type": "mamba"}}}, "model_type is 'mamba'; only 'llama'"),
        (
            {"config": {"language_config": {}}},
            "aligner_config.n_embed is 48, but the rest .* makes it 4096",
        ),
        ({"config": {"gen_head_config": {"cls": "vision_head"}}}, "config.json lacks the entry 'n_embed'"),
        ({"config": {"language_config": {"hidden_size": "big"}}}, "config.json has an entry of the wrong kind"),
        ({"files": {"tokenizer.json": None}}, r"tokenizer\.json is missing; download the whole checkpoint"),
        ({"files": {"tokenizer.json": {}}}, r"tokenizer\.json is not a whole tokenizer"),
        ({"files": {"tokenizer_config.json": []}}, r"tokenizer_config\.json holds a list, not an object"),
        ({"files": {"processor_config.json": {"num_image_tokens": 576}}}, "num_image_tokens=576, but .* makes it 16"),
    ],
)
def test_wrong_checkpoints_are_named_and_leave_nothing_behind(weights, tmp_path, change, message):
    tensors = {**weights, **change.get("tensors", {})}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    source = write_original(tmp_path / "original", kept, change.get("config"), change.get("files"))
    with pytest.raises(ValueError, match=message) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value).strip() or "wrong kind" in message
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_torn_files_are_named(weights, tmp_path):
    source = write_original(tmp_path / "original", weights)
    file = source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        convert(source, tmp_path / "out")
    file.unlink()
    torch.save(weights, source / "pytorch_model.bin")
    content = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a whole pytorch file"):
        convert(source, tmp_path / "out")
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no weights; it needs one of model\.safetensors, pytorch_model\.bin"):
        convert(source, tmp_path / "out")


def test_shards_that_disagree_with_their_index_are_named(weights, tmp_path):
    source = write_original(tmp_path / "original", weights)
    write_as_bin(source, weights, num_files=2)
    second = source / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(second), next(iter(weights)): torch.ones(1, 16, 32)}, second)
    with pytest.raises(ValueError, match="stands in another file too"):
        convert(source, tmp_path / "out")
    second.unlink()
    with pytest.raises(ValueError, match=r"names files that are missing: 'pytorch_model-00002-of-00002\.bin'"):
        convert(source, tmp_path / "out")


def test_full_disk_is_noticed_before_the_work(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match=r"has 0\.0 GB free, the conversion needs 0\.0; make room"):
        convert(converted, tmp_path / "out", to="original")
    assert not list(tmp_path.iterdir())


def test_what_the_original_format_cannot_say_is_refused(converted, tmp_path):
    config = JanusConfig.from_pretrained(converted)
    config.vision_config.hidden_act = "relu"
    with pytest.raises(ValueError, match=r"vision_config\.hidden_act is 'relu'; the original format has only 'gelu'"):
        configs.to_original_config(config)


# The command


def test_command(converted, tmp_path):
    out = tmp_path / "out"
    assert main_convert("stage convert", [str(converted), str(out), "--to", "original"]) == f"wrote {out}"
    with pytest.raises(ValueError, match="out exists already; choose another folder, or say --overwrite"):
        main_convert("stage convert", [str(converted), str(out), "--to", "original"])
    main_convert("stage convert", [str(converted), str(out), "--to", "original", "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="invalid choice: 'onnx'"):
        main_convert("stage convert", [str(converted), str(out), "--to", "onnx"])
    with pytest.raises(ValueError, match="to='onnx' is not a format; choose 'transformers' or 'original'"):
        convert(converted, out, to="onnx")
