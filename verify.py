r"""Is the final answer of a response equal to the reference? The reward, hence the one thing RL optimises.

    python verify.py "so the answer is \boxed{\frac{1}{2}}" "0.5"     # the verdict, and how each side was read
    python verify.py --file pairs.jsonl                               # lines of {"response": ..., "gold": ...}

A response is hostile input: it is whatever a policy found out to be rewarded. So nothing here is evaluated by Python,
sympy or a regular expression that can backtrack. Four steps, each bounded:

1. `last_boxed` takes the answer out of the response.
2. `tokenise` and `Parser` read LaTeX and plain ASCII maths into a tree of plain tuples ("op", child, ...). Length,
   nesting and digits are bounded here. (Not into sympy objects: sympy computes while it builds, 9^{9^9} or a root of a
   1200-bit number included, so that no bound after it helps.)
3. `Evaluator` gives a tree its value at a point: an exact rational where there is one, else a number of 60 digits or
   more. Magnitudes and the number of steps are bounded here.
4. `match` compares by kind. Two expressions are equal if they agree at several points, exactly or to 50 digits relative
   to their size: this finds every equal form without simplifying anything, and cannot be talked into a near miss.

Conventions: the reference decides the form. A unit, currency, degree or % of the reference may be missing in the answer,
a different one is wrong; `x = 3` is 3; parenthesised tuples are ordered, bare lists and braces are sets; decimals are
exact (no rounding, unless a tolerance is given); words left over that are not a unit make the answer wrong.
"""

import atexit
import functools
import hashlib
import itertools
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import mpmath

MAX_CHARS = 2_000  # of an answer; the longest reference of five benchmarks has 59
MAX_DEPTH = 30  # brackets within brackets
MAX_DIGITS = 400  # of one number as written; its exponent is bounded by the same
MAX_BITS = 20_000  # of an exact rational; beyond, a float of known relative precision
MAX_MAGNITUDE = 100_000  # bits before the point of any value: 2^65536 has a value here, 9^{9^9} does not
MAX_WORK = 40_000  # evaluation steps in one verdict, about a second
DIGITS = 60  # working precision; the digits written in the two answers are added to it

Node = tuple  # ("op", child, ...): children are nodes, or strings in the leaves


class ParseError(ValueError):
    """The text is not mathematics that we read, or it is too large to be read safely."""


class Undefined(ArithmeticError):
    """No value at this point: 1/0, the logarithm of a negative number over the reals, a set where a number is needed."""


@dataclass(frozen=True)
class Verdict:
    """What became of one response. Only "correct" is worth a reward; "timeout" says that nothing was decided."""

    outcome: str  # "correct", "wrong", "no_answer" (no box), "unparsed", "timeout"
    answer: str | None = None  # as extracted from the response
    answer_read: str = ""  # how we read it, in prefix notation
    gold_read: str = ""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


# ------------------------------------------------------------------------------------------------- 1. extraction


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; None if there is none, or if it is never closed."""
    start = len(text)
    while (start := text.rfind(r"\boxed", 0, start)) >= 0:
        if opening := re.compile(r"\\boxed\s{0,9}\{").match(text, start):
            break
    else:
        return None
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end(), opening.end() + 50 * MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # an escaped brace is skipped as a pair
        if depth == 0:
            return text[opening.end() : brace.start()].strip()
    return None


def lenient_answer(text: str) -> str | None:
    """For foreign models that do not box: what follows "####" or "answer is", else the last number. Never a reward."""
    tail = text[-5 * MAX_CHARS :]
    named = re.findall(r"(?:####|answer(?: is)?:?)[ *]*([^\n]+)", tail, re.IGNORECASE)
    if named:
        answer = re.split(r"(?<=[^.])\.(?:\s|$)|\*\*", named[-1])[0]
        formula = re.search(r"\$([^$]+)\$|\\\((.+?)\\\)", answer)
        return (formula[1] or formula[2] if formula else answer).strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", tail)
    return numbers[-1].rstrip(",") if numbers else None


def reference_answer(field: str | int | float) -> str:
    r"""The answer in a dataset's field: GSM8K's text before `#### 18`, AMC's 27.0, a solution's \boxed{}, MATH's LaTeX."""
    text = str(field).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    text = last_boxed(text) or text
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


# ------------------------------------------------------------------------------------------------- 2. reading


class Token(NamedTuple):
    kind: str  # "number", "name", "function", "text" (words, mostly units), "op", "end"
    text: str
    spaced: bool = False  # after a blank


FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch asin acos atan "
    "asinh acosh atanh arcsinh arccosh arctanh exp ln log lg sqrt frac binom abs floor ceil overline vec hat bar".split()
)
NAMES = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega infty emptyset ell hbar ldots".split()
)
SYNONYMS = dict(
    pair.split()
    for pair in r"""cdot *,times *,ast *,div /,le <=,leq <=,leqslant <=,ge >=,geq >=,geqslant >=,lt <,gt >,ne !=,neq !=
    pm ±,mp ∓,cup ∪,cap ∩,setminus \,backslash \,in ∈,approx ≈,lbrace \{,rbrace \},langle (,rangle ),lvert |,rvert |
    vert |,mid mid,colon :,land and,wedge and,lor or,vee or,degree °,circ °,prime ',dfrac frac,tfrac frac,cfrac frac
    dbinom binom,tbinom binom,varnothing emptyset,infinity infty,oo infty,dots ldots,cdots ldots,R ℝ,overrightarrow vec
    widehat hat,sum sum,prod prod,lfloor lfloor,rfloor rfloor,lceil lceil,rceil rceil,cases cases""".replace(
        "\n", ","
    ).split(",")
)
CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "′": "'"}
    | {"²": "^2", "³": "^3", "√": r"\sqrt ", "∅": r"\emptyset ", "∞": r"\infty ", "…": r"\ldots ", "\u00a0": " "}
    | {"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega "}
    | {"μ": r"\mu ", "φ": r"\phi ", "γ": r"\gamma ", "δ": r"\delta ", "σ": r"\sigma ", "ρ": r"\rho "}
)
GROUPED = r"(?P<grouped>\d{1,3}(?:(?:,\\!\ *|\{,\}|\\[, ]|,|\ )\d{3})+(?!\d)(?:\.\d+)?)|"  # 1,234 and 1 234
TOKEN = r"""(?P<space>\s+|\\[,;:>!\ ]|~|\$|\\[()\[\]]|\\(?:q?quad|displaystyle|limits|nolimits)(?![A-Za-z])
        |\\(?:left|right)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z]))
    |(?P<text>\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname|boldsymbol)\s*\{(?P<in>[^{}]*)\})
    |(?P<real>\\mathbb\s*\{?R\}?)
    |(?P<environment>\\(?:begin|end)\s*\{\w+\*?\}(?:\{[lcr|]*\})?)
    |(?P<command>\\[A-Za-z]+|\\[{}|%$\\])
    |(?P<number>\d+\.\d*|\.\d+|\d+)
    |(?P<word>[A-Za-z]+)
    |(?P<op><=|>=|!=|==|\*\*|//|[-+*/^_=<>(){}\[\]|,;:!'%&°±∓∪∩∈≈])"""
TOKEN_GROUPED, TOKEN_PLAIN = re.compile(GROUPED + TOKEN, re.VERBOSE), re.compile(TOKEN, re.VERBOSE)
PIECES = re.compile("|".join(sorted(FUNCTIONS | NAMES | {"infinity", "oo"}, key=len, reverse=True)) + "|[A-Za-z]")

