"""When do two mathematical answers mean the same? Math-Verify, behind guards.

Math-Verify hands strings to sympy, and sympy believes anything: that "left" is e·f·l·t, that 9^9^9^9 is to be computed.
So words are compared as strings, and only short expressions made of known parts get that far. Math-Verify's own bound
is an alarm signal, which needs the main thread and makes rewards depend on the machine's speed; here a comparison may
cost a number of function calls instead (fewer, the more sympy has seen before). `common.grade` imports this module when it meets its first answer.
"""

import inspect
import logging
import math
import re
import sys
from functools import cache, lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns whenever its alarm is off
LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"))]  # units=True reads 3ab as 3
MAX_CALLS = 2_000_000  # about 0.4 s; an ordinary comparison costs 1,000 to 500,000, an early one up to 1,500,000
MAX_LENGTH = 150
KNOWN = set("""frac sqrt pi cdot times div pm mp le leq ge geq lt gt ne neq infty in cup cap sin cos tan sec csc cot
    arcsin arccos arctan ln log angle alpha beta gamma theta phi lambda mu omega rho sigma""".split())
CHARACTERS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "²": "^2",
                            "³": "^3", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∠": r"\angle "})
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\[()\[\]!,;: ]|\$|~|\\(?:left|right|displaystyle|quad)(?![a-z])", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^ ?(?:\\circ|\{ ?\\(?:circ|degree) ?\})|\\degree|°|(?<=\d) ?degrees?$", ""),
    (r"√ ?(\d+|[a-z])|\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (r"(?<![A-Za-z\\])pi(?![a-z])", r"\\pi "),
)]
TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}"
UNIT = rf"(?:{TEXT}|(?<![a-z])(?:[mcdk]m|[mk]g|m[lL]|in|inch(?:es)?|ft|feet|miles?|(?:square )?units?)\b)"
POWER = r"(?: ?\^ ?\{?-?\d\}?)?"
UNITS = re.compile(rf"(?:(?<=[\d}})])|(?<=pi)) ?{UNIT}{POWER}(?: ?(?:/|\\cdot)? ?{UNIT}{POWER})*$")
VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?!frac|sqrt)[a-z]+)(?: ?_ ?(?:\w|\{\w+\}))?(?: ?\( ?[a-z] ?\))? ?=")
EXPONENT = re.compile(r"\^ ?(-?\d+(?!\d)|\\[a-z]+|[A-Za-z]|\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\))(?! ?\^)")



@lru_cache(maxsize=4096)
def normal_form(text):
    r"""(value, unit) of an answer, less empty markup: \text{B}. is B, 54^\circ is 54, 2 cm is 2, cm."""
    text = " ".join(text.translate(CHARACTERS).split())
    if len(text) > 10 * MAX_LENGTH:
        return text, ""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = " ".join(text.split()).rstrip(" .,;")
    unit = UNITS.search(text)
    value = re.sub(TEXT, r" \1 ", text[:unit.start()] if unit else text)
    value = re.sub(r"(?<=\S) +(?:and|or) +(?=\S)", ",", value)
    return " ".join(value.split()), re.sub(r"\\[a-z]+|[\s{}^]", "", unit.group()) if unit else ""


def same_math(gold, answer):
    """Whether two answers mean the same, and mean something: as strings, or as algebra where both are algebra.
    A unit (5 cm) may be left out, but not exchanged for another."""
    (gold, gold_unit), (answer, answer_unit) = normal_form(gold), normal_form(answer)
    if not re.search(r"\w", gold) or gold_unit and answer_unit and gold_unit != answer_unit:
        return False  # {} never equals {}
    if as_string(gold) == as_string(answer):
        return True
    if "=" in gold and "=" not in answer and not VARIABLE.match(gold):
        return False  # 3 answers x = 3; but to Math-Verify 1 also answers x + y = 1
    return not is_words(gold) and not is_words(answer) and equal_math(gold, answer)


