"""Generated sets: every bit follows from the settings alone, however often the work is interrupted or shared out."""

import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file

from stage_grpo.benchmarks import BENCHMARKS
from stage_grpo.cli import main
from stage_grpo.evaluation.score_files import set_scores_aside
from stage_grpo.evaluation.scores import Scores
from stage_grpo.generation import generate as generation
from stage_grpo.generation.checkpoint_hash import checkpoint_sha256
from stage_grpo.generation.generate import generate
from stage_grpo.images.files import decode_codes, read_about, read_whole, remove_leftovers, save_image, write_whole
from stage_grpo.images.generated_set import claim
from stage_grpo.images.layouts import LAYOUTS, plan_images, side_folder
from stage_grpo.images.set_files import begun_layouts, remove_set
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.rollout import _chunks
from stage_grpo.sampling import Sampling
from stage_grpo.types import PromptRow

# Prompts of four lengths: a batch with several of them is padded.
ROWS = [
    PromptRow("a photo of a circle", {"tag": "single_object"}),
    PromptRow("a photo of a red circle and a blue square", {"tag": "colors"}),
    PromptRow("a photo of two rings", {"tag": "counting"}),
    PromptRow("a photo of a cross left of a ring", {"tag": "position"}),
]
FREE, GUIDED = Sampling(1.0), Sampling(3.0)
NUM = 2
"""Images of a prompt."""


def draw(policy, tokenizer, out, sampling=FREE, rows=ROWS, **options):
    return generate(policy, tokenizer, rows, out, sampling, **{"num_images": NUM, "batch_size": 3, **options})


def contents(folder, but=()):
    """Bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


@pytest.fixture(scope="module")
def loaded(checkpoint):
    policy = load_policy(checkpoint).eval()
    return policy, load_tokenizer(policy)


@pytest.fixture(scope="module")
def straight(loaded, tmp_path_factory):
    """A set that was written in one go, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("straight") / "images"
    done = draw(*loaded, folder)
    assert (done.num_written, done.num_kept, done.complete) == (8, 0, True)
    return folder, contents(folder)


@pytest.fixture
def copy(straight, tmp_path):
    """A copy of that set, to be damaged."""
    return shutil.copytree(straight[0], tmp_path / "images")


