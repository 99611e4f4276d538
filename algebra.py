r"""What only a computer algebra system knows: closed forms of integrals, limits, sums; roots.

sympy computes while it builds, so it is asked here alone, and only:

- of a tree that `maths.py` has read, whose numbers and size are bounded first (`to_sympy`);
  text never reaches it;
- in a worker process of `verify.py`, under a limit of CPU time (`limited`) and of memory;
- where no other judge could decide.

Its results come back as trees, through text that `maths.read` reads strictly like anybody's.
"""

import contextlib
import signal
from collections.abc import Iterator
from fractions import Fraction

import sympy
from sympy.printing.str import StrPrinter

import latex
import maths
from maths import Node, walk
from values import Undecided

SECONDS = 1.0  # of CPU time for one verdict
DIGITS = 180  # of a root
MAX_NODES, MAX_NUMBER, MAX_POWER, MAX_DEGREE = 80, 10**12, 60, 12


class OutOfTime(BaseException):
    """Not an Exception, so that no handler within sympy takes it for one of its own."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Undecided after so much CPU time. For the main thread of a worker: signals reach no other."""

    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.2)
    try:
        yield
    except (OutOfTime, MemoryError, RecursionError):
        raise Undecided("sympy took too long") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_same_names = """sin cos tan cot sec csc exp log sinh cosh tanh coth asin acos atan acot asinh
    acosh atanh factorial binomial floor sign"""
FUNCTIONS = {name: getattr(sympy, name) for name in _same_names.split()}
FUNCTIONS |= {"abs": sympy.Abs, "ceil": sympy.ceiling, "fac2": sympy.factorial2}
FUNCTIONS |= {"max": sympy.Max, "min": sympy.Min, "root": lambda x, n: x ** (1 / n)}
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}


def to_sympy(node: Node, bound: frozenset[str] = frozenset()) -> sympy.Expr:
    """The expression of a tree.

    Undecided for what is too large, or is no expression. Names are real, or whole.
    """
    match node:
        case ("num", text):
            number = Fraction(text)
            if max(abs(number.numerator), number.denominator) > MAX_NUMBER:
                raise Undecided("a large number")
            return sympy.Rational(number.numerator, number.denominator)
        case ("name", name):
            return CONSTANTS[name] if name in CONSTANTS else symbol(name, name in bound)
        case ("+", *terms):
            return sympy.Add(*(to_sympy(term, bound) for term in terms))
        case ("*", *factors):
            return sympy.Mul(*(to_sympy(factor, bound) for factor in factors))
        case ("^", base, exponent):
            base, power = to_sympy(base, bound), to_sympy(exponent, bound)
            if power.is_number and not abs(power) <= MAX_POWER:
                raise Undecided("a large power")
            return base**power
        case ("call", "sum" | "prod" as kind, ("name", name), low, high, body):
            whole = bound | {name}
            limits = (symbol(name, True), to_sympy(low, whole), to_sympy(high, whole))
            return (sympy.Sum if kind == "sum" else sympy.Product)(to_sympy(body, whole), limits)
        case ("call", "int", ("name", name), *bounds, body):
            limits = (symbol(name, False), *(to_sympy(part, bound) for part in bounds))
            return sympy.Integral(to_sympy(body, bound), limits if bounds else limits[0])
        case ("call", "lim", ("name", name), point, body):
            return sympy.Limit(
                to_sympy(body, bound), symbol(name, False), to_sympy(point, bound), dir="+-"
            )
        case ("call", function, *parts) if function in FUNCTIONS:
            arguments = [to_sympy(part, bound) for part in parts]
            if function in ("factorial", "fac2", "binomial", "exp") and any(
                abs(x) > 60 for x in arguments if x.is_number
            ):
                raise Undecided("a large argument")
            return FUNCTIONS[function](*arguments)
        case ("unit", inner, "degree"):
            return to_sympy(inner, bound) * sympy.pi / 180
    raise Undecided(f"{node[0]} is no expression")


