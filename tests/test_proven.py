"""`auto` takes a kernel only where it is proven. A GPU that launches nothing plays one where kernels fail."""

import contextlib
import copy
import io
import json
import pickle
import warnings
from unittest import mock

import pytest
import torch
from fake_driver import gpu

from nvembed_fast import NVEmbed, cli, ops, self_check, verdicts
from nvembed_fast.checkpoint.load import load_weights
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.kernels import library
from nvembed_fast.placement import Placement
from nvembed_fast.verdicts import Finding

GPU = torch.device("cuda", 0)
HALF = torch.float16


@pytest.fixture
def verdict(monkeypatch):
    """`verdict[operation, direction] = reason` makes a self-check red. `.asked` lists the calls."""

    class Verdict(dict):
        asked: list = []

    reasons = Verdict()
    reasons.asked = []

    def prove(device, items):
        reasons.asked.append(items)
        found = {}
        for name, dtype, direction in items:
            reason = reasons.get((name, direction), "")
            found[name, dtype, direction] = Finding(
                name, dtype, direction, "triton", not reason, reason=reason
            )
        return found, ""

    monkeypatch.setenv("NVEMBED_FAST_SELF_CHECK", "1")
    monkeypatch.setattr(verdicts, "prove", prove)
    monkeypatch.setattr(ops, "_obstacles", {})
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    monkeypatch.setitem(ops._capabilities, 0, (9, 0))
    return reasons


def test_auto_takes_the_library_path_where_a_check_is_red_and_warns_once(verdict):
    verdict["rotary", "forward"] = "ragged: output 0, max error 3 > 1"
    verdict["swiglu", "forward"] = "wrong"
    with pytest.warns(ops.UnprovenKernel) as caught:
        assert ops.choose(GPU, HALF, "flash_attention") == ("triton", "the kernels are written for this GPU")
        chosen, why = ops.choose(GPU, HALF, "rotary")
    (warning,) = caught
    assert chosen == "library" and "its self-check failed (forward): ragged: output 0" in why
    text = str(warning.message)
    for part in (
        "rotary (forward: ragged",
        "and 1 more",
        "cuda:0 in float16",
        "`nvembed-fast check` shows all",
    ):
        assert part in text
    assert len(verdict.asked) == 1, "then it is a look into a dictionary"


def test_a_check_that_found_out_nothing_is_no_failed_one(monkeypatch, verdict):
    undecided = Finding("rotary", "float16", "forward", "triton", False, reason="no disk", is_decided=False)
    prove = verdicts.prove
    monkeypatch.setattr(
        verdicts, "prove", lambda device, items: (prove(device, items)[0] | {undecided.item: undecided}, "")
    )
    with pytest.warns(ops.UnprovenKernel, match="did not pass .* rotary .forward: no disk"):
        assert ops.prove(GPU, HALF) == {"rotary": "its self-check found out nothing (forward): no disk"}


def test_a_forced_implementation_asks_no_one(verdict):
    verdict["rotary", "forward"] = "wrong"
    for impl in ("triton", "library", "torch"):
        with ops.use_impl(impl):
            assert ops.choose(GPU, HALF, "rotary") == (impl, "it was asked for")
    assert not verdict.asked


def test_a_red_backward_counts_where_gradients_are_recorded(verdict):
    verdict["rotary", "backward"] = "wrong"
    assert ops.choose(GPU, HALF, "rotary")[0] == "triton"
    with pytest.warns(ops.UnprovenKernel, match="backward: wrong"):
        assert ops.choose(GPU, HALF, "rotary", True)[0] == "library"
    assert ops.choose(GPU, HALF, "rotary")[0] == "triton"
    x = torch.ones(2, 4)
    assert not ops._is_recorded(x) and ops._is_recorded(1.0, x.clone().requires_grad_())
    with torch.no_grad():
        assert not ops._is_recorded(x.clone().requires_grad_())


def test_gradients_are_recorded_by_the_call(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "choose", lambda *args: asked.append(args[2:]) or ("torch", ""))
    x = torch.ones(2, 4, requires_grad=True)
    ops.swiglu(x)
    with torch.no_grad():
        ops.swiglu(x)
    assert asked == [("swiglu", True), ("swiglu", False)]


