r"""Mathematics as people and models write it, LaTeX or plain ASCII, into a tree; and nothing else is let in.

    read(r"x = 1 \frac12 \text{ cm}") shows as chain(=, x, unit(+(1, *(1, ^(2, -1))), cm))

The text is hostile input. It meets a tokenizer whose regular expressions cannot backtrack far, and a recursive-descent
parser; never eval, and no library that computes while it builds (sympy multiplies 9^{9^9} out). Length, nesting and
digits are bounded here; values are computed, within further bounds, by `verify.py`, which compares two trees.

A tree is a tuple ("op", child, ...). Leaves: ("num", "1.50"), ("name", "x"), ("text", "even"), ("base", "101", "2").
Inner nodes: "+", "*", "^" (a - b is a + -1*b, a/b is a * b^-1), "call", "unit", "%", ":" (a ratio or time), "tuple"
(with its brackets), "list", "or", "matrix" of "row"s, "chain" (of relations, with their signs), and "∪", "∩", "∖".
"""

import hashlib
import itertools
import math
import operator
import re
import time
from fractions import Fraction

import mpmath

MAX_CHARS, MAX_DEPTH = 2_000, 25  # of an answer (the longest reference of five benchmarks has 59), of its brackets

MAX_BITS, MAX_LOG = 6_000, 100_000  # of an exact rational; |log2| of any value: 2^65536 has one, 9^{9^9} is too large
MAX_WORK = 15_000  # evaluation steps in one verdict: about half a second
RANGES = [(0, 1), (1, 4), (-3, 0), (-1, 1), (20, 5000), (-5000, -3)]  # of the values that names take, point by point
RANGES += [(4, 20), (-20, -3), (0, 3), (-9, 9), (0, 2), (0, 1)]  # for expressions that are not defined at some of those
DIGITS = 60  # working precision; the digits written in the two answers are added to it

Node = tuple  # ("op", child, ...); the children of leaves are strings


class ParseError(Exception):
    """The text is not mathematics that we read, or it is too large to be read, or computed, safely."""


class Undefined(Exception):
    """No value here: 1/0, the logarithm of a negative number over the reals, a set where a number is needed."""


# ------------------------------------------------------------------------------------------------ words and spellings

_functions = """sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth sech csch asinh acosh atanh
    arcsin arccos arctan arccot ln log lg exp sqrt frac binom floor ceil abs sum prod int lim"""
_letters = "pi infty theta alpha beta gamma delta lambda sigma omega phi infinity oo"
_synonyms = r"""\cdot * \times * \ast * \div / \le <= \leq <= \leqslant <= \ge >= \geq >= \geqslant >= \lt < \gt >
    \ne != \neq != \pm ± \mp ∓ \cup ∪ \cap ∩ \setminus ∖ \backslash ∖ \in ∈ \approx ≈ \equiv = \langle ( \rangle ) \to :
    \colon : \land and \lor or \dbinom binom \over frac \choose binom \varnothing emptyset
    infinity infty oo infty \dots ldots \cdots ldots == =
    \prime ' \% % \degree ° \circ ° \lbrace \{ \rbrace \} − - – - × * · * ÷ / ≤ <= ≥ >= ≠ != ′ ' π pi √ sqrt ∞ infty
    ∅ emptyset … ldots θ theta"""
_units = """degree deg|dollar usd|cent|euro|inch in inches|foot ft feet|yard yd|mile mi|mm millimeter millimetre|
    meter m metre|cm centimeter centimetre|km kilometer kilometre|gram g|kg kilogram|mg milligram|pound lb|ounce oz|
    ml milliliter|gallon|liter l litre|second s sec|minute min|hour h hr|day|week|month|year yr|am|pm|percent|per|of|
    square sq|cubic cu|unit|radian rad|newton n|joule j|watt w|volt v|people person|child children|man men"""
