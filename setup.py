from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# Bounds on what is imported directly; requirements.txt pins what the published numbers were made with.
CORE = [
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "filelock>=3.18,<5",
    "httpx2>=2,<3",
    "huggingface_hub>=2.4,<3",
    "jaxtyping>=0.3.11,<1",
    "jinja2>=3.1,<4",
    "markupsafe>=3,<4",
    "matplotlib>=3.11,<4",
    "numpy>=2.4,<3",
    "peft>=0.21,<1",
    "pillow>=13,<14",
    "psutil>=7,<8",
    "pyyaml>=6,<7",
    "safetensors>=0.8,<1",
    "scipy>=1.17,<2",
    "tokenizers>=0.23,<1",
    "torch>=2.11,<3",
    "tqdm>=4.67,<5",
    "transformers>=5.23,<6",
    # The trainer overrides methods of TRL: tests/test_trl_seams.py says which, so widen this bound only with it.
    "trl>=1.16,<1.17",
]
DEEPSPEED = ["deepspeed>=0.19,<1"]
TENSORBOARD = ["tensorboard>=2.21,<3"]
WANDB = ["wandb>=0.31,<1"]
# Rewards. None of them needs torchvision; iqa alone (pyiqa) brings it.
OCR = ["onnxruntime>=1.31,<2", "opencv-python-headless>=5.0,<6", "rapidfuzz>=3.14,<4", "rapidocr>=3.10,<4"]
SERVER = ["starlette>=1.10,<2", "uvicorn>=0.54,<1"]
IQA = ["pyiqa>=0.1.16,<0.2"]
# Finds noun phrases; its model comes by `python -m spacy download en_core_web_sm`.
T2I_COMPBENCH = ["spacy>=3.8,<4"]
DEV = [
    "beartype>=0.23,<1",
    "pre-commit>=4.7,<5",
    "pyright[nodejs]>=1.1.414,<2",
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17.5,<0.18",
    *DEEPSPEED,
    *OCR,
    *SERVER,
    *TENSORBOARD,
    *WANDB,
]
EXTRAS = {
    "deepspeed": DEEPSPEED,
    "dev": DEV,
    "iqa": IQA,
    "ocr": OCR,
    "rewards": [*OCR, *SERVER],
    "server": SERVER,
    "t2i_compbench": T2I_COMPBENCH,
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
}

setup(
    name="stage-grpo",
    version="0.1.0",
    description="Reinforcement learning of autoregressive image models: STAGE, GRPO and their relatives",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"stage_grpo": ["py.typed", "templates/*.j2"], "stage_grpo.comparison": ["published_results.json"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["stage = stage_grpo.cli:main"]},
)