UNITS = {  # canonical name -> other names; a plural -s is understood
    "degree": "deg", "dollar": "usd", "cent": "¢", "inch": "in inches", "foot": "ft feet", "mile": "mi",
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "meter": "m metre",
    "gram": "g", "kg": "kilogram", "mg": "milligram", "pound": "lb", "ounce": "oz", "liter": "litre l", "ml": "milliliter",
    "second": "s sec", "minute": "min", "hour": "h hr", "mph": "", "newton": "n", "joule": "j", "watt": "w", "volt": "v",
    "am": "", "pm": "", "percent": "", "square": "sq", "cubic": "cu", "people": "person", "child": "children",
    "man": "men", "woman": "women", "euro": "", "rad": "radian", "unit": "", "day": "", "week": "", "year": "yr",
    "yard": "yd", "gallon": "gal", "month": "", "acre": "", "hertz": "hz", "mole": "mol", "kelvin": "", "celsius": "",
    "fahrenheit": "", "piece": "", "per": "", "of": "",
}  # fmt: skip
ALIASES = {name: unit for unit, others in UNITS.items() for name in (unit, *others.split())}
NOT_COUNTED = set("tens dozens hundreds thousands millions billions times halves sometimes does perhaps lies".split())


def unit_of(phrase: str) -> str | None:
    """The canonical name of a unit such as " square inches" or "km/h"; None if the words are anything else.

    A plural that we do not know ("marbles") is what has been counted. That lets "42 lies" through for 42, not "42 is wrong".
    """
    words = []
    for word in re.findall(r"[^\s,/]+|/", phrase.lower().replace(".", "").replace("/", " / ")):
        name = ALIASES.get(word) or ALIASES.get(word.removesuffix("s")) or ("per" if word == "/" else None)
        if name is None and re.fullmatch(r"[a-z]{2,}[^suia\W]s", word) and word not in NOT_COUNTED:
            name = word[:-1]
        if name is None:
            return None
        words.append(name)
    unit = re.sub(r"\bsquare (\w+)", r"\1^2", " ".join(words))
    return re.sub(r"\bcubic (\w+)", r"\1^3", unit) or None


def tokenise(text: str, grouping: bool = True) -> list[Token]:
    """Tokens of an answer, closed by "end". `grouping`: read 1,234 as one number, outside of brackets at least."""
    if len(text) > MAX_CHARS:
        raise ParseError(f"longer than {MAX_CHARS} characters")
    text = text.translate(CHARACTERS)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", lambda _: "\\", text)  # LaTeX that was escaped once too often
    tokens, position, depth, spaced = [], 0, 0, False
    while position < len(text):
        found = (TOKEN_GROUPED if grouping and depth == 0 else TOKEN_PLAIN).match(text, position)
        if found is None:
            raise ParseError(f"cannot read {text[position : position + 10]!r}")
        kind, lexeme, position = found.lastgroup, found[0], found.end()
        kind = "text" if kind == "in" else kind
        if kind == "space":
            spaced = True
            continue
        follows_value = bool(tokens) and (tokens[-1].kind in ("number", "name") or tokens[-1].text in (")", "}", "%"))
        new = read_lexeme(kind, found["in"] if kind == "text" else lexeme, follows_value)
        depth += sum((t.text in ("(", "[", r"\{")) - (t.text in (")", "]", r"\}")) for t in new)
        tokens += [new[0]._replace(spaced=spaced)] + new[1:] if new else []
        spaced = False
    return [*tokens, Token("end", "")]


def read_lexeme(kind: str, lexeme: str, follows_value: bool) -> list[Token]:
    """The tokens of one piece of source; words are read as functions, names, units, or a product of letters."""
    match kind:
        case "grouped":
            return [Token("number", re.sub(r"[^\d.]", "", lexeme))]
        case "number":
            if len(lexeme) > MAX_DIGITS:
                raise ParseError("too many digits")
            return [Token("number", lexeme)]
        case "real":
            return [Token("name", "ℝ")]
        case "environment":
            return [Token("op", re.sub(r"\s|\{[lcr|]*\}$", "", lexeme))]
        case "text":
            words = re.findall(r"[A-Za-z]+", lexeme)
            joiner = lexeme.strip(" ,")
            if joiner in ("and", "or"):
                return [Token("op", joiner)]
            if follows_value and unit_of(lexeme):
                return [Token("text", lexeme.strip())]
            if any(len(word) > 1 and word not in FUNCTIONS | NAMES for word in words):
                return [Token("text", lexeme.strip())]
            return [Token("op", "{"), *tokenise(lexeme)[:-1], Token("op", "}")] if lexeme.strip() else []
        case "command":
            name = SYNONYMS.get(lexeme[1:], lexeme[1:])
            if name in FUNCTIONS:
                return [Token("function", name)]
            if name in NAMES or name == "ℝ":
                return [Token("name", name)]
            if name in SYNONYMS.values():
                return [Token("op", name)]
            if name in ("{", "}", "\\"):
                return [Token("op", lexeme)]
            if name in ("|", "%", "$", "min", "max", "gcd", "mod"):
                return [Token("op", name)]
            raise ParseError(f"unknown command {lexeme}")
        case "word":
            if lexeme in ("and", "or"):
                return [Token("op", lexeme)]
            pieces = PIECES.findall(lexeme)
            if len(lexeme) > 1 and follows_value and unit_of(lexeme) and pieces != [lexeme]:
                return [Token("text", lexeme)]
            if len(lexeme) > 3 and all(len(piece) == 1 for piece in pieces):
                return [Token("text", lexeme)]
            pieces = [SYNONYMS.get(piece, piece) if len(piece) > 1 else piece for piece in pieces]
            return [Token("function" if piece in FUNCTIONS else "name", piece) for piece in pieces]
    return [Token("op", {"==": "=", "**": "**"}.get(lexeme, lexeme))]


MATRICES = ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array")
RELATIONS = ("=", "!=", "<", ">", "<=", ">=", "≈", "∈")
CONSTANTS = ("pi", "e", "i", "infty")


