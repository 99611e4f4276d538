"""cot.py: every chain is right, none teaches a shortcut, and merged attempts make responses that
verify.

The attempts below are scripted; one test runs the whole path on SmolLM2-135M.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import cot
import sft
import tasks
import verify
from cli import UserError
from cot import Attempt, Draft
from sample import Completion, SamplingParams
from tasks import Problem
from tokenizer import demo_tokenizer

PROBLEM = Problem("Tom has 3 apples and buys twice as many. How many has he?", "9")
WRONG = Attempt("Twice 3 is 6. The answer is \\boxed{6}", "6", False)
ODD = Attempt("I add 3 and 2, \\boxed{5}.", "5", False)
RIGHT = Attempt("He buys 6. 3 + 6 = 9, so \\boxed{9}", "9", True)
AGAIN = Attempt("3 * (1 + 2) = \\boxed{9}", "9", True)


def chains(count, attempts=3, operators="+-*"):
    """(problem, its chain) for the problems that get one."""
    rng = random.Random(5)
    for problem in islice(tasks.countdown(5, operators=operators), count):
        row = cot.countdown_chain(problem, rng, attempts)
        if row is not None:
            yield problem, row


# --- by program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operators", ["+-*", "+-*/"])
def test_every_chain_is_right(operators):
    """Guards against chains that teach false arithmetic, a wrong verdict on an attempt, or a wrong
    box."""
    for problem, row in chains(300, operators=operators):
        target, numbers, _ = tasks.read_countdown(problem.answer)
        *tried, check, _ = row["response"].split("\n")
        assert check.startswith("check ")
        for number, line in enumerate(tried, start=1):
            steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", line)
            assert len(steps) == len(numbers) - 1
            used, made = Counter(numbers), Counter()
            for x, operator, y, z in steps:
                assert (
                    verify.exact_arithmetic(f"{x}{operator}{y}", operators)[0]
                    == int(z)
                    <= tasks.LARGEST
                )
                used.subtract((int(x), int(y)))
                used[int(z)] += 1
            made[int(steps[-1][3])] = 1
            assert +used == made, (
                "every number is used once, and what is left is what the attempt comes to"
            )
            word = "is" if number == len(tried) else "not"
            assert line.endswith(f"={steps[-1][3]} {word} {target}")
            assert (int(steps[-1][3]) == target) == (word == "is")
        assert tasks.diagnose_countdown(problem, row["response"]) == "correct"
        assert tasks.judge_countdown(problem, row["response"]).correct
        assert tasks.attempts(row["response"])[-1] == str(target) and len(tried) <= 3


def test_a_chain_ends_in_its_first_success():
    """Guards against data that is spoilt: chains that are cut off, give up, or go on after the
    success; and against a choice of attempts that favours some. Of n values, drawn in random order,
    the target is the k-th with chance 1/n for every k; a problem without it among the first 3 is
    dropped. (Three standard deviations.)"""
    problem = tasks.countdown_problem([3, 5, 7], 22)
    values, rng, tries = len(tasks.ways([3, 5, 7], "+-*")), random.Random(0), 20_000
    rows = [cot.countdown_chain(problem, rng, 3) for _ in range(tries)]
    lengths = Counter(len(tasks.attempts(row["response"])) for row in rows if row is not None)
    assert lengths.keys() == {1, 2, 3}
    for count in lengths.values():
        assert count / tries == pytest.approx(1 / values, abs=1.5 / tries**0.5)
    assert all(
        row is not None for row in (cot.countdown_chain(problem, rng, 99) for _ in range(50))
    )


def test_chains_give_up_only_where_asked_and_where_nothing_was_right():
    """Guards against a --give-up that shortens chains which would have succeeded, that moves the
    chains of everybody who does not ask for it, or whose chains the judge takes for an answer."""
    problem = tasks.countdown_problem([3, 5, 7], 22)

    def drawn(give_up: float) -> list[dict | None]:
        """Of the same attempts each: a generator of its own for every chain."""
        return [cot.countdown_chain(problem, random.Random(n), 3, give_up) for n in range(400)]

    never, always, half = drawn(0.0), drawn(1.0), drawn(0.5)
    assert never.count(None) > 100 and always.count(None) == 0
    for before, after in zip(never, always):
        if before is not None:
            assert after == before
            continue
        lines = after["response"].split("\n")
        assert lines[-1] == cot.GIVE_UP and len(lines) == 4
        assert all(" not 22" in line for line in lines[:-1])
        assert tasks.judge_countdown(problem, after["response"]).outcome == "no_answer"
    assert half.count(None) / never.count(None) == pytest.approx(0.5, abs=0.15)
    # Who does not ask draws the attempts, and nothing else: the next chain is the one it was.
    rng, other = random.Random(never.index(None)), random.Random(never.index(None))
    assert cot.countdown_chain(problem, rng, 3) is None
    other.sample(range(len(tasks.ways([3, 5, 7], "+-*"))), 3)
    assert rng.random() == other.random()


def test_no_value_is_tried_twice():
    """Guards against chains that repeat a failure, or try the same sum in another order: there is
    nothing to learn from either, and RL's penalty for repetition would punish what SFT taught."""
    for _, row in chains(300, attempts=99):
        values = tasks.attempts(row["response"])
        assert len(set(values)) == len(values)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 49), min_size=2, max_size=4))
