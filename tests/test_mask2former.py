"""Mask2Former without mmdet: conversion, resizing and objects against what mmdet 2.28 and 3.3 gave (fixtures)."""

import zlib

import numpy as np
import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation

import original_mask2former as original
from stage_grpo.detectors.mask2former import Mask2FormerDetector, find_instances, scaled_size
from stage_grpo.detectors.resizing import resize_bilinear
from stage_grpo.weights import convert_mask2former

SCALE = (167, 100)
"""Scale of the pictures that mmdet was run on, except for one at the official scale."""
PARITY = np.load(original.FIXTURES / "mask2former_parity.npz")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    # As mmdet publishes: in torch's old format.
    folder = original.converted("2.x", tmp_path_factory.mktemp("mmdet2"), _use_new_zipfile_serialization=False)
    return Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def detector(network):
    return Mask2FormerDetector(network, scale=SCALE)


@pytest.mark.parametrize("style", ["2.x", "3.x"])
def test_every_tensor_of_the_official_architecture_has_its_place(style):
    shapes = original.names(style, "full")
    tensors = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if not name.endswith("relative_position_index")
    }
    assert sum(tensor.numel() for tensor in tensors.values()) == 68_739_547
    config = convert_mask2former.infer_config(tensors)
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = {name: tuple(tensor.shape) for name, tensor in convert_mask2former.rename(tensors).items()}
    unused = {"criterion.empty_weight"} | {name for name in expected if ".swin.layernorm." in name}
    assert made == {name: shape for name, shape in expected.items() if name not in unused}
    assert len(unused) == 3
    assert (config.id2label[0], config.id2label[63], config.id2label[79]) == ("person", "laptop", "toothbrush")


