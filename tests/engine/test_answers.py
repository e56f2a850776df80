"""harness.answers: when two answers mean the same. Most of it is asked as a run asks it, through common.grade."""

import cProfile
import os
import sys
import threading
import time

from common import grade
from harness import answers
from harness.answers import box_iou, final_answer, read_math
from harness.rows import check_gold

import pytest
from PIL import Image


def score(gold, answer, verifier="math", **extra):
    """The reward of a well-formed text with this answer."""
    return grade({"id": "0", "answer": gold, "verifier": verifier, **extra}, f"<think>so</think>\\boxed{{{answer}}}")


# --- finding it -------------------------------------------------------------------------------------------------------


def test_trap_regex():
    """The last box or pair of tags wins; braces may be nested, and text and line breaks may stand anywhere."""
    found = {
        "\\boxed{1} no, \\boxed{2}": "2",
        "a\n\\boxed{\n\\frac{1}{\\sqrt{2}}\n}\nand text after": "\\frac{1}{\\sqrt{2}}",
        r"\boxed{\{1, 2\}}": r"\{1, 2\}",
        r"\boxed{\left\{x\right.}": r"\left\{x\right.",
        r"\boxed {5}": "5",
        r"\boxed{x = \boxed{5}}": "5",
        "<think>so</think>\n<answer>\n B \n</answer>": "B",
        "<answer>1</answer> no, <answer>2</answer>": "2",
        r"<answer>1</answer> no, \boxed{2}": "2",
        r"\boxed{1} no, <answer>2</answer>": "2",
        r"<answer>It is \boxed{5}.</answer>": "5",
        r"\boxed{<answer>5</answer>}": "5",
        r"<answer>\frac{1}{2}</answer> and {text": r"\frac{1}{2}",
    }
    for text, answer in found.items():
        assert final_answer(text) == answer, text


NO_BOX = [
    "", "5", "\\boxed{", "\\boxed{}", "\\boxed{ \n}", "\\boxed{1} and \\boxed{2", "\\boxed{{2}", "\\fbox{2}",
    "<answer>2", "<answer></answer>", "<answer> \n</answer>", "\\boxed{2} <answer>2", "<answer>2</answer> \\boxed{2",
    "2</answer>", "<Answer>2</Answer>", "< answer >2</ answer >",
]


@pytest.mark.parametrize("text", NO_BOX)
def test_a_text_without_a_whole_box_has_no_answer(text):
    """Nor does an earlier one count when the last one is broken."""
    assert final_answer(text) is None
    assert grade({"answer": "2", "verifier": "digit"}, text) == 0


# --- integers, letters, boxes -----------------------------------------------------------------------------------------


def test_digit():
    for answer in ("7", " 7 ", "+7", "07", "$7$", "7^\\circ"):
        assert score("7", answer, "digit") == 1, answer
    for answer in ("7.0", "8", "-7", "seven", "7 apples", "7 cm", "7, 8", "1,007", "x=7", "7" * 5000, "٧"):
        assert score("7", answer, "digit") == 0, answer


def test_mcq():
    for answer in ("B", "b", "(B)", "B.", "B)", " B ", "\\text{B}", "\\text{(B)}", "\\mathbf{B}"):
        assert score("B", answer, "mcq") == 1, answer
    for answer in ("B: 27°", "B. red", "(B) 5 cm", "(b) red", "B) red", "\\text{B: red}"):  # the option with its text
        assert score("B", answer, "mcq") == 1, answer
    for answer in ("A", "BB", "A or B", "B, C", "B 12", "not B", "8", "|B|", "b. red", "B.C", "C: B", "(B) or (C)",
                   "B: 5 or C: 6", "B), C)", "B. and C."):
        assert score("B", answer, "mcq") == 0, answer


def test_iou():
    gold = "[0, 0, 10, 10]"
    assert score(gold, gold, "iou") == 1
    assert score(gold, "(5, 0, 15, 10)", "iou") == pytest.approx(1 / 3)  # 50 / (100 + 100 - 50)
    assert score(gold, "0,0,10,5.0", "iou") == pytest.approx(1 / 2)
    assert score(gold, "[20, 20, 30, 30]", "iou") == 0


def test_boxes_as_fractions_of_the_picture():
    """Coordinates up to 1 are fractions; the picture's size is that of images[0] unless the problem says another."""
    picture = [Image.new("RGB", (200, 100))]
    pixels = "[100, 50, 200, 100]"
    fractions = "[0.5, 0.5, 1, 1]"
    assert score(pixels, fractions, "iou", images=picture) == 1
    assert score(fractions, pixels, "iou", images=picture) == 1
    assert score(fractions, "[50, 25, 100, 50]", "iou", images=picture, size=(100, 50)) == 1


