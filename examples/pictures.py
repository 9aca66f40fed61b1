"""Draw what a model has learned: a map of Python's docstrings, and the cosines of pairs that belong together.

    python examples/pictures.py demo -o pictures
    python examples/pictures.py runs/demo-short/stage2 --pairs runs/demo-short/data/dev.jsonl --tsne

`map.png` has a point for each docstring of `evaluation.docstrings`, in the colour of its package.
`cosines.png` has the cosines of queries with their documents, and with those of other queries. The pairs are
the committed questions with their docstrings, or some hundreds of rows of a file, {query, pos, prompt}.
"""

import argparse
import json
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

# runs from a checkout as from an installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nvembed_fast import NVEmbed
from nvembed_fast.evaluation import docstrings
from nvembed_fast.stream import TextsCut

PACKAGES = 12  # with a colour of their own
MAX_LENGTH = 128
PAIRS = 400  # of a file, at least, where it has so many


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    import matplotlib

    matplotlib.use("agg")
    warnings.simplefilter("ignore", TextsCut)
    model = NVEmbed.from_pretrained(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    corpus = docstrings.load(arguments.texts)
    documents = model.encode_document(list(corpus.texts), max_length=MAX_LENGTH).cpu()
    draw_map(documents, corpus.names, arguments.output / "map.png", tsne=arguments.tsne)
    if arguments.pairs is None:
        pairs = [
            (question.text, docstrings.TASK, corpus.texts[min(right)])
            for question, right in zip(corpus.questions, corpus.right, strict=True)
        ]
    else:
        pairs = read_pairs(arguments.pairs)
    draw_cosines(cosines(model, pairs), arguments.output / "cosines.png")
    print(f"{arguments.output / 'map.png'}\n{arguments.output / 'cosines.png'}")


def read_pairs(file: Path) -> list[tuple[str, str, str]]:
    """(query, task, document) of rows of a file of JSON lines, evenly spread over it."""
    lines = file.read_text("utf-8").splitlines()
    rows = map(json.loads, lines[:: max(1, len(lines) // PAIRS)])
    return [(row["query"], row.get("prompt", ""), row["pos"][0]) for row in rows]


def cosines(model: NVEmbed, pairs: list[tuple[str, str, str]]) -> torch.Tensor:
    """[P, P] fp32: of each query with each document. A pair's own is on the diagonal."""
    documents = model.encode_document([document for *_, document in pairs], max_length=MAX_LENGTH).cpu()
    queries = torch.empty_like(documents)
    by_task: dict[str, list[int]] = defaultdict(list)
    for number, (_, task, _) in enumerate(pairs):
        by_task[task].append(number)
    for task, numbers in by_task.items():
        texts = [pairs[number][0] for number in numbers]
        if task:
            found = model.encode_query(texts, task, max_length=MAX_LENGTH)
        else:
            found = model.encode(texts, max_length=MAX_LENGTH)
        queries[numbers] = found.cpu()
    return queries @ documents.T


def draw_map(vectors: torch.Tensor, names: tuple[str, ...], file: Path, *, tsne: bool) -> None:
    """Two dimensions of [N, D] vectors, by PCA or t-SNE. A name is module:qualified.name."""
    from matplotlib import pyplot

    if tsne:
        from sklearn.manifold import TSNE

        places = torch.from_numpy(
            TSNE(metric="cosine", init="pca", random_state=0).fit_transform(vectors.numpy())
        )
    else:
        torch.manual_seed(0)  # of the random start of this decomposition
        places = (vectors - vectors.mean(0)) @ torch.pca_lowrank(vectors, 2)[2]
    packages = [name.split(":")[0].split(".")[0] for name in names]
    shown = [package for package, _ in Counter(packages).most_common(PACKAGES)]
    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=100)
    for package in (None, *shown):
        chosen = torch.tensor([p == package if package else p not in shown for p in packages])
        x, y = places[chosen].T
        color = "0.85" if package is None else pyplot.get_cmap("tab20")(shown.index(package))
        axes.scatter(x, y, s=9, color=color, label=package or "others")
    axes.set(xticks=[], yticks=[], title=f"{len(names)} docstrings of Python's standard library")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)
    _save(figure, file)


def draw_cosines(found: torch.Tensor, file: Path) -> None:
    """Histograms of `cosines`."""
    from matplotlib import pyplot

    own = found.diagonal()
    others = found[~torch.eye(len(found), dtype=torch.bool)]
    figure, axes = pyplot.subplots(figsize=(9, 4), dpi=100)
    for values, label in ((others, "with the documents of other queries"), (own, "with their own documents")):
        text = f"{label}, mean {values.mean():.2f}"
        axes.hist(values.numpy(), bins=60, range=(-0.5, 1), density=True, alpha=0.6, label=text)
    axes.set(xlabel="cosine", ylabel="density", title=f"{len(found)} queries")
    axes.legend(frameon=False)
    _save(figure, file)


def _save(figure, file: Path) -> None:
    from matplotlib import pyplot

    # no version of matplotlib in the file: the same model gives the same bytes
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, a hub id, or demo")
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures"), help="a folder [%(default)s]")
    parser.add_argument("--texts", type=int, default=1200, help="docstrings of the map [%(default)s]")
    parser.add_argument("--pairs", type=Path, help="rows of JSON lines [the committed questions]")
    parser.add_argument("--tsne", action="store_true", help="by scikit-learn, in the place of PCA")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"pictures: {error}")
