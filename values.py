r"""The value of a tree, in two ways: modulo a large random prime, or to as many digits as it takes.

Neither ever calls two numbers equal because their leading digits agree:

- `Residues` never writes a number out. 2^{2024} + 1, 2024! - 1 and (x + 1)^2 are computed modulo a
  random prime of 160 bits, names being random themselves. Different numbers have different
  residues, but for a chance of 2^-150.
- `Numbers` computes roots, logarithms and the like by digits, and says how large or small any part
  was (`sizes`), so that the caller can ask for the digits that tell 1 from 1 + 2^{-2024}.

`exact_arithmetic`, below, is the countdown task's: plain sums, as strictly as can be.

What is too large for both is `Undecided`, and then equal only to the very same expression. All work
is counted.
"""

import hashlib
import math
import random
import re
import time
from fractions import Fraction

import mpmath

from latex import LISTED, ParseError, tokenise
from maths import (
    CONSTANTS,
    MINUS_ONE,
    Node,
    Parser,
    exact,
    matrix,
    names,
    substitute,
    times,
)

MAX_BITS = 20_000  # of a rational number that is written out
MAX_LOG = 20_000  # |log2| of any part of a number that is computed by its digits
MAX_LOG_AT_A_POINT = 1_000  # the same, of an expression with names: there are other points
MAX_WORK = 15_000  # steps of one verdict: about half a second
MAX_REFUSED = 1_000  # requests beyond that
LOOK_AT_CLOCK = 50  # every so many steps: to ask for the time costs more than a step
MAX_TERMS = 2_000  # of a sum that is added up
MAX_FACTORS = 200_000  # of a factorial, modulo the prime
DIGITS = 60  # working precision, beyond what the sizes of the parts ask for

MP = mpmath.mp.clone()  # one verdict at a time uses it: see LOCK in verify.py

# Calls that have no value of their own: a random number that depends on the values of their parts.
OPAQUE = {"apply", "index", "prime", "inverse", "mark", "cross", "builder", "int", "lim"}
OPAQUE |= {"big sum", "big prod", "big lim"}
# Calls that grow as e^x does: what they are close to is closer by e^-x than a digit of theirs
# shows.
GROWING = {"exp", "sinh", "cosh", "tanh", "coth", "sech", "csch", "factorial", "fac2", "zeta"}
# of a huge number, still computed
FLAT = {"log", "atan", "acot", "tanh", "coth", "asinh", "acosh", "zeta"}
SLOW, MAX_SLOW_DIGITS = {"zeta", "factorial", "fac2", "binomial"}, 400
SALT = "salt"  # a name of a point that only opaque values look at: other values at every point
NOWHERE = Fraction(271_828, 314_159)  # the value of `cases` where none holds


class Undefined(Exception):
    """No value here: 1/0, the root of -1 over the reals, a set where a number is needed."""


class Undecided(Exception):
    """There may be a value, but this way of computing does not find it within its bounds."""


class Budget:
    """Steps and seconds of one verdict."""

    def __init__(self, deadline: float):
        self.work, self.refused, self.deadline = LOOK_AT_CLOCK - 1, 0, deadline

    def spend(self, steps: int = 1) -> None:
        before, self.work = self.work, self.work + steps
        over = self.work > MAX_WORK
        look = over or before // LOOK_AT_CLOCK < self.work // LOOK_AT_CLOCK
        if look and time.thread_time() > self.deadline:
            raise TimeoutError
        self.refused += over
        if self.refused > MAX_REFUSED:  # somebody goes on asking
            raise TimeoutError
        if over:
            raise Undecided("too much to compute")


def random_prime(bits: int = 160) -> int:
    candidate = random.SystemRandom().getrandbits(bits) | 1 | 1 << (bits - 1)
    while not all(pow(base, candidate - 1, candidate) == 1 for base in (2, 3, 5, 7)):
        candidate += 2
    return candidate


