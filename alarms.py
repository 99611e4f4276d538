"""What is going wrong in a run of rl.py, from its metrics: one line each, said when it begins.

    alarms.of(runfolder.read_metrics("runs/rl/metrics.jsonl"))

Three kinds: a change that is more than noise (accuracy, entropy, length), a state in which little
or nothing can be learned, and an update that was skipped.
"""

import itertools
import math
from collections.abc import Callable
from statistics import fmean

from runfolder import without_update


def changes(values: list[float], best: Callable[[list[float]], float]) -> list[tuple[float, float]]:
    """Means (before, now) that differ by more than noise: now is that of the last 5, 10 or 20
    values, before that of as many earlier ones, where it was `best` (max or min).

    More than noise is 5.5 standard errors. The noise of one value is taken from the differences
    between neighbours, which a trend hardly moves. A policy that does not change shows such a pair
    in fewer than 1 of 100 runs of 100 steps, a collapse within ten steps of it (tests simulate it).
    """
    differences = [after - value for value, after in itertools.pairwise(values)]
    squares = sum(difference**2 for difference in differences)
    variance = squares / (2 * max(1, len(differences)))
    found = []
    for window in (5, 10, 20):
        spans = range(len(values) - 2 * window + 1)  # where windows begin that end before `now`
        if spans:
            before = best([fmean(values[i : i + window]) for i in spans])
            now = fmean(values[-window:])
            if abs(now - before) > 5.5 * math.sqrt(variance * 2 / window):
                found.append((before, now))
    return found


def of(history: list[dict]) -> list[str]:
    """What is going wrong, each with the knob to turn, or with the likely reason.

    history: the lines of metrics.jsonl.
    """

    def values(name: str) -> list[float]:
        measured = [row.get(name, math.nan) for row in history]
        return [value for value in measured if math.isfinite(value)]

    found = []
    if any(now < 2 / 3 * before for before, now in changes(values("accuracy"), max)):
        found.append(
            "reward collapse: accuracy fell by a third; "
            "raise --temperature (T1: 1.2) or --kl-coef, lower --lr"
        )
    if any(now < before / 5 for before, now in changes(values("entropy"), max)):
        found.append(
            "entropy collapse: a fifth of what it was; "
            "raise --entropy-coef or --temperature (T1: 1.2)"
        )
    if any(now > max(0.2, 2 * before) for before, now in changes(values("truncated"), min)):
        found.append(
            "length run-away: too many responses never end; T1 penalises them; lower --entropy-coef"
        )
    skipped = [row.get("skipped", 0) for row in history[-2:]]
    if skipped and skipped[-1] > skipped[0]:
        found.append(
            "not finite: an update was skipped; "
            "lower --lr or --max-grad-norm, or use --dtype float32"
        )
    last = history[-5:]
    if len(last) == 5 and fmean(row.get("truncated", 0.0) for row in last) > 0.8:
        found.append(
            "nothing ends: nearly every response is cut off; raise --max-tokens, "
            "or lower --temperature if they are gibberish"
        )
    return found + idleness(history)


def idleness(history: list[dict]) -> list[str]:
    """The state in which least is learned, if any: a list of one alarm, or of none."""
    last = history[-10:]
    if len(last) == 10 and all(map(without_update, last)):
        return [f"nothing is learned: no update for 10 steps; {likely_reason(last)}"]
    # Not of the last 20: a policy that is right now and then would ring in some hundred steps.
    if len(history) >= 20 and not any(row.get("accuracy", 1.0) for row in history):
        return [f"nothing is right: no right answer since the first step; {likely_reason(history)}"]
    last = history[-20:]
    if len(last) == 20 and fmean(map(teaching_share, last)) < 0.2:
        return [
            "little is learned: more than 80 % of the groups of 20 steps were dropped; "
            f"{likely_reason(last)}"
        ]
    return []


def teaching_share(row: dict) -> float:
    """The share of a step's groups that had something to teach."""
    if without_update(row):
        return 0.0
    return 1 - row.get("dropped", 0.0)


def in_vain(history: list[dict]) -> list[str]:
    """What to say at the end of a run that has never changed its policy: one line, or none."""
    if not history or not all(map(without_update, history)):
        return []
    return [f"the policy is still the one it began with: no update; {likely_reason(history)}"]


def likely_reason(rows: list[dict]) -> str:
    """Why no group had anything to teach in these steps, and what to do."""

    def mean(name: str) -> float:
        return fmean(row.get(name, 0.0) for row in rows)

    if mean("truncated") > 0.5:
        return "responses are cut off before they answer: raise --max-tokens"
    if mean("unexpected") > 0.5:
        return "responses are garbled or repeat themselves: lower --temperature"
    if mean("accuracy") < 0.1:
        return (
            "the problems are too hard: choose easier ones (evaluate.py --curate), "
            "raise --samples, or lower --temperature if responses are gibberish"
        )
    if mean("accuracy") > 0.9:
        return "the problems are too easy: choose harder ones (evaluate.py --curate)"
    return "each problem is solved always or never: raise --samples, or see evaluate.py --curate"
