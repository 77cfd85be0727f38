#!/usr/bin/env bash
# Score a folder of images by T2I-CompBench's own code, category by category; a second call goes on where one stopped.
#
#   T2I_COMPBENCH_ROOT=~/T2I-CompBench T2I_COMPBENCH_PYTHON=~/envs/compbench/bin/python \
#     eval/cal_t2i_compbench_value.sh ROOT [--out DIR] [--categories color spatial ...]
#
# ROOT holds color_val/samples/<prompt>_<number>.png and so on; docs/t2i_compbench.md says more.
set -euo pipefail

exec python -c '
import sys

from stage_grpo.evaluation.t2i_compbench import main_official

try:
    print(main_official("cal_t2i_compbench_value.sh", sys.argv[1:]))
except (ValueError, OSError) as error:
    print(f"cal_t2i_compbench_value.sh: error: {error}", file=sys.stderr)
    sys.exit(2)
' "$@" --official-root "${T2I_COMPBENCH_ROOT:-}" --python "${T2I_COMPBENCH_PYTHON:-python}"
