"""The page beside an adapter: what is recorded is on it, what is missing is said to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.host.tables import Column, Table
from nkat.theta.algebra import Theta
from nkat.theta.card import Card, may_write, render, write_card
from nkat.theta.set import CALIBRATION_KEY, GUARD_PREFIX, HELDOUT_PREFIX, ThetaSet

LAYER = Theta(torch.ones(4, 2, dtype=torch.int8), torch.ones(4, 2, dtype=torch.int8), torch.ones(2, 2))
PLAIN = ThetaSet({"blk.0.attn_q.weight": LAYER}, 0.97, "weight", 3, "a" * 64, "tiny <b>", 1000)
NOTES = {
    CALIBRATION_KEY: "c" * 64,
    f"{HELDOUT_PREFIX}change_percent": -4.25,
    f"{HELDOUT_PREFIX}change_percent_stderr": 0.125,
    f"{HELDOUT_PREFIX}tokens": 2550,
    f"{GUARD_PREFIX}text": "verse",
    f"{GUARD_PREFIX}change_percent": 0.5,
    f"{GUARD_PREFIX}change_percent_stderr": 0.25,
    "nkat.fit.learning_rate": 1e-3,
}
FITTED = replace(PLAIN, source="fit", notes=NOTES)


def card(theta: ThetaSet, gamma: float = 0.97, **more: object) -> Card:
    return Card(theta, {}, gamma, {"a.gguf": "the adapter"}, lora="a.gguf", **more)


def front_matter(text: str) -> dict[str, str]:
    """Of the simple kind that is written: a line a key, comments behind."""
    first, *lines = text.split("---\n")[1].splitlines()
    assert first.startswith("# ")
    return {key: value.partition("  #")[0] for key, _, value in (line.partition(": ") for line in lines)}


def test_what_is_recorded_is_on_the_page() -> None:
    text = render(card(FITTED, text="my.txt"))
    assert f"my.txt, sha256 `{'c' * 64}`" in text
    assert "-4.250 % ± 0.125" in text
    assert "2,550" in text
    assert "| verse | +0.500 % ± 0.250" in " ".join(text.split())
    assert "- peak learning rate: 0.001" in text
    assert "Not measured" not in text
    assert "--lora a.gguf" in text


def test_what_is_missing_is_said_to_be() -> None:
    text = render(card(PLAIN))
    assert text.count("Not measured") == 2
    assert "no text was learned" in text
    assert "sha256 `c" not in text


def test_a_figure_of_another_strength_is_not_this_ones() -> None:
    assert render(card(FITTED, gamma=0.99)).count("Not measured") == 2
    assert "name that is not recorded" in render(card(FITTED))


def test_measured_tables_come_first_and_a_price_is_not_said_twice() -> None:
    table = Table("x", [Column("text", "text")], [{"text": "letters"}])
    text = render(card(FITTED, gains=[table], prices=[table]))
    assert text.index("letters") < text.index("-4.250")
    assert "verse" not in text


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"general.repo_url": "https://huggingface.co/me/tiny"}, '"me/tiny"'),
        ({"general.source.huggingface.repository": "me/tiny"}, '"me/tiny"'),
        ({"general.repo_url": "https://example.org/me/tiny"}, '"tiny <b>"'),
        ({}, '"tiny <b>"'),
    ],
)
def test_the_front_matter_names_the_base_where_the_hub_knows_it(metadata: dict[str, str], name: str) -> None:
    found = front_matter(render(replace(card(PLAIN), base={"general.license": "mit\nx: y", **metadata})))
    assert found["base_model"] == name
    assert found["license"] == "unknown"
    assert found["tags"] == "[nkat, gguf, lora]"
    assert "x" not in found


def test_a_folder_of_pefts_says_how_it_is_loaded() -> None:
    text = render(card(PLAIN, peft=True))
    assert front_matter(text)["library_name"] == "peft"
    assert "PeftModel.from_pretrained" in text
    assert front_matter(render(card(PLAIN)))["library_name"] == "nkat"
    assert "PeftModel" not in render(card(PLAIN))


def test_a_command_names_files_and_no_folders() -> None:
    line = "/usr/bin/python /home/me/nkat_gguf_converter.py --input '/home/me/a b.gguf' --theta-gamma 0.9 && x --y z/w"
    text = render(card(PLAIN, commands={"It was made by:": line}))
    assert "python nkat_gguf_converter.py --input 'a b.gguf' --theta-gamma 0.9 && x --y z/w" in text
    assert "/home" not in text


def test_a_name_is_no_markup() -> None:
    assert "# Θ for tiny \\<b>" in render(card(PLAIN))


def test_a_page_of_somebody_else_stays(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    assert may_write(page)
    write_card(page, card(PLAIN), force=False)
    assert may_write(page)  # ours
    with pytest.raises(NKATError, match="exists already"):
        write_card(page, card(PLAIN), force=False)
    page.write_text("# my notes")
    assert not may_write(page)
