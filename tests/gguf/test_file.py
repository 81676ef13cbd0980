"""The reader: equal to gguf-py on good files, `GGUFError` and nothing else on bad ones."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nkat.errors import NKATError
from nkat.gguf.file import MAX_STRINGS, GGUFError, GGUFFile
from tests.support.tiny_models import write_tiny_model

TYPES = GGUFValueType


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    metadata: list[bytes] = (),
    tensors: list[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    n_tensors, n_metadata = counts or (len(tensors), len(metadata))
    header = struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_metadata) + b"".join([*metadata, *tensors])
    return header + bytes(-len(header) % alignment) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def open_bytes(raw: bytes) -> GGUFFile:
        path = tmp_path / "x.gguf"
        path.write_bytes(raw)
        return GGUFFile.open(path)

    return open_bytes


def read_everything(file: GGUFFile) -> dict[str, Any]:
    """Decodes all there is, as a hostile file might only fail late."""
    values = {key: file.metadata[key] for key in file.metadata}
    for name in file.tensors:
        file.raw(name).sum()
    return values


SCALARS = {
    TYPES.UINT8: ("<B", 200),
    TYPES.INT8: ("<b", -5),
    TYPES.UINT16: ("<H", 60000),
    TYPES.INT16: ("<h", -30000),
    TYPES.UINT32: ("<I", 4_000_000_000),
    TYPES.INT32: ("<i", -2_000_000_000),
    TYPES.UINT64: ("<Q", 1 << 63),
    TYPES.INT64: ("<q", -(1 << 62)),
    TYPES.FLOAT32: ("<f", 0.5),
    TYPES.FLOAT64: ("<d", 0.97),
    TYPES.BOOL: ("<B", 1),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 24, 32, 4096])
def test_all_value_types_and_alignments(opened, version: int, alignment: int) -> None:
    metadata = [entry("general.alignment", TYPES.UINT32, struct.pack("<I", alignment))]
    metadata += [entry(f"s.{t.name}", t, struct.pack(f, v)) for t, (f, v) in SCALARS.items()]
    metadata += [entry(f"a.{t.name}", TYPES.ARRAY, array(t, 2, struct.pack(f, v) * 2)) for t, (f, v) in SCALARS.items()]
    metadata.append(entry("text", TYPES.STRING, string("Θ ⋆ x")))
    metadata.append(entry("words", TYPES.ARRAY, array(TYPES.STRING, 3, string("") + string("a") + string("é"))))
    nested = array(TYPES.ARRAY, 2, array(TYPES.UINT8, 2, b"\1\2") + array(TYPES.STRING, 1, string("x")))
    metadata.append(entry("nested", TYPES.ARRAY, nested))
    second = 16 + -16 % alignment
    infos = [tensor("a", (4,), GGMLQuantizationType.F32, 0), tensor("b", (2, 3), GGMLQuantizationType.I8, second)]
    data = np.arange(4, dtype="<f4").tobytes() + bytes(second - 16) + bytes(range(6))
    file = opened(build(metadata, infos, data, version=version, alignment=alignment))
    assert file.version == version
    assert file.alignment == alignment
    for kind, (_, value) in SCALARS.items():
        assert file.metadata[f"s.{kind.name}"] == value
        assert type(file.metadata[f"s.{kind.name}"]) is (bool if kind == TYPES.BOOL else type(value))
        assert file.metadata[f"a.{kind.name}"].tolist() == [value, value]
    assert file.metadata["text"] == "Θ ⋆ x"
    assert file.metadata["words"] == ["", "a", "é"]
    assert [list(part) for part in file.metadata["nested"]] == [[1, 2], ["x"]]
    assert file.tensors["b"].shape == (3, 2)
    assert file.raw("a").view("<f4").tolist() == [0, 1, 2, 3]
    assert file.raw("b").tolist() == list(range(6))
    with pytest.raises(ValueError, match="read-only"):
        file.raw("a")[0] = 1


def assert_equal_to_gguf_py(path: Path) -> None:
    ours, oracle = GGUFFile.open(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        expected, found = field.contents(), ours.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected, key
    assert list(ours.tensors) == [t.name for t in oracle.tensors]
    for t in oracle.tensors:
        info = ours.tensors[t.name]
        assert (info.shape, info.type, info.offset) == (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset)
        assert np.array_equal(ours.raw(t.name), t.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_equal_to_gguf_py_on_tiny_models(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, arch)
    assert_equal_to_gguf_py(path)


def test_equal_to_gguf_py_on_stories(stories: Path) -> None:
    assert_equal_to_gguf_py(stories)


@pytest.mark.slow
def test_equal_to_gguf_py_on_smollm2(smollm2: Path) -> None:
    assert_equal_to_gguf_py(smollm2)


def test_long_arrays_are_not_decoded_while_opening(smollm2: Path) -> None:
    tracemalloc.start()
    file = GGUFFile.open(smollm2)
    opening = tracemalloc.get_traced_memory()[1]
    tokens = file.metadata["tokenizer.ggml.tokens"]
    decoding = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens) == 49152
    assert opening < 1_000_000 < decoding


def test_views_outlive_the_file(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama")
    with GGUFFile.open(path) as file:
        raw = file.raw("output_norm.weight")
        before = raw.copy()
        file.release("output_norm.weight")
    assert np.array_equal(raw, before)
    with pytest.raises(ValueError, match="closed"):
        file.raw("output_norm.weight")


F32 = GGMLQuantizationType.F32
ONE = [tensor("t", (8,), F32, 0)]
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGWP" + bytes(60), r"magic at byte 0: not a GGUF file \(found b'GGWP'\)"),
    "short": (b"GG", "magic at byte 0"),
    "version 1": (build(version=1), "version at byte 4: GGUF version 1 is not supported"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "header cut": (build()[:20], "metadata count at byte 16: needs 8 bytes"),
    "tensor count": (build(counts=(1 << 60, 0)), "tensor count at byte 8"),
    "metadata count": (build(counts=(0, 1 << 60)), "metadata count at byte 16"),
    "key length": (build([struct.pack("<Q", 1 << 40)], data=bytes(32)), "length of metadata key at byte 24"),
    "empty key": (build([entry("", TYPES.BOOL, b"\1")]), "metadata key at byte 24: is empty"),
    "key not UTF-8": (build([entry(b"\xff\xfe", TYPES.BOOL, b"\1")]), "metadata key at byte 32: not valid UTF-8"),
    "key twice": (build([entry("k", TYPES.BOOL, b"\1")] * 2), "metadata key 'k' at byte 38: appears twice"),
    "value type": (build([entry("k", 13, bytes(8))]), "type of k at byte 33: unknown value type 13"),
    "bool": (build([entry("k", TYPES.BOOL, b"\2")]), "a bool must be 0 or 1"),
    "string length": (
        build([entry("k", TYPES.STRING, struct.pack("<Q", 99) + b"abc")]),
        "k at byte 45: needs 99 bytes",
    ),
    "array type": (build([entry("k", TYPES.ARRAY, array(77, 1, bytes(8)))]), "type of elements of k"),
    "array length": (build([entry("k", TYPES.ARRAY, array(TYPES.UINT64, 1 << 61, b""))]), "k at byte 49: needs"),
    "string array length": (build([entry("k", TYPES.ARRAY, array(TYPES.STRING, 1 << 61, b""))]), "length of k"),
    "string array cut": (
        build([entry("k", TYPES.ARRAY, array(TYPES.STRING, 2, string("ab") + struct.pack("<Q", 1 << 50)))]),
        r"k\[1\] at byte 59: 1125899906842624 bytes reach beyond",
    ),
    "nesting": (
        build([entry("k", TYPES.ARRAY, array(TYPES.ARRAY, 1, b"") * 5 + array(TYPES.UINT8, 1, b"\1"))]),
        "nested deeper",
    ),
    "alignment zero": (build([entry("general.alignment", TYPES.UINT32, bytes(4))]), "general.alignment at byte 24"),
    "alignment type": (build([entry("general.alignment", TYPES.STRING, string("32"))]), "general.alignment"),
    "split": (build([entry("split.count", TYPES.UINT16, struct.pack("<H", 3))]), "split model"),
    "split negative": (build([entry("split.count", TYPES.INT32, struct.pack("<i", -3))]), "number of parts, got -3"),
    "no dimensions": (build(tensors=[tensor("t", (), F32, 0) + bytes(8)]), "number of dimensions of tensor 't'"),
    "five dimensions": (build(tensors=[tensor("t", (1,) * 5, F32, 0)], data=bytes(4)), "5 is not within 1..4"),
    "zero dimension": (build(tensors=[tensor("t", (4, 0), F32, 0)]), "hold a zero"),
    "huge dimensions": (build(tensors=[tensor("t", (1 << 40, 1 << 40), F32, 0)]), "overflow 64 bits"),
    "tensor type": (build(tensors=[tensor("t", (8,), 4, 0)]), "type of tensor 't' at byte 45: Q4_2, which ggml has"),
    "ik type": (build(tensors=[tensor("t", (8,), 144, 0)]), "IQ4_KS, which only ik_llama.cpp has"),
    "new type": (build(tensors=[tensor("t", (8,), 999, 0)]), "unknown tensor type 999"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS.*git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>", "a page of a web site.*download the model again"),
    "web page with a mark": (b"\xef\xbb\xbf<!-- x -->\n<html lang=en>", "a page of a web site"),
    "a server's error": (b"<Error><Code>AccessDenied</Code>", "a page of a web site"),
    "text": (b"Entry not found", "but text, which may say why a download failed: 'Entry not found'"),
    "pickle": (b"\x80\x02}q" + bytes(60), "but a pickle, as"),
    "no text": (b"abcd\x07efgh" + bytes(60), r"not a GGUF file \(found b'abcd'\)"),
    "old format": (b"tjgg" + bytes(60), "older than GGUF"),
    "zip": (b"PK\3\4" + bytes(60), "a zip archive"),
    "safetensors": (struct.pack("<Q", 60) + b'{"__metadata__": {}}', "safetensors"),
    "gzip": (b"\x1f\x8b" + bytes(60), "a compressed file"),
    "JSON": (b'{"error": "not found"}', "but JSON"),
    "zeros": (bytes(64), "a download that was not finished"),
    "block size": (build(tensors=[tensor("t", (40,), GGMLQuantizationType.Q4_0, 0)]), "no multiple of Q4_0's block"),
    "tensor name empty": (build(tensors=[tensor("", (8,), F32, 0)], data=bytes(32)), "tensor name at byte 24"),
    "name twice": (build(tensors=ONE * 2, data=bytes(32)), "tensor 't' at byte 57: the name appears twice"),
    "misaligned": (build(tensors=[tensor("t", (8,), F32, 4)], data=bytes(64)), "no multiple of the alignment 32"),
    "offset": (build(tensors=[tensor("t", (8,), F32, 1 << 62)], data=bytes(32)), "data of tensor 't'"),
    "data cut": (build(tensors=ONE, data=bytes(31)), "data of tensor 't' at byte 64: ends at byte 96"),
    "overlap": (
        build(tensors=[tensor("t", (16,), F32, 0), tensor("u", (8,), F32, 32)], data=bytes(64)),
        "data of tensor 'u' at byte 128: overlaps the data of tensor 't'",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_field_and_offset(opened, name: str) -> None:
    raw, message = BAD_FILES[name]
    with pytest.raises(GGUFError, match=message):
        opened(raw)


def test_the_bad_files_differ_from_a_good_one_only_in_their_fault(opened) -> None:
    """The control: the same builder makes files that open."""
    good = opened(build([entry("k", TYPES.BOOL, b"\1")], [*ONE, tensor("u", (8,), F32, 32)], bytes(64)))
    assert read_everything(good) == {"k": True}


def test_late_faults_are_found_when_the_array_is_asked_for(opened) -> None:
    flags = entry("flags", TYPES.ARRAY, array(TYPES.BOOL, 3, b"\0\1\7"))
    file = opened(build([flags]))
    with pytest.raises(GGUFError, match=r"flags at byte \d+: a bool must be 0 or 1"):
        file.metadata["flags"]


def test_texts_that_are_not_utf8_are_read(opened) -> None:
    """As by llama.cpp, which only copies them. Those of arrays keep their bytes; keys and names stay strict."""
    words = entry("words", TYPES.ARRAY, array(TYPES.STRING, 2, string("ok") + string(b"\xff")))
    with pytest.warns(UserWarning, match="metadata k is not valid UTF-8"):
        file = opened(build([words, entry("k", TYPES.STRING, string(b"caf\xe9"))]))
    assert file.metadata["k"] == "caf\ufffd"
    assert [word.encode("utf-8", "surrogateescape") for word in file.metadata["words"]] == [b"ok", b"\xff"]


def test_memory_stays_within_what_the_file_justifies(opened) -> None:
    """Counts that promise terabytes must not be believed."""
    claims = [
        build(counts=(1 << 50, 1 << 50)),
        build([entry("k", TYPES.ARRAY, array(TYPES.STRING, MAX_STRINGS * 64, b""))]),
        build([entry("k", TYPES.STRING, struct.pack("<Q", 1 << 62))]),
        build(tensors=[tensor("t", (1 << 31, 1 << 31), F32, 0)]),
    ]
    for raw in claims:
        tracemalloc.start()
        with pytest.raises(GGUFError):
            opened(raw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300_000


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="no such file"):
        GGUFFile.open(tmp_path / "nothing.gguf")
    with pytest.raises(NKATError, match="folder"):
        GGUFFile.open(tmp_path)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(GGUFError, match="empty"):
        GGUFFile.open(empty)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Headers of real writers, small enough to mutate thousands of times."""
    folder = tmp_path_factory.mktemp("seeds")
    raws = [write_tiny_model(folder / f"{arch}.gguf", arch).read_bytes() for arch in ("llama", "gemma3")]
    nested = entry("n", TYPES.ARRAY, array(TYPES.ARRAY, 2, array(TYPES.STRING, 1, string("x")) * 2))
    raws.append(build([nested, entry("s", TYPES.STRING, string("y"))], ONE, bytes(32)))
    return raws


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
mutation = st.one_of(
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("u64"), st.floats(0, 1), st.sampled_from(INTERESTING)),
    st.tuples(st.just("u32"), st.floats(0, 1), st.sampled_from(INTERESTING)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 64)),
)