def test_check_keeps_the_value_at_every_step(numbers):
    """Guards against a check that drops a bracket: each form between the = has the value of the
    whole."""
    for walk in tasks.ways(numbers, "+-*/").values():
        forms = cot.step_by_step(walk.expression).split("=")
        assert (
            forms[0] == walk.expression
            and forms[-1] == str(walk.value)
            and len(forms) == len(numbers)
        )
        for form in forms[:-1]:
            assert verify.exact_arithmetic(form, "+-*/")[0] == Fraction(walk.value)


def test_the_vocabulary_covers_the_chains():
    """Guards against words of the chains that the demo's tokenizer would spell byte by byte."""
    for problem, row in chains(100):
        rest = row["response"] + problem.question + " "
        for word in sorted(cot.WORDS, key=len, reverse=True):
            rest = rest.replace(word, "")
        assert not re.search(r"[a-z]", rest), rest


def test_unsolvable_problems_are_named():
    """Guards against a chain of failures for a problem that has no solution."""
    with pytest.raises(UserError, match="no way from"):
        cot.countdown_chain(tasks.countdown_problem([1, 1, 1], 50), random.Random(0), 3)


# --- by attempts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("critique", [None, "Twice 3 is what he buys, not what he has."])
@pytest.mark.parametrize("failures", [[], [WRONG], [WRONG, ODD]])
@pytest.mark.parametrize("right", [[RIGHT], [RIGHT, AGAIN]])
def test_merged_chains_verify(failures, right, critique):
    """Guards against a box left in a failed attempt, or a merged chain whose answer is no longer
    the right one."""
    failures = [replace(attempt, critique=critique) for attempt in failures]
    right = [replace(attempt, critique=critique) for attempt in right]
    text = cot.merge(Draft(PROBLEM, failures, right))
    assert (
        tasks.judge_all([PROBLEM], [text])[0].correct
        and text.count("\\boxed") == 1
        and text.endswith("\\boxed{9}")
    )
    assert text.count("Wait") == text.count("try again") == len(failures)
    assert "Let me verify" in text and text.index("He buys 6") < text.index("Let me verify")
    assert all(
        text.index(cot.unboxed(attempt.text)) < text.index("He buys 6") for attempt in failures
    )
    assert not critique or text.count(critique) == len(failures) + 1


def test_the_template_says_what_the_attempt_answered():
    """Guards against a fallback that says nothing: it names the failed answer, and confirms by a
    second attempt."""
    text = cot.merge(Draft(PROBLEM, [WRONG], [RIGHT, AGAIN]))
    assert "it comes to 6, but that does not hold" in text and cot.unboxed(AGAIN.text) in text
    no_answer = cot.merge(Draft(PROBLEM, [Attempt("Hm.", None, False)], [RIGHT]))
    assert "it comes to no answer" in no_answer and "None" not in no_answer


@pytest.mark.parametrize(
    "critique, attempt, fine",
    [
        ("He has what he bought and the 3 from before.", WRONG, True),
        ("It should be 9, as 3 and 6 make 9 apples.", WRONG, False),
        ("Take 9 apples away: 3 and 6 are what is left, as it should be.", RIGHT, True),
        ("He has 19 or 0.9 apples, which makes no sense.", WRONG, True),
        ("The answer is \\boxed{6}, which is wrong.", WRONG, False),
        ("No.", WRONG, False),
        ("and so on " * 100, WRONG, False),
    ],
)
def test_critiques_are_used_only_where_usable(critique, attempt, fine):
    """Guards against a critic that gives the answer away, boxes its own, says nothing, or never
    ends."""
    assert cot.usable(critique, PROBLEM, attempt) == fine


