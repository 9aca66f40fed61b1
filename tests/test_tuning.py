"""Tuned entries change the speed of a kernel and nothing else. The search keeps what beats the spread."""

import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gradients import bound, spy_on_launches
from triton.runtime.jit import KernelInterface

from bench.measure import results
from bench.measure.timing import Times
from nvembed_fast.kernels import (
    _common,
    absorbed_latent_attention,
    flash_attention,
    latent_attention,
    masked_lse,
    mean_pool,
    reference,
    rms_norm,
    tuned,
)
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    LATENT_CASES,
    NORM_CASES,
    POOL_CASES,
    SCORE_CASES,
    AttentionCase,
    RowCase,
    as_tuple,
    assert_gradient_parity,
    assert_parity,
    attention_gradients,
)
from tools import resources, tuning

HAS_GPU = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[1]
NAME = "flash_attention.fwd.sm_80.width32-group2-bits16-longest64"
PROVENANCE = 'gpu = "a GPU"\ndate = 2000-01-01\ncommit = "abc"\ntime_ms = 1.0\nrule_ms = 2.0\n'
CONSTANTS = "BLOCK_T = 16\nBLOCK_N = 16\nUSE_TMA = false\nAHEAD = false\nnum_warps = 4\nnum_stages = 1\n"
CONSTANTS += "PERSISTENT = false\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tuned.toml"
    path.write_text(text)
    return path


def case(cases, name):
    return next(c for c in cases if c.name == name)


# the file


def test_the_shipped_file_is_sound():
    for kernel, _, _ in tuned.read(tuned.FILE):
        assert kernel in tuned.KERNELS
    assert all(isinstance(v, int) for v in tuned.ARCHITECTURES.values())


def test_an_entry_is_read(tmp_path):
    entries = tuned.read(written(tmp_path, f"[{NAME}]\n{CONSTANTS}{PROVENANCE}"))
    constants = {"BLOCK_T": 16, "BLOCK_N": 16, "USE_TMA": False, "AHEAD": False}
    constants |= {"num_warps": 4, "num_stages": 1, "PERSISTENT": False}
    assert entries == {("flash_attention.fwd", 80, "width32-group2-bits16-longest64"): constants}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flash_attention.fwd", "flash_attention.bwd", "no kernel flash_attention.bwd"),
        ("sm_80", "sm_81", "no architecture sm_81"),
        ("group2-", "", "class must be widthN-groupN-bitsN-longestN"),
        ("width32", "width33", "with powers of two, got width33"),
        ("BLOCK_N = 16", "BLOCK_M = 16", "unknown: BLOCK_M"),
        ("BLOCK_N = 16\n", "", "missing: BLOCK_N"),
        ("BLOCK_N = 16", "BLOCK_N = 24", "BLOCK_N must be a power of two, got 24"),
        ("num_warps = 4", "num_warps = true", "num_warps must be a power of two"),
        ("num_stages = 1", "num_stages = 0", "num_stages must be a positive integer"),
        ("USE_TMA = false", "USE_TMA = 0", "USE_TMA must be true or false"),
        ("AHEAD = false", "AHEAD = 1", "AHEAD must be true or false"),
        ("AHEAD = false", "AHEAD = true", "AHEAD needs USE_TMA"),
        ("PERSISTENT = false", "PERSISTENT = true", "PERSISTENT needs AHEAD"),
        ("date = 2000-01-01", 'date = "today"', "date must be a date"),
        ('commit = "abc"\n', "", "missing: commit"),
    ],
)
def test_an_entry_that_cannot_be_is_an_error_that_names_it(tmp_path, old, new, message):
    text = f"[{NAME}]\n{CONSTANTS}{PROVENANCE}"
    assert old in text, "nothing is changed, so this test would prove nothing"
    changed = text.replace(old, new)
    name = changed.partition("]")[0].removeprefix("[")
    with pytest.raises(ValueError) as error:
        tuned.read(written(tmp_path, changed))
    assert f"tuned.toml, [{name}]: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("text", ["x = 1\n", "[flash_attention.fwd]\nBLOCK_T = 16\n"])
def test_a_value_outside_an_entry_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match="is outside"):
        tuned.read(written(tmp_path, text))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """`shipped(name, constants)` puts an entry in the place of those of the package. `.reads` of its file."""

    def ship(name: str, constants: str) -> None:
        path = written(tmp_path, f"[{name}]\n{constants}{PROVENANCE}")
        monkeypatch.setattr(tuned, "read", lambda _, read=tuned.read: ship.reads.append(1) or read(path))
        forget()

    def forget() -> None:
        tuned._shipped.cache_clear()
        flash_attention._launch_config.cache_clear()

    ship.reads = []
    yield ship
    monkeypatch.undo()
    forget()


