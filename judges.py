r"""Small judges, asked in turn, of the tree of a reference and the tree of an answer.

Each says True (equal), False (different) or None (does not know), and knows one kind of answer:

    identical       the same tree
    restated        an answer that still has to be solved: it may be the question
    renamed         x^2 + c is x^2 + C; n pi for whole n is k pi for whole k
    named_values    x = 1, y = 2 in any order; (x, y) = (1, 2)
    labels          x = 3 is 3
    coordinates     A(1, 2) is (1, 2)
    units           5 cm against 5, 50 % against 0.5
    sets            (0, 1] against 0 < x <= 1
    lists           members in any order
    shapes          tuples, matrices, cases, bases, ratios: part by part
    equations       2x = 4 against x = 2; other relations side by side
    solutions       x^2 = 4 against 2, -2
    values          whatever has a value
    closed_forms    integrals, limits and endless sums: sympy knows

`Judges.match` asks them, and they ask it of their parts.
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from equality import Equality
from latex import ORDERED
from maths import CONSTANTS, MINUS_ONE, Node, members, minus, names, substitute, times, walk
from values import Budget, Undecided, Undefined

FLOAT_DIGITS = range(15, 18)  # that a computer prints of a number; others are somebody's rounding
_denials = """not no never wrong incorrect neither isn except greater less more than least most
    unlike maybe about approximately or false other between almost nearly"""
DENIALS = set(_denials.split())
MAX_PAIRS = 2_500  # of the members of two lists
Opinion = bool | None  # None: I do not know


def is_label(node: Node) -> bool:
    """May this name a value: x, a_2, f(2), AB, |AB|, s/r, cos A, (x, y), "Area"?"""
    match node:
        case ("text", words):
            return not set(words.split()) & DENIALS
        case ("name", name):
            return name not in CONSTANTS or name in "ei"
        case ("call", "mark", "neg" | "lnot", _):
            return False
        case ("call", "index" | "apply" | "prime" | "mark" | "inverse", *_):
            return True
        case ("call", "abs" | "det" | "sin" | "cos" | "tan" | "cot", inner):
            return is_label(inner)
        case ("unit", inner, "degree"):
            return is_label(inner)
        case ("tuple", _, *parts) | (":", *parts):
            return all(map(is_label, parts))
        case ("^", ("name", name), power):
            return name.isupper() and power == MINUS_ONE  # of a matrix
        case ("*", ("name", "m"), ("call", "mark", "angle", _)):
            return True
        case ("*", ("name", "P" | "Pr"), ("text", _)):
            return True  # P(at least one)
        case ("*", ("name", first), *parts):  # AB, AB/CD, s/r
            below = [part[0] == "^" and part[2] == MINUS_ONE for part in parts]
            parts = [part[1] if inverse else part for part, inverse in zip(parts, below)]
            return (first.isupper() or all(below)) and all(map(is_label, parts))
    return False


FREE = {"max", "min", "gcd", "lcm", "sum", "prod", "lim", "int", "big sum", "apply", "index"}


def is_quantity(node: Node) -> bool:
    """May a question ask for it: m + n, xy, |A ∩ B|, the limit of f(x)? Numbers make an equation.

    Of a single name nothing that can be solved for it.
    """
    if node[0] == "call" and node[1] in FREE:
        return True
    parts = list(walk(without_powers(node)))
    if any(part[0] in ("num", "chain", "tuple", "list", "or") for part in parts):
        return False
    words = [part for part in parts if part[0] == "text"]
    if not all(map(is_label, words)):
        return False
    return len(names(node)) > 1 or (node[0] == "*" and words != [])  # area of ABC


def without_powers(node: Node | str) -> Node | str:
    """The tree with x for x^2, 1/x and -x: these hold numbers that are none of a question's."""
    if isinstance(node, str):
        return node
    if node[0] == "^" and node[2][0] == "num":
        return without_powers(node[1])
    if node[:2] == ("*", MINUS_ONE):
        node = ("*", *node[2:])
    return tuple(map(without_powers, node))


def asked_value(node: Node) -> Node | None:
    """5 of m + n = 5, and of AB = CD = 5: the value of what a question may ask for."""
    if node[0] != "chain" or set(node[1].split()) != {"="} or names(node[-1]):
        return None
    for part in node[2:-1]:
        if part[0] == "tuple" or not (is_label(part) or is_quantity(part)):  # (x, y) is no number
            return None
    return node[-1]


