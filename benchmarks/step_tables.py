"""What step.py measured, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDES = ("ours", "field")


def as_table(result: dict[str, Any]) -> str:
    lines = [f"{'phase':18}{'ours, s':>10}{'field, s':>10}{'ratio':>8}{'cpu ratio':>11}{'share of ours':>15}"]
    step = result["phases"][-1]["seconds_ours"]
    for row in result["phases"]:
        ratios = [f"{row[key]:.2f}" if row[key] else "-" for key in ("ratio", "cpu_ratio")]
        share = f"{100 * row['seconds_ours'] / step:.2f} %"
        cells = f"{row['seconds_ours']:10.3f}{row['seconds_field']:10.3f}{ratios[0]:>8}{ratios[1]:>11}{share:>15}"
        lines.append(f"{row['phase']:18}{cells}")
    products = result["products_seconds"]
    lines.append(f"{'bare products':18}{products['ours']:10.3f}{products['field']:10.3f}   (of scoring + update)")
    rate = result["flops"]["scoring + update"] / products["ours"] / 1e9
    lines.append(
        f"scoring + update: {result['ratio_scoring_update']:.2f} x, at most {result['bound_scoring_update']:.2f} x by "
        f"the products, at {rate:.0f} GFLOP/s; token weights {100 * result['token_weights_share']:.2f} % of our step"
    )
    lines.append(f"{'peak memory, MB':18}{'ours':>10}{'field':>10}   (above weights and optimizer state)")
    ours, field = (result["memory"][side] for side in SIDES)
    for phase in sorted(ours["peaks"].keys() | field["peaks"].keys()):
        lines.append(f"{phase:18}{ours['peaks'].get(phase, 0) / 1e6:10.0f}{field['peaks'].get(phase, 0) / 1e6:10.0f}")
    lines.append(f"{'worst':18}{ours['peak'] / 1e6:10.0f}{field['peak'] / 1e6:10.0f}{result['memory_ratio']:8.2f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    starts = dict.fromkeys(SIDES, 0.0)
    for row in result["phases"][:-2]:
        seconds = [max(0.0, row[f"seconds_{side}"]) for side in SIDES]
        axes.barh(SIDES, seconds, left=list(starts.values()), label=row["phase"])
        starts = {side: start + more for (side, start), more in zip(starts.items(), seconds)}
    axes.set(xlabel="seconds a step")
    axes.invert_yaxis()
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
