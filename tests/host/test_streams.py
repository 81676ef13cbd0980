"""stdout and stderr never stop the work, and a failure never reports success."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nkat.host import streams
from nkat.host.commandline import run
from nkat.host.console import format_table, note
from nkat.host.streams import printable
from tests.conftest import ROOT
from tests.support.tiny_models import write_tiny_model

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")


def command(body: str, *, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command of this toolkit whose main is `body`, in a shell."""
    program = "from nkat.host.commandline import run\nfrom nkat.host.record import write_json\n"
    program += "def main():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\nrun(main)\n"
    script = f'"$PYTHON" -c "$PROGRAM" {redirect}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        env={**os.environ, "PYTHON": sys.executable, "PROGRAM": program, **environment},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )


WORK = """
    import sys, time, pathlib
    for i in range(2000):
        print("a line that nobody reads", i)
    pathlib.Path(r"{}").write_text("done")
"""


@POSIX
@pytest.mark.parametrize("redirect", ["| true", "| head -1 >&2", ">&-"])
def test_a_reader_who_left_does_not_stop_the_work(tmp_path: Path, redirect: str) -> None:
    done = command(WORK.format(tmp_path / "out"), redirect=redirect)
    assert (tmp_path / "out").read_text() == "done"
    assert done.returncode == 0
    assert done.stderr.count(b"\n") == ("head" in redirect)


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("body", [WORK, "print('few')\nopen(r'{}', 'w').write('done')"])
def test_a_full_stdout_is_said_when_the_work_is_done(tmp_path: Path, body: str) -> None:
    done = command(body.format(tmp_path / "out"), redirect="> /dev/full")
    assert (tmp_path / "out").read_text() == "done"
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["error: stdout: cannot be written: No space left on device"]


@POSIX
def test_work_that_fails_behind_a_broken_stdout_is_a_failure(tmp_path: Path) -> None:
    body = "from nkat.errors import NKATError\nprint('x' * 99999)\nraise NKATError('no such model')"
    done = command(body, redirect="| true")
    assert (done.returncode, done.stderr) == (2, b"error: no such model\n")
    done = command("import sys\nprint('x' * 99999)\nsys.exit(5)", redirect="| true")
    assert (done.returncode, done.stderr) == (5, b"")
    # a pipe to somebody else is not stdout, and its end is no success
    done = command("raise BrokenPipeError(32, 'Broken pipe')")
    assert (done.returncode, done.stderr) == (2, b"error: Broken pipe\n")


@POSIX
def test_a_record_nobody_got_is_a_failure() -> None:
    body = "write_json({'a': 'x' * 99999}, '-')"
    done = command(body, redirect="| true")
    assert done.returncode == 2
    assert done.stderr == b"error: stdout: the record could not be written: Broken pipe\n"
    done = command(body, redirect=">&-")
    assert done.returncode == 2
    assert command(body, redirect="| cat").returncode == 0


@POSIX
def test_a_broken_stderr_changes_nothing() -> None:
    done = command("import sys\nprint('x' * 99999, file=sys.stderr)\nprint('result')", redirect="2> >(true)")
    assert (done.returncode, done.stdout) == (0, b"result\n")


@POSIX
def test_a_closed_stderr_changes_nothing() -> None:
    body = """
        import subprocess, sys
        from nkat.errors import NKATError
        from nkat.host.console import bar
        bar(3, "work", "step").close()
        child = "import os, sys; os.fstat(2); print('warning', file=sys.stderr); print('result')"
        print(subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, check=True, text=True).stdout)
        raise NKATError("not on stdout")
    """
    done = command(body, redirect="2>&-")
    assert (done.returncode, done.stdout) == (2, b"result\n\n")


@POSIX
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-8:strict"])
def test_every_text_can_be_printed_in_every_encoding(encoding: str) -> None:
    body = r"""
        from nkat.errors import NKATError
        print("Θ κ — 👋 caf\udce9.gguf")
        write_json({"Θ": "👋 \x9b", "name": "caf\udce9"}, "-")
        raise NKATError("Θ \udce9")
    """
    done = command(body, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    first, record = done.stdout.decode(encoding.partition(":")[0]).splitlines()
    assert first.startswith("Θ" if "utf" in encoding else r"\u0398")
    assert first.endswith(r"caf\udce9.gguf")
    assert json.loads(record) == {"Θ": "👋 \x9b", "name": "caf\udce9"}
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: ")


def test_the_converter_in_a_code_page_and_with_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base.gguf", "llama")
    if os.name != "nt":
        model = model.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    arguments = ["--input", str(model), "--output", str(tmp_path / "out.nkat"), "--json", "-"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "nkat_gguf_converter.py"), *arguments],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.nkat").stat().st_size > model.stat().st_size
    assert json.loads(done.stdout.decode("cp1252").splitlines()[-1])["input"] == str(model)


def test_control_characters_of_a_file_are_shown_not_obeyed(capsys: pytest.CaptureFixture) -> None:
    hostile = "a\x1b]0;title\x07\x9b31m\x7f\r\u202eb\n\tc"
    assert printable(hostile) == r"a\u001b]0;title\u0007\u009b31m\u007f\r\u202eb\n\tc"
    assert printable("Θ — 👋 é") == "Θ — 👋 é"
    assert printable("x" * 999 + "\n") == "x" * 999 + "\\n"
    assert printable("a" + "x" * 10**6 + "b") == f"a{'x' * 499} … (999,002 characters) … {'x' * 499}b"
    assert format_table([[hostile, "1"]], ["name", "n"]).count("\n") == 2
    note(hostile)
    assert "\x1b" not in capsys.readouterr().err

    def main() -> None:
        print(hostile)
        print("\r bar \x1b[A\r", file=sys.stderr)  # as progress bars do
        print("\x1b[31m", file=sys.stderr)

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out == "a\\u001b]0;title\\u0007\\u009b31m\\u007f\\u000d\\u202eb\n\tc\n"
    assert said.err == "\r bar \x1b[A\r\n\\u001b[31m\n"


def test_streams_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    with streams.guarded(), streams.guarded():
        print("x\x1b")
        assert streams.lost_output() is None
        assert isinstance(sys.stdout, streams.Stream)
    assert sys.stdout is mine
    assert mine.getvalue() == "x\\u001b\n"
