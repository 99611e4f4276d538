"""What chains of thought do: how often they reflect, try another way and verify; where they turn
right.

    python evaluate.py --model runs/sft runs/rl --task countdown --budgets 42,84,112 --out runs/eval

T1 counts these in its chains and finds that all of them grow with RL, and that words such as "wait"
and "alternate" stand at the steps that turn a wrong answer into a right one. evaluate.py measures
the same, for any model, with the functions here:

    count          of one response: by its words, or in countdown by what its lines are
    by_attempts    accuracy of the responses that made 1, 2, 3, ... attempts
    turning_words  which words stand where the forced answer turns from wrong to right

Words are a crude measure. "Wait" may be said without a thought behind it, and a model may check in
silence: the counts compare checkpoints of one model, not models.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import cli
import tasks
import verify
from tasks import Problem

WORDS = {
    "reflects": (
        r"wait|hmm+|hold on|let me (?:think|see|reconsider|re-?check|check)|mistake|"
        r"that(?:'s| is|'s| was) (?:not right|wrong|incorrect)|does(?:n't| not) hold"
    ),
    "tries another way": (
        r"alternatively|alternate(?:ly)?|(?:another|different|other) (?:way|approach|method)|"
        r"try (?:again|another|instead)|let's instead|perhaps"
    ),
    "verifies": (
        r"verif(?:y|ies|ying|ication)|double[- ]check(?:ing)?|confirm(?:s|ing)?|"
        r"plug(?:ging)? (?:it |this |that )?(?:back )?in|substitut(?:e|ing) (?:it |this )?back"
    ),
}
"""What each behaviour is known by in a text, in any case. The lists are ours: those of the paper
are not known to us."""


def count(problem: Problem, text: str) -> dict[str, int]:
    """How often a response shows each behaviour; "gives up" is 1 if it holds no box.

    In countdown: a failure that is noticed (a line with " not "), every attempt but the first, a
    line that checks.
    """
    if problem.task == "countdown":
        lines = text.split("\n")
        found = {
            "reflects": sum(tasks.FAILURE in line for line in lines),
            "tries another way": max(0, len(tasks.attempts(text)) - 1),
            "verifies": sum(line.startswith("check ") for line in lines),
        }
    else:
        found = {}
        for name, words in WORDS.items():
            found[name] = len(re.findall(rf"\b(?:{words})\b", text, re.IGNORECASE))
    return found | {"gives up": int(verify.last_boxed(text) is None)}


def by_attempts(
    attempts: Sequence[int], correct: Sequence[bool], most: int = 8
) -> dict[str, tuple[float, float]]:
    """{"1": (share of all responses, accuracy of these), "2": ..., "8+": ...} by attempts made."""
    groups: dict[int, list[bool]] = {}
    for made, right in zip(attempts, correct, strict=True):
        groups.setdefault(min(made, most), []).append(right)
    found = {}
    for made in sorted(groups):
        label = str(made) if made < most else f"{most}+"
        rights = groups[made]
        found[label] = (len(rights) / len(attempts), sum(rights) / len(rights))
    return found


def turning_words(
    steps: Sequence[tuple[str, bool]], least: int = 5, most: int = 10
) -> list[tuple[str, float, int]]:
    """[(word, how many times likelier in a step that turns right, in how many)], likeliest first.

    steps: of chains whose forced answer was wrong: (the text up to the next budget, is it right
    then?). Counted are words in at least `least` of the steps that turn, once in each.
    """
    turned: Counter[str] = Counter()
    stayed: Counter[str] = Counter()
    for text, turns in steps:
        words = set(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
        if turns:
            turned.update(words)
        else:
            stayed.update(words)
    turning = sum(turns for _, turns in steps)
    staying = len(steps) - turning
    found = []
    for word, times in turned.items():
        if times >= least:
            # Half a step more on either side: a word that stands nowhere else is not infinite.
            here = (times + 0.5) / (turning + 1)
            elsewhere = (stayed[word] + 0.5) / (staying + 1)
            found.append((word, here / elsewhere, times))
    return sorted(found, key=lambda row: (-row[1], row[0]))[:most]


def plot(
    counts: dict[str, dict[str, float]],
    attempts: dict[str, dict[str, tuple[float, float]]],
    path: str | Path,
) -> None:
    """Left: behaviours per response; right: accuracy by attempts made. Both {model: ...}."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    width = 0.8 / len(counts)
    for number, (model, means) in enumerate(counts.items()):
        places = [i + number * width for i in range(len(means))]
        bars.bar(places, list(means.values()), width, label=model)
        bars.set_xticks([i + 0.4 - width / 2 for i in range(len(means))], list(means))
    bars.set(ylabel="times per response", title="Behaviours")
    bars.legend()
    for model, found in attempts.items():
        accuracies = [accuracy for _, accuracy in found.values()]
        made = [int(label.removesuffix("+")) for label in found]
        lines.plot(made, accuracies, marker="o", label=model)
    lines.set(xlabel="attempts made (the last: or more)", ylabel="accuracy")
    lines.set(title="Accuracy by attempts made")
    lines.grid(alpha=0.3)
    with cli.whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
