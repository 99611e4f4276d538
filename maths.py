r"""Tokens into a tree: the grammar of an answer, strictly.

    1 \frac12 \text{ cm} shows as unit(+(1, *(1, ^(2, -1))), cm)

A command that is not known, or words where a value should be, are a ParseError: such an answer is
not read, and then compared only token by token, in order.

A tree is a tuple ("op", child, ...). Leaves: ("num", "1.50"), ("name", "x"), ("text", "even"),
("base", "101", "2"). Inner nodes: "+", "*", "^" (a - b is a + -1*b, a/b is a * b^-1), "call" (of a
function, or of what is only compared: "index", "apply", "mark"), "unit", "%", ":" (a ratio or
time), "mod", "tuple" (with its brackets), "list", "or", "matrix" of "row"s, "cases" of "row"s,
"chain" (of relations, with their signs), and "∪", "∩", "∖".
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from latex import (
    FUNCTIONS,
    LISTED,
    MARKS,
    OPERATORS,
    RELATIONS,
    ParseError,
    Token,
    literal,
    plain_words,
)
from units import CURRENCIES, SCALES, known_unit, read_unit, spell, unit_of

MAX_DEPTH, MAX_NODES = 25, 500  # of brackets; of a product of matrices
MAX_READ = 4_000  # tokens of all that a ± may stand for

Node = tuple  # ("op", child, ...); the children of leaves are strings

# How tightly operators bind.
LEVEL = dict.fromkeys(RELATIONS, 1) | {"mod": 2, "∪": 3, "∩": 3, "∖": 3, ":": 4}
LEVEL |= {"+": 5, "-": 5, "*": 6, "×": 6, "/": 6}
UNIT_LEVEL = 4  # `2 + 3 \text{ cm}` is 5 cm
MINUS_ONE = ("num", "-1")
END = Token("end", "")

CONSTANTS = {"pi", "e", "i", "infty", "emptyset", "ldots", *"ℝℤℕℚℂ"}
OF_LETTERS = {"angle", "measuredangle", "triangle", "square", "odot"}  # marks of several letters
# where & says only where lines meet
ALIGNED = {
    "aligned",
    "align",
    "gathered",
    "split",
    "eqnarray",
}
EMPTY, REALS = ("name", "emptyset"), ("name", "ℝ")
NOT_THERE, NO_END = ("text", "doe not exist"), ("text", "infinitely many")
_none = """no solution; no real solution; empty set; no solution exist; there exist no solution;
    there is no solution; there are no solution; there is no real solution; there are no real
    solution"""
MEANINGS = {" ".join(phrase.split()): EMPTY for phrase in _none.split(";")}
MEANINGS |= {"dne": NOT_THERE, "limit doe not exist": NOT_THERE}
MEANINGS |= {"infinitely many solution": NO_END, "there are infinitely many solution": NO_END}
MEANINGS |= {"all real number": REALS, "all real": REALS, "infinity": ("name", "infty")}
INFIX = ("over", "choose")  # TeX's {a \over b}
TRANSPOSE = (("name", "T"), ("name", "top"), ("text", "top"))


# ---------------------------------------------------------------------------- trees


def walk(node: Node | str) -> Iterator[Node]:
    """The node and all nodes below it."""
    if isinstance(node, tuple):
        yield node
        for child in node[1:]:
            yield from walk(child)


def names(*nodes: Node) -> set[str]:
    """The variables of some trees."""
    found = set()
    for node in nodes:
        found |= {part[1] for part in walk(node) if part[0] == "name"}
    return found - CONSTANTS


def members(node: Node) -> tuple[Node, ...]:
    """Of a list or set; of anything else, itself."""
    if node[0] in ("list", "or"):
        return node[1:]
    return () if node == ("name", "emptyset") else (node,)


def substitute(node: Node, part: Node, other: Node) -> Node:
    """The tree with `other` wherever `part` stands."""
    if node == part:
        return other
    replaced = (substitute(x, part, other) if isinstance(x, tuple) else x for x in node)
    return tuple(replaced)


def fixed(node: Node, point: dict[str, Fraction]) -> Node:
    """The tree with the names of a point replaced by their values."""
    if node[0] == "name":
        if node[1] in point:
            return ("num", str(point[node[1]]))
        return node
    return tuple(fixed(child, point) if isinstance(child, tuple) else child for child in node)


def show(node: Node | str) -> str:
    """A tree in prefix notation: +(1, ^(2, -1))."""
    if isinstance(node, str):
        return node
    if node[0] in ("num", "name", "text"):
        return node[1]
    return f"{node[0]}({', '.join(map(show, node[1:]))})"


def times(left: Node, right: Node) -> Node:
    """The product; a scalar goes into the cells of a matrix, a sign into a number."""
    if left[0] == right[0] == "matrix":
        return matrix_product(left, right)
    if right[0] == "matrix":
        return each_cell(right, lambda cell: times(left, cell))
    if left[0] == "matrix":
        return each_cell(left, lambda cell: times(right, cell))
    if left == MINUS_ONE and right[0] == "num" and right[1][0] != "-":
        return ("num", "-" + right[1])
    if left[0] == "*":  # flat: a long product does not nest
        return (*left, right)
    return ("*", left, right)


def minus(left: Node, right: Node) -> Node:
    return ("+", left, times(MINUS_ONE, right))


def over(above: Node, below: Node) -> Node:
    return times(above, ("^", below, MINUS_ONE))


def matrix(rows: list) -> Node:
    return ("matrix", *(("row", *cells) for cells in rows))


def each_cell(node: Node, change: Callable[[Node], Node]) -> Node:
    return matrix([map(change, row[1:]) for row in node[1:]])


def transposed(node: Node) -> Node:
    """Of a matrix; of a tuple, the column."""
    if node[0] == "tuple":
        return matrix([(cell,) for cell in node[2:]])
    return matrix(list(zip(*(row[1:] for row in node[1:]))))


def matrix_sum(left: Node, right: Node) -> Node:
    rows = []
    for above, below in zip(left[1:], right[1:]):
        if len(above) != len(below):
            raise ParseError("matrices that have no sum")
        rows.append([("+", a, b) for a, b in zip(above[1:], below[1:])])
    return matrix(rows)


def matrix_product(left: Node, right: Node) -> Node:
    columns = transposed(right)[1:]
    if any(len(row) != len(right) for row in left[1:]):
        raise ParseError("matrices that have no product")
    rows = []
    for row in left[1:]:
        rows.append([computed(("+", *map(times, row[1:], column[1:]))) for column in columns])
    product = matrix(rows)
    if sum(1 for _ in walk(product)) > MAX_NODES:
        raise ParseError("a large product of matrices")
    return product


def computed(node: Node) -> Node:
    """A cell that is plain arithmetic as its number, so that powers of matrices do not grow."""
    try:
        value = exact(node)
    except (ParseError, ZeroDivisionError):
        return node
    if value.denominator < 10**50 and abs(value) < 10**50:
        return ("num", str(value))
    return node


# ---------------------------------------------------------------------------- grammar


class Parser:
    """Recursive descent over the tokens of one answer; precedence climbing for the operators.

    `functions`: names that are applied somewhere in the two answers, so that P(0) and P(x + 1) are
    no products.
    """

    def __init__(self, tokens: list[Token], functions: set[str]):
        self.tokens, self.functions = [*tokens, END, END, END], functions
        self.at, self.depth, self.bars, self.closed_by = 0, 0, 0, ""

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def sees(self, *texts: str, ahead: int = 0) -> bool:
        token = self.tokens[min(self.at + ahead, len(self.tokens) - 1)]
        return token.kind in ("op", "command") and token.text in texts

    def take(self, *texts: str) -> str:
        """The next token, consumed, if it is one of these operators or commands; else ""."""
        if not self.sees(*texts):
            return ""
        self.at += 1
        return self.tokens[self.at - 1].text

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")

    def answer(self, *end: str, first: Node | None = None) -> Node:
        """All up to the bracket `end`, or to the last token: one expression, or several.

        Commas and "and" make a "list", which has no order, "or" makes an "or"; semicolons and dots
        ("1, 2, ..., n") make a "tuple", which has one.
        """
        parts, separators = [], set()
        while first or (not self.sees(*end) and self.token != END):
            parts.append(self.continued(first, 1) if first else self.expression())
            first = None
            found = list(iter(lambda: self.take(",", ";", "and", "or"), ""))
            separators.update(found)
            if not found:
                break
        closed = self.sees(*end) if end else self.token == END
        if not closed:
            raise ParseError(f"left over: {self.token.text!r}")
        self.closed_by = self.token.text
        self.at += bool(end)
        if len(parts) == 1 and not separators:
            return parts[0]
        if ";" in separators or ("name", "ldots") in parts:
            return ("tuple", ";", *parts)
        if len(parts) == 1:
            return parts[0]
        return ("or" if "or" in separators else "list", *parts)

    def expression(self, level: int = 1) -> Node:
        """Operands joined by operators that bind at least as tightly as `level`."""
        return self.continued(self.operand(), level)

    def continued(self, left: Node, level: int) -> Node:
        """The expression that begins with an operand that was read already."""
        last = left
        while True:
            if level <= UNIT_LEVEL:
                left = self.measured(left)
            op, implicit = self.operator()
            of_unit = op in ("*", "/", "×") and not implicit and self.unit_ahead()
            if LEVEL.get(op, 0) < level or of_unit:
                return left
            if implicit and self.token.kind == "num" and last[0] == "num":
                raise ParseError("two numbers side by side")
            self.at += not implicit
            if op == "mod":
                left = self.modulus(left)
                continue
            right = last = self.expression(LEVEL[op] + 1)
            left = self.join(op, left, right)

    def operator(self) -> tuple[str, bool]:
        """The operator that stands here; "*" and True for a product without a sign."""
        if self.sees("(") and self.sees("mod", ahead=1):
            return "mod", False
        if self.starts_factor():
            return "*", True
        if self.sees("|") and self.bars == 0:
            return "∣", False
        return (self.token.text if self.token.kind == "op" else ""), False

    def join(self, op: str, left: Node, right: Node) -> Node:
        """The node of two operands; relations side by side make one chain."""
        if LEVEL[op] == 1:
            signs, *parts = left[1:] if left[0] == "chain" else ("", left)
            return ("chain", f"{signs} {op}".strip(), *parts, right)
        if op == "×" and (is_vector(left) or is_vector(right)):
            if left[:2] == ("call", "cross"):
                raise ParseError("a product of three vectors")
            return ("call", "cross", left, right)
        if op in ("*", "×"):
            return times(left, right)
        if op == "/":
            return over(left, right)
        if op == "-":
            op, right = "+", times(MINUS_ONE, right)
        if op == "+" and left[0] == right[0] == "matrix" and len(left) == len(right):
            return matrix_sum(left, right)
        node = (*left, right) if left[0] == op else (op, left, right)
        if op in ("∪", "∩"):  # have no order
            return (op, *sorted(node[1:], key=repr))
        return node

    def starts_factor(self) -> bool:
        """Does another factor stand here without a sign, as in 2x, (x-1)3, n!2^n, 2|x|?"""
        kind, text, _ = self.token
        if kind == "word":
            return len(text) == 1 and not known_unit(text)
        if kind == "op" and text == "|":
            later = [token.text for token in self.tokens[self.at + 1 :]]
            return self.bars == 0 and "|" in later
        if kind == "op":
            return text in ("(", "[", "{", "⌊", "⌈") or ("matrix" in text and "begin" in text)
        return kind in ("num", "name", "command", "base") and text not in INFIX

    def modulus(self, left: Node) -> Node:
        """7 (mod 12), \\pmod{12} and \\pmod 12 are the same."""
        bracketed = self.sees("mod")
        self.at += bracketed
        if left[0] == "mod":
            raise ParseError("two moduli")
        node = ("mod", left, self.expression(LEVEL["mod"] + 1))
        if bracketed and not self.take(")"):
            raise ParseError("a modulus that is not closed")
        return node

    # ---- units

    def unit_ahead(self) -> bool:
        """Is the word behind the next sign * or / a unit?"""
        _, token, behind = self.tokens[self.at : self.at + 3]
        return token.kind == "word" and behind.text != "_" and unit_of(token.text) is not None

    def measured(self, node: Node) -> Node:
        """The node with the unit, percent sign in words, or "million" that stands behind it."""
        node = self.scaled(node)
        unit, self.at = read_unit(self.tokens, self.at)
        if unit == [("percent", 1)]:
            return ("%", node)
        if unit and node[0] == "unit":  # $15 per hour
            node = ("unit", node[1], spell([(node[2], 1), *unit]))
        elif unit:
            node = ("unit", node, spell(unit))
        if node[0] == "unit" and self.token.kind == "num":
            return self.compound(node)
        return node

    def scaled(self, node: Node) -> Node:
        """5 million, $5 million, 5 hundred thousand: a number times what stands behind it."""
        word = self.token.text.lower() if self.token.kind == "word" else ""
        scale = SCALES.get(word) or SCALES.get(word.removesuffix("s"))
        if not scale or names(node) or node[0] not in ("num", "*", "unit"):
            return node
        if node[0] == "unit":
            return ("unit", self.scaled(node[1]), node[2])
        self.at += 1
        return self.scaled(times(node, ("num", scale)))

    def compound(self, first: Node) -> Node:
        """5 ft 8 in: quantities in a row."""
        self.deeper()
        rest = self.expression(UNIT_LEVEL)
        self.depth -= 1
        if rest[0] == "unit":
            return ("tuple", "+", first, rest)
        if rest[:2] == ("tuple", "+"):
            return ("tuple", "+", first, *rest[2:])
        raise ParseError("a number behind a unit")

    # ---- operands

    def operand(self) -> Node:
        """Signs, one atom, and what is attached to it: powers, indices, arguments, !, %, °."""
        depth = self.depth
        self.deeper()
        sign = self.take("+", "-")
        if sign:
            node = self.operand()
            if sign == "-" and node[0] == "unit":
                node = ("unit", times(MINUS_ONE, node[1]), node[2])
            elif sign == "-":
                node = times(MINUS_ONE, node)
        else:
            node = self.attached(self.atom())
        self.depth = depth
        return node

    def attached(self, node: Node) -> Node:
        """The atom with what stands behind it: x^2, a_n, 5!, 50 %, 30°, f', f(x)."""
        node = self.applied(node)
        while mark := self.take("^", "!", "!!", "%", "°", "'", "_"):
            self.deeper()
            if mark == "^":
                node = self.raised(node, self.exponent())
            elif mark == "_":
                node = self.indexed(node, self.script())
            elif mark == "%":
                node = ("%", node)
            elif mark == "°":
                node = self.degrees(node)
            else:
                node = ("call", {"!": "factorial", "!!": "fac2", "'": "prime"}[mark], node)
            node = self.applied(combination(node))
        return combination(node)

    def exponent(self) -> Node:
        """One atom with its signs, as LaTeX has it; 2^2^2 from the right, as programmers do."""
        if sign := self.take("+", "-"):
            self.deeper()
            node = self.exponent()
            return times(MINUS_ONE, node) if sign == "-" else node
        node = self.script()
        if self.take("^"):
            self.deeper()
            node = ("^", node, self.exponent())
        return node

    def script(self) -> Node:
        """What stands in an index or exponent; commands there are a label: A_{\\max}."""
        if self.token.kind == "command" and self.token.text in LISTED | {"lim", "int"}:
            self.at += 1
            return ("text", self.tokens[self.at - 1].text)
        braced = self.sees("{") and self.sees("}", ahead=2)
        if braced and self.tokens[self.at + 1].kind == "command":
            self.at += 3
            return ("text", self.tokens[self.at - 2].text)
        if self.take("*"):
            return ("text", "*")
        if self.token.kind == "num":  # \log_3 \frac23 has no mixed number
            self.at += 1
            return ("num", self.tokens[self.at - 1].text)
        return self.atom()

    def raised(self, base: Node, exponent: Node) -> Node:
        if exponent in TRANSPOSE and base[0] in ("matrix", "tuple"):
            return transposed(base)
        if base[0] == "matrix" and exponent[0] == "num" and exponent[1] in map(str, range(1, 13)):
            return functools.reduce(times, [base] * int(exponent[1]))
        return ("^", base, exponent)

    def indexed(self, base: Node, index: Node) -> Node:
        """x_2; x^2_2 as x_2^2; 52_8 in base 8."""
        if base[0] == "^":
            return ("^", self.indexed(base[1], index), base[2])
        if base[0] in ("num", "base") and index[0] == "num":
            return ("base", base[1], index[1])
        if base[0] not in ("name", "text", "call"):
            raise ParseError("an index of what is no name")
        if base[0] == "name" and index[0] in ("num", "text"):  # x_1 is a name of its own
            return ("name", f"{base[1]}_{index[1]}")
        return ("call", "index", base, index)

    def degrees(self, node: Node) -> Node:
        """30°, 63°45'30'' as degrees, 20 °C as a unit."""
        scale = self.token
        if scale.kind in ("word", "name") and scale.text in ("C", "F"):
            self.at += 1
            return ("unit", node, "°" + scale.text)
        for marks, parts in ((1, "60"), (2, "3600")):  # minutes, seconds
            marked = all(self.sees("'", '"', ahead=k) for k in range(1, marks + 1))
            if self.token.kind == "num" and marked:
                node = ("+", node, over(("num", self.token.text), ("num", parts)))
                self.at += 1 + marks
        return ("unit", node, "degree")

    def applied(self, node: Node) -> Node:
        """f(x), f_n(x), f'(x), f^{-1}(x), P(A|B), E[X]: a function of its arguments."""
        if node[0] == "chain" and node[1] == "∘" and self.sees("("):  # (f ∘ g)(x) is f(g(x))
            inner = self.atom()
            for function in node[:1:-1]:
                inner = ("call", "apply", function, inner)
            return inner
        if not self.sees("(", "["):
            return node
        base = node[1] if node[0] == "^" and node[2] == MINUS_ONE else node
        while base[0] == "call" and base[1] in ("index", "prime"):
            base = base[2]
        if self.sees("["):  # E[X]
            known = base[0] == "name" and re.fullmatch("[A-Z]", base[1])
        elif base[0] == "name":
            known = base[1].partition("_")[0] in self.functions
        else:
            known = base[0] == "text" or base[:2] == ("call", "apply")  # f(x)(y)
        if not known:
            return node
        function = ("call", "inverse", base) if node[0] == "^" else node
        closing = ")" if self.take("(") else "]" * bool(self.take("["))
        arguments = members(self.answer(closing))
        if function == ("name", "Gamma") and len(arguments) == 1:
            return ("call", "factorial", minus(arguments[0], ("num", "1")))
        if function == ("name", "zeta") and arguments[0][0] == "num":
            return ("call", "zeta", *arguments)
        self.deeper()
        return self.applied(("call", "apply", function, *arguments))

    def atom(self) -> Node:
        """What needs nothing beside it: a number, a name, words, a bracket, a function, a mark."""
        token = self.token
        self.at += 1
        if token.kind == "num":
            return self.number(token)
        if token.kind == "base":
            return ("base", token.text, "16")
        if token.kind == "cash":
            return ("unit", self.attached(self.atom()), token.text)
        if token.kind == "word":
            return self.words(token)
        if token.kind == "name":
            return ("name", token.text)
        if token.text in ("(", "[", "{", "\\{"):
            return self.bracket(token.text)
        if token.text == "|":
            return self.between_bars()
        if token.text in ("⌊", "⌈"):
            closing, function = ("⌋", "floor") if token.text == "⌊" else ("⌉", "ceil")
            return ("call", function, self.answer(closing))
        if token.text.startswith("\\begin"):
            return self.environment(token.text)
        if token.kind == "command" and token.text in OPERATORS:
            operator = ("text", token.text.lower())
            if self.sees("(", "["):
                return operator
            return ("call", "apply", operator, self.operand())
        if token.kind == "command" and token.text in MARKS:
            return self.mark(token.text)
        if token.kind == "command" and token.text in FUNCTIONS:
            self.deeper()  # \sqrt\sqrt2 nests without a bracket
            node, self.depth = self.function(token.text), self.depth - 1
            return node
        raise ParseError(f"expected a value, found {token.text or 'the end'!r}")

    def between_bars(self) -> Node:
        """|x|, ||x| - 1|, and the determinant of a matrix: where a value should be, a bar opens."""
        self.deeper()
        self.bars += 1
        node = self.expression()
        self.bars -= 1
        self.depth -= 1
        if not self.take("|"):
            raise ParseError("a bar that is not closed")
        return ("call", "det" if node[0] == "matrix" else "abs", node)

    def number(self, token: Token) -> Node:
        """A number; a mixed one, if a fraction of whole numbers follows: 1 \\frac12 or 1 1/2."""
        whole = ("num", token.text)
        if not token.text.isdigit():
            return whole
        behind = [token.text for token in self.tokens[self.at : self.at + 7]]
        if self.sees("frac"):
            shape = "".join("0" if text.isdigit() else text[:1] or " " for text in behind)
            written = re.match(r"f(?:0|\{0\})(?:0|\{0\})", shape)
            if written:
                above, below = (text for text in behind[: written.end()] if text.isdigit())
                self.at += written.end()
                return ("+", whole, over(("num", above), ("num", below)))
        elif behind[1] == "/" and behind[0].isdigit() and behind[2].isdigit() and self.token.blank:
            self.at += 3
            return ("+", whole, over(("num", behind[0]), ("num", behind[2])))
        return whole

    def words(self, token: Token) -> Node:
        """Words side by side, as one text; a single letter in \\text is a name."""
        found = [token.text]
        if known_unit(token.text) in CURRENCIES and self.token.kind == "num":  # Rs. 5
            return ("unit", self.atom(), known_unit(token.text))
        if len(token.text) == 1 and self.token.kind != "word":
            return ("name", token.text)
        while self.token.kind == "word":
            found.append(self.token.text)
            self.at += 1
        text = plain_words(found)
        return MEANINGS.get(text, ("text", text))

    def bracket(self, opening: str) -> Node:
        """(1, 2] is a tuple, with its brackets; {1, 2} and \\{1, 2\\} are lists; (x) is x."""
        if opening == "\\{":
            return self.braces()
        if opening == "{" and self.sees("}") and self.sees("^", "_", ahead=1):
            return self.combination_in_front()
        if opening == "{":
            node = self.answer("}", *INFIX)
            if self.closed_by == "}":
                return node
            infix, below = self.closed_by, self.answer("}")
            if infix == "over":
                return over(node, below)
            return ("call", "binomial", node, below)
        bars, self.bars = self.bars, 0
        node = self.answer(")", "]")
        self.bars = bars
        if node[0] == "tuple" and node[1] == ";":
            return ("tuple", opening + self.closed_by, *node[2:])
        if node[0] == "list":
            return ("tuple", opening + self.closed_by, *node[1:])
        if opening + self.closed_by == "[]" and node[0] == "tuple":  # a Python matrix of one row
            return ("tuple", "[]", node)
        return node

    def combination_in_front(self) -> Node:
        """{}^{8}C_{3} and {}_{8}C_{3}."""
        self.at += 2
        above = self.script()
        if self.token.text != "C" or not self.sees("_", ahead=1):
            raise ParseError("an index of nothing")
        self.at += 2
        return ("call", "binomial", above, self.script())

    def braces(self) -> Node:
        """\\{1, 2\\} as a list; \\{x | x > 2\\} as its condition; \\{3k | k > 2\\} as it stands."""
        if self.take("\\}"):
            return ("name", "emptyset")
        if self.token.text.startswith("\\begin"):  # \left\{ before lines: a system, or cases
            self.at += 1
            return self.environment(self.tokens[self.at - 1].text, braced=True)
        left = self.expression(LEVEL[":"] + 1)
        if self.take("∈"):
            left = ("chain", "∈", left, self.expression(LEVEL[":"] + 1))
        if not self.take("∣", "|", ":"):
            node = self.answer("\\}", first=left)
            if node[:2] == ("tuple", ";"):
                return ("list", *node[2:])
            return node if node[0] in ("list", "or") else ("list", node)
        condition = self.answer("\\}")
        real = left[:2] == ("chain", "∈") and left[2][0] == "name" and left[3] == ("name", "ℝ")
        if left[0] == "name" or real:
            return ("list", condition)
        return ("call", "builder", left, condition)

    def mark(self, mark: str) -> Node:
        """\\vec{v}, \\angle ABC, \\overline{AB}: the mark and what it is on, in order, one name."""
        taken = []
        if mark in OF_LETTERS and not self.sees("{"):
            while self.token.kind in ("name", "num") and (not taken or not self.token.blank):
                taken.append(self.token.text)
                self.at += 1
        elif self.take("{"):
            nested = 1
            while nested and self.token != END:
                nested += self.sees("{") - self.sees("}")
                taken.append(self.token.text)
                self.at += 1
            taken = taken[:-1]
        else:
            taken = [self.token.text]
            self.at += self.token != END
        if mark in ("angle", "overline"):  # ABC and CBA are the same
            taken = min(taken, taken[::-1])
        return ("call", "mark", mark, " ".join(taken))

    def environment(self, begin: str, braced: bool = False) -> Node:
        """A matrix; "cases"; the lines of `aligned`, or of cases without conditions, as a list."""
        kind, end = begin[len("\\begin{") : -1].rstrip("*"), begin.replace("begin", "end")
        if kind == "array" and self.take("{"):
            while not self.take("}") and self.token != END:
                self.at += 1
        if kind in ALIGNED:
            self.join_lines(end)
        conditional = kind == "cases" or braced
        rows: list[Node] = []
        self.closed_by = ""
        while self.closed_by != end:
            row = [self.answer("&", "\\\\", end)]
            while self.closed_by == "&":
                row.append(self.condition(end) if conditional else self.answer("&", "\\\\", end))
            # value, condition
            if conditional and row[0][0] == "list" and len(row) == 1 and len(row[0]) == 3:
                row = row[0][1:] if row[0][1][0] != "chain" else row
            if row != [("list",)]:
                rows.append(("row", *row))
        if not rows:
            raise ParseError("nothing between begin and end")
        ragged = len({len(row) for row in rows}) > 1
        if ragged and ("matrix" in kind or (kind == "array" and not braced)):
            raise ParseError("a matrix whose rows differ")
        if kind in ("vmatrix", "Vmatrix"):
            return ("call", "det", ("matrix", *rows))
        if "matrix" in kind or (kind == "array" and not braced):
            return ("matrix", *rows)
        if all(len(row) == 2 for row in rows):
            if len(rows) == 1:
                return rows[0][1]
            return ("list", *(row[1] for row in rows))
        return ("cases", *rows)

    def join_lines(self, end: str) -> None:
        """Drops every &, and the break before a line that goes on with "= 7"."""
        texts = [token.text for token in self.tokens]
        stop = texts.index(end, self.at) if end in texts[self.at :] else len(texts)
        lines = [token for token in self.tokens[self.at : stop] if token.text != "&"]
        kept = []
        for token, following in zip(lines, [*lines[1:], END]):
            if token.text != "\\\\" or following.text not in RELATIONS:
                kept.append(token)
        self.tokens[self.at : stop] = kept

    def condition(self, end: str) -> Node:
        """When a line of `cases` holds: a relation, or words that are compared as they stand."""
        while self.token.kind == "word" and self.token.text.lower() in (
            "if",
            "for",
            "when",
            "where",
        ):
            self.at += 1
        start, state = self.at, (self.at, self.depth, self.bars)
        try:
            return self.answer("&", "\\\\", end)
        except ParseError:
            self.at, self.depth, self.bars = state
        while not self.sees("&", "\\\\", end) and self.token != END:
            self.at += 1
        self.closed_by = self.token.text
        self.at += 1
        return ("text", literal(self.tokens[start : self.at - 1]))

    def function(self, name: str) -> Node:
        """A function with its scripts, \\log_2, \\sin^2, and its argument."""
        if name == "frac":
            return self.fraction()
        if name == "binom":
            return ("call", "binomial", self.digit_or_atom(), self.digit_or_atom())
        if name == "sqrt":
            degree = self.answer("]") if self.take("[") else ("num", "2")
            return ("call", "root", self.atom(), degree)
        if name == "int":
            return self.integral()
        below = self.answer_in_braces() if self.take("_") else None
        above = self.exponent() if self.take("^") else None
        if name in ("sum", "prod", "lim"):
            body = self.expression(LEVEL["*"])
            sign, bound, start = ("→" if name == "lim" else "="), None, None
            if below and below[0] == "chain" and below[1] == sign and len(below) == 4:
                bound, start = below[2:]
            if not bound or bound[0] != "name" or (above is None) != (name == "lim"):
                return ("call", "big " + name, below or MINUS_ONE, above or MINUS_ONE, body)
            return ("call", name, bound, start, *([above] if above else []), body)
        if name in LISTED:
            if below:
                raise ParseError(f"{name} with an index")
            argument = self.atom()
            parts = argument[2:] if argument[0] == "tuple" else members(argument)
            node = ("call", name, *parts)
            return ("^", node, above) if above else node
        argument = self.argument()
        if name == "det":
            return ("call", "det", argument)
        if above == MINUS_ONE and "a" + name in FUNCTIONS:  # sin^{-1} is asin
            name, above = "a" + name, None
        node = ("call", "log" if name == "lg" else name, argument)
        if below or name == "lg":
            node = times(node, ("^", ("call", "log", below or ("num", "10")), MINUS_ONE))
        return ("^", node, above) if above else node

    def answer_in_braces(self) -> Node:
        return self.answer("}") if self.take("{") else self.script()

    def argument(self) -> Node:
        """Of \\sin 2\\pi x: all up to a sign, a bracket or another function."""
        if self.sees("(", "{", "[", "|"):
            return self.atom()
        node = last = self.operand()
        while self.token.kind in ("num", "name") and not last[0] == self.token.kind == "num":
            last = self.operand()
            node = times(node, last)
        return node

    def fraction(self) -> Node:
        """A quotient; dy/dx is a mark, for its d does not cancel."""
        start = self.at
        above, below = self.digit_or_atom(), self.digit_or_atom()
        inside = [token.text for token in self.tokens[start : self.at] if token.text not in "{}"]
        d = ("name", inside[0])
        divided_by_dx = below[0] == "*" and below[1] in (d, ("^", d))
        if inside[0] in ("d", "partial") and inside.count(inside[0]) >= 2 and divided_by_dx:
            return ("call", "mark", "d", " ".join(inside))
        return over(above, below)

    def digit_or_atom(self) -> Node:
        """Without braces, \\frac43 takes one digit at a time."""
        token = self.token
        if token.kind == "num" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.at : self.at + 1] = [
                Token("num", token.text[0]),
                Token("num", token.text[1:]),
            ]
        if self.token.kind != "num":
            return self.atom()
        self.at += 1
        return ("num", self.tokens[self.at - 1].text)

    def integral(self) -> Node:
        """\\int_a^b f dx: f ends at the first d that a name follows, at the depth of the sign."""
        below = self.answer_in_braces() if self.take("_") else None
        above = self.exponent() if self.take("^") else None
        start, nested = self.at, 0
        for end in range(start, len(self.tokens) - 2):
            nested += self.tokens[end].text in ("(", "{", "[") and 1
            nested -= self.tokens[end].text in (")", "}", "]") and 1
            if nested < 0:
                break
            if (
                nested == 0
                and self.tokens[end][:2] == ("name", "d")
                and self.tokens[end + 1].kind == "name"
            ):
                inner = Parser(self.tokens[start:end], self.functions)
                inner.depth = self.depth
                body = inner.answer() if end > start else ("num", "1")
                self.at = end + 2
                bounds = (below, above) if below and above else ()
                return ("call", "int", ("name", self.tokens[end + 1].text), *bounds, body)
        raise ParseError("an integral without its dx")


