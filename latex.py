r"""The text of an answer into tokens: LaTeX or plain ASCII, as people and models write it.

    \tfrac12\text{ cm} and ½ cm are the same tokens: frac, 1, 2 and the word cm

Other spellings, fonts, colours and blanks end here, and so do the two modes of LaTeX: inside of
\text letters make words, outside they are names. The tables come first; what is not in them is read
as itself. The text is hostile input: its length is bounded, and no pattern here backtracks far.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from units import BARE, CURRENCIES, known_unit

MAX_CHARS = 2_000  # of an answer: the longest reference of five benchmarks has 59


class ParseError(Exception):
    """The text is not mathematics that we read, or it is too large to be read safely."""


# ---------------------------------------------------------------------------- tables

_computed = """sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth sech csch
    asinh acosh atanh log exp floor ceil abs sign"""
_other = """arcsin arccos arctan arccot arcsec arccsc arsinh arcosh artanh arcsinh arccosh arctanh
    ln lg sqrt sgn gcd lcm max min det sum prod int lim frac binom"""
FUNCTIONS = set((_computed + " " + _other).split())
LISTED = {"gcd", "lcm", "max", "min"}  # functions of several numbers
# never computed
_operators = """Pr Var Cov arg Re Im dim ker deg tr rank"""
OPERATORS = set(_operators.split())

_greek = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu
    nu xi omicron pi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega"""
GREEK = {letter for name in _greek.split() for letter in (name, name.title())}
NAMES = GREEK | {"hbar", "ell", "infty", "emptyset", "ldots", "nabla", "partial"}
_small = """the for all is are of to if not no has with when where any one two"""
SMALL_WORDS = set(_small.split())

# Commands and characters that stand for another token: an operator, a bracket, a function or a
# name.
_synonyms = r"""cdot * times × ast * div / le <= leq <= leqslant <= ge >= geq >= geqslant >= lt <
    gt > ne != neq != pm ± mp ∓ cup ∪ cap ∩ bigcup ∪ bigcap ∩ setminus ∖ backslash ∖ in ∈ approx ≈
    simeq ≈ equiv ≡ langle ( rangle ) colon : land and wedge and lor or vee or dbinom binom
    tbinom binom dfrac frac tfrac frac cfrac frac nicefrac frac sfrac frac varnothing emptyset
    infinity infty oo infty inf infty dots ldots cdots ldots dotsc ldots vdots ldots lbrace \{
    rbrace \} degree ° prime ' mid ∣ nmid ∤ parallel ∥ perp ⟂ to → rightarrow → longrightarrow →
    mapsto ↦ Rightarrow ⇒ implies ⇒ Longrightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ iff ⇔
    leftrightarrow ↔ circ ∘ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ sim ∼ cong ≅ propto ∝ notin ∉
    pmod mod bmod mod lvert | rvert | vert | lceil ⌈ rceil ⌉ lfloor ⌊ rfloor ⌋ arcsin asin arccos
    acos arctan atan arccot acot arcsec asec arccsc acsc arsinh asinh arcosh acosh artanh atanh
    arcsinh asinh arccosh acosh arctanh atanh ln log sgn sign lbrack [ rbrack ] − - – - — - · * ⋅ *
    ∙ * ∗ * ÷ / ≤ <= ≦ <= ⩽ <= ≥ >= ≧ >= ⩾ >= ≠ != ′ ' ’ ' √ sqrt ∞ infty ∅ emptyset … ldots ⟨ ( ⟩
    ) ∕ / ∠ angle △ triangle surd sqrt imath i jmath j ∶ : 。 . 、 , π pi ℏ hbar ** ^ == = := = ...
    ldots // no"""
SYNONYMS = dict(zip(_synonyms.split()[::2], _synonyms.split()[1::2]))

ORDERED = set("∣∤∥⟂→↦⇒⇐⇔↔∘⊂⊆⊃⊇∼≅∝∉")  # relations that are compared side by side, as they stand
RELATIONS = {"=", "≈", "≡", "∈", "!=", "<", ">", "<=", ">="} | ORDERED

_decoration = """displaystyle textstyle scriptstyle limits nolimits bf rm it sf tt mathbf
    boldsymbol bm mathit mathsf mathtt mathnormal pmb underline fbox boxed big Big bigg Bigg bigl
    bigr Bigl Bigr biggl biggr Biggl Biggr bigm middle therefore left right ensuremath mathop
    mathstrut strut hfill nonumber tiny scriptsize footnotesize small normalsize large Large LARGE
    huge Huge"""
