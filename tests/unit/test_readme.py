"""The README says what is there: options, commands, flags, functions, fields and files."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import click
import pytest

import hvdlm
from hvdlm.cli import COMMANDS, group
from hvdlm.observe.summary import Summary
from hvdlm.options import Options, choices, names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
GUIDES = sorted((ROOT / "examples").glob("**/*.md"))
GUIDE_DIR = ROOT / "examples" / "guides"
MADE_BY_RUNS = {
    "steps.jsonl",
    "report.html",
    "metrics/",
    "events.jsonl",
    "summary.json",
    "config.json",
    "metrics.jsonl",
    "logs/",
    "train.py",
}


def section(title: str) -> str:
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match is not None, title
    return match[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def code() -> str:
    """All that stands in back quotes or blocks."""
    return "\n".join(re.findall(r"`([^`\n]+)`", README) + blocks("console") + blocks("python"))


def test_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+?) \|", section("Options"), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == names()
    defaults = Options().to_dict()
    for name, default, allowed in rows:
        shown = str(defaults[name]).replace("True", "true").replace("False", "false") or '""'
        assert default == shown, name
        if choices(name) is not None:
            assert tuple(re.findall(r"`([^`]+)`", allowed)) == choices(name), name


def test_fields_of_the_summary() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", section("A run directory"), re.MULTILINE)
    written = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert written == {field.name for field in dataclasses.fields(Summary)}


def test_commands_and_their_flags() -> None:
    assert check_commands(code()) == set(COMMANDS)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_commands_in_guides(path: Path) -> None:
    assert check_commands("\n".join(re.findall(r"`([^`\n]+)`", path.read_text()))) <= set(COMMANDS)


def check_commands(text: str) -> set[str]:
    """The commands in a text, whose flags are there."""
    used = re.findall(r"\bhvdlm ([a-z][a-z-]+)((?: +[^\n`]*)?)", text)
    for name, rest in used:
        command = group.get_command(None, name)  # type: ignore[arg-type]
        if isinstance(command, click.Group):  # its flags are those of its targets
            below = command.list_commands(click.Context(command))
            named = [word for word in rest.split() if word in below]
            command = command.get_command(click.Context(command), [*named, *({"slurm"} & {*below}), *below][0])
        assert command is not None
        known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        own, _, _ = re.sub(r" #.*", "", rest).partition(".py")
        for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", own):
            assert flag in known, f"hvdlm {name} {flag}"
    return {name for name, _ in used}


def test_targets_of_make() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([\w-]+)", code()))
    assert {"demo", "test"} <= used <= targets


def test_functions() -> None:
    used = set(re.findall(r"\bhvdlm\.([a-z_]\w*)", code())) - {"sources", "dask", "spark"}
    assert used <= set(hvdlm.__all__)
    functions = {name for name in hvdlm.__all__ if name.islower()}
    assert functions <= used, f"the README does not mention {functions - used}"


@pytest.mark.parametrize("source", blocks("python"))
def test_code_parses(source: str) -> None:
    ast.parse(source)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guides_link_to_what_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in linked), linked
    for quoted in re.findall(r"`(?:python )?((?:hvdlm|tests|examples)/[\w./-]+)", text):
        assert (ROOT / quoted).exists(), quoted
    relative = path.relative_to(ROOT).as_posix()
    assert relative in README, f"the README does not lead to {relative}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_options_in_guides(path: Path) -> None:
    defaults = Options().to_dict()
    for name, value in re.findall(r"`(\w+)=\"([\w-]+)\"`", path.read_text()):
        if name in defaults and choices(name) is not None:
            assert value in (choices(name) or ()), f"{name}={value}"


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    said = "\0".join(
        node.value
        for source in (ROOT / "hvdlm").rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    text = (GUIDE_DIR / "troubleshooting.md").read_text(encoding="utf-8").partition("## It trains, but")[0]
    messages = [m for row in re.findall(r"^\| (`.+?`) \| ", text, re.MULTILINE) for m in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 20
    # Parts of a message that stand around what differs are constants of their own.
    missing = [message for message in messages if message not in said and "missing: rank" not in message]
    assert missing == [] and "missing: rank" in said


def test_the_picture_of_the_architecture_names_what_is_there() -> None:
    text = (GUIDE_DIR / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = re.findall(r"\[\"(\w+(?:\.py|/))", picture)
    assert len(named) > 10
    for name in named:
        assert (ROOT / "hvdlm" / name.rstrip("/")).exists(), name
    nodes = set(re.findall(r"(\w+)(?=[\[(])", picture)) | {"submit", "job"}
    for one, other in re.findall(r"(\w+)(?:\[[^\]]*\])? +<?-.*?-?> *(?:\|[^|]*\| *)?(\w+)", picture):
        assert {one, other} <= nodes


@pytest.mark.parametrize("text", [README, CHANGELOG], ids=["README", "CHANGELOG"])
def test_files_exist(text: str) -> None:
    quoted = re.findall(r"`([\w.*/-]+/[\w.*/-]*|[\w-]+\.(?:py|md|json|toml))`", text)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    run = re.findall(r"[\w/]+/[\w/]+\.py", text)
    for path in {*quoted, *linked, *run} - MADE_BY_RUNS:
        assert any(ROOT.glob(path.rstrip("/"))) or any((ROOT / "hvdlm").glob(path.rstrip("/"))), path


def test_the_picture_names_what_is_there() -> None:
    (picture,) = blocks("text")
    for name in re.findall(r"[\w/]+(?:\.py|/)", picture):
        assert (ROOT / "hvdlm" / name.rstrip("/")).exists(), name
    for folder, inside in re.findall(r"(\w+)/ \(([^)]+)\)", picture):
        for name in inside.partition(":")[0].split(", "):
            assert name in ("Horovod",) or any((ROOT / "hvdlm" / folder).glob(f"{name}.py")), f"{folder}/{name}"


def test_no_placeholder_is_left() -> None:
    assert "<!--" not in README


def test_changelog_has_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(hvdlm.__version__)}\]", CHANGELOG, re.MULTILINE)