def is_vector(node: Node) -> bool:
    """What has a cross product."""
    return node[:2] == ("call", "mark") or node == ("name", "nabla")


def combination(node: Node) -> Node:
    """C_{10}^{3} and C(10, 3) as the binomial coefficient that they are."""
    match node:
        case ("^", ("call", "index", ("name", "C"), above), below) if below[0] != "num":
            return ("call", "binomial", above, below)
        case ("^", ("name", name), ("num", below)) if re.fullmatch("C_[0-9]+", name):
            if int(name[2:]) >= Fraction(below):
                return ("call", "binomial", ("num", name[2:]), ("num", below))
        case ("call", "apply", ("name", "C"), ("num", above), ("num", below)):
            if Fraction(above) >= Fraction(below):  # else C is a point
                return ("call", "binomial", ("num", above), ("num", below))
    return node


def applied_names(tokens: list[Token]) -> set[str]:
    """Names with an argument that no product has: P(0), A(1, 2); x(y + 1) may be a product."""
    found = set()
    for k, token in enumerate(tokens[:-2]):
        if token.kind != "name" or token.text in CONSTANTS or tokens[k + 1].text != "(":
            continue
        end = next((j for j in range(k + 2, len(tokens)) if tokens[j].text == ")"), k + 2)
        inside = "".join(
            t.text[0] if t.kind in ("op", "command") else "x" for t in tokens[k + 2 : end]
        )
        if re.fullmatch(r"-?x(?:[,|∣]-?x)*", inside) or re.search("[=<>∣≈≡]", inside):
            found.add(token.text)
    return found


def read(tokens: list[Token], functions: set[str]) -> Node:
    """The tree of an answer; ± as the list of all that it may stand for."""
    signs = [k for k, token in enumerate(tokens) if token.kind == "op" and token.text in ("±", "∓")]
    if len(signs) > 4 or len(tokens) << len(signs) > MAX_READ:
        raise ParseError("too many signs ±")
    nodes = []
    for choice in itertools.product("+-", repeat=len(signs)):
        together = {(sign == "+") == (tokens[k].text == "±") for k, sign in zip(signs, choice)}
        if any(tokens[k].text == "∓" for k in signs) and len(together) == 2:
            continue  # with a ∓, all signs change together
        chosen = list(tokens)
        for k, sign in zip(signs, choice):
            chosen[k] = Token("op", sign)
        nodes.append(Parser(chosen, functions).answer())
    if len(nodes) == 1:
        return nodes[0]
    return ("list", *dict.fromkeys(itertools.chain(*map(members, nodes))))


def exact(node: Node) -> Fraction:
    """The value of plain arithmetic: numbers, +, * and one over; ParseError for anything else."""
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