DECORATION = set(_decoration.split())  # dropped
WITH_ARGUMENT = {"color", "textcolor", "hspace", "vspace", "label", "tag"}  # dropped, {red} too

# A mark and what it is on are one thing, with a name and no other value.
_marks = """angle measuredangle triangle square odot vec overrightarrow overleftarrow overline bar
    hat widehat tilde widetilde overarc mathcal mathscr mathfrak dot ddot neg lnot"""
MARKS = set(_marks.split())

_vector = (
    r"\\(?:mathbf|boldsymbol|bm)\s*\{([A-Za-z])\}"  # where a cross product shows that it is one
)
_ordinal = r"(?<![A-Za-z0-9.])([0-9]*(?:1st|2nd|3rd|[04-9]th|1[1-3]th))(?![A-Za-z])"
REWRITES = [  # what two or more tokens make together
    # \hat{i} and \vec{\mathbf{i}} are \mathbf{i}
    (
        r"\\(?:hat|vec)\s*(?:\{\s*\\(?:mathbf|boldsymbol|bm)\s*\{([ijk])\}\s*\}|\{\s*([ijk])\s*\})",
        r"\\mathbf{\1\2}",
    ),
    (_vector + r"(?=\s*\\times)", r"\\vec{\1}"),  # \mathbf{a} \times \mathbf{b}
    (r"(?<=\\times)\s*" + _vector, r"\\vec{\1}"),
    (r"\\textcircled\s*\{\s*([1-9])\s*\}", lambda found: "①②③④⑤⑥⑦⑧⑨"[int(found[1]) - 1]),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "°"),  # 30^{\circ}
    (r"\^\s*\{((?:\s*\\prime)+)\s*\}", r"\1 "),  # f^{\prime\prime}
    (r"\^\\prime", r"\\prime"),
    (r"\{:\}", ":"),
    (r"Rs\.", "₹"),
    (r"(?<=[0-9])\\!(?=,)", ""),  # 1\!,\!000
    (r"\(([0-9][0-9A-F]*)\)\s*(?=_)", r"\1"),  # (1A3)_{16}
    (r"US\s?\\?\$", r"\\$"),
    (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", r"\\times "),  # 1.2 x 10^{-5}
    (r"\{\s*\}\s*(?=°)", ""),  # {}^\circ
    (r"\+/-", r"\\pm "),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),  # (-oo, 2] U [5, oo)
    (r"(\\mathbb\s*\{?\s*R\s*\}?)\s*-\s*(?=\\\{)", r"\1\\setminus "),  # \mathbb{R} - \{0\}
    (r"(?<=[0-9])\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=[0-9])", ":"),  # 3 to 4
    (r"(?<=[0-9A-Za-z})])\s*\\q?quad\s*(?=[A-Za-z](?:_\{?\w\}?)?\s*=)", ", "),  # x=2\quad y=3
    (_ordinal, lambda found: found[1][:-2]),  # 13th
    (r"(?<=[0-9])\s*\^\s*\{?\s*(?:st|nd|rd|th)\s*\}?(?![A-Za-z])", ""),  # 13^{th}
    (r"(?<![\w})\]])([\^_]\s*\{?\s*\w+\s*\}?\s*C\s*_)", r"{}\1"),  # ^{10}C_3
    (r"\\Delta(?=\s*[A-Z]{3}(?![A-Za-z]))", r"\\triangle"),  # \Delta ABC
    # 0.1666\ldots, 0.2727...: at least three times one digit, or twice several
    (
        r"(?<![0-9.])([0-9]*\.[0-9]*?)(?:([0-9])\2{2,}|([0-9]{2,3})\3+)\s*(?:\\[lc]?dots|\.\.\.|…)",
        r"\1\\overline{\2\3}",
    ),
    # 13^{\text{th}}
    (
        r"(?<=[0-9])(?:\^\s*)?\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?",
        "",
    ),
]

# ---------------------------------------------------------------------------- the lexer

