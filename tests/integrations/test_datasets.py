"""A column of a data set goes into `encode` as it is."""

import datasets
import torch

from nvembed_fast import NVEmbed


def test_a_column_gives_the_vectors_of_its_list(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory)
    texts = ["one", "two words", "a third text"]
    column = datasets.Dataset.from_dict({"text": texts})["text"]
    assert not isinstance(column, list), "a list, so this test would prove nothing"
    assert torch.equal(model.encode(column), model.encode(texts))