def test_the_file_is_read_at_the_first_launch_and_only_then(shipped):
    target = {"capability": 80, "dtype": torch.float16, "aligned": False}
    with tuned.use({}):
        rule = flash_attention._launch_config(32, 2, 64, **target)
    shipped(NAME, CONSTANTS.replace("BLOCK_N = 16", f"BLOCK_N = {rule['BLOCK_N']}"))
    for _ in range(3):
        config = flash_attention._launch_config(32, 2, 64, **target)
    assert len(shipped.reads) == 1 and config["BLOCK_T"] == 16 != rule["BLOCK_T"]


def test_an_entry_is_left_where_the_rule_walks_other_blocks(shipped):
    """One class holds heads 80 and 128 wide, and their rules walk blocks of 64 and of 32 keys."""
    launch_config = functools.partial(
        flash_attention._launch_config, capability=90, dtype=torch.float16, aligned=True
    )
    with tuned.use({}):
        rules = [launch_config(width, 4, 512) for width in (128, 80)]
    assert [rule["BLOCK_N"] for rule in rules] == [32, 64], "one entry would do, so this would prove nothing"
    constants = CONSTANTS.replace("BLOCK_N = 16", "BLOCK_N = 32")
    shipped("flash_attention.fwd.sm_90.width128-group4-bits16-longest128", constants)
    taken = launch_config(128, 4, 512)
    assert taken["BLOCK_T"] == 16 and taken["BLOCK_N"] == 32
    assert launch_config(80, 4, 512) == rules[1]


def test_importing_the_kernels_reads_no_file():
    code = "from nvembed_fast.kernels import flash_attention, mean_pool, rms_norm, latent_attention, tuned\n"
    code += "assert tuned._shipped.cache_info().misses == 0"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_use_goes_back_to_what_was_before():
    target = {"capability": 80, "dtype": torch.float16, "aligned": False}
    launch_config = functools.partial(flash_attention._launch_config, 32, 2, 64, **target)
    rule = launch_config()
    key = ("flash_attention.fwd", 80, "width32-group2-bits16-longest64")
    with tuned.use({key: {"BLOCK_N": 16}}):
        assert launch_config() == rule | {"BLOCK_N": 16} != rule
        with tuned.use({}):
            assert launch_config() == rule
        assert launch_config()["BLOCK_N"] == 16
    assert launch_config() == rule


# launches


def launched(monkeypatch, module, kernel: str, run):
    """(arguments of the first launch of a kernel, what `run` returns)."""
    with monkeypatch.context() as patch:
        launches = spy_on_launches(patch, module, kernel)
        result = run()
    return launches[0][1], result


def at(device: str, kernel: str, shape_class: str, **config) -> dict:
    """The entry of this machine, a whole one."""
    assert set(config) == set(tuned.KERNELS[kernel].constants)
    sm = rms_norm.capability(torch.device(device))
    return {(kernel, sm, shape_class): config}


def test_an_entry_changes_the_tile_of_attention(device, monkeypatch):
    q, k, v, layout = case(ATTENTION_CASES, "ragged-gqa").inputs(device, torch.float16)
    tile = {"BLOCK_T": 16, "BLOCK_N": 16, "USE_TMA": False, "num_warps": 2, "num_stages": 1}
    shape_class = "width32-group2-bits16-longest64"
    entries = {}
    entries |= at(device, "flash_attention.fwd", shape_class, **tile, AHEAD=False, PERSISTENT=False)
    for kernel in ("flash_attention.dq", "flash_attention.dkv"):
        entries |= at(device, kernel, shape_class, **tile)
    names = [f"_flash_attention_{which}_kernel" for which in ("fwd", "bwd_dq", "bwd_dkv")]
    launches = spy_on_launches(monkeypatch, flash_attention, *names)

    def kernel(*qkv):
        return flash_attention.flash_attention(*qkv, layout)

    def wanted(*qkv):
        return reference.flash_attention(*qkv, layout)

    def low(inputs, upstream):
        no_dlse = torch.zeros(q.shape[1], len(q), device=device)
        return attention_gradients(inputs, (*upstream, no_dlse), layout)

    def tiles():
        return {name: {n: arguments[n] for n in tile} for name, arguments in launches}

    assert_gradient_parity("rule", kernel, wanted, [q, k, v], low)
    assert all(t != tile for t in tiles().values()), "the rule's tile: this test would prove nothing"
    launches.clear()
    with tuned.use(entries):
        assert_gradient_parity("entry", kernel, wanted, [q, k, v], low)
        got = kernel(q, k, v)
    assert tiles() == dict.fromkeys(names, tile)
    assert_parity("entry", got, wanted(q, k, v), wanted(q.double(), k.double(), v.double()))