_pattern = r"""
    (?P<blank>(?:\s|~|\$|&nbsp;|\\[,;:>!\s()\[\]]|\\q?quad(?![A-Za-z])|\\left\s*\.|\\right\s*\.)+)
  | (?P<text>\\(?P<font>text(?:bf|it|rm|sf|tt|sc|up|md|normal)?|mbox|mathrm|operatorname\*?)\s*
        \{(?P<inside>(?:[^{}]|\{[^{}]*\})*)\})
  | (?P<environment>\\(?:begin|end)\s*\{\w+\*?\})
  | (?P<period>(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)(?:
        \\(?:overline|bar|dot)\s*(?:\{(?P<p1>[0-9]+)\}|(?P<p2>[0-9]))
        (?P<p3>[0-9]*)(?:\\dot\s*(?:\{(?P<p4>[0-9])\}|(?P<p5>[0-9])))?
      | (?<![1-9]\.[0-9])(?<![1-9]\.[0-9][0-9])\((?P<p6>[0-9]+)\)))
  | (?P<blackboard>\\mathbb\s*(?:\{\s*(?P<l1>[A-Z])\s*\}|(?P<l2>[A-Z])))
  | (?P<command>\\(?:[A-Za-z]+|\\(?:\s*\[[^\]\n]{0,9}\])?|.))
  | (?P<base>[0-9][0-9A-F]{1,30}(?=_))
  | (?P<thousands>(?<![0-9.])(?<![^\\],)
        [0-9]{1,3}(?:(?:SEPARATOR)[0-9]{3})+(?![0-9]|,[0-9])(?:\.[0-9]+)?)
  | (?P<num>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9.]))?)
  | (?P<noon>[apAP]\.\s?[mM]\b\.?)
  | (?P<letters>[^\W\d_]+)
  | (?P<op><=|>=|!=|==|:=|\*\*|//|!!|\.\.\.|.)
"""
_separators = (
    r",\s?\\!\s*|\{,\}|\\,|\\\s|[ ]"  # of thousands, in brackets; outside of them also a comma
)
LEXERS = {
    bracketed: re.compile(_pattern.replace("SEPARATOR", separators), re.VERBOSE | re.DOTALL)
    for bracketed, separators in ((True, _separators), (False, "," + "|" + _separators))
}
_written_out = sorted(FUNCTIONS | NAMES - {"ell", "Pi"} | {"infinity"}, key=len, reverse=True)
PIECE = re.compile("|".join(_written_out) + "|[A-Za-z]")


def glued(run: str) -> list[str] | None:
    """xsinx as x, sin, x: names and functions written as one, with at most two letters between."""
    pieces = PIECE.findall(run)
    letters = "".join("." if len(piece) == 1 else "F" for piece in pieces)
    if re.fullmatch(r"\.?F(?:\.{0,2}F)*\.?", letters):
        return pieces
    return None


class Token(NamedTuple):
    """A piece of an answer.

    `kind`: num, name, word (in \\text), command (a function, or not known), op, base, cash, end.
    """

    kind: str
    text: str
    blank: bool = False  # before it


def plain_unicode(text: str) -> str:
    """x² as x^{2}, ½ as \\frac{1}{2}, fullwidth as ASCII: what Unicode's own table says."""
    out: list[str] = []
    for tag, run in itertools.groupby(
        text, lambda c: unicodedata.decomposition(c).partition(" ")[0]
    ):
        characters = "".join(run)
        folded = unicodedata.normalize("NFKC", characters).replace("−", "-")
        if tag == "<circle>":
            folded = characters
        elif tag == "<font>" and re.fullmatch("[ℝℤℕℚℂ]", characters):
            folded = rf"\mathbb{{{folded}}}"
        elif tag == "<super>":
            folded = f"^{{{folded}}}"
        elif tag == "<sub>":
            folded = f"_{{{folded}}}"
        elif tag == "<fraction>":
            folded = re.sub("([0-9]+)⁄([0-9]+)", r" \\frac{\1}{\2}", folded)
        out.append(folded)
    return "".join(out).replace("∛", r"\sqrt[3]").replace("∜", r"\sqrt[4]").replace("⁄", "/")