def test_a_gold_box_belongs_to_the_data_sets_picture_and_an_answer_to_the_resized_one():
    """The data set's picture is 200 x 100, the model saw 112 x 56 of it: a box in the middle third, in both."""
    picture = [Image.new("RGB", (200, 100))]
    seen = dict(images=picture, size=(112, 56))
    gold = "[50, 25, 150, 75]"
    assert score(gold, "[28, 14, 84, 42]", "iou", **seen) == pytest.approx(1)
    assert score(gold, "[0.25, 0.25, 0.75, 0.75]", "iou", **seen) == pytest.approx(1)
    assert score(gold, gold, "iou", **seen) < 0.3
    assert score("[0.25, 0.25, 0.75, 0.75]", "[28, 14, 84, 42]", "iou", **seen) == pytest.approx(1)


NO_COORDINATES = [
    "[10, 10, 0, 0]", "[0, 10, 10, 0]", "[5, 5, 5, 9]", "[0, 0, 10]", "[0, 0, 10, 10, 10]", "[0,0,10,nan]",
    "[0,0,10,1e9]", "a box", "[0 0 10 10]", "[0, 0, 10, inf]",
]


@pytest.mark.parametrize("answer", NO_COORDINATES)
def test_what_is_no_box_earns_nothing(answer):
    assert score("[0, 0, 10, 10]", answer, "iou") == 0


def cells_of(box):
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def test_iou_against_counting_cells():
    for a in ([0, 0, 4, 3], [1, 1, 3, 6], [2, 0, 7, 2]):
        for b in ([0, 0, 4, 3], [3, 2, 5, 5], [5, 5, 6, 6]):
            shared = len(cells_of(a) & cells_of(b))
            covered = len(cells_of(a) | cells_of(b))
            assert box_iou(a, b) == pytest.approx(shared / covered)


# --- mathematics ------------------------------------------------------------------------------------------------------