def test_the_shipped_entries_of_attention_keep_its_gradients(dtype16, device, monkeypatch):
    sm, width, group = 90, 128, 4
    if not HAS_GPU:
        monkeypatch.setattr(_common, "INTERPRETED_CAPABILITY", sm)
    q, k, v, layout = AttentionCase("nvembed", (70, 129), group, 1, width).inputs(device, dtype16)
    names = [f"_flash_attention_bwd_{which}_kernel" for which in ("dq", "dkv")]
    launches = spy_on_launches(monkeypatch, flash_attention, *names)

    def low(inputs, upstream):
        return attention_gradients(inputs, upstream, layout)

    kernel, wanted = (bound(f, layout) for f in (flash_attention.flash_attention, reference.flash_attention))
    assert_gradient_parity("shipped", kernel, wanted, [q, k, v], low)
    shape_class, shipped = f"width{width}-group{group}-bits16-longest128", tuned.read(tuned.FILE)
    entries = [shipped[f"flash_attention.{which}", sm, shape_class] for which in ("dq", "dkv")]
    is_met = rms_norm.capability(q.device) == sm
    for (name, arguments), entry in zip(launches, entries, strict=True):
        assert ({n: arguments[n] for n in entry} == entry) is is_met, name


@pytest.mark.parametrize("module", [latent_attention, absorbed_latent_attention])
def test_an_entry_changes_the_tile_of_latent_attention(module, device, monkeypatch):
    problem = case(LATENT_CASES, "no-tile-divides")
    tile = {"BLOCK_T": 32, "BLOCK_L": 16, "USE_TMA": False, "num_warps": 2, "num_stages": 1}
    if module is latent_attention:
        tensors, kernel = problem.direct_inputs(device, torch.float16), "_latent_attention_fwd_kernel"
        shape_class, rest = "width64-latents32-bits16", ()
        run, exact = latent_attention.latent_attention, reference.latent_attention
    else:
        *tensors, _, _, heads = problem.absorbed_inputs(device, torch.float16)
        kernel, shape_class, rest = "_absorbed_latent_attention_fwd_kernel", "latents32-bits16", (heads,)
        run, exact = absorbed_latent_attention._launch_fwd, reference.latent_weights
        tile["BLOCK_K"] = 32
    stem = module.__name__.split(".")[-1]
    rule, _ = launched(monkeypatch, module, kernel, lambda: run(*tensors, *rest))
    with tuned.use(at(device, f"{stem}.fwd", shape_class, **tile)):
        taken, got = launched(monkeypatch, module, kernel, lambda: run(*tensors, *rest))
    assert {n: taken[n] for n in tile} == tile != {n: rule[n] for n in tile}
    assert_parity(stem, got, exact(*tensors, *rest), exact(*(t.double() for t in tensors), *rest))


@pytest.mark.parametrize("geglu", [False, True], ids=["mean_pool", "mean_pool_geglu"])
def test_an_entry_changes_the_tile_of_mean_pool(geglu, device, monkeypatch):
    x, layout, mask = case(POOL_CASES, "ragged").inputs(device, torch.float16, geglu=geglu)
    tile, backward = ({"TOKENS": n, "BLOCK_T": 4, "BLOCK_D": 32, "num_warps": 1} for n in (16, 8))
    prefix = "mean_pool.geglu_" if geglu else "mean_pool."
    entries = at(device, f"{prefix}fwd", "width128-bits16", **tile)
    entries |= at(device, f"{prefix}bwd", "width128-bits16", **backward)
    name = "mean_pool_geglu" if geglu else "mean_pool"
    kernels = ("_mean_pool_fwd_kernel", "_mean_pool_fwd_combine_kernel", "_mean_pool_bwd_kernel")
    launches = spy_on_launches(monkeypatch, mean_pool, *kernels)
    kernel, exact = (lambda x, m=m: getattr(m, name)(x, layout, mask) for m in (mean_pool, reference))
    with tuned.use(entries):
        assert_gradient_parity("entry", kernel, exact, [x])
        got = kernel(x)
    assert_parity("entry", got, exact(x), exact(x.double()))
    taken = dict(launches)
    assert {n: taken[kernels[0]][n] for n in tile} == tile
    assert taken[kernels[1]]["TOKENS"] == 16, "texts of 17 tokens and more are summed in parts"
    assert {n: taken[kernels[2]][n] for n in tile} == backward