def mutate(raw: bytes, kind: str, where: float, value: int, header: int) -> bytes:
    at = min(int(where * header), len(raw) - 1)
    if kind == "byte":
        return raw[:at] + bytes([value]) + raw[at + 1 :]
    if kind == "u64":
        return raw[:at] + value.to_bytes(8, "little") + raw[at + 8 :]
    if kind == "u32":
        return raw[:at] + (value & 0xFFFFFFFF).to_bytes(4, "little") + raw[at + 4 :]
    if kind == "cut":
        return raw[:at]
    if kind == "drop":
        return raw[:at] + raw[at + value :]
    return raw[: at + value] + raw[at:]


@given(data=st.data(), mutations=st.lists(mutation, min_size=1, max_size=4))
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_headers_open_or_raise_gguf_error(tmp_path: Path, seeds: list[bytes], data, mutations) -> None:
    raw = data.draw(st.sampled_from(seeds))
    header = min(len(raw), 6000)
    for kind, where, value in mutations:
        raw = mutate(raw, kind, where, value, header)
        if not raw:
            return
    path = tmp_path / "mutated.gguf"
    path.write_bytes(raw)
    try:
        file = GGUFFile.open(path)
        read_everything(file)
    except GGUFError:  # any other exception is a failure
        return
    assert all(t.offset + t.nbytes <= len(raw) for t in file.tensors.values())


