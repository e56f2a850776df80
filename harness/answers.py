r"""When do two answers mean the same? Finding the answer in a text, reading it, and comparing it with the gold answer.

One verifier per kind of answer, in the table VERIFIERS: an integer, an option letter, mathematics, a box, free text.
`common.grade` turns what is read here into a reward. Nothing here raises for a bad answer: what cannot be read is None,
and what cannot be compared is not equal.

Mathematics is compared by Math-Verify, behind guards. Math-Verify hands strings to sympy, and sympy believes anything:
that "left" is e·f·l·t, that 9^9^9^9 is to be computed. So words are compared as strings, and only short expressions
made of known parts reach Math-Verify. Its own time limit is an alarm signal, which needs the main thread and makes
rewards depend on the machine's speed. Here the limit is a number of function calls instead (a comparison needs fewer of
them, the more sympy has seen before).
"""

import inspect
import logging
import re
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from types import FrameType

from harness.flags import UserError

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns whenever its alarm is off

# --- the box or the tags an answer comes in ---------------------------------------------------------------------------

OPENING = re.compile(r"\\boxed\s*\{|<answer>")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \\. reads \{ and \} as one mark each, so that they are not counted


def final_answer(text: str) -> str | None:
    r"""What is inside the last \boxed{...} or <answer>...</answer> of a text, whichever begins last; braces kept.

    <answer>\boxed{5}</answer> gives 5. None when there is neither, when the last one is never closed, or when it is
    empty. The tags are those of the released VLAA-Thinker checkpoints.
    """
    openings = list(OPENING.finditer(text))
    if not openings:
        return None
    last = openings[-1]  # trap: regex (the last one wins)
    if last.group() == "<answer>":
        answer, closed, _ = text[last.end():].partition("</answer>")
    else:
        answer, closed = up_to_brace(text, last.end())
    if not closed or not answer.strip():
        return None
    return answer.strip()


def up_to_brace(text: str, start: int) -> tuple[str, str]:
    """What stands between `start` and the brace that closes there, and that brace; ("", "") when none does."""
    depth = 1
    for mark in BRACE.finditer(text, start):  # trap: regex (braces may be nested, and text may follow the box)
        if mark.group() == "{":
            depth += 1
        elif mark.group() == "}":
            depth -= 1
        if depth == 0:
            return text[start:mark.start()], mark.group()
    return "", ""


def unbox(answer: str) -> str:
    r"""A gold answer without the \boxed{} that some data sets wrap it in; "" when that box is broken or empty."""
    if "\\boxed" not in answer:
        return answer
    inside = final_answer(answer)
    if inside is None:
        return ""  # trap: unreadable gold (no verifier accepts an empty gold answer)
    return inside


# --- one form for many ways of writing --------------------------------------------------------------------------------

MAX_LENGTH = 150  # characters of an expression that Math-Verify may read

CHARACTERS = str.maketrans({
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "²": "^2",
    "³": "^3",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∠": r"\angle ",
})

FUNCTIONS = "sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|ln|log"

# (what to look for, what to write instead), applied in this order.
REWRITES = [
    # Markup that says nothing: \( \) \[ \] \! \, $ ~ \left \right \displaystyle \quad
    (re.compile(r"\\[()\[\]!,;: ]|\$|~|\\(?:left|right|displaystyle|quad)(?![a-z])"), " "),
    # \dfrac, \tfrac and \cfrac are \frac
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    # Degrees: ^\circ, ^{\circ}, ^{\degree}, \degree, °, and the word after a number
    (re.compile(r"\^ ?(?:\\circ|\{ ?\\(?:circ|degree) ?\})|\\degree|°|(?<=\d) ?degrees?$"), ""),
    # √2 and sqrt(2) are \sqrt{2}
    (re.compile(r"√ ?(\d+|[a-z])|\\?sqrt ?\(([^()]*)\)"), r"\\sqrt{\1\2}"),
    # 12pi is 12\pi
    (re.compile(r"(?<![A-Za-z\\])pi(?![a-z])"), r"\\pi "),
    # sin(x) is \sin(x), and 5 * sin(2 * x) is 5 \sin(2 x): so VLAA-Thinking's gold answers write functions
    (re.compile(rf"(?<![A-Za-z\\])({FUNCTIONS})(?= ?\()"), r"\\\1"),
    (re.compile(rf"(?<=\d) ?\* ?(?=[A-Za-z]|\\(?:{FUNCTIONS})\b)"), " "),
]

TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}"
UNIT_NAME = r"(?<![a-z])(?:[mcdk]m|[mk]g|m[lL]|in|inch(?:es)?|ft|feet|miles?|(?:square )?units?)\b"
UNIT_POWER = r"(?: ?\^ ?\{?-?\d\}?)?"
UNIT = rf"(?:{TEXT}|{UNIT_NAME}){UNIT_POWER}"
# One unit or several (cm, m/s, \text{kg}\cdot\text{m}^2), at the end, after a digit, a closing bracket or pi.
UNITS = re.compile(rf"(?:(?<=[\d}})])|(?<=pi)) ?{UNIT}(?: ?(?:/|\\cdot)? ?{UNIT})*$")


@lru_cache(maxsize=4096)
def normal_form(text: str) -> tuple[str, str]:
    r"""(value, unit) of an answer, without empty markup: \text{B}. is B, 54^\circ is 54, 2 cm is (2, cm)."""
    text = text.translate(CHARACTERS)
    text = one_line(text)
    if len(text) > 10 * MAX_LENGTH:  # trap: hostile answers (the patterns below may need quadratic time)
        return text, ""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = one_line(text).rstrip(" .,;")
    units = UNITS.search(text)
    if units is None:
        value = text
        unit = ""
    else:
        value = text[:units.start()]
        unit = re.sub(r"\\[a-z]+|[\s{}^]", "", units.group())
    value = re.sub(TEXT, r" \1 ", value)
    value = re.sub(r"(?<=\S) +(?:and|or) +(?=\S)", ",", value)
    return one_line(value), unit


def one_line(text: str) -> str:
    """A text with a single space in place of each run of white space, and none at its ends."""
    return " ".join(text.split())


# --- the same mathematics ---------------------------------------------------------------------------------------------

# A variable, or a function of one, before an equals sign: x =, y_{1} =, f(x) =, \theta =
VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?!frac|sqrt)[a-z]+)(?: ?_ ?(?:\w|\{\w+\}))?(?: ?\( ?[a-z] ?\))? ?=")


def same_math(gold: str, answer: str) -> bool:
    """Whether two answers mean the same, and mean something: as strings, or as algebra where both are algebra.

    A unit (5 cm) may be left out, but not replaced by another.
    """
    gold_value, gold_unit = normal_form(gold)
    answer_value, answer_unit = normal_form(answer)
    if not re.search(r"\w", gold_value):
        return False  # trap: unreadable gold ({} never equals {})
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if as_string(gold_value) == as_string(answer_value):
        return True
    if "=" in gold_value and "=" not in answer_value and not VARIABLE.match(gold_value):
        return False  # 3 answers x = 3; but to Math-Verify 1 also answers x + y = 1
    if is_words(gold_value) or is_words(answer_value):
        return False  # trap: words as algebra (words that are not the same string are not the same)
    return equal_math(gold_value, answer_value)


def read_expression(text: str) -> str | None:
    """The value in an answer, or None when nothing could equal it: it is neither words nor readable algebra."""
    value, _ = normal_form(text)
    if not re.search(r"\w", value):
        return None  # trap: unreadable gold
    if value.count("{") != value.count("}"):
        return None  # trap: unreadable gold
    if is_words(value) or equal_math(value, value):  # trap: unreadable gold (1/0 does not even equal itself)
        return value
    return None


def as_string(value: str) -> str:
    """A value as it is compared with another: without spaces, but 1 2/3 is not 12/3; Left is left, but M is not m."""
    value = re.sub(r"(?<!\d) | (?!\d)", "", value)
    return re.sub(r"(?<![A-Za-z\\])[A-Z](?=[a-z])", lower, value)


def lower(match: re.Match) -> str:
    """The matched letter as a small one."""
    return match.group().lower()


# --- guards -----------------------------------------------------------------------------------------------------------

# The LaTeX commands that may reach Math-Verify.
KNOWN = {
    "frac", "sqrt", "pi", "cdot", "times", "div", "pm", "mp", "le", "leq", "ge", "geq", "lt", "gt", "ne", "neq",
    "infty", "in", "cup", "cap", "angle",
    "sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "ln", "log",
    "alpha", "beta", "gamma", "theta", "phi", "lambda", "mu", "omega", "rho", "sigma",
}

UNKNOWN_CHARACTER = re.compile(r"[^A-Za-z0-9 +\-*/^_=<>.,:()\[\]{}|\\%]")
DIGIT_OR_OPERATOR = re.compile(r"[0-9+\-*/^_=<>|]|\\[A-Za-z]")


