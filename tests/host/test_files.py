"""Outputs: what is no file is never replaced, links stay links, and nothing is left behind for ever."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.host.files import atomic_output, check_output
from nkat.host.processes import identity, is_alive
from tests.conftest import ROOT

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files and signals")

WRITER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from nkat.host.commandline import run
    from nkat.host.files import atomic_output

    def main():
        with atomic_output(Path(sys.argv[1]), 1000, force=True) as file:
            file.write(b"half")
            print("writing", flush=True)
            time.sleep(60)

    run(main)
    """
)


def write(path: Path, content: bytes = b"new") -> None:
    with atomic_output(path, len(content), force=True) as file:
        file.write(content)


def start_writer(path: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WRITER, str(path)]
    writer = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


@posix
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str, linked: bool) -> None:
    special = tmp_path / "special"
    if kind == "pipe":
        os.mkfifo(special)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(special))  # a socket's path must be short
    else:
        try:
            os.mknod(special, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    path = special
    if linked:
        path = tmp_path / "link"
        path.symlink_to(special)
    before = special.lstat()
    with pytest.raises(NKATError, match=f"this is a {kind}, which is not replaced by a file"):
        write(path)
    assert special.lstat() == before
    assert len(list(tmp_path.iterdir())) == 1 + linked
    with pytest.raises(NKATError, match=f"this is a {kind}"):
        check_output(path, force=False)


@posix
def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, middle, link = folder / "target", tmp_path / "middle", tmp_path / "link"
    target.write_bytes(b"old")
    middle.symlink_to("elsewhere/target")
    link.symlink_to(middle)
    with atomic_output(link, 3, force=True) as file:
        file.write(b"new")
        assert unfinished(folder)  # in the target's folder, so that the rename stays within one file system
        assert target.read_bytes() == b"old"
    assert (link.is_symlink(), middle.is_symlink(), target.is_symlink()) == (True, True, False)
    assert target.read_bytes() == b"new"
    with pytest.raises(NKATError, match="exists already"):
        check_output(link, force=False)
    with pytest.raises(RuntimeError), atomic_output(link, 3, force=True) as file:
        raise RuntimeError
    assert target.read_bytes() == b"new"
    assert not unfinished(folder)


@posix
def test_another_users_file_in_a_sticky_folder() -> None:
    """As in /tmp: it is known before the work is done, and one's own file can be replaced."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    program = """
import os, sys
from pathlib import Path
from nkat.errors import NKATError
from nkat.host.files import atomic_output, check_output
folder = Path(sys.argv[1])
os.chdir(folder)
os.setegid(65534)
os.seteuid(65534)
def replaced(name):
    with atomic_output(Path(name), 3, force=True) as file:
        file.write(b"new")
for name in ("mine", "mine"):
    replaced(name)
for name in ("theirs", "link"):
    for use in (lambda: check_output(Path(name), True), lambda: replaced(name)):
        try:
            use()
        except NKATError as error:
            print(error)
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own lie below one that is closed to others
        folder = Path(name)
        folder.chmod(0o1777)
        (folder / "theirs").write_bytes(b"old")
        (folder / "theirs").chmod(0o666)
        (folder / "link").symlink_to("theirs")
        (folder / ".x.nkat-999999999-1-a.tmp").write_bytes(b"left by another user")
        command = [sys.executable, "-c", program, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        said = [line.partition(": ")[2][:28] for line in done.stdout.splitlines()]
        assert said == ["belongs to another user, and"] * 4
        assert (folder / "theirs").read_bytes() == b"old"
        assert (folder / "mine").read_bytes() == b"new"
        assert len(unfinished(folder)) == 1


@posix
def test_links_to_nothing_and_in_a_circle(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("there")
    check_output(link, force=False)
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "there").read_bytes() == b"new"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(NKATError, match="a: cannot be written: "):
        write(tmp_path / "a")
    (tmp_path / "lost").symlink_to("no/folder")
    with pytest.raises(NKATError, match="does not exist"):
        write(tmp_path / "lost")
    (tmp_path / "to_folder").symlink_to(tmp_path)
    with pytest.raises(NKATError, match="this is a folder"):
        write(tmp_path / "to_folder")


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for path in (Path("x" * 5000), tmp_path / ("x" * 300), Path("/".join(["d"] * 3000)), Path("a\0b")):
        with pytest.raises(NKATError) as refused:
            check_output(path, force=True)
        assert "\n" not in str(refused.value)
    long = tmp_path / ("Θ" * 120)  # 240 bytes: a name that is allowed
    write(long)
    assert long.read_bytes() == b"new"
    with pytest.raises(NKATError, match="does not exist"):
        check_output(long / "x", force=True)


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    writer = start_writer(tmp_path / "out")
    assert unfinished(tmp_path)
    writer.send_signal(number)
    _, said = writer.communicate(timeout=30)
    assert writer.returncode == 128 + number
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@posix
def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path, capsys) -> None:
    living, killed = start_writer(tmp_path / "out"), start_writer(tmp_path / "other")
    killed.kill()  # and nobody waits for it: a zombie writes nothing any more
    while is_alive(str(killed.pid)):
        time.sleep(0.01)
    mine = [
        tmp_path / name for name in (".out.abc.tmp", ".notes.tmp", f".x.nkat-{identity()}-a.tmp", "x.nkat-1-1-a.tmp")
    ]
    for path in mine:
        path.write_bytes(b"x")
    try:
        assert len(unfinished(tmp_path)) == 2 + 3
        write(tmp_path / "third")
        assert set(unfinished(tmp_path)) - set(mine) == {p for p in unfinished(tmp_path) if f"-{living.pid}-" in p.name}
        assert all(path.exists() for path in mine)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"note: removed {tmp_path}")
        write(tmp_path / "third")
        assert capsys.readouterr().err == ""
    finally:
        for writer in (living, killed):
            writer.kill()
            writer.communicate()
    write(tmp_path / "third")
    assert set(unfinished(tmp_path)) <= set(mine)


@posix
def test_a_writer_that_cannot_be_seen_keeps_its_file(tmp_path: Path) -> None:
    """In another container the same number is another process; the lock on the file tells."""
    writer = start_writer(tmp_path / "out")
    try:
        (found,) = unfinished(tmp_path)
        seen = found.rename(tmp_path / ".out.nkat-999999999-1-a.tmp")
        write(tmp_path / "other")
        assert seen.exists()
    finally:
        writer.kill()
        writer.communicate()
    write(tmp_path / "other")
    assert not seen.exists()


def test_a_number_that_was_given_again_is_another_process() -> None:
    pid, _, start = identity().partition("-")
    assert is_alive(identity())
    assert is_alive(pid)
    assert not is_alive(f"{pid}-{int(start) - 1000}")
    assert not is_alive("999999999")
    assert not is_alive("")