def test_a_header_cut_at_any_byte_is_an_error(tmp_path: Path, seeds: list[bytes]) -> None:
    path = tmp_path / "cut.gguf"
    for raw in seeds:
        path.write_bytes(raw)
        end = GGUFFile.open(path).data_end
        for cut in [*range(1, 4000, 7), *range(end - 9, end)]:
            if cut < end:
                path.write_bytes(raw[:cut])
                with pytest.raises(GGUFError):
                    GGUFFile.open(path)


def test_a_file_without_tensors_and_one_without_its_last_padding_are_read(opened) -> None:
    from nkat.theta.modelfile import open_model_file

    for raw in (build(), build()[:24], build([entry("general.alignment", TYPES.UINT32, struct.pack("<I", 32))])[:57]):
        file = opened(raw)
        assert not file.tensors
        assert file.data_end <= file.end
        assert open_model_file(file.path).layout == "plain"
    for elements in range(1, 17):  # of a last tensor that needs from 0 to 31 bytes of padding, with some or none there
        size = 4 * elements
        for padding in {0, -size % 32 // 2, -size % 32}:
            raw = build(tensors=[tensor("t", (elements,), F32, 0)], data=b"\1" * size + bytes(padding))
            model = open_model_file(opened(raw).path)
            assert (model.layout, model.foreign_tail, model.unfinished) == ("plain", False, False)
            assert model.base_size == len(raw)
    with pytest.raises(GGUFError, match="truncated"):  # the control: the tensor itself is cut
        opened(build(tensors=[tensor("t", (13,), F32, 0)], data=bytes(51)))


@pytest.mark.parametrize("key", ["split.count", "general.alignment"])
def test_the_readers_own_keys_as_arrays_and_texts(opened, key: str) -> None:
    for kind, value in (
        (TYPES.ARRAY, array(TYPES.UINT32, 2, bytes(8))),
        (TYPES.ARRAY, array(TYPES.UINT32, 0, b"")),
        (TYPES.ARRAY, array(TYPES.STRING, 1, string("x"))),
        (TYPES.STRING, string("1")),
        (TYPES.FLOAT32, struct.pack("<f", 1.0)),
    ):
        with pytest.raises(GGUFError, match=f"{key} at byte 24: must be a"):
            opened(build([entry(key, kind, value)]))


def test_an_enormous_alignment_of_a_sparse_file_costs_no_time(tmp_path: Path) -> None:
    """Θ's marker is looked for at every byte of the last padding."""
    for exponent in (22, 40):
        raw = build([entry("general.alignment", TYPES.UINT64, struct.pack("<Q", 1 << exponent))])
        path = tmp_path / f"{exponent}.gguf"
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(1 << exponent)
        with pytest.raises(GGUFError, match="more than the allowed"):
            GGUFFile.open(path)
