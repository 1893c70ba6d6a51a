"""The settings: checked once, named as on the command line, the same after a turn through JSON."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import typer
from typer.main import get_command

from attsvm.cli.main import app
from attsvm.errors import InvalidInputError
from attsvm.experiments import VerifyConfig


def test_defaults_are_valid() -> None:
    assert VerifyConfig.checked() == VerifyConfig()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "--steps must be greater than or equal to 1, got 0"),
        ({"steps": True}, "--steps must be a valid integer"),
        ({"steps": 3.0}, "--steps must be a valid integer"),
        ({"learning_rate": float("nan")}, "--learning-rate must be"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a finite number"),
        ({"tol": 1.0}, "--tol must be less than 1"),
        ({"rank": 0}, "--rank must be"),
        ({"n_sequences": 1}, "--n-sequences must be"),
        ({"parameterizations": ()}, "--parameterization "),
        ({"parameterizations": ("Q",)}, "--parameterization must"),
        ({"loss": "hinge"}, "--loss must be 'logistic', 'exponential', 'correlation' or 'squared', got 'hinge'"),
        ({"seed": 2**63}, "--seed must be"),
        ({"sede": 1}, "--sede"),
    ],
)
def test_bad_value_is_named_in_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        VerifyConfig.checked(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        VerifyConfig().steps = 5  # type: ignore[misc]


def test_settings_survive_json() -> None:
    config = VerifyConfig(data="a.csv", rank=3, parameterizations=("KQ",), learning_rate=0.3)
    assert VerifyConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


def test_command_line_and_settings_have_the_same_defaults() -> None:
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    options = {parameter.name: parameter.default for parameter in command.commands["verify"].params}
    fields = {name: field.default for name, field in VerifyConfig.model_fields.items()}
    assert fields.pop("parameterizations") == ("W", "KQ")
    assert options.pop("parameterization") == "both"
    assert (fields.pop("optimizers"), fields.pop("norms")) == (("ngd",), ())
    assert (options.pop("optimizer"), options.pop("norm")) == (None, None)  # repeatable: none given
    others = {"output_dir", "overwrite", "as_json", "quiet", "help"}
    assert {name: value for name, value in options.items() if name not in others} == fields


def test_every_field_is_documented() -> None:
    text = inspect.getdoc(VerifyConfig) or ""
    assert [name for name in VerifyConfig.model_fields if name not in text] == []
