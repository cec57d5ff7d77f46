"""A name always has its old or its new content, whatever goes wrong."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import files
from fastdiff.files import (
    atomic_file,
    atomic_folder,
    numbered,
    printable,
    remove_leftovers,
    write_json,
    write_text,
)


def listing(folder: Path) -> list[str]:
    """Every name in a folder, hidden ones too, so that a left-over temporary shows."""
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_written_with_its_parents_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    write_text(target, "one")
    write_text(target, "two ä")
    assert target.read_bytes() == "two ä".encode()
    assert listing(target.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "b.txt"
    write_text(target, "old")

    def write_half() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["b.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old.bin").write_bytes(b"1")
    with atomic_folder(target) as temporary:
        (temporary / "new.bin").write_bytes(b"2")
        assert listing(target) == ["old.bin"]
    assert listing(target) == ["new.bin"]
    assert listing(tmp_path) == ["model"]


def test_an_error_while_filling_a_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old.bin").write_bytes(b"1")

    def fill_half() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "new.bin").write_bytes(b"2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_half()
    assert listing(target) == ["old.bin"]
    assert listing(tmp_path) == ["model"]


def test_a_failed_second_rename_moves_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old.bin").write_bytes(b"1")
    replace = os.replace

    def fail_on_new(source: Path, to: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "disk error")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail_on_new)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="disk error"), atomic_folder(target) as temporary:
        (temporary / "new.bin").write_bytes(b"2")
    assert listing(target) == ["old.bin"]
    assert listing(tmp_path) == ["model"]


def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with (
        pytest.raises(NotADirectoryError, match="choose another name"),
        atomic_folder(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """A real write that fails: the process may write 1,000 bytes per file, the file has 100,000."""
    code = (
        "import resource, signal, sys\n"
        "from fastdiff.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_text(sys.argv[1], 'x' * 100_000)\n"
        "except OSError as error:\n    print(error)\n"
    )
    target = tmp_path / "big.txt"
    write_text(target, "old")
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(target)], capture_output=True, text=True, check=True
    )
    assert "no space left to write" in done.stdout
    assert "free some space or choose another folder" in done.stdout
    assert done.stdout.count("\n") == 1
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["big.txt"]


WRITING = """
import os, signal, sys, time
from fastdiff.files import atomic_file, atomic_folder
with atomic_file(sys.argv[1] + "/a.png") as file, atomic_folder(sys.argv[1] + "/model") as folder:
    file.write_bytes(b"half")
    (folder / "weights").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITING, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 2
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        other.kill()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    """Not even one that another process has written in the meantime."""
    target = tmp_path / "a.png"
    with atomic_file(target, new=True) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileExistsError), atomic_file(target, new=True) as temporary:
        temporary.write_text("second")
    assert target.read_text() == "first"
    assert listing(tmp_path) == ["a.png"]
    assert [p.name for p in itertools.islice(numbered(target), 3)] == [
        *("a.png", "a-2.png", "a-3.png")
    ]


def test_where_there_are_no_hard_links_a_new_file_replaces_none_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, to: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    test_a_new_file_replaces_none(tmp_path)


def test_text_from_files_is_printable() -> None:
    assert printable("ünï tri") == "ünï tri"
    assert printable("a\nb\x1b[0m\udce9\u202e") == r"a\nb\x1b[0m\udce9\u202e"
    assert printable("x" * 100, 10) == "x" * 9 + "…"


def test_json_of_any_text_comes_back(tmp_path: Path) -> None:
    data = {"caf\udce9": ["ünï\n\x1b", "\\udce9", "\U0001f600", None, 1.5]}
    write_json(tmp_path / "a.json", data)
    assert json.loads((tmp_path / "a.json").read_bytes()) == data
    assert "ünï" in (tmp_path / "a.json").read_text(), "letters are not escaped"


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    """A temporary file is private by default (0600); what others may read must stay readable."""
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def _can_exchange(folder: Path) -> bool:
    """Whether this file system can swap two names, tested with a system call, not with `files`."""
    if sys.platform != "linux":
        return False
    for name in ("one", "other"):
        (folder / name).mkdir()
    names = [os.fsencode(folder / name) for name in ("one", "other")]
    swapped = ctypes.CDLL(None).renameat2(-100, names[0], -100, names[1], 2) == 0
    for name in names:
        os.rmdir(name)
    return swapped


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdiff import files
count = 0
def die_at(call, real):
    def maybe(*args):
        global count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return maybe
