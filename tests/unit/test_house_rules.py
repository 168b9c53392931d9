"""Rules of the code base that no one has to remember, because these tests do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvdlm

ROOT = Path(hvdlm.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 300
FRAMEWORKS = ("horovod", "keras", "tensorflow", "torch")

# Lowest first. A module imports from its own layer or from those below it.
LAYERS = (
    (
        "hvdlm.algorithms",
        "hvdlm.errors",
        "hvdlm.gce",
        "hvdlm.line",
        "hvdlm.memory",
        "hvdlm.noise",
        "hvdlm.network",
        "hvdlm.pmi",
        "hvdlm.private",
        "hvdlm.probe",
        "hvdlm.processes",
        "hvdlm.secrets",
        "hvdlm.units",
        "hvdlm.wire",
    ),
    ("hvdlm.rank_log",),
    ("hvdlm.agent", "hvdlm.supervisor"),
    (
        "hvdlm.options",
        "hvdlm.option_checks",
        "hvdlm.option_values",
        "hvdlm.world",
        "hvdlm.environment",
        "hvdlm.plan",
        "hvdlm.contracts",
        "hvdlm.sources",
        "hvdlm.state.copying",
        "hvdlm.state.snapshot",
    ),
    ("hvdlm.balancing", "hvdlm.member", "hvdlm.planning", "hvdlm.pruning", "hvdlm.state"),
    (
        "hvdlm.adapters",
        "hvdlm.agreement",
        "hvdlm.build",
        "hvdlm.keys",
        "hvdlm.launchers",
        "hvdlm.observe",
        "hvdlm.recognise",
    ),
    ("hvdlm.account", "hvdlm.joining"),
    ("hvdlm.saving", "hvdlm.session"),
    ("hvdlm.elastic",),
    ("hvdlm.autowrap",),
    ("hvdlm.api", "hvdlm.bench", "hvdlm.worker"),
    ("hvdlm.adoption",),
    ("hvdlm.autorun",),
    ("hvdlm.verify",),
    ("hvdlm",),
    ("hvdlm.clusters", "hvdlm.dask", "hvdlm.spark"),
    ("hvdlm.cli",),
    ("hvdlm.__main__",),
)
# The version is a constant of the package itself: reading it imports nothing else.
ALWAYS_ALLOWED = {("hvdlm", "__version__")}

EXPORTS = [
    "HvdlmError",
    "Options",
    "World",
    "barrier",
    "distribute",
    "epochs",
    "init",
    "is_main",
    "local_rank",
    "local_size",
    "log",
    "main_first",
    "mean",
    "no_sync",
    "rank",
    "register",
    "save",
    "shard",
    "size",
    "wrap",
]


def module_name(path: Path) -> str:
    parts = ("hvdlm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    """Index of the layer with the longest matching prefix."""
    best = max(
        ((name, index) for index, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")),
        key=lambda found: len(found[0]),
    )
    return best[1]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, str(node.module), alias.name) for alias in node.names)


def upward(source: str, module: str) -> list[str]:
    found = []
    for line, target, name in imports(ast.parse(source)):
        if not f"{target}.".startswith("hvdlm.") or (target, name) in ALWAYS_ALLOWED:
            continue
        # `from hvdlm.build import mends` imports a module too.
        full = (
            f"{target}.{name}"
            if (ROOT / "/".join(f"{target}.{name}".split(".")[1:])).with_suffix(".py").exists()
            else target
        )
        if layer_of(full) > layer_of(module):
            found.append(f"{module}, line {line}: {full}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    if module_name(path) == "hvdlm":
        return  # its lazy exports are what it is for; test_import_is_light holds it
    assert upward(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_an_upward_import_is_found_even_inside_a_function() -> None:
    source = "def f():\n    from hvdlm.session import Session\n"
    assert upward(source, "hvdlm.plan") == ["hvdlm.plan, line 2: hvdlm.session"]
    assert upward("from hvdlm import session", "hvdlm.plan") == ["hvdlm.plan, line 1: hvdlm.session"]
    assert upward("from hvdlm.plan import Plan", "hvdlm.session") == []
    with pytest.raises(AssertionError, match="relative"):
        upward("from .plan import Plan", "hvdlm.session")


@pytest.mark.parametrize("path", sorted((ROOT / "algorithms").glob("*.py")), ids=module_name)
def test_algorithms_need_only_numpy(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "hvdlm"}
    used = {target.partition(".")[0] for _, target, _ in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert used <= allowed


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_LINES, f"{path} has {lines} lines; split it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_environment_is_read_in_one_place(path: Path) -> None:
    """Elsewhere it may be copied, to be passed on, but no variable is looked up."""
    if module_name(path) == "hvdlm.environment":
        return
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_environ(node.value):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            reads = node.func.attr in ("get", "pop") and _is_environ(node.func.value)
            if reads or (node.func.attr == "getenv" and isinstance(node.func.value, ast.Name)):
                found.append(node.lineno)
    assert found == [], f"{path} reads the environment"


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


@pytest.mark.parametrize(
    "statement",
    [
        "import hvdlm",
        "import hvdlm; hvdlm.distribute, hvdlm.Options",
        "import hvdlm.cli",
        "import hvdlm.cli.run",
        "import hvdlm.cli.doctor",
        "import hvdlm.cli.build_horovod",
        "import hvdlm.dask, hvdlm.cli.submit",
        "import hvdlm.launchers.mpi, hvdlm.launchers.gloo, hvdlm.worker",
    ],
)
def test_import_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {FRAMEWORKS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_exports_are_pinned() -> None:
    assert sorted(EXPORTS) == EXPORTS
    assert hvdlm.__all__ == EXPORTS
    for name in EXPORTS:
        assert getattr(hvdlm, name) is not None
    assert set(EXPORTS) <= set(dir(hvdlm))


def test_unknown_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        hvdlm.no_such_name  # noqa: B018


def test_third_party_imports_are_declared() -> None:
    """What is imported without a guard at the top of a module comes with `pip install hvdlm`."""
    declared = {"click", "numpy", "psutil", "rich", "xxhash", "yaml", "hvdlm", *sys.stdlib_module_names}
    for path in MODULES:
        if "adapters" in path.parts or path.name in (
            "torch_arms.py",
            "torch_hooks.py",
            "keras_hooks.py",
            "same_data.py",
        ):
            continue  # each is imported only where its framework is
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for _, target, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                assert target.partition(".")[0] in declared, f"{path} imports {target}"


def test_print_is_for_the_command_line() -> None:
    for path in MODULES:
        if "cli" in path.parts or path.name == "bootstrap.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}, line {node.lineno}: print"