def test_a_red_forward_is_told_once_also_for_training(verdict):
    verdict["rotary", "forward"] = "wrong"
    with pytest.warns(ops.UnprovenKernel):
        assert ops.prove(GPU, HALF) == {"rotary": "its self-check failed (forward): wrong"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(ops.prove(GPU, HALF, training=True)) == ["rotary"]


def test_each_dtype_and_each_gpu_is_proven_by_itself(verdict, monkeypatch):
    monkeypatch.setitem(ops._capabilities, 1, (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device, dtype in ((GPU, HALF), (GPU, torch.bfloat16), (torch.device("cuda", 1), HALF)):
        for _ in range(2):
            assert ops.prove(device, dtype) == {}
    monkeypatch.setitem(ops._capabilities, None, (8, 0))
    ops.prove(torch.device("cuda"), HALF)  # the current one
    assert len(verdict.asked) == 3


def test_the_kernel_of_the_loss_is_proven_when_it_is_called(verdict):
    ops.prove(GPU, HALF)
    assert "masked_lse" not in {operation for items in verdict.asked for operation, *_ in items}
    verdict["masked_lse", "backward"] = "wrong"
    with pytest.warns(ops.UnprovenKernel):
        assert ops.choose(GPU, torch.float32, "masked_lse", True)[0] == "library"
    assert {operation for operation, *_ in verdict.asked[-1]} == {"masked_lse"}


def test_the_environment_may_skip_it(verdict, monkeypatch):
    verdict["rotary", "forward"] = "wrong"
    monkeypatch.setenv("NVEMBED_FAST_SELF_CHECK", "0")
    assert ops.choose(GPU, HALF, "rotary", True)[0] == "triton" and not verdict.asked


def test_nothing_is_proven_where_no_kernel_could_run(verdict):
    assert ops.prove(torch.device("cpu"), HALF) == {} == ops.prove(GPU, torch.float64)
    assert ops.choose(torch.device("cpu"), torch.float32, "rotary")[0] == "torch" and not verdict.asked


def test_while_torch_compile_traces_nothing_is_checked(verdict, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    chosen, why = ops.choose(GPU, HALF, "rotary")
    assert (chosen, why) == ("library", "no self-check has run before torch.compile") and not verdict.asked
    monkeypatch.undo()


def test_a_check_in_this_process_is_told(verdict, monkeypatch):
    prove = verdicts.prove
    monkeypatch.setattr(verdicts, "prove", lambda *args: (prove(*args)[0], "the GPU is busy"))
    with pytest.warns(ops.UnprovenKernel, match="in this process, without a time limit: the GPU is busy"):
        assert ops.prove(GPU, HALF) == {}


def test_loading_proves_and_graphs_need_it(verdict, monkeypatch):
    monkeypatch.setattr("nvembed_fast.placement.check_device", lambda _: GPU)
    config = NVEmbedConfig(torch_dtype="float16")
    placement = Placement.decide(config, cuda_graphs=True)
    assert len(verdict.asked) == 1 and {d for _, _, d in verdict.asked[0]} == {"forward"}
    assert copy.deepcopy(placement) == placement == pickle.loads(pickle.dumps(placement))
    # the direct form is not in this model
    verdict["latent_attention", "forward"] = "wrong"
    ops._obstacles.clear()
    with pytest.warns(ops.UnprovenKernel):
        assert Placement.decide(config, cuda_graphs=True).latents == "absorbed"
    verdict["rotary", "forward"] = "wrong"
    ops._obstacles.clear()
    with (
        pytest.warns(ops.UnprovenKernel),
        pytest.raises(ValueError, match="needs proven kernels: of rotary its"),
    ):
        Placement.decide(config, cuda_graphs=True)
    assert Placement.decide(config).implementation()[0] == "triton"
    asked = len(verdict.asked)
    assert Placement.decide(config, cuda_graphs=True, impl="triton").cuda_graphs
    assert len(verdict.asked) == asked


@pytest.mark.parametrize("way", ["library", "torch", "info", "auto"])
def test_only_auto_proves_at_loading(verdict, tiny_directory, monkeypatch, capsys, way):
    """The library path may have been chosen because a kernel hangs here."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("nvembed_fast.placement.check_device", lambda _: GPU)
    monkeypatch.setattr(
        "nvembed_fast.checkpoint.load.load_weights",
        lambda *args, device, dtype, **kwargs: load_weights(*args, device=cpu, dtype=dtype, **kwargs),
    )
    if way == "info":
        assert cli.main(["info", "--model", str(tiny_directory)]) == 0
        assert "it runs on cuda:0 in float16" in capsys.readouterr().out
    else:
        NVEmbed.from_pretrained(tiny_directory, impl=way)
    assert len(verdict.asked) == (way == "auto")


@contextlib.contextmanager
def _failing(how: str):
    if how == "wrong":
        yield  # no kernel writes anything
    elif how == "raises":
        with gpu.failing(launch=1):
            yield
    else:
        from triton.backends.nvidia.compiler import CUDABackend

        def add_stages(self, *args):
            raise RuntimeError("ptxas knows no such instruction")

        with gpu.compiler("broken"), mock.patch.object(CUDABackend, "add_stages", add_stages):
            yield


def call_where_kernels_fail(how: str, folder: str) -> dict:
    """swiglu on a fake GPU. The other kernels pass: none could, where nothing is launched."""
    check = self_check.check

    def check_swiglu(item, device, path, begin):
        if item[0] == "swiglu":
            return check(item, device, path, begin)
        return Finding(*item, path, True, 0.0, 1.0)

    environment = {"NVEMBED_FAST_SELF_CHECK": "1", "NVEMBED_FAST_CACHE": folder}
    x = torch.randn(3, 64, dtype=HALF)
    on_gpu = x.to("cuda")
    with (
        mock.patch.dict("os.environ", environment),
        mock.patch.object(ops, "_obstacles", {}),
        # a child would see no GPU
        mock.patch.object(verdicts, "START_SECONDS", 0.01),
        mock.patch.object(self_check, "check", check_swiglu),
        # a fake GPU has no clock
        mock.patch.object(self_check, "_milliseconds", lambda *_: 1.0),
        _failing(how),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        got = ops.swiglu(on_gpu)
        gpu.forget_counts()
        again = ops.swiglu(on_gpu)
        result = {
            "equal": all(torch.equal(t.cpu(), library.swiglu(x)) for t in (got, again)),
            "launched": [launch.kernel for launch in gpu.launches()],
            "told": [str(w.message) for w in caught if w.category is ops.UnprovenKernel],
        }
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            arguments = ["--device", "cuda:0", "--dtypes", "float16", "--operations", "swiglu", "rotary"]
            result["status"] = cli.main(["check", *arguments, "--json"])
        return result | {"report": json.loads(printed.getvalue())}


REASONS = {"wrong": "non-finite result", "raises": "Triton Error", "does not compile": "ptxas knows no such"}


@pytest.mark.parametrize("how", REASONS)
def test_a_kernel_that_fails_gives_way_to_the_library_path(how, fake_gpu, tmp_path):
    result = fake_gpu(call_where_kernels_fail, how, str(tmp_path))
    assert result["equal"] and result["launched"] == []
    here, red = result["told"]
    assert "in this process" in here and "did not start" not in red
    assert "swiglu (forward: no tile divides: " in red and REASONS[how] in red
    (kept,) = (tmp_path / "self_check").glob("*.json")
    rows = result["report"]["operations"]
    red = [row for row in rows if not row["ok"]]
    assert result["status"] == 1 and not result["report"]["ok"] and len(rows) == 8
    assert {(row["name"], row["path"], row["direction"]) for row in red} == {
        ("swiglu", "triton", direction) for direction in verdicts.DIRECTIONS
    }
    assert all(REASONS[how] in row["reason"] for row in red)
    findings = {entry["name"]: entry["ok"] for entry in json.loads(kept.read_text())["findings"]}
    assert findings == {name: name != "swiglu" for name in ops.OPERATIONS if name != "masked_lse"}