FUNCTIONS = set(_functions.split())
WORDS = FUNCTIONS - {"int"} | set(_letters.split())
SYNONYMS = dict(zip(_synonyms.split()[::2], _synonyms.split()[1::2]))
UNITS = {name: names.split()[0] for names in _units.split("|") for name in names.split()}  # a plural -s is implied
NOT_COUNTED = {"tens", "dozens", "hundreds", "thousands", "millions", "billions", "times", "halves", "does"}


def unit_of(phrase: str) -> str:
    """The canonical name of a unit such as "sq. inches" or "km/h"; "" if these words are anything else.

    A plural that we do not know ("marbles") is what was counted; "is", "plus", "less", "guess" do not look like one.
    """
    words, phrase = [], phrase.lower().replace(".", "").replace(",", " ").replace("/", " per ")
    for word in phrase.replace("mph", "mile per hour").split():
        name = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
        if name is None and (word in NOT_COUNTED or not re.fullmatch(r"[a-z]+[^aiusz\W]s", word)):
            return ""
        words.append(name or word[:-1])
    return re.sub(r"\bcubic (\w+)", r"\1^3", re.sub(r"\bsquare (\w+)", r"\1^2", " ".join(words)))


def read_words(found: re.Match) -> str:
    r"""Words and units in quotes; but " and " for `\text{ and }`, {E} for `\mathrm{E}`, and xsinx, abc as they are."""
    inside, before = (found[1] or found[2] or "").strip(" ,"), found.string[max(0, found.start() - 9) : found.start()]
    unit = re.search(r"[0-9)}%]\s*$", before) and unit_of(inside)
    if inside in ("and", "or", ""):
        return f" {inside} "
    if found[2]:  # bare letters: words unless they are short, or hold the name of a function
        return f'"{inside}"' if not NAME.search(inside) and (len(inside) > 3 or unit) else inside
    words = any(len(word) > 1 and word not in WORDS for word in re.findall("[A-Za-z]+", inside))
    return f'"{inside}"' if words or unit else f"{{{inside}}}"


NAME = re.compile("|".join(sorted(WORDS, key=len, reverse=True)))


def read_period(found: re.Match) -> str:
    r"""`0.1\overline{6}` as the fraction 15/90."""
    whole, fixed, period = found[1], found[2], found[3] or found[4]
    above = int(whole + fixed + period) - int(whole + fixed or 0)
    return rf"{{\frac{{{above}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}}}"


