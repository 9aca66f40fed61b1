"""nvembed-fast train: the least recipe, its errors in one line, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from training_runs import COMMAND, ROOT, losses, recipe_of, write_pairs, write_recipe, write_start

from nvembed_fast import NVEmbed, cli
from nvembed_fast.training.recipe import Recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def file(tmp_path, start) -> Path:
    write_pairs(tmp_path / "pairs.jsonl")
    return write_recipe(tmp_path / "recipe.toml", recipe_of(tmp_path, start))


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["train", *(str(a) for a in arguments)])
    return status, *capsys.readouterr()


def test_the_least_recipe_trains_and_the_same_command_is_finished(tmp_path, start, capsys):
    write_pairs(tmp_path / "pairs.jsonl")
    file = tmp_path / "least.toml"
    file.write_text(f"""
output = "model"
seed = 1
[model]
start = "{start.parent / "decoder"}"
layers = 2
pooling_head = "latent"
[train]
steps = 4
batch = 4
lr = 1e-3
warmup = 1
temperature = 0.05
max_length = 32
lora_rank = 2
checkpoint_every = 2
[[data]]
file = "pairs.jsonl"
instruction = "w5"
in_batch = true
hard_negatives = 1
weight = 1.0
""")
    status, printed, error = run(capsys, file)
    assert (status, printed) == (0, "") and "step 4 of 4: loss" in error, error
    assert f"{tmp_path / 'model'}: the trained model" in error
    assert NVEmbed.from_pretrained(tmp_path / "model", device="cpu").config.is_untrained is False
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert run(capsys, file)[0] == 0
    assert [step for step, _ in losses(tmp_path / "model")] == [1, 2, 3, 4]


def test_defaults_are_printed_without_torch(capsys):
    code = "import sys; from nvembed_fast.cli import main; main(['train', '--print-defaults']); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Recipe.from_dict(tomllib.loads(done.stdout)).train.steps > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.temprature=1"], "no key 'train.temprature': did you mean 'train.temperature'?"),
        (["--set", "train.temperature=0"], "train.temperature must be a number above 0"),
        (["--set", "train.stepps=3"], "recipe.toml: no key 'train.stepps': did you mean 'train.steps'?"),
        (["--set", "model.pooling_head=mean"], "model.pooling_head is 'mean', but"),
    ],
)
def test_a_wrong_recipe_is_status_2_and_one_line(file, capsys, arguments, message):
    status, printed, error = run(capsys, file, *arguments)
    assert (status, printed) == (2, "") and message in error and error.count("\n") == 1, error


def test_no_recipe_is_status_2(tmp_path, capsys):
    status, _, error = run(capsys)
    assert status == 2 and "name the file of a recipe; --print-defaults prints one" in error
    status, _, error = run(capsys, tmp_path / "none.toml")
    assert status == 1 and "none.toml is missing" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "pairs.jsonl, line 2: not JSON"),
        ('{"query": "w1", "pos": [""]}', "pairs.jsonl, line 2: 'pos'[0] is empty"),
        ('{"query": "w1", "pos": "w1"}', "pairs.jsonl, line 2: the only positive equals the query"),
    ],
)
def test_a_bad_row_is_one_line(file, tmp_path, capsys, line, message):
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([rows[0], line, *rows[2:]]))
    status, _, error = run(capsys, file)
    assert status == 1 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_recipe_is_one_line(file, tmp_path, capsys):
    assert run(capsys, file, "--set", "train.steps=2")[0] == 0
    status, _, error = run(capsys, file, "--set", "train.lr=0.5")
    assert status == 1 and "is of another run: train.lr was 0.01 and is 0.5" in error
    assert run(capsys, file)[0] == 0  # more steps of the same recipe
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_finishes_the_step_and_saves(file, tmp_path, ctrl_c):
    command = [*COMMAND, str(file), "--set", "train.steps=100000", "--set", "train.checkpoint_every=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("step 1 of"):
                    process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130, lines
        finally:
            process.kill()
    assert any("stopping behind this step" in line for line in lines)
    (last,) = (tmp_path / "out").glob("checkpoint-*")
    done = int(last.name.removeprefix("checkpoint-"))
    assert lines[-1] == f"interrupted; step {done} of 100000 is done and saved; the same command goes on\n"
    assert [step for step, _ in losses(tmp_path / "out")] == list(range(1, done + 1))
