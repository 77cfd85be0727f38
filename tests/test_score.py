"""``stage score``, ``stage rewards`` and ``stage serve-reward``: what they read, write and refuse."""

import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from prompt_folders import write_prompt_folder
from stage_grpo.cli import main
from stage_grpo.images.folders import load_image
from stage_grpo.rewards.registry import REWARDS, build_reward
from stage_grpo.scoring import read_samples, score_folder
from stage_grpo.types import PromptRow
from test_remote_rewards import free_port


def grey_level(images, prompts, metadata, *, scale=1.0):
    """Grey level / 100; nothing for grey 30."""
    greys = [image.getpixel((0, 0))[0] for image in images]
    return [None if grey == 30 else scale * grey / 100 for grey in greys]


def length(images, prompts, metadata):
    return [len(prompt) + 100 * metadata[i].get("n", 0) for i, prompt in enumerate(prompts)]


same_grey = grey_level
GREY, LENGTH = f"{__name__}:grey_level", f"{__name__}:length"


def picture(grey):
    return Image.new("RGB", (4, 4), (grey, grey, grey))


@pytest.fixture
def flat(tmp_path):
    """Six images whose names sort in another order than they were written."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for grey in (50, 10, 40, 20, 30, 0):
        picture(grey).save(folder / f"{grey:03d}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def numbered(tmp_path):
    folder = tmp_path / "numbered"
    for index, prompt in enumerate(["a", "bcd"]):
        images = [picture(20 * index + 10), picture(20 * index + 20)]
        write_prompt_folder(folder, index, {"prompt": prompt, "n": index}, images)
    return folder


def prompts_file(folder, *prompts):
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(*words):
    main(["score", *map(str, words)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_are_read_upright(tmp_path, suffix):
    """EXIF orientation 6: what is at the left of the file is the top of the picture."""
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    upright = load_image(tmp_path / f"a.{suffix}")
    assert (upright.size, upright.mode) == ((16, 32), "RGB")
    rows = np.asarray(upright).mean(axis=(1, 2))
    assert rows[:7].min() > 200 and rows[9:].max() < 50
    assert not upright.getexif().get(0x0112)


def test_a_picture_with_damaged_exif_is_named(tmp_path):
    """Orientation 6, and a width that is a fraction: Pillow cannot write it again when it turns the picture."""
    entries = struct.pack("<HHIf", 0x0100, 11, 1, 1.5) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"a\.jpg: required argument is not an integer; generate this image again"):
        load_image(tmp_path / "a.jpg")


def test_a_flat_folder_is_shared_out_in_the_order_of_names(flat, tmp_path, capsys):
    out = tmp_path / "scores" / "out.jsonl"
    prompts = prompts_file(tmp_path, "one", "three")
    score("--reward", f"{GREY}, {LENGTH}", "--images", flat, "--prompts", prompts, "--out", out, "--batch-size", 4)
    rows = lines(out)
    assert [row["path"] for row in rows] == [f"{grey:03d}.png" for grey in (0, 10, 20, 30, 40, 50)]
    assert [row["prompt"] for row in rows] == ["one"] * 3 + ["three"] * 3
    assert [row["scores"]["grey_level"] for row in rows] == [0.0, 0.1, 0.2, None, 0.4, 0.5]
    assert [row["scores"]["length"] for row in rows] == [3, 3, 3, 5, 5, 5]
    head, grey, spread, wrote = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["reward", "mean", "std", "min", "max", "not"]
    # Mean of 0, 0.1, 0.2, 0.4, 0.5 is 0.24; variance (0.0576 + 0.0196 + 0.0016 + 0.0256 + 0.0676) / 5 = 0.0344.
    assert grey.split()[:6] == ["grey_level", "0.2400", "0.1855", "0.0000", "0.5000", "1"]
    assert spread.split()[:6] == ["length", "4.0000", "1.0000", "3.0000", "5.0000", "0"]
    assert wrote == f"wrote 6 lines to {out}" and os.listdir(out.parent) == ["out.jsonl"]


def test_numbers_in_names_are_ordered_as_numbers(tmp_path):
    names = ["a1.png", "a02.png", "a2.png", "a10 (2).png", "a10 (10).png", *(f"{i}.png" for i in range(11)), "a.png"]
    for name in names:
        picture(0).save(tmp_path / name)
    rows = [PromptRow(str(i), {}) for i in range(len(names))]
    order = [*(f"{i}.png" for i in range(11)), "a.png", "a1.png", "a02.png", "a2.png", "a10 (2).png", "a10 (10).png"]
    samples = read_samples(tmp_path, rows)
    assert [(sample.path.name, sample.prompt) for sample in samples] == list(zip(order, map(str, range(17))))


def test_numbered_folders_name_their_prompts(numbered, tmp_path):
    out = tmp_path / "out.jsonl"
    score("--reward", LENGTH, "--images", numbered, "--out", out)
    rows = lines(out)
    assert [row["path"] for row in rows] == [f"0000{i}/samples/0000{j}.png" for i in (0, 1) for j in (0, 1)]
    assert [row["scores"]["length"] for row in rows] == [1, 1, 103, 103]
    score("--reward", LENGTH, "--images", numbered, "--prompts", prompts_file(tmp_path, "a", "bcd"), "--out", out)
    assert [row["scores"]["length"] for row in lines(out)] == [1, 1, 3, 3]  # without the folders' own metadata


def test_folders_of_another_program_are_taken_by_their_number(tmp_path):
    """Names without zeros in front, and a prompt that holds a line separator of its own."""
    names = ["a\u2028b", *(f"prompt {index}" for index in range(1, 11))]
    for index, prompt in enumerate(names):
        folder = write_prompt_folder(tmp_path / "set", index, {"prompt": prompt}, [picture(index)] * 2)
        for sample in folder.glob("samples/*"):
            sample.rename(sample.with_name(f"{int(sample.stem) + 9}.png"))
        folder.rename(folder.with_name(str(index)))
    samples = read_samples(tmp_path / "set", [PromptRow(name, {}) for name in names])
    assert [sample.path.relative_to(tmp_path / "set").as_posix() for sample in samples] == [
        f"{index}/samples/{number}.png" for index in range(11) for number in (9, 10)
    ]
    assert [sample.prompt for sample in samples[::2]] == names
    with pytest.raises(ValueError, match=r"set/1 was made from 'prompt 1', but --prompts has 'prompt 2' there; give"):
        read_samples(tmp_path / "set", [PromptRow(name, {}) for name in [names[0], names[2], names[1], *names[3:]]])


def test_batches_and_options_do_not_matter_to_the_scores(flat, tmp_path):
    found = []
    for size in (1, 2, 64):
        out = tmp_path / f"{size}.jsonl"
        options = json.dumps({GREY: {"scale": 2.0}})
        prompts = prompts_file(tmp_path, *"abcdef")
        score(
            "--reward", GREY, "--images", flat, "--prompts", prompts, "--out", out, "--options", options,
            "--batch-size", size,
        )  # fmt: skip
        found.append([row["scores"]["grey_level"] for row in lines(out)])
    assert found == [[0.0, 0.2, 0.4, None, 0.8, 1.0]] * 3


def test_details_are_written(tmp_path, numbered):
    (numbered / "00000" / "metadata.jsonl").write_text(
        json.dumps({"prompt": "a photo of a circle", "include": [{"class": "circle", "count": 1}]})
    )
    (numbered / "00001" / "metadata.jsonl").write_text(
        json.dumps({"prompt": "a photo of a ring", "include": [{"class": "ring", "count": 1}]})
    )
    out = tmp_path / "out.jsonl"
    score("--reward", "shapes", "--images", numbered, "--out", out)
    nothing = {"correct": 0, "reasons": ["expected at least 1 circle, found 0"], "objects": {}, "colors": {}}
    assert lines(out)[0]["details"] == {"shapes": nothing}


def test_nothing_outside_the_folder_is_read(flat, numbered, tmp_path):
    secret = tmp_path / "secret.png"
    picture(99).save(secret)
    (flat / "zzz.png").symlink_to(secret)
    with pytest.raises(ValueError, match=r"zzz.png is a link to .*secret.png, outside the folder"):
        read_samples(flat, [PromptRow("a", {})])
    (numbered / "00001" / "samples" / "00000.png").unlink()
    (numbered / "00001" / "samples" / "00000.png").symlink_to(secret)
    with pytest.raises(ValueError, match="outside the folder"):
        read_samples(numbered, None)
    (flat / "zzz.png").unlink()
    (flat / "zzz.png").symlink_to(flat / "000.png")
    assert len(read_samples(flat, [PromptRow("a", {})])) == 7
    (flat / "00000").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside the folder"):
        read_samples(flat, None)


def test_a_reward_that_breaks_leaves_no_file(flat, tmp_path):
    def short(images, prompts, metadata):
        return [1.0]

    from stage_grpo.rewards.base import as_reward

    samples = read_samples(flat, [PromptRow("a", {})])
    with pytest.raises(ValueError, match="returned 1 scores for 6 images"):
        score_folder([as_reward(short)], samples, flat, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["flat"]


def test_a_folder_in_the_place_of_the_scores_is_refused_before_anything_else(flat, capsys):
    with pytest.raises(SystemExit):
        score("--reward", "hsp", "--images", flat, "--out", flat)
    assert f"--out {flat} is a folder; name a file in it, e.g. {flat}/scores.jsonl" in capsys.readouterr().err


def test_wrong_words_end_in_one_line(flat, numbered, tmp_path, capsys):
    prompts = prompts_file(tmp_path, "a", "b", "c", "d")
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "a.png").write_bytes((flat / "000.png").read_bytes()[:40])
    cases = [
        (["--reward", "hsp", "--images", flat], "unknown reward 'hsp'"),
        (["--reward", ",", "--images", flat], "names nothing"),
        (["--reward", f"{GREY},{GREY}", "--images", flat], "name each reward once"),
        (["--reward", f"{GREY},{__name__}:same_grey", "--images", flat], "several rewards are called 'grey_level'"),
        (["--reward", GREY, "--images", tmp_path / "absent"], "absent is not a folder"),
        (["--reward", GREY, "--images", tmp_path / "empty"], "holds no image"),
        (["--reward", GREY, "--images", flat], "give --prompts FILE"),
        (["--reward", GREY, "--images", flat, "--prompts", prompts], "6 images, which 4 prompts do not share out"),
        (["--reward", GREY, "--images", numbered, "--prompts", prompts], "holds 2 prompts, but --prompts 4"),
        (["--reward", GREY, "--images", torn, "--prompts", prompts_file(torn, "a")], "a.png"),
        (["--reward", GREY, "--images", flat, "--options", "{"], "is no JSON"),
        (["--reward", GREY, "--images", flat, "--options", "[]"], "must be {NAME"),
        (["--reward", GREY, "--images", flat, "--options", '{"hps": {}}'], "names 'hps'"),
        (["--reward", GREY, "--images", flat, "--batch-size", "0"], "--batch-size 0"),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit) as ended:
            score(*words, "--out", tmp_path / "out.jsonl")
        error = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(error) == 1 and message in error[0], (words, error)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_table_of_rewards(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    main(["rewards"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "measures", "range", "code", "weights", "state"]
    assert [row.split()[0] for row in rows] == list(REWARDS)
    by_name = {row.split()[0]: row for row in rows}
    assert by_name["shapes"].endswith("ready") and by_name["hps"].endswith("stage weights get hps-v2.1")
    assert "pip install 'stage-grpo[t2i_compbench]'" in by_name["blip_vqa"]  # spaCy, which is not installed here
    assert "PolyForm-Noncommercial" in by_name["maniqa"] and "needs a url" in by_name["deqa"]


def test_a_served_reward_scores_from_another_process(flat, tmp_path):
    port = free_port()
    words = ["serve-reward", GREY, "--port", str(port), "--token", "abc", "--options", '{"scale": 3.0}']
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.Popen(
        [sys.executable, "-m", "stage_grpo.cli", *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"serving grey_level on http://127.0.0.1:{port}"
        remote = build_reward("grey", {"url": f"http://127.0.0.1:{port}", "token": "abc"})
        deadline = time.monotonic() + 60
        while np.isnan(scores := remote.score([picture(30), picture(40)], ["a", "b"]).scores).all():
            assert time.monotonic() < deadline
        np.testing.assert_allclose(scores, [np.nan, 1.2], atol=1e-6)
    finally:
        process.terminate()
        process.wait(30)


def test_a_server_is_not_started_with_wrong_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("stage_grpo.rewards.server.serve", lambda app, host, port: None)
    cases = [
        (["hsp"], "unknown reward 'hsp'"),
        (["hps"], "get them by: stage weights get hps-v2.1"),
        (["shapes", "--port", "70000"], "--port 70000 must be between 1 and 65535"),
        (["shapes", "--options", "[1]"], "is no JSON object"),
        (["shapes", "--token-file", str(tmp_path / "absent")], "absent cannot be read"),
        (["shapes", "--token", ""], "the token is empty"),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit):
            main(["serve-reward", *words])
        assert message in capsys.readouterr().err
