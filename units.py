r"""Units and what is counted: is this word a unit, and are two units the same?

    known_unit("kilometers") == known_unit("km") == "km"
    unit_of("women") == "women", and unit_of("dozens") is None

A unit is a word of a table with or without a prefix, or the plural of something counted. Phrases
("miles per hour", `\mathrm{kg\,m/s^2}`) are products of powers of such words; `maths.py` reads them
and `spell` writes them in one form. Units are told apart, never converted: the reference's unit may
be missing in an answer, another unit is wrong.
"""

import re

# Entries end in ";": a symbol, other symbols (case matters) | names in lower case (a plural s is
# implied).
_PREFIXED = """
m | meter metre; g | gram gramme gm; s | second sec; A | ampere amp; K | kelvin; mol | mole;
cd | candela; Hz | hertz; N | newton; Pa | pascal; J | joule; W | watt; C | coulomb; V | volt;
F | farad; Ω omega Omega ohm | ohm; S | siemens; Wb | weber; T | tesla; H | henry; lm | lumen;
lx | lux; Bq | becquerel; Gy | gray; Sv | sievert; L l | liter litre; eV | electronvolt;
bar | bar; cal | calorie; pc | parsec; B | byte; bit | bit; dB | decibel; M | molar; erg | erg;
Da | dalton; yr | year; t | ton tonne; Wh |; Ah |; dyn | dyne; G | gauss; Ci | curie; P | poise;
mmHg |; pixel px | pixel; baud | baud
"""
_PLAIN = """
degree ° deg | degree; °C ℃ | celsius centigrade; °F ℉ | fahrenheit; rad | radian; sr | steradian;
arcmin | arcminute; arcsec | arcsecond; in | inch inches; ft | foot feet; yd | yard; mi | mile;
nmi |; nautical |; acre | acre; ha | hectare; lb lbs | pound; oz | ounce; fl | fluid; gal | gallon;
qt | quart; pt | pint; cup | cup; tbsp | tablespoon; tsp | teaspoon; bbl | barrel;
bushel | bushel; knot kn | knot; furlong | furlong; stone | stone; carat ct | carat; ppm |; bpm |;
fps |; cc |; hp | horsepower; fathom | fathom; slug | slug; atm | atmosphere; torr Torr | torr;
psi |; Å | angstrom; u amu |; au AU |; light |; ly |; day | day; h hr hrs | hour;
min mins | minute; week wk | week; month mo | month; decade | decade; century | century centuries;
rpm |; rev | revolution; am AM |; pm PM |; usd $ USD | dollar buck; cent ¢ | cent penny pennies;
eur € EUR | euro; gbp £ GBP | quid; inr Rs ₹ INR | rupee; jpy JPY | yen; cny 元 ¥ RMB CNY 块 | yuan;
jiao 角 | jiao; percent % pct | percent percentage; unit | unit; kg 千克 公斤 | kilo;
g 克 |; t 吨 |;
m 米 |; cm 厘米 |; mm 毫米 |; dm 分米 |; km 千米 公里 |; 
L 升 |; mL 毫升 |; h 小时 时 |; min 分钟 分 |;
s 秒 |;
day 天 日 |; week 周 星期 |; month 个月 月 |; yr 年 |; degree 度 |; ha 公顷 |; 
mph |; kph kmph |; mpg |
"""
_PREFIX = """Y yotta Z zetta E exa P peta T tera G giga M mega k kilo h hecto da deca d deci c centi
    m milli μ micro n nano p pico f femto"""
_QUOTIENTS = {"kph": "km h^-1", "mph": "mi h^-1", "mpg": "mi gal^-1", "psi": "lb in^-2"}
# degrees Celsius, light years
_TOGETHER = {
    "degree °C": "°C",
    "degree °F": "°F",
    "light yr": "ly",
    "mi nautical": "nmi",
}
POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
# Words behind a number that make it another number: 5 million, 5 dozen, 3 halves.
SCALES = {
    "dozen": "12",
    "hundred": "100",
    "thousand": "1000",
    "million": "1e6",
    "billion": "1e9",
    "trillion": "1e12",
}
_parts = "half third quarter fifth sixth seventh eighth ninth tenth eleventh twelfth"
SCALES |= {word: f"1/{n}" for n, word in enumerate(_parts.split(), start=2)} | {
    "halve": "1/2",
    "fourth": "1/4",
}
SCALES |= {"hundredth": "1/100", "thousandth": "1/1000", "millionth": "1/1000000"}

