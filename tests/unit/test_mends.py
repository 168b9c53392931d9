from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from hvdlm.build.edits import Edit, Mend, apply_mends, digest
from hvdlm.build.mends import LABEL, MENDS, select_mends
from hvdlm.build.sdist import SHA256, fetch_sdist, file_sha256, unpack_sdist
from hvdlm.environment import cache_dir
from hvdlm.errors import BuildError

# Whoever changes a mend changes what is built: a new label, and its digest here.
PINNED = ("hvdlm4", "35441665f9a57c517b6e867e41855c498ea9e5d02171cb66ee0c75a9f5553086")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released source, unpacked; not to be changed."""
    archive = fetch_sdist(cache_dir())
    assert file_sha256(archive) == SHA256
    return unpack_sdist(archive, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def source(released: Path, tmp_path: Path) -> Path:
    """A copy of the files that mends touch."""
    for file in {edit.file for mend in MENDS for edit in mend.edits}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(released / file, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.name)
def test_each_mend_fits_the_released_source_once(mend: Mend, released: Path) -> None:
    assert mend.why
    for edit in mend.edits:
        text = (released / edit.file).read_text(encoding="utf-8")
        assert text.count(edit.find) == 1
        # Applied twice it must be noticed, or it would leave no trace.
        assert edit.find != edit.replace


def test_all_mends_together(source: Path) -> None:
    apply_mends(source, MENDS)
    for mend in MENDS:
        for edit in mend.edits:
            assert edit.replace in (source / edit.file).read_text(encoding="utf-8")
    for file in ("setup.py", "horovod/runner/js_run.py"):
        ast.parse((source / file).read_text(encoding="utf-8"))


def test_no_distutils_is_left(released: Path, source: Path) -> None:
    """Python 3.12 has none; a use that no mend knows of would only show there."""
    apply_mends(source, MENDS)
    for path in [*released.glob("horovod/**/*.py"), *released.glob("**/CMakeLists.txt"), released / "setup.py"]:
        mended = source / path.relative_to(released)
        text = (mended if mended.exists() else path).read_text(encoding="utf-8", errors="replace")
        assert "distutils" not in text, path


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.name)
def test_changed_source_fails_by_name(mend: Mend, source: Path) -> None:
    edit = mend.edits[-1]
    path = source / edit.file
    path.write_text(path.read_text(encoding="utf-8").replace(edit.find, "something else\n"), encoding="utf-8")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    with pytest.raises(BuildError, match=f"'{mend.name}' no longer fits: in {edit.file}.*does not occur") as caught:
        apply_mends(source, MENDS)
    assert caught.value.hint
    assert {file: file.read_bytes() for file in before} == before, "a refused set of mends changed the source"


def test_text_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\nx\n")
    with pytest.raises(BuildError, match=r"'twice'.*occurs 2 times"):
        apply_mends(tmp_path, [Mend("twice", "a reason", (Edit("a.txt", "x\n", "y\n"),))])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"'cxx17' cannot read CMakeLists\.txt"):
        apply_mends(tmp_path, MENDS)


def test_applying_twice_is_refused(source: Path) -> None:
    apply_mends(source, MENDS[:1])
    with pytest.raises(BuildError, match="'cxx17'"):
        apply_mends(source, MENDS[:1])


def test_conditions() -> None:
    def names(*conditions: str) -> set[str]:
        return {mend.name for mend in select_mends(conditions)}

    assert "no-cuda-probe" in names("cpu") and "no-cuda-probe" not in names()
    assert "gloo-avx" in names("cpu", "avx") and "gloo-avx" not in names("cpu")
    assert {"cxx17", "gloo-interface", "sysconfig", "release", "cmake4", "relocatable", "build-record"} < names()


def test_label_goes_with_the_mends() -> None:
    assert (LABEL, digest(MENDS)) == PINNED, "the mends changed: give them a new LABEL, and pin both here"
    assert len({mend.name for mend in MENDS}) == len(MENDS)
