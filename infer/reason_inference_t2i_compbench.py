"""Images for T2I-CompBench.

torchrun --nproc_per_node=8 infer/reason_inference_t2i_compbench.py --model_path M --save_root D
"""

import sys

from stage_grpo.cli import main
from stage_grpo.generation.doors import generate_words

if __name__ == "__main__":
    main(["generate", *generate_words("t2i_compbench", sys.argv[1:])])
