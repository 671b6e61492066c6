"""Files are whole or absent, whatever happens; a folder has one writer, also after a kill; names are safe to print."""

import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from kdjax import files
from kdjax.files import FolderInUse, locked, printable, read_json, remove_leftovers, whole_file, write_json, write_text

HOLD = """
import sys, time
from kdjax.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_json_files_appear_whole(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x.json") == {}
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_one_message_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_a_full_disk_leaves_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "full")
    with whole_file(tmp_path / "x.json") as temporary:
        temporary.write_text((tmp_path / "x.json").read_text())
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real_replace(a, b)))
    write_text(tmp_path / "x", "a")
    assert done == ["sync", "rename", "sync"]


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "." + "b" * 254, "c." + "d" * 253, "ü" * 125 + ".json"])
def test_every_legal_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def leftovers(tmp_path: Path) -> dict[str, Path]:
    """What killed processes leave behind of these files."""
    left = {}
    for name in ("a.bin", "other", "in/a/folder.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(tmp_path / name) as temporary:
            temporary.write_bytes(b"")
        left[name] = temporary
    for path in left.values():
        path.write_bytes(b"half")
    return left


def remaining(leftovers: dict[str, Path]) -> list[str]:
    return [name for name, path in leftovers.items() if path.exists()]


def test_leftovers_of_one_file_are_removed_and_no_others(tmp_path: Path, leftovers: dict[str, Path]) -> None:
    remove_leftovers(tmp_path / "a.bin")
    assert remaining(leftovers) == ["other", "in/a/folder.png"]


def test_whoever_holds_a_folder_removes_all_leftovers(tmp_path: Path, leftovers: dict[str, Path]) -> None:
    with locked(tmp_path, "part.lock"):
        assert remaining(leftovers) == list(leftovers)
    with locked(tmp_path):
        assert remaining(leftovers) == []
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        files.LOCK, "part.lock", "a.bin", "other", "folder.png",
    }  # fmt: skip


def test_one_writer_a_folder_and_a_kill_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"process {holder.pid} on"), locked(tmp_path):
            pytest.fail("two writers in one folder")
        with locked(tmp_path, "another.lock"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        pass


def test_printable_keeps_words_and_shows_what_steers_a_terminal() -> None:
    for text in ("plain", "Küche, кухня, 台所, مطبخ, 👩\u200d🍳", "line\n\ttab"):
        assert printable(text) == text
    assert printable("a\x1b[2Jb\x07\0\x9b\r") == "a\\x1b[2Jb\\x07\\x00\\x9b\\x0d"
    assert printable("gpj\u202ecod.exe\u2028") == "gpj\\u202ecod.exe\\u2028"
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    every = "".join(map(chr, range(0x11000)))
    shown = printable(every)
    assert {unicodedata.category(c) for c in shown if c not in "\n\t\u200c\u200d"}.isdisjoint({"Cc", "Cf", "Cs"})
    shown.encode()
