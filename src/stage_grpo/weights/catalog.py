"""The table of weights: where their files live, what their bytes must be, and what they may be used for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class WeightFile:
    """One file at its official home: either a ``url``, or a name in a hub repository.

    Attributes:
        name: What it is called here, and in the hub repository unless ``hub_path`` says otherwise. A file whose name
            ends in ``.index.json`` brings along the shards that it lists.
        url: Its address, if it is on no hub.
        hub: Hub repository, e.g. ``openai/clip-vit-large-patch14``.
        revision: Commit of the hub repository, or a branch where no commit is known.
        sha256: Of its bytes, 64 hexadecimal digits, or as many of the first ones as are known; None for unknown: then
            what came first is recorded.
        size: Bytes, if known.
        hub_path: Path in the hub repository, if it differs from ``name``.
    """

    name: str
    url: str | None = None
    hub: str | None = None
    revision: str = "main"
    sha256: str | None = None
    size: int | None = None
    hub_path: str | None = None

    def __post_init__(self):
        if (self.url is None) == (self.hub is None):
            raise ValueError(f"{self.name!r} must have either a url or a hub repository")

    @property
    def address(self) -> str:
        """Where it is fetched from; hub files from ``$HF_ENDPOINT``, if that is set."""
        if self.url is not None:
            return self.url
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.hub}/resolve/{self.revision}/{self.hub_path or self.name}"

    @property
    def upstream_name(self) -> str:
        """What it is called at its home."""
        return PurePosixPath(self.hub_path or self.name if self.url is None else self.url).name


@dataclass(frozen=True)
class WeightEntry:
    """The weights of one model.

    Attributes:
        files: Their files.
        convert: ``module:function`` that makes a folder in transformers' layout of them, called as
            ``convert(source_files: dict[str, Path], out: Path)`` with the files by name; None: they are one already.
        licence: Licence of the weights, or "not established".
        home: Page where people find them.
        note: What else to know; may be empty.
    """

    files: tuple[WeightFile, ...]
    convert: str | None
    licence: str
    home: str
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of the files whose size is known."""
        return sum(file.size or 0 for file in self.files)


