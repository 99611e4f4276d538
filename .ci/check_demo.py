"""Did RL teach what the data did not? Reads the demo's summary.json, prints one line per bar, exits with 1 on a miss.

    python .ci/check_demo.py runs/demo/summary.json

The bars are what any run must reach, not what the demo usually does: they lie below the worst of the README's three
seeds, for another machine rounds otherwise and so makes another run. 1,024 problems of 16 samples give pass@1 itself
to about a point. Two more bars ask the baselines, where the demo was run with `--baselines`; where it was not, a line
says so.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

GAIN = 0.10  # of pass@1, by RL
BEYOND = 0.05  # of it, by responses that are right at an attempt beyond those that any chain shows
FLAT = 0.03  # how far SFT's curve may move beyond the longest chain shown
FAN = 0.015  # how much more RL's curve must rise there than SFT's
ORACLE = 0.02  # how far below SFT on the oracle's data RL may end
SLACK = 0.005  # how far a share may move by chance alone
PROBE = (
    20  # of 64 responses to one problem of many values, of which an earlier demo's policy solved 4
)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def bars(summary: dict) -> list[tuple[str, bool]]:
    """(what must hold, with its numbers; whether it does)"""
    sft, rl, shown = summary["sft"], summary["rl"], summary["longest_shown"]["tokens"]
    found = []

    heldout = summary["problems_heldout"]
    found.append((f"at least 1024 held-out problems: {heldout}", heldout >= 1024))
    claim = f"pass@1 rises by {100 * GAIN:.0f} points: {percent(sft['pass@1'])} to {percent(rl['pass@1'])}"
    found.append((claim, rl["pass@1"] >= sft["pass@1"] + GAIN))
    claim = f"pass@16 does not fall: {percent(sft['pass@16'])} to {percent(rl['pass@16'])}"
    found.append((claim, rl["pass@16"] >= sft["pass@16"] - SLACK))

    beyond = summary["beyond_shown"]
    gained = beyond["rl"] - beyond["sft"]
    claim = f"right at an attempt beyond those shown: {percent(beyond['sft'])} to {percent(beyond['rl'])}"
    found.append((claim, gained >= BEYOND))

    shares = sorted(summary["rl_curves"], key=float)
    curves = [sft["budget_curve"], *(summary["rl_curves"][share] for share in shares)]
    least, *_, most = sorted((budget for budget in curves[0] if int(budget) >= shown), key=int)
    rises = [curve[most] - curve[least] for curve in curves]
    claim = f"beyond the longest chain shown, {least} to {most} tokens, SFT gains nothing: {percent(rises[0])}"
    found.append((claim, abs(rises[0]) <= FLAT))
    claim = f"RL gains there, after {', '.join(shares)} of its steps: {', '.join(map(percent, rises[1:]))}"
    found.append((claim, rises[-1] > rises[0] + FAN))
    ends = [curve[most] for curve in curves]
    claim = f"at {most} tokens, the further RL has run, the better: {', '.join(map(percent, ends))}"
    found.append((claim, all(before < after for before, after in pairwise(ends))))

    for kind in ("false claim", "wrong numbers", "wrong arithmetic"):
        before, after = (model["failures"].get(kind, 0.0) for model in (sft, rl))
        found.append((f"{kind}: {percent(before)} to {percent(after)}", after <= before + SLACK))

    right = summary["probe"]["rl"]
    found.append(
        (f"at least {PROBE} of 64 right at {summary['probe']['problem']}: {right}", right >= PROBE)
    )

    if "baselines" in summary:
        more, oracle = summary["baselines"]["more_sft"], summary["baselines"]["best_sft"]
        claim = (
            f"above more SFT, {percent(more['pass@1'])}, intervals apart: {percent(rl['pass@1'])}"
        )
        found.append((claim, rl["pass@1_ci"][0] > more["pass@1_ci"][1]))
        claim = f"within {100 * ORACLE:.0f} points of SFT on the oracle's data, {percent(oracle['pass@1'])}"
        found.append((claim, rl["pass@1"] >= oracle["pass@1"] - ORACLE))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    summary = json.loads(Path(sys.argv[1]).read_text())
    results = bars(summary)
    for claim, holds in results:
        print("ok    " if holds else "MISSED", claim)
    if "baselines" not in summary:
        print(
            "not asked: is it above more SFT, and near SFT on the oracle's data? (python demo.py --baselines)"
        )
    sys.exit(not all(holds for _, holds in results))