def read_expression(text):
    """The value in an answer, or None when nothing could be compared with it: neither words nor legible algebra."""
    value = normal_form(text)[0]
    if not re.search(r"\w", value) or value.count("{") != value.count("}"):
        return None
    return value if is_words(value) or equal_math(value, value) else None


def as_string(value):
    """Without spaces, but 1 2/3 is not 12/3; Left is left, but M is not m."""
    value = re.sub(r"(?<!\d) | (?!\d)", "", value)
    return re.sub(r"(?<![A-Za-z\\])[A-Z](?=[a-z])", lambda match: match.group().lower(), value)


def is_words(value):
    r"""Whether a value can only be compared as a string. Letters are variables when they stand beside digits or
    operators and look like a product: one or two small letters, or three in the order of the alphabet (2xy, 3abc).
    AB, left, H2O and everything with a command or character that is not known here are words."""
    bare = re.sub(r"\\[A-Za-z]+", " ", value)
    runs = re.findall("[A-Za-z]+", bare)
    unknown = set(re.findall(r"\\([A-Za-z]+)", value)) - KNOWN
    if unknown or re.search(r"[^A-Za-z0-9 +\-*/^_=<>.,:()\[\]{}|\\%]|[A-Za-z]\d", bare):
        return True
    if any(len(run) > 1 and not (run.islower() and run in (run[:2], "".join(sorted(run[:3])))) for run in runs):
        return True
    return bool(runs) and not re.search(r"[0-9+\-*/^_=<>|]|\\[A-Za-z]", value)


def is_tame(value):
    """Whether an expression is small enough for sympy: short, without long numbers, high powers or towers."""
    exponents = EXPONENT.findall(value)  # does not look inside an exponent, so that the counts differ for a tower
    if max(map(len, exponents), default=0) > 16 or len(exponents) != value.count("^") or len(value) > MAX_LENGTH:
        return False
    if re.search(r"[A-Za-z][^\\]*\) ?\^ ?\{? ?[2-9]\d", value):
        return False  # (a + b + c)^{20} has hundreds of terms
    factors = [max(1, int(number)) for exponent in exponents for number in re.findall(r"\d+", exponent)]
    return math.prod(factors) * max(map(len, re.findall(r"\d+", value)), default=1) <= 1000


@lru_cache(maxsize=4096)
def read_math(value):
    """Math-Verify's reading of a value: a list of sympy objects, empty when it cannot or may not be read."""
    return parse(f"${value}$", LATEX, "no_fallback", parsing_timeout=None) if is_tame(value) else []


def equal_math(gold, answer):
    """Whether Math-Verify reads both values and finds them equal, in at most MAX_CALLS function calls."""
    warm_up()
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        calls += 1
        # Only where a plain function starts: what is raised while a generator closes is lost, and this counter too.
        if calls > MAX_CALLS and event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            raise TimeoutException  # not an Exception, so that no "except Exception" of sympy's swallows it

    free = sys.getprofile() is None  # someone who profiles the run keeps the profiler, and is_tame alone must do
    if free:
        sys.setprofile(count)  # of this thread only
    try:
        return verify(read_math(gold), read_math(answer), timeout_seconds=None)
    except TimeoutException:
        return False
    finally:
        if free:
            sys.setprofile(None)


@cache
def warm_up():
    """Has sympy and the parser fill their tables, once: millions of calls that no single answer should pay for."""
    for left, right in ((r"\frac{1}{2}(x+1)^{2}", r"\sin x+\log_{2}x-\sqrt{3}"), (r"(-\infty,1)\cup[2,3)", "1<x"),
                        (r"\frac{3y+1}{y^{2}-1}", r"\frac{1+3y}{(y-1)(y+1)}"), (r"y=\frac{2}{3}x+4", "2x-3y+12=0")):
        verify(read_math(left), read_math(right), timeout_seconds=None)
