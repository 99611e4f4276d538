"""behaviours.py: counts by hand, and where answers turn right."""

import pytest
from test_evaluate import COUNTDOWN, FALSE_CLAIM, SOLVED, Letters, Script

import behaviours
import evaluate
from evaluate import CutChain, Settings
from sample import SamplingParams
from tasks import Problem

MATHS = Problem("1+1?", "2")


@pytest.mark.parametrize(
    "text, shown",
    [
        (r"It is 2. \boxed{2}", (0, 0, 0, 0)),
        (r"Wait, that's wrong. WAIT! Let me check. \boxed{2}", (4, 0, 0, 0)),
        (r"Alternatively, another way: try again. \boxed{2}", (0, 3, 0, 0)),
        (r"I verify it, and double-check by plugging it back in. \boxed{2}", (0, 0, 3, 0)),
        ("We await the waiter; the perhapsian confirmation", (0, 0, 0, 1)),
    ],
)
def test_words_of_a_text(text, shown):
    """Guards against words found within words, and against capitals that hide one."""
    assert tuple(behaviours.count(MATHS, text).values()) == shown


def test_lines_of_a_countdown():
    """Guards against English word lists for chains that hold no English."""
    chain = "3+5=8, 8+7=15 not 22\n7-3=4, 5*4=20 not 22\n" + SOLVED
    assert behaviours.count(COUNTDOWN, chain) == {
        "reflects": 2,
        "tries another way": 2,
        "verifies": 1,
        "gives up": 0,
    }
    assert behaviours.count(COUNTDOWN, "3+5=8, 8+7=15 not 22\n")["gives up"] == 1
    assert behaviours.count(COUNTDOWN, "")["tries another way"] == 0


def test_accuracy_by_attempts():
    """Guards against shares of the wrong whole, and a tail of tiny groups."""
    found = behaviours.by_attempts([1, 1, 2, 9, 12], [True, False, True, True, False], most=8)
    assert found == {"1": (0.4, 0.5), "2": (0.2, 1.0), "8+": (0.4, 0.5)}


def test_turning_words_by_hand():
    """Guards against a word that is merely frequent, one that is rare, and one counted twice."""
    turning = [("wait wait the sum is five", True)] * 9 + [("the odd one", True)]
    staying = [("the sum is", False)] * 30
    words = {word: lift for word, lift, _ in behaviours.turning_words(turning + staying, least=5)}
    assert words["wait"] == pytest.approx((9.5 / 11) / (0.5 / 31))
    assert words["the"] == pytest.approx((10.5 / 11) / (30.5 / 31))
    assert "odd" not in words and next(iter(words)) in ("five", "wait")
    assert behaviours.turning_words([]) == []


def test_steps_are_between_budgets_of_one_chain():
    """Guards against a step from one chain to the next, and against chains that had ended."""

    def cut(problem, budget, thought, correct):
        return CutChain(budget, problem, thought, "", None, correct)

    cuts = [
        *(cut(0, 10, "a", False), cut(0, 20, "a b", False), cut(0, 30, "a b c", True)),
        *(cut(0, 10, "x", True), cut(0, 20, "x y", False), cut(0, 30, "x y", False)),
        cut(1, 10, "z", False),
    ]
    assert evaluate.turning_steps(cuts) == [(" b", False), (" c", True)]


def test_the_papers_suite(tmp_path, monkeypatch, capsys):
    """Guards against AIME measured by one sample, against our numbers under another set, and against
    a set that cannot be had (GPQA is gated) and is asked for only when the others are measured."""
    measured, read = [], []

    def read_problems(config):
        read.append(config.data)
        return [MATHS], [{}]

    def measure(config, settings, problems, file):
        assert read == list(evaluate.SUITE)
        measured.append((config.data, config.n, str(file)))
        right = len(measured) / 10
        rows = [[True] * round(10 * right) + [False] * round(10 - 10 * right)]
        found = evaluate.Result(rows, [[1] * 10], 0.0, {}, {}, {}, [1], [[0] * 10], 0.0, 0.0)
        return {"m": found}

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate, "read_problems", read_problems)
    evaluate.main(evaluate.Config(["m"], suite="t1", out=str(tmp_path)))
    assert [row[:2] for row in measured] == list(evaluate.SUITE.items())
    assert measured[1] == ("aime24", 32, str(tmp_path / "aime24" / "results.json"))
    head, ours, *paper = capsys.readouterr().out.strip().split("\n")
    assert head.split() == list(evaluate.SUITE)
    assert ours.index("10.0 %") < ours.index("20.0 %") < ours.index("30.0 %") < ours.index("40.0")
    assert len(paper) == 6 and paper[-1].split()[-8:] == [
        "92.4",
        "%",
        "50.6",
        "%",
        "49.6",
        "%",
        "56.1",
        "%",
    ]
    with pytest.raises(evaluate.UserError, match="--suite"):
        evaluate.main(evaluate.Config(["m"], suite="t1", data="x"))


def test_evaluate_shows_them(tmp_path):
    """Guards against counts that no table and no file holds."""
    chains = [["3+5=8, 8+7=15 not 22\n" + SOLVED, FALSE_CLAIM]]
    asked = Settings(2, budgets=(10, 200))
    params = SamplingParams(max_tokens=200)
    result = evaluate.evaluate(Script(chains), Letters(), [COUNTDOWN], params, asked)
    assert result.behaviours["reflects"] == 0.5 and result.behaviours["verifies"] == 1.0
    assert result.by_attempts() == {"1": (0.5, 0.0), "2": (0.5, 1.0)}
    text = evaluate.table({"m": result})
    assert "tries another way" in text and "right of 2 attempts" in text
    evaluate.write_results(tmp_path / "results.json", {}, {"m": result})
    assert evaluate.load_results(tmp_path / "results.json")["m"].behaviours == result.behaviours
    behaviours.plot({"m": result.behaviours}, {"m": result.by_attempts()}, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 5_000
