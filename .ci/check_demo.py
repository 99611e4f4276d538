"""Did the demo learn what it should? Reads its summary.json, prints one line per bar, exits with 1 where one is missed.

    python .ci/check_demo.py runs/demo/summary.json

The bars are what the demo must reach, not what it usually does: the README has three seeds, all above them. 1,024
problems of 16 samples give pass@1 itself to about a point.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

FLOOR = 0.85
SLACK = 0.005  # how far a curve may fall where it is flat


def bars(summary: dict) -> list[tuple[str, bool]]:
    """(what must hold, with its numbers; whether it does)"""
    sft, rl = summary["sft"], summary["rl"]
    one, sixteen = "pass@1", "pass@16"
    curves = {name: {int(b): score for b, score in summary[name]["budget_curve"].items()} for name in ("sft", "rl")}
    budgets = sorted(curves["rl"])
    longest = [budget for budget in budgets if 2 * budget >= budgets[-1]]
    heldout = summary["problems_heldout"]
    return [
        (f"at least 1024 held-out problems: {heldout}", heldout >= 1024),
        (f"pass@1 after RL at least {100 * FLOOR:.0f} %: {100 * rl[one]:.1f}", rl[one] >= FLOOR),
        (f"15 points above SFT's {100 * sft[one]:.1f}", rl[one] >= sft[one] + 0.15),
        (
            f"pass@16 after RL, {100 * rl[sixteen]:.1f}, within a point of SFT's {100 * sft[sixteen]:.1f}",
            rl[sixteen] >= sft[sixteen] - 0.01,
        ),
        *(
            (
                f"accuracy of {name} rises with the budget: {[round(100 * curve[b], 1) for b in budgets]}",
                all(curve[b] <= curve[c] + SLACK for b, c in pairwise(budgets))
                and curve[budgets[0]] < max(curve.values()),
            )
            for name, curve in curves.items()
        ),
        (f"RL above SFT at the budgets {longest}", all(curves["rl"][b] > curves["sft"][b] for b in longest)),
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    results = bars(json.loads(Path(sys.argv[1]).read_text()))
    for claim, holds in results:
        print("ok    " if holds else "MISSED", claim)
    sys.exit(not all(holds for _, holds in results))
