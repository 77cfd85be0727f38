"""Train the tiny Janus on the shapes world: `python scripts/run_training_shapes.py [--key value ...]`."""

import sys
from pathlib import Path

from stage_grpo.cli import main

if __name__ == "__main__":
    main(["train", str(Path(__file__).parents[1] / "configs/shapes/stage.yaml"), *sys.argv[1:]])
