"""Writes the table of values in the chart's README from the comments of values.yaml."""

import pathlib
import re

CHART = pathlib.Path(__file__).resolve().parent.parent / "helm" / "espalier"
START, END = "<!-- values: written by scripts/chart_readme.py -->\n", "<!-- end of values -->\n"
KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):(?: (.*))?$")


def rows(text):
    """Path, default and comment of each value that has no values below it."""
    path, comment, found, lists_at = [], [], [], None
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("#").strip())
            continue
        match = KEY.match(line)
        if not match:
            if stripped.startswith("- ") and found and lists_at is None:
                # A list of blocks is the default of the key above.
                found[-1][1] = (found[-1][1] + " " + stripped).strip()
            if not stripped:
                comment = []
            continue
        depth, key, value = len(match[1]) // 2, match[2], (match[3] or "").strip()
        path[depth:] = [key]
        found.append([".".join(path), value, " ".join(comment), depth])
        comment = []
    for place, (name, value, said, _) in enumerate(found):
        below = any(other.startswith(name + ".") for other, *_ in found[place + 1 :])
        if not below or said:
            yield name, "" if below else value, said


def table():
    lines = ["| value | default | |", "| --- | --- | --- |"]
    for name, value, said in rows((CHART / "values.yaml").read_text()):
        shown = f"`{value}`" if value else ""
        lines.append(f"| `{name}` | {shown} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def readme():
    text = (CHART / "README.md").read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme())
