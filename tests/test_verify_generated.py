r"""A test of verify.py that cannot be fitted: its questions are made anew in every run.

From random trees, from every reference of the problem sets, and from random relations it makes

- rewritings: another way to write the same answer. 99 % of them must pass;
- near misses: answers that are wrong by a digit, a sign, a name, a bracket. None of them may pass.

An oracle that shares nothing with the checker decides about trees: exact fractions, however huge,
or 900 digits at several points. References and relations are changed in ways whose effect is known.

A failure lists `reference ## answer` and names its seed: NANOT1_SEED=123 makes the same questions.
"""

import itertools
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import mpmath
import pytest

import cli
from verify import is_correct, reference_answer

SEED = int(os.environ.get("NANOT1_SEED") or random.SystemRandom().randrange(10**9))
TREES, RELATIONS = 1000, 500  # questions of each kind; every reference gives two of each kind
BAR = 0.99  # of the rewritings

Tree = tuple  # ("op", child, ...); leaves: ("int", 5), ("dec", "0.5"), ("name", "x"), ("pi",), ...
Pair = tuple[str, str]  # the reference, the answer
Rule = Callable  # (rng, what) -> what it becomes, or None where the rule does not apply


def equal(gold: str, answer: str) -> bool:
    return is_correct(rf"\boxed{{{answer}}}", gold)


# ------------------------------------------------------------------------------- the oracle

mp = mpmath.mp.clone()
mp.dps = 900
MOST_BITS, MOST_TERMS = 80_000, 60  # of an exact number, of a sum
SEEN = mp.mpf("1e-400")  # a relative difference that counts
NOISE = mp.mpf("1e-850")  # what rounding may make of a number near 1
NOTHING = mp.mpf("1e-700")  # no tree here is as small, unless it is 0