def test_the_critic_is_not_told_the_answer():
    """Guards against a prompt that holds the reference: a critic could only repeat it."""
    [message] = cot.critic_chat(PROBLEM, WRONG)
    assert (
        "9" not in message["content"]
        and "boxed" not in message["content"]
        and "is wrong" in message["content"]
    )
    assert "is right" in cot.critic_chat(PROBLEM, RIGHT)[0]["content"]


def test_criticise_falls_back_attempt_by_attempt(monkeypatch):
    """Guards against one bad critique that shifts all others to the wrong attempt."""
    good = ["Twice as many is what he buys.", "Counting the apples one by one confirms it."]
    monkeypatch.setattr(cot, "ask", lambda *_: [[good[0]], [], ["no"], [good[1]]])
    drafts = [Draft(PROBLEM, [replace(WRONG), replace(ODD)], [replace(AGAIN), replace(RIGHT)])]
    drafts.append(Draft(PROBLEM, [], [replace(RIGHT)]))
    cot.criticise("critic", drafts, None)
    shown = [*drafts[0].failures, drafts[0].right[0], drafts[1].right[0]]
    assert [attempt.critique for attempt in shown] == [good[0], None, None, good[1]]
    assert drafts[0].right[1].critique is None  # not shown, so not asked about


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3))
def test_choice_of_attempts(seed, most):
    """Guards against two failures with one answer, more failures than asked for, and chains that
    never fail."""
    repeated = [WRONG, WRONG, ODD, RIGHT, RIGHT, AGAIN]
    failures, right = cot.choose(repeated, most, random.Random(seed))
    assert min(1, most) <= len(failures) <= most and len(
        {attempt.answer for attempt in failures}
    ) == len(failures)
    assert sorted(attempt.text for attempt in right) == sorted([RIGHT.text, AGAIN.text])


def test_a_rewriting_is_kept_only_where_still_right(monkeypatch):
    """Guards against a rewriting that loses the answer, and one that is missing."""
    rows = [
        {"problem": PROBLEM.question, "answer": "9", "task": "math", "response": f"merged {i}"}
        for i in range(3)
    ]
    monkeypatch.setattr(cot, "ask", lambda *_: [["fluent \\boxed{9}"], ["fluent \\boxed{8}"], []])
    cot.rewrite("rewriter", rows, None)
    assert [row["response"] for row in rows] == ["fluent \\boxed{9}", "merged 1", "merged 2"]


# --- the command ----------------------------------------------------------------------------------


def write_problems(tmp_path):
    rows = [
        {"question": PROBLEM.question, "answer": "He buys 6.\n#### 9"},
        {"question": "Hard?", "answer": "1"},
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "problems.jsonl")


def test_chats_without_room_are_skipped(monkeypatch, capsys):
    """Guards against one long prompt that ends the command after all its work, and answers given to
    the wrong chat."""
    tokenizer = demo_tokenizer(cot.WORDS)

    def generate(prompts, n, params, keys, progress):
        assert keys == [0, 2]
        return [[Completion([*tokenizer.encode(f"{key}"), 0], [], "stop")] for key in keys]

    sampler = SimpleNamespace(
        generate=generate, model=SimpleNamespace(config=SimpleNamespace(context=60))
    )
    monkeypatch.setattr(cot, "load_sampler", lambda _, **__: (sampler, tokenizer))
    chats = [[{"role": "user", "content": content}] for content in ("1 2", "7 " * 100, "3 4")]
    assert cot.ask("m", chats, 1, SamplingParams(20), "rewriting") == [["0"], [], ["2"]]
    assert "1 prompts leave no room" in capsys.readouterr().out


def test_attempts_become_training_data(tmp_path, monkeypatch, capsys):
    """Guards against rows that sft.py cannot read, unsolved problems kept, and the second
    checkpoint forgotten."""
    said = {
        "one": [[WRONG.text, "I think the answer is 9.\n"], ["\\boxed{2}"]],
        "two": [[ODD.text], []],
    }
    monkeypatch.setattr(cot, "ask", lambda path, *_: said[path])
    out = tmp_path / "chains.jsonl"
    cot.main(cot.Config(str(out), data=write_problems(tmp_path), model=("one", "two"), n=2))
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["response"].endswith(
        "So the answer is \\boxed{9}"
    )  # and not {9.}, as the sentence ends
    assert row["problem"] == PROBLEM.question and row["answer"] == "9"
    assert tasks.judge_all(tasks.load(out), [row["response"]])[0].correct
    assert "1 of 2 problems" in capsys.readouterr().out


