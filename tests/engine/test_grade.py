"""Reading an answer and grading it (common.final_answer, format_reward, reasoning, grade, check_gold)."""
import cProfile
import math
import os
import sys
import threading
import time

import pytest
from PIL import Image

from common import UserError, box_iou, final_answer, format_reward, grade
from lab import algebra
from lab.algebra import read_math
from lab.data import check_gold
from mupo import reasoning


def score(gold, answer, verifier="math", **extra):
    return grade({"id": "0", "answer": gold, "verifier": verifier, **extra}, f"<think>so</think>\\boxed{{{answer}}}")


def test_trap_regex():
    assert final_answer("\\boxed{1} no, \\boxed{2}") == "2"  # the last box wins
    assert final_answer("a\n\\boxed{\n\\frac{1}{\\sqrt{2}}\n}\nand text after") == "\\frac{1}{\\sqrt{2}}"
    assert final_answer(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and final_answer(r"\boxed{\left\{x\right.}") == r"\left\{x\right."
    assert final_answer(r"\boxed {5}") == "5" and final_answer(r"\boxed{x = \boxed{5}}") == "5"
    for text in ("", "5", "\\boxed{", "\\boxed{}", "\\boxed{ \n}", "\\boxed{1} and \\boxed{2", "\\boxed{{2}", "\\fbox{2}"):
        assert final_answer(text) is None, text
        assert grade({"answer": "2", "verifier": "digit"}, text) == 0


def test_format():
    for text in ("<think>a</think>\\boxed{1}", " \n<think>a\nb</think>\n\nso \\boxed{\\frac{1}{2}}."):
        assert format_reward({}, text) == 1.0, text
    for text in ("\\boxed{1}", "<think></think>\\boxed{1}", "<think> \n</think>\\boxed{1}", "<think>\\boxed{1}</think>",
                 "<think>a\\boxed{1}", "so <think>a</think>\\boxed{1}", "<think>a</think>1", "<think>a</think>\\boxed{}",
                 "<think>a</think><think>b</think>\\boxed{1}", "<think><think>a</think>\\boxed{1}",
                 "<think>a</think></think>\\boxed{1}", "</think>a<think>\\boxed{1}", ""):
        assert format_reward({}, text) == 0.0, text


def test_reasoning():
    assert reasoning("<think> a\nb </think>\\boxed{1}") == "a\nb"
    assert reasoning("because \\boxed{1} so \\boxed{2}") == "because \\boxed{1} so"
    assert reasoning("only words") == "only words" and reasoning("\\boxed{1}") == "\\boxed{1}"


def test_digit():
    for answer in ("7", " 7 ", "+7", "07", "$7$", "7^\\circ"):
        assert score("7", answer, "digit") == 1, answer
    for answer in ("7.0", "8", "-7", "seven", "7 apples", "7 cm", "7, 8", "1,007", "x=7", "7" * 5000, "٧"):
        assert score("7", answer, "digit") == 0, answer


def test_mcq():
    for answer in ("B", "b", "(B)", "B.", "B)", " B ", "\\text{B}", "\\text{(B)}", "\\mathbf{B}"):
        assert score("B", answer, "mcq") == 1, answer
    for answer in ("A", "BB", "A or B", "B, C", "B 12", "not B", "(B) 5 cm", "8", "|B|"):
        assert score("B", answer, "mcq") == 0, answer


def test_iou():
    picture = [Image.new("RGB", (200, 100))]
    assert score("[0, 0, 10, 10]", "[0, 0, 10, 10]", "iou") == 1
    assert score("[0, 0, 10, 10]", "(5, 0, 15, 10)", "iou") == pytest.approx(1 / 3)  # 50 / (100 + 100 - 50)
    assert score("[0, 0, 10, 10]", "0,0,10,5.0", "iou") == pytest.approx(1 / 2)
    assert score("[100, 50, 200, 100]", "[0.5, 0.5, 1, 1]", "iou", images=picture) == 1
    assert score("[0.5, 0.5, 1, 1]", "[100, 50, 200, 100]", "iou", images=picture) == 1
    assert score("[50, 25, 100, 50]", "[0.5, 0.5, 1, 1]", "iou", images=picture, size=(100, 50)) == 1
    for answer in ("[10, 10, 0, 0]", "[0, 10, 10, 0]", "[5, 5, 5, 9]", "[0, 0, 10]", "[0, 0, 10, 10, 10]", "[0,0,10,nan]",
                   "[0,0,10,1e9]", "a box", "[0 0 10 10]", "[20, 20, 30, 30]", "[0, 0, 10, inf]"):
        assert score("[0, 0, 10, 10]", answer, "iou") == 0, answer


def test_iou_against_counting_cells():
    for a in ([0, 0, 4, 3], [1, 1, 3, 6], [2, 0, 7, 2]):
        for b in ([0, 0, 4, 3], [3, 2, 5, 5], [5, 5, 6, 6]):
            one, two = ({(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b))
            assert box_iou(a, b) == pytest.approx(len(one & two) / len(one | two))


def test_open_ended():
    def judge(problem, answer):
        return {"gold": 1.0, "better": 3.0, "same": 1.0, "worse": -50.0}[answer]

    problem = {"answer": "gold", "verifier": "open_ended"}
    values = {answer: grade(problem, f"\\boxed{{{answer}}}", judge) for answer in ("better", "same", "worse")}
    assert values == {"better": pytest.approx(1 - math.exp(-2.0)), "same": 0.0, "worse": 0.0}
    assert grade(problem, "no box", judge) == 0
    with pytest.raises(UserError, match="judge"):
        grade(problem, "\\boxed{better}")


EQUAL = [
    (r"\frac24", "1/2"), (r"54^\circ", "54"), ("54", r"54^{\circ}"), ("54", "54°"), (r"2 \sqrt { 221 }", r"2\sqrt{221}"),
    ("0.5", r"\dfrac{1}{2}"), ("7", "7.0"), ("1,000", "1000"), (r"1\frac{1}{2}", "3/2"), (r"\sqrt2", "√2"),
    ("sqrt(3)", r"\sqrt{3}"), (r"12\pi", "12pi"), (r"50\%", "0.5"), ("-3", "−3"), (r"3\times 10^{-19}", "3 · 10^{-19}"),
    ("5 cm", "5"), ("5", r"5\text{ cm}"), (r"12 \mathrm{~cm}^2", "12cm²"), (r"10\mathrm{~m}/\mathrm{s}", r"10 \text{m}/\text{s}"),
    ("2x+1", "1+2x"), ("2 x + 1", "2x+1"), ("(x+1)^2", "x^2+2x+1"), ("2xy", "2yx"), ("x^{2}", "x^2"), (r"\frac{1}{2}x", "x/2"),
    ("x=3", "3"), ("1,2", "2,1"), (r"x=2 \text{ or } x=3", "x=3,x=2"), (r"x \geq 3", "x≥3"), (r"\{1,2\}", r"\{2,1\}"),
    (r"\left(1,2\right)", "(1, 2)"), ("y=2x", "2x"), (r"(-\infty,3)\cup(4,5)", r"(4,5)\cup(-\infty,3)"),
    ("left", "Left"), ("left", r"\text{left}"), ("AB", r"\mathrm{AB}"), ("blue car", "blue  car."),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal(gold, answer):
    assert score(gold, answer) == score(answer, gold) == 1
    assert score(f"\\boxed{{{gold}}}", answer) == 1  # ViRL39K wraps its answers


DIFFERENT = [("2", "3"), ("1/2", "0.51"), ("5 cm", "5 m"), (r"5\text{ cm}", r"5\text{ m}"), ("3ab", "3"), ("2d", "2"),
             ("12/3", "1 2/3"), ("[1,2]", "[1,2)"), ("(1,2)", "(2,1)"), ("x+y=1", "1"), ("x^2=4", "4"), ("50", "500"),
             ("x", "y"), (r"\sqrt{3}", "3"), ("2x", "2"), ("1", "1.001"), (r"\frac{AB}{CD}", r"\frac{CD}{AB}")]


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different(gold, answer):
    assert score(gold, answer) == 0


def test_trap_words_as_algebra():
    for gold, answer in [("left", "felt"), ("AB", "BA"), ("ab", "ba"), ("no", "on"), ("A", "B"), ("cat", "act"), ("m", "M"),
                         ("H2O", "OH2"), ("3 cats", "3 acts"), ("2 left", "2 felt"), (r"2\text{ left}", r"2\text{ felt}"),
                         ("2AB", "2BA"), (r"\overline{AB}", r"\overline{BA}"), ("stop", "post"), ("ABC", "CAB"),
                         ("a, b", "b, a"), ("3cat", "3act"), ("A2", "2A"), ("listen to me", "silent to me")]:
        assert score(gold, answer) == score(answer, gold) == 0, (gold, answer)
        assert score(gold, gold) == score(answer, answer) == 1


def test_trap_unreadable_gold():
    for verifier, golds in {
        "math": ["", " ", "$$", ".", "\\text{}", "{}", "()", "?", "\\frac{", "\\frac{1}{2", "\\boxed{}", "\\boxed{1", "9^9^9^9",
                 "7" * 200, "1/0", "2+", "\\foo{"],
        "digit": ["", "7.0", "seven", "7 cm"],
        "mcq": ["", "AB", "5", "(A) 5"],
        "iou": ["", "[1, 2, 3]", "[3, 2, 1, 4]", "[1, 1, 1, 2]", "a box"],
        "open_ended": ["", " "],
        "other": ["1"],
    }.items():
        for gold in golds:
            with pytest.raises(ValueError):
                check_gold(gold, verifier)
            if verifier in ("math", "digit", "mcq", "iou"):  # were it not noticed, it would still earn nothing
                assert score(gold, "") == score(gold, " ") == score(gold, "\\text{}") == score(gold, "{}") == 0
    for verifier, gold in [("math", "2 \\sqrt { 221 }"), ("math", "Saturday"), ("math", "\\boxed{\\frac{1}{2}}"), ("math", "x"),
                           ("math", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("math", "\\{1, 2\\}"), ("math", "12:30"),
                           ("digit", "7"), ("mcq", "(b)"), ("iou", "[1, 2, 3.5, 4]"), ("open_ended", "a cat")]:
        check_gold(gold, verifier)


HOSTILE = [
    "9^9^9^9", "9^{9^{9^{9}}}", "9^(9^(9^9))", "{9^9}^9^9", "9²²²²²", "9**9**9**9", "9" * 10_000, "9." + "9" * 10_000,
    "10^{10^{10}}", "9^{9*9*9*9*9*9}", "9^{1/0.000000001}", "9^{99999999999}", "((9^{99})^{99})^{99}", "e^{e^{e^{22}}}",
    "\\sin(e^{99\\pi\\pi\\pi\\pi})", "x^{x^{x^{x}}}", "100000000!", "\\binom{10^9}{10^8}", "\\sqrt[999999]{2}", "1e999999999",
    "\\sqrt{999999999999989^{66}+1}", "(x+1)^{5000}", "(x+y+z+w)^{99}", "(a+b+c+d+f)^{30}+1", "((x+y+z)^{9})^{9}",
    "*".join(f"(x+{n})" for n in range(18)), "\\sum_{n=1}^{\\infty}\\frac{1}{n^2}", "\\int_0^1 x^x dx",
    "\\lim_{x\\to0}\\frac{\\sin x}{x}", "\\prod_{k=1}^{1000000}k", "\\frac{1}{" * 30 + "2" + "}" * 30, "\\sqrt{" * 20 + "2" + "}" * 20,
    "{" * 1000 + "}" * 1000, "(" * 70 + ")" * 70, "(" * 140, "\\frac{" * 500, "{" * 1000, "}" * 1000, "\\boxed{" * 10_000,
    "\\text{" * 1000, "|" * 140, "-" * 140 + "2", "\\pm" * 30 + "2", "x=" * 70 + "2", "1," * 70 + "2", " " * 50_000, "\0", "5\0",
    "a_{b_{c_{d}}}", "\\sin(\\sin(\\sin(\\sin(\\sin(x)))))", "x^x+y^y+z^z=w^w", "x^7-3x^6+2x^5-x+1=0", "1/0", "\\infty-\\infty",
    "\\ln(\\ln(\\ln(\\ln 3)))", "(1,2)\\cup(3,4)\\cup(5,6)\\cup(7,8)", "٣", "💥" * 100, "\\pi" * 60, "e" * 60, "\\\\" * 500,
    "__import__('os').system('true')", "eval('5')", "(lambda: 5)()", "exit()",
    "5" + "\\text{a}" * 20_000 + "x", "\\sin(e^{9" + "\\pi" * 20 + "})", "|" * 1499, "9" * 1000, "99^{99}\\cdot" * 100 + "1",
    "\\frac{1}{" * 140 + "1" + "}" * 140,
]
HOSTILE_IDS = [f"{n}-{text[:12].encode('ascii', 'backslashreplace').decode()}".replace("\0", "0") for n, text in enumerate(HOSTILE)]


@pytest.mark.parametrize("answer", HOSTILE, ids=HOSTILE_IDS)
def test_trap_hostile_answers(answer):
    score("2x+1", "1+2x")  # fills the parser's tables
    for gold, verifier in (("5", "math"), ("\\frac{x+y}{z}", "math"), ("5", "digit"), ("B", "mcq"), ("[1, 2, 3, 4]", "iou")):
        start = time.process_time()
        assert score(gold, answer, verifier) == 0
        assert time.process_time() - start < 1
    assert sys.getprofile() is None  # the counter of calls is gone again
    read_math.cache_clear()
    assert score("x^2-1", "(x-1)(x+1)") == 1  # Math-Verify still works: none of the zeros above came from a broken one


def test_trap_hostile_code(monkeypatch):
    monkeypatch.delenv("EVALUATED", raising=False)
    for answer in ("__import__('os').environ.update(EVALUATED='1')", "exec('import os; os.environ[\"EVALUATED\"] = \"1\"')",
                   "[__import__('os').putenv('EVALUATED','1') or __import__('os').environ.setdefault('EVALUATED','1')]"):
        eval(answer)  # the answer does what it says when it is evaluated...
        assert os.environ.pop("EVALUATED") == "1"
        assert score("5", answer) == score("x+1", answer) == 0 and "EVALUATED" not in os.environ  # ...which it is not


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
    world = vars(algebra)
    monkeypatch.setitem(world, "verify", endless)
    for limit in range(50, 70):  # so that the limit is reached in every kind of call
        monkeypatch.setitem(world, "MAX_CALLS", limit)
        assert score("2x+1", "1+2x") == 0


def test_off_the_main_thread():
    """Math-Verify's own alarm would raise here."""
    found = []
    thread = threading.Thread(target=lambda: found.extend([score("1/2", "0.5"), score("5", "(x+y+z+w)^{99}")]))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_under_a_profiler():
    profiler = cProfile.Profile()
    profiler.enable()
    assert score("1/2", "0.5") == 1 and sys.getprofile() is not None
    profiler.disable()