def symbol(name: str, whole: bool) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True) if whole else sympy.Symbol(name, real=True)


def bounded(node: Node) -> sympy.Expr:
    if sum(1 for _ in walk(node)) > MAX_NODES:
        raise Undecided("too long for sympy")
    try:
        return to_sympy(node)
    except (TypeError, ValueError, ArithmeticError):
        raise Undecided("no expression") from None


# What `maths.read` reads of sympy's functions; erf or Si would be a product of letters.
_spelled = """sin cos tan cot sec csc exp log sinh cosh tanh coth asin acos atan asinh acosh atanh
    Abs floor gamma zeta"""
SPELLED = set(_spelled.split())


class Spelling(StrPrinter):
    """sympy's text, in words that `maths.read` knows."""

    def _print_Exp1(self, expr):
        return "e"

    def _print_ImaginaryUnit(self, expr):
        return "i"

    def _print_gamma(self, expr):
        return f"Gamma({self._print(expr.args[0])})"

    def _print_Abs(self, expr):
        return f"abs({self._print(expr.args[0])})"


def from_sympy(expression: sympy.Expr) -> Node:
    unknown = (
        sympy.Integral,
        sympy.Sum,
        sympy.Product,
        sympy.Limit,
        sympy.Piecewise,
        sympy.AccumBounds,
    )
    functions = {type(part).__name__ for part in expression.atoms(sympy.Function)}
    if expression.has(*unknown) or functions - SPELLED or expression in (sympy.nan, sympy.zoo):
        raise Undecided("sympy has no closed form")
    letters = dict(zip(sorted(expression.free_symbols, key=str), "ABDFGHJKLMNPQRSTUVWXYZ"))
    plain = {symbol: sympy.Symbol(letter) for symbol, letter in letters.items()}
    tree = maths.read(latex.tokenise(Spelling().doprint(expression.subs(plain))), {"Gamma", "zeta"})
    for symbol, letter in letters.items():  # names as the reader has them, x_1 or alpha
        tree = maths.substitute(tree, ("name", letter), ("name", str(symbol)))
    return tree


def closed(node: Node) -> list[Node]:
    """The value of a sum, product, integral or limit."""
    try:
        return [from_sympy(bounded(node).doit())]
    except (
        latex.ParseError,
        TypeError,
        ValueError,
        ArithmeticError,
        NotImplementedError,
        AttributeError,
    ):
        raise Undecided("sympy has no closed form") from None


def polynomial(node: Node, name: str) -> sympy.Poly:
    """The numerator of a rational function of one name; Undecided for anything else."""
    numerator, _ = sympy.fraction(sympy.together(bounded(node)))
    try:
        poly = sympy.Poly(numerator, symbol(name, False))
    except sympy.PolynomialError:
        raise Undecided("no polynomial") from None
    if not 0 < poly.degree() <= MAX_DEGREE or not poly.domain.is_Numerical:
        raise Undecided("no polynomial of one name and a low degree")
    return poly


def solutions(node: Node, name: str) -> list[Node]:
    """The roots of node = 0, real and complex; of a polynomial with rational coefficients only."""
    poly = polynomial(node, name)
    found = sympy.roots(poly)
    if sum(found.values()) != poly.degree():
        raise Undecided("roots that have no closed form")
    return [from_sympy(root) for root in found]


def zeros(node: Node, name: str) -> list[Node]:
    """The real zeros and poles of a rational function, to 180 digits."""
    expression = sympy.together(bounded(node))
    found: set[str] = set()
    for part in sympy.fraction(expression):
        poly = sympy.Poly(part, symbol(name, False)) if part.has(symbol(name, False)) else None
        if poly is None:
            continue
        if poly.degree() > MAX_DEGREE or not poly.domain.is_Numerical or not poly.domain.is_Exact:
            raise Undecided("no polynomial of a low degree")
        found |= {str(sympy.re(root.evalf(DIGITS))) for root in poly.real_roots()}
    return [("num", text) for text in found]
