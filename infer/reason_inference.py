"""Write one image for each prompt of a file: `python infer/reason_inference.py --model_path ... --data_path ...`."""

import argparse

from stage_grpo.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data_path", required=True, help="prompt file: .txt, .jsonl or .csv")
    parser.add_argument("--save_root", default="outputs/images", help="folder to write")
    known, rest = parser.parse_known_args()
    main(["generate", "--model", known.model_path, "--prompts", known.data_path, "--out", known.save_root, *rest])
