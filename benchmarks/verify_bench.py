r"""Accuracy and time per check: verify.py beside Math-Verify, on the same labelled answers, in one run.

    python benchmarks/verify_bench.py                  # ../shared/verify/cases.jsonl, three rounds
    python benchmarks/verify_bench.py --cases FILE     # lines of {"prediction", "gold", "equal", "kind", "debatable"}

The two take turns, each in a process of its own; a round is one pass over all cases. Times are per check, of the
process's CPU (the machine may be busy), after a first check that pays for the imports; the medians over the rounds are
printed, as Markdown. Debatable cases are left out of the accuracy. Math-Verify 0.9.0 is used as its README shows:
`verify(parse("$gold$"), parse(response))`, its time limits on; what raises counts as a rejection. It is installed into
.cache/math-verify the first time; where that is not possible (no network), ours runs alone.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEER = ROOT / ".cache" / "math-verify"


@dataclass
class Config:
    cases: str = str(ROOT.parent / "shared" / "verify" / "cases.jsonl")
    """Labelled answers; the label says whether the prediction equals the reference."""
    rounds: int = 3
    """Passes over all cases; the median over them is less noisy than one."""


def worker(contender: str, path: str) -> None:
    """Runs in a process of its own, without any of our imports for the peer: a JSON row per case to stdout."""
    if contender == "nanoT1":
        from verify import is_correct
    else:
        import math_verify

        def is_correct(response: str, gold: str) -> bool:
            return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))

    is_correct(r"\boxed{\frac{x+1}{2}}", r"\frac{x}{2}+\frac12")
    with open(path, encoding="utf-8") as file:
        for case in map(json.loads, file):
            start = time.process_time()
            try:
                got = bool(is_correct(case["prediction"], case["gold"]))
            except Exception:  # of a peer: a reward function that raises gives no reward
                got = False
            print(json.dumps([got, 1e3 * (time.process_time() - start)]))


def run(contender: str, python: str, path: str) -> list[tuple[bool, float]]:
    command = [python, __file__, "--worker", contender, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def install() -> str | None:
    """The peer's Python, or None where it cannot be had."""
    python = PEER / "bin" / "python"
    if not python.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "math-verify[antlr4_13_2]==0.9.0"], check=True)
        except subprocess.CalledProcessError:
            return None
    return str(python)


def main(config: Config) -> None:
    rows = cli.read_jsonl(config.cases)
    contenders = {"nanoT1": sys.executable, **({"Math-Verify 0.9.0": peer} if (peer := install()) else {})}
    results: dict[str, list] = {name: [] for name in contenders}
    for _ in range(config.rounds):
        for name, python in contenders.items():
            results[name].append(run(name, python, config.cases))
    core = [k for k, row in enumerate(rows) if not row.get("debatable")]
    print(f"{len(core)} core cases of {len(rows)}, {config.rounds} rounds, CPU ms per check\n")
    print("| | accuracy | false positives | false negatives | median | p99 | worst |\n|---|---|---|---|---|---|---|")
    for name, rounds in results.items():
        wrong = [rows[k]["equal"] for k in core if rounds[0][k][0] != rows[k]["equal"]]
        times = [sorted(ms for _, ms in one) for one in rounds]
        at = [statistics.median(one[round(share * (len(one) - 1))] for one in times) for share in (0.5, 0.99, 1)]
        accuracy = f"{1 - len(wrong) / len(core):.2%} | {wrong.count(False)} | {wrong.count(True)}"
        print(f"| {name} | {accuracy} | {at[0]:.2f} | {at[1]:.1f} | {at[2]:.1f} |")
    print("\n| kind of answer | cases | " + " | ".join(contenders) + " |\n|---|---|" + "---|" * len(contenders))
    for kind in sorted({rows[k]["kind"] for k in core}):
        mine = [k for k in core if rows[k]["kind"] == kind]
        right = [f"{sum(r[0][k][0] == rows[k]['equal'] for k in mine) / len(mine):.1%}" for r in results.values()]
        print(f"| {kind} | {len(mine)} | " + " | ".join(right) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        import cli

        cli.run(main, Config)