def is_words(value: str) -> bool:
    r"""Whether a value can only be compared as a string.

    Letters are variables when they stand beside digits or operators and look like a product (2xy, 3abc).
    AB, left, H2O, and everything with a command or a character that is not known here, are words.
    """
    commands = re.findall(r"\\([A-Za-z]+)", value)
    if not KNOWN.issuperset(commands):
        return True
    bare = re.sub(r"\\[A-Za-z]+", " ", value)  # without its commands
    if UNKNOWN_CHARACTER.search(bare):
        return True
    if re.search(r"[A-Za-z]\d", bare):
        return True  # H2O
    runs = re.findall("[A-Za-z]+", bare)
    for run in runs:
        if not is_product(run):  # trap: words as algebra (a product of letters may be reordered, a word may not)
            return True
    if not runs:
        return False
    return DIGIT_OR_OPERATOR.search(value) is None  # trap: words as algebra (letters alone are a word, as in ab and ba)


def is_product(run: str) -> bool:
    """Whether a run of letters looks like a product of variables: one letter, two small ones, or three small ones in
    the order of the alphabet."""
    if len(run) == 1:
        return True
    if not run.islower():
        return False
    if len(run) == 2:
        return True
    return len(run) == 3 and list(run) == sorted(run)


# What follows a ^, unless another ^ follows that. It does not look inside an exponent, so that a tower (x^{x^x}) has
# fewer exponents than signs.
EXPONENT = re.compile(r"\^ ?(-?\d+(?!\d)|\\[a-z]+|[A-Za-z]|\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\))(?! ?\^)")


def is_tame(value: str) -> bool:
    """Whether an expression is small enough for sympy: short, without long numbers, high powers or towers."""
    if len(value) > MAX_LENGTH:
        return False  # trap: hostile answers
    exponents = EXPONENT.findall(value)
    if len(exponents) != value.count("^"):
        return False  # trap: hostile answers (9^9^9^9)
    for exponent in exponents:
        if len(exponent) > 16:
            return False  # trap: hostile answers
    if re.search(r"[A-Za-z][^\\]*\) ?\^ ?\{? ?[2-9]\d", value):
        return False  # trap: hostile answers ((a + b + c)^{20} has hundreds of terms)
    power = 1
    for exponent in exponents:
        for number in re.findall(r"\d+", exponent):
            power *= max(1, int(number))
    longest = 1
    for number in re.findall(r"\d+", value):
        longest = max(longest, len(number))
    return power * longest <= 1000  # trap: hostile answers (about the number of digits of what sympy would compute)


# --- Math-Verify ------------------------------------------------------------------------------------------------------

NORMALIZATION = NormalizationConfig(
    basic_latex=True,
    units=False,  # True reads 3ab as 3
    malformed_operators=True,
    nits=True,
    boxed="none",
)
LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NORMALIZATION)]

# Calls and returns of functions in one comparison: about 0.4 s. An ordinary comparison needs 1,000 to 500,000 of them,
# an early one up to 1,500,000.
MAX_CALLS = 2_000_000

# Pairs that make sympy and the parser fill most of their tables.
WARM_UP = [
    (r"\frac{1}{2}(x+1)^{2}", r"\sin x+\log_{2}x-\sqrt{3}"),
    (r"(-\infty,1)\cup[2,3)", "1<x"),
    (r"\frac{3y+1}{y^{2}-1}", r"\frac{1+3y}{(y-1)(y+1)}"),
    (r"y=\frac{2}{3}x+4", "2x-3y+12=0"),
]


@lru_cache(maxsize=4096)
def read_math(value: str) -> list:
    """Math-Verify's reading of a value: a list of sympy objects, empty when it cannot or may not be read."""
    if not is_tame(value):
        return []
    return parse(f"${value}$", LATEX, "no_fallback", parsing_timeout=None)


def equal_math(gold: str, answer: str) -> bool:
    """Whether Math-Verify reads both values and finds them equal, within MAX_CALLS function calls."""
    warm_up()
    # Someone who profiles the run keeps the profiler; then nothing is counted, and is_tame is the only guard.
    profiled = sys.getprofile() is not None
    if not profiled:
        sys.setprofile(call_counter())  # trap: hostile answers (it counts in this thread only)
    try:
        return verify(read_math(gold), read_math(answer), timeout_seconds=None)
    except TimeoutException:
        return False
    finally:
        if not profiled:
            sys.setprofile(None)


def call_counter() -> Callable[[FrameType, str, object], None]:
    """A function for sys.setprofile that raises TimeoutException when more than MAX_CALLS calls have been made."""
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += 1
        if calls <= MAX_CALLS or event != "call":
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # what is raised while a generator closes is lost, and this counter with it: wait for a plain call
        raise TimeoutException  # not an Exception, so that no "except Exception" of sympy's swallows it

    return count


@cache
def warm_up() -> None:
    """Make sympy and the parser fill their tables, once: millions of calls that no single answer should pay for."""
    for left, right in WARM_UP:
        verify(read_math(left), read_math(right), timeout_seconds=None)


# --- one reader per verifier ------------------------------------------------------------------------------------------

