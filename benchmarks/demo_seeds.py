"""Several seeds of the demo as one table: the mean over the runs, and in brackets the least and the most of them.

The README's table is made by

    for seed in 0 1 2; do python demo.py --seed $seed --out runs/demo-$seed; done
    python benchmarks/demo_seeds.py runs/demo-*
"""

import json
import statistics
import sys
from pathlib import Path


def rows(summaries: list[dict]) -> dict[str, list[list[float]]]:
    """{what: [of SFT, of RL]}, each a number per run."""

    def pick(read) -> list[list[float]]:
        return [[read(summary[stage]) for summary in summaries] for stage in ("sft", "rl")]

    first = summaries[0]["rl"]
    kinds = dict.fromkeys(kind for s in summaries for stage in ("rl", "sft") for kind in s[stage]["failures"])
    return {
        **{f"{name}, %": pick(lambda s, name=name: 100 * s[name]) for name in first if f"{name}_ci" in first},
        "mean tokens": pick(lambda s: s["mean_tokens"]),
        **{f"cut at {b} tokens, %": pick(lambda s, b=b: 100 * s["budget_curve"][b]) for b in first["budget_curve"]},
        **{f"fails: {kind}, %": pick(lambda s, kind=kind: 100 * s["failures"].get(kind, 0.0)) for kind in kinds},
    }


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = [json.loads((Path(folder) / "summary.json").read_text()) for folder in sys.argv[1:]]
    seconds = [summary["seconds"] for summary in found]
    print(
        f"seeds {', '.join(str(s['seed']) for s in found)}; {found[0]['problems_heldout']} problems; s: {cell(seconds)}"
    )
    print("\n| | after SFT | after RL |\n|---|---|---|")
    for name, columns in rows(found).items():
        print(f"| {name} | {' | '.join(map(cell, columns))} |")
