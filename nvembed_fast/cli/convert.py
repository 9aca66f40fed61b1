"""nvembed-fast convert."""

import argparse

from nvembed_fast.cli import options

SUMMARY = "Write a data set in another form as rows for training."
EXAMPLES = """\
examples:
  nvembed-fast convert triplets.jsonl -o rows.jsonl --form triplets
  nvembed-fast convert reviews.csv -o rows.jsonl --form labels --field text=review --field label=stars
  nvembed-fast convert sts.tsv -o rows.jsonl --form scores --min-score 4"""
_FORMS = ("triplets", "tevatron", "labels", "scores")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=options.path,
        help="JSON lines, .csv or .tsv (also gzipped), .arrow or .parquet; - reads JSON lines from standard "
        "input",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=options.path, metavar="FILE", help="JSON lines, replaced"
    )
    parser.add_argument(
        "--form",
        required=True,
        choices=_FORMS,
        help="triplets: anchor, positive, negative. tevatron: query, positive_passages, negative_passages. "
        "labels: text, label. scores: sentence1, sentence2, score",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="what the file calls a field of the form, such as anchor=question (repeatable)",
    )
    parser.add_argument("--min-score", type=float, help="of scores: pairs count as similar from here on")


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast.training.converters import convert

    fields = {}
    for field in arguments.field:
        name, equals, key = field.partition("=")
        if not (name and equals and key):
            raise ValueError(f"--field takes NAME=KEY, such as anchor=question, got {field!r}")
        fields[name] = key
    num_rows, num_without = convert(
        arguments.file, arguments.output, arguments.form, fields=fields, min_score=arguments.min_score
    )
    dropped = f", {num_without} records gave none" if num_without else ""
    print(f"{arguments.output}: {num_rows} rows{dropped}")
