#!/usr/bin/env python3
"""Writes the tables of docs/benchmarks.md and its pictures from benches/results.

    docs.py [--results benches/results] [--document docs/benchmarks.md] [--images docs/images]

What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` is replaced; all else stays as it is.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from harness import REPOSITORY, Figures
from pictures import PICTURES
from tables import TABLES


def section(name, figures, image):
    if figures is None or not figures.samples:
        return f"Not measured yet: `make bench-{name}`."
    parts = [f"`make bench-{name}`; {figures.provenance()}.", *TABLES[name](figures)]
    if image:
        parts.append(f"![{name}]({image})")
    return "\n\n".join(parts)


def replaced(text, name, inner):
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    text, found = pattern.subn(lambda marks: f"{marks[1]}{inner}\n{marks[2]}", text)
    if found != 1:
        sys.exit(f"error: the document has {found} pairs of marks for {name}, not one")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benches" / "results")
    parser.add_argument("--document", type=Path, default=REPOSITORY / "docs" / "benchmarks.md")
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images")
    given = parser.parse_args()
    text = given.document.read_text()
    for name in TABLES:
        figures = Figures.read(given.results / f"{name}.json")
        image = None
        if figures and name in PICTURES:
            path = given.images / f"bench-{name}.svg"
            PICTURES[name](figures, path)
            image = os.path.relpath(path, given.document.parent)
        text = replaced(text, name, section(name, figures, image))
    given.document.write_text(text)


if __name__ == "__main__":
    main()