root, call = Path(sys.argv[1]), int(sys.argv[3])
if sys.argv[4] == "two renames":
    files._exchange = lambda one, other: False
target = os if sys.argv[2] == "replace" else files
setattr(target, sys.argv[2], die_at(call, getattr(target, sys.argv[2])))
with files.atomic_folder(root / "model") as temporary:
    (temporary / "a.bin").write_text("new")
files.write_text(root / "latest", "new")
"""


@pytest.mark.parametrize(
    ("how", "function", "call", "model", "latest"),
    [
        ("two renames", "_sync", 1, "old", "old"),  # before the first file is on the disk
        ("two renames", "replace", 1, "old", "old"),  # before the old folder is moved aside
        ("two renames", "replace", 2, None, "old"),  # between the two renames
        (
            "two renames",
            "_sync",
            4,
            "new",
            "old",
        ),  # the folder is whole, the file is being written
        ("two renames", "replace", 3, "new", "old"),
        ("one step", "_sync", 1, "old", "old"),
        ("one step", "_exchange", 1, "old", "old"),
        ("one step", "_sync", 3, "new", "old"),  # the old folder has the temporary's name
        ("one step", "replace", 1, "new", "old"),
    ],
)
def test_kill_9_while_writing_leaves_old_or_new_and_nothing_else(
    tmp_path: Path, how: str, function: str, call: int, model: str | None, latest: str
) -> None:
    if how == "one step" and not _can_exchange(tmp_path):
        pytest.skip("two folders cannot change places in one step on this file system")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a.bin").write_text("old")
    write_text(tmp_path / "latest", "old")
    (tmp_path / ".hidden").write_text("the user's own")
    done = subprocess.run(
        [sys.executable, "-B", "-c", KILLED, str(tmp_path), function, str(call), how], check=False
    )
    assert done.returncode == -signal.SIGKILL
    if model is None:
        assert not (tmp_path / "model").exists(), "for an instant the name does not exist"
    else:
        assert (tmp_path / "model/a.bin").read_text() == model, "before anything is cleaned up"
    assert len(listing(tmp_path)) > 3, "the kill came too late to leave anything"
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == [".hidden", "latest", "model"]
    assert listing(tmp_path / "model") == ["a.bin"]
    assert (tmp_path / "model/a.bin").read_text() == (model or "old")
    assert (tmp_path / "latest").read_text() == latest


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a renamed file must not be empty: content, then rename, then the folder."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        calls.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def note_replace(source: Path, to: Path) -> None:
        calls.append(f"rename {Path(to).name}")
        replace(source, to)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic_folder(tmp_path / "m") as temporary:
        (temporary / "a.bin").write_text("1")
    assert calls == ["sync a.bin", f"sync {temporary.name}", "rename m", f"sync {tmp_path.name}"]
    calls.clear()
    with atomic_file(tmp_path / "f") as file:
        file.write_text("1")
    assert calls == [f"sync {file.name}", "rename f", f"sync {tmp_path.name}"]


def test_the_next_writer_of_a_folder_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".model.abcd1234.tmp").mkdir()
    (tmp_path / ".model.abcd1234.tmp/half").write_text("half")
    (tmp_path / ".model.old-abcd1234").mkdir()
    (tmp_path / ".models.abcd1234.tmp").mkdir()
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a.bin").write_text("new")
    assert listing(tmp_path) == [".models.abcd1234.tmp", "model"], "another name's are left"


def test_a_temporary_that_is_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process cleans up between creating and locking it."""
    real, taken = os.open, []

    def open_(path: Path, *how: int) -> int:
        if how == (os.O_RDONLY,) and str(path).endswith(".tmp.txt") and not taken:
            taken.append(path)
            os.unlink(path)
        return real(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", open_)
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
    assert taken
    assert temporary != taken[0]
    assert listing(tmp_path) == ["a.txt"]