def tokenise(text: str, thousands: bool = True) -> list[Token]:
    """The tokens of an answer, without blanks, fonts and decoration.

    `thousands`: 1,234 and 1 234 are one number. Raises ParseError for a text that is too long.
    """
    if len(text) > MAX_CHARS:
        raise ParseError("too long")
    text = text if text.isascii() else plain_unicode(text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # LaTeX that was escaped once too often
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return [*tokens_of(text, False, thousands)]


def tokens_of(text: str, words: bool, thousands: bool) -> Iterator[Token]:
    """The tokens of a text in one of the two modes: `words` inside of \\text."""
    position, depth, blank, before = 0, 0, False, Token("", "")
    while position < len(text):
        found = LEXERS[depth > 0 or not thousands].match(text, position)
        position = found.end()
        piece = found[0]
        if found["blank"]:
            blank = True
            continue
        if found["text"]:
            blank = blank or not found["inside"].strip()
            inside = re.sub(r"(?<!\\)\$", "", found["inside"])  # \$ is money
            new = [*tokens_of(inside, True, thousands)]
            if found["font"].startswith("operatorname") and found["inside"].strip() in FUNCTIONS:
                new = [known_command(found["inside"].strip())]
            elif found["font"] in ("mathrm", "operatorname"):
                new = [part for token in new for part in upright(token)]
        elif found["command"] and piece[1:] in WITH_ARGUMENT:
            position = re.compile(r"\s*(\{[^{}]*\})?").match(text, position).end()
            continue
        elif found["letters"]:
            new = [*read_letters(piece, words, before)]
        elif piece == "." and words and before.kind == "word":  # sq. ft.
            continue
        # \frac12
        elif found["num"] and before.text == "frac" and piece.isdigit() and len(piece) > 1:
            new = [Token("num", piece[0]), Token("num", piece[1:])]
        else:
            new = read_piece(found, thousands)
        depth += (piece in ("(", "[", r"\{")) - (piece in (")", "]", r"\}"))
        for token in new:
            before = token._replace(blank=blank)
            yield before
            blank = False


def read_piece(found: re.Match, thousands: bool) -> list[Token]:
    """What does not depend on its surroundings."""
    piece = found[0]
    if found["environment"]:
        return [Token("op", re.sub(r"\s", "", piece))]
    if found["period"]:
        return [Token("num", read_period(found))]
    if found["blackboard"]:
        letter = found["l1"] or found["l2"]
        return [Token("name", dict(zip("RZNQC", "ℝℤℕℚℂ")).get(letter, letter))]
    if found["thousands"]:
        if not thousands:
            raise ParseError("a number with blanks")
        return [Token("num", re.sub("[^0-9.]", "", piece))]
    if found["command"]:
        return read_command(piece[1:].strip())
    if found["noon"]:
        return [Token("word", piece[0].lower() + "m")]
    if found["op"] and piece in "€£₹¥¢":
        return [Token("cash", known_unit(piece))]
    if found["op"]:
        return [known_command(piece) if piece in SYNONYMS else Token("op", piece)]
    kind = "num" if found["num"] or piece.isdigit() else "base"
    return [Token(kind, piece.rstrip("."))]


def read_command(name: str) -> list[Token]:
    if name[:1] == "\\":
        return [Token("op", r"\\")]
    if name in ("{", "}"):
        return [Token("op", "\\" + name)]
    if name in ("$", "pounds"):
        return [Token("cash", "usd" if name == "$" else "gbp")]
    if name == "AA":
        return [Token("word", "Å")]
    return [] if name in DECORATION else [known_command(name)]


def known_command(name: str) -> Token:
    name = SYNONYMS.get(name, name)
    if name in NAMES:
        return Token("name", name)
    return Token("command" if name.isalpha() and name not in ("and", "or", "mod") else "op", name)


def read_period(found: re.Match) -> str:
    r"""0.1\overline{6}, 0.1\dot6 and 0.1(6) as the fraction 15/90."""
    whole, fixed = found["whole"], found["fixed"]
    period = "".join(found[f"p{k}"] or "" for k in range(1, 7))
    above = int(whole + fixed + period) - int(whole + fixed or 0)
    return f"{above}/{10 ** len(fixed) * (10 ** len(period) - 1)}"


def read_letters(run: str, words: bool, before: Token) -> Iterator[Token]:
    r"""Letters in a row: in \text a word; else a function, a word too long for names, or names."""
    quantity = before.kind in ("num", "word") or before.text in (")", "}", "%", "pi")
    if not run.isascii():
        yield from foreign_letters(run, words, before)
    elif run.lower() in ("and", "or", "mod", "pmod"):
        yield Token("op", "mod" if run.lower() == "pmod" else run.lower())
    elif (words and known_unit(run)) or (quantity and run in BARE):
        yield Token("word", run)
    elif run in FUNCTIONS or run in NAMES or run in ("infinity", "oo", "inf"):
        yield known_command(run)
    elif words or known_unit(run) in CURRENCIES:
        yield Token("word", run)
    elif known_unit(run) is None and (pieces := glued(run)):
        for piece in pieces:
            yield known_command(piece) if len(piece) > 1 else Token("name", piece)
    elif run in SMALL_WORDS or run == "DNE" or re.fullmatch("[a-z]{4,}|[A-Z][a-z]{2,}", run):
        yield Token("word", run)
    else:
        yield from (Token("name", letter) for letter in run)


def foreign_letters(run: str, words: bool, before: Token) -> Iterator[Token]:
    """Greek letters by their names; other scripts as words."""
    for greek, part in itertools.groupby(
        run, lambda c: unicodedata.name(c, "").startswith("GREEK")
    ):
        letters = "".join(part)
        if not greek:
            ascii_only = letters.isascii()
            yield from (
                read_letters(letters, words, before) if ascii_only else [Token("word", letters)]
            )
            continue
        for letter in letters:
            described = unicodedata.name(letter).split(" WITH")[0].split()  # GREEK SMALL LETTER MU
            name = described[-1].replace("LAMDA", "LAMBDA")
            yield Token("name", name.title() if "CAPITAL" in described else name.lower())


def upright(token: Token) -> list[Token]:
    """In \\mathrm, two or three capital letters are names of points, unless they are a unit."""
    if (
        token.kind == "word"
        and re.fullmatch("[A-Z]{2,3}", token.text)
        and not known_unit(token.text)
    ):
        return [Token("name", letter) for letter in token.text]
    return [token]


# ---------------------------------------------------------------------------- as it stands


def trimmed(tokens: list[Token]) -> list[Token]:
    """Without what stands around an answer: "The answer is:", a first =, the full stop."""
    for k, token in enumerate(tokens[:4]):
        if token.text.lower() not in ("the", "final", "correct", "answer"):
            break
        if (
            token.text.lower() == "answer"
            and k + 2 < len(tokens)
            and tokens[k + 1].text in (":", "is")
        ):
            tokens = tokens[k + 2 + (tokens[k + 2].text == ":") :]
            break
    while tokens and tokens[-1].text in (".", ",", ";", ":", r"\\", "newline"):
        tokens = tokens[:-1]
    about = len(tokens) > 1 and tokens[0].text == "≈" and "." in tokens[1].text
    about = about and all(token.kind == "word" for token in tokens[2:])  # ≈ 3.5 m
    equals = tokens and tokens[0][:2] == ("op", "=")
    return tokens[1:] if about or equals else tokens


def literal(tokens: list[Token]) -> str:
    """The tokens as they stand: how an answer is compared that is not mathematics we read."""
    articles = [
        token.kind == "word" and token.text.lower() in ("the", "an", "a") for token in tokens
    ]
    kept = [token for token, article in zip(tokens, articles) if not article] or tokens
    texts = []
    for token in kept:
        if token.kind == "word" and not known_unit(token.text):
            texts.append(plain_words([token.text]))
        elif token.kind == "command" and not (token.text in FUNCTIONS or token.text in MARKS):
            texts.append("\\" + token.text)  # not known: \q is not q
        else:
            texts.append(token.text)
    braces = set()
    for k in range(1, len(texts) - 1):
        if texts[k - 1] == "{" and texts[k + 1] == "}":  # x^{2} is x^2
            braces |= {k - 1, k + 1}
    return " ".join(text for k, text in enumerate(texts) if k not in braces)


def plain_words(words: list[str]) -> str:
    """Without articles and the s of a plural: "No solutions" is "no solution"."""
    words = [word.lower() for word in words]
    kept = [word for word in words if word not in ("the", "an", "a")] or words
    return " ".join(word.removesuffix("s") if len(word) > 3 else word for word in kept)


_fonts = r"\\(?:text\w*|mbox|math[a-z][a-z]|operatorname|boldsymbol|bm|left|right|[,;:! ])(?![a-z])"
_lead = r"^\s*(?:(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is|:)|option|choice)(?![a-z])\s*:?"


def bare(text: str) -> str:
    """A text without fonts, LaTeX's brackets and blanks, and "the answer is" before it."""
    text = re.sub(r"[{}$~\\*]", " ", re.sub(_fonts, " ", text))
    return " ".join(re.sub(_lead, "", text, flags=re.IGNORECASE).split()).rstrip(". ")
