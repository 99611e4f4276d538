r"""Accuracy and time per check: verify.py beside Math-Verify, on the same labelled answers, in one run.

    python benchmarks/verify_bench.py                  # both files in ../shared/verify, three rounds
    python benchmarks/verify_bench.py --cases FILE     # lines of {"prediction", "gold", "equal", "kind", "group"}

The two take turns, each in a process of its own; a round is one pass over all cases. Times are per check, of the
process's CPU (the machine may be busy), after a first check that pays for the imports; the medians over the rounds are
printed, as Markdown. What verify.py has to ask of sympy runs in its worker and is timed apart, by the clock. Debatable
cases are left out of the accuracy. Math-Verify 0.9.0 is used as its README shows: `verify(parse("$gold$"),
parse(response))`, its time limits on; what raises counts as a rejection. It is installed into .cache/math-verify the
first time; where that is not possible (no network), ours runs alone.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEER = ROOT / ".cache" / "math-verify"
SHARED = ROOT.parent / "shared" / "verify"
OLDER = [
    "peer_tests",
    "real_outputs",
    "human_solutions",
    "derived",
    "issues",
]  # groups of the first collection


@dataclass
class Config:
    cases: list[str] = field(
        default_factory=lambda: [str(SHARED / "cases.jsonl"), str(SHARED / "cases_field.jsonl")]
    )
    """Labelled answers; the label says whether the prediction equals the reference."""
    rounds: int = 3
    """Passes over all cases; the median over them is less noisy than one."""


@dataclass
class Check:
    """What one contender said of one case."""

    correct: bool
    cpu_ms: float
    sympy_ms: float = 0.0  # by the clock, of the worker that asks sympy; 0: it was not asked


def ours(response: str, gold: str) -> Check:
    import verify

    start = time.process_time()
    verdict = verify.decide(response, gold, timeout=2.0, lenient=False, tolerance=0.0)
    cpu = time.process_time() - start
    if verdict.outcome != "undecided":
        return Check(verdict.correct, 1e3 * cpu)
    start = time.perf_counter()
    correct = verify.is_correct(response, gold)
    return Check(correct, 1e3 * cpu, 1e3 * (time.perf_counter() - start))


def theirs(response: str, gold: str) -> Check:
    import math_verify

    start = time.process_time()
    try:
        correct = bool(
            math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))
        )
    except Exception:  # of a peer: a reward function that raises gives no reward
        correct = False
    return Check(correct, 1e3 * (time.process_time() - start))


def worker(contender: str, paths: list[str]) -> None:
    """Runs in a process of its own, without any of our imports for the peer: a JSON row per case to stdout."""
    check = ours if contender == "nanoT1" else theirs
    check(r"\boxed{\frac{x+1}{2}}", r"\frac{x}{2}+\frac12")
    check(r"\boxed{\int_0^1 x\,dx}", "1/2")  # starts the worker and imports sympy
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for case in map(json.loads, file):
                print(json.dumps(vars(check(case["prediction"], case["gold"]))))


def run(contender: str, python: str, paths: list[str]) -> list[Check]:
    command = [python, __file__, "--worker", contender, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [
        Check(**json.loads(line))
        for line in done.stdout.splitlines()
        if line.startswith('{"correct"')
    ]


def install() -> str | None:
    """The peer's Python, or None where it cannot be had."""
    python = PEER / "bin" / "python"
    if not python.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
            subprocess.run(
                [python, "-m", "pip", "install", "-q", "math-verify[antlr4_13_2]==0.9.0"],
                check=True,
            )
        except subprocess.CalledProcessError:
            return None
    return str(python)


def accuracy(rows: list[dict], checks: list[Check], chosen: list[int]) -> str:
    wrong = [rows[k]["equal"] for k in chosen if checks[k].correct != rows[k]["equal"]]
    right = 1 - len(wrong) / len(chosen)
    return f"{right:.2%} | {wrong.count(False)} | {wrong.count(True)}"


def table_group(row: dict) -> str:
    """The row of the first table that a case belongs to."""
    group = row.get("group", "field")
    return "older" if group in OLDER else group


def main(config: Config) -> None:
    rows = [row for path in config.cases for row in cli.read_jsonl(path)]
    contenders = {
        "nanoT1": sys.executable,
        **({"Math-Verify 0.9.0": peer} if (peer := install()) else {}),
    }
    results: dict[str, list[list[Check]]] = {name: [] for name in contenders}
    for _ in range(config.rounds):
        for name, python in contenders.items():
            results[name].append(run(name, python, config.cases))
    core = [k for k, row in enumerate(rows) if not row.get("debatable")]
    print(f"{len(core)} core cases of {len(rows)}, {config.rounds} rounds, CPU ms per check\n")
    print(
        "| | cases | | accuracy | accepted wrongly | rejected wrongly |\n|---|---|---|---|---|---|"
    )
    groups = [table_group(row) for row in rows]
    for group in dict.fromkeys(groups[k] for k in core):
        chosen = [k for k in core if groups[k] == group]
        for name, rounds in results.items():
            print(f"| {group} | {len(chosen)} | {name} | {accuracy(rows, rounds[0], chosen)} |")
    print("\n| | median | p99 | worst |\n|---|---|---|---|")
    for name, rounds in results.items():
        times = [sorted(check.cpu_ms for check in one) for one in rounds]
        at = [
            statistics.median(one[round(share * (len(one) - 1))] for one in times)
            for share in (0.5, 0.99, 1)
        ]
        print(f"| {name} | {at[0]:.2f} | {at[1]:.1f} | {at[2]:.1f} |")
    asked = sorted(check.sympy_ms for one in results["nanoT1"] for check in one if check.sympy_ms)
    if asked:
        share = len(asked) / config.rounds / len(rows)
        slowest = f"median {statistics.median(asked):.0f}, p99 {asked[round(0.99 * (len(asked) - 1))]:.0f} ms"
        print(f"\nsympy was asked for {share:.1%} of the cases: {slowest}, by the clock")
    print(
        "\n| kind of answer | cases | "
        + " | ".join(contenders)
        + " |\n|---|---|"
        + "---|" * len(contenders)
    )
    for kind in sorted({rows[k]["kind"] for k in core}):
        mine = [k for k in core if rows[k]["kind"] == kind]
        right = [
            f"{sum(r[0][k].correct == rows[k]['equal'] for k in mine) / len(mine):.1%}"
            for r in results.values()
        ]
        print(f"| {kind} | {len(mine)} | " + " | ".join(right) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        import cli

        cli.run(main, Config)