class Parser:
    """Recursive descent over the tokens of one answer; every method reads one level of the grammar and returns a node.

    answer := relation (("," | ";" | and | or) relation)*      relation := union (("=" | "<" | ...) union)*
    union  := ratio (("∪" | "∩" | "\\") ratio)* unit?          ratio    := sum (":" sum)*
    sum    := term (("+" | "-") term)*                         term     := signed (("*" | "/" | nothing) signed)*
    signed := ("+" | "-" | "±")* power                         power    := atom ("!" | "%" | "^" signed)*
    """

    def __init__(self, tokens: list[Token]):
        self.tokens, self.position, self.depth, self.bars = tokens, 0, 0, 0

    @property
    def next(self) -> Token:
        return self.tokens[self.position]

    def at(self, *texts: str) -> bool:
        return self.next.kind == "op" and self.next.text in texts

    def take(self, *texts: str) -> str | None:
        if not self.at(*texts):
            return None
        self.position += 1
        return self.tokens[self.position - 1].text

    def expect(self, *texts: str) -> str:
        if (found := self.take(*texts)) is None:
            raise ParseError(f"expected {' or '.join(texts)}, found {self.next.text or 'the end'!r}")
        return found

    def read(self) -> Node:
        if len(self.tokens) > 1 and all(token.kind in ("text", "end") or token.text == "," for token in self.tokens):
            return ("text", " ".join(token.text for token in self.tokens).strip())
        node = self.answer()
        if self.next.kind != "end":
            raise ParseError(f"left over: {self.next.text!r}")
        return node

    def answer(self, end: tuple[str, ...] = ()) -> Node:
        """One relation, or ("list", ...) of several: a set; ("or", ...) where that is how they are joined."""
        members, joined = [], set()
        while not self.at(*end) and self.next.kind != "end":
            members.append(self.relation())
            separators = list(iter(lambda: self.take(",", ";", "and", "or"), None))
            joined.update(separators)
            if not separators:
                break
        if len(members) == 1:
            return members[0]
        return ("or" if "or" in joined else "list", *members)

    def relation(self) -> Node:
        members, operators = [self.union()], []
        while operator := self.take(*RELATIONS):
            operators.append(operator)
            members.append(self.union())
        return ("chain", " ".join(operators), *members) if operators else members[0]

    def union(self) -> Node:
        node = self.measured()
        while operator := self.take("∪", "∩", "\\"):
            node = (operator, node, self.measured())
        return node

    def measured(self) -> Node:
        """A ratio or sum, with the unit after it: `\\text{ inches}^2`."""
        members = [self.sum()]
        while self.take(":"):
            members.append(self.sum())
        node = ("ratio", *members) if len(members) > 1 else members[0]
        if self.next.kind != "text":
            return node
        unit = unit_of(self.next.text)
        if unit is None:
            raise ParseError(f"words that are not a unit: {self.next.text!r}")
        self.position += 1
        if self.take("^"):
            unit += f"^{self.atom()[1]}"
        return ("%", node) if unit == "percent" else ("unit", node, unit)

    def sum(self) -> Node:
        terms = [self.term()]
        while self.at("+", "-", "±", "∓"):
            terms.append(self.term())
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def term(self) -> Node:
        """Products and quotients from left to right; a sign in front of a product belongs to all of it."""
        if sign := self.take("-", "±", "∓"):
            return (sign, self.term())
        self.take("+")
        factors = [self.power()]
        while True:
            if self.take("*"):
                factors.append(self.signed())
            elif self.take("/"):
                factors = [("/", factors[0] if len(factors) == 1 else ("*", *factors), self.signed())]
            elif self.starts_factor():
                mixed = self.mixed_number(factors[-1])
                if mixed is None and self.next.kind == "number":
                    raise ParseError("two numbers side by side")
                factors[-1:] = [mixed] if mixed else [factors[-1], self.power()]
            else:
                return ("*", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        if self.next.kind in ("number", "name", "function"):
            return True
        return self.at("(", "{", "[", "sum", "prod", "lfloor", "lceil") or (self.at("|") and not self.bars)

    def mixed_number(self, whole: Node) -> Node | None:
        r"""`1 \frac12` or `1 1/2`: a whole number before a proper fraction of whole numbers is a sum, not a product."""
        before = self.position
        if whole[0] == "num" and whole[1].isdigit():
            fraction = self.power() if self.next.text in ("frac",) else None
            if self.next.kind == "number" and self.tokens[self.position + 1].text == "/":
                numerator = self.atom()
                self.expect("/")
                fraction = ("/", numerator, self.atom()) if self.next.kind == "number" else None
            parts = fraction[1:] if fraction and fraction[0] == "/" else ()
            if parts and all(p[0] == "num" and p[1].isdigit() for p in parts) and int(parts[0][1]) < int(parts[1][1]):
                return ("+", whole, fraction)
        self.position = before
        return None

    def signed(self) -> Node:
        if sign := self.take("-", "±", "∓"):
            return (sign, self.signed())
        self.take("+")
        return self.power()

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.take("!"):
                node = ("call", "factorial2" if self.take("!") else "factorial", node)
            elif self.take("%"):
                node = ("%", node)
            elif self.take("°"):
                node = ("unit", node, "degree")
            elif self.take("'"):
                node = ("call", "prime", node)
            elif self.take("$"):
                node = ("unit", node, "dollar")
            elif self.take("^", "**"):
                if self.take("{"):
                    mark = self.take("°", "'")
                    exponent = None if mark else self.sum()
                    self.expect("}")
                else:
                    mark = self.take("°", "'")
                    exponent = None if mark else self.signed()
                if mark:
                    node = ("unit", node, "degree") if mark == "°" else ("call", "prime", node)
                else:
                    node = ("^", node, exponent)
            else:
                return node

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        try:
            kind, text, _ = self.next
            if (
                kind not in ("number", "name", "function")
                and not self.at("(", "[", "{", "\\{", "|", "$", "sum", "prod", "lfloor", "lceil")
                and not text.startswith("\\begin")
            ):
                raise ParseError(f"expected a value, found {text or 'the end'!r}")
            self.position += 1
            match kind:
                case "number":
                    return self.number(text)
                case "name":
                    return self.name(text)
                case "function":
                    return self.function(text)
            match text:
                case "(" | "[":
                    return self.bracket(text)
                case "{":
                    node = self.answer(("}",))
                    self.expect("}")
                    return node
                case "\\{":
                    return self.braces()
                case "|":
                    self.bars += 1
                    node = self.sum()
                    self.expect("|")
                    self.bars -= 1
                    return ("call", "abs", node)
                case "$":
                    return ("unit", self.atom(), "dollar")
                case "lfloor" | "lceil":
                    node = ("call", "floor" if text == "lfloor" else "ceil", self.sum())
                    self.expect("rfloor", "rceil")
                    return node
                case "sum" | "prod":
                    return self.series(text)
            return self.environment(text)
        finally:
            self.depth -= 1

    def number(self, text: str) -> Node:
        if self.take("_"):
            base = self.atom()
            if base[0] != "num" or not base[1].isdigit():
                raise ParseError("a number with a subscript that is not a base")
            return ("base", text, str(int(base[1])))
        if "." in text and self.next.text == "overline":  # 0.1\overline{6}
            self.position += 1
            repeated = self.atom()
            if repeated[0] == "num" and repeated[1].isdigit():
                scale = 10 ** len(text.split(".")[1])
                period = 10 ** len(repeated[1]) - 1
                value = Fraction(text.rstrip(".") or 0) + Fraction(int(repeated[1]), period * scale)
                return ("/", ("num", str(value.numerator)), ("num", str(value.denominator)))
        follows = self.next
        if follows.kind == "name" and follows.text in ("e", "E") and not follows.spaced:
            power = self.tokens[self.position + 1 : self.position + 3]
            sign = power[0].text if power[0].text in ("+", "-") else ""
            digits = power[1] if sign else power[0]
            if digits.kind == "number" and digits.text.isdigit() and not digits.spaced:
                if len(digits.text) > 3:
                    raise ParseError("exponent too large")
                self.position += 3 if sign else 2
                return ("num", f"{text}e{sign}{digits.text}")
        return ("num", text)

    def name(self, text: str) -> Node:
        node: Node = ("name", text)
        if self.take("_"):
            if self.next.kind == "text":
                node = ("name", f"{text}_{self.next.text}")
                self.position += 1
            elif self.at("{") and self.tokens[self.position + 1].kind == "text":
                node = ("name", f"{text}_{self.tokens[self.position + 1].text}")
                self.position += 2
                self.expect("}")
            else:
                node = ("index", text, self.atom())
        elif len(text) == 1 and self.next.kind == "number" and not self.next.spaced and self.next.text.isdigit():
            self.position += 1
            node = ("index", text, ("num", self.tokens[self.position - 1].text))
        while self.take("'"):
            node = ("call", "prime", node)
        if self.at("(") and text in "fghFGH" and not self.next.spaced:
            self.position += 1
            arguments = self.answer((")",))
            self.expect(")")
            return ("call", ("apply", node), *(arguments[1:] if arguments[0] == "list" else [arguments]))
        return node

    def argument(self) -> Node:
        r"""The argument of a TeX command: a group, or the one next character, so that \frac43 is 4/3."""
        kind, text, spaced = self.next
        if kind == "number" and len(text) > 1:
            self.tokens[self.position] = Token("number", text[1:])
            return ("num", text[0])
        return self.atom()

    def function(self, text: str) -> Node:
        match text:
            case "frac":
                return ("/", self.argument(), self.argument())
            case "binom":
                return ("call", "binomial", self.argument(), self.argument())
            case "sqrt":
                degree = None
                if self.take("["):
                    degree = self.sum()
                    self.expect("]")
                return ("call", "root", self.atom(), degree or ("num", "2"))
            case "overline" | "vec" | "hat" | "bar":
                return ("call", ("apply", ("name", text)), self.atom())
        base, power = None, None
        if text == "log" and self.take("_"):
            base = self.atom()
        if self.take("^"):
            power = self.signed()
        if text in ("floor", "ceil", "abs", "exp") or self.at("(", "{", "["):
            argument = self.atom()
        else:
            argument = self.bare_argument()
        if power == ("-", ("num", "1")):
            text, power = "arc" + text, None
        name = {"ln": "log", "lg": "log"}.get(text, re.sub("^arc", "a", text))
        node = ("call", name, argument)
        if base or text == "lg":
            node = ("/", node, ("call", "log", base or ("num", "10")))
        return ("^", node, power) if power else node

    def bare_argument(self) -> Node:
        r"""What follows a function without brackets: `\sin 2\pi x`, up to a sign, another function or a bracket."""
        factors = [self.power()]
        while self.next.kind in ("number", "name") or self.at("{"):
            factors.append(self.power())
        return ("*", *factors) if len(factors) > 1 else factors[0]

    def bracket(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.answer((")", "]"))
        closing = self.expect(")", "]")
        self.bars = bars
        if node[0] == "list" and len(node) > 1:
            return ("tuple", opening, closing, *node[1:])
        if {"(": ")", "[": "]"}[opening] != closing or node[0] in ("list", "or"):
            raise ParseError("an interval needs two ends")
        return node

    def braces(self) -> Node:
        node = self.answer(("\\}", "mid"))
        if self.take("mid"):
            node = self.answer(("\\}",))
            self.expect("\\}")
            return node
        self.expect("\\}")
        return node if node[0] == "list" else ("list", node)

    def series(self, kind: str) -> Node:
        r"""\sum_{k=1}^{n} body, and \prod: ("series", kind, variable, first, last, body)."""
        self.expect("_")
        self.expect("{")
        variable = self.name_only()
        self.expect("=")
        first = self.sum()
        self.expect("}")
        self.expect("^")
        last = self.atom()
        return ("series", kind, variable, first, last, self.term())

    def name_only(self) -> str:
        if self.next.kind != "name":
            raise ParseError("expected a name")
        self.position += 1
        return self.tokens[self.position - 1].text

    def environment(self, begin: str) -> Node:
        """A matrix as ("matrix", ("row", ...), ...); the lines of `cases` or `aligned` as a list."""
        name = begin[len("\\begin{") : -1]
        if name not in MATRICES and name not in ("cases", "aligned", "align*", "gathered"):
            raise ParseError(f"unknown environment {name}")
        end = f"\\end{{{name}}}"
        rows: list[Node] = []
        while not self.at(end):
            cells = [self.relation()]
            while self.take("&"):
                cells.append(self.relation())
            rows.append(("row", *cells))
            if not self.take("\\\\"):
                break
        self.expect(end)
        if name in MATRICES:
            if len({len(row) for row in rows}) != 1:
                raise ParseError("rows of unequal length")
            return ("matrix", *rows)
        return ("list", *(cell for row in rows for cell in row[1:]))


# ------------------------------------------------------------------------------------------------- 3. values

LOCK = threading.Lock()  # mpmath keeps its precision in its context and its constants in unlocked caches


class TooLarge(ParseError):
    """The value, or the work to find it, is beyond what we compute."""


class Evaluator:
    """Values of trees at sample points, within a budget of steps that one verdict shares."""

    def __init__(self, digits: int, deadline: float):
        self.mp = mpmath.mp.clone()
        self.digits, self.deadline, self.work = digits, deadline, 0
        self.point, self.real, self.known, self.whole = 0, False, {}, set()

    def at(self, node: Node, point: int, real: bool, known: dict | None = None):
        """The value at a numbered point, all names drawn from that number. `real`: Undefined outside of the reals."""
        self.point, self.real, self.known = point, real, known or {}
        try:
            return self.value(node)
        except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
            if isinstance(error, ParseError):
                raise
            raise Undefined(str(error)) from None

    def value(self, node: Node):
        self.work += 1
        if self.work > MAX_WORK:
            raise TooLarge("too much to compute")
        if self.work % 64 == 0 and time.thread_time() > self.deadline:
            raise TimeoutError
        return self.bounded(self.raw(node))

    def bounded(self, value):
        if isinstance(value, Fraction):
            if value.numerator.bit_length() + value.denominator.bit_length() <= MAX_BITS:
                return value
            value = self.mp.convert(value)
        if self.mp.isnan(value):
            raise Undefined("not a number")
        if self.real and isinstance(value, self.mp.mpc):
            raise Undefined("not real")
        if self.mp.isfinite(value) and value and abs(self.mp.mag(value)) > MAX_MAGNITUDE:
            raise TooLarge("too large to compare")
        return value

    def raw(self, node: Node):
        match node:
            case ("num", text):
                return Fraction(text)
            case ("name", name):
                return self.drawn(name)
            case ("index", name, subscript):
                return self.hashed(name, self.value(subscript))
            case ("unit", inner, unit):
                return self.product([self.value(inner), self.mp.pi / 180 if unit == "degree" else Fraction(1)])
            case ("%", inner):
                return self.product([self.value(inner), Fraction(1, 100)])
            case ("+", *terms):
                return self.total([self.value(term) for term in terms])
            case ("-", inner):
                return -self.value(inner)
            case ("*", *factors):
                return self.product([self.value(factor) for factor in factors])
            case ("/", above, below):
                return self.product([self.value(above), self.inverse(self.value(below))])
            case ("^", base, exponent):
                return self.power(self.value(base), self.value(exponent))
            case ("frozen", inner):
                point, self.point = self.point, 0
                value = self.value(inner)
                self.point = point
                return value
            case ("call", ("apply", name), *arguments):
                return self.hashed(str(name), *(self.value(argument) for argument in arguments))
            case ("call", function, *arguments):
                return self.call(function, [self.value(argument) for argument in arguments])
            case ("series", kind, variable, first, last, body):
                return self.series(kind, variable, self.value(first), self.value(last), body)
            case ("ratio", above, below):
                return self.product([self.value(above), self.inverse(self.value(below))])
            case ("base", digits, base):
                return Fraction(int(digits, int(base)))
        raise Undefined(f"{node[0]} has no value")

    def drawn(self, name: str):
        if name in self.known:
            return self.known[name]
        match name:
            case "pi":
                return +self.mp.pi
            case "e":
                return +self.mp.e
            case "i":
                return self.mp.mpc(0, 1)
            case "infty":
                return self.mp.inf
            case "emptyset" | "ℝ":
                raise Undefined("a set has no value")
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        if name in self.whole:
            return Fraction(1 + (seed + self.point) % 6 + self.point // 3)
        unit = Fraction((seed * (self.point + 3) ** 5 + 7919 * self.point) % 997 + 1, 998)
        scale = (1, 3, 1, 3, 1, 9)[self.point % 6]
        return (unit if self.point % 4 < 2 or self.point == 6 else 2 * unit - 1) * scale

    def hashed(self, name: str, *arguments) -> Fraction:
        """The value of an unknown function: any fixed number that depends on the name and the arguments alone."""
        key = name + "".join("," + self.mp.nstr(self.mp.convert(argument), 25) for argument in arguments)
        if not arguments:
            key += str(self.point)
        return Fraction(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16), 2**32) + Fraction(1, 3)

    def total(self, values: list):
        if all(isinstance(value, Fraction) for value in values):
            return sum(values, Fraction(0))
        return self.mp.fsum([self.finite(value) for value in values])

    def product(self, values: list):
        if all(isinstance(value, Fraction) for value in values):
            return math.prod(values, start=Fraction(1))
        result = self.mp.mpf(1)
        for value in values:
            result = self.bounded(result * self.finite(value))
        return result

    def finite(self, value):
        value = self.mp.convert(value)
        if not self.mp.isfinite(value):
            raise Undefined("infinity is not a number")
        return value

    def inverse(self, value):
        return 1 / value if isinstance(value, Fraction) else 1 / self.finite(value)

    def power(self, base, exponent):
        if base == 0 and (exponent == 0 or isinstance(exponent, self.mp.mpc)):
            raise Undefined("0^0")
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            if (root := self.exact_root(base, exponent.denominator)) is not None:
                bits = root.numerator.bit_length() + root.denominator.bit_length()
                if abs(exponent.numerator) * bits <= MAX_BITS:
                    return root**exponent.numerator
        base, exponent = self.finite(base), self.finite(exponent)
        if base and self.mp.mag(exponent) + self.mp.mag(self.mp.log(abs(base)) + 1) > MAX_MAGNITUDE.bit_length() + 1:
            raise TooLarge("a power too large to compare")
        return self.mp.power(base, exponent)

    def exact_root(self, value: Fraction, degree: int) -> Fraction | None:
        if degree == 1:
            return value
        if value < 0 or degree > 64:
            return None
        parts = []
        for part in (value.numerator, value.denominator):
            root = math.isqrt(part) if degree == 2 else int(self.mp.nint(self.mp.root(part, degree)))
            if root**degree != part:
                return None
            parts.append(root)
        return Fraction(*parts)

    def call(self, function: str, values: list):
        x = values[0]
        if function == "abs":
            return abs(x)
        if function == "root":
            degree = values[1]
            if degree == 0:
                raise Undefined("a root of degree 0")
            odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2
            if odd and not isinstance(x, self.mp.mpc) and x < 0:
                return -self.power(-x, 1 / degree)
            return self.power(x, self.inverse(degree))
        if function in ("floor", "ceil"):
            return Fraction(int(getattr(self.mp, function)(self.finite(x))))
        if function == "prime":
            return self.hashed("prime", x)
        if function == "binomial":
            n, k = values
            whole = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
            if whole and 0 <= k and 0 <= n < 2000:
                return Fraction(math.comb(n.numerator, k.numerator))
        if any(self.mp.mag(self.finite(value)) > 16 for value in values):
            raise TooLarge(f"{function} of a large number")
        if function in ("factorial", "factorial2"):
            if isinstance(x, Fraction) and x.denominator == 1:
                if x < 0:
                    raise Undefined("factorial of a negative number")
                if x < 2000:
                    steps = range(x.numerator, 0, -1 if function == "factorial" else -2)
                    return Fraction(math.prod(steps))
            return self.mp.fac(x) if function == "factorial" else self.mp.fac2(x)
        self.work += 10
        return getattr(self.mp, function)(*(self.mp.convert(value) for value in values))

    def series(self, kind: str, variable: str, first, last, body: Node):
        """A finite sum or product with whole bounds; any other is an unknown function of its parts."""
        if (
            all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (first, last))
            and last - first < 500
        ):
            known, terms = dict(self.known), []
            for k in range(int(first), int(last) + 1):
                self.known = {**known, variable: Fraction(k)}
                terms.append(self.value(body))
            self.known = known
            return self.total(terms) if kind == "sum" else self.product(terms)
        known, self.known = dict(self.known), {**self.known, variable: Fraction(2, 7)}
        key = (first, last, self.value(body))
        self.known = known
        return self.hashed(kind, *key)


# ------------------------------------------------------------------------------------------------- 4. comparison


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node[1:]:
        if isinstance(child, tuple):
            yield from walk(child)


def free_names(node: Node) -> set[str]:
    bound = {part[2] for part in walk(node) if part[0] == "series"}
    return {part[1] for part in walk(node) if part[0] == "name"} - {*CONSTANTS, "ℝ", "emptyset"} - bound


def whole_names(node: Node) -> set[str]:
    """Names that stand for whole numbers: the n of (-1)^n, or of a sum up to n."""
    found: set[str] = set()
    for part in walk(node):
        if part[0] == "^" and part[1][0] == "-" and not free_names(part[1]):
            found |= free_names(part[2])
        if part[0] == "series":
            found |= free_names(part[3]) | free_names(part[4])
    return found


def readings(node: Node) -> list[Node]:
    """The node with its ± signs resolved in every way (two linked ways, if there is a ∓)."""
    signs = [part[0] for part in walk(node) if part[0] in ("±", "∓")]
    if not signs:
        return [node]
    if len(signs) > 4:
        raise ParseError("too many ± signs")
    choices = [("+", "-"), ("-", "+")] if "∓" in signs else itertools.product("+-", repeat=len(signs))

    def resolve(part, order: Iterator[str], linked: dict | None):
        if not isinstance(part, tuple):
            return part
        if part[0] in ("±", "∓"):
            sign = linked[part[0]] if linked else next(order)
            inner = resolve(part[1], order, linked)
            return ("-", inner) if sign == "-" else inner
        return tuple(resolve(child, order, linked) for child in part)

    return [resolve(node, iter(c), dict(zip("±∓", c)) if "∓" in signs else None) for c in choices]


def members(node: Node) -> list[Node]:
    if node[0] == "list" or node == ("name", "emptyset"):
        return [reading for child in node[1:] if isinstance(child, tuple) for reading in readings_of(child)]
    return readings_of(node)


def readings_of(node: Node) -> list[Node]:
    found = readings(node)
    return [m for one in found for m in (members(one) if one[0] == "list" else [one])]


def is_label(node: Node) -> bool:
    """A name for the value on the other side: x, f(2), |AB|, a:b, (x, y)."""
    match node:
        case ("name", name):
            return name not in CONSTANTS
        case ("index", *_) | ("call", ("apply", _), *_) | ("call", "prime", _):
            return True
        case ("call", "abs", inner):
            return is_label(inner)
        case ("tuple", _, _, *inner) | ("/", *inner) | ("ratio", *inner):
            return all(is_label(part) for part in inner)
        case ("*", *inner):
            return all(part[0] == "name" and (part[1].isupper() or k) for k, part in enumerate(inner))
    return False


class Comparison:
    """One answer against one reference."""

    def __init__(self, digits: int, deadline: float, tolerance: float):
        self.tolerance = tolerance
        self.coarse, self.fine = Evaluator(digits, deadline), Evaluator(2 * digits, deadline)
        self.coarse.mp.dps, self.fine.mp.dps = digits, 2 * digits

    # -- expressions

    def close(self, evaluate) -> bool:
        """Do the two values that `evaluate(evaluator)` gives agree? Exactly if rational, else to their precision."""
        previous = None
        for evaluator in (self.coarse, self.fine):
            a, b = evaluate(evaluator)
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                return a == b
            mp = evaluator.mp
            a, b = mp.convert(a), mp.convert(b)
            if not (mp.isfinite(a) and mp.isfinite(b)):
                return a == b
            gap, size = abs(a - b), max(abs(a), abs(b))
            if gap <= size * mp.mpf(10) ** (10 - evaluator.digits):
                return True
            if size > 1e-10 and gap > size * mp.mpf(10) ** (-evaluator.digits // 2):
                return False
            if previous is not None and gap <= previous * mp.mpf(10) ** (-evaluator.digits // 4):
                return True  # what looked like a difference was rounding: it shrank with the precision
            previous = mp.mpf(gap)
        return False

    def same(self, a: Node, b: Node) -> bool:
        """Equal as functions: at every sample point where both have a real value (or, failing such, a complex one)."""
        whole = whole_names(a) | whole_names(b)
        self.coarse.whole = self.fine.whole = whole
        if not free_names(a) | free_names(b):
            try:
                return self.close(lambda e: (e.at(a, 0, False), e.at(b, 0, False)))
            except Undefined:
                return False
        imaginary = any(part == ("name", "i") for node in (a, b) for part in walk(node))
        for real in (False,) if imaginary else (True, False):
            agreed = 0
            for point in range(12):
                try:
                    if not self.close(lambda e, p=point, r=real: (e.at(a, p, r), e.at(b, p, r))):
                        return False
                except Undefined:
                    continue
                agreed += 1
                if agreed == 5:
                    return True
            if agreed >= 3:
                return True
        return False

    def value(self, node: Node):
        return self.coarse.at(node, 0, False)

    def same_number(self, a: Node, b: Node) -> bool:
        if self.same(a, b):
            return True
        if free_names(a) | free_names(b):
            return False
        try:
            x, y = self.value(a), self.value(b)
            if self.tolerance and abs(x - y) <= self.tolerance * abs(x):
                return True
            return self.is_float_of(a, y) or self.is_float_of(b, x)
        except (Undefined, TypeError):
            return False

    def is_float_of(self, node: Node, exact) -> bool:
        """Is this decimal what a computer prints for a number that has no finite decimal? (15 digits or more, all right.)"""
        sign, text = (-1, node[1][1]) if node[0] == "-" else (1, node[1])
        if node[0] not in ("num", "-") or not isinstance(text, str) or not re.fullmatch(r"\d*\.\d+", text):
            return False
        if len(text.replace(".", "").lstrip("0")) < 15:
            return False
        if isinstance(exact, Fraction) and 10**400 % exact.denominator == 0:
            return False
        return abs(sign * Fraction(text) - exact) < Fraction(1, 10 ** len(text.split(".")[1]))

    def proportional(self, a: Node, b: Node, positive: bool) -> bool:
        """Do a = 0 and b = 0 (or a > 0 and b > 0) say the same: is a a constant multiple of b?"""
        try:
            x, y = (self.coarse.at(node, 0, False) for node in (a, b))
            if x == 0 or y == 0 or (positive and not x * y > 0):
                return False
        except (Undefined, TypeError):
            return False
        return self.same(("*", a, ("frozen", b)), ("*", b, ("frozen", a)))

    # -- kinds

    def match(self, gold: Node, answer: Node) -> bool:
        if gold == answer:
            return True
        golds, answers = members(gold), members(answer)
        if gold[0] == "tuple" and answer[0] == "list" and all(self.unlabel(m)[0] for m in answers):
            return self.match(gold, ("tuple", *gold[1:3], *answers))
        if self.as_set(gold, answer):
            return self.same_set(gold, answer)
        if len(golds) != 1 or len(answers) != 1 or "list" in (gold[0], answer[0]):
            if {gold[0], answer[0]} == {"list", "tuple"}:
                return False
            return self.same_members(golds, answers)
        return self.match_one(golds[0], answers[0])

    def same_members(self, golds: list[Node], answers: list[Node]) -> bool:
        if any(m[0] == "chain" for m in golds) and any(m[0] == "chain" for m in answers):
            golds, answers = ([r for m in side for r in self.relations(m)] for side in (golds, answers))
        if len(golds) * len(answers) > 2500:
            raise TooLarge("too many members")
        return all(any(self.match_one(g, a) for a in answers) for g in golds) and all(
            any(self.match_one(g, a) for g in golds) for a in answers
        )

    def match_one(self, gold: Node, answer: Node) -> bool:
        if gold == answer:
            return True
        if gold[0] == "chain" or answer[0] == "chain":
            return self.match_chains(gold, answer)
        if "unit" in (gold[0], answer[0]) or "%" in (gold[0], answer[0]):
            return self.match_measured(gold, answer)
        kinds = {gold[0], answer[0]}
        if "matrix" in kinds:
            return self.match_matrices(gold, answer)
        if "tuple" in kinds or kinds & {"∪", "∩", "\\"}:
            if len(kinds) != 1:
                return False
            if gold[0] != "tuple":
                return self.as_set(gold, answer) and self.same_set(gold, answer)
            return gold[1:3] == answer[1:3] and self.match_all(gold[3:], answer[3:])
        if "base" in kinds:
            if len(kinds) == 1:
                return gold[2] == answer[2] and gold[1].lstrip("0") == answer[1].lstrip("0")
            return answer == ("num", gold[1]) if gold[0] == "base" else False
        if "ratio" in kinds and len(kinds) == 1:
            return self.match_ratios(gold, answer)
        if "text" in kinds:
            return False  # words were compared as words before
        return self.same_number(gold, answer)

    def match_all(self, golds: tuple, answers: tuple) -> bool:
        return len(golds) == len(answers) and all(self.match(g, a) for g, a in zip(golds, answers))

    def unlabel(self, node: Node) -> tuple[Node | None, Node | None]:
        """(label, value) of `x = 3`, `x = 6/2 = 3`, `2 + 1 = 3`; (None, node) of anything else; no value if it is false."""
        if node[0] != "chain" or not set(node[1].split()) <= {"=", "≈", "∈"}:
            return None, node
        label, parts, signs = None, list(node[2:]), node[1].split()
        if is_label(parts[-1]) and not is_label(parts[0]) and len(parts) == 2:
            parts.reverse()
        if is_label(parts[0]):
            label, parts, signs = parts[0], parts[1:], signs[1:]
        elif any(free_names(part) for part in parts):
            return None, node
        for left, right, sign in zip(parts, parts[1:], signs):
            if not (self.match(left, right) or (sign == "≈" and self.rounds(left, right))):
                return label, None
        return label, parts[-1] if "≈" not in signs else parts[0]

    def rounds(self, exact: Node, decimal: Node) -> bool:
        """Is `decimal` what `exact` rounds to, at the places it shows?"""
        if decimal[0] != "num" or "." not in decimal[1]:
            return False
        try:
            return abs(self.value(exact) - Fraction(decimal[1])) <= Fraction(1, 2 * 10 ** len(decimal[1].split(".")[1]))
        except (Undefined, TypeError):
            return False

    def relations(self, node: Node) -> list[Node]:
        """A chain a < b < c as the relations a < b and b < c."""
        if node[0] != "chain" or "=" in node[1].split() or "∈" in node[1].split() or "≈" in node[1].split():
            return [node]
        return [("chain", s, a, b) for s, a, b in zip(node[1].split(), node[2:], node[3:])]

    def match_chains(self, gold: Node, answer: Node) -> bool:
        (gold_label, gold_value), (label, value) = self.unlabel(gold), self.unlabel(answer)
        if gold_value is None or value is None:
            return False
        if gold[0] == answer[0] == "chain":
            if gold_label and gold_label == label and self.match(gold_value, value):
                return True
            golds, answers = self.relations(gold), self.relations(answer)
            if len(golds) != 1 or len(answers) != 1:
                return len(golds) == len(answers) and self.same_members(golds, answers)
            return self.same_relation(gold, answer)
        if gold[0] == "chain":
            return bool(gold_label or gold_value != gold) and self.match(gold_value, answer)
        return bool(label or value != answer) and self.match(gold, value)

    def same_relation(self, gold: Node, answer: Node) -> bool:
        sides = []
        for _, sign, left, right in (gold, answer):
            if sign in (">", ">="):
                sign, left, right = sign.replace(">", "<"), right, left
            sides.append((sign, ("+", right, ("-", left))))
        (gold_sign, gold_side), (sign, side) = sides
        return gold_sign == sign and self.proportional(gold_side, side, positive=sign in ("<", "<="))

    def match_measured(self, gold: Node, answer: Node) -> bool:
        if gold[0] == "%":
            inner = answer[1] if answer[0] == "%" else answer
            return self.match(gold[1], inner) or (answer[0] != "%" and self.same_number(gold, answer))
        if answer[0] == "%":
            return gold[0] != "unit" and self.same_number(gold, answer)
        if gold[0] == answer[0] and gold[2] != answer[2]:
            return False
        bare_gold, bare = (side[1] if side[0] == "unit" else side for side in (gold, answer))
        return self.match(bare_gold, bare) or (gold[0] != answer[0] and self.same(gold, answer))

    def match_matrices(self, gold: Node, answer: Node) -> bool:
        gold, answer = spread(gold), spread(answer)
        vectors = {"matrix", "tuple"} == {gold[0], answer[0]}
        if vectors:
            gold, answer = (
                [c for row in s[1:] for c in row[1:]]
                if s[0] == "matrix" and (len(s) == 2 or len(s[1]) == 2)
                else list(s[3:])
                if s[0] == "tuple"
                else []
                for s in (gold, answer)
            )
            return bool(gold) and self.match_all(tuple(gold), tuple(answer))
        if gold[0] != "matrix" or answer[0] != "matrix" or len(gold) != len(answer):
            return False
        return all(self.match_all(g[1:], a[1:]) for g, a in zip(gold[1:], answer[1:]))

    def match_ratios(self, gold: Node, answer: Node) -> bool:
        if len(gold) != len(answer):
            return False
        if all(part[0] == "num" and len(part[1]) == 2 for part in gold[2:]):  # a time
            return self.match_all(gold[1:], answer[1:])
        return all(self.same(("*", g, answer[1]), ("*", a, gold[1])) for g, a in zip(gold[2:], answer[2:]))

    # -- sets of reals

    def as_set(self, gold: Node, answer: Node) -> bool:
        """Is one of the two an inequality, a union or ℝ, and the other anything that says which reals belong to it?"""
        kinds = (self.set_kind(gold), self.set_kind(answer))
        return all(kinds) and "explicit" in kinds and not kinds == ("explicit tuple", "explicit tuple")

    def set_kind(self, node: Node) -> str | None:
        match node:
            case ("∪" | "∩" | "\\", left, right):
                return "explicit" if self.set_kind(left) and self.set_kind(right) else None
            case ("or", *parts):
                return "explicit" if all(self.set_kind(part) == "explicit" for part in parts) else None
            case ("chain", signs, *parts):
                if signs == "∈":
                    return self.set_kind(parts[1])
                return (
                    "explicit"
                    if set(signs.split()) <= {"<", ">", "<=", ">=", "!="} and len(free_names(node)) == 1
                    else None
                )
            case ("name", "ℝ"):
                return "explicit"
            case ("tuple", _, _, _, _):
                return "explicit tuple" if not free_names(node) else None
            case ("list", *parts):
                if parts and all(self.set_kind(part) == "explicit" for part in parts):
                    return "explicit"
                return "list" if not free_names(node) and all(part[0] != "tuple" for part in parts) else None
        return None

    def corners(self, node: Node) -> list:
        """The reals at which membership can change, as far as they are written down."""
        match node:
            case ("tuple", _, _, low, high):
                return [self.value(end) for end in (low, high)]
            case ("list", *parts) if self.set_kind(node) == "list":
                return [self.value(part) for part in parts]
            case ("chain", signs, *parts) if signs != "∈":
                return [self.value(part) for part in parts if not free_names(part)]
            case ("chain", _, _, inner):
                return self.corners(inner)
            case ("name", _):
                return []
        return [corner for part in node[1:] for corner in self.corners(part)]

    def contains(self, node: Node, x) -> bool:
        match node:
            case ("tuple", opening, closing, low, high):
                a, b = self.value(low), self.value(high)
                return (a < x or (opening == "[" and a == x)) and (x < b or (closing == "]" and x == b))
            case ("∪" | "or", *parts):
                return any(self.contains(part, x) for part in parts)
            case ("∩", *parts):
                return all(self.contains(part, x) for part in parts)
            case ("\\", left, right):
                return self.contains(left, x) and not self.contains(right, x)
            case ("name", "ℝ"):
                return True
            case ("list", *parts):
                if self.set_kind(node) == "list":
                    return any(self.value(part) == x for part in parts)
                return all(self.contains(part, x) for part in parts)
            case ("chain", "∈", _, inner):
                return self.contains(inner, x)
            case ("chain", signs, *parts):
                known = dict.fromkeys(free_names(node), x)
                try:
                    values = [self.coarse.at(part, 0, True, known) for part in parts]
                except Undefined:
                    return False
                compare = {
                    "<": lambda a, b: a < b,
                    ">": lambda a, b: a > b,
                    "<=": lambda a, b: a <= b,
                    ">=": lambda a, b: a >= b,
                    "!=": lambda a, b: a != b,
                }
                return all(compare[s](a, b) for s, a, b in zip(signs.split(), values, values[1:]))
        raise Undefined(node[0])

    def same_set(self, gold: Node, answer: Node) -> bool:
        """Same membership at every end of an interval, close to each on both sides, between them and beyond."""
        try:
            corners = self.corners(gold) + self.corners(answer)
            finite = sorted({c for c in corners if self.coarse.mp.isfinite(self.coarse.mp.convert(c))})
            step = Fraction(1, 10**9)
            points = [p for c in finite for p in (c, c - step, c + step)]
            points += [(a + b) / 2 for a, b in zip(finite, finite[1:])]
            points += [Fraction(k) for k in (-1000, -10, -1, 0, 1, 10, 1000)]
            if finite:
                points += [finite[0] - 7, finite[-1] + 7]
            return all(self.contains(gold, x) == self.contains(answer, x) for x in points)
        except (Undefined, TypeError):
            return False


def spread(node: Node) -> Node:
    """A matrix with the scalars around it multiplied into its entries."""
    match node:
        case ("-", inner) if (m := spread(inner))[0] == "matrix":
            return ("matrix", *(("row", *(("-", c) for c in row[1:])) for row in m[1:]))
        case ("*", *scalars, inner) if (m := spread(inner))[0] == "matrix":
            return ("matrix", *(("row", *(("*", *scalars, c) for c in row[1:])) for row in m[1:]))
        case ("/", inner, scalar) if (m := spread(inner))[0] == "matrix":
            return ("matrix", *(("row", *(("/", c, scalar) for c in row[1:])) for row in m[1:]))
        case ("^", inner, ("name", "T")) if (m := spread(inner))[0] == "matrix":
            return ("matrix", *(("row", *cells) for cells in zip(*(row[1:] for row in m[1:]))))
    return node


def plain(text: str) -> str:
    """The words of an answer: without fonts, brackets, blanks and articles."""
    text = re.sub(r"\\(?:text\w*|mbox|math\w\w|operatorname)\s*(?=\{)|\\[ ,;!]|[{}$()~]|\\left|\\right", " ", text)
    words = [word for word in re.sub(r"[.,:;]+(?=\s|$)", " ", text).split() if word.lower() not in ("a", "an", "the")]
    words = words or text.split()
    return words[0] if words and len(words[0]) == len(words) == 1 else " ".join(words).lower()


def squeeze(text: str) -> str:
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;!: ]|\s|\$", "", text).replace(r"\dfrac", r"\frac")


def read(text: str, grouping: bool = True) -> Node:
    text = text.strip()
    text = re.sub(r"(?<=[^\s.])[.,;]+$", "", text) if not text.endswith("right.") else text
    try:
        return Parser(tokenise(text, grouping)).read()
    except RecursionError:
        raise ParseError("nested too deeply") from None


def show(node: Node) -> str:
    """A reading in prefix notation: +(1, /(1, 2))."""
    if not isinstance(node, tuple):
        return node
    if node[0] in ("num", "name", "text"):
        return node[1]
    return f"{node[0]}({', '.join(show(child) for child in node[1:])})"


def judge(answer: str, gold: str, deadline: float, tolerance: float) -> Verdict:
    if squeeze(answer) == squeeze(gold) and squeeze(gold):
        return Verdict("correct", answer, answer, gold)
    words = plain(gold)
    try:
        gold_node = read(gold)
    except ParseError:
        gold_node = ("text", words)
    try:
        node = read(answer)
    except ParseError as error:
        return Verdict("unparsed", answer, str(error), show(gold_node))
    reading = (answer, show(node), show(gold_node))
    if "text" in (gold_node[0], node[0]) or re.fullmatch(r"[A-Za-z]{3,}", gold):
        return Verdict("correct" if words and plain(answer) == words else "wrong", *reading)
    pairs = [(gold_node, node)]
    if re.search(r"\d,\d{3}", answer + " " + gold):
        pairs.append((read(gold, grouping=False), read(answer, grouping=False)))
    digits = DIGITS + sum(c.isdigit() for c in answer + gold) % 1000
    for one, other in pairs:
        with LOCK:
            try:
                if Comparison(digits, deadline, tolerance).match(one, other):
                    return Verdict("correct", *reading)
            except (ParseError, RecursionError):
                continue
    return Verdict("wrong", *reading)


def verify(response: str, gold: str, timeout: float = 2.0, lenient: bool = False, tolerance: float = 0.0) -> Verdict:
    """The verdict on a response. Never raises, whatever the two strings are.

    `timeout`: seconds of this thread's own CPU time, so that a busy machine changes nothing; the bounds end every
    comparison well before. `lenient`: also take an answer that is not boxed. `tolerance`: relative, for numbers.
    """
    answer = last_boxed(response)
    if answer is None and lenient:
        answer = lenient_answer(response)
    if answer is None:
        return Verdict("no_answer")
    try:
        return judge(answer, gold, time.thread_time() + timeout, tolerance)
    except TimeoutError:
        return Verdict("timeout", answer)
    except ParseError as error:
        return Verdict("unparsed", answer, str(error))


def is_correct(response: str, gold: str) -> bool:
    return verify(response, gold).correct


# ------------------------------------------------------------------------------------------------- many at once


class Pool:
    """Worker processes that are reused, each a `verify.serve()` of its own: plain subprocesses that never import torch."""

    def __init__(self, workers: int):
        self.idle: queue.SimpleQueue[subprocess.Popen | None] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(None)
        self.threads = ThreadPoolExecutor(workers)
        atexit.register(self.close)

    def check(self, pair: tuple[str, str], timeout: float) -> Verdict:
        worker = self.idle.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = self.start()
            killer = threading.Timer(5 * timeout + 1, worker.kill)
            killer.start()
            try:
                worker.stdin.write(json.dumps([*pair, timeout]) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
            except BrokenPipeError:
                line = ""
            killer.cancel()
            if not line:
                worker.kill()
                return Verdict("timeout")
            return Verdict(**json.loads(line))
        finally:
            self.idle.put(worker)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-c", "import verify; verify.serve()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        worker = subprocess.Popen(command, cwd=Path(__file__).parent, **pipes)
        worker.stdout.readline()  # "ready": importing is not counted as checking
        return worker

    def close(self) -> None:
        self.threads.shutdown(wait=True)
        while not self.idle.empty():
            if worker := self.idle.get():
                worker.stdin.close()
                worker.wait()


@functools.cache
def shared_pool(workers: int) -> Pool:
    """One pool per size for the life of the process: a training run calls `verify_many` thousands of times."""
    return Pool(workers)


def serve() -> None:
    """A worker: one JSON pair per line in, one verdict per line out, until the parent closes the pipe or dies."""
    print("ready", flush=True)
    for line in sys.stdin:
        response, gold, timeout = json.loads(line)
        print(json.dumps(asdict(verify(response, gold, timeout))), flush=True)


def verify_many(pairs: list[tuple[str, str]], workers: int | None = None, timeout: float = 2.0) -> list[Verdict]:
    """One verdict per (response, gold), in order, from `workers` processes (default: the cores, at most 8)."""
    pairs = list(pairs)
    if len(pairs) < 8 and workers is None:
        return [verify(response, gold, timeout) for response, gold in pairs]
    pool = shared_pool(workers or min(8, os.cpu_count() or 1))
    return list(pool.threads.map(lambda pair: pool.check(pair, timeout), pairs))


# ------------------------------------------------------------------------------------------------- countdown


def exact_arithmetic(text: str, operators: str = "+-*") -> tuple[Fraction, list[int]]:
    """Value and numbers (in order) of plain arithmetic: whole numbers, brackets and the binary `operators` alone.

    LaTeX spellings are read where their operator is allowed. ParseError on anything else: `2**3`, `7//2`, `-3`, `2(3)`.
    """
    if len(text) > 400:
        raise ParseError("too long")
    reader, numbers = Parser(tokenise(text, grouping=False)), []

    def atom(depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        if reader.next.kind == "number" and reader.next.text.isdecimal() and len(reader.next.text) <= 12:
            numbers.append(int(reader.next.text))
            reader.position += 1
            return Fraction(numbers[-1])
        if reader.next.text == "frac" and "/" in operators:
            reader.position += 1
            return divide(group(depth, "{", "}"), group(depth, "{", "}"))
        return group(depth, "(", ")")

    def group(depth: int, opening: str, closing: str) -> Fraction:
        reader.expect(opening)
        value = total(depth + 1)
        reader.expect(closing)
        return value

    def divide(a: Fraction, b: Fraction) -> Fraction:
        if b == 0:
            raise ParseError("division by zero")
        return a / b

    def product(depth: int) -> Fraction:
        value = atom(depth)
        while operator := reader.take(*set("*/") & set(operators)):
            value = value * atom(depth) if operator == "*" else divide(value, atom(depth))
        return value

    def total(depth: int) -> Fraction:
        value = product(depth)
        while operator := reader.take(*set("+-") & set(operators)):
            value = value + product(depth) if operator == "+" else value - product(depth)
        return value

    value = total(0)
    if reader.next.kind != "end":
        raise ParseError(f"left over: {reader.next.text!r}")
    return value, numbers


# ------------------------------------------------------------------------------------------------- command line


def command_line() -> None:
    import tyro
    from tqdm import tqdm

    import cli

    @dataclass
    class Config:
        response: tyro.conf.Positional[str] = ""
        """The response, with its answer in \\boxed{}."""
        gold: tyro.conf.Positional[str] = ""
        """The reference."""
        file: str = ""
        """JSONL of pairs instead: `response` and `gold` in every line."""
        lenient: bool = False
        """Also accept an answer that is not boxed: for foreign models, never for a reward."""

    def main(config: Config) -> None:
        if not config.file:
            verdict = verify(config.response, config.gold, lenient=config.lenient)
            print(f"{verdict.outcome}\n  extracted  {verdict.answer}\n  read as    {verdict.answer_read}")
            print(f"  reference  {verdict.gold_read}")
            return
        rows = cli.read_jsonl(config.file)
        outcomes = [verify(row["response"], row["gold"], lenient=config.lenient).outcome for row in tqdm(rows)]
        for outcome in sorted(set(outcomes)):
            print(f"{outcome:10s} {outcomes.count(outcome)}")

    cli.run(main, Config)


if __name__ == "__main__":
    command_line()
