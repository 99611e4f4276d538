"""Several seeds of demo_lm.py as a table: the mean over the runs, in brackets the least and the most of them.

The README's tables are made by

    for seed in 0 1 2; do python demo_lm.py --seed $seed --out runs/demo-lm-$seed; done
    python benchmarks/demo_lm_seeds.py runs/demo-lm-?
    for seed in 0 1 2; do python demo_lm.py --task digits --steps 12 --seed $seed --out runs/digits-$seed; done
    python benchmarks/demo_lm_seeds.py runs/digits-?
"""

import json
import sys
from pathlib import Path

from demo_seeds import cell, print_table

ROWS = {
    "right, %": ("pass@1", 100),
    "mean tokens": ("mean_tokens", 1),
    "never ends, %": ("truncated", 100),
}
"""{row: the name in a model's summary, the unit}."""


def models_of(summary: dict) -> dict[str, dict]:
    """{name: a model's summary}, in the order of the columns."""
    return {
        name: found
        for name, found in summary.items()
        if isinstance(found, dict) and "pass@1" in found
    }


def scores(runs: list[dict[str, dict]]) -> dict[str, list[list[float]]]:
    """{row: for each model a number per run}; then the curve against the thinking budget."""
    rows = {}
    for row, (name, unit) in ROWS.items():
        rows[row] = [[unit * run[model][name] for run in runs] for model in runs[0]]
    for budget in runs[0]["RL"]["budget_curve"]:
        row = f"thought cut at {budget} tokens, %"
        rows[row] = [
            [100 * run[model]["budget_curve"][budget] for run in runs] for model in runs[0]
        ]
    return rows


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in sys.argv[1:]]
    runs = [models_of(summary) for summary in summaries]
    print(
        f"{summaries[0]['task']}; seeds {', '.join(str(summary['seed']) for summary in summaries)}"
    )
    print(f"minutes: {cell([summary['seconds'] / 60 for summary in summaries])}")
    print(f"chains shown: {[summary['chains'] for summary in summaries]}")
    print_table(list(runs[0]), scores(runs))
    print()
    for start in ("SFT", "as it comes"):
        gains = [100 * (run["RL"]["pass@1"] - run[start]["pass@1"]) for run in runs]
        print(f"points that RL is above {start!r}: {cell(gains)}")
