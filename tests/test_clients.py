"""Public code around the original, written anew from its calls, loaded by our class and by transformers."""

import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn import DataParallel

import nvembed_fast
from nvembed_fast import NVEmbed, query_instruction

QUERIES = ["are judo throws allowed?", "how to become a technician?"]
PASSAGES = ["Judo throws are allowed in freestyle.", "Enrol in a course. Then take the test.", ""]
TASK = "Given a question, retrieve passages that answer the question"


class AutoModel:
    """In the place of transformers' class of this name."""


@pytest.fixture(params=[NVEmbed, transformers.AutoModel], ids=["NVEmbed", "AutoModel"], autouse=True)
def model_class(request, monkeypatch):
    nvembed_fast.register()
    load = functools.partial(request.param.from_pretrained, device="cpu")
    monkeypatch.setattr(AutoModel, "from_pretrained", load, raising=False)


@pytest.fixture(scope="module")
def wanted(tiny_directory) -> dict[str, torch.Tensor]:
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    return {"queries": model.encode_query(QUERIES, TASK), "passages": model.encode_document(PASSAGES)}


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class HippoRAG:
    """Every argument by keyword, batches by the caller, and `norm` handed on to the model."""

    def __init__(self, name: str):
        params = {"pretrained_model_name_or_path": name, "trust_remote_code": True, "device_map": "auto"}
        self.model = AutoModel.from_pretrained(**params)
        self.width = self.model.config.hidden_size

    def batch_encode(self, texts: list[str], batch_size: int = 2, **keywords) -> np.ndarray:
        params = {"max_length": 32768, "instruction": "", "num_workers": 32, **keywords}
        if params["instruction"]:
            params["instruction"] = f"Instruct: {params['instruction']}\nQuery: "
        batches = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
        results = torch.cat([self.model.encode(prompts=batch, **params) for batch in batches])
        return results.cpu().numpy()


def test_hipporag(tiny_directory, wanted):
    client = HippoRAG(str(tiny_directory))
    assert client.width == 64
    queries = client.batch_encode(QUERIES, instruction=TASK, norm=True)
    np.testing.assert_allclose(queries, wanted["queries"], atol=1e-6)
    np.testing.assert_allclose(client.batch_encode(PASSAGES), wanted["passages"], atol=1e-6)


def test_beir(tiny_directory, wanted):
    """The rows of each batch are added to a list. The prefix is also the instruction, so it comes twice."""
    model = AutoModel.from_pretrained(tiny_directory, trust_remote_code=True, torch_dtype=torch.float32)
    prefix = query_instruction(TASK)
    queries, passages = [], []
    with torch.no_grad():
        for query in QUERIES:
            queries += model.encode([prefix + query], instruction=prefix, max_length=512)
        for first in range(0, len(PASSAGES), 2):
            passages += model.encode(PASSAGES[first : first + 2], instruction="", max_length=512)
    again = model.encode([prefix + query for query in QUERIES], prefix)
    torch.testing.assert_close(torch.stack(queries), again, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.stack(passages), wanted["passages"], rtol=0, atol=1e-6)


def test_model_card_for_transformers(tiny_directory, wanted):
    model = AutoModel.from_pretrained(str(tiny_directory), trust_remote_code=True)
    prefix = "Instruct: " + TASK + "\nQuery: "
    queries = F.normalize(model.encode(QUERIES, instruction=prefix, max_length=32768), p=2, dim=1)
    passages = F.normalize(model.encode(PASSAGES, instruction="", max_length=32768), p=2, dim=1)
    torch.testing.assert_close(queries, wanted["queries"], rtol=0, atol=1e-6)
    torch.testing.assert_close(passages, wanted["passages"], rtol=0, atol=1e-6)
    assert len(((queries @ passages.T) * 100).tolist()) == 2


def test_model_card_for_several_gpus(tiny_directory, wanted):
    model = AutoModel.from_pretrained(str(tiny_directory))
    for module_key, module in model._modules.items():
        model._modules[module_key] = DataParallel(module)
    options = {"batch_size": 2, "max_length": 4096, "num_workers": 32, "return_numpy": True}
    queries = model._do_encode(QUERIES, instruction=query_instruction(TASK), **options)
    passages = model._do_encode(PASSAGES, instruction="", **options)
    np.testing.assert_allclose(queries, wanted["queries"], atol=1e-6)
    np.testing.assert_allclose(passages, wanted["passages"], atol=1e-6)


def test_model_card_for_sentence_transformers(tiny_directory, wanted):
    """It adds the end mark itself. Without that line the vectors are right. With it, it is told."""
    model = AutoModel.from_pretrained(str(tiny_directory), trust_remote_code=True)
    model.max_seq_length = 32768
    model.tokenizer.padding_side = "right"
    options = {"batch_size": 2, "normalize_embeddings": True}
    queries = model.encode(QUERIES, prompt=query_instruction(TASK), **options)
    passages = model.encode(PASSAGES, **options)
    torch.testing.assert_close(queries, wanted["queries"], rtol=0, atol=1e-6)
    torch.testing.assert_close(passages, wanted["passages"], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="ends with '</s>', and encode adds it to every text"):
        model.encode([text + model.tokenizer.eos_token for text in PASSAGES], **options)
