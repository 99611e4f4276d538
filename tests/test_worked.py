"""worked.py: what a policy is not paid for although it equals the reference, and what it must be."""

import re

import pytest

import cli
import tasks
import verify
from tasks import Problem

SUM = ("What is 13 + 13?", "26")
ROOT = ("Simplify $\\sqrt{242}$.", "11\\sqrt2")
DECIMAL = ("Write $\\frac{3}{20}$ as a decimal.", "0.15")
THIRDS = ("Compute $\\frac12+\\frac14$.", "\\frac34")

GIVEN = ("Let $a + b + c = 0.$ What is $m+n$?", "0")

LEFT_TO_THE_JUDGE = [
    (*SUM, "13 + 13"),
    (*SUM, "(13 + 13)"),
    (*SUM, "13 + 12 + 1"),
    (*SUM, "**13 + 13**"),
    (*SUM, "(C) 13 + 13"),
    (*SUM, "The answer is 13 + 13."),
    (*SUM, "x = 13 + 13"),
    (*SUM, "13 + 13 = 13 + 13"),
    (*SUM, "13 + 13 \\text{ apples}"),
    (*SUM, "2 \\times 13"),
    (*SUM, "52/2"),
    (*SUM, "\\sqrt{676}"),
    ("Two dozen eggs?", "24", "2 \\text{ dozen}"),
    ("What is $\\dbinom{31}{28}$?", "4495", "\\dbinom{31}{28}"),
    ("A book costs $9, and a pen $9. Together?", "\\$18", "\\$(9 + 9)"),
    ("What is $\\sqrt{4}$?", "2", "x = \\sqrt{4}"),  # whose degree is 2
    ("What is half of -2?", "-1", "x = (3-5)/2"),  # where each division shows a -1
    ("Where?", "(3,4)", "(1+2, 2^2)"),
    ("Solve.", "3,4", "\\frac{7\\pm1}{2}"),
    ("Solve.", "x=5", "x = 10/2"),
    ("What share?", "30\\%", "15\\% + 15\\%"),
    ("How much?", "9.50", "4.75 + 4.75"),
    (*GIVEN, "a+b+c = 0"),
    (*GIVEN, "x = a + b + c = 0"),
    (*ROOT, "\\sqrt{242}"),
    (*ROOT, "(\\sqrt{242})"),
    (*ROOT, "x = \\sqrt{242} + 0"),
    (*ROOT, "1 \\cdot \\sqrt[2]{242} \\text{ cm}"),
    (*DECIMAL, "\\frac{3}{20}"),
    (*DECIMAL, "\\dfrac{3}{20}"),
    (*DECIMAL, "3/20"),
    (*THIRDS, "\\frac12+\\frac14"),
    (*THIRDS, "\\frac14 + 1/2"),
    ("Evaluate $(1+2i)6-3i$.", "6+9i", "(1 + 2i) 6 - 3i"),
    ("Factor $ab+5b+2a+10$.", "(a+5)(b+2)", "ab + 5b + 2a + 10"),
    ("Find \\[\\left(x+1\\right)^2.\\]", "x^2+2x+1", "(x+1)^2"),
]

WORKED_OUT = [
    (*GIVEN, "m + n = 0"),
    (*GIVEN, "0"),
    (*SUM, "26"),
    (*SUM, "26.0"),
    (*SUM, "x = 26"),
    (*SUM, "**26**"),
    ("Where?", "(1,2)", "A(1, 2)"),
    ("When?", "x<0 \\text{ or } x=1", "(-\\infty,0)\\cup\\{1\\}"),
    (*SUM, "(C) 26"),
    (*SUM, "The answer is 26."),
    (*SUM, "13 + 13 = 26"),
    (*SUM, "13 + 13 = \\$26.00"),
    (*SUM, "26 \\text{ apples}"),
    ("How many?", "025", "16 + 9 = 25"),
    ("How fast is light, in m/s, to one digit?", "300000000", "3 \\times 10^8"),
    ("How many?", "5000000", "5 million"),
    ("How many?", "5000000", "E = 5.0\\times10^6\\text{ J}"),
    ("How many?", "1000000", "10^6"),
    ("How many?", "2000", "10^3 \\times 2"),
    ("Where?", "(3,4)", "(3.0, 4)"),
    ("Solve.", "3,4", "x = 3 \\text{ or } x = 4"),
    ("What share?", "60\\%", "\\frac35"),
    ("Half of 5?", "2.5", "2\\frac12"),
    ("Half of 13?", "6.5", "13/2"),
    ("How far, to 15 digits?", "4.123105625617661", "\\sqrt{17}"),
    ("Which is larger, $2/3$ or $3/4$?", "\\frac{3}{4}", "3/4"),
    ("Simplify $\\frac{(x+1)(x-2)}{x-2}$.", "1+x", "x+1"),
    ("A circle of circumference $12\\pi$ cm: a sixth?", "2\\pi \\text{ cm}", "2\\pi"),
    ("A parallel to $y=2x+3$ through 0?", "y=2x", "2x"),
    ("What is $2^{100}$?", "2^{100}", "2^{100}"),
    ("Find the line through (0,1) and (1,3).", "y = 2x + 1", "y = 1 + 2x"),
    ("Find $\\sqrt[3]{16}$.", "2\\sqrt[3]{2}", "2 \\cdot 2^{1/3}"),
]


