"""The framework adapters have one face: equal public names and signatures, read without importing a framework."""

from __future__ import annotations

import ast
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from hvdlm.adapters import ADAPTERS
from hvdlm.adapters.keras_options import refuse_options
from hvdlm.errors import ConfigError
from hvdlm.options import Options, names

ROOT = Path(__file__).resolve().parents[2]

# (adapter, name) -> why it differs. Everything else is equal; the README shows this table.
EXCEPTIONS = {
    ("keras", "no_sync"): "raises: applying gradients is what sends them; gradient_accumulation_steps takes its place",
    ("keras", "eval_samples"): "None: metrics of a shared evaluation are summed in evaluate itself",
}
# Options that an adapter need not read, and who does.
ELSEWHERE = {
    "checkpoint_dir": "is read by hvdlm.state",
    "checkpoint_every": "is read by hvdlm.state",
    "checkpoint_keep": "is read by hvdlm.state",
    "commit_every": "is read by hvdlm.state",
    "resume": "is read by hvdlm.state",
    "elastic": "acts in hvdlm.elastic and in the launcher",
    "prune_pattern": "is read by hvdlm.pruning",
    "prune_scope": "is read by hvdlm.pruning",
    "prune_sparsity": "is read by hvdlm.pruning",
    "exact": "is checked with the other options",
    "fingerprint_every": "acts in hvdlm.observe.inspection",
    "on_divergence": "acts in hvdlm.observe.inspection",
    "metrics": "acts in hvdlm.observe.sinks",
    "timings_every": "acts in hvdlm.observe.inspection",
    "watchdog_seconds": "acts in hvdlm.observe.watchdog",
    "seed": "reaches adapters in the partition",
    "weights": "reaches adapters through hvdlm.balancing",
}
PARTS = {"sync_every", "outer_optimizer", "local_moments"}
"""Options that only mean something beside another one, which is refused."""
OTHER_WORDS = {"BatchNormalization", "BackupAndRestore", "train_on_batch", "jit_compile", "shuffle"}
"""Of the table, and no options."""
README_NAMES = {"no_sync": "hvdlm.no_sync()", "eval_samples": "hvdlm.mean(value)"}
"""How the README's table calls them."""
OPTION_EXCEPTIONS: dict[tuple[str, str], str] = {}


def classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def face(node: ast.ClassDef) -> dict[str, str]:
    """Public methods with their signatures, and public class attributes."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            arguments = ", ".join(a.arg for a in item.args.args)
            kinds = [ast.unparse(d) for d in item.decorator_list]
            found[item.name] = f"({arguments}) {'property' if 'property' in kinds else 'method'}"
        elif isinstance(item, (ast.AnnAssign, ast.Assign)):
            targets = [item.target] if isinstance(item, ast.AnnAssign) else item.targets
            found.update({t.id: "attribute" for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_")})
    return found


CONTRACT = face(classes("hvdlm.contracts")["Adapter"])
FACES = {name: face(classes(module)[cls]) for name, (module, cls) in ADAPTERS.items()}
FACES["fake"] = face(classes("hvdlm.adapters.fake")["FakeAdapter"])


@pytest.mark.parametrize("name", FACES)
def test_adapter_has_the_contracts_face(name: str) -> None:
    assert FACES[name] == CONTRACT


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_option_is_read_or_listed(name: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hvdlm/adapters").glob(f"{name}_*.py"))
    read = {option for option in names() if f"options.{option}" in sources}
    listed = {option for adapter, option in OPTION_EXCEPTIONS if adapter == name}
    assert not read & listed
    assert set(names()) - read - listed <= set(ELSEWHERE) | {"balance"}  # in hvdlm.balancing


def test_exceptions_name_what_exists() -> None:
    assert {name for _, name in EXCEPTIONS} <= set(CONTRACT)
    assert {name for _, name in OPTION_EXCEPTIONS} | set(ELSEWHERE) <= set(names())


def test_collectives_are_equal() -> None:
    contract = face(classes("hvdlm.contracts")["Collectives"])
    for module, cls in (
        ("hvdlm.adapters.torch_wire", "TorchWire"),
        ("hvdlm.adapters.keras_wire", "KerasWire"),
        ("hvdlm.adapters.single", "SingleCollectives"),
    ):
        own = face(classes(module)[cls])
        assert {name: own.get(name) for name in contract} == contract, module


BACKENDS = ("tensorflow", "torch", "tf_keras")
SECTION = "### What PyTorch scripts have and Keras scripts have not"


def table() -> dict[str, dict[str, str]]:
    """What the README lists: ``name`` or ``name=value`` -> backend -> "yes", "no" or "other"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    found = {}
    for line in re.findall(r"^\| (.+) \|$", text, re.MULTILINE)[2:]:
        what, *cells, why = line.split(" | ")
        assert len(cells) == len(BACKENDS), line
        assert set(cells) <= {"yes", "no", "other"}, line
        assert len(why) > 10, line
        for name in re.findall(r"`([^`]+)`", what):
            found[name] = dict(zip(BACKENDS, cells, strict=True))
    return found


def other_values(name: str) -> list[Any]:
    """Values of an option that are not its default: each that it can choose, or one."""
    hint, default = typing.get_type_hints(Options)[name], getattr(Options(), name)
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    found: list[Any] = []
    for kind in typing.get_args(hint) if is_union else [hint]:
        origin = typing.get_origin(kind) or kind
        if origin is typing.Literal:
            found += typing.get_args(kind)
        else:
            found.append({bool: True, int: 7, float: 0.5, str: "x", tuple: (1.0, 2.0)}.get(origin, len))
    return [value for value in found if value != default]


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_options_are_those_of_the_readme(backend: str) -> None:
    listed, wrong = table(), []
    for name in names():
        for value in other_values(name):
            options = Options()
            object.__setattr__(options, name, value)  # alone, and not checked against others
            spelled = f"{name}={'function' if callable(value) else value}"
            said = listed.get(spelled, listed.get(name, {})).get(backend, "yes")
            try:
                refuse_options(options, backend)
                is_refused = False
            except ConfigError as error:
                is_refused = True
                assert "HINT: " in str(error)
                assert name in str(error)
            if is_refused != (said == "no") and name not in PARTS:
                wrong.append(f"{spelled} is {'refused' if is_refused else 'taken'}; the README says {said!r}")
    assert not wrong, "\n".join(wrong)


def test_the_table_names_what_there_is() -> None:
    listed = table()
    options = [name.partition("=")[0] for name in listed]
    assert {name for name in options if name.isidentifier()} - set(names()) <= OTHER_WORDS
    assert {README_NAMES[method] for _, method in EXCEPTIONS} <= set(listed)
    assert not [name for name, cells in listed.items() if set(cells.values()) == {"yes"}]


def raised(pattern: str) -> set[str]:
    """Names of the exceptions that adapters raise."""
    nodes = [
        node
        for path in (ROOT / "hvdlm/adapters").glob(pattern)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    calls = [node.exc for node in nodes if isinstance(node, ast.Raise)]
    return {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)}


def test_errors_have_the_same_names() -> None:
    assert {"ConfigError", "DataError"} < raised("torch_*.py") <= raised("keras_*.py")