REWRITES = [  # other spellings, in order, before tokens are read
    (r"\\(?:left|right)(?![a-z])\s*\.?|\\[bB]igg?[lrm]?(?![a-z])|\\(?:displaystyle|limits|q?quad)(?![a-z])", " "),
    (r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,|\\ )(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234
    (r"(?<!\\)\\[,;:>! ()\[\]]|~|(?<!\\)\$", " "),
    (r"\\\$\s*([0-9.,]*[0-9])|\\\$", r' \1 "dollar" '),
    (r"\^\s*(?:\{\s*(\\circ|\\prime)\s*\}|(\\circ|\\prime)(?![a-z]))", r" \1\2 "),
    (r"([0-9]*)\.([0-9]*)\\overline\s*(?:\{([0-9]+)\}|([0-9]))", read_period),
    (r"(?<=[0-9])\s*(?:\^\s*)?(\{\s*)?\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}(?(1)\s*\})", ""),  # 13th
    (r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*(?:\{R\}|R)\s*)?(?:\\mid|:|\|)", r"\\{"),  # {x : x > 2}
    (r"(?:\||\\[lr]?vert)([^|]*?)(?:\||\\[lr]?vert)", r" \\abs{\1} "),
    (r"\\l(floor|ceil)(.*?)\\r(?:floor|ceil)", r"\\\1{\2}"),
    (r"\\mathbb\s*(?:\{R\}|R)", "ℝ"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*([0-9]|(?<![a-z])[a-zA-Z])", r"\\frac{\1}"),  # \frac43
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"\{([^{}]*)\\(over|choose)(?![a-z])([^{}]*)\}", r"\\\2{\1}{\3}"),
    (r"\\\\\s*\[[^\]]*\]", r"\\\\"),  # a row's extra space
    (r"(\\begin\{array\})\s*\{[lcr|\s]*\}", r"\1"),
    (r"\\(?:text\w{0,6}|mbox|math\w\w|operatorname)\s*\{([^{}]*)\}|(?<![A-Za-z\\{\"])([A-Za-z]{2,})", read_words),
    (r"(?<![\w\\.])([A-Za-z])([0-9]+)", r"\1_{\2}"),  # x3
    (r"\(([0-9]+)\)\s*_", r"\1_"),  # (101)_2
    (r"^\s*([A-Za-z]'*)\s*\(([A-Za-z])\)\s*=", r"\1_\2 ="),  # P(x) = ...: a name, not a product
    (r"\{:\}", ":"),
    ("²", "^2"),
]
LOOSE = [  # 1 \frac12, 1 1/2, and 1,234 where it is not in brackets
    (r"(?<![\w.^}\\])([0-9]+)\s*\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r"{(\1+\2/\3)}"),
    (r"(?<![\w.^}\\])([0-9]+)\s+([0-9]+)/([0-9]+)(?![\w.])", r"{(\1+\2/\3)}"),
    (r"(?<![0-9.])[0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9/])", lambda found: re.sub("[, ]", "", found[0])),
]
TOKEN = re.compile(
    r""""[^"]*" | [0-9][0-9A-Z]*_(?:\{[0-9]+\}|[0-9]+) | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9.]))?
    | \\(?:begin|end)\{\w+\*?\} | \\[A-Za-z]+ | \\[{}\\|%$] | <=|>=|!=|==|\*\*|//|!! | and | or | """
    + NAME.pattern + r"|\S",
    re.VERBOSE,
)  # fmt: skip


def tokenise(text: str, loose: bool = True) -> list[str]:
    """The tokens of an answer, closed by an empty one; words are in quotes. `loose`: 1,234 and 1 1/2 are one number."""
    if len(text) > MAX_CHARS or re.search(r"[0-9]{400}", text):
        raise ParseError("too long")
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # LaTeX that was escaped once too often
    bracketed = re.search(r"[(\[]|\\\{", text) is not None
    for pattern, replacement in REWRITES + (LOOSE[: 3 - bracketed] if loose else []):
        text = re.sub(pattern, replacement, text)
    tokens = [SYNONYMS.get(token, token) for token in TOKEN.findall(text)]
    return [re.sub(r"^\\(?=[A-Za-z]+$)", "", token) for token in tokens] + [""]


LEVEL = {"=": 1, "≈": 1, "∈": 1, "!=": 1, "<": 1, ">": 1, "<=": 1, ">=": 1}  # how tightly binary operators bind
LEVEL |= {"∪": 2, "∩": 2, "∖": 2, ":": 3, "+": 4, "-": 4, "*": 5, "/": 5}
UNIT_LEVEL, MINUS_ONE = 3, ("num", "-1")  # `2 + 3 \text{ cm}` is 5 cm


def times(left: Node, right: Node) -> Node:
    """The product; a scalar goes into the cells of a matrix, a sign into a number."""
    if "matrix" in (left[0], right[0]) and left[0] != right[0]:
        scalar, matrix = (left, right) if right[0] == "matrix" else (right, left)
        return ("matrix", *(("row", *(times(scalar, cell) for cell in row[1:])) for row in matrix[1:]))
    if left == MINUS_ONE and right[0] == "num" and right[1][0] != "-":
        return ("num", "-" + right[1])
    return (*left, right) if left[0] == "*" else ("*", left, right)  # flat: a long product does not nest


class Parser:
    """Recursive descent over the tokens of one answer, with precedence climbing for the binary operators of LEVEL."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.depth = tokens[::-1], 0

    def take(self, *tokens: str) -> str:
        """The next token, consumed, if it is one of these; else ""."""
        return self.tokens.pop() if self.tokens[-1] in tokens else ""

    def answer(self, *end: str) -> Node:
        """What stands before `end`: one expression, or the ("list", ...) or ("or", ...) of several."""
        parts, kind = [], "list"
        while self.tokens[-1] not in (*end, ""):
            parts.append(self.expression())
            if not (separators := list(iter(lambda: self.take(",", ";", "and", "or"), ""))):
                break
            kind = "or" if "or" in separators else kind
        if self.tokens[-1] not in (end or ("",)):
            raise ParseError(f"left over: {self.tokens[-1]!r}")
        self.closed_by = self.tokens.pop()
        return parts[0] if len(parts) == 1 else (kind, *parts)

    def expression(self, level: int = 1) -> Node:
        """Operands joined by operators that bind at least as tightly as `level`."""
        left = self.operand()
        while True:
            token = self.tokens[-1]
            if token[:1] == '"' and level <= UNIT_LEVEL and (unit := unit_of(token[1:-1])):
                self.tokens.pop()
                unit += "^" + str(self.operand()[1]) if self.take("^") else ""
                left, token = ("%", left) if unit == "percent" else ("unit", left, unit), self.tokens[-1]
            implicit = re.match(r"[\w({\[ℝ]|\\begin", token) and token not in ("and", "or")
            op = "*" if implicit else token
            if LEVEL.get(op, 0) < level:
                return left
            if implicit and token[0].isdigit():
                raise ParseError("two numbers side by side")
            right = self.expression(LEVEL[op if implicit else self.tokens.pop()] + 1)
            if LEVEL[op] == 1:
                signs, *parts = left[1:] if left[0] == "chain" else ("", left)
                left = ("chain", f"{signs} {op}".strip(), *parts, right)
            elif op in "*/":
                left = times(left, right if op == "*" else ("^", right, MINUS_ONE))
            else:
                op, right = ("+", times(MINUS_ONE, right)) if op == "-" else (op, right)
                left = (*left, right) if left[0] == op else (op, left, right)

    def operand(self) -> Node:
        """Signs, one atom, and what is attached to it."""
        depth = self.depth
        self.deeper()
        if sign := self.take("+", "-"):
            node = times(MINUS_ONE, self.operand()) if sign == "-" else self.operand()
        else:
            node = self.atom()
        while not sign and (mark := self.take("^", "**", "!", "!!", "%", "°", "'", "_")):
            self.deeper()
            if mark in ("^", "**"):
                node = ("^", node, self.operand())
            elif mark in "°%":
                node = ("%", node) if mark == "%" else ("unit", node, "degree")
            elif mark == "_":
                node = ("call", "index", node, self.atom())
            else:
                node = ("call", {"!": "factorial", "!!": "fac2", "'": "prime"}[mark], node)
        self.depth = depth
        return node

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")

    def atom(self) -> Node:
        token = self.tokens.pop() or "the end"
        if re.match(r"\.?[0-9]", token):
            return ("base", *re.sub("[{}]", "", token).split("_")) if "_" in token else ("num", token)
        if token[0] == '"':
            return ("text", token[1:-1])
        if token in ("(", "[", "{", "\\{"):
            node = self.answer(*{"{": "}", "\\{": ["\\}"]}.get(token, ")]"))
            if token in "([" and node[0] == "list":
                return ("tuple", token + self.closed_by, *node[1:])
            return ("list", node) if token == "\\{" and node[0] != "list" else node
        if token.startswith("\\begin"):
            return self.environment(token.replace("begin", "end"))
        if token in FUNCTIONS:
            self.deeper()  # \sqrt\sqrt2 nests without a bracket
            node, self.depth = self.function(token), self.depth - 1
            return node
        if not re.fullmatch(r"[A-Za-zℝ]+", token) or token in ("and", "or", "the end"):
            raise ParseError(f"expected a value, found {token!r}")
        if token in "fghFGH" and self.take("("):
            return ("call", "apply", ("name", token), self.answer(")"))
        return ("name", token)

    def environment(self, end: str) -> Node:
        """A matrix as ("matrix", ("row", ...), ...); the lines of `cases` or `aligned` as a list."""
        rows: list[Node] = []
        while not self.take(end):
            rows.append(("row", self.expression()))
            while self.take("&"):
                rows[-1] += (self.expression(),)
            if not self.take("\\\\") and self.tokens[-1] != end:
                raise ParseError("a matrix that is not closed")
        return ("matrix", *rows) if "matrix" in end or "array" in end else ("list", *(row[1] for row in rows))

    def function(self, name: str) -> Node:
        if name == "frac":
            return times(self.atom(), ("^", self.atom(), MINUS_ONE))
        if name == "binom":
            return ("call", "binomial", self.atom(), self.atom())
        if name == "sqrt":
            degree = self.answer("]") if self.take("[") else ("num", "2")
            return ("call", "root", self.atom(), degree)
        below = self.atom() if self.take("_") else None
        above = self.operand() if self.take("^") else None
        if name in ("sum", "prod", "int", "lim"):  # an unknown function of its parts
            return ("call", name, below or MINUS_ONE, above or MINUS_ONE, self.expression(LEVEL["*"]))
        bracketed = self.tokens[-1] in ("(", "{", "[")
        argument = self.atom() if bracketed else self.operand()
        while not bracketed and self.tokens[-1][:1].isalnum() and self.tokens[-1] not in FUNCTIONS | {"and", "or"}:
            argument = times(argument, self.operand())  # `\\sin 2\\pi x`: up to a sign, another function or a bracket
        name, above = ("a" + name, None) if above == MINUS_ONE else (name.replace("arc", "a"), above)
        node = ("call", "log" if name in ("ln", "lg") else name, argument)
        if below or name == "lg":
            node = times(node, ("^", ("call", "log", below or ("num", "10")), MINUS_ONE))
        return ("^", node, above) if above else node


def members(node: Node) -> tuple[Node, ...]:
    return node[1:] if node[0] in ("list", "or") else () if node == ("name", "emptyset") else (node,)


def read(text: str, loose: bool = True) -> Node:
    """The tree of an answer, ("text", words) if it is words; ± as the list of all that it may stand for."""
    bare = text.rstrip(".,; \t\r\n")
    tokens = tokenise(text[: len(bare) + bare.endswith("\\")], loose)  # `\,` is one
    if all(token[:1] in ('"', ",", "") for token in tokens):
        return ("text", " ".join(tokens))
    signs = [k for k, token in enumerate(tokens) if token in ("±", "∓")]
    if len(signs) > 4:
        raise ParseError("too many signs ±")
    nodes = []
    for choice in itertools.product("+-", repeat=len(signs)):
        if "∓" not in tokens or len({(s == "+") == (tokens[k] == "±") for k, s in zip(signs, choice)}) == 1:
            chosen = dict(zip(signs, choice))  # with a ∓, all signs change together
            nodes.append(Parser([chosen.get(k, token) for k, token in enumerate(tokens)]).answer())
    return nodes[0] if len(nodes) == 1 else ("list", *(m for node in nodes for m in members(node)))


def walk(node: Node | str) -> list[Node]:
    return [node, *(part for child in node[1:] for part in walk(child))] if isinstance(node, tuple) else []


def names(*nodes: Node) -> set[str]:
    found = {part[1] for node in nodes for part in walk(node) if part[0] == "name"}
    return found - {"pi", "e", "i", "infty", "emptyset", "ℝ"}


def is_label(node: Node) -> bool:
    """May this stand for the value on the other side: x, a_2, f(2), P(x), AB, |AB|, a:b, (x, y)?"""
    match node:
        case ("text", word):
            return word.isalpha()
        case ("name", _):
            return bool(names(node))
        case ("call", "index" | "apply" | "prime", *_):
            return True
        case ("tuple", _, *parts) | (":", *parts) | ("call", "abs", *parts):
            return all(map(is_label, parts))
        case ("*", ("name", first), *parts):  # AB/CD, too
            parts = [part[1] if part[0] == "^" and part[2] == MINUS_ONE else part for part in parts]
            return (first.isupper() or len(first) > 1) and all(map(is_label, parts))
    return False


def relations(node: Node) -> list[Node]:
    """The chain a < b >= c as relations that point one way: a < b, c <= b."""
    pairs = zip(node[1].split(), node[2:], node[3:])
    return [("chain", s.replace(">", "<"), *((b, a) if ">" in s else (a, b))) for s, a, b in pairs]


def show(node: Node | str) -> str:
    """A tree in prefix notation: +(1, ^(2, -1))."""
    if isinstance(node, str) or node[0] in ("num", "name", "text"):
        return node if isinstance(node, str) else node[1]
    return f"{node[0]}({', '.join(map(show, node[1:]))})"


# ------------------------------------------------------------------------------------------------ values


class Evaluator:
    """The values of trees at numbered sample points, within one budget of steps and of time."""

    def __init__(self, digits: int, deadline: float):
        self.mp, self.digits, self.deadline = mpmath.mp.clone(), digits, deadline
        self.work, self.point, self.real, self.known, self.memo = 0, 0, False, {}, {}
        self.compute = {
            "num": Fraction,
            "base": lambda digits, base: Fraction(int(digits, int(base))),
            "unit": lambda x, unit: x * (self.mp.pi / 180 if unit == "degree" else 1),
            "%": lambda x: x / 100,
            "+": lambda *terms: sum(terms),
            "*": lambda *factors: math.prod(factors),
            ":": operator.truediv,
            "^": self.power,
            "call": self.call,
        }

    def at(self, node: Node, point: int = 0, real: bool = False, precision: int = 1, **known):
        """The value of a tree, names drawn from the sample of that number. `real`: Undefined outside of the reals."""
        self.mp.dps, self.point, self.real, self.known = precision * self.digits, point, real, known
        key = (node, point, real, precision, *known.values())
        try:
            self.memo[key] = self.memo[key] if key in self.memo else self.value(node)
            return self.memo[key]
        except (ArithmeticError, ValueError, TypeError, NotImplementedError, KeyError) as error:
            raise Undefined(str(error)) from None

    def value(self, node: Node):
        self.work += 1
        if self.work > MAX_WORK:
            raise ParseError("too much to compute")
        if time.thread_time() > self.deadline:
            raise TimeoutError
        op, *children = node
        if op == "name":
            x = self.name(*children)
        elif op == "*" and len(children) == 2 and children[0] == MINUS_ONE:  # of infinity, too
            x = -self.value(children[1])
        elif op == "frozen":  # the value at point 0, whatever the point
            point, self.point = self.point, 0
            x, self.point = self.value(*children), point
        elif op == "call" and children[0] in ("apply", "index", "prime", "sum", "prod", "int", "lim"):
            x = self.unknown(*children)
        else:
            values = [child if isinstance(child, str) else self.value(child) for child in children]
            if self.mp.inf in values or -self.mp.inf in values:
                raise Undefined("infinity is not a number")
            if not all(isinstance(x, Fraction | str) for x in values):
                values = [x if isinstance(x, str) else self.mp.convert(x) for x in values]
            x = self.compute[op](*values)
        if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() <= MAX_BITS:
            return x
        x = self.mp.convert(x)
        if self.mp.isnan(x) or (self.real and isinstance(x, self.mp.mpc)):
            raise Undefined("no real number")
        if x and self.mp.isfinite(x) and abs(self.mp.mag(x)) > MAX_LOG:
            raise Undefined("too large to be compared")
        return x

    def name(self, name: str):
        constants = {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.j, "infty": self.mp.inf, **self.known}
        if name in constants or name in ("ℝ", "emptyset"):
            return constants[name]
        low, high = RANGES[self.point]
        return low + (high - low) * self.hash(name, self.point)

    def hash(self, *key) -> Fraction:
        return Fraction(int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16) % 9_973 + 1, 9_974)

    def unknown(self, *parts: Node | str) -> Fraction:
        """f(x), a_n, a sum: a number that depends on the parts' values alone (on their form, where they have none)."""
        key = []
        for part in parts:
            try:
                key.append(part if isinstance(part, str) else self.mp.nstr(self.mp.convert(self.value(part)), 25))
            except (Undefined, KeyError, TypeError):
                key.append(part)
        return self.hash(*key)

    def power(self, base, exponent):
        if base == 0 and exponent == 0:
            raise Undefined("0^0")
        whole = isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
        if whole and abs(exponent) * (base.numerator.bit_length() + base.denominator.bit_length()) <= MAX_BITS:
            return base**exponent.numerator
        base, exponent = self.mp.convert(base), self.mp.convert(exponent)
        if base and abs(exponent * self.mp.log(abs(base), 2)) > MAX_LOG:
            raise Undefined("too large to be compared")
        return self.mp.power(base, exponent)

    def call(self, function: str, x, degree=None):
        if function == "abs":
            return abs(x)
        if function == "root":
            odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2 == 1
            negative = odd and not isinstance(x, self.mp.mpc) and x < 0
            return -self.power(-x, 1 / degree) if negative else self.power(x, 1 / degree)
        arguments = [self.mp.convert(value) for value in (x, degree) if value is not None]
        if function != "log" and any(self.mp.mag(value) > 16 for value in arguments):
            raise Undefined(f"{function} of a large number")
        if function == "factorial" and isinstance(x, Fraction) and x.denominator == 1 and 0 <= x < 2000:
            return Fraction(math.factorial(x.numerator))
        self.work += self.mp.dps // 2  # a function costs as much as many sums, the more the more digits
        return getattr(self.mp, function)(*arguments)


# ------------------------------------------------------------------------------------------------ plain arithmetic


def exact_arithmetic(text: str, operators: str = "+-*") -> tuple[Fraction, list[int]]:
    r"""Value and numbers (in order) of whole numbers joined by these binary operators and brackets; else ParseError.

    LaTeX's spellings are read where their operator is allowed; `2**3`, `7//2`, `-3`, `2(3)`, `2 3` never are.
    """
    tokens = tokenise(text, loose=False)[:-1]
    numbers = [int(token) for token in tokens if re.fullmatch("[0-9]{1,12}", token)]
    shape = "".join("n" if re.fullmatch("[0-9]{1,12}", t) else "o" if t in operators else t[:1] for t in tokens)
    smallest = r"\(n\)|non" + r"|f\{n\}\{n\}" * ("/" in operators)
    while (smaller := re.sub(smallest, "n", shape)) != shape:
        shape = smaller
    if shape != "n":
        raise ParseError(f"not just whole numbers, brackets and {operators}")
    try:
        return exact(Parser([*tokens, ""]).answer()), numbers
    except ZeroDivisionError:
        raise ParseError("division by zero") from None


def exact(node: Node) -> Fraction:
    match node:
        case ("num", text):
            return Fraction(text)
        case ("+", *terms):
            return sum(map(exact, terms))
        case ("*", *factors):
            return math.prod(map(exact, factors))
        case ("^", inner, ("num", "-1")):
            return 1 / exact(inner)
    raise ParseError(f"{node[0]} is not arithmetic")