# What is counted: a plural in -s or one of these; anything at all after "per".
_plurals = """people men women children feet teeth geese mice lice oxen fish sheep deer moose
    bison cattle dice pence species series data criteria phenomena vertices matrices indices axes
    bacteria fungi cacti radii foci loci formulae aircraft spacecraft offspring salmon trout
    shrimp swine staff folk police policemen policewomen firemen salesmen grandchildren bus menus
    gas"""
_PLURALS = set(_plurals.split())
# Words in -s that say something else of the number before them: that it is wrong, unsure, or not
# the whole value.
_not_counted = """ones zeros teens exponents fakes negates nopes nots lies errors doubts maximums
    minimums pairs couples trios twos threes fours fives sixes sevens eights nines tenths is was
    has does goes as us its this thus plus minus times less unless yes always perhaps sometimes
    besides towards afterwards various previous numerous else equals exceeds squares cubes powers
    wrongs mistakes guesses alternatives options tens dozens scores halves thirds quarters digits
    decimals multiples factors approximates means remains makes gives hence yields opposites
    negatives inverses reciprocals logs"""
_NOT_COUNTED = set(_not_counted.split())
_NUMBER_WORD = re.compile(
    r"(half|third|quarter|(four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|"
    r"\w*hundred|\w*thousand|\w*illion)th|hundred|thousand|\w*illion|dozen|score|gross|googol|"
    r"lakh|crore|myriad|permil|permille|mil|mille|one|two|three|four|five|six|seven|eight|nine|ten|eleven|"
    r"twelve|\w+teen|(twen|thir|for|fif|six|seven|eigh|nine)ty)s?"
)