def test_an_entry_changes_the_tile_of_rms_norm(device, monkeypatch):
    x, residual, weight = case(NORM_CASES, "no-tile-divides").norm_inputs(device, torch.float16)
    forward, backward = {"BLOCK_T": 4, "num_warps": 2}, {"ROWS": 8, "BLOCK_T": 4, "num_warps": 2}
    entries = at(device, "rms_norm.fwd", "width128-bits16", **forward)
    entries |= at(device, "rms_norm.bwd", "width128-bits16", **backward)
    kernels = ("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel")
    launches = spy_on_launches(monkeypatch, rms_norm, *kernels)
    kernel, exact = (lambda *ts, m=m: m.add_rms_norm(*ts, 1e-5) for m in (rms_norm, reference))
    with tuned.use(entries):
        assert_gradient_parity("entry", kernel, exact, [x, residual, weight])
    taken = dict(launches)
    assert {n: taken[kernels[0]][n] for n in forward} == forward
    assert {n: taken[kernels[1]][n] for n in backward} == backward


def test_an_entry_changes_the_tile_of_masked_lse(device, monkeypatch):
    q, d, *rest = case(SCORE_CASES, "no-tile-divides").inputs(device, torch.float16)
    tile = {"BLOCK_B": 16, "BLOCK_M": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    entries = at(device, "masked_lse.fwd", "width128-bits16", **tile)
    entries |= at(device, "masked_lse.bwd", "width128-bits16", **tile)
    kernels = ("_masked_lse_fwd_kernel", "_masked_lse_bwd_kernel")
    launches = spy_on_launches(monkeypatch, masked_lse, *kernels)
    kernel, exact = (lambda q, d, m=m: m.masked_lse(q, d, *rest)[0] for m in (masked_lse, reference))
    with tuned.use(entries):
        assert_gradient_parity("entry", kernel, exact, [q, d])
    for name, arguments in launches:
        assert {n: arguments[n] for n in tile} == tile, name
    assert {name for name, _ in launches} == set(kernels)


def test_an_entry_of_other_bits_another_class_or_architecture_is_not_taken():
    for kernel, launch_config in (
        ("rms_norm.fwd", rms_norm._launch_config),
        ("rms_norm.bwd", rms_norm._bwd_launch_config),
        ("mean_pool.fwd", functools.partial(mean_pool._launch_config, geglu=False)),
        ("mean_pool.bwd", functools.partial(mean_pool._bwd_launch_config, geglu=False)),
    ):
        half = functools.partial(launch_config, 77, dtype=torch.float16)
        rule = half(capability=80)
        with tuned.use({(kernel, 80, "width128-bits16"): {"BLOCK_T": 16}}):
            assert half(capability=80) == rule | {"BLOCK_T": 16} != rule
            single = launch_config(77, capability=80, dtype=torch.float32)
            assert half(capability=90) == single == rule
            assert launch_config(129, capability=80, dtype=torch.float16)["BLOCK_T"] != 16


@pytest.mark.skipif(HAS_GPU, reason="plays sm_90 in the interpreter")
def test_an_entry_with_descriptors_is_left_where_none_can_be_made(monkeypatch):
    monkeypatch.setattr(flash_attention, "capability", lambda device: 90)
    q, k, v, layout = case(ATTENTION_CASES, "ragged-gqa").inputs("cpu", torch.float16)
    odd = torch.zeros(len(k), k.shape[1], k.shape[2] + 1, dtype=k.dtype)[..., :-1].copy_(k)
    tile = {"BLOCK_T": 16, "BLOCK_N": 16, "USE_TMA": True, "AHEAD": False, "num_warps": 4, "num_stages": 2}
    taken = []
    with tuned.use({("flash_attention.fwd", 90, "width32-group2-bits16-longest64"): tile}):
        for keys in (k, odd):
            arguments, got = launched(
                monkeypatch,
                flash_attention,
                "_flash_attention_fwd_kernel",
                lambda keys=keys: flash_attention.flash_attention(q, keys, v, layout),
            )
            taken.append({n: arguments[n] for n in tile})
            high = reference.flash_attention(q.double(), k.double(), v.double(), layout)
            assert_parity("entry", got, reference.flash_attention(q, k, v, layout), high)
    rule = flash_attention._launch_config(32, 2, 64, capability=90, dtype=torch.float16, aligned=False)
    assert taken == [tile, {n: rule[n] for n in tile}] and not rule["USE_TMA"]


def test_an_entry_ahead_is_left_where_there_is_no_block_ahead():
    """Causal attention keeps its loop, and a text of 64 tokens is one block of keys."""
    tile = {"BLOCK_T": 16, "BLOCK_N": 32, "USE_TMA": True, "AHEAD": True, "num_warps": 4, "num_stages": 2}
    key, target = ("flash_attention.fwd", 90), {"capability": 90, "dtype": torch.float16}
    classes = [f"width128-group4-bits16-longest{n}" for n in (64, 128)]
    rule = functools.partial(flash_attention._launch_config, 128, 4, **target)
    cases = ((512, False), (512, True), (64, False))
    with tuned.use({}):
        ruled = [rule(length, causal=causal) for length, causal in cases]
    with tuned.use({(*key, name): tile for name in classes}):
        taken = [rule(length, causal=causal) for length, causal in cases]
    assert taken == [ruled[0] | tile, *ruled[1:]] and ruled[0]["AHEAD"]
    # an entry that is not ahead holds for both
    with tuned.use({(*key, classes[1]): tile | {"AHEAD": False}}):
        taken = [rule(512, causal=causal) for causal in (False, True)]
    assert taken == [config | tile | {"AHEAD": False} for config in ruled[:2]]


def test_a_written_entry_lets_programs_walk_several_tiles(tmp_path):
    """No rule does. Causal attention has no block ahead, so it is left."""
    rule = functools.partial(flash_attention._launch_config, 128, 4, 512, capability=90, dtype=torch.bfloat16)
    with tuned.use({}):
        ruled = {causal: rule(causal=causal) for causal in (False, True)}
    assert [config["PERSISTENT"] for config in ruled.values()] == [False, False]
    tile = {name: ruled[False][name] for name in tuned.KERNELS["flash_attention.fwd"].constants}
    key = ("flash_attention.fwd", 90, "width128-group4-bits16-longest128")
    path = written(tmp_path, "# head\n")
    tuning.record(path, key, tile | {"PERSISTENT": True} | tuning_provenance())
    with tuned.use(tuned.read(path)):
        assert rule(causal=False) == ruled[False] | {"PERSISTENT": True}
        assert rule(causal=True) == ruled[True]


def test_programs_that_walk_several_tiles_are_tried_at_128_columns_on_sm_90_alone():
    tried = {
        (problem.name, sm): [config for config in problem.configs(sm) if config.get("PERSISTENT")]
        for problem in tuning.problems()
        for sm in problem.candidates
    }
    (where,) = [place for place, configs in tried.items() if configs]
    assert where == ("flash_attention.fwd (forward bf16)", 90)
    problem = next(p for p in tuning.problems() if p.name == where[0])
    assert {c.head_width for c in (problem.part, *problem.cases)} == {128}
    rule = tuning.rule_of(problem, 90)
    assert tried[where] == [rule | {"PERSISTENT": True}]


def test_latent_attention_without_descriptors_goes_by_its_rule():
    tile = {"BLOCK_T": 16, "BLOCK_L": 16, "USE_TMA": True, "num_warps": 4, "num_stages": 2}
    target = {"capability": 90, "dtype": torch.float16}
    entries = {
        ("latent_attention.fwd", 90, "width64-latents512-bits16"): tile,
        ("absorbed_latent_attention.fwd", 90, "latents512-bits16"): tile | {"BLOCK_K": 32},
    }
    with tuned.use(entries):
        for config in (
            functools.partial(latent_attention._launch_config, 512, 64, **target),
            functools.partial(absorbed_latent_attention._launch_config, 512, **target),
        ):
            taken, left = config(aligned=True), config(aligned=False)
            assert taken["BLOCK_T"] == 16 and taken["USE_TMA"]
            assert left["BLOCK_T"] == 128 and not left["USE_TMA"]
        backward = absorbed_latent_attention._bwd_launch_config(512, **target)
        assert backward["BLOCK_T"] == 128, "the backward has no entry and follows none of the forward's"


def test_all_longer_texts_share_an_entry():
    """Or the bits of a text would depend on the longest one beside it."""
    with tuned.use({("flash_attention.fwd", 80, "width128-group4-bits16-longest128"): {"BLOCK_N": 16}}):
        lengths = (1, 16, 32, 64, 128, 512, 4096, 32768)
        target = {"capability": 80, "dtype": torch.float16, "aligned": False}
        configs = {n: flash_attention._launch_config(128, 4, n, **target) for n in lengths}
    assert [n for n in lengths if configs[n]["BLOCK_N"] == 16] == [128, 512, 4096, 32768]


@pytest.mark.parametrize("problem", tuning.problems(), ids=lambda p: p.name)
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.skipif(HAS_GPU, reason="plays both architectures on a CPU")
def test_every_candidate_is_what_is_launched(problem, sm, monkeypatch):
    """The class that a case asks for, the rule's row in tools.resources and the launches belong together."""
    launches = []

    def silent(kernel, grid):
        return lambda **arguments: launches.append((kernel.__name__, arguments))

    stem, which = problem.kernel.split(".")
    module = importlib.import_module(f"nvembed_fast.kernels.{stem}")
    kernel = tuning.launch_by_rule(problem.row, sm).kernel.__name__
    monkeypatch.setattr(KernelInterface, "__getitem__", silent)
    monkeypatch.setattr(module, "capability", lambda device: sm)
    rule = tuning.rule_of(problem, sm)
    launch = problem.prepare(problem.part, "cpu", torch.float16)
    # the cases of other kernels have the part's width, and are too large for a test
    fewer = {"num_heads": 4, "num_kv_heads": 1}
    cases = [dataclasses.replace(c, **fewer) for c in problem.cases] if module is flash_attention else []
    runs = [problem.prepare(c, "cpu", torch.float16).run for c in cases]
    key = tuning.key_of(problem.kernel, [launch.run, *runs])
    assert key[:2] == (problem.kernel, sm)
    tuned._checked(problem.kernel, f"sm_{sm}", key[2], rule | tuning_provenance())

    def taken():
        launches.clear()
        launch.run()
        return [a for name, a in launches if name == kernel]

    configs = tuning.candidates(problem, sm)
    assert len(configs) > 1 and all(c != rule for c in configs[1:])
    for config in configs:
        with tuned.use({key: config}):
            assert any({n: a[n] for n in config} == config for a in taken()), config
        tuned._checked(problem.kernel, f"sm_{sm}", key[2], config | tuning_provenance())


def tuning_provenance() -> dict:
    return {
        "gpu": "a GPU",
        "date": datetime.date(2000, 1, 1),
        "commit": "abc",
        "time_ms": 1.0,
        "rule_ms": 2.0,
    }


# the search


PARTS = {
    "absorbed_latent_attention": case(LATENT_CASES, "no-tile-divides"),
    "flash_attention": case(ATTENTION_CASES, "ragged-gqa"),
    "latent_attention": case(LATENT_CASES, "no-tile-divides"),
    "masked_lse": case(SCORE_CASES, "limited"),
    "mean_pool": case(POOL_CASES, "ragged"),
    "rms_norm": case(NORM_CASES, "no-tile-divides"),
}
ONE_EACH = {problem.kernel: problem for problem in tuning.problems()}


def test_every_kernel_is_searched():
    assert set(ONE_EACH) == set(tuned.KERNELS)


@pytest.mark.parametrize("problem", ONE_EACH.values(), ids=ONE_EACH)
def test_parity_is_of_the_results_that_are_timed(problem, device):
    launch = problem.prepare(PARTS[problem.kernel.split(".")[0]], device, torch.float16)
    for got, low, high in zip(as_tuple(launch.run()), *launch.wanted(), strict=True):
        assert_parity(problem.kernel, got, low, high)


FITS = {
    "registers": 100,
    "stack": 0,
    "spills": 0,
    "shared": 1024,
    "tma": 2,
    "unbarred": 0,
    "touched": 0,
    "mixed": 0,
}


@pytest.mark.parametrize("fact", ["unbarred", "touched"])
def test_what_may_give_wrong_results_is_dropped(fact):
    # pointers wait in another way: there the fact is no fault
    rows = {"a": FITS | {fact: 1}, "b": FITS | {fact: 1, "tma": 0}, "c": FITS}
    assert tuning.survivors(rows, 90) == ["b", "c"]
    assert f"1 {fact}" in tuning._compile_table(rows, 90).splitlines()[-1]


def test_mixed_operands_are_dropped_however_they_were_loaded():
    rows = {"a": FITS | {"mixed": 1}, "b": FITS | {"mixed": 1, "tma": 0}, "c": FITS}
    assert tuning.survivors(rows, 90) == ["c"]
    assert "1 mixed" in tuning._compile_table(rows, 90).splitlines()[-1]


def test_what_does_not_fit_is_dropped_and_what_spills_comes_last():
    rows = {"a": FITS | {"spills": 3}, "b": FITS | {"shared": 200 * 1024}, "c": FITS}
    assert tuning.survivors(rows, 80) == ["c", "a"]
    assert tuning.survivors(rows, 90) == ["b", "c", "a"]
    table = tuning._compile_table(rows, 80).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["c", "a", "b"]
    assert table[2].endswith("spills") and table[3].endswith("memory, the limit is 166912")


def test_the_offline_compile_finds_the_tile_that_is_too_large():
    # keys and values of 128 tokens: 64 KB a stage
    code = """
import json
from tools import tuning
tile = {"BLOCK_T": 32, "BLOCK_N": 128, "USE_TMA": True, "num_warps": 8}
rule, large = (tile | {"num_stages": n} for n in (2, 4))
rows = {n: tuning.compiled("flash_attention: forward bf16", 90, c) for n, c in (("2", rule), ("4", large))}
print(json.dumps([rows, tuning.survivors(rows, 90)]))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows, kept = json.loads(run.stdout)
    assert kept == ["2"] and rows["4"]["shared"] > resources.SHARED_LIMIT[90] > rows["2"]["shared"] > 0
    assert rows["2"]["registers"] > 0


def times(*ms: float) -> Times:
    return Times(ms)


def test_the_fastest_beats_the_rule_by_more_than_the_spread():
    rule = times(1.0, 1.1, 1.2, 1.3, 1.4)
    overlapping = times(0.1, 0.1, 0.1, 1.1, 1.2)  # its median alone is far better
    near, far = times(*[0.99] * 5), times(*[0.9] * 5)
    assert tuning.fastest({tuning.RULE: [rule], "a": [overlapping]}) is None
    assert tuning.fastest({tuning.RULE: [rule], "a": [near], "b": [far], "c": [overlapping]}) == "b"
    assert tuning.fastest({tuning.RULE: [rule]}) is None


def test_the_fastest_is_faster_in_every_case():
    one, two = times(1.0, 1.0), times(8.0, 8.0)
    mixed, both = [times(0.1, 0.1), times(8.1, 8.1)], [times(0.9, 0.9), times(7.0, 7.0)]
    assert tuning.fastest({tuning.RULE: [one, two], "mixed": mixed}) is None
    assert tuning.fastest({tuning.RULE: [one, two], "mixed": mixed, "both": both}) == "both"


# a problem small enough for the interpreter. The second candidate is the rule once more
TINY = tuning.Problem(
    "rms_norm.fwd",
    "rms_norm: add_rms_norm bf16",
    tuning._norm_forward,
    (RowCase("three", 3, 64), RowCase("five", 5, 64)),
    RowCase("four", 4, 64),
    {80: ((4, 1), (1, 8), (2, 2)), 90: ((4, 1), (1, 8), (2, 2))},
)
MACHINE = results.Machine("a GPU", "1", "2", "3", "4", "abc", "tuning --write")


@pytest.fixture
def search(tmp_path, monkeypatch, device):
    """Runs a search over TINY that writes to a file of its own. Returns that file."""
    path = written(tmp_path, "# head\n# of two lines\n")
    monkeypatch.setattr(tuned, "FILE", path)

    def compile_all(problem, sm):
        labels = map(tuning.label, tuning.candidates(problem, sm))
        return {name: FITS for name in labels}

    def run(machine=MACHINE, problem=TINY):
        tuning.search([problem], compile_all, device, torch.float32, 0.01, machine)
        return path

    return run


def fake_clock(monkeypatch, milliseconds):
    """A clock that gives each candidate a time by its label."""

    def interleaved(functions, seconds):
        assert tuning.RULE in functions
        return {name: times(*[milliseconds.get(name, 2.0)] * 5) for name in functions}

    monkeypatch.setattr(tuning, "interleaved", interleaved)


def test_a_search_writes_what_is_faster_and_removes_what_is_not(search, monkeypatch, capsys):
    key = ("rms_norm.fwd", rms_norm.capability(torch.device("cuda" if HAS_GPU else "cpu")), "width64-bits32")
    fake_clock(monkeypatch, {"BLOCK_T=2 num_warps=2": 1.5, "BLOCK_T=4 num_warps=1": 1.75})
    path = search()
    assert tuned.read(path) == {key: {"BLOCK_T": 2, "num_warps": 2}}
    text = path.read_text()
    assert text.startswith("# head\n# of two lines\n\n[rms_norm.fwd.sm_")
    for line in ('gpu = "a GPU"', 'commit = "abc"', "time_ms = 3.0", "rule_ms = 4.0"):
        assert line in text.splitlines()
    assert "BLOCK_T=2 num_warps=2 beats the rule" in capsys.readouterr().out
    fake_clock(monkeypatch, {})
    assert tuned.read(search(machine=None)), "without --write nothing is written"
    assert tuned.read(search()) == {} and path.read_text() == "# head\n# of two lines\n"
    assert "none beats the rule" in capsys.readouterr().out


def test_what_walks_other_blocks_than_the_rule_is_timed_and_never_wins(search, monkeypatch, capsys):
    of_batches = {name for name, kernel in tuned.KERNELS.items() if "longest" in kernel.shape}
    assert {name for name, kernel in tuned.KERNELS.items() if kernel.walked in kernel.constants} == of_batches
    norm = dataclasses.replace(tuned.KERNELS["rms_norm.fwd"], walked="BLOCK_T")
    monkeypatch.setitem(tuned.KERNELS, "rms_norm.fwd", norm)
    fake_clock(monkeypatch, {"BLOCK_T=2 num_warps=2": 1.0, "BLOCK_T=4 num_warps=1": 1.5})
    assert tuned.read(search()) == {}
    out = capsys.readouterr().out
    assert "none beats the rule" in out and out.count("BLOCK_T=2 num_warps=2") >= 2


def test_a_search_with_the_real_clock(search, capsys):
    search()
    out = capsys.readouterr().out
    assert out.count("BLOCK_T=4 num_warps=1") >= 2 and "three" in out and "five" in out


def test_a_candidate_whose_parity_is_red_gets_no_time(search, monkeypatch, capsys):
    def broken(case, device, dtype):
        launch = tuning._norm_forward(case, device, dtype)
        red = lambda: rms_norm._launch_config(64, capability=80, dtype=torch.float32)["BLOCK_T"] == 4  # noqa: E731
        return launch._replace(run=lambda: tuple(2 * t if red() else t for t in launch.run()))

    monkeypatch.setattr(rms_norm, "capability", lambda device: 80)
    fake_clock(monkeypatch, {"BLOCK_T=4 num_warps=1": 0.1})
    monkeypatch.setattr(tuning, "candidates", lambda p, sm: [{"BLOCK_T": 1, "num_warps": 8}, *p.configs(80)])
    path = search(problem=dataclasses.replace(TINY, prepare=broken))
    assert tuned.read(path) == {}
    assert "parity is red, dropped: BLOCK_T=4 num_warps=1: rms_norm.fwd" in capsys.readouterr().out


def test_what_a_search_times_is_drawn_on_its_device(search, device, monkeypatch):
    places = []

    @contextlib.contextmanager
    def drawn_on(place):
        places.append(place)
        yield
        places.pop()

    def prepare(case, device, dtype):
        assert places == [device]
        launch = tuning._norm_forward(case, device, dtype)
        return launch._replace(
            wanted=lambda: launch.wanted() if places == [device] else pytest.fail("wanted")
        )

    monkeypatch.setattr(tuning, "drawn_on", drawn_on)
    fake_clock(monkeypatch, {})
    search(problem=dataclasses.replace(TINY, prepare=prepare))


def test_recording_keeps_the_other_entries(tmp_path):
    path = written(tmp_path, f"# head\n\n[{NAME}]\n{CONSTANTS}{PROVENANCE}")
    entry = {"BLOCK_T": 2, "num_warps": 2} | tuning_provenance()
    before = tuned.read(path)
    key = ("rms_norm.fwd", 90, "width64-bits16")
    tuning.record(path, key, entry)
    assert tuned.read(path) == before | {key: {"BLOCK_T": 2, "num_warps": 2}}
    text = path.read_text()
    tuning.record(path, key, entry)
    assert path.read_text() == text
    tuning.record(path, key, None)
    assert path.read_text() == f"# head\n\n[{NAME}]\n{CONSTANTS}{PROVENANCE}"


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    path = written(tmp_path, "# head\n")
    with pytest.raises(ValueError, match="missing: num_warps"):
        tuning.record(path, ("rms_norm.fwd", 90, "width64-bits16"), {"BLOCK_T": 2} | tuning_provenance())
    assert path.read_text() == "# head\n"


def test_tuning_forbids_tf32(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(SystemExit, match="--only must be one of"):
            tuning.main(["--only", "nothing"])
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(HAS_GPU, reason="what is said without a GPU")
def test_timing_needs_a_gpu():
    command = [sys.executable, "-m", "tools.tuning", "--write"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "timing needs a CUDA GPU" in run.stderr


@pytest.mark.slow
def test_list_compiles_for_both_architectures():
    command = [sys.executable, "-m", "tools.tuning", "--list", "--only", "rms_norm.fwd"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for sm in ("sm_80", "sm_90"):
        assert f"1/1 rms_norm.fwd (add_rms_norm bf16) {sm}" in run.stdout
    assert run.stdout.count("(rule)") == 2 and run.stdout.count("num_warps=4") == 2


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(SystemExit, match="--only must be one of flash_attention.fwd, .*, got norm"):
        tuning._selected("norm")


# the package


def test_the_wheel_holds_the_file(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("nvembed_fast", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    code = f"from setuptools.build_meta import build_wheel as b; b({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(wheel).read("nvembed_fast/kernels/tuned.toml") == tuned.FILE.read_bytes()
