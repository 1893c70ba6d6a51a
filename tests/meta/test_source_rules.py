"""House rules that linters do not know, on the syntax trees of src and tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
COMPARISONS = {"allclose", "isclose", "equal", "array_equal", "array_equiv"}
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dotted(node: ast.expr) -> str:
    """``torch.load`` of the expression that names it; what cannot be named is empty."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    """Constant value of a keyword argument, or None."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def bare_comparisons(tree: ast.Module) -> list[int]:
    """Lines where a comparison's answer is thrown away, so that the test cannot fail."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute | ast.Name)
        and (node.value.func.attr if isinstance(node.value.func, ast.Attribute) else node.value.func.id) in COMPARISONS
    ]


def terminal_use(tree: ast.Module) -> list[str]:
    """What only the command line may do: print, read arguments, exit."""
    found = [f"{name}() in line {call.lineno}" for name, call in calls(tree) if name in {"print", "exit", "quit"}]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {"sys.exit", "sys.argv", "sys.stdout", "os._exit"}:
            found.append(f"{dotted(node)} in line {node.lineno}")
        if isinstance(node, ast.Name) and node.id == "SystemExit":
            found.append(f"SystemExit in line {node.lineno}")
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            found += [f"sys.{a.name} in line {node.lineno}" for a in node.names if a.name in {"exit", "argv", "stdout"}]
    return found


def unsafe_loading(tree: ast.Module) -> list[str]:
    """Calls and imports that can run code found in a file."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"import {name} in line {node.lineno}" for name in names if name.split(".")[0] in UNPICKLING]
    for name, call in calls(tree):
        unsafe = (
            (name == "torch.load" and keyword(call, "weights_only") is not True)
            or (name in {"np.load", "numpy.load"} and keyword(call, "allow_pickle") is not False)
            or name in {"pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load"}
            or name in {"eval", "exec"}
            or keyword(call, "trust_remote_code") is True
            or keyword(call, "shell") is True
        )
        if unsafe:
            found.append(f"{name}() in line {call.lineno}")
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, less the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None:
        return total
    return total - ((first.end_lineno or first.lineno) - first.lineno + 1)


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name}: {code_lines(node)} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > MAX_FUNCTION_LINES
    ]


def test_no_comparison_without_assert(test_trees: dict[str, ast.Module]) -> None:
    found = {path: lines for path, tree in test_trees.items() if (lines := bare_comparisons(tree))}
    assert found == {}, "write assert, or torch.testing.assert_close"


def test_only_the_command_line_prints_or_exits(source_trees: dict[str, ast.Module]) -> None:
    library = {path: tree for path, tree in source_trees.items() if not path.startswith("src/attsvm/cli/")}
    assert {path: uses for path, tree in library.items() if (uses := terminal_use(tree))} == {}


def test_nothing_is_ever_unpickled(source_trees: dict[str, ast.Module]) -> None:
    assert {path: uses for path, tree in source_trees.items() if (uses := unsafe_loading(tree))} == {}


def test_files_and_functions_stay_readable(source_trees: dict[str, ast.Module], root: Path) -> None:
    lines = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in source_trees}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}
    assert {path: long for path, tree in source_trees.items() if (long := long_functions(tree))} == {}


def test_no_process_wide_state(source_trees: dict[str, ast.Module]) -> None:
    found = []
    for path, tree in source_trees.items():
        for name, call in calls(tree):
            module, _, function = name.rpartition(".")
            if module in {"np.random", "numpy.random", "random"} and function not in {"default_rng", "Generator"}:
                found.append(f"{path}:{call.lineno} {name}")
            if name in {"torch.manual_seed", "torch.set_default_dtype", "logging.basicConfig"}:
                found.append(f"{path}:{call.lineno} {name}")
            if name == "torch.set_num_threads" and not path.endswith("attsvm/threads.py"):
                found.append(f"{path}:{call.lineno} {name}")
    assert found == [], "take a seed or a generator; attsvm.threads sets threads back"


# The rules themselves, on code that breaks them: a rule that finds nothing there would find nothing anywhere.


@pytest.mark.parametrize("code", ["np.allclose(a, b)", "torch.equal(a, b)", "def f():\n    isclose(a, b)"])
def test_rule_finds_bare_comparison(code: str) -> None:
    assert bare_comparisons(ast.parse(code))


@pytest.mark.parametrize("code", ["assert np.allclose(a, b)", "same = torch.equal(a, b)", "assert_close(a, b)"])
def test_rule_accepts_used_comparison(code: str) -> None:
    assert not bare_comparisons(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["print(1)", "import sys\nsys.exit(1)", "from sys import argv", "raise SystemExit", "x = sys.argv[1]"]
)
def test_rule_finds_terminal_use(code: str) -> None:
    assert terminal_use(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_rule_finds_unsafe_loading(code: str) -> None:
    assert unsafe_loading(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)"]
)
def test_rule_accepts_safe_loading(code: str) -> None:
    assert not unsafe_loading(ast.parse(code))