def get_entry(name: str) -> WeightEntry:
    """Looks weights up.

    Raises:
        ValueError: No such weights.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown weights {name!r}; known are {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def _hub(repository: str, revision: str, *names: str) -> tuple[WeightFile, ...]:
    return tuple(WeightFile(name, hub=repository, revision=revision) for name in names)


_CLIP_FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_BERT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
_QWEN_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
_LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_LAION_H_COMMIT = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
_LAION_H_PROCESSOR = tuple(name for name in _CLIP_FILES if name != "config.json")
_BERT = "google-bert/bert-base-uncased"
_BERT_COMMIT = "86b5e0934494bd15c9632b12f734a8a67f723594"
_IMAGE_REWARD = "zai-org/ImageReward"
_OPENAI_L = "openai/clip-vit-large-patch14"
_OPENAI_L_COMMIT = "32bd64288804d66eefd0ccbe215aa642df71cc41"
_OPENAI_B = "openai/clip-vit-base-patch32"
_OPENAI_B_COMMIT = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
_OPENAI_B_SHA256 = "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"

WEIGHTS: dict[str, WeightEntry] = {
    "mask2former-swin-s-coco": WeightEntry(
        (
            WeightFile(
                "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",
                f"{_MMDET}/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
                sha256="743b7d99",
            ),
        ),
        "stage_grpo.weights.convert_mask2former:convert",
        "Apache-2.0",
        "https://github.com/open-mmlab/mmdetection",
        "the file that GenEval uses; its first digits of SHA-256 stand in its name",
    ),
    "clip-vit-large-patch14": WeightEntry(
        (
            *_hub(_OPENAI_L, _OPENAI_L_COMMIT, *_CLIP_FILES),
            WeightFile(
                "model.safetensors",
                hub=_OPENAI_L,
                revision=_OPENAI_L_COMMIT,
                sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
                size=1_710_540_580,
            ),
        ),
        None,
        "not established",
        f"https://huggingface.co/{_OPENAI_L}",
    ),
    "clip-vit-base-patch32": WeightEntry(
        (
            *_hub(_OPENAI_B, _OPENAI_B_COMMIT, *_CLIP_FILES),
            WeightFile("pytorch_model.bin", None, _OPENAI_B, _OPENAI_B_COMMIT, _OPENAI_B_SHA256, 605_247_071),
        ),
        "stage_grpo.weights.convert_clip:convert_pickled",
        "not established",
        f"https://huggingface.co/{_OPENAI_B}",
        "the CLIP of T2I-CompBench's CLIPScore",
    ),
    "hps-v2.1": WeightEntry(
        (
            WeightFile(
                "HPS_v2.1_compressed.pt",
                hub="xswu/HPSv2",
                revision="697403c78157020a1ae59d23f111aa58ced35b0a",
                sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
            ),
            *_hub(_LAION_H, _LAION_H_COMMIT, *_LAION_H_PROCESSOR),
        ),
        "stage_grpo.weights.convert_clip:convert_hps",
        "Apache-2.0",
        "https://huggingface.co/xswu/HPSv2",
    ),
    "clip-vit-h-14-laion": WeightEntry(
        _hub(_LAION_H, _LAION_H_COMMIT, *_CLIP_FILES, "model.safetensors"),
        None,
        "MIT",
        f"https://huggingface.co/{_LAION_H}",
    ),
    "pickscore-v1": WeightEntry(
        (
            *_hub(
                "yuvalkirstain/PickScore_v1",
                "a4e4367c6dfa7288a00c550414478f865b875800",
                "config.json",
                "model.safetensors",
            ),
            *_hub(_LAION_H, _LAION_H_COMMIT, *_LAION_H_PROCESSOR),
        ),
        None,
        "not established",
        "https://huggingface.co/yuvalkirstain/PickScore_v1",
    ),
    "aesthetic-v2": WeightEntry(
        (
            WeightFile(
                "sac+logos+ava1-l14-linearMSE.pth",
                "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
                "6934dd81792f086e613a121dbce43082cb8be85e/"
                "sac%2Blogos%2Bava1-l14-linearMSE.pth",
                sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                size=3_714_759,
            ),
        ),
        "stage_grpo.weights.convert_aesthetic:convert",
        "not established",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "the last layers alone; the features are those of clip-vit-large-patch14",
    ),
    "image-reward": WeightEntry(
        (
            *_hub(_IMAGE_REWARD, "5736be03b2652728fb87788c9797b0570450ab72", "ImageReward.pt", "med_config.json"),
            *_hub(_BERT, _BERT_COMMIT, *_BERT_FILES),
        ),
        "stage_grpo.weights.convert_image_reward:convert",
        "not established",
        f"https://huggingface.co/{_IMAGE_REWARD}",
    ),
    "git-large-vqav2": WeightEntry(
        _hub(
            "microsoft/git-large-vqav2",
            "main",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "special_tokens_map.json",
            *_BERT_FILES,
        ),
        None,
        "MIT",
        "https://huggingface.co/microsoft/git-large-vqav2",
    ),
    "blip-vqa": WeightEntry(
        (
            WeightFile(
                "model_base_vqa_capfilt_large.pth",
                "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
                "model_base_vqa_capfilt_large.pth",
            ),
            *_hub(_BERT, _BERT_COMMIT, *_BERT_FILES),
        ),
        "stage_grpo.weights.convert_blip_vqa:convert",
        "BSD-3-Clause",
        "https://github.com/salesforce/BLIP",
        "the file that T2I-CompBench uses, for pictures of 480 x 480",
    ),
    "grounding-dino-tiny": WeightEntry(
        (
            WeightFile(
                "groundingdino_swint_ogc.pth",
                "https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/"
                "groundingdino_swint_ogc.pth",
                sha256="3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799",
                size=693_997_677,
            ),
            *_hub(_BERT, _BERT_COMMIT, *_BERT_FILES),
        ),
        "stage_grpo.weights.convert_gdino:convert",
        "Apache-2.0",
        "https://github.com/IDEA-Research/GroundingDINO",
    ),
    "orm-t2i-r1": WeightEntry(
        _hub(
            "CaraJ/ORM-T2I-R1",
            "main",
            "config.json",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.json",
            "merges.txt",
        ),
        "stage_grpo.weights.convert_orm:convert",
        "not established",
        "https://huggingface.co/CaraJ/ORM-T2I-R1",
        "in LLaVA-NeXT's layout",
    ),
    "qwen2.5-vl-7b": WeightEntry(
        _hub("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f460bfe9f0759e9844b3ce807cfb5", *_QWEN_FILES),
        None,
        "Apache-2.0",
        "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct",
        "only to judge in process; a server brings its own",
    ),
    "unified-reward": WeightEntry(
        _hub("CodeGoat24/UnifiedReward-qwen-7b", "main", *_QWEN_FILES),
        None,
        "not established",
        "https://huggingface.co/CodeGoat24/UnifiedReward-qwen-7b",
        "only to judge in process; a server brings its own",
    ),
}
"""Weights by the name that ``stage weights get`` takes."""