EQUAL = [
    # fractions, decimals, roots
    (r"\frac24", "1/2"),
    ("0.5", r"\dfrac{1}{2}"),
    ("7", "7.0"),
    (r"1\frac{1}{2}", "3/2"),
    (r"2 \sqrt { 221 }", r"2\sqrt{221}"),
    (r"\sqrt2", "√2"),
    ("sqrt(3)", r"\sqrt{3}"),
    # ways to write a number
    ("1,000", "1000"),
    (r"12\pi", "12pi"),
    (r"50\%", "0.5"),
    ("-3", "−3"),
    (r"3\times 10^{-19}", "3 · 10^{-19}"),
    # degrees and units
    (r"54^\circ", "54"),
    ("54", r"54^{\circ}"),
    ("54", "54°"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}"),
    (r"12 \mathrm{~cm}^2", "12cm²"),
    (r"10\mathrm{~m}/\mathrm{s}", r"10 \text{m}/\text{s}"),
    # algebra
    ("2x+1", "1+2x"),
    ("2 x + 1", "2x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2xy", "2yx"),
    ("x^{2}", "x^2"),
    (r"\frac{1}{2}x", "x/2"),
    ("y=2x", "2x"),
    # solutions, sets, intervals
    ("x=3", "3"),
    ("1,2", "2,1"),
    (r"x=2 \text{ or } x=3", "x=3,x=2"),
    (r"x \geq 3", "x≥3"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"(-\infty,3)\cup(4,5)", r"(4,5)\cup(-\infty,3)"),
    # words
    ("left", "Left"),
    ("left", r"\text{left}"),
    ("AB", r"\mathrm{AB}"),
    ("blue car", "blue  car."),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal(gold, answer):
    assert score(gold, answer) == 1
    assert score(answer, gold) == 1
    assert score(f"\\boxed{{{gold}}}", answer) == 1  # ViRL39K wraps its answers


DIFFERENT = [
    ("2", "3"),
    ("50", "500"),
    ("1", "1.001"),
    ("1/2", "0.51"),
    ("12/3", "1 2/3"),
    (r"\sqrt{3}", "3"),
    ("5 cm", "5 m"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("2d", "2"),
    ("2x", "2"),
    ("3ab", "3"),
    ("x", "y"),
    ("[1,2]", "[1,2)"),
    ("(1,2)", "(2,1)"),
    ("x+y=1", "1"),
    ("x^2=4", "4"),
    (r"\frac{AB}{CD}", r"\frac{CD}{AB}"),
]


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different(gold, answer):
    assert score(gold, answer) == 0


WORDS = [
    ("left", "felt"), ("AB", "BA"), ("ab", "ba"), ("no", "on"), ("A", "B"), ("cat", "act"), ("m", "M"),
    ("H2O", "OH2"), ("3 cats", "3 acts"), ("2 left", "2 felt"), (r"2\text{ left}", r"2\text{ felt}"),
    ("2AB", "2BA"), (r"\overline{AB}", r"\overline{BA}"), ("stop", "post"), ("ABC", "CAB"),
    ("a, b", "b, a"), ("3cat", "3act"), ("A2", "2A"), ("listen to me", "silent to me"),
]


@pytest.mark.parametrize("gold, answer", WORDS)
def test_trap_words_as_algebra(gold, answer):
    """Products of letters may be reordered, words may not; each equals itself."""
    assert score(gold, answer) == 0
    assert score(answer, gold) == 0
    assert score(gold, gold) == 1
    assert score(answer, answer) == 1


# --- gold answers -----------------------------------------------------------------------------------------------------

UNREADABLE = {
    "math": [
        "", " ", "$$", ".", "\\text{}", "{}", "()", "?", "\\frac{", "\\frac{1}{2", "\\boxed{}", "\\boxed{1", "9^9^9^9",
        "7" * 200, "1/0", "2+", "\\foo{",
    ],
    "digit": ["", "7.0", "seven", "7 cm"],
    "mcq": ["", "AB", "5", "A or B"],
    "iou": ["", "[1, 2, 3]", "[3, 2, 1, 4]", "[1, 1, 1, 2]", "a box"],
    "open_ended": ["", " "],
    "other": ["1"],
}
READABLE = [
    ("math", "2 \\sqrt { 221 }"),
    ("math", "Saturday"),
    ("math", "\\boxed{\\frac{1}{2}}"),
    ("math", "x"),
    ("math", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("math", "\\{1, 2\\}"),
    ("math", "12:30"),
    ("digit", "7"),
    ("mcq", "(b)"),
    ("iou", "[1, 2, 3.5, 4]"),
    ("open_ended", "a cat"),
]


@pytest.mark.parametrize("verifier", UNREADABLE)
def test_trap_unreadable_gold(verifier):
    """An error when the data set is loaded. Were it not noticed there, it would still earn nothing."""
    for gold in UNREADABLE[verifier]:
        with pytest.raises(ValueError, match="verifier"):
            check_gold(gold, verifier)
        if verifier in ("math", "digit", "mcq", "iou"):
            for answer in ("", " ", "\\text{}", "{}"):
                assert score(gold, answer, verifier) == 0
                assert score(gold, answer) == 0


@pytest.mark.parametrize("verifier, gold", READABLE)
def test_a_readable_gold_answer_passes(verifier, gold):
    check_gold(gold, verifier)


# --- hostile answers --------------------------------------------------------------------------------------------------

HOSTILE = [
    # towers and high powers
    "9^9^9^9", "9^{9^{9^{9}}}", "9^(9^(9^9))", "{9^9}^9^9", "9²²²²²", "9**9**9**9", "10^{10^{10}}", "9^{9*9*9*9*9*9}",
    "9^{1/0.000000001}", "9^{99999999999}", "((9^{99})^{99})^{99}", "e^{e^{e^{22}}}", "x^{x^{x^{x}}}", "1e999999999",
    "\\sin(e^{99\\pi\\pi\\pi\\pi})", "\\sin(e^{9" + "\\pi" * 20 + "})", "\\sqrt{999999999999989^{66}+1}",
    "99^{99}\\cdot" * 100 + "1", "\\sqrt[999999]{2}",
    # long numbers
    "9" * 1000, "9" * 10_000, "9." + "9" * 10_000, "100000000!", "\\binom{10^9}{10^8}",
    # hundreds of terms
    "(x+1)^{5000}", "(x+y+z+w)^{99}", "(a+b+c+d+f)^{30}+1", "((x+y+z)^{9})^{9}",
    "*".join(f"(x+{n})" for n in range(18)),
    # what a CAS would compute
    "\\sum_{n=1}^{\\infty}\\frac{1}{n^2}", "\\int_0^1 x^x dx", "\\lim_{x\\to0}\\frac{\\sin x}{x}",
    "\\prod_{k=1}^{1000000}k", "x^x+y^y+z^z=w^w", "x^7-3x^6+2x^5-x+1=0", "1/0", "\\infty-\\infty",
    "\\ln(\\ln(\\ln(\\ln 3)))", "\\sin(\\sin(\\sin(\\sin(\\sin(x)))))", "(1,2)\\cup(3,4)\\cup(5,6)\\cup(7,8)",
    # deep nesting and broken braces
    "\\frac{1}{" * 30 + "2" + "}" * 30, "\\frac{1}{" * 140 + "1" + "}" * 140, "\\sqrt{" * 20 + "2" + "}" * 20,
    "{" * 1000 + "}" * 1000, "(" * 70 + ")" * 70, "(" * 140, "\\frac{" * 500, "{" * 1000, "}" * 1000,
    "\\boxed{" * 10_000, "\\text{" * 1000, "a_{b_{c_{d}}}",
    # the same again and again
    "|" * 140, "|" * 1499, "-" * 140 + "2", "\\pm" * 30 + "2", "x=" * 70 + "2", "1," * 70 + "2", "\\pi" * 60, "e" * 60,
    "\\\\" * 500, " " * 50_000, "5" + "\\text{a}" * 20_000 + "x",
    # strange characters
    "\0", "5\0", "٣", "💥" * 100,
    # code
    "__import__('os').system('true')", "eval('5')", "(lambda: 5)()", "exit()",
]


def name_of(number, text):
    """The number of a hostile answer and its beginning, as pytest can show it."""
    beginning = text[:12].encode("ascii", "backslashreplace").decode()
    return f"{number}-{beginning}".replace("\0", "0")


@pytest.mark.parametrize("answer", HOSTILE, ids=[name_of(n, text) for n, text in enumerate(HOSTILE)])
def test_trap_hostile_answers(answer):
    """Reward 0 within seconds of computing, whatever the gold answer; and nothing is worn out by it."""
    score("2x+1", "1+2x")  # fills the parser's tables
    golds = [("5", "math"), ("\\frac{x+y}{z}", "math"), ("5", "digit"), ("B", "mcq"), ("[1, 2, 3, 4]", "iou")]
    for gold, verifier in golds:
        start = time.process_time()
        assert score(gold, answer, verifier) == 0
        assert time.process_time() - start < 10  # a second on an idle core; a busy neighbour makes seconds longer
    assert sys.getprofile() is None  # the counter of calls is gone again
    read_math.cache_clear()
    assert score("x^2-1", "(x-1)(x+1)") == 1  # Math-Verify still works: none of the zeros above came from a broken one


CODE = [
    "__import__('os').environ.update(EVALUATED='1')",
    "exec('import os; os.environ[\"EVALUATED\"] = \"1\"')",
    "[__import__('os').putenv('EVALUATED','1') or __import__('os').environ.setdefault('EVALUATED','1')]",
]


@pytest.mark.parametrize("answer", CODE)
def test_trap_hostile_code(monkeypatch, answer):
    monkeypatch.delenv("EVALUATED", raising=False)
    eval(answer)  # the answer does what it says when it is evaluated...
    assert os.environ.pop("EVALUATED") == "1"
    assert score("5", answer) == 0
    assert score("x+1", answer) == 0
    assert "EVALUATED" not in os.environ  # ...which it is not


# --- the counter of calls ---------------------------------------------------------------------------------------------


def test_counter_outlives_generators(monkeypatch):
    """An exception raised while a generator is closed is dropped by Python, and the counter of calls with it."""

    def steps():
        try:
            yield 1
        finally:
            str(1)

    def endless(*_, **__):
        for _ in range(20_000):
            next(steps())  # started, and closed at once
            (lambda: None)()
        return True

    assert score("2x+1", "1+2x") == 1  # both are read, and remembered, before the limits below
    monkeypatch.setattr(answers, "verify", endless)
    for limit in range(50, 70):  # so that the limit is reached in every kind of call
        monkeypatch.setattr(answers, "MAX_CALLS", limit)
        assert score("2x+1", "1+2x") == 0


def test_off_the_main_thread():
    """Math-Verify's own alarm would raise here."""
    found = []

    def work():
        found.append(score("1/2", "0.5"))
        found.append(score("5", "(x+y+z+w)^{99}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_under_a_profiler():
    profiler = cProfile.Profile()
    profiler.enable()
    assert score("1/2", "0.5") == 1
    assert sys.getprofile() is not None
    profiler.disable()
