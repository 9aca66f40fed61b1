"""The page and the speed tables, from made-up figures."""

import re
import shutil
import subprocess
import sys

import pytest

from bench.measure.results import Figure, Machine, ResultsFile
from bench.report import pictures
from bench.report.__main__ import main
from bench.report.comparisons import load, not_measured_gpus
from bench.report.page import _headlines, page
from bench.report.tables import END, START, known_to_git, speed_tables

H200 = Machine("NVIDIA H200", "570.1", "2.13.0", "3.7.1", "5.23.0", "c0ffee", "bench")
CPU = Machine("CPU Some x2", "none", "2.13.0", "3.7.1", "5.23.0", "c0ffee", "bench")
ATTENTION = "nvembed-32x512 forward"
SWEEP = ((2048, "nvembed_fast", 4.0), (128, "nvembed_fast", 2.0), (2048, "torch", 8.0))


def times(case, impl, ms, suite="flash_attention", spread=0.1, share=None):
    low_median_high = zip(("time_p20", "time_p50", "time_p80"), (ms - spread, ms, ms + spread), strict=True)
    rows = [Figure(suite, case, impl, metric, value, "ms") for metric, value in low_median_high]
    return [*rows, Figure(suite, case, impl, "rate", 1000 / ms, "TFLOP/s", share)]


def skipped(case, impl, reason, suite="flash_attention"):
    return [Figure(suite, case, impl, "skipped", None, reason)]


def workload(case, **rates):
    rows = []
    for impl, rate in rates.items():
        rows.append(Figure("encode", case, impl, "texts_rate", rate, "texts/s"))
        rows.append(Figure("encode", case, impl, "tokens_rate", 100 * rate, "tokens/s", rate / 1000))
        # of one batch, and every baseline has its own batch size
        rows.append(Figure("encode", case, impl, "time_p50", rate, "ms"))
    return rows


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="nvidia-h200-2026-01-02.csv", machine=H200, commit=None):
        facts = Machine(**{**vars(machine), "commit": commit or machine.commit})
        path = tmp_path / name
        ResultsFile(path, facts).add([row for part in rows for row in part])
        return path

    return write