def free_name(node: Node) -> Node | None:
    """k of "k pi, k in ℤ"; the constant of integration, which beside a or b is one of these."""
    for part in members(node):
        if part[:2] == ("chain", "∈") and part[2][0] == "name" and part[3] == ("name", "ℤ"):
            return part[2]
    if names(node) & set("abAB"):
        return None
    for part in walk(node):
        for letter in ("C", "c"):
            if part[0] == "+" and ("name", letter) in part[1:]:
                return ("name", letter)
    return None


def roots_of_one_name(node: Node) -> Node:
    """x_1 = 1, x_2 = 4 as x = 1, x = 4: whose indices only count."""
    if node[0] not in ("list", "or"):
        return node
    letters, found = set(), []
    for part in node[1:]:
        if part[:2] != ("chain", "=") or part[2][0] != "name":
            return node
        letter, _, index = part[2][1].partition("_")
        if len(letter) != 1 or not index.isdigit():
            return node
        letters.add(letter)
        found.append(("chain", "=", ("name", letter), part[3]))
    return (node[0], *found) if len(letters) == 1 else node


def without_infinity(node: Node | str) -> Node | str:
    """0 <= x < infinity as 0 <= x; a condition that always holds as all reals."""
    if isinstance(node, str):
        return node
    if node[0] != "chain" or not set(node[1].split()) <= {"<", "<="}:
        return tuple(map(without_infinity, node))
    signs, parts = node[1].split(), node[2:]
    endless = ("name", "infty")
    if parts[-1] == endless:
        signs, parts = signs[:-1], parts[:-1]
    if parts[0] in (times(MINUS_ONE, endless), ("num", "-infty")):
        signs, parts = signs[1:], parts[1:]
    if not signs:
        return ("name", "ℝ") if names(*parts) else node
    return ("chain", " ".join(signs), *parts)


def are_neighbours(labels: Iterable[Node]) -> bool:
    """x, y, z or a, b: names whose order is that of the alphabet, however they were written."""
    letters = [
        ord(label[1]) if label[0] == "name" and len(label[1]) == 1 else 0 for label in labels
    ]
    return all(letters) and max(letters) - min(letters) == len(letters) - 1


def relations(node: Node) -> list[Node]:
    """The chain a < b >= c as relations that point one way: a < b, c <= b."""
    turned = {">": "<", ">=": "<=", "⊃": "⊂", "⊇": "⊆", "⇐": "⇒"}
    found = []
    for sign, left, right in zip(node[1].split(), node[2:], node[3:]):
        if sign in turned:
            sign, left, right = turned[sign], right, left
        found.append(("chain", sign, left, right))
    return found


def is_solved(node: Node, of_answer: bool) -> bool:
    """A relation that says what a name is, or nearly: x = 3, y = 2x, -x < 5, |x| > 1, x^2 = 4.

    Of a reference, 2x < 5 does as well; of an answer, that may be the question.
    """
    for side in node[2:]:
        others = [part for part in node[2:] if part is not side]
        if is_label(side) and not names(side) & names(*others):
            return True
    named = [side for side in node[2:] if names(side)]
    if len(named) == 1 and named[0][0] == "*" and not of_answer:
        return sum(1 for factor in named[0][1:] if names(factor)) == 1
    return len(named) == 1 and is_monomial(named[0])


def is_monomial(node: Node) -> bool:
    """-x, x^2, |x|: no more than one step away from its name."""
    match node:
        case (
            ("*", ("num", "-1"), inner)
            | ("^", inner, ("num", "2" | "3" | "4"))
            | ("call", "abs", inner)
        ):
            return is_label(inner)
    return is_label(node)


def unsolved(node: Node, of_answer: bool) -> bool:
    """Does a tree hold an equation or inequality of one name that is not solved for it?"""
    for part in walk(node):
        relation = part[0] == "chain" and not set(part[1].split()) & ORDERED
        if relation and len(names(part)) == 1 and not is_solved(part, of_answer):
            return True
    return False


def is_bound(node: Node) -> bool:
    """A condition on a real number that is no equation."""
    if node[0] == "chain":
        return not set(node[1].split()) & ({"=", "≡"} | ORDERED)
    return node == ("name", "ℝ")


def is_open(node: Node) -> bool:
    """An integral, a limit, or a sum or product that does not end: not computed term by term."""
    if node[:2] in (("call", "sum"), ("call", "prod")):
        return ("name", "infty") in node[3:5]
    return node[:2] in (("call", "int"), ("call", "lim"))


