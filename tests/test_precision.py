"""Vectors in fewer bits: `nvembed_fast.precision`, encode and the files of the command line."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from nvembed_fast import NVEmbed, cli
from nvembed_fast.config import DEFAULT_TASK
from nvembed_fast.precision import byte_width, quantized, restored, value_ranges
from nvembed_fast.vectors import Record, read_vectors, write_quantized, write_vectors

# dimension 0 goes from 0 to 255, 1 has one value, 2 from -255 to 255
VECTORS = np.array([[0, 7, -255], [255, 7, 255], [100.5, 7, 0]], dtype=np.float32)
BITS = np.array([[1, -1, 0, 2, -3, -1, 1, 1, 0.5]], dtype=np.float32)
RECORD = Record("m", "f", "t", "", 8, "float32")
TEXTS = [f"the text number {index}" for index in range(100)]


@pytest.fixture(scope="module")
def model(tiny_directory) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


@pytest.fixture(scope="module")
def vectors(model) -> np.ndarray:
    return model.encode(TEXTS, output="numpy")


def test_bytes_are_the_steps_of_each_dimension():
    got = quantized(VECTORS, "uint8")
    assert got.dtype == np.uint8 and got.tolist() == [[0, 0, 0], [255, 0, 255], [100, 0, 127]]
    signed = quantized(VECTORS, "int8")
    assert signed.dtype == np.int8 and signed.tolist() == (got.astype(int) - 128).tolist()
    # beyond ranges that are given
    ranges = np.array([[10, 0, 0], [20, 14, 0.5]])
    assert quantized(VECTORS, "uint8", ranges).tolist() == [[0, 127, 0], [255, 127, 255], [255, 127, 0]]


def test_bits_are_signs():
    got = quantized(BITS, "ubinary")
    assert got.dtype == np.uint8 and got.tolist() == [[0b10010011, 0b10000000]]
    signed = quantized(BITS, "binary")
    assert signed.dtype == np.int8 and signed.tolist() == [[0b10010011 - 128, 0]]
    for precision, bits in (("ubinary", got), ("binary", signed)):
        back = restored(bits, precision, 9)
        assert np.array_equal(back > 0, BITS > 0) and np.linalg.norm(back) == pytest.approx(1)


@pytest.mark.parametrize("num", [0, 1, 8192, 8193])
@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_restored_bytes_are_half_a_step_away(num, precision):
    rows = np.random.default_rng(0).normal(size=(num, 5)).astype(np.float32)
    ranges = value_ranges(rows) if num else np.zeros((2, 5))
    back = restored(quantized(rows, precision, ranges), precision, 5, ranges)
    assert back.shape == rows.shape and back.dtype == np.float32
    assert (np.abs(back - rows) <= 0.501 * (ranges[1] - ranges[0]) / 255 + 1e-6).all()


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_encode_gives_the_precision_of_its_vectors(precision, model, vectors):
    got = model.encode(TEXTS, output="numpy", precision=precision)
    np.testing.assert_array_equal(got, quantized(vectors, precision))
    tensor = model.encode(TEXTS, precision=precision)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), got)
    assert model.encode([], precision=precision).shape == (0, byte_width(64, precision))


def test_ranges_of_others_serve_a_single_text(model, vectors):
    ranges = value_ranges(vectors)
    got = model.encode(TEXTS[3], output="numpy", precision="int8", ranges=ranges)
    wanted = quantized(vectors[3:4], "int8", ranges)[0]
    assert np.abs(got.astype(int) - wanted).max() <= 1  # alone, the last digits of a vector may differ


def test_a_cut_keeps_the_first_dimensions(model, vectors):
    np.testing.assert_array_equal(model.encode(TEXTS, output="numpy", truncate_dim=5), vectors[:, :5])
    unit = model.encode(TEXTS, truncate_dim=5, normalize_embeddings=True)
    wanted = vectors[:, :5] / np.linalg.norm(vectors[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(unit, wanted, rtol=0, atol=1e-6)
    plain = model.encode(TEXTS, output="numpy", truncate_dim=5, normalize_embeddings=False)
    np.testing.assert_array_equal(plain, vectors[:, :5])
    bits = model.encode(TEXTS, output="numpy", truncate_dim=9, precision="binary")
    np.testing.assert_array_equal(bits, quantized(vectors[:, :9], "binary"))


@pytest.mark.parametrize(
    "keywords, kind, message",
    [
        ({"precision": "int4"}, ValueError, "precision must be one of float32, float16, int8, .* got 'int4'"),
        ({"precision": "int8"}, ValueError, "int8 needs ranges, and a single text has none"),
        ({"precision": "int8", "ranges": np.zeros((2, 3))}, ValueError, r"ranges must be \[2, 64\]"),
        ({"precision": "int8", "ranges": np.full((2, 64), np.nan)}, ValueError, r"ranges must be .* finite"),
        (
            {"precision": "binary", "ranges": np.zeros((2, 64))},
            TypeError,
            "ranges are those of int8 and uint8",
        ),
        ({"truncate_dim": 0}, ValueError, "truncate_dim must be from 1 to 64, got 0"),
        ({"truncate_dim": 65}, ValueError, "truncate_dim must be from 1 to 64, got 65"),
        ({"truncate_dim": True}, TypeError, "truncate_dim must be an int, got bool"),
    ],
)
def test_wrong_precisions_are_named_before_the_work(keywords, kind, message, model, monkeypatch):
    monkeypatch.setattr(NVEmbed, "embed", lambda *a: pytest.fail("texts were embedded"))
    with pytest.raises(kind, match=message):
        model.encode("one", **keywords)


def test_ranges_of_few_texts_are_told(model):
    with pytest.warns(UserWarning, match="the ranges of int8 are those of 2 texts"):
        model.encode(["one", "two"], precision="int8")


def test_half_precision_is_rounded_once_and_refuses_what_it_cannot_hold(model, vectors):
    got = model.encode(TEXTS, precision="float16", truncate_dim=5)
    assert got.dtype is torch.float16
    np.testing.assert_array_equal(got.numpy(), vectors[:, :5].astype(np.float16))
    with pytest.raises(ValueError, match="vector 1 is beyond the range of float16: choose another precision"):
        quantized(np.array([[1.0], [1e5]], dtype=np.float32), "float16")


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_a_file_of_bytes_says_what_they_mean(precision, tmp_path):
    file = io.BytesIO()
    write_quantized(file, VECTORS, dataclasses.replace(RECORD, precision=precision, width=3))
    (tmp_path / "x.npy").write_bytes(file.getvalue())
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), quantized(VECTORS, precision))
    got, record = read_vectors(tmp_path / "x.npy")
    ranges = value_ranges(VECTORS)
    np.testing.assert_array_equal(got, restored(quantized(VECTORS, precision, ranges), precision, 3, ranges))
    assert record.ranges == (ranges.tolist() if "int8" in precision else None)


@pytest.mark.parametrize(
    "changes",
    [{"width": 4}, {"precision": "uint8"}, {"precision": "x"}, {"ranges": [[0.0], [1.0]]}, {"ranges": "x"},
     {"ranges": [[0.0, 0, 0], [float("nan"), 0, 0]]}, {"width": "3"}, {"precision": []}],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_refused(changes, tmp_path):
    good = dataclasses.replace(RECORD, precision="int8", width=3, ranges=value_ranges(VECTORS).tolist())
    for record in (good, dataclasses.replace(good, **changes)):
        with open(tmp_path / "x.npy", "wb") as file:
            write_vectors(file, quantized(VECTORS, "int8"), record)
        if record is good:
            assert read_vectors(tmp_path / "x.npy")[0].shape == (3, 3)
    with pytest.raises(ValueError, match=r"x.npy holds int8 \[3, 3\], and its record does not fit"):
        read_vectors(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", quantized(VECTORS, "int8"))
    with pytest.raises(ValueError, match="x.npy holds int8 without a record of what they mean"):
        read_vectors(tmp_path / "x.npy")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_commands_write_and_search_such_a_file(precision, tiny_directory, tmp_path, capsys, model, vectors):
    texts, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    texts.write_text("\n".join(TEXTS))
    common = ["--model", str(tiny_directory), "--device", "cpu"]
    command = ["encode", str(texts), "-o", str(out), "--precision", precision, "--truncate-dim", "40"]
    assert cli.main([*command, *common]) == 0
    assert f"{precision} [100, {byte_width(40, precision)}]" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("texts.txt", "out.npy")] == []
    # as encode(truncate_dim=40) gives them
    cut = vectors[:, :40]
    np.testing.assert_allclose(np.load(out), quantized(cut, precision), rtol=0, atol=1e-6)
    got, record = read_vectors(out)
    assert record.width == 40 and record.precision == precision
    search = ["search", str(texts), TEXTS[7], "--embeddings", str(out), "--top", "3", "--json"]
    assert cli.main([*search, *common]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    # and ranked by their cosines
    question = model.encode_query(TEXTS[7], DEFAULT_TASK, output="numpy", truncate_dim=40)
    got = got.astype(np.float32)
    cosines = got @ question / np.linalg.norm(got, axis=1) / np.linalg.norm(question)
    for result in json.loads(line)["results"]:
        assert result["score"] == pytest.approx(cosines[result["index"]], abs=1e-5)
    assert [result["index"] for result in json.loads(line)["results"]] == np.argsort(-cosines)[:3].tolist()
    assert cli.main([*command[:-1], "65", *common]) == 1
    assert "--truncate-dim must be from 1 to 64, got 65" in capsys.readouterr().err
