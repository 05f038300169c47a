"""Documents: which files, in which order, and what is said about those that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardstage.data import documents
from shardstage.data.documents import find_documents, fingerprint_documents, read_documents
from shardstage.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {"b.txt": "second", "a/z.txt": "first", "c.md": "third", "empty.txt": ""}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / ".hidden").write_text("hidden", encoding="utf-8")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"\0")
    return tmp_path


def names(files: tuple[Path, ...], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def test_a_folder_is_read_sorted_without_hidden_files_and_caches(folder: Path) -> None:
    assert names(find_documents([str(folder)]), folder) == ["a/z.txt", "b.txt", "c.md", "empty.txt"]


def test_an_empty_file_is_no_document(folder: Path) -> None:
    assert list(read_documents(find_documents([str(folder)]))) == ["first", "second", "third"]


def test_a_pattern_chooses_files(folder: Path) -> None:
    assert names(find_documents([f"{folder}/**/*.txt"]), folder) == ["a/z.txt", "b.txt", "empty.txt"]


def test_paths_keep_their_order_and_a_file_counts_once(folder: Path) -> None:
    found = find_documents([str(folder / "c.md"), str(folder), f"{folder}/b.txt"])
    assert names(found, folder) == ["c.md", "a/z.txt", "b.txt", "empty.txt"]


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    files = find_documents(())
    assert {"argparse.py", "typing.py"} <= {file.name for file in files}
    assert {file.suffix for file in files} == {".py"}
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    root = Path(os.__file__).parent
    assert not any(left_out & set(file.relative_to(root).parts) for file in files)
    assert list(files) == sorted(files)


def test_a_python_without_sources_is_told_to_bring_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no sources of its standard library") as caught:
        find_documents(())
    assert caught.value.hint == 'paths = ["my_texts/"]'


def test_the_fingerprint_is_of_contents_not_of_names(folder: Path, tmp_path: Path) -> None:
    before = fingerprint_documents(find_documents([str(folder)]))
    (folder / "b.txt").rename(folder / "bb.txt")
    assert fingerprint_documents(find_documents([str(folder)])) == before
    (folder / "bb.txt").write_text("other", encoding="utf-8")
    assert fingerprint_documents(find_documents([str(folder)])) != before


def test_the_fingerprint_knows_where_a_document_ends(tmp_path: Path) -> None:
    def digest(*texts: str) -> str:
        files = []
        for number, text in enumerate(texts):
            files.append(tmp_path / str(number))
            files[-1].write_text(text, encoding="utf-8")
        return fingerprint_documents(files)

    assert digest("ab", "c") != digest("a", "bc")


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n")
    assert list(read_documents([tmp_path / "dos.txt"])) == ["a\r\nb\r\n"]


@pytest.mark.parametrize("path", ["absent.txt", "absent/"])
def test_a_path_that_does_not_exist_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no file or folder '{path}'"):
        find_documents([path])


@pytest.mark.parametrize("pattern", ["*.rst", ""])
def test_a_path_that_matches_no_file_is_named(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file") as caught:
        find_documents([str(tmp_path / pattern)])
    assert caught.value.hint is not None and caught.value.hint.endswith('/**/*.txt"]')


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"image\.png is a binary file") as caught:
        list(read_documents([tmp_path / "image.png"]))
    assert caught.value.hint == f'paths = ["{tmp_path}/**/*.txt"]'


def test_another_encoding_is_named_with_its_first_byte(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("café".encode("latin1"))
    with pytest.raises(DataError, match="not UTF-8 text: byte 0xe9 at offset 3") as caught:
        list(read_documents([tmp_path / "old.txt"]))
    assert caught.value.hint is not None and caught.value.hint.startswith("iconv -f LATIN1 -t UTF-8")


def test_a_broken_link_is_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"link\.txt cannot be read: No such file"):
        list(read_documents(find_documents([str(tmp_path)])))


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: object) -> None:  # permissions do not stop a test that runs as root
        raise PermissionError(13, "Permission denied", os.fspath(tmp_path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied") as caught:
        find_documents([str(tmp_path)])
    assert caught.value.hint == f"chmod u+rx {tmp_path}"
