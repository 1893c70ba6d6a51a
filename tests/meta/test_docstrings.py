"""Every public name is documented, and its documented parameters are those it takes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

import attsvm

MODULES = [m.name for m in pkgutil.walk_packages(attsvm.__path__, "attsvm.") if not m.name.endswith("__main__")]


def public_objects(module_name: str) -> dict[str, Any]:
    """Functions and classes that a module lists in ``__all__`` and defines itself, with the classes' public methods."""
    module = importlib.import_module(module_name)
    found: dict[str, Any] = {}
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if getattr(value, "__module__", None) != module_name:
            continue
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value):
            found[name] = value
            for method_name, method in vars(value).items():
                plain = method.__func__ if isinstance(method, classmethod | staticmethod) else method
                if inspect.isfunction(plain) and not method_name.startswith("_"):
                    found[f"{name}.{method_name}"] = plain
    return found


def documented(text: str, section: str) -> list[str] | None:
    """Names in a numpydoc section, or None where there is no such section."""
    match = re.search(rf"^{section}\n-{{3,}}\n(.*?)(?=^\S[^\n]*\n-{{3,}}$|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        return None
    names = [line.split(":")[0] for line in match[1].splitlines() if line and not line[0].isspace()]
    return [name.strip().lstrip("*") for line in names for name in line.split(",")]


def parameters(value: Any) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name not in {"self", "cls"}]


def is_own_text(value: Any) -> bool:
    """A dataclass or exception without a docstring gets one that Python or its base class made."""
    text = value.__doc__
    if not text:
        return False
    return not (inspect.isclass(value) and dataclasses.is_dataclass(value) and text.startswith(f"{value.__name__}("))


@pytest.mark.parametrize("module_name", ["attsvm", *MODULES])
def test_module_is_documented(module_name: str) -> None:
    assert importlib.import_module(module_name).__doc__


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_are_documented(module_name: str) -> None:
    assert [name for name, value in public_objects(module_name).items() if not is_own_text(value)] == []


@pytest.mark.parametrize("module_name", MODULES)
def test_documented_parameters_are_the_real_ones(module_name: str) -> None:
    wrong = {}
    for name, value in public_objects(module_name).items():
        listed = documented(inspect.getdoc(value) or "", "Parameters")
        if listed is not None and listed != parameters(value):
            wrong[name] = {"documented": listed, "taken": parameters(value)}
    assert wrong == {}


@pytest.mark.parametrize("module_name", MODULES)
def test_documented_attributes_are_the_real_ones(module_name: str) -> None:
    wrong = {}
    for name, value in public_objects(module_name).items():
        listed = documented(inspect.getdoc(value) or "", "Attributes")
        if inspect.isclass(value) and dataclasses.is_dataclass(value) and listed is not None:
            real = {field.name for field in dataclasses.fields(value)}
            real |= {key for key, item in vars(value).items() if isinstance(item, property)}
            if not set(listed) <= real:
                wrong[name] = sorted(set(listed) - real)
    assert wrong == {}


def test_parser_reads_names() -> None:
    text = (
        "Do.\n\nParameters\n----------\na, b\n    Two.\nc : int\n    One: more.\n*rest\n    R.\n\n"
        "Returns\n-------\nx\n    Y."
    )
    assert documented(text, "Parameters") == ["a", "b", "c", "rest"]
    assert documented(text, "Returns") == ["x"]
    assert documented(text, "Raises") is None
