"""Several seeds of the demo as two tables: the mean over the runs, in brackets the least and the most of them.

The README's tables are made by

    for seed in 0 1 2; do python demo.py --long --seed $seed --out runs/long-$seed; done
    python benchmarks/demo_seeds.py runs/long-*

The first table has the curve against the thinking budget, as RL goes on; the second everything else, with the two
baselines beside it where all of the runs have them (`--baselines`).
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

NAMES = {"sft": "SFT", "rl": "RL", "more_sft": "more SFT", "best_sft": "the oracle's SFT"}


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def models_of(summary: dict, baselines: bool) -> dict[str, dict]:
    """{name: its summary}, in the order of the columns."""
    if not baselines:
        return {"sft": summary["sft"], "rl": summary["rl"]}
    more, best = (summary["baselines"][name] for name in ("more_sft", "best_sft"))
    return {"sft": summary["sft"], "more_sft": more, "rl": summary["rl"], "best_sft": best}


def print_table(columns: list[str], rows: dict[str, list[list[float]]]) -> None:
    """rows: {what: for each column a number per run}."""
    print(f"\n| | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(map(cell, row))} |")


def curves(summaries: list[dict]) -> dict[str, list[list[float]]]:
    """Accuracy by thinking budget: of SFT, and of RL after each share of its steps."""
    by_run = []
    for summary in summaries:
        by_run.append({"SFT": summary["sft"]["budget_curve"]} | summary["rl_curves"])
    rows = {}
    for budget in by_run[0]["SFT"]:
        rows[f"{budget} tokens"] = [
            [100 * run[name][budget] for run in by_run] for name in by_run[0]
        ]
    return rows


def scores(summaries: list[dict], runs: list[dict[str, dict]]) -> dict[str, list[list[float]]]:
    """Everything else, by model."""
    first = runs[0]["rl"]
    rows = {}
    for name in first:
        if f"{name}_ci" in first:
            rows[f"{name}, %"] = by_model(runs, lambda model, name=name: 100 * model[name])
    beyond = f"right at an attempt beyond the {summaries[0]['longest_shown']['attempts']} shown to SFT, %"
    rows[beyond] = [
        [100 * summary["beyond_shown"][name] for summary in summaries] for name in runs[0]
    ]
    rows["mean tokens"] = by_model(runs, lambda model: model["mean_tokens"])
    rows["attempts"] = by_model(runs, lambda model: model["attempts"])
    rows["attempts that repeat a value, %"] = by_model(runs, lambda model: 100 * model["repeats"])
    rows["repeats a value, and fails, %"] = by_model(runs, lambda model: 100 * model["lost"])
    kinds = dict.fromkeys(
        kind for run in runs for model in run.values() for kind in model["failures"]
    )
    for kind in kinds:
        failing = by_model(runs, lambda model, kind=kind: 100 * model["failures"].get(kind, 0.0))
        rows[f"fails: {kind}, %"] = failing
    return rows


def by_model(runs: list[dict[str, dict]], read: Callable[[dict], float]) -> list[list[float]]:
    """What `read` finds in each model's summary: a list per model, with a number per run."""
    return [[read(run[name]) for run in runs] for name in runs[0]]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = [json.loads((Path(folder) / "summary.json").read_text()) for folder in sys.argv[1:]]
    print(
        f"seeds {', '.join(str(s['seed']) for s in found)}; {found[0]['problems_heldout']} problems"
    )
    print(f"seconds: {cell([summary['seconds'] for summary in found])}")
    print(f"longest chain shown: {found[0]['longest_shown']}")
    for name in ("sft", "rl"):
        right = [summary["probe"][name] for summary in found]
        print(f"{found[0]['probe']['problem']}, right of 64 after {NAMES[name]}: {right}")
    print_table(
        ["SFT", *(f"{float(share):.0%} of RL" for share in found[0]["rl_curves"])], curves(found)
    )
    asked = all("baselines" in summary for summary in found)
    runs = [models_of(summary, asked) for summary in found]
    print_table([NAMES[name] for name in runs[0]], scores(found, runs))
