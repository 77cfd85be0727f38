"""The GenEval reward against what open_clip, clip_benchmark and the benchmark's own evaluation gave (fixtures)."""

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image

import original_mask2former as original
import tiny_clip
from stage_grpo.detectors.mask2former import Instances
from stage_grpo.rewards.batching import ModelOptions
from stage_grpo.rewards.clip_encoder import ClipEncoder
from stage_grpo.rewards.colors import ColorClassifier, crop_object
from stage_grpo.rewards.geneval_reward import GenevalOptions, GenevalReward
from stage_grpo.rewards.registry import build_reward

SIZE = (64, 48)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


class StubDetector:
    """Finds what it was told to, as sure as it is asked to be, and counts the pictures of each call."""

    device = torch.device("cpu")
    class_names = ("dog", "cat", "traffic light")

    def __init__(self, *found):
        self.found = list(found)
        self.calls = []

    def bytes_per_image(self, images):
        return 1

    def detect(self, images, min_scores, batch_size):
        self.calls.append(len(images))
        return [found and at_least(found, score) for found, score in zip(self.found, min_scores)]


def at_least(instances, score):
    kept = instances.scores > score
    return Instances(*(values[kept] for values in vars(instances).values()))


def instances(*objects):
    """Objects given as label, box and score, most confident first; each mask is the whole box."""
    masks = torch.zeros(len(objects), SIZE[1], SIZE[0], dtype=torch.bool)
    for mask, (_, (x1, y1, x2, y2), _) in zip(masks, objects):
        mask[y1:y2, x1:x2] = True
    return Instances(
        torch.tensor([label for label, _, _ in objects], dtype=torch.int64),
        torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([score for _, _, score in objects], dtype=torch.float32),
        masks,
    )


class StubColors:
    """Names each crop after its brightest channel, with the class; a crop of red is of no finite colour if asked."""

    def __init__(self, broken=False):
        self.broken = broken
        self.calls = []

    def classify(self, crops, names):
        self.calls.append(list(names))
        means = [np.asarray(crop).mean((0, 1)) for crop in crops]
        colors = [("red", "green", "blue")[int(mean.argmax())] for mean in means]
        return [None if self.broken and color == "red" else color for color in colors]


def reward_on(*found, broken=False, **options):
    reward = GenevalReward(GenevalOptions(**options))
    reward.detector = StubDetector(*found)
    reward.classifier = StubColors(broken)
    return reward


def picture(*rectangles):
    image = Image.new("RGB", SIZE, "black")
    for color, box in rectangles:
        image.paste(color, box)
    return image


def asking(*include, **rest):
    return {"tag": "any", "include": list(include), **rest}


LEFT, RIGHT, WIDE = (0, 0, 20, 20), (40, 0, 60, 20), (0, 0, 64, 48)
DOG = {"class": "dog", "count": 1}
CAT = {"class": "cat", "count": 1}
RED_DOG = {**DOG, "color": "red"}


def test_colours_are_those_of_open_clip_and_clip_benchmark(clip_folder):
    expected = np.load(original.FIXTURES / "geneval_colors.npz")
    options = ModelOptions(weights=str(clip_folder), device="cpu", batch_size=3)
    classifier = ColorClassifier(ClipEncoder(options, "clip-vit-large-patch14"))
    crops = [crop_object(image, box, torch.from_numpy(mask)) for image, box, mask in tiny_clip.objects()]
    assert [np.asarray(crop).sum((0, 1)).tolist() for crop in crops] == expected["crop_sums"].tolist()
    np.testing.assert_allclose(
        100 * classifier.cosines(crops, tiny_clip.NAMES).numpy(), expected["logits"], rtol=0, atol=1e-4
    )
    assert classifier.classify(crops, tiny_clip.NAMES) == ["blue", "green", "red", "green"]
    assert classifier.classify([], []) == []