class Residues:
    """Values modulo a random prime: of +, *, whole powers, factorials, binomials and whole sums.

    f(x), a_n and \\vec{v} are random numbers of their own. Undecided for anything else.
    """

    prime = random_prime()
    secret = str(random.SystemRandom().getrandbits(128))

    def __init__(self, budget: Budget, numbers: "Numbers"):
        self.budget, self.numbers = budget, numbers
        self.point = 0  # another one, other values of the names

    def random(self, *key) -> int:
        digest = hashlib.sha256(repr((self.secret, self.point, *key)).encode()).digest()
        return int.from_bytes(digest, "big") % self.prime

    def value(self, node: Node) -> int:
        self.budget.spend()
        match node:
            case ("num", text):
                return self.ratio(Fraction(text))
            case ("base", *_):
                return self.ratio(self.numbers.exact(node))
            case ("name", name) if name not in CONSTANTS or name in ("pi", "e"):
                return self.random("name", name)
            case ("unit", inner, "degree"):
                return self.value(("*", inner, ("name", "pi"), ("num", "1/180")))
            case ("unit", inner, _):
                return self.value(inner)
            case ("%", inner):
                return self.value(("*", inner, ("num", "1/100")))
            case ("+", *terms):
                return sum(map(self.value, terms)) % self.prime
            case ("*", *factors):
                product = 1
                for factor in factors:
                    product = product * self.value(factor) % self.prime
                return product
            case ("^", base, exponent):
                return self.power(self.value(base), self.whole(exponent))
            case ("call", function, *parts):
                return self.call(function, *parts)
        raise Undecided(f"{node[0]} has no residue")

    def call(self, function: str, *parts: Node | str) -> int:
        if function in ("factorial", "fac2"):
            return self.product_down(
                self.whole(parts[0]), 0, step=1 if function == "factorial" else 2
            )
        if function == "binomial":
            n, k = map(self.whole, parts)
            if not 0 <= k <= n:
                raise Undecided("a binomial coefficient outside of Pascal's triangle")
            k = min(k, n - k)
            return (
                self.product_down(n, n - k)
                * pow(self.product_down(k, 0), -1, self.prime)
                % self.prime
            )
        if function in ("sum", "prod"):
            return self.added_up(function, *parts)
        if function in ("index", "apply"):
            return self.random(function, *map(self.key, parts))
        if function == "mark" and parts[0] == "overrightarrow" and len(parts[1].split()) == 2:
            start, end = (self.random("vector to", letter) for letter in parts[1].split())
            return (end - start) % self.prime  # AB is B - A, so that BA = -AB
        if function in ("mark", "prime", "inverse"):
            return self.random(function, *parts)
        raise Undecided(f"{function} has no residue")

    def added_up(self, function: str, bound: Node, low: Node, high: Node, body: Node) -> int:
        first, last = self.whole(low), self.whole(high)
        if last - first > MAX_TERMS:
            raise Undecided("a long sum")
        total = int(function == "prod")
        for k in range(first, last + 1):
            term = self.value(substitute(body, bound, ("num", str(k))))
            total = (total + term if function == "sum" else total * term) % self.prime
        return total

    def key(self, part: Node | str):
        """What an argument is known by: its residue, or a word."""
        return part if isinstance(part, str) else self.value(part)

    def ratio(self, x: Fraction) -> int:
        return x.numerator * pow(x.denominator, -1, self.prime) % self.prime

    def whole(self, node: Node) -> int:
        x = self.numbers.exact(node)
        if x.denominator != 1:
            raise Undecided("not a whole number")
        return x.numerator

    def power(self, base: int, exponent: int) -> int:
        if base == 0 and exponent <= 0:
            raise Undefined("a power of zero")
        return pow(base, exponent, self.prime)

    def product_down(self, n: int, above: int, step: int = 1) -> int:
        """n (n - step) ... down to the last factor that is > `above`."""
        factors = (n - above) // step
        if n < 0 or factors > MAX_FACTORS:
            raise Undecided("a factorial out of reach")
        self.budget.spend(factors // 100)
        product = 1
        for factor in range(n, above, -step):
            product = product * factor % self.prime
        return product


class Numbers:
    """Values at a point: exact while they are rational and short, else in as many digits as asked.

    `sizes`, after `at`, is the largest |log2| of any part: of 1 + 2^{-2024} it is 2024, and it
    takes twice as many bits to tell that from 1.
    """

    def __init__(self, budget: Budget):
        self.mp, self.budget = MP, budget
        self.sizes, self.max_log, self.real, self.point = 0, MAX_LOG, False, {}
        self.memo: dict = {}  # of the parts, within one call of `at`
        self.found: dict = {}  # of whole trees: the members of two lists meet many times

    def at(self, node: Node, point: dict | None = None, real: bool = False, digits: int = DIGITS):
        """The value of a tree, its names being what `point` says; `real`: Undefined elsewhere."""
        self.mp.dps, self.real, self.point = digits, real, point or {}
        large = any(abs(x) > 2**MAX_LOG_AT_A_POINT for x in self.point.values())
        self.max_log = MAX_LOG_AT_A_POINT if point and not large else MAX_LOG
        key = (node, tuple(self.point.items()), real, digits)
        if key not in self.found:
            self.memo, self.sizes = {}, 0
            try:
                self.found[key] = self.value(node), self.sizes
            except (ArithmeticError, ValueError, TypeError, NotImplementedError, KeyError) as error:
                raise Undefined(str(error)) from None
        value, self.sizes = self.found[key]
        return value

    def exact(self, node: Node) -> Fraction:
        """The value of a tree without names, if it is a rational number that can be written out."""
        if names(node):
            raise Undecided("names")
        x = self.at(node)
        if not isinstance(x, Fraction):
            raise Undecided("not a rational number")
        return x

    def value(self, node: Node):
        if node not in self.memo:
            self.budget.spend(1 + self.mp.dps // 500)
            self.memo[node] = self.checked(self.compute(node))
        return self.memo[node]

    def checked(self, x):
        """x, as a number that is real if it has to be, and not too large; its size is noted."""
        if isinstance(x, Fraction | int):
            x = Fraction(x)
            bits = x.numerator.bit_length() + x.denominator.bit_length()
            self.sizes = max(self.sizes, bits)
            if bits <= MAX_BITS:
                return x
        x = self.mp.convert(x)
        if self.mp.isnan(x) or (self.real and isinstance(x, self.mp.mpc)):
            raise Undefined("no real number")
        if x and self.mp.isfinite(x):
            self.sizes = max(self.sizes, abs(self.mp.mag(x)))
        if self.sizes > self.max_log:
            raise Undecided("too large or too small to be compared")
        return x

    def compute(self, node: Node):
        """One node, its parts being computed first."""
        op, *children = node
        if op == "num":
            return Fraction(children[0])
        if op == "base":
            return Fraction(int(children[0], int(children[1])))
        if op == "name":
            return self.name(children[0])
        if op == "*" and children[0] == MINUS_ONE and len(children) == 2:  # of infinity, too
            return -self.value(children[1])
        if op == "call":
            return self.call(*children)
        if op == "cases":
            return next((self.value(row[1]) for row in children if self.holds(row[2])), NOWHERE)
        values = self.finite([child for child in children if isinstance(child, tuple)])
        if op == "+":
            return sum(values)
        if op == "*":
            return math.prod(values)
        if op == "^":
            return self.power(*values)
        if op == "unit":
            return values[0] * (self.mp.pi / 180 if children[1] == "degree" else 1)
        if op == "%":
            return values[0] / 100
        if op == ":":
            return values[0] / values[1]
        raise Undefined(f"{op} has no value")

    def finite(self, nodes: list[Node]) -> list:
        """The values of parts, all of one kind: exact, or all by their digits."""
        values = [self.value(node) for node in nodes]
        if any(x in (self.mp.inf, -self.mp.inf) for x in values):
            raise Undefined("infinity is not a number")
        exact = all(isinstance(x, Fraction) for x in values)
        if exact:
            return values
        return [self.mp.convert(x) for x in values]

    def holds(self, condition: Node) -> bool:
        """Is a condition of `cases`, a chain of relations, true at this point?"""
        match condition:
            case ("text", "otherwise" | "else"):
                return True
            case ("list", *parts):
                return all(map(self.holds, parts))
            case ("or", *parts):
                return any(map(self.holds, parts))
            case ("chain", signs, *parts):
                values = [self.mp.convert(self.value(part)) for part in parts]
                return all(
                    HOLDS[sign](a, b) for sign, a, b in zip(signs.split(), values, values[1:])
                )
        raise Undefined("no condition on a number")

    def name(self, name: str):
        if name in self.point:
            return self.point[name]
        constants = {"pi": self.mp.pi, "e": self.mp.e, "i": self.mp.j, "infty": self.mp.inf}
        return +constants[name]

    def power(self, base, exponent):
        if base == 0 and exponent == 0:
            raise Undefined("0^0")
        if isinstance(base, Fraction) and exponent.denominator == 1:
            bits = base.numerator.bit_length() + base.denominator.bit_length()
            if abs(exponent) * bits <= MAX_BITS:
                return base**exponent.numerator
        base, exponent = self.mp.convert(base), self.mp.convert(exponent)
        if base and abs(exponent * self.mp.log(abs(base), 2)) > self.max_log:
            raise Undecided("too large or too small to be compared")
        self.budget.spend(self.mp.dps // 10)
        return self.mp.power(base, exponent)

    def root(self, x, degree):
        odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2 == 1
        if odd and not isinstance(x, self.mp.mpc) and x < 0:
            return -self.root(-x, degree)
        power = Fraction(1) / degree
        return self.power(x, power if isinstance(x, Fraction) else self.mp.convert(power))

    def call(self, function: str, *parts):
        if function in OPAQUE or (function == "det" and parts[0][0] != "matrix"):
            return self.opaque(function, *parts)
        if function in ("sum", "prod"):
            return self.added_up(function, *parts)
        if function == "det":
            return self.value(determinant(parts[0]))
        values = self.finite(parts)
        exact = isinstance(values[0], Fraction)
        whole = exact and all(x.denominator == 1 for x in values)
        if function in ("abs", "max", "min"):
            return {"abs": abs, "max": lambda *xs: max(xs), "min": lambda *xs: min(xs)}[function](
                *values
            )
        if function in ("floor", "ceil"):
            return self.rounded(function, values[0])
        if function in ("gcd", "lcm"):
            if not whole:
                raise Undefined("a divisor of what is not whole")
            return {"gcd": math.gcd, "lcm": math.lcm}[function](*(x.numerator for x in values))
        if function == "root":
            return self.root(*(self.value(part) for part in parts))
        if function == "factorial" and whole and 0 <= values[0] < 2000:
            return math.factorial(values[0].numerator)
        if function == "binomial" and whole and 0 <= values[1] <= values[0] < 5000:
            return math.comb(values[0].numerator, values[1].numerator)
        return self.elementary(function, *map(self.mp.convert, values))

    def elementary(self, function: str, *values):
        x = values[0]
        if x and self.mp.mag(x) > 16 and function not in FLAT:
            raise Undecided(f"{function} of a large number")
        if x and function in GROWING:
            growth = abs(x) * (self.mp.mag(x) + 1 if function == "factorial" else 2)
            self.sizes = max(self.sizes, int(min(2 * growth, self.max_log + 1)))
            if self.sizes > self.max_log:
                raise Undecided("too large or too small to be compared")
        if function in SLOW and self.mp.dps > MAX_SLOW_DIGITS:
            raise Undecided(f"{function} to {self.mp.dps} digits")
        self.budget.spend(self.mp.dps // 4)  # a function costs as much as many sums
        if not hasattr(self.mp, function):
            raise Undefined(f"{function} is no function")
        return getattr(self.mp, function)(*values)

    def rounded(self, function: str, x):
        if isinstance(x, Fraction):
            return math.floor(x) if function == "floor" else math.ceil(x)
        near = self.mp.nint(x)
        if abs(x - near) < self.mp.mpf(10) ** (-self.mp.dps // 2):  # log_2 8 is 3, not 2.99...
            return near
        if function == "floor":
            return self.mp.floor(x)
        return self.mp.ceil(x)

    def added_up(self, function: str, bound: Node, low: Node, high: Node, body: Node):
        """A sum or product with whole bounds, term by term."""
        bounds = [self.value(low), self.value(high)]
        whole = all(isinstance(x, Fraction) and x.denominator == 1 for x in bounds)
        if not whole or bounds[1] - bounds[0] > MAX_TERMS:
            return self.opaque(function, bound, low, high, body)
        known, total = self.point, Fraction(function == "prod")
        try:
            for k in range(int(bounds[0]), int(bounds[1]) + 1):
                self.point, self.memo = known | {bound[1]: Fraction(k)}, {}
                term = self.value(body)
                if isinstance(total, Fraction) != isinstance(term, Fraction):
                    total, term = self.mp.convert(total), self.mp.convert(term)
                total = self.checked(total + term if function == "sum" else total * term)
        finally:
            self.point, self.memo = known, {}
        return total

    def opaque(self, *parts: Node | str):
        """f(x), a_n, an integral: a number that depends on its parts' values alone, or form.

        It is no Fraction, for it is as exact as they are: two that agree are looked at again.
        """
        if parts[0] in LISTED:
            parts = (parts[0], *sorted(parts[1:], key=repr))
        keys = [parts[0]]
        bound, values = ("name", "the bound name"), [Fraction(0)]
        if parts[0] in ("sum", "prod", "int", "lim"):  # whatever the bound name is, at three values
            parts = (parts[0], *(substitute(part, parts[1], bound) for part in parts[2:]))
            values = [Fraction(hashed(k), 2**60) + k for k in range(3)]
        known = self.point
        for value in values:
            self.point, self.memo = known | {bound[1]: value}, {}
            keys += [self.key(part) for part in parts[1:]]
        self.point, self.memo = known, {}
        return self.mp.mpf(18 * hashed(self.point.get(SALT), *keys)) / 2**64 - 9

    def key(self, part: Node | str):
        try:
            value = part if isinstance(part, str) else self.value(part)
        except (Undefined, KeyError, TypeError):
            return part
        if isinstance(value, Fraction | str):
            return value
        return self.mp.nstr(value, self.mp.dps - 15)


def hashed(*key) -> int:
    """64 bits that depend on the key alone."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:16], 16)


def determinant(node: Node) -> Node:
    """Of a matrix up to 4 x 4, along the first row; ValueError for others."""
    rows = [row[1:] for row in node[1:]]
    if len(rows) > 4 or any(len(row) != len(rows) for row in rows):
        raise ValueError("no determinant")
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for k, cell in enumerate(rows[0]):
        minor = matrix([row[:k] + row[k + 1 :] for row in rows[1:]])
        term = times(cell, determinant(minor))
        terms.append(times(MINUS_ONE, term) if k % 2 else term)
    return ("+", *terms)


HOLDS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


# ---------------------------------------------------------------------------- arithmetic


def exact_arithmetic(text: str, operators: str = "+-*") -> tuple[Fraction, list[int]]:
    r"""The value of whole numbers joined by these operators and brackets, and the numbers.

    LaTeX's spellings are read where their operator is allowed; `2**3`, `7//2`, `-3`, `2(3)`, `2 3`
    never are. Raises ParseError for anything else.
    """
    tokens = tokenise(text, thousands=False)
    whole = [re.fullmatch("[0-9]{1,12}", token.text) is not None for token in tokens]
    numbers = [int(token.text) for token, is_number in zip(tokens, whole) if is_number]
    signs = {"frac": "f", **dict.fromkeys(operators + "×" * ("*" in operators), "o")}
    shape = "".join(
        "n" if number else signs.get(token.text, token.text[0])
        for token, number in zip(tokens, whole)
    )
    smallest = r"\(n\)|non" + r"|f\{n\}\{n\}|fnn" * ("/" in operators)
    while (smaller := re.sub(smallest, "n", shape)) != shape:
        shape = smaller
    if shape != "n":
        raise ParseError(f"not just whole numbers, brackets and {operators}")
    try:
        return exact(Parser(tokens, set()).answer()), numbers
    except ZeroDivisionError:
        raise ParseError("division by zero") from None
