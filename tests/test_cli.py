"""The command line: its commands, their errors in one line, and files whole or absent."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_decoders import write_mistral

from nvembed_fast import NVEmbed, cli, query_instruction, topk
from nvembed_fast.cli import options

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["a judo throw", "", "parse a date \u2028 in Python", "tabs\tand caf\u00e9"]


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("task", ["find", r"Instruct: find\nQuery: "])
def test_encode_writes_what_the_encoder_gives(task, tiny_directory, texts_file, tmp_path, capsys):
    out = tmp_path / "out.npy"
    status, printed, _ = run(
        capsys, "encode", texts_file, "-o", out, "--model", tiny_directory, "--task", task
    )
    assert status == 0 and "float32 [4, 64]" in printed
    wanted = NVEmbed.from_pretrained(tiny_directory).encode(TEXTS, query_instruction("find"), output="numpy")
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_encode_reads_standard_input_and_jsonl(tiny_directory, texts_file, tmp_path, capsys, monkeypatch):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    assert run(capsys, "encode", texts_file, "-o", tmp_path / "a.npy", "--model", tiny_directory)[0] == 0
    arguments = ("encode", lines, "--field", "body", "-o", tmp_path / "b.npy", "--model", tiny_directory)
    assert run(capsys, *arguments)[0] == 0
    stdin = io.TextIOWrapper(io.BytesIO(texts_file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(capsys, "encode", "-", "-o", tmp_path / "c.npy", "--model", tiny_directory)[0] == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_a_mark_at_the_start_and_carriage_returns_are_no_part_of_a_text(
    tiny_directory, texts_file, tmp_path, capsys
):
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbf" + texts_file.read_bytes().replace(b"\n", b"\r\n"))
    for name, path in (("a", texts_file), ("b", windows)):
        assert run(capsys, "encode", path, "-o", tmp_path / f"{name}.npy", "--model", tiny_directory)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_json_lines_on_standard_input_and_blank_lines_between(tiny_directory, tmp_path, capsys, monkeypatch):
    lines = "".join(json.dumps({"body": t}) + "\n\n" for t in TEXTS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    arguments = ("encode", "-", "--field", "body", "-o", tmp_path / "o.npy", "--model", tiny_directory)
    status, _, error = run(capsys, *arguments)
    assert status == 0 and "note: 1 of the 4 texts are empty" in error
    wanted = NVEmbed.from_pretrained(tiny_directory).encode(TEXTS, output="numpy")
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), wanted, atol=1e-6)


def test_search_prints_the_texts_nearest_to_the_question(tiny_directory, texts_file, tmp_path, capsys):
    arguments = (
        "search",
        texts_file,
        "a judo throw",
        "--top",
        2,
        "--task",
        "find",
        "--model",
        tiny_directory,
    )
    status, printed, _ = run(capsys, *arguments)
    assert status == 0 and printed.count("\n  ") == 2
    model = NVEmbed.from_pretrained(tiny_directory)
    scores = model.encode_document(TEXTS) @ model.encode_query("a judo throw", "find")
    best, second = scores.argsort(descending=True)[:2].tolist()
    lines = [line.split(maxsplit=2) for line in printed.splitlines() if line.startswith("  ")]
    assert [rank for rank, *_ in lines] == ["1.", "2."]
    assert [text for *_, text in lines] == [" ".join(TEXTS[i].split()) for i in (best, second)]
    assert [float(score) for _, score, _ in lines] == pytest.approx(scores[[best, second]].tolist(), abs=1e-4)
    run(capsys, "encode", texts_file, "-o", tmp_path / "e.npy", "--model", tiny_directory)
    assert run(capsys, *arguments, "--embeddings", tmp_path / "e.npy")[1] == printed


def test_search_prints_json_with_whole_texts(tiny_directory, tmp_path, capsys):
    text = "\x1b[31m\u202ered\x07 caf\u00e9 " + 50 * "word "
    (tmp_path / "x.txt").write_text(text + "\njudo\n", encoding="utf-8")
    arguments = ("search", tmp_path / "x.txt", "q \x1b[0m?", "judo", "--top", 1, "--model", tiny_directory)
    first, second = map(json.loads, run(capsys, *arguments, "--json")[1].splitlines())
    assert (first["question"], second["question"]) == ("q \x1b[0m?", "judo")
    (result,) = second["results"]
    assert result["index"] == 1 and result["text"] == "judo" and 0 < result["score"] <= 1
    printed = run(capsys, *arguments, "--top", 2)[1]
    assert not set(printed) & {"\x1b", "\x07", "\u202e"} and printed.count("[31mred caf\u00e9 word") == 2


def test_search_never_shows_an_empty_text(tiny_directory, tmp_path, capsys, monkeypatch):
    found = topk.topk
    file, output = tmp_path / "x.jsonl", tmp_path / "x.npy"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "judo", " \n", "tea")))
    arguments = ("search", file, "judo", "--json", "--model", tiny_directory)
    printed = run(capsys, *arguments)[1]
    results = json.loads(printed)["results"]
    assert {(result["index"], result["text"]) for result in results} == {(1, "judo"), (3, "tea")}
    assert run(capsys, "encode", file, "-o", output, "--model", tiny_directory)[0] == 0
    seen = []
    monkeypatch.setattr(topk, "topk", lambda *args, **more: seen.append(args[1]) or found(*args, **more))
    status, printed, error = run(capsys, *arguments, "--embeddings", output)
    assert error == "" and len(seen[0]) == 4, "the vectors were copied without those of empty texts"
    kept = json.loads(printed)["results"]
    assert [result["index"] for result in kept] == [result["index"] for result in results]
    file.write_text('{"text": ""}\n')
    assert "x.jsonl has no text that is not empty" in run(capsys, *arguments)[2]


@pytest.mark.parametrize(
    "option",
    [["encode", "x", "-o", "x.npy", "--instruction"], ["encode", "x", "-o", "x.npy", "--task"]]
    + [["search", "x", "q", "--task"]],
)
def test_a_new_line_pasted_as_help_prints_it_is_one(option):
    for given, meant in {r"a\nb": "a\nb", "a\nb": "a\nb", r"a\\nb \t": r"a\nb \t"}.items():
        arguments = vars(cli._parser()[0].parse_args([*option, given]))
        assert arguments[option[-1].removeprefix("--")] == meant


def test_help_says_how_a_new_line_is_written(capsys):
    for command in ("encode", "search"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert r"\n in it is a new line" in " ".join(capsys.readouterr().out.split())


def test_lengths_are_checked_before_the_model_is_loaded(texts_file, tmp_path, capsys):
    arguments = ("search", texts_file, "q", "--model", tmp_path)
    assert "max_length must be at least 3, got 0" in run(capsys, *arguments, "--max-length", 0)[2]
    assert "max_batch_tokens must be at least 1" in run(capsys, *arguments, "--max-batch-tokens", 0)[2]


def test_a_variable_names_the_default_model(texts_file, tmp_path, capsys, monkeypatch):
    for name, wanted in {"nowhere": "no directory 'nowhere'", "": "nvidia/NV-Embed-v2"}.items():
        monkeypatch.setenv("NVEMBED_FAST_MODEL", name)
        assert wanted in run(capsys, "search", texts_file, "q", "--cache-dir", tmp_path)[2]


def test_the_size_of_a_download_is_told(capsys, monkeypatch):
    monkeypatch.setattr("nvembed_fast.checkpoint.download_size", lambda name, **_: 15_700_000_000)
    options.note_download("a/b")
    assert capsys.readouterr().err == "note: 15.7 GB of a/b are fetched into the hub's cache\n"


def test_texts_that_are_cut_are_told_in_one_line(tiny_directory, texts_file, tmp_path, capsys):
    arguments = ("encode", texts_file, "-o", tmp_path / "o.npy", "--model", tiny_directory)
    assert "cut" not in run(capsys, *arguments)[2]
    status, _, error = run(capsys, *arguments, "--max-length", 4)
    lines = [line for line in error.splitlines() if "cut" in line]
    assert status == 0
    assert lines == ["note: 3 of 4 texts were cut at max_length=4 tokens; --max-length raises it"]


def test_an_untrained_model_is_told_in_one_line(tiny_directory, texts_file, tmp_path, capsys):
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny_directory / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_untrained": True}))
    for command in (["encode", texts_file, "-o", tmp_path / "o.npy"], ["search", texts_file, "which?"]):
        status, _, error = run(capsys, *command, "--model", tmp_path)
        told = [line for line in error.splitlines() if "untrained" in line]
        assert status == 0 and len(told) == 1 and told[0].startswith("note: this model is untrained")


def test_info_says_which_implementation_and_why(tiny_directory, capsys):
    status, printed, _ = run(capsys, "info", "--model", tiny_directory)
    assert status == 0
    for part in (
        "torch 2.",
        "cpu: ",
        "take torch, because tensors are on the CPU",
        "flash_attention",
        "43 tensors",
        "takes the absorbed form",
        '"hidden_size": 64',
    ):
        assert part in printed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["encode", "--help"]])
def test_help_and_version_answer_without_torch(arguments):
    code = f"""
