"""A disk that is full: a tmpfs of its own in a namespace of mounts, or a smaller one.

Each command runs with less room than it needs. It says so in one line and exits with 2, what was
there is whole, and with more room the same command goes on to the same result.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.endure.child import attempt
from tests.endure.kills import Row
from tests.endure.work import Work, listing

DISK = 16 * 2**20
PAGE = 4096
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC = 0x20000, 0x10000000, 1 << 18, 1 << 14
FULL = ("no space left to write", "images need")
"""What a command says: while it writes, or before it begins."""
UNAVAILABLE = 77
"""Exit code: this process may not mount anything."""


def mount_small(folder: Path, size: int = DISK) -> None:
    """Put a disk of `size` bytes at `folder`, seen by this process and its children alone.

    Raises:
        OSError: this process may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def call(done: int, what: str) -> None:
        if done:
            raise OSError(ctypes.get_errno(), what)

    if libc.unshare(CLONE_NEWNS):  # without rights of its own: in a namespace of users
        call(libc.unshare(CLONE_NEWNS | CLONE_NEWUSER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount, private")
    options = f"size={size}".encode()
    call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options), "mount of a tmpfs")


def can_mount(folder: Path) -> bool:
    def try_() -> int:
        try:
            mount_small(folder)
        except OSError:
            return UNAVAILABLE
        return 0

    return attempt(try_, folder).code == 0


@dataclass(frozen=True)
class Filling:
    """A work on a disk that is too small for it.

    Attributes:
        begin: prepares the folder.
    """

    work: Work
    begin: Callable[[Path], object] = lambda folder: None


def fill(
    name: str, filling: Filling, root: Path, *, count: int, tell: Callable[[], None] = lambda: None
) -> Row:
    """Run the work with `count` amounts of room, from none to nearly enough."""
    row, since = Row(name), time.perf_counter()
    disk = root / f"{name} disk"
    disk.mkdir(parents=True)
    for number in range(count):
        ended = attempt(lambda share=number / count: _one(filling, disk, share), root)
        row.trials += 1
        tell()
        if ended.code != 0:
            row.findings.append(f"{name}, room for {number}/{count}: {ended.said[-900:]}")
    row.seconds = time.perf_counter() - since
    return row


def _one(filling: Filling, disk: Path, share: float) -> int:
    """In a process of its own: measure what is needed, then leave less."""
    mount_small(disk)
    work, ballast = filling.work, disk / "ballast"
    place, whole = disk / "work", disk / "undisturbed"
    for folder in (place, whole):
        folder.mkdir()
        filling.begin(folder)
    before = listing(place)
    free = _free(disk)
    ended = attempt(lambda: work.start(whole), whole)
    assert ended.code == 0, ended.said
    needed = free - _free(disk)
    room = int(needed * share) // PAGE * PAGE
    with ballast.open("wb") as file:
        file.write(bytes(max(_free(disk) - room, 0)))
    ended = attempt(lambda: work.start(place), place)
    if found := _judge(ended.code, ended.said, work, place, before):
        print(found)
        return 1
    ballast.unlink()
    ended = attempt(lambda: work.start(place), place)
    if ended.code != 0:
        print(f"with room: exit code {ended.code}: {ended.said[-500:]}")
        return 1
    if found := work.done(place, whole):
        print(f"with room: {found}")
        return 1
    shutil.rmtree(place)
    return 0


def _judge(code: int, said: str, work: Work, place: Path, before: dict[str, bytes]) -> str:
    lines = [line for line in said.splitlines() if line.startswith("fastdiff: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in said:
        return f"exit code {code}: {said[-600:]}"
    if not any(words in lines[0] for words in FULL) or ";" not in lines[0]:
        return f"not clear: {lines[0]}"
    if before and (wrong := work.whole(place)):
        return f"after the disk was full: {wrong}"
    after = listing(place)
    if temporaries := [name for name in after if ".tmp" in name]:
        return f"left behind: {', '.join(temporaries)}"
    return "" if before else work.whole(place)


def _free(disk: Path) -> int:
    return shutil.disk_usage(disk).free
