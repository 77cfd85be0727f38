"""The official prompt files: where they live, what their bytes must be, and what they may be used for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a prompt set.

    Attributes:
        name: What it is called here; its extension says how ``stage_grpo.data.load_rows`` reads it.
        url: Where it is fetched from; at GitHub, at a commit, so that it cannot change.
        sha256: Of its bytes, 64 hexadecimal digits; None for unknown: then that of what came first is recorded beside
            it, and checked ever after.
    """

    name: str
    url: str
    sha256: str | None

    @property
    def address(self) -> str:
        """Its ``url``; files of the hub from ``$HF_ENDPOINT``, if that is set."""
        endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
        return endpoint + self.url.removeprefix(_HUB) if self.url.startswith(f"{_HUB}/") else self.url

    @property
    def upstream_name(self) -> str:
        """What it is called at its home."""
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts that others publish.

    Attributes:
        name: What ``stage data fetch`` calls it.
        title: What it holds.
        licence: As its home states it.
        home: Page where people find it.
        files: Its files.
    """

    name: str
    title: str
    licence: str
    home: str
    files: tuple[RemoteFile, ...]


def get_prompt_set(name: str) -> PromptSet:
    """Looks a prompt set up.

    Raises:
        ValueError: No such set.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"unknown prompt set {name!r}; known are {', '.join(PROMPT_SETS)}")
    return PROMPT_SETS[name]


def _github(repository: str, commit: str, path: str, sha256: str, name: str | None = None) -> RemoteFile:
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    return RemoteFile(name or PurePosixPath(path).name, url, sha256)


def _compbench(category: str, sha256: str) -> RemoteFile:
    commit = "1b7094991a57f3c22abdd4f6e8ba6c1a15517073"
    return _github("Karine-Huang/T2I-CompBench", commit, f"examples/dataset/{category}_val.txt", sha256)


_GENEVAL = _github(
    "djghosh13/geneval",
    "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
    "prompts/evaluation_metadata.jsonl",
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
)
_COMPBENCH = (
    _compbench("color", "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d"),
    _compbench("shape", "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae"),
    _compbench("texture", "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f"),
    _compbench("spatial", "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988"),
    _compbench("3d_spatial", "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9"),
    _compbench("non_spatial", "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d"),
    _compbench("numeracy", "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe"),
    _compbench("complex", "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4"),
)
_OCR = _github(
    "yifan123/flow_grpo",
    "ac4c86e8cae021841f1fde853d340e0db67690dd",
    "dataset/ocr/test.txt",
    "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
)
# One JSON object a line, whatever its name at home says: hence the other name here.
_T2I_R1 = _github(
    "CaraJ7/T2I-R1",
    "2d9d4d1af4119953b3a8541f914f85481d7e1e76",
    "data/geneval_and_t2i_data_final.json",
    "96b956b5c92477ea2ff13cdd0c805f762a9d9fd5af43141ada6850ab3f6a0171",
    name="train.jsonl",
)
# The sheet that Imagen's page links to, as CSV. It has no versions: after an edit the checksum refuses it.
_DRAWBENCH = RemoteFile(
    "drawbench.csv",
    "https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY"
    "/gviz/tq?tqx=out:csv&sheet=Sheet1",
    "e120fd4d8aa8f6c44b0b3ee92d9dfb7463c67f5b2d427d23a2bf388f80a0c0c1",
)
# As hpsv2.benchmark_prompts() downloads them. Neither commit nor checksum could be established.
_HPS = tuple(
    RemoteFile(f"{style}.json", f"{_HUB}/datasets/zhwang/HPDv2/resolve/main/benchmark/{style}.json", None)
    for style in ("anime", "concept-art", "paintings", "photo")
)

PROMPT_SETS: dict[str, PromptSet] = {
    prompt_set.name: prompt_set
    for prompt_set in (
        PromptSet(
            "geneval", "GenEval: 553 evaluation prompts", "MIT", "https://github.com/djghosh13/geneval", (_GENEVAL,)
        ),
        PromptSet(
            "t2i_compbench",
            "T2I-CompBench: 300 evaluation prompts in each of 8 categories",
            "MIT",
            "https://github.com/Karine-Huang/T2I-CompBench",
            _COMPBENCH,
        ),
        PromptSet(
            "drawbench",
            "DrawBench: 200 evaluation prompts",
            "not stated",
            "https://imagen.research.google",
            (_DRAWBENCH,),
        ),
        PromptSet(
            "hps",
            "HPS v2: 800 evaluation prompts in each of 4 styles (checksums unknown)",
            "not established",
            "https://huggingface.co/datasets/zhwang/HPDv2",
            _HPS,
        ),
        PromptSet(
            "ocr", "Flow-GRPO's OCR test prompts: 1,018", "MIT", "https://github.com/yifan123/flow_grpo", (_OCR,)
        ),
        PromptSet(
            "t2i_r1", "T2I-R1: 7,223 training prompts", "Apache-2.0", "https://github.com/CaraJ7/T2I-R1", (_T2I_R1,)
        ),
    )
}