def text_of(html):
    """What a reader sees, without the pictures."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S)))


def page_of(*paths):
    return page(load(paths))


def headlines_of(path):
    (comparisons,) = load([path]).values()
    return dict(_headlines(comparisons))


@pytest.fixture
def whole(write):
    """Every kind of row."""
    profile = [
        Figure("profile", "all 512", "nvembed_fast", f"time:{name}", ms, "ms", share)
        for name, ms, share in (
            ("products", 30.0, 0.9),
            ("attention", 6.0, 0.5),
            ("host work", 4.0, None),
            ("other", 0.0, None),
        )
    ]
    profile.append(Figure("profile", "all 512", "nvembed_fast", "time_p50", 38.0, "ms"))
    return write(
        times(ATTENTION, "nvembed_fast", 2.0, share=0.61),
        times(ATTENTION, "SDPA cuDNN", 3.0, share=0.4),
        times(ATTENTION, "torch", 16.0),
        skipped(ATTENTION, "flash-attn 3", "pip install <flash-attn-3>"),
        *(times(f"sweep-{n}x{2**15 // n} forward", "nvembed_fast", 2.0) for n in (128, 1024)),
        times("sweep-128x256 forward", "torch", 9.0),
        workload("skewed", nvembed_fast=240.0, original=60.0, sorted=160.0),
        profile,
        [Figure("limits", "copy", "torch", "rate", 4200.0, "GB/s")],
    )


def test_the_page_says_how_much_faster_and_what_was_skipped(whole, tmp_path, capsys):
    main([str(whole), "-o", str(tmp_path / "page")])
    html = (tmp_path / "page/index.html").read_text()
    text = text_of(html)
    assert (
        "Attention, forward : 1.50 times as fast as the best baseline (SDPA cuDNN); 61 % of the limit."
        in text
    )
    line = "1.50 times as fast as the best baseline (sorted); 4.00 times as fast as the original"
    assert f"Whole encoder, skewed : {line}; 24 % of the limit." in text
    assert "<li>flash-attn 3: pip install &lt;flash-attn-3&gt;</li>" in html
    assert "<td>pip install &lt;flash-attn-3&gt;</td>" in html and "<flash-attn-3>" not in html
    assert "RMSNorm : not measured." in text
    for fact in ("NVIDIA H200", "2026-01-02", "570.1", "2.13.0", "3.7.1", "5.23.0", "c0ffee", "4,200 GB/s"):
        assert fact in text, fact
    assert "A100 and H100: compiled for, not measured." in text
    # shares, waterfall, encoder, attention, its sweep
    assert html.count("data:image/png;base64,") == 5 and "http" not in html
    assert "index.html" in capsys.readouterr().out


def test_no_value_is_no_number_and_one_that_is_not_finite_makes_no_factor(write):
    rows = [Figure("flash_attention", ATTENTION, "torch", "time_p50", float("nan"), "ms", float("nan"))]
    rows.append(Figure("flash_attention", ATTENTION, "torch", "peak_memory", float("inf"), "MiB"))
    path = write(times(ATTENTION, "nvembed_fast", 2.0), rows)
    text = text_of(page_of(path))
    assert "not finite" in text
    assert not re.search(r"\b(nan|inf|none)\b", text.replace("570.1", ""), re.I)
    assert headlines_of(path)["Attention, forward"].startswith("no baseline was measured")


def test_a_baseline_that_was_skipped_is_not_the_best(write):
    wrong = skipped(ATTENTION, "torch.compile", "parity is red: 0.3")
    path = write(times(ATTENTION, "nvembed_fast", 2.0), times(ATTENTION, "SDPA flash", 2.5), wrong)
    assert "1.25 times as fast as the best baseline (SDPA flash)" in headlines_of(path)["Attention, forward"]
    assert "parity is red: 0.3" in text_of(page_of(path))
    assert "| SDPA flash | 2.5 ms | 1.25 |" in speed_tables(load([path]))


def test_a_form_of_our_own_is_no_baseline(write):
    path = write(times(ATTENTION, "nvembed_fast", 2.0), times(ATTENTION, "nvembed_fast direct", 1.0))
    assert "no baseline was measured" in headlines_of(path)["Attention, forward"]


def test_slower_is_called_slower(write):
    rows = [times(f"nvembed-{n} forward", "nvembed_fast", 2.0) for n in "ab"]
    rows += [times("nvembed-a forward", "SDPA cuDNN", 1.0), times("nvembed-b forward", "torch", 3.0)]
    line = headlines_of(write(*rows))["Attention, forward"]
    assert (
        "0.50 to 1.50 times as fast as the best baseline (SDPA cuDNN, torch), slower in 1 of 2 cases" in line
    )


@pytest.mark.parametrize(
    ("rows", "line", "cell"),
    [
        (times(ATTENTION, "torch", 2.0), "not measured", "not measured"),
        (
            times(ATTENTION, "torch", 2.0) + skipped(ATTENTION, "nvembed_fast", "out of memory"),
            "out of memory",
            "skipped: out of memory",
        ),
    ],
    ids=["absent", "skipped"],
)
def test_where_we_have_no_time_there_is_no_factor(write, rows, line, cell):
    path = write(rows)
    assert headlines_of(path)["Attention, forward"] == line
    row = f"| Attention: {ATTENTION} | {cell} | torch | 2 ms | not measured |  | not measured |"
    assert row in speed_tables(load([path]))
    assert "times as fast" not in text_of(page_of(path))


def test_the_newest_comparison_counts_as_a_whole(write):
    ours = times(ATTENTION, "nvembed_fast", 2.0)
    # the newer run stands in the file that is named first, and took another baseline
    new = write(times(ATTENTION, "nvembed_fast", 1.0), times(ATTENTION, "torch", 3.0), commit="bbb")
    other_case = times("nvembed-4x4096 forward", "nvembed_fast", 5.0)
    old = write(ours, times(ATTENTION, "SDPA", 0.5), other_case, name="h200-2025-12-31.csv", commit="aaa")
    text = text_of(page_of(new, old))
    assert "3.00 times as fast as the best baseline (torch)" in text and "SDPA" not in text
    assert "bbb" in text and "aaa" in text and "2025-12-31, 2026-01-02" in text


def test_a_resumed_run_of_another_commit_replaces_the_case_in_the_same_file(write):
    write(times(ATTENTION, "nvembed_fast", 2.0), times(ATTENTION, "torch", 1.0), commit="aaa")
    path = write(
        times(ATTENTION, "nvembed_fast", 2.0), skipped(ATTENTION, "torch", "parity is red"), commit="bbb"
    )
    assert "no baseline was measured" in headlines_of(path)["Attention, forward"]


def test_waterfall_bars_follow_each_other_with_their_limits_inside(whole):
    (comparisons,) = load([whole]).values()
    (ax,) = pictures.draw_waterfall(comparisons).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 30), (0, 27), (30, 6), (30, 3), (36, 4), (0, 40)]
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "sum"
    assert ax.get_title("left") == "all 512 (38 ms without the profiler)"
    assert "30 ms, 75 %; limit 27 ms" in [text.get_text() for text in ax.texts]


def test_baselines_bars_are_the_rates_with_the_spread_of_the_times(write):
    rows = workload("skewed", nvembed_fast=200.0, original=50.0)
    rows += [
        Figure("encode", "skewed", "nvembed_fast", m, v, "ms")
        for m, v in (("time_p20", 190.0), ("time_p80", 250.0))
    ]
    (comparisons,) = load([write(rows)]).values()
    (ax,) = pictures.draw_baselines(comparisons).axes
    assert [bar.get_width() for bar in ax.patches] == [200, 50]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["nvembed_fast", "original"]
    assert pictures._ends(comparisons[0], "nvembed_fast") == (200 * 200 / 250, 200 * 200 / 190)


@pytest.mark.parametrize("has_rates", [True, False])
def test_sweeps_show_rates_or_where_one_is_missing_times(write, has_rates):
    rows = [times(f"sweep-{n}x{2**15 // n} forward", impl, ms) for n, impl, ms in SWEEP]
    if not has_rates:
        rows[-1] = rows[-1][:-1]
    (comparisons,) = load([write(*rows)]).values()
    (ax,) = pictures.draw_sweeps(comparisons).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    ours = [500, 250] if has_rates else [2, 4]
    assert lines["nvembed_fast"] == ([128, 2048], ours)
    assert lines["torch"] == ([2048], [125 if has_rates else 8])
    assert ax.get_ylabel().startswith("TFLOP/s, higher" if has_rates else "ms, lower")


def test_what_else_is_swept_has_a_panel_of_its_own(write):
    sweeps = [
        times(f"sweep-{n} forward", "nvembed_fast", 2.0) for n in ("128x256", "64-latents", "512-latents")
    ]
    sweeps += [times("direct sweep-64-latents forward", "nvembed_fast", 2.0)]
    (comparisons,) = load([write(*sweeps)]).values()
    panels = [
        (ax.get_xlabel(), ax.get_title("left"), list(ax.lines[0].get_xdata()))
        for ax in pictures.draw_sweeps(comparisons).axes
    ]
    assert panels == [
        ("tokens in a text", "forward", [128]),
        ("latents", "forward", [64, 512]),
        ("latents", "direct forward", [64]),
    ]


def test_nothing_is_drawn_of_nothing(write):
    (comparisons,) = load([write(skipped(ATTENTION, "nvembed_fast", "out of memory"))]).values()
    for draw in (
        pictures.draw_baselines,
        pictures.draw_sweeps,
        pictures.draw_shares,
        pictures.draw_waterfall,
    ):
        assert draw(comparisons) is None, draw.__name__


def test_a_cpu_is_called_one(write):
    rows = workload("skewed", nvembed_fast=12.0, original=6.0) + times(ATTENTION, "nvembed_fast", 2.0)
    machines = load([write(rows, name="cpu-2026-01-02.csv", machine=CPU)])
    text = text_of(page(machines))
    assert "CPU (PyTorch path): Some x2" in text and "nothing below is the speed of a GPU kernel" in text
    tables = speed_tables(machines)
    assert (
        "**CPU (PyTorch path): Some x2.** Not the speed of a GPU kernel, and a model in the shape of SmolLM2"
        in tables
    )
    assert "| Whole encoder: skewed | 12 texts/s | original | 6 texts/s | 2.00 | 2.00 | 1 % |" in tables
    assert "A100, H100 and H200: compiled for, not measured." in tables


def test_gpus_stand_before_cpus(write):
    cpu = write(workload("skewed", nvembed_fast=12.0), name="cpu-2026-01-02.csv", machine=CPU)
    assert list(load([cpu, write(workload("skewed", nvembed_fast=12.0))])) == [H200.gpu, CPU.gpu]


def test_gpus_and_cpus_may_have_tables_apart(write):
    cpu = write(workload("skewed", nvembed_fast=12.0), name="cpu-2026-01-02.csv", machine=CPU)
    assert "CPU (PyTorch path)" in speed_tables(load([cpu]), of_gpus=True)
    both = load([cpu, write(workload("skewed", nvembed_fast=12.0))])
    for of_gpus, shown in ((True, [False, True]), (False, [True, False]), (None, [True, True])):
        tables = speed_tables(both, of_gpus)
        assert [f"**{name}" in tables for name in ("CPU", "NVIDIA")] == shown
        assert not_measured_gpus(list(both)) in tables


def test_one_query_by_graphs_has_a_row_of_its_own(write):
    rates = {"nvembed_fast": 40.0, "nvembed_fast, CUDA graphs": 150.0, "stock": 50.0, "original": 30.0}
    tables = speed_tables(load([write(workload("one query", **rates))]))
    assert "| Whole encoder: one query | 40 texts/s | stock | 50 texts/s | 0.80 | 1.33 |" in tables
    assert (
        "| Whole encoder: one query, CUDA graphs | 150 texts/s | stock | 50 texts/s | 3.00 | 5.00 |" in tables
    )


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{START}\nold\n{END}\n\n## Next\n")
    monkeypatch.setattr("bench.report.tables.PAGES", (tmp_path / "missing.md", path))
    return path


def test_readme_tables_are_rewritten_and_checked(write, readme, whole):
    with pytest.raises(SystemExit, match="--readme"):
        main(["--check", str(whole)])
    assert "old" in readme.read_text(), "--check writes nothing"
    main(["--readme", str(whole)])
    written = readme.read_text()
    assert written.startswith("# Title\n\n<!-- bench:start -->\n")
    assert written.endswith("<!-- bench:end -->\n\n## Next\n") and "old" not in written
    assert f"| Attention: {ATTENTION} | 2 ms | SDPA cuDNN | 3 ms | 1.50 |  | 61 % |" in written
    assert "| Whole encoder: skewed | 240 texts/s | sorted | 160 texts/s | 1.50 | 4.00 | 24 % |" in written
    assert (
        "**NVIDIA H200.** A model in the shape of NV-Embed in bf16: 2026-01-02, commit c0ffee, torch 2.13.0"
        in written
    )
    assert "sweep" not in written
    main(["--check", str(whole)])
    main(["--readme", str(whole)])
    assert readme.read_text() == written
    write(times("nvembed-4x4096 forward", "nvembed_fast", 5.0))
    with pytest.raises(SystemExit, match="--readme"):
        main(["--check", str(whole)])


@pytest.mark.parametrize("text", ["# Title\n", START, f"{END}{START}", 2 * (START + END)])
def test_readme_without_its_markers_is_an_error(readme, whole, text):
    readme.write_text(text)
    with pytest.raises(SystemExit, match="README.md needs the line <!-- bench:start -->"):
        main(["--readme", str(whole)])
    assert readme.read_text() == text


def test_without_results_readme_says_that_nothing_was_measured():
    assert "A100, H100 and H200: compiled for, not measured." in speed_tables({})
    assert "|" not in speed_tables({})


def test_a_gpu_is_known_by_its_whole_name():
    assert not_measured_gpus(["NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB"]).startswith("H100 and H200:")
    assert not_measured_gpus(["A100", "H100", "H200"]) == ""


def test_readme_holds_the_tables_of_the_committed_results():
    main(["--check"])


def test_readme_is_made_from_what_git_knows(write):
    if shutil.which("git") is None:
        pytest.skip("no git")
    first = write(workload("skewed", nvembed_fast=1.0), name="a-2026-01-01.csv")
    second = write(workload("skewed", nvembed_fast=1.0), name="b-2026-01-01.csv")
    folder = first.parent
    assert known_to_git(folder) == [first, second], "no repository: all"
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "add", first.name], check=True)
    assert known_to_git(folder) == [first]


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(SystemExit, match="missing.csv"):
        main([str(tmp_path / "missing.csv")])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv is no results file"):
        main([str(tmp_path / "other.csv")])
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(SystemExit, match="no figures in .*empty.csv: run `make bench` first"):
        main([str(tmp_path / "empty.csv")])


def test_without_matplotlib_there_is_no_page_and_a_way_out(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"pip install -e '.\[bench\]'"):
        main([str(whole), "-o", str(tmp_path / "page")])
    assert not (tmp_path / "page").exists()


def test_the_roofline_has_its_roof_and_its_points(write):
    limits = [Figure("limits", "copy", "torch", "rate", 4000.0, "GB/s")]
    ours = times(ATTENTION, "nvembed_fast", 2.0) + [
        Figure("flash_attention", ATTENTION, "nvembed_fast", "limit", 800.0, "TFLOP/s"),
        Figure("flash_attention", ATTENTION, "nvembed_fast", "intensity", 300.0, "FLOP/byte"),
    ]
    (comparisons,) = load([write(limits, ours, times(ATTENTION, "torch", 4.0))]).values()
    (ax,) = pictures.draw_roofline(comparisons).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["the roof"] == [[100.0, 400.0], [200.0, 800.0], [800.0, 800.0]]
    assert lines["nvembed_fast"] == [[300.0, 500.0]] and lines["best baseline"] == [[300.0, 250.0]]
    without, *_ = load([write(ours, name="b.csv")]).values()
    assert pictures.draw_roofline(without) is None


def test_a_roofline_has_the_cases_of_its_roof_alone(write):
    """masked_lse computes in fp32. Its limit is another roof."""
    copies = [Figure("limits", "copy", "torch", "rate", 4000.0, "GB/s")]
    cases = {"bf16": (800.0, 300.0), "bf16 again": (790.0, 200.0), "fp32": (50.0, 100.0)}
    rows = [
        [
            *times(case, "nvembed_fast", 2.0),
            Figure("flash_attention", case, "nvembed_fast", "limit", limit, "TFLOP/s"),
            Figure("flash_attention", case, "nvembed_fast", "intensity", intensity, "FLOP/byte"),
        ]
        for case, (limit, intensity) in cases.items()
    ]
    (comparisons,) = load([write(copies, *rows)]).values()
    (ax,) = pictures.draw_roofline(comparisons).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert [intensity for intensity, _ in lines["nvembed_fast"]] == [300.0, 200.0]


def test_a_comparison_that_was_measured_again_counts_as_a_whole(write):
    first = times(ATTENTION, "nvembed_fast", 2.0) + times(ATTENTION, "torch", 4.0)
    again = times(ATTENTION, "nvembed_fast", 1.0) + skipped(ATTENTION, "torch", "out of memory")
    [[comparison]] = load([write(first, again)]).values()
    assert comparison.figure("nvembed_fast").value == 1.0
    assert comparison.figure("torch") is None and comparison.skipped("torch") == "out of memory"


@pytest.mark.parametrize("is_timed_first", [False, True])
def test_an_implementation_that_is_skipped_in_one_of_two_runs_belongs_to_its_own(is_timed_first, write):
    """Behind the first row of the second run no figure of the first one counts, whatever that row is."""
    timed, none = times(ATTENTION, "original", 8.0), skipped(ATTENTION, "original", "no memory")
    first, again = (timed, none) if is_timed_first else (none, timed)
    others = times(ATTENTION, "torch", 4.0) + times(ATTENTION, "nvembed_fast", 2.0)
    [[comparison]] = load([write(first, others, again, others)]).values()
    assert list(comparison.impls) == ["original", "torch", "nvembed_fast"]
    assert comparison.skipped("original") == ("no memory" if is_timed_first else None)
    assert comparison.factor("original") == (None if is_timed_first else 4.0)


def test_a_file_without_a_date_is_said_to_count_as_the_oldest(write, capsys):
    undated = write(times(ATTENTION, "nvembed_fast", 1.0), name="results.csv", commit="bbb")
    load([undated])
    assert capsys.readouterr().err == ""
    dated = write(times(ATTENTION, "nvembed_fast", 2.0))
    [[comparison]] = load([undated, dated]).values()
    assert comparison.figure("nvembed_fast").value == 2.0
    assert capsys.readouterr().err == f"{undated}: older than every file whose name ends in YYYY-MM-DD.csv\n"
