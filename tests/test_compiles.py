"""Every kernel compiles for A100 and H100, fits their shared memory and got no worse. No GPU is needed.

`tools/resources.py` does the work, once, in a child process: TRITON_INTERPRET
is read once, at the first `import triton`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from nvembed_fast.kernels._common import use_descriptors
from tools import resources

ROOT = Path(__file__).resolve().parents[1]


ATTENTION = [
    *(
        f"flash_attention: {kernel} {dtype}"
        for kernel in ("forward", "dq", "dkv")
        for dtype in ("bf16", "fp16")
    ),
    *resources.ON_SM_90,
]


@pytest.fixture(scope="module")
def attention_on_sm_90(tmp_path_factory) -> dict[str, resources.Figures]:
    path = tmp_path_factory.mktemp("attention") / "rows.json"
    options = ["--capability", "90", "--rows", *ATTENTION, "--json", str(path)]
    command = [sys.executable, "-m", "tools.resources", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), run.stderr[-4000:]
    return resources.labelled(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, resources.Figures], subprocess.CompletedProcess]:
    path = tmp_path_factory.mktemp("resources") / "rows.json"
    command = [sys.executable, "-m", "tools.resources", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert path.exists(), run.stderr[-4000:]
    return resources.labelled(json.loads(path.read_text())), run


# make check runs the same command and asserts the same
@pytest.mark.long
def test_nothing_got_worse(measured):
    _, run = measured
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if "WORSE" in line)
    snapshot = resources.SNAPSHOTS / f"triton-{triton.__version__}.json"
    assert ("compared with" in run.stdout) == snapshot.exists()


@pytest.mark.long
def test_fits_shared_memory(measured):
    rows, _ = measured
    assert rows and not resources.beyond_limits(rows)


# the largest tiles
LARGEST = [
    "flash_attention: forward bf16",
    "flash_attention: forward width 256 bf16",
    "latent_attention: direct 256 bf16",
    "absorbed_latent_attention: weights 512 bf16",
    "latent_attention: direct 256 dq bf16",
    "latent_attention: direct 256 dkv bf16",
    "absorbed_latent_attention: weights 512 backward bf16",
    "flash_attention: dq bf16",
    "flash_attention: dkv bf16",
    "flash_attention: dq largest group bf16",
    "flash_attention: dkv largest group bf16",
    "flash_attention: dq largest group fp32",
    "flash_attention: dkv largest group fp32",
]


@pytest.mark.slow
def test_the_largest_tiles_fit_gpus_with_99_kb(tmp_path):
    path = tmp_path / "rows.json"
    options = ["--capability", "86", "120", "--rows", *LARGEST, "--json", str(path)]
    command = [sys.executable, "-m", "tools.resources", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), run.stderr[-4000:]
    rows = resources.labelled(json.loads(path.read_text()))
    assert set(rows) == {f"{name} sm_{capability}" for name in LARGEST for capability in (86, 120)}
    assert {name: row["shared"] for name, row in rows.items() if row["shared"] > 101376} == {}
    assert run.returncode == 0, run.stdout[-4000:]


def test_every_kernel_is_compiled():
    compiled = {resources.launch_of(name, 90).kernel.__name__ for name in resources.examples()}
    kernels = {
        kernel: path.name
        for path in (ROOT / "kernels").glob("*.py")
        for kernel in re.findall(r"@triton\.jit(?:\(.*\))?\ndef (_\w+_kernel)\(", path.read_text())
    }
    assert kernels, "no kernel found, so this test would prove nothing"
    for kernel, file in kernels.items():
        assert kernel in compiled, f"tools/resources.py has no example that launches {kernel} of {file}"


def test_no_kernel_is_compiled_anew_for_another_number_of_tokens():
    """Triton compiles again when an integer turns out to be 1 or a multiple of 16, unless told not to."""
    per_batch = {"num_tokens", "num_partials", "num_tiles", "stride_ln", "stride_en"}
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        pattern = r"@triton\.jit(\([^\n]*\))?\ndef (_\w+_kernel)\((.*?)\):  # fmt: skip"
        for options, kernel, arguments in re.findall(pattern, path.read_text(), re.S):
            names = per_batch & set(re.findall(r"\w+", arguments))
            assert names == set(re.findall(r'"(\w+)"', options)), f"{path.name}: {kernel}"
            found |= names
    assert found == per_batch, "an argument was renamed, so this test would prove less than it says"


def test_fp32_adds_the_product_of_a_tile_as_a_whole():
    """In dK and dV, whose sums run over all tokens. Else a product goes on from the sum, term by term."""
    code = """
