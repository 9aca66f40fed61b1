"""The scripts of examples/ run. The demo has a file of its own, test_demo.py."""

import sysconfig
from pathlib import Path

import pytest
import torch

from examples import docstring_pairs, finetune, quickstart, search, train_head
from nvembed_fast import NVEmbed
from nvembed_fast.training.rows import open_rows


def test_quickstart_scores_every_passage(tiny_directory, capsys):
    quickstart.main(["--model", str(tiny_directory)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == quickstart.QUESTIONS
    assert [line[10:] for line in lines if line.startswith("  ")] == 2 * quickstart.PASSAGES


def test_search_ranks_and_keeps_the_vectors(tiny_directory, tmp_path, capsys, monkeypatch):
    passages = ["how to bake bread", "what a date is", "the sum of two numbers"]
    file = tmp_path / "passages.txt"
    file.write_text("\n".join(passages))
    arguments = [str(file), "what a date is", "--model", str(tiny_directory), "--top", "2"]
    search.main(arguments)
    first = capsys.readouterr().out
    model = NVEmbed.from_pretrained(tiny_directory)
    scores = model.encode(passages) @ model.encode_query("what a date is", search.TASK)
    best = scores.topk(2).indices.tolist()
    assert [line.split(maxsplit=1)[1] for line in first.splitlines()] == [passages[i] for i in best]

    def encode_document(*_, **__):
        raise AssertionError("the passages were embedded again")

    monkeypatch.setattr(NVEmbed, "encode_document", encode_document)
    search.main(arguments)
    assert capsys.readouterr().out == first
    file.write_text("\n".join(reversed(passages)))
    with pytest.raises(AssertionError, match="embedded again"):
        search.main(arguments)


def test_a_killed_search_leaves_no_part_of_the_vectors(tiny_directory, tmp_path, capsys, monkeypatch):
    file = tmp_path / "passages.txt"
    file.write_text("how to bake bread\nwhat a date is")
    arguments = [str(file), "what a date is", "--model", str(tiny_directory)]

    def killed(place, vectors):
        with open(place, "wb") if isinstance(place, Path) else place as part:
            part.write(b"a part")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search.np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            search.main(arguments)
    search.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_train_head_lowers_the_loss_and_leaves_the_backbone(tiny_directory, tmp_path, capsys):
    torch.manual_seed(0)
    train_head.main(["--model", str(tiny_directory), "-o", str(tmp_path / "trained")])
    *steps, last = capsys.readouterr().out.splitlines()
    assert last == f"saved in {tmp_path / 'trained'}"
    losses = [float(step.split()[-1]) for step in steps]
    assert len(losses) == 5 and losses[-1] < 0.8 * losses[0], losses
    before = NVEmbed.from_pretrained(tiny_directory).model
    after = NVEmbed.from_pretrained(tmp_path / "trained").model
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert changed and all(name.startswith("head.") for name in changed)


def test_docstrings_give_pairs_and_always_the_same(tmp_path, monkeypatch, capsys):
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    docstring_pairs.main(["-o", str(files[0])])
    rows = open_rows(files[0])
    found = [rows.row(i) for i in range(len(rows))]
    assert len(found) == 2000 == len({row.query for row in found}) == len({row.positives for row in found})
    assert all(len(row.positives) == 1 and len(set(row.negatives)) == 3 for row in found)
    by_query = {row.query: row for row in found}
    row = by_query["Parse the source into an AST node."]
    assert row.positives[0].startswith("Equivalent to compile(source, filename, mode")
    # a part of the library, twice
    library = Path(sysconfig.get_path("stdlib")) / "asyncio"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    for file in files:
        docstring_pairs.main(["-o", str(file), "--number", "40"])
    assert files[0].read_bytes() == files[1].read_bytes() != b""
    with pytest.raises(SystemExit):
        docstring_pairs.main(["-o", str(files[0]), "--number", "5000"])
    assert "ask for fewer than 5000" in capsys.readouterr().err


def test_finetune_goes_from_rows_to_a_model_that_encodes(tiny_directory, tmp_path, capsys):
    rows = Path(finetune.__file__).parent / "rows.jsonl"
    assert len(open_rows(rows)) == 10
    output = tmp_path / "finetuned"
    finetune.main(
        [str(rows), "--model", str(tiny_directory), "-o", str(output), "--steps", "4", "--lr", "1e-3"]
    )
    *_, losses, found = capsys.readouterr().out.splitlines()
    first, last = (float(losses.split()[i]) for i in (1, 6))
    assert last < 0.9 * first, losses
    assert int(found.split()[0]) >= 5, found
    # the same command goes on, and there is nothing left to do
    finetune.main(
        [str(rows), "--model", str(tiny_directory), "-o", str(output), "--steps", "4", "--lr", "1e-3"]
    )
    assert capsys.readouterr().out.splitlines()[-2:] == [losses, found]