def test_chains_keep_the_chat_that_they_answer(tmp_path, monkeypatch):
    """Guards against a system prompt that the attempts were made under and SFT never sees."""
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "4+5?"}]
    cli.write_jsonl(tmp_path / "problems.jsonl", [{"prompt": chat, "answer": "9"}])
    monkeypatch.setattr(cot, "ask", lambda *_: [["\\boxed{9}"]])
    out = tmp_path / "chains.jsonl"
    cot.main(cot.Config(str(out), data=str(tmp_path / "problems.jsonl"), model=("one",), n=1))
    [row] = cli.read_jsonl(out)
    asked = sft.conversation(row, "chains.jsonl")
    [problem] = tasks.load(tmp_path / "problems.jsonl")
    assert asked[:2] == tasks.messages(problem) and asked[0] == chat[0]
    assert asked[2] == {"role": "assistant", "content": row["response"]}


def test_program_chains_as_a_file(tmp_path):
    """Guards against a file that is not reproducible, and against held-out problems in the training
    data."""
    for name in ("a", "b"):
        cot.main(cot.Config(str(tmp_path / name), count=200))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    held = {p.question for p in islice(tasks.countdown(0, heldout=True), 1_000)}
    assert len(tasks.load(tmp_path / "a")) == 200 and not held & {
        p.question for p in tasks.load(tmp_path / "a")
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"model": ("m",)}, "belong together"),
        ({"data": "problems.jsonl"}, "belong together"),
        ({"data": "absent.jsonl", "model": ("m",)}, "absent.jsonl"),
        ({"attempts": 0}, "--attempts"),
        ({"largest": 100}, "--largest"),
        ({"count": 0}, "--count"),
        ({"operators": "+^"}, "--operators"),
        ({"operators": ""}, "--operators"),
        ({"out": "taken"}, "exists"),
        ({"out": "taken/sub/chains.jsonl"}, "taken is not a folder"),
    ],
)
def test_bad_flags_write_nothing(flags, message, tmp_path, monkeypatch):
    """Guards against a traceback, an overwritten file, and half a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match=message):
        cot.main(cot.Config(**{"out": "chains.jsonl"} | flags))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (
        tmp_path / "taken"
    ).read_text() == "mine"


def test_template_args_and_dtype_reach_every_checkpoint(tmp_path, monkeypatch):
    """Bug: a thinking model can be told not to think everywhere but where its chains are made; a
    checkpoint runs in another dtype than was asked for."""
    told = []

    def ask(path, chats, n, params, what, loading):
        told.append((path, loading.template_args, loading.dtype))
        return [["\\boxed{9}"]] * len(chats)

    monkeypatch.setattr(cot, "ask", ask)
    config = cot.Config(
        str(tmp_path / "chains.jsonl"),
        data=write_problems(tmp_path),
        model=("one",),
        critic="two",
        rewrite="three",
        template_args='{"enable_thinking": false}',
        dtype="bfloat16",
    )
    cot.main(config)
    asked = ('{"enable_thinking": false}', "bfloat16")
    assert told == [(path, *asked) for path in ("one", "two", "three")]


def test_no_right_attempt_writes_nothing(tmp_path, monkeypatch):
    """Guards against an empty training file."""
    monkeypatch.setattr(cot, "ask", lambda *_: [[WRONG.text], []])
    with pytest.raises(UserError, match="stronger --model"):
        cot.main(
            cot.Config(
                str(tmp_path / "chains.jsonl"), data=write_problems(tmp_path), model=("one",)
            )
        )
    assert not (tmp_path / "chains.jsonl").exists()


def test_real_weights_attempt_and_criticise(smollm2, tmp_path):
    """Guards against a path that only works on scripted attempts: SmolLM2-135M tries, verifies,
    criticises itself."""
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in (1, 4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, out = str(smollm2), tmp_path / "chains.jsonl"
    options = {"n": 2, "max_tokens": 40, "temperature": 0.5, "critic": model}
    cot.main(cot.Config(str(out), data=str(tmp_path / "problems.jsonl"), model=(model,), **options))
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made and all(
        v.correct for v in tasks.judge_all(tasks.load(out), [row["response"] for row in made])
    )