import triton
from tools import resources
launch = resources.launch_of("flash_attention: dkv smollm2 fp32", 80)
triton.runtime.driver.set_active(resources._Driver(80))
print(launch.kernel.warmup(grid=None, **launch.arguments).asm["ttir"])
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    begins = re.findall(r"= tt\.dot [^,]+, [^,]+, %(\w+)", run.stdout)
    assert len(begins) == 4, run.stderr[-4000:]
    assert all(begin.startswith("cst") for begin in begins), begins


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION, ids=lambda name: name.partition(": ")[2].replace(" ", "-"))
def test_attention_uses_the_tensor_units_of_sm_90(attention_on_sm_90, name):
    row = attention_on_sm_90[f"{name} sm_90"]
    assert row["wgmma"] > 0 and row["tma"] > 0
    assert row["stack"] == row["spills"] == 0 and row["registers"] <= 255
    assert row["unbarred"] == row["touched"] == 0
    assert row["overlap"] > 0


# dq of 256 columns spills, and after dP it changes a layout through memory that dP does not read
SCRATCH_AFTER_A_WAIT = {f"flash_attention: dq {title} bf16 sm_90" for title in ("width 256", "largest group")}


@pytest.mark.parametrize("path", sorted(resources.SNAPSHOTS.glob("*.json")), ids=lambda p: p.stem)
def test_the_order_of_instructions_is_safe_where_loads_are_descriptors(path):
    """make check compares with the snapshot, so what holds there holds for the kernels."""
    rows = {name: row for name, row in json.loads(path.read_text()).items() if row["wgmma"] and row["tma"]}
    assert len(rows) > 20, "hardly a kernel with wgmma, so this test would prove little"
    assert {name for name, row in rows.items() if row["touched"] or row["mixed"]} == set()
    assert {name for name, row in rows.items() if row["unbarred"]} <= SCRATCH_AFTER_A_WAIT


@pytest.mark.parametrize("path", sorted(resources.SNAPSHOTS.glob("*.json")), ids=lambda p: p.stem)
def test_sm_100_has_its_tensor_units(path):
    snapshot = json.loads(path.read_text())
    for name in resources.ON_SM_100:
        row = snapshot[f"{name} sm_100"]
        assert row["tcgen05"] and row["tma"], name
        assert not row["spills"] or not name.startswith("flash_attention"), name


@pytest.mark.parametrize("path", sorted(resources.SNAPSHOTS.glob("*.json")), ids=lambda p: p.stem)
def test_what_the_tuner_tries_on_sm_90_keeps_its_exponentials_beside_the_products(path):
    snapshot = json.loads(path.read_text())
    (name,) = resources.ON_SM_90
    assert [n for n in snapshot if n.startswith(f"{name} ")] == [f"{name} sm_90"]
    row = snapshot[f"{name} sm_90"]
    assert (row["overlap"] > 0) == (path.stem != "triton-3.9.0")  # the tuner times it there all the same
    assert row["stack"] == row["spills"] == row["unbarred"] == row["touched"] == 0


