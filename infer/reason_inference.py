"""Images for the prompts of a file.

python infer/reason_inference.py --model_path M --data_path test_data.txt
"""

import sys

from stage_grpo.cli import main
from stage_grpo.generation.doors import generate_words

if __name__ == "__main__":
    main(["generate", *generate_words("prompts", sys.argv[1:])])
