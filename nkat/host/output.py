"""How much a command says and in which form, `--quiet` and `--output-format`: of the whole process, as stdout is.

The setup check uses this on old Pythons: the standard library alone, and no newer syntax.
"""

from __future__ import annotations

FORMS = ("table", "md", "csv", "jsonl")


class _State:
    """quiet: stdout has the results, and stderr warnings and errors alone;  form: of tables, one of FORMS"""

    quiet = False
    form = FORMS[0]


def reset() -> None:
    """As where no flag says otherwise: what a command before this one in the same process was asked for is over."""
    _State.quiet, _State.form = False, FORMS[0]


def be_quiet() -> None:
    """From now on."""
    _State.quiet = True


def is_quiet() -> bool:
    return _State.quiet


def set_form(form: str) -> None:
    """One of FORMS."""
    _State.form = form


def form() -> str:
    """In which form tables are printed."""
    return _State.form


def is_for_people() -> bool:
    """Whether stdout is to be read as it stands; otherwise it holds tables and nothing else."""
    return _State.form == FORMS[0]
