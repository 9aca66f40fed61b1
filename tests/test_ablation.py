"""Tables of ablations: what the committed ones compare, what is refused, rows, the list and the report."""

import importlib.util
import re
import shlex
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from nvembed_fast import cli, files
from nvembed_fast.evaluation import ablation, ablation_report
from nvembed_fast.evaluation.ablation import Cell, Table, read_rows, read_table, row_of, write_row
from nvembed_fast.training.recipe import differing

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("ablations/*.toml"))
RESULTS = ROOT / "ablations" / "results"

BASE = """
output = "out"
[model]
start = "decoder"
layers = 2
[train]
steps = 10
warmup = 3
[[data]]
file = "pairs.jsonl"
[[data]]
file = "classes.jsonl"
labels = "examples"
"""
SECOND = BASE.replace('"decoder"\nlayers = 2', '"out"').replace("steps = 10", "steps = 6")
TABLE = """
title = "Heads"
base = ["first.toml", "second.toml"]
seeds = [0, 4]
tasks = ["squad", "r52"]
without = ["classes"]

[[run]]
name = "a"
paper = [70.0, 60.0]

[[run]]
name = "b"
set = { model.pooling_head = "mean" }
paper = [69.5]
against = "a"
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "first.toml").write_text(BASE)
    (tmp_path / "second.toml").write_text(SECOND)
    (tmp_path / "heads.toml").write_text(TABLE)
    return tmp_path / "heads.toml"


def add_run(file: Path, lines: str) -> Path:
    file.write_text(f"{file.read_text()}\n[[run]]\n{lines}\n")
    return file


def planted(cell: Cell, squad: float, r52: float = 0.5, **changes) -> dict:
    """A row of a cell."""
    return {
        "table": cell.table.name,
        "run": cell.run.name,
        "seed": cell.seed,
        "steps": 16,
        "tokens": 1_250_000,
        "scores": {"squad": squad, "r52": r52},
        "made_of": cell.made_of,
        "revisions": {"squad": "r", "r52": "r"},
        "data": {"pairs": "f"},
    } | changes


def rows_of(table: Table, **scores) -> list[dict]:
    """Rows of runs by name: pairs of scores (squad, r52) for each seed."""
    cells = {(cell.run.name, cell.seed): cell for cell in table.cells()}
    return [
        planted(cells[name, seed], *pair)
        for name, pairs in scores.items()
        for seed, pair in zip(table.seeds, pairs, strict=False)
    ]


def ablate(capsys, *words) -> tuple[int, str, str]:
    status = cli.main(["ablate", *map(str, words)])
    return status, *capsys.readouterr()


def changed(table: Table, name: str) -> list[set[str]]:
    """For each stage the keys in which a run's recipe differs from that of the run that it is against."""
    cells = {cell.run.name: cell for cell in table.cells() if cell.seed == 0}
    other = cells[name].run.against
    stages = [[r.flat() for r in cells[n].recipes(Path("/cell"))] for n in (other, name)]
    return [set(differing(*pair)) for pair in zip(*stages, strict=False)]


TABLES = {file.stem: read_table(file) for file in FILES}


def test_the_tables_are_those_of_the_paper():
    assert set(TABLES) == {"curation", "labels", "pilot", "pooling", "stages"}
    pooling = TABLES["pooling"]
    found = {}
    for run in pooling.runs:
        first, second = run.stages
        found[first.model.pooling_head, bool(first.model.causal)] = run.paper[0]
        assert second.train.steps < first.train.steps
    assert found == {
        ("latent", False): 72.31, ("eos", False): 71.63, ("mean", False): 71.71,
        ("self_attention", False): 71.61, ("latent", True): 71.61, ("eos", True): 70.85,
        ("mean", True): 71.38, ("self_attention", True): 70.60,
    }  # fmt: skip
    for table in TABLES.values():
        assert len(table.seeds) >= 3 and all(run.against for run in table.runs[1:] if run.paper)