BOX_NUMBER = r"(-?[0-9]{0,9}\.?[0-9]{1,18})"
BOX = re.compile(rf"[\[(]?{BOX_NUMBER},{BOX_NUMBER},{BOX_NUMBER},{BOX_NUMBER}[\])]?")


def read_integer(text: str) -> int | None:
    r"""An int, or None. $7$ and 7^\circ read as 7; 7.0, 1,000, "7 cm" and "7 apples" do not read."""
    value, unit = normal_form(text)
    if unit:
        return None
    if re.fullmatch(r"[+-]?[0-9]{1,18}", value) is None:  # trap: hostile answers (ten thousand digits)
        return None
    return int(value)


# An option with its text: (B) red, B) red, B: red, B. red. Text that names a second option (A: 5 or B: 6) is no choice.
LABELLED = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])(?:[):：．、]|\.(?= ))) ?(?![,;/&]|(?:or|and)\b)(\S.*)")
LABEL = re.compile(r"(?:^|[\s,;])\(?[A-Z][):：．]")


def read_letter(text: str) -> str | None:
    r"""An option letter in upper case, or None. B, b, (B), B), B., \text{B} read, and so does B: red, with its text."""
    value, _ = normal_form(text)
    alone = re.fullmatch(r"\(?([A-Za-z])\)?", value)
    if alone is not None:
        return alone.group(1).upper()
    labelled = LABELLED.fullmatch(value)
    if labelled is None or LABEL.search(labelled.group(3)):
        return None
    return (labelled.group(1) or labelled.group(2)).upper()


def read_box(text: str) -> list[float] | None:
    """A box [x1, y1, x2, y2] as four floats, or None; also None when it is reversed or has no area."""
    match = BOX.fullmatch(re.sub(r"\\left|\\right|[$\s]", "", text))
    if match is None:
        return None
    box = [float(coordinate) for coordinate in match.groups()]
    has_width = box[0] < box[2]
    has_height = box[1] < box[3]
    if has_width and has_height:
        return box
    return None


def read_text(text: str) -> str | None:
    """A text without the white space at its ends, or None when nothing is left."""
    stripped = text.strip()
    return stripped if stripped else None


# {verifier: (how it reads an answer, what a gold answer must be, for error messages)}. A reader gives None for what it
# cannot read; what it cannot read is refused as a gold answer at load time, and earns 0 as an answer.
VERIFIERS: dict[str, tuple[Callable[[str], object], str]] = {
    "digit": (read_integer, "an integer"),
    "mcq": (read_letter, "one letter"),
    "math": (read_expression, "words, or an expression that Math-Verify can read"),
    "iou": (read_box, "four numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2"),
    "open_ended": (read_text, "some text"),
}


def check_gradable(problem: dict, has_judge: bool):
    """UserError for a problem that only a judge could grade, where there is none."""
    if problem["verifier"] == "open_ended" and not has_judge:
        raise UserError("an open_ended answer can only be graded by a judge: name one with --reward_model; or "
                        "--verifiers digit,mcq,math,iou leaves out the problems with this verifier (first met: "
                        f"{problem.get('id')})")


# --- boxes ------------------------------------------------------------------------------------------------------------


def in_pixels(box: list[float], problem: dict) -> list[float]:
    """A box [x1, y1, x2, y2] in pixels of the picture as the model sees it, resized by the processor.

    Coordinates that are all at most 1 are fractions of the picture's width and height. The picture's size is
    problem["size"] = (width, height), which `encode` notes; where it is not given, that of problem["images"][0].
    """
    if max(box) > 1:
        return list(box)
    return scaled(box, size_of(problem))


def gold_in_pixels(box: list[float], problem: dict) -> list[float]:
    """A gold box in the same pixels. Gold answers in pixels belong to the picture as the data set has it.

    That one's size is problem["original"] where the pictures themselves are not at hand.
    """
    if max(box) <= 1 or "size" not in problem or not ("images" in problem or "original" in problem):
        return in_pixels(box, problem)
    width, height = problem.get("original") or problem["images"][0].size
    fractions = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
    return scaled(fractions, problem["size"])


def size_of(problem: dict) -> tuple[float, float]:
    """Width and height of a problem's first picture as the model sees it."""
    if "size" in problem:
        return problem["size"]
    return problem["images"][0].size


def scaled(box: list[float], size: tuple[float, float]) -> list[float]:
    """A box in fractions of width and height, times width and height."""
    width, height = size
    return [box[0] * width, box[1] * height, box[2] * width, box[3] * height]


def box_iou(a: list[float], b: list[float]) -> float:
    """Intersection over union, in [0, 1], of two boxes [x1, y1, x2, y2] that have an area."""
    overlap_width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    overlap_height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = overlap_width * overlap_height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (area_a + area_b - overlap)