def test_a_set_holds_what_it_promises(loaded, straight):
    folder, files = straight
    lines = [json.loads(line) for line in files["manifest.jsonl"].splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, k) for i in range(4) for k in range(NUM)]
    assert [line["tag"] for line in lines[::NUM]] == [row.metadata["tag"] for row in ROWS]
    names = {"manifest.jsonl", "generation.json", "codebook.safetensors"}
    names |= {line["path"] for line in lines}
    names |= {f"{i:05d}/{name}" for i in range(4) for name in ("metadata.jsonl", "grid.png")}
    assert files.keys() == names
    settings = json.loads(files["generation.json"])
    assert settings["sampling"] == {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert (settings["batch_size"], settings["dtype"], settings["checkpoint"]) == (3, "float32", None)
    policy = loaded[0]
    codebook = load_file(folder / "codebook.safetensors")["codebook"]
    assert np.array_equal(codebook, policy.model.vqmodel.quantize.embedding.weight.detach().numpy())


def test_files_say_what_they_were_made_from(loaded, straight):
    """The codes in a file decode to its pixels."""
    policy = loaded[0]
    for line in map(json.loads, straight[1]["manifest.jsonl"].splitlines()):
        about = read_about(straight[0] / line["path"])
        assert (about["prompt"], about["seed"]) == (ROWS[line["index"]].prompt, 0)
        pixels = policy.decode(torch.from_numpy(decode_codes(about["codes"]))[None])[0].numpy()
        assert np.array_equal(pixels, np.asarray(Image.open(straight[0] / line["path"])))


@pytest.mark.parametrize("sampling", [FREE, GUIDED], ids=["free", "guided"])
def test_images_do_not_depend_on_the_batch(sampling, loaded, tmp_path):
    """On a CPU the rollout works on each row alone, and images are decoded one by one."""
    sets = []
    for batch_size in (1, 3, 8, 64):
        rows = ROWS[:2] if batch_size == 1 else ROWS
        draw(*loaded, tmp_path / str(batch_size), sampling, rows, batch_size=batch_size)
        sets.append(contents(tmp_path / str(batch_size), but=("generation.json",)))
    assert sets[1] == sets[2] == sets[3]
    assert len(sets[0]) == 2 * 4 + 2
    own = [name for name in sets[0] if name != "manifest.jsonl"]
    assert [sets[0][name] for name in own] == [sets[3][name] for name in own]
    assert sets[3]["manifest.jsonl"].startswith(sets[0]["manifest.jsonl"])


def test_images_do_not_depend_on_the_number_of_threads(loaded, straight, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        draw(*loaded, tmp_path / "images", rows=ROWS[:1], num_images=1)
    finally:
        torch.set_num_threads(before)
    name = "00000/samples/00000.png"
    assert (tmp_path / "images" / name).read_bytes() == straight[1][name]


@pytest.mark.parametrize("num_processes", [2, 3, 9])
def test_shares_of_several_processes_make_the_same_set(num_processes, loaded, straight, tmp_path):
    """In any order, more processes than tiles included; only the last one finds the set complete."""
    share = [
        draw(*loaded, tmp_path / "images", share=(process, num_processes))
        for process in reversed(range(num_processes))
    ]
    assert [done.complete for done in share] == [False] * (num_processes - 1) + [True]
    assert sum(done.num_written for done in share) == 8
    assert contents(tmp_path / "images") == straight[1]


@pytest.mark.parametrize("num_tiles", [0, 1, 2])
def test_an_interrupted_run_continues(num_tiles, loaded, straight, tmp_path, monkeypatch):
    calls, sample_tile = [], generation.sample_tile

    def dying(*args):
        if len(calls) == num_tiles:
            raise KeyboardInterrupt
        calls.append(args)
        return sample_tile(*args)

    monkeypatch.setattr(generation, "sample_tile", dying)
    with pytest.raises(KeyboardInterrupt):
        draw(*loaded, tmp_path / "images")
    assert not (tmp_path / "images" / "manifest.jsonl").exists()
    monkeypatch.setattr(generation, "sample_tile", sample_tile)
    done = draw(*loaded, tmp_path / "images", batch_size=None)  # the folder's own batch size
    assert (done.num_written, done.num_kept) == (8 - 3 * num_tiles, 3 * num_tiles)
    assert contents(tmp_path / "images") == straight[1]


def flipped(content):
    """One bit of the compressed pixels."""
    place = content.index(b"IDAT") + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def foreign(content):
    """Another image of the same size, without any word about its origin."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(buffer, "PNG")
    return buffer.getvalue()


def gray(content):
    """Our own words about pixels of another kind."""
    info = PngImagePlugin.PngInfo()
    info.add_text("stage_grpo", Image.open(io.BytesIO(content)).text["stage_grpo"])
    buffer = io.BytesIO()
    Image.new("L", (48, 48)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "torn in the pixels": lambda content: content[: len(content) // 2],
    "torn in the last chunk": lambda content: content[:-6],
    "without its end": lambda content: content[:-12],
    "a bit flipped": flipped,
    "no image": lambda content: b"<html>502</html>",
    "foreign": foreign,
    "gray": gray,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_images_are_made_again_and_others_left_alone(kind, loaded, straight, copy):
    damaged = copy / "00001" / "samples" / "00001.png"
    change = DAMAGE[kind]
    damaged.unlink() if change is None else damaged.write_bytes(change(damaged.read_bytes()))
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.png") if path != damaged}
    done = draw(*loaded, copy)
    assert (done.num_written, done.num_kept, done.complete) == (1, 7, True)
    assert contents(copy) == straight[1]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_images_of_another_set_are_not_taken_for_ours(loaded, straight, copy, tmp_path):
    """The same prompt and number, whole, but of another place, seed, guidance or prompt."""
    (copy / "00000" / "samples" / "00000.png").write_bytes(straight[1]["00000/samples/00001.png"])
    draw(*loaded, tmp_path / "seed", seed=1)
    draw(*loaded, tmp_path / "guided", GUIDED)
    for other, name in (("seed", "00001"), ("guided", "00002")):
        shutil.copy(tmp_path / other / name / "samples" / "00000.png", copy / name / "samples" / "00000.png")
    assert draw(*loaded, copy).num_written == 3
    assert contents(copy) == straight[1]


def test_whole_images_that_changed_since_the_manifest_are_made_again(loaded, straight, copy):
    """A file with our own words in it and other pixels: only the manifest knows."""
    path = copy / "00003" / "samples" / "00001.png"
    about = read_about(path)
    save_image(path, Image.new("RGB", (48, 48), "red"), about)
    assert draw(*loaded, copy).num_written == 1
    assert contents(copy) == straight[1]


def test_a_manifest_is_read_line_by_line_whatever_prompts_hold(loaded, straight, copy):
    """Only newlines end a line of JSON: U+2028 may stand in a prompt."""
    path = copy / "manifest.jsonl"
    path.write_text(path.read_text().replace(ROWS[0].prompt, "a photo\u2028of a circle"))
    image = copy / "00003" / "samples" / "00001.png"
    save_image(image, Image.new("RGB", (48, 48), "red"), read_about(image))
    assert draw(*loaded, copy).num_written == 1
    assert contents(copy) == straight[1]


@pytest.mark.parametrize("name", ["00002/grid.png", "00002/metadata.jsonl", "codebook.safetensors", "manifest.jsonl"])
@pytest.mark.parametrize("torn", [True, False], ids=["torn", "missing"])
def test_what_lies_beside_the_images_is_restored(name, torn, loaded, straight, copy):
    (copy / name).write_bytes(straight[1][name][:-5]) if torn else (copy / name).unlink()
    assert draw(*loaded, copy).num_written == 0
    assert contents(copy) == straight[1]


def test_a_set_with_a_missing_image_has_no_manifest(loaded, copy):
    """A process that is not to make the image, which another one will, does not call the set complete."""
    (copy / "00000" / "samples" / "00000.png").unlink()
    assert not draw(*loaded, copy, share=(1, 2)).complete
    assert draw(*loaded, copy, share=(0, 2)).complete


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"sampling": GUIDED}, "sampling.guidance_scale was 1.0 and is 3.0"),
        ({"num_images": 3}, "num_images was 2 and is 3"),
        ({"batch_size": 5}, "batch_size was 3 and is 5"),
        ({"prompt_template": "t2i_r1"}, "prompt_template was 'janus' and is 't2i_r1'"),
        ({"rows": ROWS[:3]}, "prompts was"),
        ({"layout": "flat"}, "layout was 'geneval' and is 'flat'"),
        ({"seed": 1, "num_images": 3}, "num_images was 2 and is 3, seed was 0 and is 1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_in_the_same_folder_are_refused(changes, named, loaded, straight):
    with pytest.raises(ValueError) as refusal:
        draw(*loaded, straight[0], **changes)
    message = str(refusal.value)
    assert named in message and "--overwrite" in message and len(message.splitlines()) == 1
    assert contents(straight[0]) == straight[1]


def test_the_first_process_decides_and_a_moved_checkpoint_is_the_same(tmp_path):
    settings = {"seed": 0, "batch_size": 8, "model": "here", "checkpoint": "abc", "sampling": {"top_k": 0}}
    assert claim(tmp_path, settings) == settings
    assert claim(tmp_path, {**settings, "batch_size": 4, "model": "there"}, keep=("batch_size",)) == settings
    with pytest.raises(ValueError, match="checkpoint was 'abc' and is None, model was 'here' and is 'there'"):
        claim(tmp_path, {**settings, "model": "there", "checkpoint": None})
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation.json cannot be read .*--overwrite"):
        claim(tmp_path, settings)


def test_folders_of_another_origin_are_refused(loaded, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    for out in ("mine", "mine/notes"):
        with pytest.raises(ValueError, match="out="):
            draw(*loaded, tmp_path / out)
    assert contents(tmp_path) == {"mine/notes": b"mine"}


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".{platform.node()}.{dead.pid}.0.partial.png",
        "alive": f".{platform.node()}.{os.getpid()}.0.partial.png",
        "elsewhere": ".another-host.1.0.partial.json",
        "elsewhere, old": ".another-host.1.1.partial",
        "foreign": ".partial.png",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / names["elsewhere, old"], (0, 0))
    remove_leftovers(tmp_path.parent)
    assert set(contents(tmp_path)) == {names["alive"], names["elsewhere"], names["foreign"]}


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.png"
    write_whole(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        write_whole(path, b"new")
    assert contents(tmp_path) == {"file.png": b"old"}


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"geneval"}))
def test_every_layout_is_continued_alike(name, loaded, tmp_path):
    rows = [PromptRow(row.prompt, {**row.metadata, "prompt": row.prompt}) for row in ROWS]
    out = tmp_path / "images"
    draw(*loaded, out, rows=rows, layout=name, num_images=2)
    files = contents(tmp_path)
    side = "images.about" if name == "hps" else "images"
    assert {f"{side}/{file}" for file in ("manifest.jsonl", "generation.json", "codebook.safetensors")} <= files.keys()
    plan = plan_images(LAYOUTS[name], rows, 2)
    if name == "hps":  # its official scorer takes every entry of a style's folder for an image
        assert set(contents(out)) == {str(planned.path) for planned in plan}
    for planned in plan[::3]:
        (out / planned.path).write_bytes((out / planned.path).read_bytes()[:-1])
    assert draw(*loaded, out, rows=rows, layout=name, num_images=2).num_written == len(plan[::3])
    assert contents(tmp_path) == files


def test_jpegs_keep_their_codes(loaded, tmp_path):
    draw(*loaded, tmp_path / "images", layout="hps", num_images=1)
    content, size, about = read_whole(tmp_path / "images" / "colors" / "00000.jpg")
    pixels = loaded[0].decode(torch.from_numpy(decode_codes(about["codes"]))[None])[0].float().numpy()
    assert size == (48, 48) and content.startswith(b"\xff\xd8")
    # Lossy, but the same picture: an error of a tenth of the full scale would be another one.
    kept = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
    assert np.abs(kept - pixels).mean() < 25


@pytest.mark.parametrize(("num", "grid"), [(1, None), (2, (96, 48)), (4, (96, 96)), (5, (144, 96))])
def test_grids_show_all_images_of_a_prompt(num, grid, loaded, tmp_path):
    draw(*loaded, tmp_path / "images", rows=ROWS[:1], num_images=num, batch_size=8)
    path = tmp_path / "images" / "00000" / "grid.png"
    assert path.exists() == (grid is not None)
    if grid:
        sheet = Image.open(path)
        assert sheet.size == grid
        columns = math.ceil(math.sqrt(num))
        for k in range(num):
            x, y = k % columns * 48, k // columns * 48
            image = Image.open(path.parent / "samples" / f"{k:05d}.png")
            assert np.array_equal(np.asarray(sheet.crop((x, y, x + 48, y + 48))), np.asarray(image))


def test_memory_that_does_not_suffice_is_named(loaded, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(generation, "rollout", exhausted)
    with pytest.raises(ValueError, match=r"batch_size=3 does not fit .* smaller --batch-size.*2 GiB") as refusal:
        draw(*loaded, tmp_path / "images")
    assert len(str(refusal.value).splitlines()) == 1


def test_the_batch_is_sampled_in_one_piece(loaded, tmp_path, monkeypatch):
    """Free memory differs from run to run; cutting a tile by it would change its arithmetic."""
    monkeypatch.setattr("stage_grpo.rollout.memory_budget", lambda device: 1)
    counts = []

    def counted(num_rows, rows_per_chunk):
        chunks = list(_chunks(num_rows, rows_per_chunk))
        counts.append((num_rows, len(chunks)))
        return chunks

    monkeypatch.setattr("stage_grpo.rollout._chunks", counted)
    draw(*loaded, tmp_path / "images")
    assert {(3, 1), (2, 1)} <= set(counts) and {chunks for _, chunks in counts} == {1}


def test_the_hash_of_a_checkpoint_follows_its_weights_alone(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "moved")
    (folder / "run.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"state")
    assert checkpoint_sha256(folder) == checkpoint_sha256(checkpoint)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        other = shutil.copytree(checkpoint, tmp_path / name)
        content = (other / name).read_bytes()
        (other / name).write_bytes(content[:-1] + b"\0")
        assert checkpoint_sha256(other) != checkpoint_sha256(checkpoint)


def test_the_hash_of_an_adapter_covers_its_base(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": checkpoint}))
    (adapter / "adapter_model.safetensors").write_bytes(b"factors")
    before = checkpoint_sha256(adapter)
    other = shutil.copytree(checkpoint, tmp_path / "base")
    (other / "config.json").write_text("{}")
    assert checkpoint_sha256(adapter, base=checkpoint) == before != checkpoint_sha256(adapter, base=other)


def test_hub_names_are_hashed_by_their_snapshot(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="'nobody/nothing' is not in the hub's local cache"):
        checkpoint_sha256("nobody/nothing")
    with pytest.raises(ValueError, match="neither a folder nor a hub name"):
        checkpoint_sha256("a/b/c")


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": row.prompt, **row.metadata}) for row in ROWS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return "prompts.jsonl"


def stage_generate(capsys, line, *more):
    main(["generate", *line.split(), *more])
    return capsys.readouterr().out


def test_the_command_takes_a_benchmark(prompts, checkpoint, capsys):
    line = f"--model {checkpoint} --benchmark geneval --prompts {prompts} --guidance-scale 1 --out images"
    assert "wrote 8 images to images\n" in stage_generate(capsys, line, "--categories", "single_object", "colors")
    settings = json.loads(Path("images/generation.json").read_text())
    assert settings["num_images"] == BENCHMARKS["geneval"].images_per_prompt == 4
    assert settings["checkpoint"] == checkpoint_sha256(checkpoint)
    tags = [json.loads(line)["tag"] for line in Path("images/manifest.jsonl").read_text().splitlines()]
    assert tags == ["single_object"] * 4 + ["colors"] * 4
    out = stage_generate(capsys, line, "--categories", "single_object", "colors")
    assert "wrote 0 images to images, 8 were there" in out


def wreck(folder):
    """What a set may look like: a torn image, one of a prompt that is no more, a half-written file."""
    (folder / "00000" / "samples" / "00000.png").write_bytes(b"torn")
    shutil.copytree(folder / "00003", folder / "00017")
    (folder / "00017" / "samples" / ".another-host.1.1.partial").write_bytes(b"")
    os.utime(folder / "00017" / "samples" / ".another-host.1.1.partial", (0, 0))


FOREIGN = {"notes/paper.txt", "00000/notes.txt", "00000/samples/best.png", "1234.png", "00000.png", "report.html"}


def test_overwriting_leaves_what_is_not_the_sets_own(loaded, straight, copy):
    wreck(copy)
    for name in FOREIGN:
        write_whole(copy / name, b"mine")
    draw(*loaded, copy, rows=ROWS[:1], num_images=1, overwrite=True)
    files = contents(copy)
    own = {"generation.json", "manifest.jsonl", "codebook.safetensors", "00000/metadata.jsonl"}
    assert files.keys() == FOREIGN | own | {"00000/samples/00000.png"}
    assert {files[name] for name in FOREIGN} == {b"mine"} and not (copy / "00017").exists()
    assert files["00000/samples/00000.png"] == straight[1]["00000/samples/00000.png"]
    assert json.loads(files["generation.json"])["num_images"] == 1


def test_a_set_of_any_layout_is_removed(straight, copy, tmp_path):
    (copy / "generation.json").write_text("{")  # the remedy for a record that cannot be read, too
    remove_set(copy)
    assert not contents(tmp_path)
    rows = [PromptRow(row.prompt, {"tag": "photo"}) for row in ROWS]
    for name, layout in LAYOUTS.items():
        side = side_folder(layout, copy)
        for planned in plan_images(layout, rows, 2):
            write_whole(copy / planned.path, b"image")
        write_whole(side / "generation.json", json.dumps({"layout": name}).encode())
        write_whole(copy / "1.png", b"mine")
        assert begun_layouts(copy) == [layout]
        remove_set(copy)
        assert contents(tmp_path) == {"images/1.png": b"mine"} and list(tmp_path.iterdir()) == [copy]


def test_scores_of_a_set_that_is_overwritten_are_renamed(loaded, copy, tmp_path, caplog):
    places, records = (copy / "scores.json", tmp_path / "images.scores.json"), []
    for place in places:
        names = ("scores", "ci95", "num_unscored", "diversity", "missing", "settings", "versions")
        numbers = {"num_images": 0, "num_prompts": 0, "partial": False, "problems": [], "columns": []}
        Scores(benchmark="geneval", per_image=[], **{name: {} for name in names}, **numbers).save(place)
        records.append(Scores.load(place))
    draw(*loaded, copy, rows=ROWS[:1], num_images=1, overwrite=True)
    assert not any(place.exists() for place in places) and "of the former images" in caplog.text
    former = (copy / "scores.former.json", tmp_path / "images.scores.former.json")
    assert [Scores.load(path) for path in former] == records
    assert len(list(tmp_path.rglob("*scores*"))) == 4
    write_whole(places[0], b"of another program")
    set_scores_aside(copy)
    assert places[0].read_bytes() == b"of another program"


@pytest.mark.parametrize(
    "changes", [{"num_images": 0}, {"rows": []}, {"share": (0, 2)}, {"rows": [PromptRow(" ", {})]}]
)
def test_nothing_is_deleted_before_all_is_checked(changes, loaded, straight, copy):
    with pytest.raises(ValueError):
        draw(*loaded, copy, overwrite=True, **changes)
    assert contents(copy) == straight[1]


def test_what_cannot_be_deleted_is_an_error(copy, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(PermissionError):
        remove_set(copy)
    assert (copy / "generation.json").exists()


def test_the_current_folder_and_the_home_folder_will_do(checkpoint, capsys, tmp_path, monkeypatch):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a ring", "tag": "photo"}')
    line = f"--model {checkpoint} --prompts {tmp_path}/one.jsonl --guidance-scale 1 --layout hps --overwrite"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "wrote 1 images" in stage_generate(capsys, line, "--out", ".")
    assert contents(tmp_path / "here").keys() == {"photo/00000.jpg"}
    assert (tmp_path / "here.about" / "manifest.jsonl").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        stage_generate(capsys, line, "--out", "~/one.jsonl")
    assert f"out='{tmp_path}/one.jsonl' is a file" in capsys.readouterr().err


def test_overwriting_deletes_a_set_and_nothing_else(prompts, checkpoint, capsys, tmp_path, monkeypatch):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a ring", "tag": "photo"}')
    line = f"--model {checkpoint} --prompts one.jsonl --guidance-scale 1 --layout hps --out"
    stage_generate(capsys, line, "images")
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        stage_generate(capsys, line, "images", "--seed", "1")
    assert contents(tmp_path) == before and "seed was 0 and is 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stage_generate(capsys, line, "images", "--overwrite", "--image-size", "384")
    assert contents(tmp_path) == before
    assert "wrote 1 images" in stage_generate(capsys, line, "images", "--seed", "1", "--overwrite")
    assert contents(tmp_path)["images/photo/00000.jpg"] != before["images/photo/00000.jpg"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(SystemExit):
        stage_generate(capsys, line, "mine", "--overwrite")
    assert (tmp_path / "mine" / "notes").read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        stage_generate(capsys, line, "images", "--overwrite")
    assert "one would delete what another writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--prompt a --benchmark geneval", "--prompt goes with neither"),
        ("--prompt a --categories colors", "--categories colors needs --benchmark"),
        ("--benchmark geneval --prompts prompts.jsonl --categories color", "--categories color: geneval has only"),
        ("--benchmark imagenet", "invalid choice: 'imagenet'"),
        ("--prompt a --min-p 1", "min_p=1.0 must be in [0, 1)"),
        ("--prompt a --dtype float8", "float8"),
        ("--prompt a --image-size 384", "image_size=384: this model draws 48 px"),
        ("--prompts prompts.jsonl --layout hps --num-images 0", "num_images=0"),
    ],
)
def test_wrong_words_are_refused_with_nothing_written(words, named, prompts, checkpoint, capsys, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", checkpoint, "--out", "out", *words.split()])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and named in err and len(err.splitlines()) == 1, err
    assert contents(tmp_path) == before


def test_more_processes_than_gpus_are_refused(prompts, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        main(["generate", "--model", checkpoint, "--out", "out", "--prompt", "a"])
    assert "LOCAL_RANK=2, but this machine shows 2 GPUs" in capsys.readouterr().err
