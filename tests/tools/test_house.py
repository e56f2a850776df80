"""The rules of the house that a machine can hold: arrows, plain lines, same name same source, defaults, traps.

Scripts and forks are found by themselves: a new one is held to the rules without a change here.
"""

import ast
import importlib
import io
import re
import tokenize
from collections import defaultdict

from harness.flags import ALL_TABLES, MODEL_FLAGS, Parser, parse_args
from lab import house

import pytest
from conftest import ROOT
from drive import load_script

SCRIPTS = list(house.SCRIPTS)
FORKS = sorted(f"forks/{path.stem}" for path in (ROOT / "forks").glob("*.py"))
ROOMS = ("*.py", "harness/*.py", "tabletop/*.py", "forks/*.py", "lab/*.py")
CODE = sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in ROOT.glob(room))
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def parsed(path):
    return ast.parse((ROOT / path).read_text())


# --- arrows -----------------------------------------------------------------------------------------------------------


def test_imports_point_down_and_make_no_circle():
    found = house.arrows()
    assert [arrow for arrow in found if arrow.function is None and house.runs_up(arrow)] == []
    assert house.circle(found) == []
    assert {house.room_of(arrow.source) for arrow in found} >= {"lab", "forks", "scripts", "tabletop", "common"}


def test_only_two_imports_stand_in_functions():
    inside = set()
    for path in CODE:
        for node, function in house.imports_in(parsed(path)):
            if function is not None:
                inside.add((path, function, ast.unparse(node)))
    ours = {("common.py", "tabletop", "import tabletop"), ("common.py", "report", "from lab import report")}
    # TRL is no requirement: the bench compares with it where it is installed.
    others = {(path, statement) for path, _, statement in inside - ours}
    assert inside >= ours
    assert others <= {("lab/bench.py", "import trl")}


def test_a_circle_and_an_arrow_up_would_be_seen():
    up = house.Arrow("harness.run", "common", 1, None)
    assert house.runs_up(up)
    assert house.runs_up(house.Arrow("vepo", "grpo", 1, None))
    assert not house.runs_up(house.Arrow("common", "harness.run", 1, None))
    assert house.circle(house.arrows() + [up])[0] in ("common", "harness.run", "harness.rollout", "harness.updates")


def test_the_house_can_be_drawn(tmp_path):
    house.draw(house.arrows(), tmp_path / "house.png")
    assert (tmp_path / "house.png").stat().st_size > 10_000


# --- plain lines ------------------------------------------------------------------------------------------------------


def code_lines(path):
    """The numbers of the lines that hold code: no blank line, comment or docstring."""
    text = (ROOT / path).read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - prose


def depth(node, level=0):
    """How deep loops, branches, with and try stand inside each other. An elif is no deeper than its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            continue
        nests = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child, level + int(nests and not is_elif)))
    return deepest


@pytest.mark.parametrize("path", CODE)
def test_functions_are_short_and_flat(path):
    lines = code_lines(path)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            size = sum(node.lineno <= number <= node.end_lineno for number in lines)
            most = 80 if node.name == "main" else 40
            assert size <= most, f"{path}: {node.name} has {size} lines of code"
            assert depth(node) <= 3, f"{path}: {node.name} nests {depth(node)} deep"


def clever(node):
    """What makes a line hard to read aloud, or None."""
    assigns = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    if assigns and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2:
        return "several things in one assignment"
    if isinstance(node, ast.IfExp) and any(isinstance(child, ast.IfExp) for child in (node.body, node.orelse)):
        return "a conditional expression inside another"
    arithmetic = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Add | ast.Sub)
    if arithmetic and any(isinstance(side, ast.Compare | ast.BoolOp) for side in (node.left, node.right)):
        return "a comparison used as a number"
    many = isinstance(node, ast.Call) and len(node.args) > 4
    if many and not any(isinstance(argument, ast.Starred) for argument in node.args):
        return "more than four arguments without a name"
    if isinstance(node, ast.Call) and ast.unparse(node).startswith("dict(zip("):
        return "dict(zip(...))"
    return None


@pytest.mark.parametrize("path", CODE)
def test_lines_are_plain(path):
    for node in ast.walk(parsed(path)):
        assert clever(node) is None, f"{path}, line {node.lineno}: {clever(node)}"
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        assert len(line) <= 120, f"{path}, line {number} has {len(line)} columns"


@pytest.mark.parametrize("line", [
    "a, b, c = 1, 'x', []", "x = 1 if a else 2 if b else 3", "x = [0] * (n > 1)", "f(1, 2, 3, 4, 5)",
    "d = dict(zip('ab', x))",
])
def test_a_clever_line_would_be_seen(line):
    assert any(clever(node) for node in ast.walk(ast.parse(line)))


@pytest.mark.parametrize("path", [path for path in CODE if path.startswith("harness/")] + ["common.py"])
def test_signatures_carry_types(path):
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        assert set(bare) <= {"self", "cls"}, f"{path}: {node.name}({', '.join(bare)})"


# --- same name, same source -------------------------------------------------------------------------------------------


def changed_on_purpose(path):
    """The functions that a fork's docstring says it changes: its line `Changes on purpose: a, b.`"""
    doc = ast.get_docstring(parsed(path)) or ""
    line = re.search(r"^Changes on purpose: (.*)\.$", doc, re.MULTILINE)
    assert not path.startswith("forks/") or line, f"{path}: the docstring lacks `Changes on purpose: ...`"
    return set(re.findall(r"\w+", line.group(1))) if line else set()


