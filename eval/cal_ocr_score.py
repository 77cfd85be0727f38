"""Score rendered text: `python eval/cal_ocr_score.py --image_root DIR [--txt_path FILE] [--output_csv FILE]`."""

import sys

from stage_grpo.evaluation.ocr_summary import main_ocr_score

if __name__ == "__main__":
    try:
        print(main_ocr_score("cal_ocr_score.py", sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"cal_ocr_score.py: error: {' '.join(str(error).splitlines())}")
