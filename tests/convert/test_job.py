"""The converter as a user runs it: every form of output, every way back, every mistake."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import read_weight
from nkat.host.console import format_bytes
from nkat.measure.texts import default_text
from nkat.theta import inplace
from nkat.theta.modelfile import open_model_file
from tests.gguf.test_file import build
from tests.support.oracle import dense_theta
from tests.support.tiny_models import write_tiny_model
from tests.theta.test_algebra import dense_from_svd

CONVERTER = "nkat_gguf_converter.py"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def convert(script, *arguments: object) -> dict:
    """Runs the converter, which must succeed, and returns its JSON record (the last line of stdout)."""
    done = script(CONVERTER, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_guide_basic_conversion(script, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    record = convert(script, "--input", base, "--output", out, "--theta-rank", 4, "--theta-gamma", 0.97)
    found = open_model_file(out)
    assert (found.layout, found.theta.rank, found.theta.gamma) == ("tensors", 4, 0.97)
    assert len(found.theta.layers) == 7 * 3 == len(record["layers"])
    assert record["output_bytes"] == out.stat().st_size
    assert record["bytes_added"] == out.stat().st_size - base.stat().st_size
    assert record["metadata"]["nkat.base.sha256"] == sha256(base)
    with GGUFFile.open(base) as file:
        for name in ("blk.0.attn_k.weight", "blk.2.ffn_up.weight"):
            expected = dense_from_svd(read_weight(file, name), 4)
            found_dense = dense_theta(*found.theta.layers[name].factors(torch.float64))
            assert float((found_dense - expected).norm()) < 0.02 * float(expected.norm())
            assert float((found_dense + expected).norm()) > float(expected.norm())  # control


@pytest.mark.isa
def test_same_seed_same_bytes(script, tmp_path: Path, base: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(script, "--input", base, "--output", tmp_path / name, "--seed", seed)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")


def test_guide_selective_layers(script, fails, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    names = ["layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight", "blk.*.attn_v.weight"]
    convert(script, "--input", base, "--output", out, "--selective-layers", *names)
    expected = [
        "blk.0.attn_q.weight",
        "blk.0.attn_v.weight",
        "blk.0.ffn_gate.weight",
        "blk.1.attn_v.weight",
        "blk.2.attn_v.weight",
    ]
    assert sorted(open_model_file(out).theta.layers) == expected
    message = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--selective-layers", "blk.0.attn_z.weight")
    assert "no layer matches 'blk.0.attn_z.weight'" in message
    assert "blk.0.attn_" in message.split("nearest")[1]
    message = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--selective-layers", "token_embd.weight")
    assert "cannot adapt" in message


def test_guide_target_size(script, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    convert(script, "--input", base, "--output", out, "--target-size", 32)
    thetas = open_model_file(out).theta.layers
    assert {theta.size for theta in thetas.values()} == {32}
    convert(script, "--input", base, "--output", out, "--target-size", 256, "--force")  # the guide's own figure
    assert max(theta.size for theta in open_model_file(out).theta.layers.values()) == 96


@pytest.mark.parametrize("layout", ["tensors", "appended"])
def test_remove_gives_the_base_back(script, fails, tmp_path: Path, base: Path, layout: str) -> None:
    out, again = tmp_path / "out.nkat", tmp_path / "again.gguf"
    convert(script, "--input", base, "--output", out, "--layout", layout)
    assert open_model_file(out).layout == layout
    convert(script, "--input", out, "--output", again, "--remove")
    assert again.read_bytes() == base.read_bytes()
    assert "has no Θ to remove" in fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--remove")


def test_remove_refuses_a_damaged_base(script, fails, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    convert(script, "--input", base, "--output", out)
    raw = bytearray(out.read_bytes())
    raw[open_model_file(out).base.file.tensors["blk.0.attn_q.weight"].offset] ^= 1
    out.write_bytes(raw)
    assert "damaged" in fails(CONVERTER, "--input", out, "--output", tmp_path / "x.gguf", "--remove")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.isa
def test_converting_again_replaces_theta(script, tmp_path: Path, base: Path) -> None:
    first, second, direct = tmp_path / "1.nkat", tmp_path / "2.nkat", tmp_path / "3.nkat"
    convert(script, "--input", base, "--output", first, "--layout", "appended")
    convert(script, "--input", first, "--output", second, "--theta-rank", 2)
    convert(script, "--input", base, "--output", direct, "--theta-rank", 2)
    assert second.read_bytes() == direct.read_bytes()
    convert(script, "--input", second, "--output", first, "--theta-rank", 2, "--layout", "appended", "--force")
    convert(script, "--input", base, "--output", direct, "--theta-rank", 2, "--layout", "appended", "--force")
    assert first.read_bytes() == direct.read_bytes()


@pytest.mark.isa
def test_a_file_with_theta_among_its_tensors_is_converted_again(script, tmp_path: Path, base: Path) -> None:
    whole, cut, direct, again = (tmp_path / name for name in ("8.nkat", "cut.nkat", "3.nkat", "again.gguf"))
    convert(script, "--input", base, "--output", whole, "--theta-rank", 8)
    convert(script, "--input", whole, "--output", cut, "--truncate-rank", 3, "--theta-gamma", 0.98)
    found = open_model_file(cut)
    assert (found.layout, found.theta.rank, found.theta.gamma) == ("tensors", 3, 0.98)
    convert(script, "--input", cut, "--output", again, "--remove")
    assert again.read_bytes() == base.read_bytes()
    convert(script, "--input", whole, "--output", cut, "--theta-rank", 3, "--force")
    convert(script, "--input", base, "--output", direct, "--theta-rank", 3)
    assert cut.read_bytes() == direct.read_bytes()


def test_a_theta_of_its_own_file_is_written_whole_or_in_part(script, fails, tmp_path: Path, base: Path) -> None:
    only, out, direct = (tmp_path / name for name in ("theta.bin", "out.nkat", "direct.nkat"))
    convert(script, "--input", base, "--output", only, "--theta-only", "--theta-rank", 4)
    convert(script, "--input", base, "--output", direct, "--theta-rank", 4)
    convert(script, "--input", base, "--output", out, "--theta", only)
    assert out.read_bytes() == direct.read_bytes()
    part = ("--truncate-rank", 2, "--theta-gamma", 0.985, "--selective-layers", "blk.*.attn_*.weight", "--depth-decay")
    convert(script, "--input", base, "--output", out, "--theta", only, *part, "--force")
    found, whole = open_model_file(out).theta, open_model_file(only).theta
    assert found.layers.keys() == {name for name in whole.layers if ".attn_" in name} != whole.layers.keys()
    assert (found.rank, found.gamma, found.notes["nkat.theta.depth_decay"]) == (2, 0.985, 0.985)
    for name, theta in found.layers.items():
        p, q = (factor[:, :2] for factor in whole.layers[name].factors())
        torch.testing.assert_close(theta.factors(), (p * 0.985 ** int(name.split(".")[1]), q))
    message = fails(CONVERTER, "--input", out, "--output", direct, "--truncate-rank", 2, "--depth-decay", "--force")
    assert "decays with depth already" in message
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    message = fails(CONVERTER, "--input", other, "--output", tmp_path / "x", "--theta", only)
    assert "was made for another model" in message
    message = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--theta", only, "--theta-rank", 2)
    assert "write a Θ that there is" in message
    message = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--theta", only, "--truncate-rank", 5)
    assert f"{only}: its Θ has rank 4, which is below 5" in message
    assert "the output is the same file as the input" in fails(
        CONVERTER, "--input", base, "--output", only, "--theta", only, "--theta-only", "--force"
    )


def test_each_way_through_the_converter_has_a_head_and_a_next_command(script, tmp_path: Path, base: Path) -> None:
    out, only, lora, cut, back = (tmp_path / n for n in ("o.nkat", "t.bin", "l.gguf", "c.nkat", "back.gguf"))

    def run(*arguments: object) -> tuple[list[str], list[str], str]:
        done = script(CONVERTER, *arguments)
        assert done.returncode == 0, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("next: "), line
        name, *words = shlex.split(line.removeprefix("next: "))[1:]
        return done.stdout.splitlines(), [Path(name).name, *words], done.stderr

    engine = "nkat_inference_engine.py"
    arguments = ("--input", base, "--output", out, "--theta-rank", 4)
    head, following, _ = run(*arguments, "--dry-run")
    assert following == [CONVERTER, *map(str, arguments)]
    assert not out.exists()
    head, following, _ = run(*arguments)
    assert following == [engine, "--model", str(out), "--compare"]
    assert head[0] == f"input   {base} ({format_bytes(base.stat().st_size)}, llama)"
    assert run("--input", base, "--output", only, "--theta-only")[1][1:] == [
        "--model", str(base), "--theta", str(only), "--compare",
    ]  # fmt: skip
    head, following, _ = run("--input", out, "--export-lora", lora)
    assert following == ["backend_selector.py", "--model", str(out)]
    assert f"wrote {lora} ({lora.stat().st_size:,} bytes): Θ of rank 4 at gamma 0.97 as a LoRA adapter" in head
    head, _, said = run("--input", out, "--output", cut, "--truncate-rank", 1, "--theta-gamma", 1)
    assert head[:4] == [
        f"input   {out} ({format_bytes(out.stat().st_size)}, llama)",
        f"output  {cut} (tensors)",
        "Θ       21 layers, the first column of the input's 4, gamma 1 (κ = 0.000000)",
        "        replaces the Θ of rank 4 that the input has",
    ]
    assert "will have no effect" in said
    assert "have no effect" not in run("--input", out, "--output", cut, "--truncate-rank", 1, "--force")[2]  # control
    assert run("--input", out, "--output", back, "--remove")[1] == [engine, "--model", str(back), "--benchmark"]


def test_in_place(script, fails, tmp_path: Path, base: Path) -> None:
    original, target = base.read_bytes(), tmp_path / "target.gguf"
    shutil.copy(base, target)
    convert(script, "--input", target, "--in-place")
    assert target.read_bytes().startswith(original)
    assert open_model_file(target).theta.rank == 4
    assert "has a Θ already; give --force" in fails(CONVERTER, "--input", target, "--in-place", "--theta-rank", 2)
    convert(script, "--input", target, "--in-place", "--theta-rank", 2, "--force")
    assert open_model_file(target).theta.rank == 2
    target.write_bytes(target.read_bytes()[:-100])  # as if killed
    done = script(CONVERTER, "--input", target, "--in-place")
    assert done.returncode == 0
    assert "remains of a Θ" in done.stderr
    assert open_model_file(target).theta.rank == 4
    convert(script, "--input", target, "--in-place", "--remove")
    assert target.read_bytes() == original
    target.write_bytes(original + b"somebody else's bytes behind it" * 3)
    assert "unknown origin" in fails(CONVERTER, "--input", target, "--in-place")


def test_of_two_in_place_at_once_one_is_refused(fails, script, tmp_path: Path, base: Path) -> None:
    with inplace.exclusive(base):  # flock binds another opening in this process too, once it is not known as held
        held = inplace._held.copy()
        inplace._held.clear()
        said = fails(CONVERTER, "--input", base, "--in-place")
        assert "another process is changing this file" in said
        convert(script, "--input", base, "--output", tmp_path / "out.nkat")  # who only reads is not held up
        inplace._held.update(held)
    assert open_model_file(base).theta is None
    convert(script, "--input", base, "--in-place")
    assert open_model_file(base).theta is not None


def test_an_adapter_alone_is_reported(script, tmp_path: Path, base: Path) -> None:
    convert(script, "--input", base, "--output", tmp_path / "m.nkat")
    asked = ("--input", tmp_path / "m.nkat", "--export-lora", tmp_path / "a.gguf")
    done = script(CONVERTER, *asked)
    size = (tmp_path / "a.gguf").stat().st_size
    assert done.stdout == f"wrote {tmp_path / 'a.gguf'} ({size:,} bytes): Θ of rank 4 at gamma 0.97 as a LoRA adapter\n"
    assert "no effect" not in done.stderr
    done = script(CONVERTER, *asked, "--theta-gamma", 1, "--dry-run", "--force")
    assert done.stdout.startswith("would write ")
    assert "no effect" in done.stderr


def test_a_card_lies_beside_the_adapter(script, fails, tmp_path: Path, base: Path) -> None:
    made, folder = tmp_path / "m.nkat", tmp_path / "adapter"
    convert(script, "--input", base, "--output", made)
    folder.mkdir()
    asked = ("--input", made, "--export-lora", folder / "a.gguf", "--model-card")
    convert(script, *asked)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert open_model_file(made).theta.base_sha256 in card
    assert "--lora a.gguf" in card
    assert card.count("Not measured") == 2  # nothing was
    assert "README.md: exists already" in fails(CONVERTER, *asked[:-2], folder / "b.gguf", "--model-card")
    assert not (folder / "b.gguf").exists()
    assert "goes with --export-lora" in fails(CONVERTER, "--input", base, "--merge", folder / "c", "--model-card")


def test_a_card_lies_in_the_folder_that_peft_loads(script, tmp_path: Path, base: Path) -> None:
    pytest.importorskip("safetensors")
    folder = tmp_path / "peft"
    written = ("--output", tmp_path / "m.nkat", "--export-peft", folder, "--model-card")
    convert(script, "--input", base, *written)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "`adapter_model.safetensors`" in card
    assert "m.nkat`:" not in card  # lies elsewhere
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_card_has_what_was_measured(script, tmp_path: Path, base: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text().content[:3000], encoding="utf-8")
    judged = ("--optimize-rank", "--text", text, "--chunks", 1, "--model-card")
    record = convert(script, "--input", base, "--output", tmp_path / "m.nkat", *judged)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    kept = next(row for row in record["rank_search"]["rows"] if row["rank"] == record["rank_search"]["rank"])
    assert f"{kept['change_percent']:+.3f} ± {kept['change_percent_stderr']:.3f}" in card
    assert card.count("Not measured") == 1  # of other texts


def test_theta_only_and_lora(script, fails, tmp_path: Path, base: Path) -> None:
    theta, lora, late = tmp_path / "theta_rank4.bin", tmp_path / "lora.gguf", tmp_path / "late.gguf"
    convert(script, "--input", base, "--output", theta, "--theta-only", "--export-lora", lora)
    assert open_model_file(theta).layout == "theta-only"
    assert theta.stat().st_size < 0.3 * base.stat().st_size
    convert(script, "--input", base, "--output", tmp_path / "m.nkat")
    convert(script, "--input", tmp_path / "m.nkat", "--export-lora", late)
    assert late.read_bytes() == lora.read_bytes()
    convert(script, "--input", tmp_path / "m.nkat", "--export-lora", late, "--theta-gamma", 0.9, "--force")
    a, b = ({t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (lora, late))
    ratio = (0.9 * 0.1) / (0.97 * 0.03)
    np.testing.assert_allclose(b["blk.0.attn_q.weight.lora_b"], ratio * a["blk.0.attn_q.weight.lora_b"], rtol=3e-3)
    assert "holds only Θ" in fails(CONVERTER, "--input", theta, "--output", tmp_path / "x")
    assert "holds no Θ" in fails(CONVERTER, "--input", base, "--export-lora", tmp_path / "x")


def test_dry_run_writes_nothing(script, tmp_path: Path, base: Path) -> None:
    before = sorted(tmp_path.iterdir())
    record = convert(script, "--input", base, "--output", tmp_path / "x", "--export-lora", tmp_path / "y", "--dry-run")
    assert record["dry_run"] is True
    assert record["bytes_added"] > 0
    convert(script, "--input", base, "--in-place", "--dry-run")
    assert sorted(tmp_path.iterdir()) == before
    assert open_model_file(base).theta is None


def test_optimize_rank_keeps_the_highest_measured_tpe(script, tmp_path: Path, stories: Path, shared_text) -> None:
    out = tmp_path / "best.nkat"
    text = shared_text("alice29.txt")
    record = convert(script, "--input", stories, "--output", out, "--optimize-rank", "--text", text, "--chunks", 2)
    search = record["rank_search"]
    rows = search["rows"]
    assert [row["rank"] for row in rows] == [None, 2, 4, 6, 8]
    assert len({row["perplexity"] for row in rows}) == 5
    best = max(rows[1:], key=lambda row: row["tpe"])
    assert search["rank"] == best["rank"] == open_model_file(out).theta.rank
    assert search["text_sha256"] == sha256(text)
    direct = tmp_path / "direct.nkat"
    convert(script, "--input", stories, "--output", direct, "--theta-rank", best["rank"])
    a, b = (open_model_file(path).theta.layers["blk.0.ffn_up.weight"] for path in (out, direct))
    torch.testing.assert_close(dense_theta(*a.factors()), dense_theta(*b.factors()), atol=1e-3, rtol=0.02)


def test_source_residual_recovers_what_was_lost(script, fails, tmp_path: Path, stories: Path, shared_text) -> None:
    """A residual Θ of full rank must bring a damaged copy's weights back towards the reference's."""
    damaged = tmp_path / "damaged.gguf"
    raw = bytearray(stories.read_bytes())
    info = GGUFFile.open(stories).tensors["blk.0.attn_q.weight"]
    weight = np.frombuffer(raw, "<f4", info.nbytes // 4, info.offset).reshape(info.shape)
    lost = np.random.RandomState(0).standard_normal((64, 2)).astype("f4")
    lost = 0.05 * (np.outer(lost[:, 0], lost[:, 1]) - np.outer(lost[:, 1], lost[:, 0]))  # antisymmetric, of rank 2
    raw[info.offset : info.offset + info.nbytes] = (weight - lost).tobytes()
    damaged.write_bytes(raw)
    common = ["--input", damaged, "--theta-source", "residual", "--selective-layers", "blk.0.attn_q.weight"]
    for extra in ([], ["--calibrate", shared_text("alice29.txt")]):
        out = tmp_path / "out.nkat"
        record = convert(script, *common, "--reference", stories, "--output", out, "--theta-rank", 1, "--force", *extra)
        theta = open_model_file(out).theta.layers["blk.0.attn_q.weight"]
        restored = record["coupling"] * dense_theta(*theta.factors(torch.float64)).numpy()
        assert np.linalg.norm(restored - lost) < 0.02 * np.linalg.norm(lost)
    text = shared_text("alice29.txt")
    message = fails("nkat_inference_engine.py", "--model", out, "--perplexity", "--text", text)
    assert "made from that very text" in message
    assert "needs --reference" in fails(CONVERTER, *common, "--output", tmp_path / "x")
    other = write_tiny_model(tmp_path / "other.gguf", "llama", embedding=128)
    message = fails(CONVERTER, *common, "--reference", other, "--output", tmp_path / "x")
    assert "is not the same model: blk.0.attn_q.weight" in message


def test_mistakes_are_one_line_and_leave_nothing(script, fails, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    text = tmp_path / "note.txt"
    text.write_text("hello")
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(base.read_bytes()[:-1000])
    existing = tmp_path / "existing.nkat"
    existing.write_bytes(b"previous")
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(build())
    cases = [
        (["--input", tmp_path / "no.gguf", "--output", out], "no such file"),
        (["--input", tmp_path, "--output", out], "folder"),
        (["--input", text, "--output", out], "not a GGUF"),
        (["--input", truncated, "--output", out], "truncated"),
        (["--input", bare, "--output", out], "nothing to adapt"),
        (["--input", base, "--output", base, "--force"], "same file as the input"),
        (["--input", base, "--output", existing], "exists already; give --force"),
        (["--input", base, "--output", tmp_path / "no" / "out"], "does not exist"),
        (["--input", base, "--output", out, "--theta-rank", 33], "Θ rank 33 is impossible for blk.0.attn_k.weight"),
        (["--input", base, "--output", out, "--theta-rank", 0], "must be at least 1"),
        (["--input", base, "--output", out, "--theta-rank", 9, "--target-size", 8], "8x8 corner"),
        (["--input", base, "--output", out, "--theta-gamma", 0], "0 < gamma <= 1"),
        (["--input", base, "--output", out, "--theta-gamma", 1.2], "0 < gamma <= 1"),
        (["--input", base, "--output", out, "--optimize-rank", "--text", text], "too short"),
        (["--input", base, "--output", out, "--optimize-rank", "--theta-rank", 2], "has no meaning"),
        (["--input", base], "say where the result goes"),
        (["--input", base, "--output", out, "--in-place"], "exclude each other"),
        (["--input", base, "--output", out, "--reference", base], "are for --theta-source residual"),
        (["--input", base, "--output", out, "--remove", "--theta-rank", 2], "--remove only takes Θ off"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for arguments, message in cases:
        assert message in fails(CONVERTER, *arguments), arguments
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_nan_weights_are_named(fails, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "base.gguf", "llama")
    raw = bytearray(path.read_bytes())
    offset = GGUFFile.open(path).tensors["blk.1.ffn_up.weight"].offset
    raw[offset : offset + 4] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    message = fails(CONVERTER, "--input", path, "--output", tmp_path / "x")
    assert "blk.1.ffn_up.weight: the weight holds NaN" in message


def test_unsupported_type_is_named(fails, tmp_path: Path) -> None:
    from tests.gguf.test_file import entry, string, tensor

    info = tensor("blk.0.attn_q.weight", (256, 4), gguf.GGMLQuantizationType.Q8_K, 0)
    path = tmp_path / "unknown.gguf"
    path.write_bytes(build([entry("general.architecture", 8, string("llama"))], [info], bytes(4 * 292 + 16)))
    message = fails(CONVERTER, "--input", path, "--output", tmp_path / "x")
    assert "blk.0.attn_q.weight" in message
    assert "Q8_K" in message


def test_gamma_warnings(script, tmp_path: Path, base: Path) -> None:
    for gamma, warned in ((0.97, False), (0.5, True), (1.0, True)):
        done = script(CONVERTER, "--input", base, "--output", tmp_path / "x", "--theta-gamma", gamma, "--force")
        assert done.returncode == 0
        assert ("warning: gamma" in done.stderr) is warned


def test_as_a_process(process, tmp_path: Path, base: Path) -> None:
    done = process(CONVERTER, "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    done = process(CONVERTER, "--input", tmp_path / "no.gguf", "--output", tmp_path / "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    done = process(CONVERTER, "--input", base, "--output", tmp_path / "x", "--json", "-")
    assert done.returncode == 0
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["", "next"]
    assert json.loads(done.stdout.splitlines()[-1])["output_bytes"] == (tmp_path / "x").stat().st_size


@pytest.mark.slow
def test_smollm2_end_to_end(script, tmp_path: Path, smollm2: Path) -> None:
    out, back = tmp_path / "smol.nkat", tmp_path / "back.gguf"
    record = convert(script, "--input", smollm2, "--output", out, "--layout", "appended")
    assert len(record["layers"]) == 210
    assert record["theta_bytes"] == sum(2 * max(layer["shape"]) * 4 + 32 for layer in record["layers"])
    convert(script, "--input", out, "--output", back, "--remove")
    assert sha256(back) == sha256(smollm2)
