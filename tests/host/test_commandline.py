"""What every command line shares: flags' types, and what an error looks like."""

import argparse
import warnings

import pytest
import torch

from nkat.errors import NKATError
from nkat.host import commandline, hardware
from nkat.host.threads import most_threads


def test_as_many_threads_as_the_machine_can_sensibly_run():
    most = most_threads()
    assert commandline.thread_count("1") == 1
    assert commandline.thread_count(str(most)) == most
    for wrong in (0, -1, most + 1, 100_000, 10**30):
        with pytest.raises(argparse.ArgumentTypeError, match="must be at"):
            commandline.thread_count(str(wrong))


def test_a_library_call_is_bounded_too():
    before = torch.get_num_threads()
    with pytest.raises(NKATError, match="within 1"):
        hardware.set_threads(100_000)
    assert torch.get_num_threads() == before == hardware.set_threads(None)


@pytest.mark.parametrize(
    "command",
    [
        ("nkat_inference_engine.py", "--model", "x.gguf", "--generate", "x"),
        ("nkat_gguf_converter.py", "--input", "x.gguf", "--output", "y.nkat"),
        ("nkat_auto_optimizer.py", "--model", "x.gguf", "--output", "x"),
        ("backend_selector.py", "--model", "x.gguf"),
    ],
)
def test_no_command_takes_a_hundred_thousand_threads(fails, command):
    assert "argument --threads" in fails(*command, "--threads", 100_000)


@pytest.mark.parametrize(
    "command",
    [
        ("nkat_inference_engine.py", "--model", "x.gguf", "--generate", "x"),
        ("nkat_gguf_converter.py", "--input", "x.gguf", "--output", "y.nkat"),
        ("nkat_auto_optimizer.py", "--model", "x.gguf", "--output-dir", "x"),
    ],
)
def test_a_seed_has_32_bits(fails, command):
    for wrong in (1 << 32, 10**40, -1):
        assert "argument --seed: must be" in fails(*command, "--seed", wrong)
    assert commandline.seed(str((1 << 32) - 1)) == (1 << 32) - 1


def test_workers_and_their_time_are_bounded(fails):
    command = ("nkat_auto_optimizer.py", "--model", "x.gguf", "--output-dir", "x")
    assert "argument --workers: must be at most" in fails(*command, "--workers", 100_000)
    for wrong in ("nan", "inf", -1):
        assert "argument --timeout: must be" in fails(*command, "--timeout", wrong)


def test_text_may_begin_with_a_dash():
    parser = commandline.Parser()
    parser.add_argument("--generate", type=commandline.any_text)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model")
    for text in ("---", "-one", "---\nfoo", "-1", "--no-such-flag", "- a"):
        parsed = parser.parse_args(["--generate", text, "--seed", "3"])
        assert (parsed.generate, parsed.seed) == (text, 3)
    for text in ("--model", "--", "a=--", "", "--=--"):
        assert parser.parse_args([f"--generate={text}"]).generate == text
    for wrong in (["--generate", "--model", "x"], ["--model", "---"], ["--generate"], ["--generate", "--"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("nkat_gguf_converter.py", "--theta-rnk", 4), "--theta-rnk 4; did you mean --theta-rank?"),  # and no --input
        (("nkat_inference_engine.py", "--modell", "x"), "--modell x; did you mean --model?"),
        (("nkat_auto_optimizer.py", "--modell=x"), "--modell=x; did you mean --model?"),
        (("backend_selector.py", "--nothing-like-it"), "unrecognized arguments: --nothing-like-it (see"),
        (("nkat_gguf_converter.py", "--input", "x", "--chunks", "a"), "--chunks: must be a whole number, got 'a'"),
        (("nkat_gguf_converter.py", "--input", "x", "--seed", "1.5"), "--seed: must be a whole number, got '1.5'"),
        (("nkat_inference_engine.py", "--model", "x", "--top-p", "a"), "--top-p: must be a number, got 'a'"),
        (("backend_selector.py", "--gpulayers", "a"), "--gpulayers: must be a whole number, got 'a'; or auto"),
    ],
)
def test_a_mistake_is_named_in_the_users_words(fails, command, said):
    line = fails(*command)
    assert said in line
    assert "invalid" not in line


def test_a_flag_that_is_needed_is_asked_for(fails):
    assert "required: --input" in fails("nkat_gguf_converter.py", "--theta-rank", 4)  # the control


def _numpy() -> None:
    import numpy as np

    np.zeros(1 << 60, np.uint8)


def _torch() -> None:
    torch.zeros(1 << 60, dtype=torch.uint8)


def _torch_beyond_counting() -> None:
    torch.zeros(1 << 62, dtype=torch.float64)


def _python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("allocate", [_numpy, _torch, _torch_beyond_counting, _python])
def test_missing_memory_is_one_line_that_names_what_to_make_smaller(allocate, monkeypatch, capsys):
    given = {"--max-tokens 5": "--max-tokens", "--rank=5": "--rank", "--embed_dim 5": "--embed-dim", "": ""}
    for command, named in ((["x", *flags.split()], named) for flags, named in given.items()):
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            commandline.run(allocate)
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: out of memory")
        assert f"a smaller {named}" in lines[0]


def test_a_fault_of_ours_keeps_its_traceback():
    def fail() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        commandline.run(fail)


def test_a_path_longer_than_the_system_takes_is_one_line(fails):
    for name in ("x" * 5000, "/".join(["x" * 200] * 30)):
        assert "long" in fails("nkat_inference_engine.py", "--model", f"{name}.gguf", "--generate", "x")
        assert "long" in fails("nkat_gguf_converter.py", "--input", f"{name}.gguf", "--output", "y.nkat", "--dry-run")


def test_a_message_is_one_line_whatever_it_quotes(capsys):
    def fail() -> None:
        raise NKATError("Θ: key 'a\nb\x1b[2Jc\udce9' is wrong")

    with pytest.raises(SystemExit):
        commandline.run(fail)
    assert capsys.readouterr().err == "error: Θ: key 'a\\nb\\x1b[2Jc\\udce9' is wrong\n"


def test_a_warning_for_the_user_is_one_line(capsys):
    def warn() -> None:
        warnings.warn("m.gguf: not valid\x1b[31m", UserWarning, stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)

    before = warnings.showwarning
    with pytest.raises(SystemExit) as ended, pytest.warns(DeprecationWarning, match="programmers"):  # control
        commandline.run(warn)
    assert ended.value.code == 0
    assert capsys.readouterr().err == "warning: m.gguf: not valid\\u001b[31m\n"
    assert warnings.showwarning is before