def test_scores_by_hand():
    images = [picture(("red", LEFT), ("blue", RIGHT))] * 4
    found = instances((0, LEFT, 0.9), (1, RIGHT, 0.8))
    two_dogs = instances((0, RIGHT, 0.9), (0, LEFT, 0.8))
    wanted = [
        asking(RED_DOG, {**CAT, "position": ["right of", 0]}),  # 1, 1; 1, 1
        asking({**DOG, "color": "blue"}, {**CAT, "position": ["right of", 0]}),  # 1, 0; 1, 0
        asking({**RED_DOG, "count": 2}),  # of two dogs one is red: 1, 1 / 2
        asking(DOG, {"class": "traffic light", "count": 1}),  # 1; 0
    ]
    reward = reward_on(found, found, two_dogs, found)
    result = reward.score(images, [""] * 4, wanted)
    np.testing.assert_allclose(result.scores, [1.0, 0.5, 0.75, 0.5], atol=1e-6)
    assert result.details["correct"] == [1, 0, 0, 0]
    assert result.details["reasons"][2] == ["expected 2 red dog, found 1"]
    assert result.details["reason"] == [None] * 4
    found = result.details["objects"][0]
    assert list(found) == ["dog", "cat"]
    np.testing.assert_allclose(found["cat"], [[*RIGHT, 0.8]], atol=1e-6)
    assert result.details["colors"] == [{"dog": ["red"]}, {"dog": ["red"]}, {"dog": ["blue", "red"]}, {}]
    # The whole batch at once, and only boxes whose colour is asked for.
    assert reward.detector.calls == [4]
    assert reward.classifier.calls == [["dog", "dog", "dog", "dog"]]
    strict = reward_on(*[instances((0, LEFT, 0.9), (1, RIGHT, 0.8))] * 2, strict=True)
    assert strict.score(images[:2], ["", ""], wanted[:2]).scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_one_picture_may_be_asked_for_two_counts_of_a_class(counts):
    image = picture(("red", LEFT), ("blue", RIGHT))
    reward = reward_on(instances((0, LEFT, 0.9), (0, RIGHT, 0.8)))
    result = reward.score([image], [""], [asking(*({**RED_DOG, "count": count} for count in counts))])
    # Where one is asked for: count 0, colour 0. Where two are: count 1, and one of two is red.
    np.testing.assert_allclose(result.scores, [(0 + 0 + 1 + 1 / 2) / 4], atol=1e-6)
    assert result.details["reasons"] == [["expected 2 red dog, found 1"]]
    assert reward.classifier.calls == [["dog", "dog"]]


def test_objects_are_limited_as_the_benchmark_does():
    cases = json.loads(gzip.decompress((original.FIXTURES / "geneval_limits.json.gz").read_bytes()))
    assert len(cases) == 24
    for case in cases:
        random = np.random.RandomState(case["seed"])
        labels = np.sort(random.randint(0, 3, 80))
        corners, extents = random.randint(0, 30, (80, 2)), random.randint(5, 34, (80, 2))
        scores = ((random.permutation(80) + 1) / 81).astype(np.float32)
        order = np.argsort(-scores)
        boxes = np.concatenate([corners, corners + extents], axis=1)[order]
        found = Instances(
            torch.from_numpy(labels[order]),
            torch.from_numpy(boxes.astype(np.float32)),
            torch.from_numpy(scores[order]),
            torch.zeros(80, 1, 1, dtype=torch.bool),
        )
        reward = reward_on(found, max_overlap=case["max_overlap"])
        reward.detector.class_names = ("a", "b", "c")
        (detected,) = reward.detect([picture()], [{"tag": case["tag"]}])
        assert detected.boxes.keys() == case["objects"].keys()
        for name, expected in case["objects"].items():
            np.testing.assert_array_equal(np.array(detected.boxes[name], dtype=np.float32), np.float32(expected))


