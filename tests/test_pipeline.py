"""ImagePipeline: prompts in, images out, the same ones as from the command line."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import stage_grpo
from stage_grpo import ImagePipeline
from stage_grpo.cli import main
from stage_grpo.generation.pipeline import find_checkpoint, trained_template
from stage_grpo.images.folders import read_prompt_folders
from stage_grpo.run_checkpoints import seal

PROMPTS = ["a photo of a circle", "a photo of a red circle and a blue square"]


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return ImagePipeline.from_pretrained(checkpoint)


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


def test_images_are_those_of_the_command_line(pipeline, checkpoint, tmp_path):
    images = pipeline(PROMPTS, num_images=2, seed=3, guidance_scale=2.0, batch_size=3)
    assert {(image.size, image.mode) for image in images} == {((48, 48), "RGB")}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = f"--num-images 2 --seed 3 --guidance-scale 2 --model {checkpoint} --prompts {tmp_path / 'prompts.txt'}"
    main(["generate", "--out", str(tmp_path / "images"), *words.split()])
    written = [Image.open(path) for folder in read_prompt_folders(tmp_path / "images") for path in folder.images]
    assert pixels(images) == pixels(written)


def test_one_prompt_is_the_first_of_a_list(pipeline):
    one = pipeline(PROMPTS[0], num_images=3, guidance_scale=1.0)
    assert len(set(pixels(one))) == 3
    assert pixels(pipeline(PROMPTS, num_images=3, guidance_scale=1.0)[:3]) == pixels(one)
    assert pixels(pipeline(PROMPTS[0], num_images=2, guidance_scale=1.0, progress=True)) == pixels(one[:2])
    assert pixels(pipeline(PROMPTS[0], seed=1, guidance_scale=1.0)) != pixels(one[:1])


def test_guidance_is_the_checkpoints_own_else_five(checkpoint, tmp_path):
    own = shutil.copytree(checkpoint, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps({**config, "guidance_scale": 2.5}))
    pipeline = ImagePipeline.from_pretrained(own)
    assert pipeline.default_guidance_scale == 2.5
    assert pixels(pipeline(PROMPTS)) == pixels(pipeline(PROMPTS, guidance_scale=2.5))
    assert pixels(pipeline(PROMPTS)) != pixels(pipeline(PROMPTS, guidance_scale=1.0))
    pipeline.policy.generation_config.guidance_scale = None
    assert pipeline.default_guidance_scale == 5.0


def test_dtype_and_device(pipeline, checkpoint):
    half = ImagePipeline.from_pretrained(checkpoint, dtype="bfloat16")
    weight = half.policy.get_output_embeddings().weight
    assert weight.dtype == torch.bfloat16 and pipeline.policy.get_output_embeddings().weight.dtype == torch.float32
    assert (
        half.to("cpu") is half and half.to(torch.float32).policy.get_output_embeddings().weight.dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"prompt": []}, "0 prompts"),
        ({"prompt": "a", "num_images": 0}, "num_images=0"),
        ({"prompt": "a", "seed": -1}, "seed=-1"),
        ({"prompt": ["a", " "]}, "prompt 1 is empty"),
        ({"prompt": "a", "guidance_scale": 0.0}, "guidance_scale=0.0"),
    ],
)
def test_wrong_calls_are_refused(call, named, pipeline):
    with pytest.raises(ValueError, match=named):
        pipeline(**call)


@pytest.fixture
def run(checkpoint, tmp_path):
    """Folder of a run that was killed: two checkpoints, no final weights."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": {"prompt_template": "t2i_r1"}}))
    for step in (9, 10):
        seal(shutil.copytree(checkpoint, run / f"checkpoint-{step}"))
    return run


def test_a_run_without_final_weights_gives_its_newest_whole_checkpoint(run, checkpoint):
    assert find_checkpoint(run) == str(run / "checkpoint-10")
    pipeline = ImagePipeline.from_pretrained(run)
    assert pipeline.prompt_template == "t2i_r1"
    own = ImagePipeline.from_pretrained(checkpoint, prompt_template="t2i_r1")
    assert pixels(pipeline(PROMPTS, guidance_scale=1.0)) == pixels(own(PROMPTS, guidance_scale=1.0))
    (run / "checkpoint-10" / "model.safetensors").write_bytes(b"torn")
    assert find_checkpoint(run) == str(run / "checkpoint-9")
    (run / "checkpoint-9" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*checkpoint-10 is torn"):
        ImagePipeline.from_pretrained(run)


def test_final_weights_go_before_checkpoints(run, checkpoint):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{checkpoint}/{name}", run)
    assert find_checkpoint(run) == str(run)


def test_a_run_that_was_trained_on_gives_its_newer_checkpoint(run, checkpoint, caplog):
    """Final weights of an earlier end, then training to a higher step that was killed."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{checkpoint}/{name}", run)
    os.utime(run / "model.safetensors", (0, 0))
    assert find_checkpoint(run) == str(run / "checkpoint-10")
    assert f"trained on after its final weights were written; drawing from {run}/checkpoint-10" in caplog.text
    # A checkpoint of before the end is no newer, nor is a torn one.
    for step in (9, 10):
        manifest = run / f"checkpoint-{step}" / "manifest.json"
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**content, "written_at": step - 10}))
    assert find_checkpoint(run) == str(run)
    seal(run / "checkpoint-10")
    (run / "checkpoint-10" / "model.safetensors").write_bytes(b"torn")
    caplog.clear()
    assert find_checkpoint(run) == str(run)
    assert "checkpoint-10 is torn" in caplog.text and f"drawing from {run}\n" in caplog.text


@pytest.mark.parametrize("name", ["", "checkpoint-9", "best", "ema"])
def test_every_folder_of_a_run_has_its_template(name, tmp_path, monkeypatch):
    folder = tmp_path / "run" / name
    folder.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"prompt_template": "t2i_r1"}}))
    assert trained_template(folder) == "t2i_r1"
    monkeypatch.chdir(folder)
    assert trained_template(".") == "t2i_r1"
    assert trained_template(tmp_path) is None and trained_template("nobody/nothing") is None


def test_the_pipeline_is_part_of_the_package():
    assert "ImagePipeline" in dir(stage_grpo) and ImagePipeline.__module__ == "stage_grpo.generation.pipeline"
