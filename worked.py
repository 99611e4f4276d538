r"""Is an answer worked out, or would the judge have to do the work?

`13 + 13` equals 26, and `\sqrt{242}` equals `11\sqrt2`: verify.py says so, for it is asked whether
two answers are equal. A policy finds out that it is paid for a question put into the box: ours did,
within five steps, and in 39 of the 500 problems of MATH500 a formula of the question equals the
reference. `left_to_judge` knows such answers. tasks.py asks it about every right one, and pays none
of them. By the reference, it has two rules:

1. The reference is made of numbers (26, 3/4, 0.15, (3, 4), $18, x = 5, 60%). Then the answer has to
   show numbers as well, and where the reference has whole numbers, whole ones: not 13 + 13, 52/2,
   or \sqrt{676}. Of a chain, 13 + 13 = 26, one member will do. A number may have a unit, be mixed,
   or have a power of ten. For a reference that is no whole number, roots and the like may stand
   (\sqrt{17} for 4.123105): such a reference is often rounded.
2. Whatever the reference, a formula of the question that equals it is no answer, nor is one that
   contains it: not \sqrt{242}, not x = \sqrt{242} + 0. Nor is an equation of the question: where
   it says a + b = 0, "a + b = 0" is no answer, though m + n = 0 would be.

What still passes: a formula of the question that was really changed, where rule 1 does not hold;
24/40 for 3/5; a plain number of the question (0.45, to be written as a fraction); products of
matrices, which our parser works out by itself.
"""

import re
from fractions import Fraction
from functools import lru_cache

import latex
import maths
import verify
from latex import ParseError
from maths import MINUS_ONE, Node, show, walk

SECONDS = 0.4  # to compare a formula of the question with the reference
PLAIN = {"num", "base", "+", "*", "^", "%", "unit", "chain", "list", "or", "tuple", ":"}
FORMULA = r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"


def left_to_judge(question: str, answer: str, reference: str) -> bool:
    """Is this answer, which equals the reference, right only because the judge can do the work?"""
    try:
        found = tree(verify.without_letter(verify.without_stars(answer)))
        wanted = tree(reference)
    except ParseError:  # it was right as a text
        return False
    if pieces(found) == pieces(wanted) or not has_operation(found):
        return False
    answered, expected = show(found), show(wanted)
    if found[0] == "chain" and maths.names(found):
        given = equations(question, reference)
        if any(side in answered and side not in expected for side in given):
            return True
    if shows_numbers(wanted, whole=False):
        whole = is_whole(wanted)
        plain = all(part[0] in PLAIN for part in walk(found))
        if (whole or plain) and not shows_numbers(found, whole):
            return True
        if whole:
            return False
    copied = formulas(question, reference)
    return any(body in answered and body not in expected for body in copied)


def tree(text: str) -> Node:
    tokens = latex.trimmed(latex.tokenise(text))
    return maths.read(tokens, maths.applied_names(tokens) | verify.APPLIED)


def pieces(node: Node) -> list[str]:
    """Signs, numbers and names, in no order: 1 + x and x + 1 have the same."""
    return sorted(re.findall(r"[^\s(),]+", show(node)))


def has_operation(node: Node) -> bool:
    return any(part[0] in ("+", "*", "^", "call") for part in walk(node))


def is_whole(node: Node) -> bool:
    """Are all numbers of a reference whole?"""
    if any(part[0] in ("*", "+", "^", "%") for part in walk(node)):
        return False
    return all(Fraction(part[1]).denominator == 1 for part in walk(node) if part[0] == "num")


def shows_numbers(node: Node, whole: bool) -> bool:
    """Is this nothing but numbers: one, several, or a chain with one at either side?"""
    match node:
        case ("num" | "base", *_):
            return True
        case ("chain", signs, *members):
            equal = set(signs.split()) <= {"=", "≈"}
            return equal and any(shows_numbers(member, whole) for member in members)
        case ("unit" | "%", inner, *_):
            return shows_numbers(inner, whole)
        case ("list" | "or" | ":", *members) | ("tuple", _, *members):
            return all(shows_numbers(member, whole) for member in members)
        case ("call", "apply", _, *coordinates):  # the point A(1, 2)
            return all(shows_numbers(member, whole) for member in coordinates)
        case ("*", first, inner) if first == MINUS_ONE:
            return shows_numbers(inner, whole)
        case ("^", ("num", "10"), ("num", _)):  # powers of ten, with a factor or without
            return True
        case ("*", ("num", _), ("^", ("num", "10"), ("num", power))) if power != "-1":
            return True
        case ("*", ("^", ("num", "10"), ("num", power)), ("num", _)) if power != "-1":
            return True
        case ("*", ("num", _), ("num", scale)):  # 5 million
            return re.fullmatch("1(000)+|1e[0-9]+", scale) is not None
        case ("*", ("num", _), ("^", ("num", _), power)):
            return power == MINUS_ONE and not whole
        case ("+", ("num", _), ("*", ("num", _), ("^", ("num", _), power))):
            return power == MINUS_ONE and not whole
    return False


def formulas(question: str, reference: str) -> tuple[str, ...]:
    """The formulas of a question that equal the reference, as they show in a tree.

    Without what opens and closes a sum or product: so they are found in a longer one, too.
    """
    nodes = filter(has_operation, equal_to(question, reference))
    return tuple(re.sub(r"^[+*]\(", "", show(node).rstrip(")")) for node in nodes)


def equations(question: str, reference: str) -> list[str]:
    """What the question itself says to be the reference: a + b + c of a + b + c = 0."""
    found = []
    for node in equal_to(question, reference):
        if node[0] == "chain":
            sides = [side for side in node[2:] if maths.names(side) and has_operation(side)]
            found += map(show, sides)
    return found


@lru_cache(maxsize=4096)
def equal_to(question: str, reference: str) -> tuple[Node, ...]:
    """The formulas of a question that verify.py finds equal to the reference."""
    found = []
    for groups in re.findall(FORMULA, question, re.DOTALL):
        formula = "".join(groups).strip(" .,?!\n")
        boxed = f"\\boxed{{{formula}}}"
        if not verify.decide(boxed, reference, SECONDS, lenient=False, tolerance=0.0).correct:
            continue
        try:
            found.append(tree(formula))
        except ParseError:
            continue
    return tuple(found)
