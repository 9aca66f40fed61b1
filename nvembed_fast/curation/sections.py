"""Pairs out of documentation: a heading finds the section below it."""

import re
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast import packages
from nvembed_fast.curation.text import Pair, plain

__all__ = ["rst_sections"]

_HEADING = re.compile(r"^(?:([=\-~^\"'`#*+.]{3,})\n)?(\S[^\n]{1,150})\n([=\-~^\"'`#*+.:])\3{2,}[ \t]*$", re.M)
_GENERIC = re.compile(
    r"(?i)(notes?|examples?|overview|introduction|summary|description|usage|see also|references?|parameters|"
    r"footnotes|options|details|remarks|background|about|changes?|miscellaneous|misc|other|warnings?|"
    r"attributes|methods|arguments|syntax|contents?|bugs?( ?fixes)?|features|general|limitations|"
    r"backwards?[- ]incompatible.*|deprecat.*|new features.*|what's new.*|contributors?|authors?|todo|"
    r"pull requests.*|v?\.?[\d.]+.*|release .*|minor features|api( reference)?|indices.*)"
)


def rst_sections(archive: Path, pattern: str, skip: str = r"(?!)") -> Iterator[Pair]:
    """Headings and their sections of the files that fit `pattern`, without those whose path `skip` finds.

    A heading that says nothing by itself ("Options") stands behind the title of its page.
    """
    for name, content in packages.members(archive, pattern):
        if re.search(skip, name, re.IGNORECASE):
            continue
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        title, found = "", list(_HEADING.finditer(text))
        for match, following in zip(found, [*found[1:], None], strict=False):
            heading = plain(match[2])
            title = title or heading
            body = plain(text[match.end() : following.start() if following else len(text)])
            if _GENERIC.fullmatch(heading):
                if heading == title:
                    continue
                heading = f"{title}: {heading}"
            yield Pair(heading, body, name)
