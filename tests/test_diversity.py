"""Diversity of image sets: by hand, against every pair one by one, and on sets that lack what it needs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import tiny_clip
from stage_grpo.evaluation import diversity
from stage_grpo.evaluation.diversity import mean_pairwise_distance, measure_diversity
from stage_grpo.images.files import encode_codes, save_image
from stage_grpo.images.sets import ImageSet, SetImage


def one_by_one(vectors: np.ndarray) -> float:
    """Every pair, every token."""
    distances = []
    for left, right in itertools.combinations(vectors, 2):
        cosines = []
        for a, b in zip(left, right):
            lengths = np.linalg.norm(a) * np.linalg.norm(b)
            cosines.append(0.0 if lengths == 0 else a @ b / lengths)
        distances.append(1 - np.mean(cosines))
    return float(np.mean(distances))


def write_set(folder: Path, groups: list[list[np.ndarray]], codebook: np.ndarray | None) -> ImageSet:
    """One group of images a prompt, each drawn as the given codes; its colour is made of them."""
    images = []
    for index, group in enumerate(groups):
        for sample, codes in enumerate(group):
            path = folder / f"{index:05d}_{sample}.png"
            color = tuple(int(value) for value in np.resize(codes, 3) * 20 % 256)
            about = {"codes": encode_codes(codes)} if codebook is not None else {}
            save_image(path, Image.new("RGB", (4, 4), color), about)
            images.append(SetImage(path.name, index, sample, f"p{index}", {}, str(codes.tolist())))
    if codebook is not None:
        save_file({"codebook": codebook.astype(np.float32)}, folder / "codebook.safetensors")
    return ImageSet(folder, folder, images, [], 0, "folders", {})


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path / "weights"))


def test_code_distance_by_hand(tmp_path: Path) -> None:
    # Codes along x, y, -x, and one of length 0, of other lengths than 1: only directions count.
    codebook = np.array([[2.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [0.0, 0.0]])
    two = [np.array([0, 1]), np.array([1, 1])]  # cosines 0 and 1: distance 1 - 1/2
    opposite = [np.array([0, 0]), np.array([2, 2]), np.array([0, 0])]  # -1, 1, -1: mean cosine -1/3, distance 4/3
    nowhere = [np.array([3, 3]), np.array([3, 3])]  # no direction at all: cosine 0
    alone = [np.array([0, 0])]  # has no pair
    found = measure_diversity(write_set(tmp_path, [two, opposite, nowhere, alone], codebook))
    assert found["space"] == "codes"
    assert found["pairwise_distance"] == pytest.approx((0.5 + 4 / 3 + 1.0) / 3, abs=1e-6)
    assert found["unique_share"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


def test_distance_equals_every_pair_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(40, 8))
    codebook[7] = 0
    groups = [[rng.integers(0, 40, 9) for _ in range(size)] for size in (2, 3, 5, 4)]
    found = measure_diversity(write_set(tmp_path, groups, codebook), "codes")
    expected = np.mean([one_by_one(codebook.astype(np.float32)[np.stack(group)]) for group in groups])
    assert found["pairwise_distance"] == pytest.approx(expected, abs=1e-6)


def test_distance_laws() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(6, 5, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert mean_pairwise_distance(vectors) == pytest.approx(one_by_one(vectors), abs=1e-12)
    assert mean_pairwise_distance(vectors[rng.permutation(6)]) == pytest.approx(mean_pairwise_distance(vectors))
    assert mean_pairwise_distance(np.repeat(vectors[:1], 4, axis=0)) == pytest.approx(0.0, abs=1e-12)
    assert mean_pairwise_distance(np.stack([vectors[0], -vectors[0]])) == pytest.approx(2.0, abs=1e-12)


def test_equal_prompts_in_several_places_are_one(tmp_path: Path) -> None:
    image_set = write_set(tmp_path, [[np.array([0])], [np.array([1])]], np.eye(2))
    assert measure_diversity(image_set) == {"unique_share": None, "pairwise_distance": None, "space": None}
    for image in image_set.images:
        object.__setattr__(image, "prompt", "the same")
    assert measure_diversity(image_set) == {"unique_share": 1.0, "pairwise_distance": 1.0, "space": "codes"}


def test_clip_comes_first_where_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_clip.save(tmp_path / "clip")
    monkeypatch.setattr("stage_grpo.weights.is_present", lambda name: name == "clip-vit-large-patch14")
    monkeypatch.setattr("stage_grpo.rewards.clip_encoder.weights_folder", lambda chosen, name: folder)
    groups = [[np.array([1]), np.array([9]), np.array([4])], [np.array([2]), np.array([12])]]
    image_set = write_set(tmp_path / "set", groups, np.eye(20))
    found = measure_diversity(image_set)
    assert found["space"] == "clip" and found["unique_share"] == 1.0
    encode = diversity._clip_features(image_set.folder)
    features = [encode([image])[0, 0] for image in image_set.images]
    np.testing.assert_allclose([feature @ feature for feature in features], 1.0, atol=1e-5)
    expected = [one_by_one(np.stack(part)[:, None]) for part in (features[:3], features[3:])]
    assert found["pairwise_distance"] == pytest.approx(np.mean(expected), abs=1e-5) and np.mean(expected) > 1e-4
    assert measure_diversity(image_set, "codes")["pairwise_distance"] == pytest.approx(1.0)
    assert measure_diversity(image_set, "none")["pairwise_distance"] is None


def test_images_of_another_origin_have_no_codes(tmp_path: Path) -> None:
    foreign = write_set(tmp_path / "a", [[np.array([0]), np.array([1])]], None)
    assert measure_diversity(foreign) == {"unique_share": 1.0, "pairwise_distance": None, "space": None}
    with pytest.raises(ValueError, match=r"codebook\.safetensors is no codebook"):
        measure_diversity(foreign, "codes")
    with pytest.raises(ValueError, match="get them by: stage weights get clip-vit-large-patch14"):
        measure_diversity(foreign, "clip")
    with pytest.raises(ValueError, match="diversity space 'pixels' is unknown; use one of auto, clip, codes, none"):
        measure_diversity(foreign, "pixels")


def test_codes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    beyond = write_set(tmp_path / "a", [[np.array([0]), np.array([2])]], np.eye(2))
    with pytest.raises(ValueError, match=r"00000_1\.png: its image codes are not in codebook\.safetensors"):
        measure_diversity(beyond, "codes")
    assert measure_diversity(beyond)["space"] is None
    uneven = write_set(tmp_path / "b", [[np.array([0]), np.array([1, 1])]], np.eye(2))
    with pytest.raises(ValueError, match="holds images of different numbers of codes"):
        measure_diversity(uneven, "codes")
    silent = write_set(tmp_path / "c", [[np.array([0]), np.array([1])]], np.eye(2))
    save_image(tmp_path / "c" / "00000_1.png", Image.new("RGB", (4, 4)), {"codes": "%%"})
    with pytest.raises(ValueError, match=r"00000_1\.png names no image codes"):
        measure_diversity(silent, "codes")