def _table(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Symbols and names of a table's rows, each with the canonical symbol."""
    symbols, names = {}, {}
    for entry in text.split(";"):
        spellings, _, words = entry.partition("|")
        symbol, *others = spellings.split()
        symbols |= dict.fromkeys([symbol, *others], symbol)
        names |= dict.fromkeys(words.split(), symbol)
    return symbols, names


PREFIXED, PREFIXED_NAMES = _table(_PREFIXED)
PLAIN, PLAIN_NAMES = _table(_PLAIN)
PREFIXES = dict(zip(_PREFIX.split()[::2], _PREFIX.split()[::2]))
PREFIX_NAMES = dict(zip(_PREFIX.split()[1::2], _PREFIX.split()[::2]))
CURRENCIES = {"usd", "eur", "gbp", "inr", "jpy", "cny"}
# Written without \text, these follow a number; other symbols are products of letters (5m, 3mg).
_bare = """cm mm km kg ft in mi yd lb lbs oz mL ml hr hrs min am pm AM PM sq cu mph kph Hz kHz
    MHz eV keV MeV GeV kJ kW mol deg sec mins nm pct kPa rad Rs day men per"""
BARE = set(_bare.split())


def known_unit(word: str) -> str | None:
    """The canonical symbol of a unit in the tables, with its prefix; None if there is none."""
    for power, prefix in (("2", "平方"), ("3", "立方")):
        if word.startswith(prefix) and (unit := known_unit(word.removeprefix(prefix))):
            return f"{unit}^{power}"
    if word in PLAIN or word in PREFIXED:
        return PLAIN.get(word) or PREFIXED[word]
    for prefix, symbol in PREFIXES.items():
        if word.startswith(prefix) and word[len(prefix) :] in PREFIXED:
            return symbol + PREFIXED[word[len(prefix) :]]
    lower = word.lower()
    singular = lower if lower in PLAIN_NAMES or lower in PREFIXED_NAMES else lower.removesuffix("s")
    if singular in PLAIN_NAMES or singular in PREFIXED_NAMES:
        return PLAIN_NAMES.get(singular) or PREFIXED_NAMES[singular]
    for prefix, symbol in PREFIX_NAMES.items():
        if singular.startswith(prefix) and singular[len(prefix) :] in PREFIXED_NAMES:
            return symbol + PREFIXED_NAMES[singular[len(prefix) :]]
    return None


def counted(word: str) -> str | None:
    """The plural of a thing behind a number: marbles, women, 个; None for "thirds", "maybe"."""
    lower = word.lower()
    if not word.isascii():
        return (
            word
            if len(word) <= 4
            and not re.search(
                "[十百千万亿零一二两三四五六七八九半以左右不或约多余上下非错几]", word
            )
            else None
        )
    if lower in _PLURALS:
        return lower
    plural = re.fullmatch(r"[a-z]{2,}(?<!ward)s", lower) and lower not in _NOT_COUNTED
    return None if not plural or _NUMBER_WORD.fullmatch(lower) or known_unit(lower) else lower


def unit_of(word: str) -> str | None:
    """The canonical name of one word that is a unit, or was counted; None for any other word."""
    return known_unit(word) or counted(word)


def noun(word: str) -> str | None:
    """What may stand after "per": a unit, or any one thing that is no number and no denial."""
    lower = word.lower()
    refused = {lower, lower + "s"} & (_NOT_COUNTED | set(SCALES)) or _NUMBER_WORD.fullmatch(lower)
    thing = lower.removesuffix("s") if word.isalpha() and len(word) > 2 and not refused else None
    return known_unit(word) or thing


def spell(units: list[tuple[str, int]]) -> str:
    """A product of powers in one form: [("m", 1), ("s", -2)] is "m s^-2"; "" if all cancels."""
    total: dict[str, int] = {}
    for unit, power in units:
        for part in _QUOTIENTS.get(unit, unit).split():
            symbol, _, exponent = part.partition("^")
            total[symbol] = total.get(symbol, 0) + power * int(exponent or 1)
    parts = [
        unit if power == 1 else f"{unit}^{power}" for unit, power in sorted(total.items()) if power
    ]
    spelled = " ".join(parts)
    return _TOGETHER.get(spelled, spelled)


# ---------------------------------------------------------------------------- phrases


def read_unit(tokens: list, at: int) -> tuple[list[tuple[str, int]], int]:
    """The unit that stands at a token, as a product of powers, and where it ends; [] if none does.

    unit   = factor (sign factor)*         sign   = "/" | per | "*" | "-" | nothing
    factor = [square] word [^ power] [squared] | "(" unit ")" | \\frac{unit}{unit}
    """
    if [token.text.lower() for token in tokens[at : at + 2]] == ["per", "cent"]:
        return [("percent", 1)], at + 2
    powers: list[tuple[str, int]] = []
    while True:
        sign, start = _read_sign(tokens, at, first=not powers)
        factor, end = _read_factor(tokens, start, below=sign < 0)
        if not factor:
            return powers, at
        powers += [(name, sign * power) for name, power in factor]
        at = end


def _read_sign(tokens: list, at: int, first: bool) -> tuple[int, int]:
    """-1 behind a sign of division, else 1; and where the sign ends."""
    kind, text, _ = tokens[at]
    if text == "/" or (kind, text) == ("word", "per"):
        return -1, at + 1
    if kind == "word" and text in ("each", "a", "an") and known_unit(tokens[at + 1].text):
        return -1, at + 1
    return 1, at + (not first and text in ("*", "×", "-"))  # kg·m, light-years


def _read_factor(tokens: list, at: int, below: bool) -> tuple[list[tuple[str, int]], int]:
    kind, text, _ = tokens[at]
    if kind == "cash":
        return [(text, 1)], at + 1
    if text == "(" and below:  # J/(kg·K)
        inside, end = read_unit(tokens, at + 1)
        return (inside, end + 1) if tokens[end].text == ")" else ([], at)
    if text == "frac":
        return _read_quotient(tokens, at)
    scale = 1
    if kind == "word" and text.lower() in POWERS:  # square metres
        scale, at = POWERS[text.lower()], at + 1
        kind, text, _ = tokens[at]
    name = None
    if kind == "word":
        name = noun(text) if below else unit_of(text)
    elif (kind, text) == ("name", "Omega"):
        name = "Ω"
    elif (kind, text) == ("name", "mu") and tokens[at + 1].kind == "word":  # \mu\mathrm{m}
        at += 1
        name = known_unit("μ" + tokens[at].text)
    if name is None:
        return [], at
    power, at = _read_power(tokens, at + 1)
    if tokens[at].text in ("squared", "cubed"):
        power, at = POWERS[tokens[at].text] * power, at + 1
    return [(name, scale * power)], at


def _read_quotient(tokens: list, at: int) -> tuple[list[tuple[str, int]], int]:
    """\\frac{\\text{miles}}{\\text{hour}}"""
    found, end = [], at + 1
    for sign in (1, -1):
        if tokens[end].text != "{":
            return [], at
        inside, end = read_unit(tokens, end + 1)
        if not inside or tokens[end].text != "}":
            return [], at
        found += [(name, sign * power) for name, power in inside]
        end += 1
    return found, end


def _read_power(tokens: list, at: int) -> tuple[int, int]:
    """^2, ^{-2}; 1 if there is none."""
    texts = [token.text for token in tokens[at : at + 5]]
    for shape in (["^", 1], ["^", "-", 1], ["^", "{", 1, "}"], ["^", "{", "-", 1, "}"]):
        fits = len(texts) >= len(shape) and all(
            text == part or (part == 1 and re.fullmatch("[0-9]{1,2}", text))
            for text, part in zip(texts, shape)
        )
        if fits:
            power = int(texts[shape.index(1)])
            return -power if "-" in shape else power, at + len(shape)
    return 1, at
