"""Options: values, precedence, origins, and what is said of a wrong one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hvdlm.errors import ConfigError
from hvdlm.options import ORIGINS, Options, choices, names, resolve


def test_defaults_are_those_of_the_design() -> None:
    options = Options()
    assert (options.partition, options.compression, options.sync, options.reduction) == (
        "hash",
        "none",
        "global",
        "mean",
    )
    assert (options.balance, options.batch, options.lr_scale, options.elastic) == ("none", "global", "none", False)


def test_every_option_is_documented_and_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 3  # type: ignore[misc]
    assert names() == sorted(field.name for field in dataclasses.fields(Options))


@pytest.mark.parametrize("higher", range(1, len(ORIGINS)))
@pytest.mark.parametrize("lower", range(1, len(ORIGINS)))
def test_precedence(lower: int, higher: int) -> None:
    if lower >= higher:
        return
    layers = dict(zip(("environment", "code", "config_file", "command_line"), [{}, {}, {}, {}], strict=True))
    keys = list(layers)
    layers[keys[lower - 1]] = {"seed": 1}
    layers[keys[higher - 1]] = {"seed": 2}
    resolved = resolve(**layers)
    assert resolved.options.seed == 2
    assert resolved.origins["seed"] == ORIGINS[higher]
    assert resolved.origins["partition"] == "default"
    assert bool(resolved.overridden) == (ORIGINS[lower] == "code")


def test_equal_value_is_no_override() -> None:
    assert resolve(code={"compression": "fp16"}, command_line={"compression": "fp16"}).overridden == ()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"compresion": "fp16"}, "did you mean 'compression'"),
        ({"compression": "fp61"}, "did you mean 'fp16'"),
        ({"seed": "x"}, "an integer"),
        ({"seed": 1.5}, "an integer"),
        ({"seed": True}, "an integer"),
        ({"bucket_cap_mb": float("nan")}, "a number"),
        ({"bucket_cap_mb": 0.0001}, "0.001 to 1024"),
        ({"bucket_cap_mb": None}, "a number"),
        ({"elastic": "maybe"}, "true, false"),
        ({"elastic": True, "balance": "static", "weights": [1, 2]}, "weights with elastic=True"),
        ({"lr_scale": "linear"}, "per_worker"),
        ({"partition": ["hash"]}, "allowed"),
        ({"balance": "static", "weights": [1, -1]}, "worker 1 is -1"),
        ({"balance": "static", "weights": "1,nan"}, "worker 1 is nan"),
        ({"balance": "static", "weights": "0,0"}, "all weights are 0"),
        ({"balance": "static", "weights": "1;2"}, "one number per worker"),
        ({"balance": "static", "weights": "1,,2"}, "one number per worker"),
        ({"balance": "static", "weights": 3}, "takes numbers"),
        ({"weights": [1, 3]}, "equal shares"),
        ({"balance": "dynamic", "partition": "none"}, "no shares to balance"),
    ],
)
def test_wrong_values_are_named(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(code=given)


def test_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        Options(seed=1) and resolve(command_line={"nonsense": 1})
    assert all(name in str(caught.value) for name in names())
    assert "command line" in str(caught.value)


def test_strings_of_flags_and_variables_are_read() -> None:
    options = resolve(environment={"seed": "7", "bucket_cap_mb": "2.5", "elastic": "no"}).options
    assert (options.seed, options.bucket_cap_mb, options.elastic) == (7, 2.5, False)


@pytest.mark.parametrize("given", ["1, 1,2,4.5", [1, 1, 2, 4.5], (1, 1, 2, "4.5"), np.array([1, 1, 2, 4.5])])
def test_weights_are_read(given: object) -> None:
    options = resolve(code={"balance": "static"}, command_line={"weights": given}).options
    assert options.weights == (1.0, 1.0, 2.0, 4.5)


@pytest.mark.parametrize("given", ["", " ", [], ()])
def test_no_weights_are_equal_shares(given: object) -> None:
    assert resolve(environment={"weights": given}).options.weights == ()


def test_choices() -> None:
    assert choices("compression") == ("none", "fp16", "bf16", "int8", "powersgd", "topk", "auto")
    assert choices("seed") is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"exact": True, "compression": "int8"}, "exact=True with compression=.int8."),
        ({"powersgd_rank": 0}, "powersgd_rank is 0; allowed: 1 to 256"),
        ({"topk_ratio": 1.5}, "topk_ratio is 1.5; allowed: more than 0"),
    ],
)
def test_compression_is_checked(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Options(**given)