def test_what_cannot_be_scored_is_nan_with_a_reason():
    truncated = Image.new("RGB", SIZE)
    truncated.load = lambda: (_ for _ in ()).throw(OSError("image file is truncated"))
    images = [
        picture(("red", WIDE)),
        picture(),
        Image.new("RGB", (0, 5)),
        truncated,
        picture(("red", WIDE)),
        picture(),
    ]
    wanted = [asking(DOG), {"task_type": "spatial"}, asking(DOG), asking(DOG), asking(RED_DOG), asking(DOG)]
    found = instances((0, WIDE, 0.9))
    result = reward_on(found, found, None, broken=True).score(images, [""] * 6, wanted)
    np.testing.assert_equal(result.scores, [1.0, np.nan, np.nan, np.nan, np.nan, np.nan])
    assert result.details["correct"] == [1, None, None, None, None, None]
    reasons = result.details["reason"]
    assert reasons[0] is None
    assert reasons[1].startswith("not applicable")
    assert reasons[2] == "the image is empty, 0 x 5 pixels"
    assert reasons[3] == "the image cannot be read: image file is truncated"
    assert reasons[4] == reasons[5] == "a model's output is not finite; use dtype float32"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (asking({"class": "dog", "count": 0}), "count 0"),
        (asking({"class": "unicorn", "count": 1}), r"\['unicorn'\], which the detector does not know.*cat"),
        (asking(DOG, exclude=[{"class": "hat", "count": 1}]), r"\['hat'\]"),
    ],
)
def test_malformed_metadata_stop_before_any_picture_is_looked_at(metadata, message):
    reward = reward_on(instances())
    with pytest.raises(ValueError, match=message):
        reward.score([picture()], [""], [metadata])
    assert reward.detector.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": "yes"}, "strict: "),
        ({"channel_order": "gbr"}, "channel_order='gbr' is unknown; use bgr"),
        ({"threshold": 30}, r"threshold=30 is outside \[0, 1\]"),
        ({"counting_threshold": True}, "counting_threshold=True"),
        ({"max_overlap": -0.1}, "max_overlap=-0.1"),
        ({"max_objects": 0}, "max_objects=0"),
        ({"color_weights": ""}, "color_weights=''"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"'geneval' rejects its options .*{message}"):
        build_reward("geneval", options)


def test_building_costs_nothing_and_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    reward = build_reward("geneval")
    assert reward.needed_weights() == ("mask2former-swin-s-coco", "clip-vit-large-patch14")
    assert build_reward("geneval", {"weights": str(tmp_path)}).needed_weights() == ("clip-vit-large-patch14",)
    other = {"color_weights": "clip-vit-base-patch32"}
    assert build_reward("geneval", other).needed_weights() == ("mask2former-swin-s-coco", "clip-vit-base-patch32")
    aesthetic = build_reward("aesthetic", {"clip_weights": "clip-vit-base-patch32"})
    assert aesthetic.needed_weights() == ("clip-vit-base-patch32", "aesthetic-v2")
    with pytest.raises(ValueError, match="color_weights='x' is neither a folder nor the name of weights"):
        build_reward("geneval", {"color_weights": "x"}).needed_weights()
    with pytest.raises(ValueError, match="stage weights get mask2former-swin-s-coco"):
        reward.score([picture()], [""], [asking(DOG)])


def test_the_whole_of_it_on_converted_weights(tmp_path, clip_folder):
    parity = np.load(original.FIXTURES / "mask2former_parity.npz")
    folder = original.converted("2.x", tmp_path)
    options = {"weights": str(folder), "color_weights": str(clip_folder), "device": "cpu", "batch_size": 2}
    reward = build_reward("geneval", options)
    reward.check_row("", asking({"class": "train", "count": 1}))
    with pytest.raises(ValueError, match=r"\['unicorn'\], which the detector does not know.*train"):
        reward.check_row("", asking({"class": "unicorn", "count": 1}))
    reward.check_row("no metadata of GenEval", {})
    assert "detector" not in vars(reward)
    image = original.pictures()[0]
    boxes, labels = parity["official_boxes"], parity["official_labels"]
    sure = boxes[:, 4] > 0.3
    num_trains = int((labels[sure] == 6).sum())
    assert num_trains > 1
    wanted = {"tag": "color_attr", "include": [{"class": "train", "count": num_trains, "color": "purple"}]}
    counting = {"tag": "counting", "include": [{"class": "train", "count": 1}]}
    result = reward.score([image, image], ["", ""], [wanted, counting])
    objects = result.details["objects"][0]
    mine = np.sort([box[4] for boxes_of_class in objects.values() for box in boxes_of_class])
    np.testing.assert_allclose(mine, np.sort(boxes[sure, 4]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        [box[4] for box in objects["train"]], np.sort(boxes[sure & (labels == 6), 4])[::-1], rtol=0, atol=1e-5
    )
    found = reward.detect([image], [wanted])[0]
    crops = [crop_object(image, *pair) for pair in zip(found.boxes["train"], found.masks["train"])]
    share = reward.classifier.classify(crops, ["train"] * num_trains).count("purple") / num_trains
    # Nothing there is surer than 0.9.
    np.testing.assert_allclose(result.scores, [(1 + share) / 2, 0.0], atol=1e-6)
    assert boxes[:, 4].max() < 0.9 and result.details["objects"][1] == {}