@pytest.mark.parametrize("question, reference, answer", LEFT_TO_THE_JUDGE)
def test_the_question_in_the_box_is_no_answer(question, reference, answer):
    """Bug: RL of sums ended at 100 % with `\\boxed{13 + 13}`: equal to 26, and no work of the
    policy's. And a rule that falls for brackets, a label, a unit, or another layout."""
    response = f"\\boxed{{{answer}}}"
    assert verify.verify(response, reference).correct, "it is equal"
    problem = Problem(question, reference)
    alone = tasks.judge_math(problem, response)
    assert (alone.outcome, alone.score, alone.decided_by) == ("wrong", 0.0, "not worked out")
    assert tasks.judge_all([problem], [response]) == [alone]


@pytest.mark.parametrize("question, reference, answer", WORKED_OUT)
def test_what_is_worked_out_is_an_answer(question, reference, answer):
    """Guards against a rule so strict that right answers lose: other spellings, another order of
    terms, a chain that ends in the number, powers of ten, formulas that only share characters with
    the question."""
    problem, response = Problem(question, reference), f"\\boxed{{{answer}}}"
    assert tasks.judge_math(problem, response).correct
    assert tasks.judge_all([problem], [response])[0].correct


def test_a_choice_may_repeat_its_option():
    problem = Problem("Which is it? A. $3+4$ B. $3+5$", "B", "choice")
    assert tasks.judge_math(problem, "\\boxed{B. 3+5}").correct


WRAPPERS = ("{}", "({})", "x = {}", "{}+0", "1 \\cdot ({})", "{} \\text{{ cm}}")


def test_formulas_of_real_questions(shared):
    """MATH500: each reference is an answer to its question. In 43 questions a formula equals the
    reference (in one an equation, a + b + c + d = 0), and in 2 of them it is the reference; in one
    more it is its number, `12^{th}`."""
    equal, paid = set(), set()
    for problem in tasks.load(shared / "data" / "math500.jsonl"):
        assert tasks.judge_math(problem, f"\\boxed{{{problem.answer}}}").correct, problem
        for groups in re.findall(r"\$([^$]+)\$|\\\[(.+?)\\\]", problem.question, re.DOTALL):
            formula = "".join(groups).strip(" .,?\n")
            if not verify.is_correct(f"\\boxed{{{formula}}}", problem.answer):
                continue
            equal.add(problem.question)
            for wrapper in WRAPPERS:
                response = f"\\boxed{{{wrapper.format(formula)}}}"
                if tasks.judge_math(problem, response).correct:
                    paid.add((problem.answer, formula))
    assert len(equal) == 43
    assert paid == {("\\sqrt{53}", "\\sqrt{53}"), ("12", "12^{\\mathrm{th}}"), ("6", "6")}


def test_the_last_equation_of_real_solutions(shared):
    """Bug: 35 of GSM8K's own solutions lost, for `5*15=75.00` does not show 75."""
    count = 0
    for row in cli.read_jsonl(shared / "data" / "gsm8k_test.jsonl"):
        problem = Problem(row["question"], verify.reference_answer(row["answer"]))
        equations = re.findall(r"<<([^<>]*=[^<>]*)>>", row["answer"])
        if equations and verify.is_correct(f"\\boxed{{{equations[-1]}}}", problem.answer):
            count += 1
            assert tasks.judge_math(problem, f"\\boxed{{{equations[-1]}}}").correct, equations[-1]
    assert count > 1200
