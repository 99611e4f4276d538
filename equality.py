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
from values import DIGITS, OPAQUE, SALT, Budget, Numbers, Residues, Undecided, Undefined

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
_kinks = "abs floor ceil root max min sign asin acos atan acot"
KINKS = set(_kinks.split())
BRANCHES = {"abs", "max", "min", "floor", "ceil", "sign", "cases"}
# names in these, and in the bounds of sums, are whole numbers
WHOLE = {
    "factorial",
    "fac2",
    "binomial",
    "gcd",
    "lcm",
}
ZERO, ONE = ("num", "0"), ("num", "1")
MAX_BENDS = 24  # kinks that are looked at
SET_DIGITS = 150  # of the ends of sets, which are compared to half of them
CLOSE = 1e-9  # a gap that no rounding makes, where nothing is large
TRUTHS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "!=": (-1, 1), "=": (0,)}


def hash_of(*trees: Node) -> str:
    return hashlib.sha256(repr(trees).encode()).hexdigest()


def draw(*key) -> Fraction:
    """A number in (0, 1) that depends on the key alone: verdicts do not change from run to run.

    The two trees are in the key, so that no answer can be built to vanish at its own points.
    """
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
            root = coefficients(base, name)
            return convolved(root, root)
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


def kind(node: Node) -> str:
    """The function of a call, the operation of any other node."""
    return node[1] if node[0] == "call" else node[0]


def bending(node: Node) -> list[Node]:
    """What changes its sign where a node has a kink: x - 3 of |x - 3|, or of the case x < 3."""
    if node[0] == "chain":
        return [minus(left, right) for left, right in itertools.pairwise(node[2:])]
    if node[0] != "call" or node[1] not in KINKS:
        return []
    if node[1] in ("max", "min"):
        pairs = (
            itertools.combinations(node[2:], 2) if len(node) < 7 else itertools.pairwise(node[2:])
        )
        return [minus(left, right) for left, right in pairs]
    if node[1] in ("floor", "ceil"):  # at whole numbers
        return [node[2], minus(node[2], ("num", "5"))]
    return [node[2]]


def whole_names(parts: list[Node]) -> set[str]:
    """The names that only whole numbers make sense for: in factorials, and in bounds of sums."""
    found = set()
    for part in parts:
        if part[0] == "call" and part[1] in WHOLE:
            found |= names(*part[2:])
        elif part[0] == "call" and part[1] in ("sum", "prod"):
            found |= names(*part[3:5])
    return found