def test_runs_differ_in_what_their_table_asks_alone():
    for run in TABLES["pooling"].runs[1:]:
        wanted = {"model.causal"} if "causal" in run.name else {"model.pooling_head"}
        assert changed(TABLES["pooling"], run.name) == [wanted, set()], run.name
    stages = {run.name: run.stages for run in TABLES["stages"].runs}
    both = stages["two stages"]
    assert [s.data for s in stages["reversed"]] == [s.data for s in reversed(both)]
    for name, in_batch in (("single, in-batch on", True), ("single, in-batch off", False)):
        (single,) = stages[name]
        assert {part.in_batch for part in single.data} == {in_batch}
        assert single.train.steps == sum(stage.train.steps for stage in both)
        assert replace(single.train, steps=both[0].train.steps) == both[0].train
    assert all(part.in_batch for part in both[0].data) and not any(part.in_batch for part in both[1].data)
    (first, second) = changed(TABLES["labels"], "label-based")
    assert first == set() and {key.split(".")[2] for key in second} == {"labels"} and len(second) == 3


def test_rows_of_two_processes_are_written_one_after_the_other(file, tmp_path):
    table = read_table(file)
    first, second = table.cells()[:2]
    write_row(tmp_path, first, planted(first, 0.5))
    writer = threading.Thread(target=write_row, args=(tmp_path, second, planted(second, 0.4)))
    with files.alone(tmp_path, ".lock"):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and len(read_rows(tmp_path)) == 1
    writer.join(60)
    assert [row["run"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_a_report_says_what_its_tasks_are(file):
    file.write_text(TABLE.replace("tasks =", "quick = true\nmax_length = 48\ntasks ="))
    text = ablation_report.page([read_table(file)], [])
    assert "Tasks: squad, r52, samples of the large ones, at most 48 tokens of a text.\n" in text


def test_each_step_of_curation_adds_one_thing():
    runs = TABLES["curation"].runs
    sets = [[{Path(part.file).stem for part in stage.data} for stage in run.stages] for run in runs]
    assert all(first == second for first, second in sets)
    none, mined, more, synthetic = (first for first, _ in sets)
    assert none == mined < more < synthetic and synthetic - more == {"synthetic"}
    assert {part.hard_negatives for stage in runs[0].stages for part in stage.data} == {0}
    assert {part.hard_negatives for stage in runs[1].stages for part in stage.data} == {1, 3}
    assert [run.paper for run in runs] == [(70.73, 59.22), (71.83, 61.52), (72.07, 62.28), (72.31, 62.65)]
    assert [run.against for run in runs[1:]] == [run.name for run in runs[:-1]]


def test_the_makefile_makes_the_sets_of_the_tables():
    makefile = (ROOT / "Makefile").read_text()
    mined, labelled = (
        set(re.search(rf"^{name} := (.*)$", makefile, re.MULTILINE)[1].split())
        for name in ("MINED", "LABELLED")
    )
    files = {p.file for t in TABLES.values() for run in t.runs for stage in run.stages for p in stage.data}
    folder = ROOT / "runs" / "ablations"
    wanted = {str(folder / "mined" / f"{name}.jsonl") for name in mined}
    wanted |= {str(folder / "data" / f"{name}.jsonl") for name in (*labelled, "synthetic")}
    assert files == wanted


def test_every_committed_row_is_that_of_a_cell():
    cells = [cell for table in TABLES.values() for cell in table.cells()]
    rows = read_rows(RESULTS)
    done = [row_of(cell, rows) for cell in cells]
    assert [row for row in rows if row not in done] == []


def test_the_page_has_the_tables_of_the_committed_rows(tmp_path):
    page = tmp_path / "ablations.md"
    page.write_text((ROOT / "docs" / "ablations.md").read_text())
    ablation_report.put_into(page, TABLES.values(), read_rows(RESULTS))
    command = "nvembed-fast ablate ablations/*.toml --report --page docs/ablations.md"
    assert page.read_text() == (ROOT / "docs" / "ablations.md").read_text(), f"run {command}"


def test_the_example_of_the_page_is_a_table(tmp_path):
    (text,) = re.findall(
        r"^```text\n(title.*?)^```", (ROOT / "docs" / "ablations.md").read_text(), re.M | re.S
    )
    (tmp_path / "ablations").mkdir()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "ablations" / "page.toml").write_text(text)
    assert len(read_table(tmp_path / "ablations" / "page.toml").runs) == 2


def test_a_cell_trains_each_stage_from_the_one_before(file, tmp_path):
    add_run(file, 'name = "reversed"\nstages = [2, 1]')
    table = read_table(file)
    first, second = Cell(table, table.runs[0], 4).recipes(tmp_path / "cell")
    assert (first.seed, second.seed) == (40, 41)
    assert first.model.layers == 2 and Path(first.model.start).name == "decoder"
    assert second.model.start == first.output == str(tmp_path / "cell" / "stage1")
    assert (first.train.steps, second.train.steps) == (10, 6)
    one, other = Cell(table, table.runs[2], 0).recipes(tmp_path / "cell")
    assert (one.train.steps, other.train.steps) == (6, 10) and (one.seed, other.seed) == (0, 1)
    assert one.model.layers == 2 and other.model.layers is None, "the first stage starts as the base says"


def test_overrides_reach_the_stages_that_have_the_set(file):
    (file.parent / "first.toml").write_text(BASE.split('[[data]]\nfile = "classes')[0])
    add_run(
        file, 'name = "c"\nwithout = []\nset = { data.classes.labels = "texts", data."*".in_batch = false }'
    )
    first, second = read_table(file, ["train.lr=1e-3"], scale=2).runs[2].stages
    assert [part.labels for part in (*first.data, *second.data)] == ["none", "none", "texts"]
    assert not any(part.in_batch for part in (*first.data, *second.data))
    assert (first.train.lr, first.train.steps, first.train.warmup, second.train.steps) == (1e-3, 20, 6, 12)


@pytest.mark.parametrize("instruction", ["smile \U0001f600", "caf\xe9", "a\\u007fb", 'say \\"a\\"\\n'])
def test_an_override_keeps_every_character(instruction, file):
    add_run(file, f'name = "c"\nset = {{ data.pairs.instruction = "{instruction}" }}')
    assert (
        read_table(file).runs[2].stages[0].data[0].instruction == tomllib.loads(f'a = "{instruction}"')["a"]
    )


@pytest.mark.parametrize(
    ("search", "replacement", "message"),
    [
        ('base = ["first.toml", "second.toml"]', "", "heads.toml: base is missing"),
        ('base = ["first.toml", "second.toml"]', "base = []", "heads.toml: base is missing"),
        ('"first.toml"', "1", "base must be a list, each a string, got"),
        ("seeds = [0, 4]", "seeds = [0, 0]", "seeds must be different numbers from 0"),
        ("seeds = [0, 4]", "seeds = [true]", "seeds must be a list, each an integer"),
        ("tasks =", "max_length = 47\ntasks =", "max_length must be 48 or more, got 47"),
        ("tasks =", "taks =", "no key 'taks': did you mean 'tasks'"),
        ('"squad", ', '"squat", ', "no evaluation task 'squat': there are squad"),
        ('name = "b"', 'name = "a"', "heads.toml: two runs have the name 'a'"),
        ('name = "b"', "", "run 2: name is missing"),
        ('name = "b"', 'name = "b"\npapers = 3', "run 2: no key 'papers': did you mean 'paper'"),
        ("pooling_head =", "poling_head =", "run 'b': .*no key 'model.poling_head': did you mean"),
        ('"mean"', '"median"', "run 'b': .*model.pooling_head must be one of 'latent'"),
        ("model.pooling_head", "data.classs.weight", "run 'b': no data set 'classs': the base has pairs"),
        ('model.pooling_head = "mean"', "seed = 3", "run 'b': seed=3 cannot be set: a cell has its own"),
        ('["classes"]', '["class"]', "run 'a': no data set 'class': the base has pairs, classes"),
        ('["classes"]', '["classes", "pairs"]', "run 'a': without takes every data set of first.toml"),
        ('against = "a"', 'against = "c"', "run 'b': against must be another run, got 'c'"),
        ('against = "a"', "stages = [3]", r"run 'b': stages must be numbers from 1 to 2, got \[3\]"),
        ("title =", "title", "heads.toml is no TOML file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_any_run(file, capsys, search, replacement, message):
    assert TABLE.count(search) == 1
    file.write_text(TABLE.replace(search, replacement))
    status, printed, error = ablate(capsys, file)
    assert (status, printed, error.count("\n")) == (1, "", 1) and re.search(message, error), error


def test_a_missing_set_is_told_before_any_run(file, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "run_cell", lambda *_, **__: pytest.fail("a cell was run"))
    status, _, error = ablate(capsys, file)
    assert status == 1 and f"1 data sets are missing: {file.parent / 'pairs.jsonl'}." in error


def test_rows_of_other_data_are_told_before_any_run(file, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "run_cell", lambda *_, **__: pytest.fail("a cell was run"))
    (file.parent / "pairs.jsonl").write_text('{"query": "q", "positive": "p"}\n')
    table = read_table(file)
    done = table.cells()[0]
    write_row(file.parent / "results", done, planted(done, 0.5))
    status, _, error = ablate(capsys, file)
    assert status == 1 and "rows of heads were made with other versions of pairs than those here" in error
    assert ablation.changed_sets(table, [planted(done, 0.5, data=ablation.data_of(done))]) == []
    assert ablation.changed_sets(table, [planted(done, 0.5, made_of="an older recipe")]) == []
    # a table without rows is run beside it
    other = file.with_name("other.toml")
    other.write_text(file.read_text())
    run = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # mteb
    monkeypatch.setattr(ablation, "load_tasks", run.extend)
    monkeypatch.setattr(ablation, "run_cell", lambda cell, *_, **__: planted(cell, 0.5))
    status, _, error = ablate(capsys, file, other)
    assert status == 0 and "left out: the rows of heads" in error, error
    assert {cell.table.name for cell in run} == {"other"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "2"], "--set and --scale make other cells: name a folder for their rows by -o"),
        (["--page", "x.md"], "--page and --picture are for a report: add --report"),
        (["--run", "c"], "no run 'c': there are 'a', 'b'"),
        (["--seed", "1"], "no seed 1: there are 0, 4"),
        (["heads.toml"], "two tables have one name: heads, heads"),
    ],
)
def test_wrong_words_of_the_command(file, capsys, monkeypatch, words, message):
    monkeypatch.chdir(file.parent)
    status, _, error = ablate(capsys, file, *words)
    assert status == 1 and message in error


def test_a_cell_is_named_by_what_makes_its_scores(file):
    table = read_table(file)
    names = [cell.made_of for cell in table.cells()]
    assert len({*names}) == 4
    for search, replacement in (
        ('title = "Heads"', "title = 'Others'"), ('name = "a"', 'name = "z"'),
        ('"b"\n', '"b"\npaper = [1]\n'),
        ("paper = [70.0, 60.0]", ""),
    ):  # fmt: skip
        text = TABLE.replace('against = "a"\n', "").replace("paper = [69.5]\n", "")
        file.write_text(text.replace(search, replacement))
        assert [cell.made_of for cell in read_table(file).cells()] == names, replacement
    file.write_text(TABLE)
    for search, replacement in (
        ("tasks =", "quick = true\ntasks ="), ("tasks =", "max_length = 99\ntasks ="), (', "r52"', ""),
    ):  # fmt: skip
        file.write_text(TABLE.replace(search, replacement))
        assert not {cell.made_of for cell in read_table(file).cells()} & {*names}, replacement
    file.write_text(TABLE)
    base = file.parent / "first.toml"
    for search, replacement, is_same in (
        ("[train]", "[log]\npicture = false\n[train]\ncheckpoint_every = 1", True),
        ("[train]", "[train]\nlr = 2e-5", True),  # the default
        ("[train]", "[train]\nlr = 3e-5", False),
        ('"pairs.jsonl"', '"elsewhere/pairs.jsonl"', True),
        ('"pairs.jsonl"', '"others.jsonl"', False),
    ):
        base.write_text(BASE.replace(search, replacement))
        assert ([cell.made_of for cell in read_table(file).cells()] == names) == is_same, replacement


@pytest.mark.parametrize("key", ["model.start", "train.teacher"])
def test_cells_that_differ_in_a_folder_alone_are_refused(file, capsys, monkeypatch, key):
    """One hash names both, so the second one would get the row of the first."""
    monkeypatch.setattr(ablation, "run_cell", lambda *_, **__: pytest.fail("a cell was run"))
    for name, place in (("c", "/a/e5/vectors"), ("d", "/a/minilm/vectors")):
        add_run(file, f'name = "{name}"\nset = {{ {key} = "{place}" }}')
    names = {cell.run.name: cell.made_of for cell in read_table(file).cells() if cell.seed == 0}
    assert names["c"] == names["d"], "the hash tells them apart, so this test proves nothing"
    message = (
        "heads: c, seed 0 and heads: d, seed 0 would share one row, because made_of has only the name of"
    )
    for words in ((), ("--run", "d"), ("--list",), ("--report",)):
        status, _, error = ablate(capsys, file, *words)
        assert status == 1 and f"{message} /a/e5/vectors and of /a/minilm/vectors" in error, error
    file.write_text(file.read_text().replace("minilm", "e5"))
    assert ablate(capsys, file, "--list")[0] == 0


def test_tables_share_the_cells_that_say_the_same():
    one, *others = (
        {cell.made_of for cell in TABLES[name].cells() if cell.run.name == run}
        for name, run in (("pooling", "latent"), ("stages", "two stages"), ("labels", "example-based"))
    )
    assert len(one) == 3 and all(one == other for other in others)
    ablation.check_places(cell for table in TABLES.values() for cell in table.cells())


def test_rows_stand_in_the_order_of_the_table_and_replace_older_ones(file, tmp_path):
    table = read_table(file)
    a0, b0, a4, _ = table.cells()
    for cell, squad in ((a4, 0.3), (b0, 0.2), (a0, 0.1), (a4, 0.4)):
        write_row(tmp_path / "results", cell, planted(cell, squad))
    rows = read_rows(tmp_path / "results")
    assert [(r["run"], r["seed"], r["scores"]["squad"]) for r in rows] == [
        ("a", 0, 0.1),
        ("a", 4, 0.4),
        ("b", 0, 0.2),
    ]
    assert row_of(a4, rows) == rows[1] and row_of(Cell(table, table.runs[1], 4), rows) is None
    other = replace(table, quick=True)
    assert row_of(other.cells()[0], rows) is None, "another recipe or task is another cell"
    write_row(tmp_path / "results", a0, planted(b0, 0.7, made_of=a0.made_of))
    assert row_of(a0, read_rows(tmp_path / "results"))["scores"]["squad"] == 0.7
    assert read_rows(tmp_path / "none") == []
    (tmp_path / "results" / "heads.jsonl").write_text('{"table": "heads"}\n')
    with pytest.raises(ValueError, match="heads.jsonl, line 1 is no row of a table: it has no 'data'"):
        read_rows(tmp_path / "results")


def test_the_list_has_each_cell_and_its_command(file, tmp_path, capsys):
    table = read_table(file)
    for cell in (table.cells()[0], table.cells()[3]):
        write_row(file.parent / "results", cell, planted(cell, 0.1))
    status, printed, _ = ablate(capsys, file, "--list")
    lines = printed.splitlines()
    assert status == 0 and lines[0] == "heads: a, seed 0: done" and lines[-1] == "2 of 4 cells are done"
    missing = [line.split(": missing: ") for line in lines if "missing" in line]
    assert [name for name, _ in missing] == ["heads: b, seed 0", "heads: a, seed 4"]
    for name, command in missing:
        words = shlex.split(command)
        assert words[:2] == ["nvembed-fast", "ablate"]
        (line, total) = ablate(capsys, *words[2:], "--list")[1].splitlines()
        assert line == f"{name}: missing: {command}" and total == "0 of 1 cells are done"
    other = ("--scale", "2", "--set", "train.lr=1e-3", "-o", str(tmp_path / "other"))
    line = ablate(capsys, file, *other, "--list")[1].splitlines()[0]
    assert line.endswith(f"--seed 0 --set train.lr=1e-3 --scale 2 -o {tmp_path / 'other'}")
    assert ablate(capsys, *shlex.split(line.split(": missing: ")[1])[2:], "--list")[1].splitlines()[0] == line


def test_the_sign_test_is_the_binomial_one():
    assert ablation_report.sign_test(0, 0) == 1 and ablation_report.sign_test(5, 5) == 1
    assert ablation_report.sign_test(9, 0) == ablation_report.sign_test(0, 9) == 2 / 2**9
    assert ablation_report.sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_a_report_has_means_spreads_and_signs(file):
    table = read_table(file)
    rows = rows_of(table, a=[(0.5, 0.8), (0.52, 0.8)], b=[(0.4, 0.8), (0.41, 0.79)])
    assert ablation_report.page([table], rows).splitlines() == [
        "### Heads",
        "",
        "`heads`, 4 of 4 cells are done. Tasks: squad, r52.",
        "",
        "| run | paper | ours | paper, retrieval | ours, retrieval | steps | million tokens | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| a | 70.00 | 65.50 (65.00-66.00) | 60.00 | 51.00 (50.00-52.00) | 16 | 1.25 | 2 of 2 |",
        "| b | 69.50 | 60.00 (60.00-60.00) |  | 40.50 (40.00-41.00) | 16 | 1.25 | 2 of 2 |",
        "",
        "| difference | paper | ours | tasks better, worse | sign test | |",
        "|---|--:|--:|--:|--:|---|",
        "| b against a | -0.50 | -5.50 (-6.00 to -5.00) | 0, 2 | 0.500 | as in the paper |",
    ]


@pytest.mark.parametrize(
    ("b", "paper", "verdict"),
    [
        ([(0.4, 0.8), (0.42, 0.8)], 69.5, "as in the paper"),
        ([(0.4, 0.8), (0.42, 0.8)], 70.5, "not as in the paper"),
        ([(0.4, 0.8), (0.42, 0.8)], 70.0, "beyond the spread"),
        ([(0.4, 0.8), (0.42, 0.8)], None, "beyond the spread"),
        ([(0.4, 0.8), (0.5, 0.8)], 69.5, "within the spread"),
        ([(0.4, 0.8), (0.6, 0.8)], 69.5, "within the spread"),
        ([(0.4, 0.8)], 69.5, "one seed"),
    ],
)
def test_a_difference_counts_beyond_its_spread(file, b, paper, verdict):
    text = "" if paper is None else f"paper = [{paper}]"
    file.write_text(TABLE.replace("paper = [69.5]", text))
    table = read_table(file)
    (found,) = ablation_report.differences(table, rows_of(table, a=[(0.5, 0.8), (0.52, 0.8)], b=b))
    assert found.verdict == verdict and len(found.by_seed) == len(b)


@pytest.mark.parametrize(
    ("a", "b", "better_and_worse", "verdict"),
    [
        ([(0.81, 0.3), (0.55, 0.4)], [(0.82, 0.4), (0.54, 0.3)], (0, 0), "within the spread"),
        ([(0.0, 0.8), (0.05, 0.8)], [(0.01, 0.8), (0.08, 0.8)], (1, 0), "within the spread"),
        ([(0.0, 0.8), (0.05, 0.8)], [(0.01001, 0.8), (0.08, 0.8)], (1, 0), "beyond the spread"),
        ([(0.0, 0.8), (0.05, 0.8)], [(0.0, 0.8), (0.05, 0.79999)], (0, 1), "within the spread"),
    ],
)
def test_a_tie_stays_one_whatever_the_rounding_of_its_difference(file, a, b, better_and_worse, verdict):
    file.write_text(TABLE.replace("paper = [69.5]", ""))
    table = read_table(file)
    (found,) = ablation_report.differences(table, rows_of(table, a=a, b=b))
    assert ((found.better, found.worse), found.verdict) == (better_and_worse, verdict)


def test_runs_without_rows_and_rows_of_other_data(file):
    table = read_table(file)
    assert ablation_report.differences(table, rows_of(table, a=[(0.5, 0.8)])) == []
    page = ablation_report.page([table], [])
    assert "0 of 4 cells are done" in page and "| b | 69.50 |  |  |  |  |  | 0 of 2 |" in page
    rows = rows_of(table, a=[(0.5, 0.8), (0.5, 0.8)])
    for kind, name in (("revisions", "squad"), ("data", "pairs")):
        other = rows[1] | {kind: {name: "s"}}
        with pytest.raises(ValueError, match=rf"rows of heads were made with different {name} \([rf], s\)"):
            ablation_report.page([table], [rows[0], other])


def test_a_report_fills_its_page_and_draws(file, tmp_path, capsys):
    table = read_table(file)
    for row in rows_of(table, a=[(0.5, 0.8), (0.52, 0.8)], b=[(0.4, 0.8), (0.41, 0.79)]):
        cell = next(c for c in table.cells() if c.made_of == row["made_of"])
        write_row(file.parent / "results", cell, row)
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text("# A page\n<!-- ablations:start -->\nold\n<!-- ablations:end -->\nend\n")
    words = ("--report", "--page", page, "--picture", picture)
    status, printed, error = ablate(capsys, file, *words)
    assert status == 0, error
    text = page.read_text()
    assert printed.strip() in text and "old" not in text
    assert text.startswith("# A page\n") and text.endswith("-->\nend\n")
    first = picture.read_bytes()
    assert len(first) > 5_000
    ablate(capsys, file, *words)
    assert page.read_text() == text and picture.read_bytes() == first
    page.write_text("no marks")
    status, _, error = ablate(capsys, file, *words)
    assert status == 1 and "must have <!-- ablations:start --> once" in error
    (file.parent / "results" / "heads.jsonl").unlink()
    status, _, error = ablate(capsys, file, "--report", "--picture", picture)
    assert status == 1 and "there is nothing to draw" in error
