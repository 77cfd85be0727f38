"""Train Janus-Pro-7B with the OCR reward on 8 GPUs.

`python scripts/run_training_ocr.py [--dry-run] [--num-processes N] [--accelerate-config NAME] [--key value ...]`.
"""

import sys
from pathlib import Path

from stage_grpo.cli import main

if __name__ == "__main__":
    main(["launch", str(Path(__file__).parents[1] / "configs/train/ocr.yaml"), *sys.argv[1:]])