class Equality:
    """Compares trees within one budget; `ask` puts a question to sympy, or raises Undecided."""

    def __init__(self, budget: Budget, ask: Callable[..., list[Node]]):
        self.numbers = Numbers(budget)
        self.residues = Residues(budget, self.numbers)
        self.mp, self.ask = self.numbers.mp, ask
        self.set_digits = SET_DIGITS

    # ------------------------------------------------------------------------ expressions

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
        branched = any(kind(part) in BRANCHES for part in walk(a))
        imaginary = ("name", "i") in (*walk(a), *walk(b))
        whole = whole_names([*walk(a)])
        points = self.points(a, b)
        for real in (False,) if constant or imaginary else (True, False):
            agreed = 0
            for number, point in enumerate(points):
                if agreed >= ENOUGH and number < len(RANGES) and not whole:
                    continue
                try:
                    if not self.agree(a, b, point, real):
                        return False
                    agreed += 1
                except Undefined:
                    if real and branched and self.is_real(a, point):
                        return False  # of |x|, an answer must have both branches
                except Undecided:
                    if constant:
                        return False
            if agreed >= (1 if constant else FEWEST):
                return True
        return False

    def is_real(self, node: Node, point: dict) -> bool:
        try:
            self.numbers.at(node, point, True)
        except (Undefined, Undecided):
            return False
        return True

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
        return second <= max(first, max(size, 1) * shrink * shrink) * shrink

    def gap(self, at: Callable, a: Node, b: Node, digits: int) -> tuple:
        """How far the two are apart, at so many digits, and how large they are."""
        x, y = self.mp.convert(at(a, digits=digits)), self.mp.convert(at(b, digits=digits))
        return abs(x - y), max(abs(x), abs(y))

    def points(self, a: Node, b: Node) -> list[dict[str, Fraction]]:
        """Values for the names: each in another of RANGES, and wherever a kink may hide."""
        parts, free = [*walk(a), *walk(b)], sorted(names(a, b))
        opaque = any(part[:1] == ("call",) and part[1] in OPAQUE for part in parts)
        if not free:
            if opaque:
                return [{SALT: Fraction(k)} for k in range(8)]
            return [{}]
        bends = list(dict.fromkeys(itertools.chain(*map(bending, parts))))
        bends = bends[:MAX_BENDS] if len(free) * len(bends) < 4 * MAX_BENDS else bends[:4]
        ranges = list(RANGES)
        if bends:
            marks = sorted({Fraction(0), Fraction(1), *self.written(parts)})[-12:]
            ranges += itertools.pairwise(marks)
            ranges += [(marks[-1], 10 * marks[-1] + 10), (-10 * marks[-1] - 10, -marks[-1])]
        # of the reference: an answer does not choose where it is tested
        whole = whole_names([*walk(a)])
        salt = hash_of(a, b)
        ranges += RANGES if whole else []
        points = []
        for k in range(len(ranges)):
            point = {SALT: Fraction(k)}
            for number, name in enumerate(free):
                low, high = ranges[(k + 5 * number) % len(ranges)]
                real = low + (high - low) * draw(name, k, salt)
                point[name] = Fraction(2 + int(20 * draw(name, k, salt))) if name in whole else real
            points.append(point)
        for point in points[: 1 if len(free) == 1 else 3]:
            for name in free if bends else ():
                points += self.around_bends(bends, point, name)
        return points

    def searched(self, node: Node, name: str) -> list:
        """Where an expression of one name changes its sign, as far as powers of ten show."""
        if names(node) != {name}:
            return []
        sizes = [self.mp.mpf(10) ** k for k in range(-3, 16, 2)]
        grid, found = [*(-x for x in reversed(sizes)), self.mp.mpf(0), *sizes], []
        values = [self.sign_at(node, name, x) for x in grid]
        for low, high, before, after in zip(grid, grid[1:], values, values[1:]):
            if before * after < 0:
                for _ in range(60):
                    middle = (low + high) / 2
                    same = self.sign_at(node, name, middle) == before
                    low, high = (middle, high) if same else (low, middle)
                found.append(high)
        return found

    def sign_at(self, node: Node, name: str, x) -> int:
        """1, -1; 0 where it has no real value."""
        try:
            return int(self.mp.sign(self.numbers.at(node, {name: x}, True, 20)))
        except (Undefined, Undecided):
            return 0

    def written(self, parts: list[Node]) -> set[Fraction]:
        """The sizes of all rational numbers in a tree, 10^7 among them."""
        found = set()
        for part in parts:
            if part[0] in ("num", "^") and not names(part):
                value = self.plain(part)
                if value[0] == "num" and abs(Fraction(value[1])) < 10**30:
                    found.add(abs(Fraction(value[1])))
        return found

    def around_bends(self, bends: list[Node], point: dict, name: str) -> list[dict]:
        """Points at, between and beyond the kinks that a name has when the others are held."""
        others = {other: value for other, value in point.items() if other != name}
        found = set()
        for bend in bends:
            self.numbers.budget.spend(5)
            held = fixed(bend, others)
            low = self.low_roots(held, name)
            for root in self.searched(held, name) if low is None else self.real(low):
                found.add(Fraction(int(self.mp.nint(root * 10**30)), 10**30))
        kinks = sorted(found)[:12]
        if not kinks:
            return []
        step = 1 + (abs(kinks[0]) + abs(kinks[-1])) / 7
        # 2: an end of a floor's step
        values = [
            kinks[0] - step,
            *kinks,
            kinks[-1] + step,
            Fraction(2),
        ]
        values += [(left + right) / 2 for left, right in itertools.pairwise(kinks)]
        return [others | {name: value} for value in values]

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

    # ------------------------------------------------------------------------ roots

    def low_roots(self, node: Node, name: str) -> list[Node] | None:
        """The roots of a polynomial of the first or second degree; None for anything else."""
        found = coefficients(node, name)
        if found is None:
            return None
        c, b, a = (self.plain(part) for part in (*found, ZERO, ZERO)[:3])
        if self.same(a, ZERO):
            if not self.same(b, ZERO):
                return [("*", MINUS_ONE, over(c, b))]
            return None if self.same(c, ZERO) else []
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
        if low is None:
            return self.ask("solutions", node, name)
        return low

    def real(self, numbers: list[Node]) -> list:
        values = [
            self.mp.convert(self.numbers.at(number, digits=self.set_digits)) for number in numbers
        ]
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

    # ------------------------------------------------------------------------ sets of reals

    def same_set(self, gold: Node, answer: Node) -> bool:
        """Have they the same members: at every end, beside it, between any two, and far away?"""
        if len(names(gold, answer)) > 1:
            return False
        self.set_digits = SET_DIGITS
        ends = self.ends(gold) + self.ends(answer)
        largest = max((abs(self.mp.mag(x)) for x in ends if x and self.mp.isfinite(x)), default=0)
        if largest > SET_DIGITS:  # 2^{2024} and 2^{2024} + 1
            self.set_digits += int(0.61 * min(largest, 10_000))
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
        """The reals where a set may begin or end, and perhaps others; Undefined if not found."""
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
        return [self.mp.convert(self.numbers.at(node, digits=self.set_digits))]

    def order(self, a, b) -> int:
        """-1, 0 or 1 for a < b, a = b (up to rounding), a > b."""
        self.mp.dps = self.set_digits
        a, b = self.mp.convert(a), self.mp.convert(b)
        if isinstance(a, self.mp.mpc) or isinstance(b, self.mp.mpc):
            raise Undefined("complex numbers have no order")
        finite = self.mp.isfinite(a) and self.mp.isfinite(b)
        noise = self.mp.mpf(10) ** (20 - self.set_digits)
        gap = abs(a - b) if finite else self.mp.inf
        near = finite and gap <= max(
            noise, max(abs(a), abs(b)) * self.mp.mpf(10) ** (30 - self.set_digits)
        )
        return 0 if near or a == b else 1 if a > b else -1

    def contains(self, node: Node, x) -> bool:
        """Is a real number in a set: an interval, a union, a list, the solutions of a condition?"""
        match node:
            case ("tuple", brackets, low, high) if brackets != ";":
                above = self.order(x, self.numbers.at(low, digits=self.set_digits))
                below = self.order(self.numbers.at(high, digits=self.set_digits), x)
                if brackets[1] == "]" and high == ("name", "infty"):
                    raise Undefined("infinity is no member")
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
            case ("chain", "∈", ("name", _), inner) if names(node):
                return self.contains(inner, x)
            case ("chain", signs, *parts) if set(signs.split()) <= set(TRUTHS):
                point = dict.fromkeys(names(node), x)
                values = [self.numbers.at(part, point, True, self.set_digits) for part in parts]
                orders = [self.order(a, b) for a, b in itertools.pairwise(values)]
                return all(order in TRUTHS[sign] for sign, order in zip(signs.split(), orders))
        if names(node) or node[0] in ("tuple", "text", "matrix", "chain"):
            raise Undefined("not a set of reals")
        return self.order(self.numbers.at(node, digits=self.set_digits), x) == 0
