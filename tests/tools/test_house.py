"""The house rules that a machine can hold: budgets, the lesson diffs, same name same source, layers of defaults."""

import ast
import difflib
import importlib
import io
import tokenize
from collections import defaultdict

import pytest

import common
import opd
from conftest import ROOT

SCRIPTS = [name for name in ("sft", "opd", "grpo", "vepo", "mupo", "eval_passk") if (ROOT / f"{name}.py").exists()]
BUDGETS = {"common.py": 700, "lab/toy.py": 400} | {f"{name}.py": 260 for name in SCRIPTS}
SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path):
    """{line number: text} of the lines that hold code: no blank line, comment or docstring."""
    text, kept, prose = (ROOT / path).read_text(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIP:
            kept |= set(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return {n: lines[n - 1].rstrip() for n in sorted(kept - prose)}


def functions(path):
    return [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)]


def depth(node, level=0):
    """How deep loops, branches, with and try stand inside each other."""
    nests = isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))
    return max([level + nests] + [depth(child, level + nests) for child in ast.iter_child_nodes(node)
                                  if not isinstance(child, ast.FunctionDef)])


@pytest.mark.parametrize("path, most", BUDGETS.items())
def test_budgets(path, most):
    lines = code_lines(path)
    assert len(lines) <= most
    assert max(map(len, (ROOT / path).read_text().splitlines())) <= 120
    for node in functions(path):
        size = sum(node.lineno <= n <= node.end_lineno for n in lines)
        assert size <= (60 if node.name == "main" else 45), f"{path}: {node.name} has {size} lines of code"
        assert depth(node) <= 3, f"{path}: {node.name} nests {depth(node)} deep"


@pytest.mark.parametrize("other, most", [("vepo", 90), ("mupo", 130)])
def test_the_diff_is_the_lesson(other, most):
    if other not in SCRIPTS:
        pytest.skip(f"{other}.py is not written yet")
    ours, theirs = (list(code_lines(f"{name}.py").values()) for name in ("grpo", other))
    assert sum(line.startswith("+ ") for line in difflib.ndiff(ours, theirs)) <= most


def test_same_name_same_source():
    found = defaultdict(dict)
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "flags"):
                found[node.name][name] = ast.get_source_segment(text, node)
    for name, places in found.items():
        assert len(set(places.values())) == 1, f"{name} differs between {', '.join(places)}"


def tables_of(name):
    known = dict(sft=(common.MODEL_FLAGS, common.TRAIN_FLAGS), opd=opd.TABLES, eval_passk=(common.MODEL_FLAGS,))
    return known.get(name, (common.MODEL_FLAGS, common.TRAIN_FLAGS, common.ROLLOUT_FLAGS))


def parsed(name, *argv):
    script, tables = importlib.import_module(name), tables_of(name)
    return script, vars(common.parse_args(name, "", script.flags, script.RECIPE, script.TOY, argv, tables))


def own_flags(name):
    parser = common.Parser()
    importlib.import_module(name).flags(parser)
    return {action.dest: (action.type, action.help, action.choices and tuple(action.choices))
            for action in parser._actions if action.dest != "help"}


def test_a_flag_of_two_scripts_has_one_type_and_one_help():
    seen = {}
    for name in SCRIPTS:
        for flag, meaning in own_flags(name).items():
            assert seen.setdefault(flag, meaning) == meaning, f"--{flag} of {name}"
            assert flag not in (*common.MODEL_FLAGS, *common.TRAIN_FLAGS, *common.ROLLOUT_FLAGS) or flag == "dataset"


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line_over_toy_over_recipe_over_the_world(name):
    script, toy = parsed(name)
    _, real = parsed(name, "--model", "some/model")
    world = {flag: default for table in tables_of(name) for flag, (default, _) in table.items()}
    assert set(script.RECIPE) | set(script.TOY) <= set(world) | set(own_flags(name))
    for flag, value in script.RECIPE.items():
        assert real[flag] == value
    for flag, value in script.TOY.items():
        assert toy[flag] == value
        asked = "flag" if isinstance(value, str) else value + 1
        if not isinstance(value, bool) and flag != "lr_scheduler_type":
            assert parsed(name, f"--{flag}", str(asked))[1][flag] == asked
    for flag in set(real) & set(world) - set(script.RECIPE) - {"model", "output_dir"}:
        assert real[flag] == world[flag]


def test_scripts_import_no_script_and_nothing_from_lab_at_the_top():
    for path in [f"{name}.py" for name in SCRIPTS] + ["common.py"]:
        for node in ast.parse((ROOT / path).read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] in ("lab", *SCRIPTS)], path


def test_every_trap_has_its_test():
    """One test for each trap of the field that the project knows."""
    traps = """temperature truncated_sampling vision_tokens_sampled end_of_text mrope left_padding image_rows
        prompt_truncation pixel_budget ratio kl normaliser masks group_std entropy double_detach unwrapped_forward
        sharded_generate bf16_adam checkpointing_and_cache seeds stale_rope_deltas regex unreadable_gold
        words_as_algebra hostile_answers pass_at_k broken_problems""".split()
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [trap for trap in traps if f"def test_trap_{trap}(" not in written] == []