def test_names_of_mmdet_3_give_the_logits_of_mmdet_3(tmp_path):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(original.converted("3.x", tmp_path)).eval()
    pixels = np.random.RandomState(3).standard_normal((1, 3, 64, 96)).astype(np.float32)
    with torch.no_grad():
        outputs = model(pixel_values=torch.from_numpy(pixels))
    # Logits of up to 20 and 27.
    np.testing.assert_allclose(outputs.class_queries_logits[0].numpy(), PARITY["class_logits_3x"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.masks_queries_logits[0].numpy(), PARITY["mask_logits_3x"], rtol=0, atol=1e-4)


def test_both_of_torchs_formats_are_read_alike(tmp_path):
    tensors = original.weights()
    torch.save({"state_dict": tensors}, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pth"):
        read = convert_mask2former.read_mmdet(tmp_path / name)
        assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in tensors)


class Malicious:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Malicious(), "holds more than tensors, or is broken"),
        ({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, "is no Mask2Former with a Swin backbone"),
        ({"state_dict": {}}, "holds no state_dict of tensors"),
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ("without", "Missing key.*level_embed"),
        ("more", "Unexpected key.*conv1"),
    ],
)
def test_other_files_are_refused_and_nothing_in_them_runs(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content == "without":
        content = original.weights()
        del content["panoptic_head.level_embed.weight"]
    elif content == "more":
        content = original.weights() | {"backbone.conv1.weight": torch.zeros(1)}
    torch.save(content, "x.pth")
    with pytest.raises(ValueError, match=message):
        convert_mask2former.convert({"x.pth": tmp_path / "x.pth"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_one_file_is_converted(tmp_path):
    with pytest.raises(ValueError, match="from one file"):
        convert_mask2former.convert({}, tmp_path)


@pytest.mark.parametrize("row", range(len(PARITY["resized"])))
def test_resized_bytes_are_opencvs(row):
    width, height, new_width, new_height, checksum = PARITY["resized"][row].tolist()
    random = np.random.RandomState(width * 7 + height)
    pixels = torch.from_numpy(random.randint(0, 256, (height, width, 3)).astype(np.uint8))
    resized = resize_bilinear(pixels, new_height, new_width)
    assert zlib.crc32(resized.contiguous().numpy().tobytes()) == checksum


def test_sizes_keep_proportions():
    # 800 / 384 each way; 1333 / 1000 = 1.333 < 800 / 500; 800 / 600 = 1.333 < 1333 / 900, 0.5 rounded up.
    assert scaled_size((384, 384), (1333, 800)) == (800, 800)
    assert scaled_size((1000, 500), (1333, 800)) == (1333, 667)
    assert scaled_size((600, 900), (1333, 800)) == (800, 1200)


def test_logits_are_mmdets(detector):
    pictures = original.pictures()
    pixels = detector._prepare(pictures[1], *scaled_size(pictures[1].size, SCALE))
    with torch.no_grad():
        outputs = detector.model(pixel_values=pixels[None])
    np.testing.assert_allclose(outputs.class_queries_logits[0].numpy(), PARITY["class_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.masks_queries_logits[0].numpy(), PARITY["mask_logits"], rtol=0, atol=2e-4)


def rows_of(labels, boxes):
    """Label, box and score of each object, and an order that makes two lists comparable whatever that of ties."""
    rows = np.concatenate([np.asarray(labels, dtype=np.float64)[:, None], boxes], axis=1)
    return rows, np.lexsort(rows.round(3).T[::-1])


def assert_same(found, labels, boxes, masks=None):
    mine, my_order = rows_of(found.labels, np.concatenate([found.boxes, found.scores[:, None]], axis=1))
    theirs, their_order = rows_of(labels, boxes)
    np.testing.assert_allclose(mine[my_order], theirs[their_order], rtol=0, atol=1e-5)
    if masks is not None:
        shape = found.masks.shape
        unpacked = np.unpackbits(masks)[: np.prod(shape)].reshape(shape).astype(bool)
        np.testing.assert_array_equal(found.masks.numpy()[my_order], unpacked[their_order])


@pytest.mark.parametrize("order", ["bgr", "rgb"])
def test_objects_are_mmdets_in_either_order_of_channels(network, order):
    found = Mask2FormerDetector(network, order, SCALE).detect(original.pictures(), [0.02] * 3, batch_size=2)
    assert [len(one.labels) for one in found] == {"bgr": [40, 41, 49], "rgb": [39, 72, 36]}[order]
    for index, one in enumerate(found):
        masks = PARITY[f"bgr_{index}_masks"] if order == "bgr" else None
        assert_same(one, PARITY[f"{order}_{index}_labels"], PARITY[f"{order}_{index}_boxes"], masks)


def test_results_depend_on_no_other_picture_and_a_higher_score_only_drops(detector):
    pictures = original.pictures()
    pictures = [*pictures, pictures[0].rotate(90), pictures[0].rotate(180)]
    together = detector.detect(pictures, [0.02] * 5, batch_size=5)
    for picture, among in zip(pictures, together):
        (alone,) = detector.detect([picture], [0.3])
        kept = among.scores > 0.3
        assert 0 < kept.sum() < len(kept)
        torch.testing.assert_close(alone.scores, among.scores[kept], rtol=0, atol=1e-5)
        assert torch.equal(alone.labels, among.labels[kept]) and torch.equal(alone.masks, among.masks[kept])
    assert [len(one.labels) for one in detector.detect(pictures[:2], [1.0, 0.02])] == [0, 41]


def test_score_box_and_mask_by_hand():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.1, 0.7]])
    # The first query's mask is three pixels of probabilities 0.8, 0.6 and 0.7; the second's is one of 0.9.
    masks = torch.full((2, 4, 4), -3.0)
    masks[0, 1, 1:] = torch.tensor([0.8, 0.6, 0.7]).logit()
    masks[1, 3, 0] = torch.tensor(0.9).logit()
    sizes = ((4, 4), (4, 4), (4, 4))
    found = find_instances(probabilities.log(), masks, sizes, 0.15)
    assert found.labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.scores, [0.6 * 0.7, 0.3 * 0.7, 0.2 * 0.9], atol=1e-6)
    assert found.boxes.tolist() == [[1, 1, 4, 2], [1, 1, 4, 2], [0, 3, 1, 4]]
    assert found.masks.sum((1, 2)).tolist() == [3, 3, 1]
    # An empty mask has the score 0, which exceeds nothing.
    assert len(find_instances(probabilities.log(), masks - 10, sizes, 0.0).labels) == 0
    assert find_instances(probabilities.log() * float("nan"), masks, sizes, 0.0) is None
    assert find_instances(probabilities.log(), masks * float("inf"), sizes, 0.0) is None


def test_detecting_leaves_no_trace(detector):
    before = torch.get_rng_state(), torch.is_grad_enabled()
    detector.detect(original.pictures()[:1], [0.3])
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.is_grad_enabled()