def definitions():
    """{name: {file: source}} of the top-level functions and classes of scripts and forks."""
    found = defaultdict(dict)
    for path in [f"{name}.py" for name in SCRIPTS + FORKS]:
        text = (ROOT / path).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "flags"):
                found[node.name][path] = ast.get_source_segment(text, node)
    return found


def test_same_name_same_source():
    found = definitions()
    assert len(found["policy_loss"]) > 4
    for name, places in found.items():
        held = {path: source for path, source in places.items() if name not in changed_on_purpose(path)}
        assert len(set(held.values())) <= 1, f"{name} differs between {', '.join(held)}"


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_says_what_it_changes_and_changes_little(fork):
    path = f"{fork}.py"
    found = definitions()
    for name in changed_on_purpose(path) - {"none"}:
        assert found[name][path] != found[name]["grpo.py"], f"{path} does not change {name}"
    original = (ROOT / "grpo.py").read_text().split('"""', 2)[2].splitlines()
    ours = (ROOT / path).read_text().split('"""', 2)[2].splitlines()
    new = [line for line in ours if line not in original and line.strip()]
    assert len(new) <= 40, f"{path} has {len(new)} lines that grpo.py has not"


# --- flags ------------------------------------------------------------------------------------------------------------


def arguments(name, *argv):
    script = load_script(str(ROOT / f"{name}.py") if "/" in name else name)
    tables = vars(script).get("TABLES", ALL_TABLES)
    args = parse_args(name, script.flags, recipe=script.RECIPE, toy=script.TOY, argv=list(argv), tables=tables)
    return script, tables, vars(args)


def own_flags(name):
    parser = Parser()
    load_script(str(ROOT / f"{name}.py") if "/" in name else name).flags(parser)
    found = {}
    for action in parser._actions:
        if action.dest != "help":
            found[action.dest] = (action.type, action.help, action.choices and tuple(action.choices))
    return found


def test_a_flag_of_two_scripts_has_one_type_and_one_help():
    world = {flag.name for table in ALL_TABLES for flag in table}
    seen = {}
    for name in SCRIPTS + FORKS:
        for flag, meaning in own_flags(name).items():
            assert seen.setdefault(flag, meaning) == meaning, f"--{flag} of {name}"
            assert flag not in world or flag == "dataset"


@pytest.mark.parametrize("name", SCRIPTS + FORKS)
def test_command_line_over_toy_over_recipe_over_the_world(name):
    script, tables, toy = arguments(name)
    _, _, real = arguments(name, "--model", "some/model")
    world = {flag.name: flag.default for table in tables for flag in table}
    assert set(script.RECIPE) | set(script.TOY) <= set(world) | set(own_flags(name))
    for flag, value in script.RECIPE.items():
        assert real[flag] == value
    for flag, value in script.TOY.items():
        assert toy[flag] == value
        if isinstance(value, int | float) and not isinstance(value, bool):
            asked = value / 2 if 0 < value < 1 else value + 1  # a share stays one
            assert arguments(name, f"--{flag}", str(asked))[2][flag] == asked
    for flag in set(real) & set(world) - set(script.RECIPE) - {"model", "output_dir"}:
        assert real[flag] == world[flag]


def test_eval_passk_has_the_model_flags_alone():
    assert importlib.import_module("eval_passk").TABLES == (MODEL_FLAGS,)


# --- traps ------------------------------------------------------------------------------------------------------------

TRAPS = """temperature; truncated sampling; vision tokens sampled; end of text; mrope; left padding; image rows;
    prompt truncation; pixel budget; ratio; kl; normaliser; masks; group std; entropy; double detach; unwrapped forward;
    sharded generate; bf16 adam; checkpointing and cache; seeds; stale rope_deltas; regex; unreadable gold;
    full disk; torn checkpoint; swallowed signal;
    words as algebra; hostile answers; pass at k; broken problems; padding pass; regrouped subset; early break;
    collective timeout; whose disk; false cause; busy cores; one core"""


def trap_names():
    return [" ".join(name.split()) for name in TRAPS.split(";")]


@pytest.mark.parametrize("trap", trap_names())
def test_every_trap_has_its_test_and_its_line(trap):
    function = f"def test_trap_{trap.replace(' ', '_')}("
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert function in tests, f"no test is called {function})"
    if trap != "one core":  # a trap of tests: no line of the code guards it
        code = "".join((ROOT / path).read_text() for path in CODE)
        assert f"trap: {trap}" in code, f"no line carries `# trap: {trap}`"
    row = next(line for line in (ROOT / "tests/README.md").read_text().splitlines() if line.startswith(f"| {trap} |"))
    *_, places, test, _ = row.split("|")
    assert function in (ROOT / "tests" / test.strip(" `")).read_text()
    for place in re.findall(r"`([^`]+)`", places):
        assert f"trap: {trap}" in (ROOT / place).read_text(), f"{place} carries no `# trap: {trap}`"
