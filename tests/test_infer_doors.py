"""The scripts of infer/: flags of the published code, several processes, and kills."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stage_grpo.benchmarks import BENCHMARKS
from stage_grpo.generation.doors import generate_words

INFER = Path(__file__).parents[1] / "infer"
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
    {"tag": "colors", "include": [{"class": "bed", "count": 1, "color": "red"}], "prompt": "a photo of a red bed"},
]
# Prompt files in the forms that the benchmarks' authors publish.
FILES = {
    "geneval.jsonl": "\n".join(map(json.dumps, GENEVAL)),
    "hps/anime.json": '["a ring", "two rings"]',
    "hps/photo.json": '["a cross"]',
    "drawbench.csv": "Prompts,Category\nA red colored car.,Colors\nA cube and a sphere.,Positional\n",
    "t2i/color_val.txt": "a green bench and a red car\n",
    "t2i/spatial_val.txt": "a cow on the left of a car\n",
    "ocr.txt": 'a sign that says "Open"\na wall with "GRPO is a long word" on it\n',
    "test_data.txt": "a photo of an apple and a banana\nportrait of a ring\n",
}
FAST = ["--guidance-scale", "1", "--batch-size", "4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_door(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    runpy.run_path(str(INFER / f"{name}.py"), run_name="__main__")


DOORS = {
    "reason_inference_hps": (
        ["--prompts_dir", "hps"],
        ["set/anime/00000.jpg", "set/anime/00001.jpg", "set/photo/00000.jpg", "set.about/manifest.jsonl"],
    ),
    "reason_inference_drawbench": (
        ["--drawbench_csv_path", "drawbench.csv", "--image-size", "48"],
        ["set/00000.png", "set/00001.png"],
    ),
    "reason_inference_t2i_compbench": (
        ["--prompts_dir", "t2i", "--bench_types", "spatial_val", "--num_generation", "2"],
        [f"set/spatial_val/samples/a cow on the left of a car_{k:06d}.png" for k in range(2)],
    ),
    "reason_inference_ocr": (
        ["--ocr_txt_path", "ocr.txt", "--temperature", "0.9", "--semantic_cot", "False"],
        ["set/00000.png", "set/00001.png"],
    ),
    "reason_inference": (
        ["--data_path", "test_data.txt", "--reasoning_prompt_path", "reasoning_prompt.txt"],
        [f"set/{i:05d}/samples/{k:05d}.png" for i in range(2) for k in range(4)] + ["set/00000/grid.png"],
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_doors_draw_what_the_scorers_read(name, place, checkpoint, capsys, monkeypatch):
    """Alone, and shared out over two processes with the same result."""
    words, expected = DOORS[name]
    run_door(name, ["--model_path", checkpoint, "--save_root", "set", *words, *FAST], monkeypatch)
    files = contents(place)
    images = {path for path in files if path.startswith("set/") and Path(path).suffix in (".png", ".jpg")}
    grids = {path for path in images if path.endswith("grid.png")}
    assert set(expected) <= files.keys() and len(images - grids) == len(
        [e for e in expected if "0000" in Path(e).name]
    )
    settings = json.loads(files.get("set/generation.json", files.get("set.about/generation.json")))
    assert settings["prompt_template"] == "t2i_r1"
    assert settings["sampling"]["temperature"] == (0.9 if name.endswith("ocr") else 1.0)
    for folder in ("set", "set.about"):
        shutil.rmtree(folder, ignore_errors=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run_door(name, ["--model_path", checkpoint, "--save_root", "set", *words, *FAST], monkeypatch)
    said = capsys.readouterr().out.splitlines()[-2:]
    assert contents(place) == files
    assert said[0].startswith("process 1 of 2: wrote") and said[1].startswith("process 0 of 2: wrote")


@pytest.mark.parametrize("name", ["geneval", "hps", "drawbench", "t2i_compbench", "ocr"])
def test_doors_leave_the_protocol_to_the_benchmark(name, checkpoint):
    """No number of images, no layout and no prompts but the benchmark's own, unless told otherwise."""
    words = generate_words(name, ["--model_path", checkpoint, "--save_root", "out", "--seed", "7"])
    template = ["--prompt-template", "t2i_r1"]
    assert words == ["--model", checkpoint, "--out", "out", "--benchmark", name, *template, "--seed", "7"]
    protocol = {"geneval": 4, "hps": 1, "drawbench": 1, "t2i_compbench": 10, "ocr": 1}
    assert BENCHMARKS[name].images_per_prompt == protocol[name]


