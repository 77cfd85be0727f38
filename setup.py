from setuptools import find_packages, setup

CORE = [
    "torch>=2.11,<3",
    "transformers>=5.23,<6",
    "trl>=1.16,<2",
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "peft>=0.21,<1",
    "safetensors>=0.8,<1",
    "jaxtyping>=0.3.11,<1",
    "numpy>=2.4,<3",
    "scipy>=1.17,<2",
    "pillow>=13,<14",
    "jinja2>=3.1,<4",
    "matplotlib>=3.11,<4",
    "tqdm>=4.67,<5",
]
DEV = ["beartype", "pytest", "pytest-xdist", "ruff", "pyright", "pre-commit", "tensorboard", "wandb"]

setup(
    name="stage-grpo",
    version="0.1.0",
    description="Reinforcement learning of autoregressive image models: STAGE, GRPO and their relatives",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    install_requires=CORE,
    extras_require={"dev": DEV, "deepspeed": ["deepspeed>=0.19,<1"], "wandb": ["wandb"], "tensorboard": ["tensorboard"]},
    entry_points={"console_scripts": ["stage = stage_grpo.cli:main"]},
)