def has_named_bound(node: Node) -> bool:
    """A sum or product up to n."""
    return node[:2] in (("call", "sum"), ("call", "prod")) and bool(names(*node[3:5]))


def inner_units(node: Node) -> set[str]:
    """The units below the root, which do not count in the value: 60 in `0 + (60 h)`."""
    return {part[2] for part in walk(node) if part[0] == "unit" and part is not node} - {"degree"}


def without_degrees(node: Node) -> Node:
    """Degrees as plain numbers, except in what a function is of."""
    if node[0] == "unit" and node[2] == "degree":
        return node[1]
    if node[0] in ("+", "*", "unit"):
        return tuple(without_degrees(part) if isinstance(part, tuple) else part for part in node)
    return node


def as_vector(node: Node) -> Node:
    """A row or a column as a tuple; [[1, 2], [3, 4]] as a matrix."""
    if node[0] == "matrix" and 2 in (len(node), len(node[1])):
        return ("tuple", "()", *(cell for row in node[1:] for cell in row[1:]))
    if node[0] == "tuple" and node[2:] and all(row[0] == "tuple" for row in node[2:]):
        return ("matrix", *(("row", *row[2:]) for row in node[2:]))
    return node


class Judges:
    """One answer against one reference.

    `algebra`: the module that asks sympy, in a worker; elsewhere None, and `wants_algebra` says
    afterwards whether it might have known. `decided_by`: the judge who knew.
    """

    def __init__(self, deadline: float, tolerance: float, algebra=None):
        self.equality = Equality(Budget(deadline), self.ask)
        self.numbers, self.mp = self.equality.numbers, self.equality.mp
        self.tolerance, self.algebra, self.wants_algebra = tolerance, algebra, False
        self.depth, self.decided_by = 0, "nobody"

    def match(self, gold: Node, answer: Node) -> bool:
        """Is the answer what the reference says? The first judge that knows, says."""
        self.depth += 1
        try:
            for judge in self.IN_TURN:
                verdict = self.asked(judge, gold, answer)
                if verdict is not None:
                    if self.depth == 1:
                        self.decided_by = judge.__name__
                    return verdict
            return False
        finally:
            self.depth -= 1

    def asked(self, judge: Callable, gold: Node, answer: Node) -> Opinion:
        try:
            return judge(self, gold, answer)
        except (Undefined, Undecided):
            return None

    def ask(self, what: str, *arguments) -> list[Node]:
        """Trees from algebra.py; outside of a worker the question is only noted."""
        if self.algebra is None:
            self.wants_algebra = True
            raise Undecided("a question for sympy")
        return getattr(self.algebra, what)(*arguments)

    # ------------------------------------------------------------------------ names

    def identical(self, gold: Node, answer: Node) -> Opinion:
        return True if gold == answer else None

    def restated(self, gold: Node, answer: Node) -> Opinion:
        """2x + 1 > 5 is no answer to "solve 2x + 1 > 5", unless the reference is of that form."""
        if not names(gold) and asked_value(answer):
            return None
        if unsolved(answer, True) and not unsolved(gold, False):
            return False
        return None

    def renamed(self, gold: Node, answer: Node) -> Opinion:
        """What stands for any number may have any name."""
        name, other = free_name(gold), free_name(answer)
        if not name or not other or name == other:
            return None
        if name[1] in names(answer) or other[1] in names(gold):
            return None
        return self.match(gold, substitute(answer, other, name))

    def named_values(self, gold: Node, answer: Node) -> Opinion:
        """By name; against a plain (1, 2) or 1, 2 in the order of the alphabet.

        Where only the answer has indices, they number the roots.
        """
        roots = roots_of_one_name(answer)
        if roots != answer and not any("_" in name for name in names(gold)):
            return self.match(gold, roots)
        golds, answers = self.assignments(gold), self.assignments(answer)
        if golds and answers and set(golds) == set(answers):
            return all(self.match(golds[name], answers[name]) for name in golds)
        if bool(golds) == bool(answers):
            return None
        assigned, other = (golds, answer) if golds else (answers, gold)
        plain = other[0] == "tuple" or (
            other[0] == "list" and all(part[0] != "chain" for part in members(other))
        )
        if not plain:
            return None
        order = sorted(assigned) if are_neighbours(assigned) else list(assigned)
        row = ("tuple", "()", *(assigned[name] for name in order))
        if other[0] == "list":
            other = ("tuple", "()", *members(other))
        if golds:
            return self.match(row, other)
        return self.match(other, row)

    def assignments(self, node: Node) -> dict[Node, Node] | None:
        """The values of two names or more, by name."""
        pairs: list[tuple] = []
        if node[0] == "list":
            pairs = [self.unlabel(part) for part in members(node)]
        elif node[0] == "chain" and set(node[1].split()) == {"="}:
            if node[2][0] == node[-1][0] == "tuple" and len(node[2]) == len(node[-1]):
                pairs = list(zip(node[2][2:], node[-1][2:]))
            elif all(part[0] == "name" for part in node[2:-1]):  # a = b = 2
                pairs = [(label, node[-1]) for label in node[2:-1]]
        for label, value in pairs:
            if not label or not value or not is_label(label) or is_bound(value):
                return None
        distinct = len({label for label, _ in pairs}) == len(pairs)
        return dict(pairs) if distinct and len(pairs) > 1 else None

    def labels(self, gold: Node, answer: Node) -> Opinion:
        """A value's name may be missing on either side, but not be another; f(x) may be y."""
        asked = asked_value(answer)
        if asked and gold[0] != "chain" and not names(gold) and self.match(gold, asked):
            return True
        (gold_label, gold_value), (label, value) = self.unlabel(gold), self.unlabel(answer)
        if gold_value is None or value is None:
            return False
        rounded = answer[0] == "chain" and answer[1].endswith("≈") and gold[0] == "num"
        if rounded and self.match(gold, answer[-1]):  # sqrt(2) ≈ 1.41
            return True
        if gold_label is None and label is None:
            unchained = (gold_value, value) != (gold, answer)
            if unchained and self.match(gold_value, value):
                return True
            return None
        if gold_label and label and gold_label != label:
            function = ("call", "apply") in (gold_label[:2], label[:2])
            if not function or ("name", "y") not in (gold_label, label):
                return None
        if (gold[0], answer[0]).count("chain") == 1:
            return self.match(gold_value, value)
        return True if self.match(gold_value, value) else None

    def unlabel(self, node: Node) -> tuple[Node | None, Node | None]:
        """(name, value) of x = 3 or x = 6/2 = 3; (None, node) of others; no value if false."""
        if node[0] != "chain" or not set(node[1].split()) <= {"=", "≈", "∈", "≡"}:
            return None, node
        signs, parts, label = node[1].split(), list(node[2:]), None
        if signs == ["="] and is_label(parts[1]) and not is_label(parts[0]):
            parts.reverse()
        matrix = parts[-1][0] in ("matrix", "call")
        member = signs == ["∈"] and not names(parts[0])
        scalar = parts[0][0] == "tuple" and parts[-1][0] in ("num", "+", "*", "^")
        if is_label(parts[0]) and (parts[0][0] != "^" or matrix) and not member and not scalar:
            label, signs, parts = parts[0], signs[1:], parts[1:]
        elif names(*parts) or "∈" in signs:
            return None, node
        for sign, left, right in zip(signs, parts, parts[1:]):
            rounded = sign == "≈" and self.prints(right, left, range(1, 99), last_unit=0.5)
            if not rounded and not self.match(left, right):
                return label, None
        return label, parts[0]

    def coordinates(self, gold: Node, answer: Node) -> Opinion:
        """A(1, 2) is the point (1, 2)."""
        if {gold[0], answer[0]} != {"call", "tuple"}:
            return None
        plain = []
        for node in (gold, answer):
            point = node[:2] == ("call", "apply") and len(node) > 4
            plain.append(("tuple", "()", *node[3:]) if point else node)
        return self.match(*plain) if plain != [gold, answer] else None

    # ------------------------------------------------------------------------ units

    def units(self, gold: Node, answer: Node) -> Opinion:
        """The reference's unit may be missing; so may its %, which else is a hundredth."""
        kinds = {gold[0], answer[0]}
        if not kinds & {"unit", "%"} or "chain" in kinds:
            return None
        if gold[0] == answer[0]:
            return gold[2:] == answer[2:] and self.match(gold[1], answer[1])
        if answer[0] == "%":
            return gold[0] != "unit" and self.values(gold, answer) is True
        if (gold[0], answer[0]) == ("%", "unit"):
            return False
        if answer[2:] == ("degree",) and ("name", "pi") in walk(gold):
            return self.equality.same(gold, answer)  # radians
        bare_gold = gold[1] if gold[0] in ("unit", "%") else gold
        bare_answer = answer[1] if answer[0] == "unit" else answer
        return self.match(bare_gold, bare_answer) or self.values(gold, answer) is True

    # ------------------------------------------------------------------------ sets and shapes

    def sets(self, gold: Node, answer: Node) -> Opinion:
        gold, answer = without_infinity(gold), without_infinity(answer)
        parts = [gold, answer, *members(gold), *members(answer)]
        real = any(is_bound(part) or part[0] in ("∪", "∩", "∖") for part in parts)
        if not real or inner_units(gold) != inner_units(answer):
            return None
        return True if self.equality.same_set(gold, answer) else None

    def lists(self, gold: Node, answer: Node) -> Opinion:
        """In any order; in order where one side has semicolons or dots, or is 5 feet 8 inches."""
        if {gold[:2], answer[:2]} & {("tuple", ";"), ("tuple", "+")} and gold[0] != "list":
            golds, answers = (
                part[2:] if part[0] == "tuple" else members(part) for part in (gold, answer)
            )
            if "or" in (gold[0], answer[0]):  # 3 hours or 20 minutes
                return False
            return len(golds) == len(answers) and all(map(self.match, golds, answers))
        if answer[:2] == ("tuple", ";"):
            answer = ("list", *answer[2:])
        kinds, golds, answers = {gold[0], answer[0]}, members(gold), members(answer)
        if not kinds & {"list", "or"}:
            return None
        if "tuple" in kinds or len(golds) * len(answers) > MAX_PAIRS:
            return False
        if len(answers) > len(golds) > 0:  # one too many, or one twice
            return False if len(golds) > 1 else None
        found = [[self.match(one, other) for other in answers] for one in golds]
        same = all(map(any, found)) and all(map(any, zip(*found))) and bool(golds) == bool(answers)
        if same and len(golds) == len(answers):
            same = one_to_one(found)
        return same or (None if 1 in (len(golds), len(answers)) else False)

    def shapes(self, gold: Node, answer: Node) -> Opinion:
        """Part by part: tuples, matrices, cases, bases, ratios and times, residue classes."""
        kinds = {gold[0], answer[0]}
        if kinds == {"base", "num"}:
            return gold[0] == "base" and gold[1] == answer[1]
        if kinds == {"cases"} and len(gold) == len(answer):
            if self.match(("list", *gold[1:]), ("list", *answer[1:])):
                return True
            return None
        if kinds == {":"} and (is_time(gold) or answer[2][1][:1] == "0"):
            clock = is_time(gold) and is_time(answer)
            return clock and all(map(self.match, gold[1:], answer[1:])) and len(gold) == len(answer)
        if kinds == {":"} and len(gold) == len(answer):
            pairs = zip(gold[2:], answer[2:])
            if any(self.equality.same(first, ("num", "0")) for first in (gold[1], answer[1])):
                return all(map(self.match, gold[1:], answer[1:]))
            return all(self.equality.same(("*", g, answer[1]), ("*", a, gold[1])) for g, a in pairs)
        if "mod" in kinds:
            if kinds == {"mod"}:
                return self.same_class(gold, answer)
            return False
        if kinds == {"matrix", "tuple"}:
            gold, answer = as_vector(gold), as_vector(answer)
        if not kinds & {"tuple", "matrix", "row", "base", ":", "text"}:
            return None
        if gold[0] != answer[0] or len(gold) != len(answer):
            return False
        if gold[0] == "tuple" and len(gold) != 4:  # brackets tell intervals of two ends from tuples
            gold, answer = ("tuple", *gold[2:]), ("tuple", *answer[2:])
        parts = zip(gold[1:], answer[1:])
        return all(g == a or (isinstance(g, tuple) and self.match(g, a)) for g, a in parts)

    def same_class(self, gold: Node, answer: Node) -> bool:
        """7 mod 12 is 19 mod 12."""
        if not self.match(gold[2], answer[2]):
            return False
        turns = ("*", minus(gold[1], answer[1]), ("^", gold[2], MINUS_ONE))
        return self.numbers.exact(turns).denominator == 1

    # ------------------------------------------------------------------------ relations

    def equations(self, gold: Node, answer: Node) -> Opinion:
        """The same if multiples of one another; relations without a meaning here, side by side."""
        if not gold[0] == answer[0] == "chain":
            return None
        golds, answers = relations(gold), relations(answer)
        if len(golds) > 1 or len(answers) > 1:
            return self.match(("list", *golds), ("list", *answers))
        (_, sign, left, right), (_, other, first, second) = golds[0], answers[0]
        if sign != other or inner_units(gold) != inner_units(answer):
            return False
        if sign in ORDERED or sign == "∈":
            if self.match(left, first) and self.match(right, second):
                return True
            return sign in "∥⟂≅∼⇔↔" and self.match(left, second) and self.match(right, first)
        sides = minus(right, left), minus(second, first)
        return self.equality.proportional(*sides, signed="<" in sign)

    def solutions(self, gold: Node, answer: Node) -> Opinion:
        """An equation against its roots: x^2 = 4 against 2, -2."""
        if (gold[0], answer[0]).count("chain") != 1:
            return None
        equation, other = (gold, answer) if gold[0] == "chain" else (answer, gold)
        free = names(equation)
        if self.unlabel(equation)[0] or equation[1] != "=" or len(free) != 1 or names(other):
            return None
        if other[0] in ("text", "tuple", "matrix", "cases"):
            return None
        roots = self.equality.roots(minus(equation[2], equation[3]), *free)
        if roots is None:
            return None
        return self.match(("list", *roots), other)

    # ------------------------------------------------------------------------ values

    def values(self, gold: Node, answer: Node) -> Opinion:
        """Equal exactly, within the tolerance, or as a computer prints the number."""
        if inner_units(gold) != inner_units(answer):
            return False
        if self.equality.same(gold, answer):
            return True
        stripped = without_degrees(gold), without_degrees(answer)
        if stripped != (gold, answer) and self.equality.same(*stripped):
            return True
        different = None if self.open_parts(gold, answer) else False
        if names(gold, answer):
            return different
        gap = self.numbers.at(minus(gold, answer))  # Undefined, if one is infinite
        close = self.tolerance and abs(gap) <= self.tolerance * abs(self.numbers.at(gold))
        printed = self.prints(gold, answer) or self.prints(answer, gold)
        return True if close or printed else different

    def prints(
        self, decimal: Node, exact: Node, digits: range = FLOAT_DIGITS, last_unit: float = 1.0
    ) -> bool:
        """Is `decimal` what a computer prints, in so many digits, of what no decimal is?"""
        text = decimal[1].lstrip("-") if decimal[0] == "num" else ""
        if not re.fullmatch(r"[0-9]*\.[0-9]+", text):
            return False
        if len(text.replace(".", "").lstrip("0")) not in digits:
            return False
        x = self.numbers.at(exact)
        if isinstance(x, Fraction) and 10**400 % x.denominator == 0 and digits == FLOAT_DIGITS:
            return False
        gap = self.mp.convert(self.numbers.at(minus(decimal, exact)))
        return abs(gap) <= last_unit * self.mp.mpf(10) ** -len(text.split(".")[1])

    def closed_forms(self, gold: Node, answer: Node) -> Opinion:
        parts = self.open_parts(gold, answer)
        for part in parts:
            closed = self.ask("closed", part)[0]
            gold, answer = substitute(gold, part, closed), substitute(answer, part, closed)
        return self.match(gold, answer) if parts else None

    def open_parts(self, gold: Node, answer: Node) -> list[Node]:
        """What is not computed here; of sums up to n those of the answer, if the gold has none."""
        parts = [part for part in (*walk(gold), *walk(answer)) if is_open(part)]
        if not any(map(has_named_bound, walk(gold))):
            parts += filter(has_named_bound, walk(answer))
        return parts

    IN_TURN: tuple[Callable, ...] = (
        identical,
        restated,
        renamed,
        named_values,
        labels,
        coordinates,
        units,
        sets,
        lists,
        shapes,
        equations,
        solutions,
        values,
        closed_forms,
    )


def one_to_one(found: list[list[bool]]) -> bool:
    """Does every member occur as often on either side? 1, 1, 2 is not 1, 2, 2.

    `found[i][j]`: is the i-th of the reference the j-th of the answer?
    """
    columns = [sum(column) for column in zip(*found)]
    for row in found:
        twins = [count for hit, count in zip(row, columns) if hit]
        if any(count != sum(row) for count in twins):
            return False
    return True


def is_time(ratio: Node) -> bool:
    """3:05 is a time, 3:5 a ratio."""
    return all(part[0] == "num" and len(part[1]) == 2 for part in ratio[2:])