def test_the_template_of_a_run_goes_before_the_published_one(checkpoint, tmp_path):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"config": {"prompt_template": "janus"}}))
    words = generate_words("ocr", ["--model_path", str(run), "--save_root", "out"])
    assert words[words.index("--prompt-template") + 1] == "janus"
    # The last of two equal flags counts, and the user's come last.
    words = generate_words("ocr", ["--model_path", str(run), "--save_root", "out", "--prompt-template", "t2i_r1"])
    assert words[-2:] == ["--prompt-template", "t2i_r1"]


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        (
            "geneval",
            ["--semantic_cot", "True"],
            "semantic_cot=True: a plan in words before the image is not supported, so the images of T2I-R1's own",
        ),
        ("geneval", ["--semantic_cot", "maybe"], "'maybe' is neither True nor False"),
        ("geneval", ["--image-size", "384"], "image_size=384: this model draws 48 px"),
        ("geneval", ["--ocr_txt_path", "ocr.txt"], "--ocr_txt_path"),
        ("geneval", ["--num_generation", "x"], "--num_generation"),
        ("t2i_compbench", ["--bench_types", "new_objects"], "new_objects: t2i_compbench has only color, shape"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(name, words, named, place, checkpoint, capsys, monkeypatch):
    before = contents(place)
    prompts = ["--prompts_dir", "t2i" if name == "t2i_compbench" else "geneval.jsonl"]
    with pytest.raises(SystemExit) as ended:
        run_door(
            f"reason_inference_{name}",
            ["--model_path", checkpoint, "--save_root", "out", *prompts, *words],
            monkeypatch,
        )
    err = capsys.readouterr().err
    assert ended.value.code == 2 and named in err and len(err.splitlines()) == 1, err
    assert contents(place) == before


@pytest.mark.parametrize("path", sorted(INFER.glob("*.py")), ids=lambda path: path.stem)
def test_doors_are_thin_and_explain_themselves(path, capsys, monkeypatch):
    assert len(path.read_text().splitlines()) <= 25
    with pytest.raises(SystemExit) as ended:
        run_door(path.stem, ["--help"], monkeypatch)
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--model_path" in out and "--save_root" in out


def torchrun(checkpoint, out, num_processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = INFER / "reason_inference_geneval.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(port)]
    words = [
        "--model_path",
        checkpoint,
        "--save_root",
        str(out),
        "--prompts_dir",
        "geneval.jsonl",
        "--batch-size",
        "2",
    ]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={num_processes}", str(script), *words, "--guidance-scale", "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_launch_continues_to_the_same_bytes(place, checkpoint, monkeypatch):
    """SIGKILL to both processes and their launcher when some images are there; then one process, uninterrupted."""
    launch = torchrun(checkpoint, place / "set", 2)
    deadline = time.monotonic() + 300
    while not list(place.glob("set/*/samples/0*.png")) and launch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    launcher = psutil.Process(launch.pid)  # its workers are sessions of their own
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    said = launch.communicate()[0]
    there = {path: path.stat().st_mtime_ns for path in place.glob("set/*/samples/0*.png")}
    assert 0 < len(there) < 12 and not (place / "set" / "manifest.jsonl").exists(), said
    (torn := sorted(there)[-1]).write_bytes(torn.read_bytes()[:-20])
    again = torchrun(checkpoint, place / "set", 2)
    said = again.communicate(timeout=400)[0]
    assert again.returncode == 0, said
    assert said.count("of 2: wrote") == 2
    kept = {path: path.stat().st_mtime_ns for path in there if path != torn}
    assert kept == {path: there[path] for path in kept}, "a finished image was made again"
    words = ["--prompts_dir", "geneval.jsonl", "--batch-size", "2", "--guidance-scale", "3"]
    run_door("reason_inference_geneval", ["--model_path", checkpoint, "--save_root", "one", *words], monkeypatch)
    assert contents(place / "set") == contents(place / "one")
    assert len(list(place.glob("set/*/samples/*"))) == 12 and (place / "set" / "manifest.jsonl").exists()