REAL = ["x", "y", "z", "a", "b", "c", "x_1", "x_2", r"\alpha", r"\theta"]
WHOLE = ["n", "k"]  # stand in factorials, binomials and bounds: n is the larger one
FUNCTIONS = {"sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "ln": mp.log, "exp": mp.exp}

Point = dict[str, Fraction]


class NoValue(Exception):
    """No value here, or none that the oracle wants to compute."""


def digits_of(x):
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def alike(*values):
    """The values as they are if all are exact, else all as 900 digits."""
    exact = all(isinstance(x, Fraction) for x in values)
    return values if exact else tuple(map(digits_of, values))


class Oracle:
    """The value of a tree at a point: a Fraction while all is rational, then 900 digits.

    `log2`: of the largest value on the way; it says how large a rounding error may have become.
    """

    def __init__(self, point: Point):
        self.point, self.log2 = point, 1

    def value(self, tree: Tree):
        x = self.compute(tree)
        if isinstance(x, Fraction):
            above, below = x.numerator.bit_length(), x.denominator.bit_length()
            if max(above, below) > MOST_BITS:
                raise NoValue("too large")
            self.log2 = max(self.log2, above - below + 1)
        elif not mp.isfinite(x):
            raise NoValue("not finite")
        elif x:
            self.log2 = max(self.log2, mp.mag(x))
        return x

    def real(self, tree: Tree):
        x = self.value(tree)
        if isinstance(x, mp.mpc):
            raise NoValue("not real")
        return x

    def whole(self, tree: Tree, most: int = 10**4) -> int:
        x = self.real(tree)
        if x != int(x) or not 0 <= x <= most:
            raise NoValue("not a number to count with")
        return int(x)

    def compute(self, tree: Tree):
        match tree:
            case ("int" | "dec", number):
                return Fraction(number)
            case ("name", name):
                return self.point[name]
            case ("pi",):
                return +mp.pi
            case ("e",):
                return +mp.e
            case ("i",):
                return mp.mpc(0, 1)
            case ("sum", low, high, body):
                return self.added(self.whole(low), self.whole(high), body)
            case ("!", inner):
                return Fraction(math.factorial(self.whole(inner, 3000)))
            case ("binom", above, below):
                return self.binomial(self.whole(above, 5000), self.whole(below))
            case ("fn", name, inner):
                return self.function(name, digits_of(self.real(inner)))
            case ("log", *parts):
                below, above = (digits_of(self.real(part)) for part in parts)
                return self.quotient(self.function("ln", above), self.function("ln", below))
            case ("root", degree, inner):
                return self.root(self.real(inner), self.whole(degree))
            case ("floor", inner):
                return self.floor(self.real(inner))
            case ("ceil", inner):
                return -self.floor(-self.real(inner))
            case ("max" | "min" as name, *parts):
                return {"max": max, "min": min}[name](alike(*map(self.real, parts)))
        return self.arithmetic(tree[0], alike(*map(self.value, tree[1:])))

    def arithmetic(self, op: str, values: tuple):
        match op:
            case "+":
                return sum(values[1:], values[0])
            case "*":
                return math.prod(values[1:], start=values[0])
            case "-":
                return -values[0]
            case "abs":
                return abs(values[0])
            case "/":
                return self.quotient(*values)
        return self.power(*values)

    def quotient(self, above, below):
        if below == 0:
            raise NoValue("1/0")
        return above / below

    def power(self, base, exponent):
        if isinstance(exponent, mp.mpc) or abs(exponent) > 10_000:
            raise NoValue("too large, or not real")
        if base == 0 and exponent <= 0:
            raise NoValue("0^0")
        if exponent == int(exponent):
            return base ** int(exponent)
        if isinstance(base, mp.mpc) or base < 0:
            raise NoValue("not real")
        return mp.power(digits_of(base), digits_of(exponent))

    def root(self, x, degree: int):
        if x < 0 and degree % 2 == 0:
            raise NoValue("not real")
        size = mp.root(abs(digits_of(x)), degree)
        return -size if x < 0 else size

    def floor(self, x) -> Fraction:
        if not isinstance(x, Fraction) and abs(x - mp.nint(x)) < 1e-9:
            raise NoValue("too near to a whole number")
        return Fraction(math.floor(x))

    def function(self, name: str, x):
        if name == "ln" and x <= 0:
            raise NoValue("not real")
        if name == "exp" and abs(x) > 100:
            raise NoValue("too large")
        return FUNCTIONS[name](x)

    def binomial(self, above: int, below: int) -> Fraction:
        if below > above:
            raise NoValue("outside of Pascal's triangle")
        return Fraction(math.comb(above, below))

    def added(self, low: int, high: int, body: Tree):
        if not 0 <= high - low <= MOST_TERMS:
            raise NoValue("too many terms, or none")
        before, terms = self.point, []
        for j in range(low, high + 1):
            self.point = before | {"j": Fraction(j)}
            terms.append(self.value(body))
        self.point = before
        return self.arithmetic("+", alike(*terms))


def points(rng: random.Random) -> list[Point]:
    """Values for the names: at two points all are positive, then of any sign, then large ones."""
    found, any_sign = [], (1, -1)
    sizes = [((1,), 1), ((1,), 1), (any_sign, 1), (any_sign, 1), (any_sign, 999), (any_sign, 10**9)]
    for signs, size in sizes:
        draw = [Fraction(rng.randint(90, 5000) * size, 997) * rng.choice(signs) for _ in REAL]
        whole = {"k": Fraction(rng.randint(3, 9)), "n": Fraction(rng.randint(20, 40))}
        found.append(dict(zip(REAL, draw)) | whole)
    return found


def agree_at(point: Point, left: Tree, right: Tree) -> bool | None:
    """Are the two equal here? None where one has no value, or where rounding hides the answer."""
    oracle = Oracle(point)
    try:
        x, y = alike(oracle.value(left), oracle.value(right))
    except (NoValue, KeyError):
        return None
    if isinstance(x, Fraction):
        return x == y
    size, noise = max(abs(x), abs(y)), mp.ldexp(NOISE, 2 * oracle.log2)
    if size <= noise < NOTHING:
        return True  # both are 0
    if noise >= size * SEEN:
        return None
    return abs(x - y) <= size * SEEN


def are_equal(rng: random.Random, left: Tree, right: Tree) -> bool | None:
    """The oracle's verdict; None if it does not know."""
    verdicts = [agree_at(point, left, right) for point in points(rng)]
    if False in verdicts:
        return False
    return True if verdicts.count(True) >= 2 else None


def test_oracle():
    """Guards against an oracle that calls near misses equal, or knows nothing."""
    rng, x, one, two = random.Random(0), ("name", "x"), ("int", 1), ("int", 2)
    huge = ("^", two, ("int", 2024))
    assert are_equal(rng, ("+", huge, one), huge) is False
    assert are_equal(rng, ("!", ("int", 2024)), ("*", ("int", 2024), ("!", ("int", 2023)))) is True
    squares = [("^", ("fn", name, x), two) for name in ("sin", "cos")]
    assert are_equal(rng, ("+", *squares), one) is True
    assert are_equal(rng, ("root", two, ("^", x, two)), x) is False
    assert are_equal(rng, ("root", two, ("^", x, two)), ("abs", x)) is True
    assert are_equal(rng, ("+", ("pi",), ("^", ("int", 10), ("-", ("int", 300)))), ("pi",)) is False
    assert are_equal(rng, ("^", ("i",), two), ("-", one)) is True
    thirds = ("/", ("root", two, ("int", 18)), ("int", 3))
    assert are_equal(rng, ("+", thirds, ("-", ("root", two, two))), ("int", 0)) is True
    assert are_equal(rng, ("fn", "ln", ("int", 0)), one) is None


# ------------------------------------------------------------------------------- a tree as LaTeX

SUM, SLASH, PRODUCT, FACTOR, ATOM = range(5)  # how tightly the text of a tree binds


class Printer:
    """A tree as LaTeX. With a random source every spelling is drawn, without one the usual."""

    def __init__(self, rng: random.Random | None = None):
        self.rng = rng
        self.ascii = rng is not None and rng.random() < 0.15  # 2*x^(n+1), sqrt(2)/2

    def one_of(self, usual: str, *others: str) -> str:
        if self.rng is None or self.rng.random() < 0.4:
            return usual
        return self.rng.choice([usual, *others])

    def rarely(self) -> bool:
        return self.rng is not None and self.rng.random() < 0.02

    def text(self, tree: Tree) -> str:
        return self.printed(tree)[0]

    def printed(self, tree: Tree) -> tuple[str, int]:
        """The text, and how tightly it binds."""
        match tree:
            case ("int", number):
                return str(number), ATOM
            case ("dec", digits):
                return self.one_of(digits, digits + "0", digits.removeprefix("0")), ATOM
            case ("name", name):
                return self.name(name), ATOM
            case ("pi",):
                return "pi" if self.ascii else self.one_of(r"\pi", "π"), ATOM
            case ("e" | "i" as constant,):
                return constant, ATOM
            case ("+", *terms):
                return self.sum(terms), SUM
            case ("-", inner):
                return self.negative(inner), SUM
            case ("*", *factors):
                return self.product(factors), PRODUCT
            case ("/", above, below):
                return self.fraction(above, below)
            case ("^", base, exponent):
                return self.power(base, exponent), FACTOR
            case ("!", inner):
                return self.at_least(ATOM, inner) + "!", FACTOR
            case ("binom", above, below):
                return self.binomial(self.text(above), self.text(below)), ATOM
            case ("root", degree, inner):
                return self.root(degree, self.text(inner)), FACTOR
            case ("fn", name, inner):
                return self.applied(name if self.ascii else self.one_of(rf"\{name}", name), inner)
            case ("log", base, inner):
                return self.applied(rf"\log_{self.script(base)}", inner)
            case ("sum", low, high, body):
                return self.big_sum(self.text(low), self.text(high), self.at_least(PRODUCT, body))
            case ("max" | "min" as name, left, right):
                return rf"\{name}({self.text(left)}, {self.text(right)})", ATOM
        return self.barred(tree[0], self.text(tree[1])), ATOM

    def name(self, name: str) -> str:
        if self.ascii:
            return name.removeprefix("\\")
        return self.one_of(name, re.sub("_(.)", r"_{\1}", name))

    def at_least(self, level: int, tree: Tree) -> str:
        """In brackets, unless it binds tightly enough."""
        text, found = self.printed(tree)
        return text if found >= level else self.bracket(text)

    def bracket(self, text: str) -> str:
        if self.ascii:
            return f"({text})"
        forms = [rf"\left({text}\right)", rf"\left( {text} \right)", rf"\bigl({text}\bigr)"]
        return self.one_of(f"({text})", *forms, rf"\left[{text}\right]")

    def script(self, tree: Tree) -> str:
        """What stands behind ^ and _: the braces may be missing around one character."""
        text = self.text(tree)
        if len(text) == 1 and text.isascii():
            return self.one_of(f"{{{text}}}", text)
        return f"({text})" if self.ascii else f"{{{text}}}"

    def sum(self, terms: list[Tree]) -> str:
        text, gap = "", self.one_of(" ", "")
        for term in terms:
            sign, inner = ("-", term[1]) if term[0] == "-" else ("+", term)
            piece = self.at_least(SLASH, inner)
            if not text:
                text = piece if sign == "+" else f"-{piece}"
                continue
            if sign == "-" and self.one_of("usual", "bracket") == "bracket":
                sign, piece = "+", f"(-{piece})"
            text += f"{gap}{sign}{gap}{piece}"
        return text

    def negative(self, inner: Tree) -> str:
        if inner[0] == "-":
            return self.one_of(f"-({self.text(inner)})", f"-{self.text(inner)}")
        return f"-{self.at_least(SLASH, inner)}"

    def product(self, factors: list[Tree]) -> str:
        texts = [self.at_least(FACTOR, factor) for factor in factors]
        whole = texts[0]
        for k in range(1, len(texts)):
            sign = self.times(factors[k - 1], factors[k], texts[k - 1], texts[k])
            whole += sign + texts[k]
        return whole

    def times(self, left: Tree, right: Tree, before: str, after: str) -> str:
        r"""A sign; or none, where only a product can be meant: not 3 \frac12, not x(2), not 2 3."""
        if self.ascii:
            return self.one_of("*", " * ")
        sign = self.one_of(r" \cdot ", r" \times ", r"\cdot ", "*", "·", "×")
        if after[0] in "0123456789.":
            clear = left[0] == "+"
        elif left[0] in ("int", "dec"):
            clear = right[0] not in ("/", "max", "min") and after[0] != "e"  # 1e+2 is 100
        elif after.startswith(("(", r"\left(", r"\left[", r"\bigl(")):
            clear = right[0] == "+" and left[0] not in ("fn", "log", "abs", "max", "min")
        else:
            clear = not {left[0], right[0]} & {"fn", "log", "abs", "max", "min"}
        if not clear:
            return sign
        letters = before[-1].isalpha() and after[0].isalpha()
        short = len(before) == len(after) == 1 and {before, after} <= set("abcxyz")
        return self.one_of(sign, " ", " " if letters and not short else "", r"\, ")

    def fraction(self, above: Tree, below: Tree) -> tuple[str, int]:
        top, bottom = self.text(above), self.text(below)
        form = "slash" if self.ascii else self.one_of("frac", "dfrac", "tfrac", "slash", "short")
        if form == "slash":
            sign = "/" if self.ascii else self.one_of("/", r" \div ", " / ")
            return self.at_least(FACTOR, above) + sign + self.at_least(FACTOR, below), SLASH
        if self.rarely():
            return rf"{{{top} \over {bottom}}}", FACTOR
        if form == "short" and above[0] == below[0] == "int" and 0 < below[1] < above[1]:
            whole, rest = divmod(above[1], below[1])
            return rf"{whole}\frac{{{rest}}}{{{bottom}}}", SUM
        if form == "short" and len(top) == len(bottom) == 1 and (top + bottom).isdigit():
            return rf"\frac{top}{bottom}", FACTOR
        return rf"\{'frac' if form == 'short' else form}{{{top}}}{{{bottom}}}", FACTOR

    def power(self, base: Tree, exponent: Tree) -> str:
        short = base[:2] in (("fn", "sin"), ("fn", "cos"), ("fn", "tan")) and exponent[0] == "int"
        if short and self.one_of("usual", "short") == "short":
            return rf"\{base[1]}^{self.script(exponent)}{self.bracket(self.text(base[2]))}"
        sign = self.one_of("^", "**") if self.ascii else "^"
        return f"{self.at_least(ATOM, base)}{sign}{self.script(exponent)}"

    def binomial(self, above: str, below: str) -> str:
        if self.rarely():
            return rf"{{{above} \choose {below}}}"
        name = self.one_of("binom", "dbinom", "tbinom")
        return rf"\{name}{{{above}}}{{{below}}}"

    def root(self, degree: Tree, text: str) -> str:
        if degree != ("int", 2):
            return rf"\sqrt[{self.text(degree)}]{{{text}}}"
        digit = len(text) == 1 and text.isdigit()
        forms = [rf"\sqrt{{{text}}}", f"sqrt({text})"]
        if self.ascii:
            return forms[1]
        return self.one_of(*forms, *([rf"\sqrt{text}", f"√{text}"] if digit else []))

    def applied(self, function: str, inner: Tree) -> tuple[str, int]:
        r"""\sin(x); or \sin x, which wants a bracket around it in a product."""
        text = self.text(inner)
        if inner[0] in ("name", "pi") and function[0] == "\\" and self.one_of("(", " ") == " ":
            return f"{function} {text}", SLASH
        return function + self.bracket(text), FACTOR

    def big_sum(self, low: str, high: str, body: str) -> tuple[str, int]:
        sign = self.one_of(r"\sum", r"\sum\limits", r"\displaystyle\sum")
        upper = self.one_of(f"{{{high}}}", high if len(high) == 1 else f"{{{high}}}")
        return rf"{sign}_{{j={low}}}^{upper} {body}", SUM

    def barred(self, kind: str, text: str) -> str:
        bars = {"abs": "||", "floor": (r"\lfloor ", r"\rfloor"), "ceil": (r"\lceil ", r"\rceil")}
        left, right = bars[kind]
        forms = [rf"\left{left}{text}\right{right}", f"{left}{text}{right}"]
        return forms[0] if "|" in text else self.one_of(*forms)


def dressed(rng: random.Random, text: str, label: str | None) -> str:
    """What people put around an answer: a font, a name, dollars, a full stop."""
    form = rng.choice(["", "", "", "font", "label", "dollars", "period", "display"])
    if form == "font":
        return rf"\{rng.choice(['mathbf', 'boldsymbol', 'bm'])}{{{text}}}"
    if form == "label" and label:
        return f"{label}{rng.choice([' = ', '='])}{text}"
    if form == "display":
        return rf"\displaystyle {text}"
    return {"dollars": f"${text}$", "period": f"{text}."}.get(form, text)


# ------------------------------------------------------------------------------- trees

KINDS = ["rational", "huge", "real", "named", "whole", "complex", "kinked"]
IMAGINARY, ONE, TWO, TEN, PI = ("i",), ("int", 1), ("int", 2), ("int", 10), ("pi",)


def integer(n: int) -> Tree:
    return ("int", n) if n >= 0 else ("-", ("int", -n))


def less(left: Tree, right: Tree = ONE) -> Tree:
    return ("+", left, ("-", right))


def decimal(x: Fraction) -> Tree | None:
    """0.375 for 3/8; None if there is no short one."""
    for places in range(1, 7):
        scaled = x * 10**places
        if scaled.denominator == 1 and x > 0:
            digits = f"{scaled.numerator:0{places + 1}d}"
            return ("dec", f"{digits[:-places]}.{digits[-places:]}")
    return None


def small(rng: random.Random) -> Tree:
    """A number to start from."""
    form = rng.randrange(8)
    if form == 0:
        return ("/", ("int", rng.randint(1, 30)), ("int", rng.randint(2, 30)))
    if form == 1:
        return decimal(Fraction(rng.randint(1, 999), 10 ** rng.randint(1, 3)))
    return ("int", rng.randint(1, 12) if form < 6 else rng.randint(13, 5000))


def huge(rng: random.Random) -> Tree:
    """A number that no float and no 60 digits tell from its neighbour."""
    match rng.randrange(4):
        case 0:
            return ("^", ("int", rng.randint(2, 12)), ("int", rng.randint(100, 2500)))
        case 1:
            return ("!", ("int", rng.randint(25, 1500)))
        case 2:
            above = rng.randint(60, 2000)
            return ("binom", ("int", above), ("int", rng.randint(5, above // 2)))
    return ("int", rng.randrange(10 ** rng.randint(17, 60)))


def leaf(rng: random.Random, kind: str) -> Tree:
    if kind == "huge" and rng.random() < 0.4:
        return huge(rng)
    if kind == "complex" and rng.random() < 0.5:
        return rng.choice([IMAGINARY, ("*", ("int", rng.randint(2, 20)), IMAGINARY)])
    if kind == "real" and rng.random() < 0.5:
        root = ("root", ("int", rng.choice([2, 2, 3, 4])), ("int", rng.randint(2, 60)))
        return rng.choice([root, root, PI, ("e",)])
    if kind in ("named", "kinked") and rng.random() < 0.7:
        return ("name", rng.choice(REAL))
    if kind == "whole" and rng.random() < 0.7:
        n, k, base = ("name", "n"), ("name", "k"), integer(rng.choice([-1, 2, 3, 5]))
        return rng.choice([n, k, ("!", n), ("binom", n, k), ("^", base, n)])
    return small(rng)


def grown(rng: random.Random, depth: int, kind: str) -> Tree:
    """A random tree."""
    if depth == 0:
        return leaf(rng, kind)
    left, right = grown(rng, depth - 1, kind), grown(rng, rng.randrange(depth), kind)
    match rng.randrange(11):
        case 0 | 1:
            return ("+", left, right)
        case 2:
            return ("+", left, right, leaf(rng, kind))
        case 3:
            return less(left, right)
        case 4 | 5:
            return ("*", left, right)
        case 6:
            return ("/", left, right)
        case 7:
            return ("^", left, integer(rng.choice([2, 2, 3, 4, 5, -1, -2])))
        case 8:
            return ("-", left)
    return special(rng, kind, left)


def special(rng: random.Random, kind: str, left: Tree) -> Tree:
    """What only some kinds of trees have."""
    inner, above, degree = leaf(rng, kind), rng.randint(4, 30), ("int", rng.choice([2, 2, 3, 5]))
    angle = ("*", ("/", ("int", rng.randint(1, 9)), ("int", rng.randint(2, 9))), PI)
    if kind == "kinked":
        shape = rng.choice(["abs", "floor", "ceil", "max", "min"])
        far = ("^", TEN, ("int", rng.randint(3, 9)))
        other = rng.choice([small(rng), small(rng), far])
        if shape in ("max", "min"):
            return (shape, left, other)
        return (shape, rng.choice([left, less(left, other)]))
    if kind in ("real", "named"):
        name = ("name", rng.choice(REAL)) if kind == "named" else ("int", rng.randint(1, 9))
        forms = [
            ("fn", rng.choice(["sin", "cos", "tan"]), rng.choice([angle, inner])),
            ("fn", rng.choice(["ln", "exp"]), name),
            ("^", ("e",), name),
            ("log", ("int", rng.randint(2, 10)), inner),
            ("root", degree, ("+", inner, small(rng))),
            ("+", ("root", degree, inner), ("root", degree, small(rng))),
        ]
        return rng.choice(forms)
    if kind == "whole":
        return ("sum", ("int", rng.randint(0, 2)), ("name", "n"), body(rng))
    forms = [
        ("!", ("int", rng.randint(2, 12))),
        ("binom", ("int", above), ("int", rng.randint(1, above - 1))),
        ("sum", ("int", rng.randint(0, 2)), ("int", rng.randint(3, 12)), body(rng)),
    ]
    return rng.choice(forms)


def body(rng: random.Random) -> Tree:
    """What a sum adds up."""
    j = ("name", "j")
    power = ("^", j, ("int", rng.randint(2, 4)))
    return rng.choice([j, power, ("^", ("int", rng.randint(2, 4)), j), ("+", power, small(rng))])


def spots(tree: Tree, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The paths to all that a rule may replace: not a root's degree, nor a logarithm's base."""
    yield path
    for k in range(2 if tree[0] in ("root", "log") else 1, len(tree)):
        if isinstance(tree[k], tuple):
            yield from spots(tree[k], (*path, k))


def replaced(tree: Tree, path: tuple[int, ...], rule: Callable[[Tree], Tree | None]) -> Tree | None:
    """The tree with the rule applied at the end of the path; None if it does not apply there."""
    if not path:
        return rule(tree)
    k = path[0]
    child = replaced(tree[k], path[1:], rule)
    return None if child is None else (*tree[:k], child, *tree[k + 1 :])


def changed(rng: random.Random, tree: Tree, rules: list[Rule]) -> Tree | None:
    """One rule, applied once, somewhere."""
    for _ in range(60):
        rule, path = rng.choice(rules), rng.choice(list(spots(tree)))
        found = replaced(tree, path, lambda part, rule=rule: rule(rng, part))
        if found is not None and found != tree:
            return found
    return None


def with_name(tree: Tree, name: str, value: Tree) -> Tree:
    """The tree with a value in the name's place."""
    if tree == ("name", name):
        return value
    return tuple(with_name(part, name, value) if isinstance(part, tuple) else part for part in tree)


def names_of(tree: Tree) -> set[str]:
    return {name for name in [*REAL, *WHOLE] if with_name(tree, name, ONE) != tree}


# ------------------------------------------------------------------------------- equal trees


def regroup(rng, tree):
    """a + b as b + a; (a + b) + c, a + (b + c) and a + b + c."""
    op, parts = tree[0], tree[1:]
    if op not in ("+", "*"):
        return None
    if rng.random() < 0.5:
        return (op, *rng.sample(parts, len(parts)))
    if len(parts) > 2:
        return rng.choice([(op, (op, *parts[:2]), *parts[2:]), (op, parts[0], (op, *parts[1:]))])
    flat = [part[1:] if part[0] == op else (part,) for part in parts]
    return (op, *itertools.chain(*flat))


def distribute(rng, tree):
    """a (b + c) as a b + a c, (a + b)^2 as a^2 + 2 a b + b^2, a^2 - b^2 as (a - b)(a + b)."""
    match tree:
        case ("*", factor, ("+", *terms)) | ("*", ("+", *terms), factor):
            return ("+", *(("*", factor, term) for term in terms))
        case ("^", ("+", a, b), ("int", 2)):
            return ("+", ("^", a, TWO), ("*", TWO, a, b), ("^", b, TWO))
        case ("+", ("^", a, ("int", 2)), ("-", ("^", b, ("int", 2)))):
            return ("*", less(a, b), ("+", a, b))
    return None


def common_denominator(rng, tree):
    """a/b + c/d as (a d + c b)/(b d)."""
    if tree[0] != "+" or len(tree) != 3 or "/" not in (tree[1][0], tree[2][0]):
        return None
    (a, b), (c, d) = [part[1:] if part[0] == "/" else (part, ONE) for part in tree[1:]]
    return ("/", ("+", ("*", a, d), ("*", c, b)), ("*", b, d))


def neutral(rng, tree):
    """t as k t / k, t + k - k, t + 0, 1 t, -(-t)."""
    k, large = ("int", rng.randint(2, 9)), ("int", rng.randrange(10 ** rng.choice([2, 20])))
    forms = [("/", ("*", k, tree), k), ("+", tree, large, ("-", large)), ("+", tree, ("int", 0))]
    forms += [("*", ONE, tree), ("-", ("-", tree))]
    if tree[0] == "/":
        forms += [("/", ("*", k, tree[1]), ("*", k, tree[2]))] * 3
    return rng.choice(forms)


def powers(rng, tree):
    """a^n as a a^{n-1}, (ab)^n as a^n b^n, (a^m)^n as a^{mn}, 1/a as a^-1."""
    match tree:
        case ("^", ("*" | "/" as op, *parts), ("int", _) | ("-", ("int", _)) as n):
            return (op, *(("^", part, n) for part in parts))
        case ("^", ("^", a, ("int", m)), ("int", n)):
            return ("^", a, ("int", m * n))
        case ("^", a, ("int", n)) if n > 1:
            k = rng.randrange(1, min(n, 9))
            first = a if k == 1 else ("^", a, ("int", k))
            return ("*", first, ("^", a, ("int", n - k)))
        case ("/", a, b):
            return ("*", a, ("^", b, integer(-1)))
    return None


def roots(rng, tree):
    """sqrt(m) as m^{1/2}, or sqrt(k^2 m) / k; sqrt(a) + sqrt(b) as one root; 1/sqrt(m)."""
    k = rng.randint(2, 7)
    match tree:
        case ("root", ("int", n), m) if rng.random() < 0.5:
            return ("^", m, ("/", ONE, ("int", n)))
        case ("root", ("int", n) as degree, m) if n < 5:
            return ("/", ("root", degree, ("*", ("int", k**n), m)), ("int", k))
        case ("+", ("root", ("int", 2), a), ("root", ("int", 2), b)):
            return ("root", TWO, ("+", a, b, ("*", TWO, ("root", TWO, ("*", a, b)))))
        case ("/", a, ("root", ("int", 2), m) as root):
            return ("/", ("*", a, root), m)
    return None


def counting(rng, tree):
    """n! as n (n-1)!; Pascal's rule, symmetry and factorials of binomials; a sum's last term."""
    match tree:
        case ("!", n):
            short = n[0] == "int" and rng.random() < 0.7
            return ("*", n, ("!", integer(n[1] - 1) if short else less(n)))
        case ("binom", n, k):
            factorials = ("/", ("!", n), ("*", ("!", k), ("!", less(n, k))))
            pascal = ("+", ("binom", less(n), less(k)), ("binom", less(n), k))
            return rng.choice([pascal, ("binom", n, less(n, k)), factorials])
        case ("sum", low, ("int" | "name", _) as high, inner):
            return ("+", ("sum", low, less(high), inner), with_name(inner, "j", high))
    return None


def signs(rng, tree):
    """a - b as -(b - a), a b as (-a)(-b)."""
    match tree:
        case ("+", a, ("-", b)):
            return ("-", less(b, a))
        case ("*", a, b, *others):
            return ("*", ("-", a), ("-", b), *others)
    return None


def numerals(rng, tree):
    """3/8 as 0.375 and back, 7 as 2 + 5."""
    match tree:
        case ("dec", digits):
            x = Fraction(digits)
            return ("/", ("int", x.numerator), ("int", x.denominator))
        case ("/", ("int", above), ("int", below)) if below:
            return decimal(Fraction(above, below))
        case ("int", n):
            part = rng.randint(1, 50)
            return ("+", integer(n - part), ("int", part))
    return None


def functions(rng, tree):
    """The identities of school for sines, logarithms, absolute values and the like."""
    match tree:
        case ("fn", "tan", x):
            return ("/", ("fn", "sin", x), ("fn", "cos", x))
        case ("fn", "sin", x):
            half = ("/", x, TWO)
            twice = ("*", TWO, ("fn", "sin", half), ("fn", "cos", half))
            return rng.choice([twice, ("fn", "cos", less(("/", PI, TWO), x))])
        case ("fn", "cos", x):
            return less(ONE, ("*", TWO, ("^", ("fn", "sin", ("/", x, TWO)), TWO)))
        case ("fn", "exp", x):
            return ("^", ("e",), x)
        case ("fn", "ln", x):
            k = ("int", rng.randint(2, 9))
            return less(("fn", "ln", ("*", k, x)), ("fn", "ln", k))
        case ("log", base, x):
            return ("/", ("fn", "ln", x), ("fn", "ln", base))
        case ("abs", x):
            root = ("root", TWO, ("^", x, TWO))
            return rng.choice([("abs", ("-", x)), root, ("max", x, ("-", x))])
        case ("floor", x):
            return rng.choice([("-", ("ceil", ("-", x))), less(("floor", ("+", x, TWO)), TWO)])
        case ("max", x, y):
            half = ("/", ("+", x, y, ("abs", less(x, y))), TWO)
            return rng.choice([half, ("-", ("min", ("-", x), ("-", y)))])
    return None


REWRITINGS = [regroup, distribute, common_denominator, neutral, powers, roots, counting, signs]
REWRITINGS += [numerals, functions]


# ------------------------------------------------------------------------------- other trees


def another_digit(rng: random.Random, digits: str) -> str:
    k = rng.choice([k for k, character in enumerate(digits) if character.isdecimal()])
    choice = rng.choice([digit for digit in "123456789" if digit != digits[k]])
    return digits[:k] + choice + digits[k + 1 :]


def wrong_number(rng, tree):
    """One digit is another one, or all are one more."""
    match tree:
        case ("int", n):
            forms = [int(another_digit(rng, str(n))), n + 1, n - 1]
            return integer(rng.choice(forms))
        case ("dec", digits):
            return ("dec", another_digit(rng, digits))
    return None


def wrong_sign(rng, tree):
    match tree:
        case ("-", x):
            return x
        case ("+", a, ("+", b, c)):
            return ("+", a, b, ("-", c))
        case ("^", ("-", a), n):
            return ("-", ("^", a, n))
    return ("-", tree)


def wrong_exponent(rng, tree):
    match tree:
        case ("^", a, n):
            off_by_one = ("^", a, ("+", n, integer(rng.choice([1, -1]))))
            return rng.choice([off_by_one, off_by_one, ("*", a, n), ("^", n, a)])
        case ("root", ("int", n), x):
            return ("root", ("int", n + 1), x)
        case ("log", ("int", n), x):
            return ("log", ("int", n + 1), x)
    return None


def dropped(rng, tree):
    """One factor or term less: 2^{2024} for 2^{2024} + 1."""
    if tree[0] not in ("+", "*"):
        return None
    kept = list(tree[1:])
    kept.pop(rng.randrange(len(kept)))
    return kept[0] if len(kept) == 1 else (tree[0], *kept)


def wrong_count(rng, tree):
    """(n-1)! for n!, a sum from 1 instead of 0, a binomial of n - 1."""
    if tree[0] == "!":
        return ("!", less(tree[1]))
    if tree[0] not in ("sum", "binom"):
        return None
    k = rng.choice([1, 2])
    return (*tree[:k], ("+", tree[k], integer(rng.choice([1, -1]))), *tree[k + 1 :])


def tiny_more(rng, tree):
    """t + 10^-100, t (1 + 10^-100)."""
    tiny = ("^", TEN, integer(-rng.choice([5, 20, 70, 100, 300])))
    return rng.choice([("+", tree, tiny), ("*", tree, ("+", ONE, tiny))])


def wrong_name(rng, tree):
    """x for y, x_1 for x_2, n for k."""
    if tree[0] != "name" or tree[1] == "j":
        return None
    return ("name", rng.choice(WHOLE if tree[1] in WHOLE else REAL))


def wrong_function(rng, tree):
    match tree:
        case ("fn", "sin" | "cos" | "tan", x):
            return ("fn", rng.choice(["sin", "cos", "tan"]), x)
        case ("max" | "min", x, y):
            return rng.choice([("min", x, y), ("max", x, y), x, y])
        case ("abs" | "floor" | "ceil", x):
            return rng.choice([x, ("floor", x), ("ceil", x), ("abs", x), ("-", x)])
    return None


def freshman(rng, tree):
    """(a + b)^2 as a^2 + b^2, 1/(a + b) as 1/a + 1/b, a - (b - c) as a - b - c, a/b as b/a."""
    match tree:
        case ("^", ("+", *terms), n):
            return ("+", *(("^", term, n) for term in terms))
        case ("root", n, ("+", *terms)):
            return ("+", *(("root", n, term) for term in terms))
        case ("fn", name, ("+", *terms)):
            return ("+", *(("fn", name, term) for term in terms))
        case ("/", a, ("+", *terms)) if rng.random() < 0.5:
            return ("+", *(("/", a, term) for term in terms))
        case ("/", a, ("/", b, c)) | ("/", ("/", a, b), c) if rng.random() < 0.5:
            return rng.choice([("/", ("/", a, b), c), ("/", a, ("/", b, c))])
        case ("/", a, b):
            return ("/", b, a)
        case ("+", a, ("-", ("+", b, *others))):
            return ("+", a, ("-", b), *others)
    return None


def rounded(rng, tree):
    """3.14159 for pi, or what a computer prints for it, with a wrong digit: another number."""
    try:
        x = digits_of(Oracle({}).real(tree))
    except (NoValue, KeyError):
        return None
    if not 1e-3 < x < 10**5:
        return None
    places = rng.choice([2, 4, 9, 16])
    text = mp.nstr(mp.floor(x * 10**places) / 10**places, places + 6, strip_zeros=False)
    text = text[: text.index(".") + places + 1]
    return ("dec", another_digit(rng, text[:-3]) + text[-3:] if places == 16 else text)


def swapped_names(rng, tree):
    names = sorted(names_of(tree) & set(REAL))
    if len(names) < 2:
        return None
    one, other = rng.sample(names, 2)
    moved = with_name(tree, one, ("name", "moved"))
    return with_name(with_name(moved, other, ("name", one)), "moved", ("name", other))


NEAR_MISSES = [wrong_number, wrong_sign, wrong_exponent, dropped, wrong_count, tiny_more]
NEAR_MISSES += [wrong_name, wrong_function, freshman, rounded, swapped_names]


def tree_pair(rng: random.Random, same: bool) -> Pair | None:
    """A tree as a reference, and an answer; None if the oracle does not vouch for the two."""
    kind = rng.choice(KINDS)
    gold = grown(rng, rng.choice([0, 1, 1, 2, 2, 3]), kind)
    if kind == "huge" and rng.random() < 0.3:
        gold = ("+", huge(rng), gold)
    answer = gold if same else changed(rng, gold, NEAR_MISSES)
    for _ in range(rng.randint(1, 3) if same else rng.randrange(3)):
        answer = answer and changed(rng, answer, REWRITINGS)
    if answer is None:
        return None
    if rng.random() < 0.1:
        gold, answer = ("int", 0), less(gold, answer)
    if are_equal(rng, gold, answer) is not same:
        return None
    reference = Printer(rng.choice([None, rng])).text(gold)
    free = sorted({"S", "N", "y"} - names_of(gold) - names_of(answer))
    label = None if gold[0] == "name" else rng.choice(free)
    text = dressed(rng, Printer(rng).text(answer), label)
    return (reference, text) if max(len(reference), len(text)) < 500 else None


# ------------------------------------------------------------------------------- references

FIRST = r"-?[0-9]{1,3}"
GROUPED = re.compile(rf"-?[0-9]+|{FIRST}(?:,[0-9]{{3}})+|{FIRST}(?:,\\!\s?[0-9]{{3}})+")
BASED = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")
BRACKETED = re.compile(r"((?:\\left)?\s*[(\[])(.*?)((?:\\right)?\s*[)\]])")
UNITS = {  # how a reference ends: other ways to write its unit, and other units
    r"\mbox{ cm}^2": (r"\text{ cm}^2 ## \text{ square centimeters}", r"\text{ cm} ## \text{ m}^2"),
    r"\mbox{ inches}^2": (r"\text{ in}^2 ## \text{ square inches}", r"\text{ in} ## \text{ ft}^2"),
    r"\text{ cents}": (r"\text{ cent} ## \mbox{ cents}", r"\text{ dollars} ## \text{ euros}"),
    r"\text{ degrees}": (r"^\circ ## ^{\circ} ## °", r"\text{ radians} ## \text{ minutes}"),
    r"^\circ": (r"^{\circ} ## \text{ degrees} ## °", r"\text{ cm} ## \text{ hours} ## \%"),
}
WORDS = ["even", "odd", "east", "west", "ellipse", "parabola", "Evelyn", "Navin", "Briana"]


def references(shared: Path) -> list[str]:
    found = []
    for file in sorted((shared / "data").glob("*.jsonl")):
        for row in cli.read_jsonl(file):
            found.append(reference_answer(row["answer"] if "answer" in row else row["correct"]))
    return list(dict.fromkeys(found))


def kind_of(gold: str) -> str:
    """It decides which changes are known to keep a reference, and which to spoil it."""
    tests = {
        "integer": GROUPED.fullmatch(gold),
        "choice": re.fullmatch(r"\(?[A-E]\)?|\\text\{\(?[A-E]\)?\}", gold),
        "word": re.fullmatch(r"\\text\{[A-Za-z]+\}|[A-Za-z]{3,}", gold),
        "matrix": r"\begin" in gold,
        "interval": re.search(r"\\cup|\\infty|\[.*,|,.*\]", gold),
        "equation": "=" in gold,
        "dollars": gold.startswith(r"\$"),
        "unit": any(gold.endswith(unit) for unit in UNITS),
        "base": BASED.fullmatch(gold),
        "tuple": re.fullmatch(r"(?:\\left)?\s*\(.*,.*\)", gold),
        "pm": r"\pm" in gold and "," not in gold,
        "list": "," in gold and r"\pm" not in gold,
        "set": gold.startswith(r"\{"),
    }
    return next((kind for kind, found in tests.items() if found), "value")


def plain(gold: str) -> str:
    """Without the separators of thousands, which a bracket would turn into a tuple."""
    return re.sub(r",(?:\\!)?\s*", "", gold) if GROUPED.fullmatch(gold) else gold


def letter_of(gold: str) -> str:
    return re.search("[A-E]", gold.replace(r"\text", ""))[0]


def word_of(gold: str) -> str:
    return re.sub(r"\\text\{|\}", "", gold)


def title_of(gold: str) -> str:
    return word_of(gold).title()


def amount_of(gold: str) -> str:
    return gold.removeprefix(r"\$")


def members(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text.removeprefix(r"\{").removesuffix(r"\}"):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def opened(gold: str) -> tuple[str, list[str], str]:
    """Opening bracket, members and closing bracket."""
    opening, inside, closing = BRACKETED.fullmatch(gold).groups()
    return opening, members(inside), closing


def template(forms: str, part: Callable[[str], str] = plain) -> Rule:
    """A rule that puts (a part of) the reference in the place of R, in one of several texts."""
    return lambda rng, gold: rng.choice(forms.split(" ## ")).replace("R", part(gold))


# ---- rewritings of references: (rng, gold) -> an equal answer


def with_blanks(rng, gold):
    wide = gold if r"\text" in gold else re.sub(r"(?<=[\w})\]])([-+=])", r" \1 ", gold)
    return rng.choice([f" {wide} ", rf"\,{wide}\,", f"{wide}~", wide])


def with_dfrac(rng, gold):
    return re.sub(r"\\[dt]?frac", rf"\\{rng.choice(['dfrac', 'frac', 'tfrac'])}", gold)


def with_left_right(rng, gold):
    if r"\left" in gold:
        return re.sub(r"\\(?:left|right)\s*", "", gold)
    return re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))


def with_label(rng, gold):
    letter = next(letter for letter in rng.sample("xyzSNMTP", 8) if letter not in gold)
    return f"{letter} = {gold}"


def with_unit(rng, gold):
    """Only to a bare number."""
    has_names = re.search(r"[a-z]", re.sub(r"\\[a-z]+", "", gold))
    units = "units ## dollars ## cm ## people ## hours ## square units ## km/h ## marbles ## kg"
    return None if has_names else rf"{gold}\text{{ {rng.choice(units.split(' ## '))}}}"


def with_thousands(rng, gold):
    if len(plain(gold).lstrip("-")) < 4:
        return None
    return f"{int(plain(gold)):,}".replace(",", rng.choice([",", "{,}", r",\!", r"\,"]))


def matrix_spelled(rng, gold):
    gold = re.sub(r"([0-9]+)/([0-9]+)", r"\\frac{\1}{\2}", gold)
    gold = gold.replace("pmatrix", rng.choice(["bmatrix", "pmatrix"]))
    return gold.replace(" ", rng.choice([" ", "  "]))


def sides_changed(rng, gold):
    """Swapped; or both doubled, where that is not x = 5."""
    left, right = (side.strip() for side in gold.split("="))
    solved = left.isalpha() and not re.search("[a-z]", right)
    doubled = f"2({left}) = 2({right})"
    return f"{right} = {left}" if solved or rng.random() < 0.5 else doubled


def union_turned(rng, gold):
    turned = r" \cup ".join(reversed(re.split(r"\s*\\cup\s*", gold)))
    return rng.choice([turned, turned if r"\in " in gold else rf"x \in {turned}"])


def unit_spelled(rng, gold):
    unit = next(unit for unit in UNITS if gold.endswith(unit))
    return gold.removesuffix(unit) + rng.choice([*UNITS[unit][0].split(" ## "), ""])


def base_spelled(rng, gold):
    digits, base = BASED.fullmatch(gold).groups()
    return rng.choice([f"{digits}_{{{base}}}", f"({digits})_{{{base}}}", f"{digits}_{base}"])


def tuple_spelled(rng, gold):
    inside = opened(gold)[1]
    forms = [f"({','.join(inside)})", rf"\left( {' , '.join(inside)} \right)"]
    if len(inside) <= 3 and not re.search("[a-z]", gold):
        forms.append(f"({','.join('xyz'[: len(inside)])}) = {gold}")
    return rng.choice(forms)


def list_spelled(rng, gold):
    shuffled = rng.sample(members(gold), len(members(gold)))
    joined = rng.choice([", ", ","]).join(shuffled)
    forms = [joined, rf"\{{{joined}\}}", rf"\left\{{{joined}\right\}}", f"x = {joined}"]
    return rng.choice([*forms, rf"{', '.join(shuffled[:-1])} \text{{ and }} {shuffled[-1]}"])


def both_signs(rng, gold):
    two = [gold.replace(r"\pm", "+"), gold.replace(r"\pm", "-")]
    return ", ".join(rng.sample(two, 2))


ANY = [with_blanks, with_dfrac, with_left_right]
ANY += [template(r"R. ## $R$ ## $R$. ## \boldsymbol{R} ## \bm{R} ## \mathbf{R}", str)]
NUMBER = [with_label, with_unit, template(r"R+0 ## (R) \cdot 1 ## 1 \cdot \left(R\right)")]
NUMBER += [template(r"\frac{2(R)}{2} ## \frac{2 \cdot (R)}{2} ## (R)/1 ## -(-(R)) ## (R) - 7 + 7")]
LETTER = r"R ## (R) ## R) ## \text{R} ## \text{(R)} ## \textbf{(R)} ## \mathrm{R} ## \mathbf{(R)}"
WORD = r"R ## \text{R} ## \textbf{R} ## \text{ R } ## \text{R}. ## \mathrm{R} ## \text{the R}"
KEEPING = {
    "integer": [with_thousands, template("R.0 ## R ## R.00"), *NUMBER],
    "value": NUMBER,
    "choice": [template(LETTER, letter_of)],
    "word": [template(WORD, word_of), template(r"R ## \text{R}", title_of)],
    "matrix": [matrix_spelled],
    "interval": [union_turned],
    "equation": [sides_changed],
    "dollars": [template(r"R ## R \text{ dollars} ## x = R", amount_of)],
    "unit": [unit_spelled],
    "base": [base_spelled],
    "tuple": [tuple_spelled],
    "list": [list_spelled],
    "pm": [both_signs],
    "set": [list_spelled],
}


# ---- near misses of references: (rng, gold) -> an answer that must be wrong


def digit_changed(rng, gold):
    return another_digit(rng, gold) if re.search("[0-9]", gold) else None


def scaled(rng, gold):
    """-R and 10 R, where R is not 0."""
    if gold == "0":
        return None
    times_ten = f"{plain(gold)}0" if GROUPED.fullmatch(gold) else rf"10 \cdot ({gold})"
    forms = template(r"-(R) ## -(R) ## \frac{R}{2} ## 2R" if plain(gold).isdigit() else "-(R)")
    return rng.choice([times_ten, forms(rng, gold)])


def other_meaning(rng, gold):
    """5 as 5%, as 5!."""
    if gold in ("0", "1", "2") or gold.startswith("-"):
        return None
    return template(r"R\% ## R! ## \sqrt{R} ## R^2")(rng, gold)


def next_letter(rng, gold):
    letter = letter_of(gold)
    other = chr(ord(letter) + 1) if letter < "E" else "D"
    alone = [other, f"({other})", rf"\text{{({other})}}"]
    hedges = [f"{letter} or {other}", f"{letter}, {other}", rf"\text{{not }} {letter}"]
    return rng.choice([*alone, *hedges])


def another_word(rng, gold):
    word, other = word_of(gold), rng.choice([word for word in WORDS if word != word_of(gold)])
    hedges = [rf"\text{{not {word}}}", rf"\text{{{word} or {other}}}", f"{word}, {other}"]
    return rng.choice([other, rf"\text{{{other}}}", *hedges])


def column_turned(rng, gold):
    begin, inside, end = re.fullmatch(r"(\\begin\{pmatrix\})(.*)(\\end\{pmatrix\})", gold).groups()
    rows = [row.strip() for row in inside.split(r"\\")]
    return begin + r" \\ ".join(rows[::-1]) + end if rows != rows[::-1] else None


def bracket_flipped(rng, gold):
    """At an end of an interval that is not infinite: closed for open, open for closed."""
    finite = re.compile(r"[(\[](?!\s*-?\\infty)|(?<!\\infty)[)\]]")
    k = rng.choice([found.start() for found in finite.finditer(gold)])
    return gold[:k] + gold[k].translate(str.maketrans("([)]", "[(])")) + gold[k + 1 :]


def union_dropped(rng, gold):
    parts = re.split(r"\s*\\cup\s*", gold)
    return rng.choice(parts) if len(parts) > 1 else None


def unit_changed(rng, gold):
    unit = next(unit for unit in UNITS if gold.endswith(unit))
    return gold.removesuffix(unit) + rng.choice(UNITS[unit][1].split(" ## "))


def base_changed(rng, gold):
    digits, base = BASED.fullmatch(gold).groups()
    return f"{digits}_{{{int(base) + rng.choice([1, 2])}}}"


def tuple_spoiled(rng, gold):
    """Two members swapped, one off by one, one missing, one more."""
    before, inside, after = opened(gold)
    k = rng.randrange(len(inside) - 1)
    pair = inside[k : k + 2]
    forms = [pair[::-1], [pair[0], f"{pair[1]}+1"], [f"{pair[0]}-1", pair[1]], [*pair, "0"]]
    forms += [pair[:1]] if len(inside) > 2 else []
    inside[k : k + 2] = rng.choice(forms)
    return before + ", ".join(inside) + after if inside != opened(gold)[1] else None


def list_spoiled(rng, gold):
    """A member missing, or one too many."""
    fewer = members(gold)
    fewer.pop(rng.randrange(len(fewer)))
    more = [*members(gold), str(rng.randint(100, 999))]
    return ", ".join(rng.choice([fewer, rng.sample(more, len(more))]))


HEDGES = r"R, R+1 ## R \text{ or } R-1 ## \text{not } R ## R \text{ is wrong} ## x \neq R"
CALCULATED = [digit_changed, scaled, template(HEDGES)]
CALCULATED += [template(r"R+1 ## R-1 ## R+10^{-9} ## R+10^{-30} ## R-10^{-200}")]
SPOILING = {
    "integer": [*CALCULATED, other_meaning],
    "value": CALCULATED,
    "choice": [next_letter],
    "word": [another_word],
    "matrix": [digit_changed, column_turned, template("2R ## -R ## R+R", str)],
    "interval": [digit_changed, bracket_flipped, union_dropped],
    "equation": [digit_changed, template("R + 1 ## R - 1 ## 1 + R", str)],
    "dollars": [digit_changed, template(r"R \text{ cents} ## R \text{ kg} ## €R", amount_of)],
    "unit": [digit_changed, unit_changed],
    "base": [digit_changed, base_changed],
    "tuple": [digit_changed, tuple_spoiled],
    "list": [digit_changed, list_spoiled],
    "pm": [digit_changed, lambda rng, gold: gold.replace(r"\pm", rng.choice("+-"))],
    "set": [digit_changed, list_spoiled],
}


def reference_pairs(rng: random.Random, golds: list[str], same: bool) -> list[Pair]:
    """Two answers to every reference."""
    found = []
    for gold in golds:
        kind = kind_of(gold)
        rules = [*ANY, *KEEPING[kind], *KEEPING[kind]] if same else SPOILING[kind]
        answers = [rule(rng, gold) for rule in rng.sample(rules, len(rules))]
        answers = [answer for answer in answers if answer not in (None, gold)]
        found += [(gold, answer) for answer in answers[:2]]
    return found


# ------------------------------------------------------------------------------- relations


def number(rng: random.Random) -> Fraction:
    return Fraction(rng.randint(-60, 60), rng.choice([1, 1, 1, 2, 3, 4, 10]))


def spelled(rng: random.Random, x: Fraction, shift: str = "") -> str:
    r"""-3/4 in one of its forms; -3/4 + \pi."""
    size, above, below = abs(x), abs(x).numerator, x.denominator
    forms = [rf"\frac{{{above}}}{{{below}}}", rf"\dfrac{{{above}}}{{{below}}}", f"{above}/{below}"]
    if below == 1:
        forms = [str(above)]
    elif short := decimal(size):
        forms.append(short[1])
    text = ("-" if x < 0 else "") + rng.choice(forms)
    if not shift:
        return text
    return rng.choice([f"{text}+{shift}", f"{shift} + {text}" if x >= 0 else f"{shift}{text}"])


def term(x: Fraction, name: str) -> str:
    r"""+3x, -x, +\frac{1}{2}x: with its sign, always."""
    sign, size = "-" if x < 0 else "+", abs(x)
    if size == 1 and name:
        return sign + name
    fraction = rf"\frac{{{size.numerator}}}{{{size.denominator}}}"
    return f"{sign}{size if size.denominator == 1 else fraction}{name}"


def linear(rng: random.Random, parts: dict[str, Fraction]) -> str:
    """3x - 2y + 5, its terms in any order; the name of the last one is empty."""
    shown = [term(x, name) for name, x in parts.items() if x]
    return "".join(rng.sample(shown, len(shown))).removeprefix("+") or "0"


TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "="}


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends; None for an end that is infinite."""

    low: Fraction | None
    high: Fraction | None
    closed: tuple[bool, bool]
    shift: str = ""  # is added to both ends

    def brackets(self, rng: random.Random) -> str:
        low = r"-\infty" if self.low is None else spelled(rng, self.low, self.shift)
        high = r"\infty" if self.high is None else spelled(rng, self.high, self.shift)
        left, right = rng.choice([("", ""), ("", ""), (r"\left", r"\right")])
        return f"{left}{'(['[self.closed[0]]}{low}, {high}{right}{')]'[self.closed[1]]}"

    def inequality(self, rng: random.Random, solved: bool) -> str:
        """a < x <= b, 3b >= 3x > 3a, -x < a; or one that is still to be solved, x + 1 > b."""
        k = Fraction(rng.choice([1, -1] if solved else [1, 1, 2, -1, -3]))
        c = Fraction(rng.choice([0, 0, 1, -5]))
        k, c = (Fraction(1), Fraction(0)) if self.shift else (k, c * (not solved))
        signs = [r"\le" if closed else "<" for closed in self.closed]
        signs = signs if k > 0 else [TURNED[sign] for sign in signs]
        texts = [linear(rng, {"x": k, "": c})]
        if self.low is not None:
            texts = [spelled(rng, k * self.low + c, self.shift), signs[0], *texts]
        if self.high is not None:
            texts += [signs[1], spelled(rng, k * self.high + c, self.shift)]
        if rng.random() < 0.5:
            texts = [TURNED.get(text, text) for text in texts[::-1]]
        return " ".join(texts)

    def distance(self, rng: random.Random) -> str:
        """|x - 3| < 2."""
        centre, radius = (self.low + self.high) / 2, (self.high - self.low) / 2
        sign = r"\le" if self.closed[0] else "<"
        return f"|{linear(rng, {'x': Fraction(1), '': -centre})}| {sign} {spelled(rng, radius)}"

    def text(self, rng: random.Random, solved: bool) -> str:
        """In any form; `solved`: not in one that may be the question itself."""
        forms = [self.brackets, lambda rng: self.inequality(rng, solved)] * 2
        forms.append(lambda rng: rf"x \in {self.brackets(rng)}")
        finite = self.low is not None and self.high is not None
        if finite and self.closed[0] == self.closed[1] and not self.shift and not solved:
            forms.append(self.distance)
        return rng.choice(forms)(rng)

    def near_miss(self, rng: random.Random) -> "Interval":
        """A bracket flipped, or an end moved."""
        at_low = self.high is None or (self.low is not None and rng.random() < 0.5)
        left, right = self.closed
        if rng.random() < 0.5:
            return replace(self, closed=(not left, right) if at_low else (left, not right))
        step = Fraction(1, rng.choice([3, 10, 1000, 10**40]))
        if at_low:
            return replace(self, low=self.low - step)
        return replace(self, high=self.high + step)


def some_interval(rng: random.Random, above: Fraction, shift: str = "") -> Interval:
    low = above + rng.randint(2, 9)
    high = low + Fraction(rng.randint(1, 40), rng.choice([1, 2, 3]))
    return Interval(low, high, (rng.random() < 0.5, rng.random() < 0.5), shift)


def some_shift(rng: random.Random) -> str:
    """What is added to all members or ends of a set: they keep their order."""
    return rng.choices(["", r"\sqrt{2}", r"\pi", "2^{200}", "2^{2024}"], [60, 17, 17, 5, 1])[0]


def interval(rng: random.Random, same: bool) -> Pair:
    gold, left_out = some_interval(rng, number(rng), some_shift(rng)), rng.randrange(6)
    if left_out == 0:
        gold = replace(gold, low=None, closed=(False, gold.closed[1]))
    if left_out == 1:
        gold = replace(gold, high=None, closed=(gold.closed[0], False))
    answer = gold if same else gold.near_miss(rng)
    return gold.text(rng, solved=False), answer.text(rng, solved=True)


def restated(rng: random.Random, same: bool) -> Pair:
    """The question, which is no answer; the answer to it, if the reference is the question."""
    asked = some_interval(rng, number(rng))
    left, right = spelled(rng, 2 * asked.low + 7), spelled(rng, 2 * asked.high + 7)
    signs = [r"\le" if closed else "<" for closed in asked.closed]
    question = f"{left} {signs[0]} 2x+7 {signs[1]} {right}"
    answer = asked.text(rng, solved=True)
    return (question, answer) if same else (answer, question)


def union_text(rng: random.Random, parts: list[Interval], solved: bool) -> str:
    parts = rng.sample(parts, len(parts))
    if rng.random() < 0.6:
        return r" \cup ".join(part.brackets(rng) for part in parts)
    return r" \text{ or } ".join(part.inequality(rng, solved) for part in parts)


def union(rng: random.Random, same: bool) -> Pair:
    """Two or three intervals that do not touch."""
    parts = [some_interval(rng, number(rng), some_shift(rng))]
    for _ in range(rng.randint(1, 2)):
        parts.append(some_interval(rng, parts[-1].high, parts[0].shift))
    if rng.random() < 0.3:
        parts[0] = replace(parts[0], low=None, closed=(False, parts[0].closed[1]))
        parts[-1] = replace(parts[-1], high=None, closed=(parts[-1].closed[0], False))
    gold, k = union_text(rng, parts, False), rng.randrange(len(parts))
    if not same:
        parts[k : k + 1] = [] if rng.random() < 0.3 else [parts[k].near_miss(rng)]
    return gold, union_text(rng, parts, True)


def set_text(rng: random.Random, numbers: list[Fraction], shift: str) -> str:
    texts = [spelled(rng, x, shift) for x in rng.sample(numbers, len(numbers))]
    joined = ", ".join(texts)
    forms = [joined, rf"\{{{joined}\}}", rf"\left\{{ {joined} \right\}}", f"x = {joined}"]
    if len(texts) > 1:
        forms.append(rf"{', '.join(texts[:-1])} \text{{ and }} {texts[-1]}")
        forms.append(r" \text{ or } ".join(f"x = {text}" for text in texts))
    return rng.choice(forms)


def finite_set(rng: random.Random, same: bool) -> Pair:
    numbers = list(dict.fromkeys(number(rng) for _ in range(rng.randint(3, 5))))
    shift, k = some_shift(rng), rng.randrange(len(numbers))
    gold, (before, after) = set_text(rng, numbers, shift), (numbers[:k], numbers[k + 1 :])
    moved = numbers[k] + rng.choice([100, Fraction(1, 1000), Fraction(1, 10**40)])
    others = [[*numbers, Fraction(99)], [*before, moved, *after]]
    others += [[*before, *after]] if len(numbers) > 1 else []
    return gold, set_text(rng, numbers if same else rng.choice(others), shift)


def named_text(rng: random.Random, values: dict[str, Fraction]) -> str:
    """(1, 2), (x, y) = (1, 2), x = 1, y = 2: the plain tuple in the order of the alphabet."""
    order = rng.sample(sorted(values), len(values))
    equations = [f"{name} = {spelled(rng, values[name])}" for name in order]
    in_order = ", ".join(spelled(rng, values[name]) for name in sorted(values))
    turned = ", ".join(spelled(rng, values[name]) for name in order)
    forms = [f"({in_order})", ", ".join(equations), f"({', '.join(order)}) = ({turned})"]
    forms.append(r" \text{ and } ".join(equations))
    lines = r" \\ ".join(equations)
    return rng.choice([*forms, rf"\begin{{cases}} {lines} \end{{cases}}"])


def named_tuple(rng: random.Random, same: bool) -> Pair:
    names = rng.choice(["xy", "xyz", "ab", "mn"])
    values = {name: number(rng) for name in names}
    one, other = rng.sample(names, 2)
    wrong = {one: values[one] + rng.choice([1, -1, Fraction(1, 10**9)])}
    if values[one] != values[other] and rng.random() < 0.6:
        wrong = {one: values[other], other: values[one]}
    return named_text(rng, values), named_text(rng, values if same else values | wrong)


def equation_text(rng: random.Random, parts: dict[str, Fraction], sign: str, k: Fraction) -> str:
    """k times the relation `parts` < 0, its terms on either side; or solved for y."""
    moved = set(rng.sample(sorted(parts), rng.randrange(len(parts))))
    if "y" in parts and rng.random() < 0.3:
        moved, k = set(parts) - {"y"}, 1 / parts["y"]
    left = linear(rng, {name: k * x for name, x in parts.items() if name not in moved})
    right = linear(rng, {name: -k * x for name, x in parts.items() if name in moved})
    sign = sign if k > 0 else TURNED[sign]
    return rng.choice([f"{left} {sign} {right}", f"{right} {TURNED[sign]} {left}"])


def equation(rng: random.Random, same: bool) -> Pair:
    """Equations and inequalities of several names, and multiples of them."""
    names = rng.choice(["x y", "x y z", "x^2 y^2 x y", "x^2 x y", "x^2 xy y^2"]).split()
    parts = {name: Fraction(rng.choice([1, -1]) * rng.randint(2, 12)) for name in [*names, ""]}
    sign, k = rng.choice(["=", "=", "=", "<", r"\le"]), Fraction(rng.choice([1, 2, 3, -1, -2]))
    gold, k = equation_text(rng, parts, sign, Fraction(1)), k / rng.choice([1, 1, 2, 5])
    if same:
        return gold, equation_text(rng, parts, sign, k)
    if sign != "=" and rng.random() < 0.5:
        others = {"<": [r"\le", ">"], r"\le": ["<", r"\ge"]}[sign]
        return gold, equation_text(rng, parts, rng.choice(others), k)
    one, other = rng.sample(sorted(parts), 2)
    wrong = {one: parts[one] + rng.choice([1, -1])}
    if abs(parts[one]) != abs(parts[other]) and rng.random() < 0.3:
        wrong = {one: parts[other], other: parts[one]}
    return gold, equation_text(rng, parts | wrong, sign, k)


MAKERS = [interval, restated, union, finite_set, named_tuple, equation]


# ------------------------------------------------------------------------------- the tests


def collected(make: Callable[[], Pair | None], count: int) -> list[Pair]:
    found: list[Pair] = []
    while len(found) < count:
        pair = make()
        if pair and pair[0] != pair[1]:
            found.append(pair)
    return found


def made(request, source: str, same: bool) -> list[Pair]:
    """The questions of one test: the seed alone decides which."""
    rng = random.Random(f"{SEED} {source} {same}")
    if source == "references":
        return reference_pairs(rng, references(request.getfixturevalue("shared")), same)
    if source == "relations":
        return collected(lambda: rng.choice(MAKERS)(rng, same), RELATIONS)
    return collected(lambda: tree_pair(rng, same), TREES)


def report(failed: list[Pair], total: int) -> str:
    lines = "\n".join(" ## ".join(pair) for pair in failed[:40])
    return f"NANOT1_SEED={SEED}: {len(failed)} of {total}:\n{lines}"


SOURCES = ["trees", "references", "relations"]


@pytest.mark.parametrize("source", SOURCES)
def test_rewritings_pass(request, source):
    """Guards against right answers that earn nothing, in forms that no list of cases has."""
    pairs = made(request, source, True)
    missed = [pair for pair in pairs if not equal(*pair)]
    assert len(missed) <= (1 - BAR) * len(pairs), report(missed, len(pairs))


@pytest.mark.parametrize("source", SOURCES)
def test_near_misses_fail(request, source):
    """Guards against wrong answers that are rewarded: what RL would find first."""
    pairs = made(request, source, False)
    passed = [pair for pair in pairs if equal(*pair)]
    assert not passed, report(passed, len(pairs))
