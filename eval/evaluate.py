"""Score a folder of images: `python eval/evaluate.py --benchmark shapes --images DIR [--out scores.json]`."""

import sys

from stage_grpo.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
