r"""Are two expressions equal, is one a multiple of the other, are two sets of reals the same?

Where residues decide, they decide (`values.Residues`). Else the two are compared at points, to as
many digits as their sizes ask for. That is no proof, so the points are laid where a difference may
hide: on both sides of every kink of |x| or a floor, at it, and beyond all numbers that occur. It
finds forms that a rewriting system misses.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable
from fractions import Fraction

from maths import MINUS_ONE, Node, fixed, minus, names, over, substitute, walk
from values import DIGITS, Budget, Numbers, Residues, Undecided, Undefined

# Intervals that names take their values from, point by point; the later ones serve expressions
# without a value there.
RANGES = [
    (0, 1),
    (1, 4),
    (-3, 0),
    (-1, 1),
    (20, 5000),
    (-5000, -3),
    (4, 20),
    (-20, -3),
    (0, 3),
    (-9, 9),
    (0, 2),
    (0, 1),
]
ENOUGH, FEWEST = 6, 3  # points where two expressions agree; the fewest that will do
KINKS = {
    "cases",
    "abs",
    "floor",
    "ceil",
    "root",
    "max",
    "min",
    "sign",
    "asin",
    "acos",
    "atan",
    "acot",
}
WHOLE = {
    "factorial",
    "fac2",
    "binomial",
}  # names in these, and in the bounds of sums, are whole numbers
ZERO, ONE = ("num", "0"), ("num", "1")
SET_DIGITS = 150  # of the ends of sets, which are compared to half of them
CLOSE = 1e-9  # a gap that no rounding makes, where nothing is large
TRUTHS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "!=": (-1, 1), "=": (0,)}


def draw(*key) -> Fraction:
    """A number in (0, 1) that depends on the key alone: verdicts do not change from run to run."""
    return Fraction(int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16) % 9_973 + 1, 9_974)


def is_rational(node: Node) -> bool:
    """A quotient of polynomials; their coefficients may be any numbers."""
    if not names(node):
        return True
    if node[0] == "^":
        whole = node[2][0] == "num" and Fraction(node[2][1]).denominator == 1
        return whole and is_rational(node[1])
    return node[0] == "name" or (node[0] in ("+", "*") and all(map(is_rational, node[1:])))


def coefficients(node: Node, name: str) -> list[Node] | None:
    """Of a polynomial of one name up to the second degree, lowest first; None of anything else."""
    if ("name", name) not in walk(node):
        return [node]
    match node:
        case ("name", _):
            return [ZERO, ONE]
        case ("+", *terms):
            found = [coefficients(term, name) for term in terms]
            if None in found:
                return None
            return [("+", *column) for column in itertools.zip_longest(*found, fillvalue=ZERO)]
        case ("*", *factors):
            product: list[Node] | None = [ONE]
            for factor in factors:
                product = convolved(product, coefficients(factor, name))
            return product
        case ("^", base, ("num", "2")):
            return convolved(coefficients(base, name), coefficients(base, name))
    return None


def convolved(left: list[Node] | None, right: list[Node] | None) -> list[Node] | None:
    """The coefficients of a product, up to the second degree."""
    if left is None or right is None or len(left) + len(right) > 4:
        return None
    columns: list[list[Node]] = [[ZERO] for _ in range(len(left) + len(right) - 1)]
    for j, a in enumerate(left):
        for k, b in enumerate(right):
            columns[j + k].append(("*", a, b))
    return [("+", *column) for column in columns]


class Equality:
    """Of trees, within one budget.

    `ask`: puts a question to sympy, or raises Undecided (see verify.py).
    """

    def __init__(self, budget: Budget, ask: Callable[..., list[Node]]):
        self.numbers = Numbers(budget)
        self.residues = Residues(budget, self.numbers)
        self.mp, self.ask = self.numbers.mp, ask

    # ------------------------------------------------------------------------------------ expressio

    def same(self, a: Node, b: Node) -> bool:
        """Are the two equal wherever they are defined?"""
        if a == b:
            return True
        try:
            return self.same_residues(a, b)
        except Undecided:
            return self.same_at_points(a, b)

    def same_residues(self, a: Node, b: Node) -> bool:
        for point in (1, 2) if names(a, b) else (1,):
            self.residues.point = point
            if self.residues.value(a) != self.residues.value(b):
                return False
        return True

    def same_at_points(self, a: Node, b: Node) -> bool:
        """At all points where both have a real value (or, where there are none, a complex one)."""
        constant = not names(a, b)
        imaginary = ("name", "i") in (*walk(a), *walk(b))
        for real in (False,) if constant or imaginary else (True, False):
            agreed = 0
            for number, point in enumerate(self.points(a, b)):
                if agreed >= ENOUGH and number < len(RANGES):
                    continue
                try:
                    if not self.agree(a, b, point, real):
                        return False
                    agreed += 1
                except Undefined:
                    continue
                except Undecided:
                    if constant:
                        return False
            if agreed >= (1 if constant else FEWEST):
                return True
        return False

    def agree(self, a: Node, b: Node, point: dict, real: bool) -> bool:
        """Have the two the same value at a point? Exactly if rational, else up to rounding.

        Equal numbers differ by rounding, which shrinks as digits are added; the gap of others
        stays. sqrt(2) sqrt(3) and sqrt(6) are 10^-60 apart at 60 digits and 10^-120 at 120, while
        10^-70 and 0 are 10^-70 apart at both.
        """
        at = functools.partial(self.numbers.at, point=point, real=real)
        x, sizes = at(a, digits=30), self.numbers.sizes
        y, sizes = at(b, digits=30), max(sizes, self.numbers.sizes)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        x, y = self.mp.convert(x), self.mp.convert(y)
        if not (self.mp.isfinite(x) and self.mp.isfinite(y)):
            return x == y
        if sizes < 40 and abs(x - y) > CLOSE:
            return False  # most wrong answers end here
        digits = DIGITS + int(0.61 * sizes)  # twice the sizes, as decimal digits
        shrink = self.mp.mpf(10) ** (-digits // 2)
        first, _ = self.gap(at, a, b, digits)
        second, size = self.gap(at, a, b, 2 * digits)
        return second <= max(first, size * shrink * shrink) * shrink

    def gap(self, at: Callable, a: Node, b: Node, digits: int) -> tuple:
        """How far the two are apart, at so many digits, and how large they are."""
        x, y = self.mp.convert(at(a, digits=digits)), self.mp.convert(at(b, digits=digits))
        return abs(x - y), max(abs(x), abs(y))

    def points(self, a: Node, b: Node) -> list[dict[str, Fraction]]:
        """Values for the names, in RANGES.

        Where there may be kinks also at, between and beyond them.
        """
        parts, free = [*walk(a), *walk(b)], sorted(names(a, b))
        if not free:
            return [{}]
        ranges = list(RANGES)
        kinked = [part for part in parts if (part[1] if part[0] == "call" else part[0]) in KINKS]
        if kinked:
            marks = {Fraction(0), Fraction(2), Fraction(-2)}
            for part in parts:
                if part[0] == "num":
                    marks |= {Fraction(part[1]), -Fraction(part[1])}
            for part in kinked:
                marks |= {kink for inner in walk(part) for kink in self.kinks(inner)}
            marks = sorted(marks)[:40]
            ranges += [*itertools.pairwise(marks), *((mark, mark) for mark in marks)]
            ranges += [(10 * marks[0] - 10, marks[0]), (marks[-1], 10 * marks[-1] + 10)]
        whole = self.whole_names(parts)
        points = []
        for k, (low, high) in enumerate(ranges):
            real = {name: low + (high - low) * draw(name, k) for name in free}
            points.append(real | {name: Fraction(2 + int(20 * draw(name, k))) for name in whole})
        return points

    def whole_names(self, parts: list[Node]) -> set[str]:
        found = set()
        for part in parts:
            if part[0] == "call" and part[1] in WHOLE:
                found |= names(*part[2:])
            elif part[0] == "call" and part[1] in ("sum", "prod"):
                found |= names(*part[3:5])
        return found

    def kinks(self, node: Node) -> list[Fraction]:
        """Where the insides of |x - 3| are zero, or the sides of the condition x < 3 meet."""
        inside = (
            [child for child in node[2:] if isinstance(child, tuple)] if node[0] == "call" else []
        )
        if node[0] == "chain" and len(node) == 4:
            inside = [minus(node[2], node[3])]
        found = []
        for inner in inside:
            if len(names(inner)) == 1:
                roots = self.real(self.low_roots(inner, *names(inner)) or [])
                found += [Fraction(int(self.mp.nint(root * 10**30)), 10**30) for root in roots]
        return found

    def proportional(self, a: Node, b: Node, signed: bool) -> bool:
        """Is one a constant multiple of the other, and a positive one where a sign matters (of a <
        b)?
        """
        if not names(a) or not names(b):
            return False
        for point in self.points(a, b):
            first, second = fixed(a, point), fixed(b, point)
            try:
                x, y = self.numbers.at(first), self.numbers.at(second)
            except (Undefined, Undecided):
                continue
            if x == 0 or y == 0:
                continue
            ratio = self.mp.mpc(self.mp.convert(x) / self.mp.convert(y))
            if signed and not (ratio.imag == 0 and ratio.real > 0):
                return False
            return self.same(("*", a, second), ("*", b, first))
        return False

    # ------------------------------------------------------------------------------------ roots

    def low_roots(self, node: Node, name: str) -> list[Node] | None:
        """The roots of a polynomial of the first or second degree; None for anything else."""
        found = coefficients(node, name)
        if found is None:
            return None
        c, b, a = (self.plain(part) for part in (*found, ZERO, ZERO)[:3])
        if self.same(a, ZERO):
            constant = self.same(b, ZERO)
            return [] if constant else [("*", MINUS_ONE, over(c, b))]
        square = self.plain(minus(("*", b, b), ("*", ("num", "4"), a, c)))
        root = ("call", "root", square, ("num", "2"))
        below = ("*", ("num", "2"), a)
        return [
            over(("+", ("*", MINUS_ONE, b), ("*", sign, root)), below) for sign in (MINUS_ONE, ONE)
        ]

    def plain(self, node: Node) -> Node:
        """A number as it is written shortest, where it is rational."""
        try:
            return ("num", str(self.numbers.exact(node)))
        except Undecided:
            return node

    def roots(self, node: Node, name: str) -> list[Node] | None:
        """All roots of a polynomial of one name, sympy's help included; None for anything else."""
        if not is_rational(node):
            return None
        low = self.low_roots(node, name)
        return self.ask("solutions", node, name) if low is None else low

    def real(self, numbers: list[Node]) -> list:
        values = [self.mp.convert(self.numbers.at(number, digits=SET_DIGITS)) for number in numbers]
        return [value for value in values if not isinstance(value, self.mp.mpc)]

    def zeros(self, node: Node, name: str) -> list:
        """Reals where the sign of an expression of one name may change, and perhaps others."""
        named = [child for child in node[1:] if isinstance(child, tuple) and names(child)]
        for part in walk(node):
            if part[:2] == ("call", "abs") and names(part):  # |u| is u or -u
                inner = part[2]
                either = [
                    substitute(node, part, inner),
                    substitute(node, part, ("*", MINUS_ONE, inner)),
                ]
                return [x for choice in (*either, inner) for x in self.zeros(choice, name)]
        if node[0] == "*" or (node[0] == "^" and node[2][0] == "num"):
            return [x for child in named for x in self.zeros(child, name)]
        if node[0] == "+" and len(node) == 3 and node[2] in (("num", "0"), ("num", "-0")):
            return self.zeros(node[1], name)
        low = self.low_roots(node, name)
        if low is not None:
            return self.real(low)
        if not is_rational(node):
            raise Undefined("a condition that is not rational")
        return self.real(self.ask("zeros", node, name))

    # ------------------------------------------------------------------------------------ sets of r

    def same_set(self, gold: Node, answer: Node) -> bool:
        """The same members among.

        Every end, both its sides, a point between any two, and far away.
        """
        if max(len(names(gold)), len(names(answer))) > 1:
            return False
        ends = self.ends(gold) + self.ends(answer)
        if any(isinstance(x, self.mp.mpc) for x in ends):
            raise Undefined("complex numbers have no order")
        ends = sorted({x for x in ends if abs(x) != self.mp.inf})
        if len(ends) > 40:
            return False
        points = [x + step for x in ends for step in (0, self.mp.mpf("1e-9"), -self.mp.mpf("1e-9"))]
        points += [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        points += [self.mp.mpf(0), *(x for end in ends[:1] + ends[-1:] for x in (end - 9, end + 9))]
        return all(self.contains(gold, x) == self.contains(answer, x) for x in points)

    def ends(self, node: Node | str) -> list:
        """The reals at which membership of a set can change, and perhaps more.

        Undefined if they are not found.
        """
        if isinstance(node, str) or (node[0] == "name" and node != ("name", "infty")):
            return []
        if node[0] == "chain" and node[1] != "∈":
            found = []
            for a, b in itertools.pairwise(node[2:]):
                for name in names(a, b):
                    found += self.zeros(minus(a, b), name)
            return found
        if names(node) or node[0] in ("tuple", "list", "or", "chain", "∪", "∩", "∖"):
            return [x for child in node[1:] for x in self.ends(child)]
        return [self.mp.convert(self.numbers.at(node, digits=SET_DIGITS))]

    def order(self, a, b) -> int:
        """-1, 0 or 1 for a < b, a = b (up to rounding), a > b."""
        self.mp.dps = SET_DIGITS
        a, b = self.mp.convert(a), self.mp.convert(b)
        if isinstance(a, self.mp.mpc) or isinstance(b, self.mp.mpc):
            raise Undefined("complex numbers have no order")
        finite = self.mp.isfinite(a) and self.mp.isfinite(b)
        near = finite and abs(a - b) <= max(abs(a), abs(b), 1) * self.mp.mpf(10) ** (
            -SET_DIGITS // 2
        )
        return 0 if near or a == b else 1 if a > b else -1

    def contains(self, node: Node, x) -> bool:
        match node:
            case ("tuple", brackets, low, high) if brackets != ";":
                above = self.order(x, self.numbers.at(low, digits=SET_DIGITS))
                below = self.order(self.numbers.at(high, digits=SET_DIGITS), x)
                return above >= (brackets[0] != "[") and below >= (brackets[1] != "]")
            case ("∪" | "or", *parts):
                return any(self.contains(part, x) for part in parts)
            case ("list", *parts) if any(part[0] != "chain" or part[1] == "=" for part in parts):
                return any(self.contains(part, x) for part in parts)  # 1, 2; or n = 1, n >= 3
            case ("∩" | "list", *parts):
                return all(self.contains(part, x) for part in parts)
            case ("∖", whole, part):
                return self.contains(whole, x) and not self.contains(part, x)
            case ("name", "ℝ"):
                return True
            case ("name", "emptyset"):
                return False
            case ("chain", "∈", _, inner):
                return self.contains(inner, x)
            case ("chain", signs, *parts) if set(signs.split()) <= set(TRUTHS):
                point = dict.fromkeys(names(node), x)
                values = [self.numbers.at(part, point, True, SET_DIGITS) for part in parts]
                orders = [self.order(a, b) for a, b in itertools.pairwise(values)]
                return all(order in TRUTHS[sign] for sign, order in zip(signs.split(), orders))
        if names(node) or node[0] in ("tuple", "text", "matrix", "chain"):
            raise Undefined("not a set of reals")
        return self.order(self.numbers.at(node, digits=SET_DIGITS), x) == 0