import sys
from nvembed_fast.cli import main
try:
    main({arguments})
finally:
    print(*(name for name in ("torch", "transformers", "numpy") if name in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "nvembed-fast" in done.stdout
    assert done.stderr.split() == []


@pytest.mark.parametrize("command", ["encode", "search", "init", "merge", "info", "check", "warm-up"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"nvembed-fast {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "absent.txt", "-o", "{tmp}/o.npy"], "absent.txt"),
        (["encode", "{texts}", "-o", "{tmp}/o.bin"], "--output must end in .npy"),
        (["encode", "{texts}", "-o", "{tmp}/nowhere/o.npy"], "the directory of --output does not exist"),
        (["encode", "{texts}", "-o", "~nosuchuser/o.npy"], "the directory of --output does not exist"),
        (["encode", "{texts}", "-o", "{tmp}/" + 250 * "o" + ".npy"], "file name of --output is longer than"),
        (["encode", "{texts}", "--text", "a", "-o", "{tmp}/o.npy"], "pass either a file"),
        (["encode", "-o", "{tmp}/o.npy"], "pass either a file"),
        (
            ["encode", "a/my passages", "-o", "{tmp}/o.npy"],
            "no text file a/my passages; - reads standard input",
        ),
        (["encode", "my passages.txt", "-o", "{tmp}/o.npy"], "--text embeds words themselves"),
        (["encode", "passages", "-o", "{tmp}/o.npy"], "no text file passages"),
        (["encode", "{texts}", "-o", "{tmp}/o.npy", "--model", "{tmp}"], "has no config.json"),
        (["encode", "{texts}", "-o", "{tmp}/o.npy", "--impl", "cuda"], "impl must be one of"),
        (["encode", "{texts}", "-o", "{tmp}/o.npy", "--device", "cuda:77"], "is not there"),
        (["search", "{texts}", "q", "--top", "0"], "--top must be at least 1"),
        (["search", "{texts}", "q", "--task", ""], "task is empty"),
        (["encode", "{texts}", "-o", "{tmp}/o.npy", "--task", ""], "task is empty"),
        (["search", "{texts}", "q", " "], "question 2 is empty"),
        (["encode", "--text", "a", "--field", "body", "-o", "{tmp}/o.npy"], "leave --field and --format out"),
        (["encode", "two words", "--format", "csv", "-o", "{tmp}/o.npy"], "leave --field and --format out"),
        (["info", "--model", ""], "no directory ''"),
        (["encode", "a\x1b[31m", "-o", "{tmp}/o.npy"], r"no text file a\x1b[31m"),
        (["encode", "a\u202etxt.exe", "-o", "{tmp}/o.npy"], r"no text file a\u202etxt.exe"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments, message, tiny_directory, texts_file, tmp_path, capsys
):
    arguments = [a.format(tmp=tmp_path, texts=texts_file) for a in arguments]
    if "--model" not in arguments:
        arguments += ["--model", tiny_directory]
    status, _, error = run(capsys, *arguments)
    errors = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert status == 1 and message in error and len(errors) == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "a.txt", "-o", ""], "argument -o/--output: invalid path value: ''"),
        (["search", "a.txt", "q", "--embeddings", ""], "argument --embeddings: invalid path value: ''"),
        (["init", "decoder", "-o", ""], "argument -o/--output: invalid path value: ''"),
        (
            ["encode", "a.txt", "-o", "o.npy", *(f"{i}.txt" for i in range(4000))],
            "arguments 0.txt 1.txt 2.txt and 3997 more: --help names its files, and - is standard input\n",
        ),
        (["encode", "a.txt", "-o", "o.npy", "--ouput", "x"], "no option --ouput: did you mean --output?\n"),
        (["encode", "a.txt", "-o", "o.npy", "-x", "y"], "unrecognized arguments -x y\n"),
    ],
)
def test_wrong_arguments_are_told_in_short(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_cpu_without_memory_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.\n#0 x")

    monkeypatch.setattr("nvembed_fast.new_model.init_model", full)
    status, _, error = run(capsys, "init", tmp_path, "-o", tmp_path / "out")
    assert status == 1 and "not enough memory on the CPU" in error and error.count("\n") == 1


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_texts_are_not_replaced_by_their_vectors(
    tiny_directory, texts_file, tmp_path, capsys, monkeypatch, link
):
    source = texts_file.rename(tmp_path / "in.npy")
    output = source
    if link:
        output = tmp_path / "out.npy"
        getattr(output, link)(source)
    monkeypatch.chdir(tmp_path)
    before = source.read_bytes()
    with open(source) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for given in ("in.npy", source, "-"):
            status, _, error = run(capsys, "encode", given, "-o", output, "--model", tiny_directory)
            assert status == 1 and "--output is the file of the texts, which it would replace" in error
    assert source.read_bytes() == before


def test_init_refuses_a_directory_with_weights_unless_forced(tmp_path, capsys):
    out, decoder = tmp_path / "out", write_mistral(tmp_path / "mistral")
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    status, _, error = run(capsys, "init", decoder, "-o", out, "--num-latents", 2)
    assert status == 1 and "--force moves them aside" in error
    assert (out / "model.safetensors").read_text() == "mine"
    status, printed, _ = run(
        capsys, "init", decoder, "-o", out, "--num-latents", 2, "--force", "--head-start=random"
    )
    assert load_file(out / "model.safetensors")[
        "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight"
    ].any()
    assert status == 0 and f"{out}/replaced-1: the files that were in {out}" in printed
    assert (out / "replaced-1" / "model.safetensors").read_text() == "mine"


def test_a_bad_line_of_jsonl_is_named(tiny_directory, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{"other": 1}\n')
    status, _, error = run(capsys, "encode", path, "-o", tmp_path / "o.npy", "--model", tiny_directory)
    assert status == 1 and "x.jsonl, line 2: no 'text', the line has 'other'; choose with --field" in error


def test_an_array_of_another_file_or_model_is_refused(tiny_directory, texts_file, tmp_path, capsys):
    np.save(tmp_path / "e.npy", np.zeros((3, 64), np.float32))
    arguments = ("search", texts_file, "q", "--model", tiny_directory, "--embeddings", tmp_path / "e.npy")
    assert "has 3 vectors, but" in run(capsys, *arguments)[2]
    np.save(tmp_path / "e.npy", np.zeros((4, 32), np.float32))
    assert "not of the same model" in run(capsys, *arguments)[2]


def test_embeddings_that_are_no_array_are_refused_without_advice_to_unpickle(
    tiny_directory, texts_file, capsys
):
    arguments = ("search", texts_file, "q", "--model", tiny_directory, "--embeddings", texts_file)
    status, _, error = run(capsys, *arguments)
    assert status == 1 and "is no .npy array made by nvembed-fast encode" in error and "pickle" not in error


def test_a_disk_too_small_is_told_before_the_work(tiny_directory, texts_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(NVEmbed, "embed", None)  # never called
    status, _, error = run(capsys, "encode", texts_file, "-o", tmp_path / "o.npy", "--model", tiny_directory)
    assert status == 1 and re.search(r"o\.npy: it needs 1\.\d+ kB, 100 bytes are free there", error)
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


def test_a_full_disk_leaves_no_file(tiny_directory, texts_file, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    status, _, error = run(capsys, "encode", texts_file, "-o", tmp_path / "o.npy", "--model", tiny_directory)
    assert status == 1 and "cannot write" in error and "o.npy: No space left" in error
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


def test_an_interrupt_says_so_and_leaves_no_file(tiny_directory, texts_file, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(NVEmbed, "embed", interrupted)
    status, _, error = run(capsys, "encode", texts_file, "-o", tmp_path / "o.npy", "--model", tiny_directory)
    assert status == 130 and "nothing was written" in error
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


def test_a_closed_pipe_is_no_error(tiny_directory, tmp_path):
    model = tmp_path / "a model"
    model.symlink_to(tiny_directory)
    command = shlex.join([sys.executable, "-m", "nvembed_fast", "info", "--model", str(model)]) + " | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("nvembed-fast") and done.stderr == ""


def test_info_hands_the_hubs_options_on_and_fetches_the_config_alone(tiny_directory, capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "nvembed_fast.checkpoint.resolve", lambda name, **k: asked.update(k, name=name) or tiny_directory
    )
    options = ("--revision", "r", "--token", "t", "--cache-dir", "/c", "--local-files-only")
    assert run(capsys, "info", "--model", "a/b", *options)[0] == 0
    wanted = {"revision": "r", "token": "t", "cache_dir": Path("/c"), "local_files_only": True}
    assert asked == wanted | {"name": "a/b", "config_only": True}


def test_help_names_hub_ids_and_says_what_a_question_is(capsys):
    for command, part in {"init": "a hub id", "search": "each in quotation marks"}.items():
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert part in " ".join(capsys.readouterr().out.split())
