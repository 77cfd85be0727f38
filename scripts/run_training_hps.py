"""Train Janus-Pro-7B with HPSv2.1, GroundingDINO and GIT on 8 GPUs.

`python scripts/run_training_hps.py [--dry-run] [--num-processes N] [--accelerate-config NAME] [--key value ...]`.
"""

import sys
from pathlib import Path

from stage_grpo.cli import main

if __name__ == "__main__":
    main(["launch", str(Path(__file__).parents[1] / "configs/train/hps_gdino_git.yaml"), *sys.argv[1:]])
