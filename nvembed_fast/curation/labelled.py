"""Labelled texts: sarcasm in headlines, subjects of newsgroups, outlets of news about health."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast import packages
from nvembed_fast.curation.text import Labelled, drawn

__all__ = ["health_outlets", "newsgroups", "sarcasm"]


def sarcasm(archive: Path) -> Iterator[Labelled]:
    """A headline, and whether it is sarcastic."""
    ((_, content),) = packages.members(archive, "*/data/sarcasm/samples.jsonl")
    for number, line in enumerate(content.decode().splitlines()):
        row = json.loads(line)
        label = {"0": "serious", "1": "sarcastic"}[row["ideal"]]
        yield Labelled(row["input"][-1]["content"], label, f"sarcasm {number}")


def newsgroups(archive: Path) -> Iterator[Labelled]:
    """A message of the training part of 20 Newsgroups, and its group."""
    ((_, content),) = packages.members(archive, "*/datasets/20newsgroups-train.tab")
    table = io.StringIO(content.decode("utf-8", "replace"), newline="")
    for number, row in enumerate(csv.reader(table, delimiter="\t")):
        if number >= 3 and len(row) == 2:  # names, types and flags of the columns
            yield Labelled(row[1], row[0], f"newsgroups {number}")


def health_outlets(archive: Path) -> Iterator[Labelled]:
    """A message about health, without links and names, and the outlet that wrote it."""
    ((_, content),) = packages.members(archive, "*/data/en/healthtweets.zip")
    table = zipfile.ZipFile(io.BytesIO(content)).read("healthtweets.csv").decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        outlet = row["source_id"].rpartition("-")[0]
        text = re.sub(r"https?://\S+|^RT\b|@\w+:?|\ufffd", " ", row["text"])
        if drawn(row["source_id"]) % 4 == 0:  # 63,000 are more than such a task is worth
            yield Labelled(text, outlet, f"health {row['source_id']}")