@pytest.mark.parametrize("path", sorted(resources.SNAPSHOTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_part_with_descriptors_is_in_the_snapshots(path):
    """A part without rows has code that nobody has read."""
    rows = json.loads(path.read_text())
    loads = {name.rsplit(" sm_", 1)[0] for name in rows if rows[name]["tma"]}
    stems = {name.split(":")[0] for name in loads}
    assert stems == {"absorbed_latent_attention", "flash_attention", "latent_attention"}
    parts = [part for part in range(80, 200) if use_descriptors(part)]
    assert parts, "no part, so this test would prove nothing"
    for part in parts:
        there = [name for name in loads if rows.get(f"{name} sm_{part}", {}).get("tma")]
        assert {name.split(":")[0] for name in there} == stems, part
        # forward and both gradients
        assert {f"flash_attention: {kernel} bf16" for kernel in ("forward", "dq", "dkv")} <= set(there), part
        assert part in resources.SHARED_LIMIT


def test_all_snapshots_are_kept():
    names = {path.stem.removeprefix("triton-") for path in resources.SNAPSHOTS.glob("*.json")}
    assert names == {"3.6.0", "3.7.1", "3.9.0"}


GOOD = {
    "registers": 100,
    "stack": 0,
    "spills": 0,
    "shared": 1024,
    "wgmma": 8,
    "mma": 0,
    "tcgen05": 0,
    "tma": 2,
    "load_bytes": 16,
    "unbarred": 0,
    "touched": 0,
    "overlap": 4,
    "mixed": 0,
}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("registers", 101),
        ("stack", 8),
        ("spills", 1),
        ("shared", 1025),
        ("wgmma", 0),
        ("tma", 0),
        ("load_bytes", 8),
        ("unbarred", 1),
        ("touched", 1),
        ("overlap", 0),
        ("mixed", 1),
    ],
)
def test_a_worse_row_is_flagged(column, value):
    (problem,) = resources.worsened({"a: b sm_90": GOOD | {column: value}}, {"a: b sm_90": GOOD})
    assert problem == f"a: b sm_90: {column} {GOOD[column]} -> {value}"


def test_an_equal_or_better_row_is_not_flagged():
    better = {"registers": 90, "shared": 512, "wgmma": 4, "mma": 4, "load_bytes": 32, "overlap": 2}
    for row in (GOOD, GOOD | better):
        assert not resources.worsened({"a: b sm_90": row}, {"a: b sm_90": GOOD})


def test_a_row_on_one_side_only_is_flagged():
    assert resources.worsened({"a: b sm_90": GOOD}, {}) == ["a: b sm_90: not in the snapshot"]
    assert "no kernel has it" in resources.worsened({}, {"a: b sm_90": GOOD})[0]


def test_a_row_beyond_shared_memory_is_flagged():
    rows = {"a: b sm_80": GOOD | {"shared": 200 * 1024}, "a: b sm_90": GOOD | {"shared": 200 * 1024}}
    (problem,) = resources.beyond_limits(rows)
    assert problem.startswith("a: b sm_80: 204800 bytes")


def test_mixed_operands_are_flagged():
    """Under any Triton, also one without a snapshot."""
    (problem,) = resources.beyond_limits({"a: b sm_90": GOOD | {"mixed": 4}})
    assert problem == "a: b sm_90: 4 wgmma of mixed operands, so its results may be wrong"


def test_a_65th_register_is_flagged_where_64_are_the_limit():
    """Under any Triton, also one without a snapshot."""
    names = ("mean_pool: mean_pool_geglu fp32", "rms_norm: backward bf16", "flash_attention: dq bf16")
    wider = "mean_pool: mean_pool_geglu backward fp32"
    rows = {f"{name} sm_90": GOOD | {"registers": 65} for name in (*names, wider)}
    assert resources.beyond_limits(rows) == [
        f"{name} sm_90: 65 registers, the limit is 64" for name in names[:2]
    ]
    assert not resources.beyond_limits({f"{names[1]} sm_90": GOOD | {"registers": 64}})
