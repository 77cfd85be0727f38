"""Images for DrawBench.

torchrun --nproc_per_node=8 infer/reason_inference_drawbench.py --model_path M --save_root D
"""

import sys

from stage_grpo.cli import main
from stage_grpo.generation.doors import generate_words

if __name__ == "__main__":
    main(["generate", *generate_words("drawbench", sys.argv[1:])])
