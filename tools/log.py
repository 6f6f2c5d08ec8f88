"""Writes the index at the top of dev/LOG.md from the log's own headings: `python -m tools.log`.

A heading is `### L042 cuda, attention: what was tried [kept]`; `## 2026-11-22: theme` stands over the entries of one sitting.
"""

import collections
import pathlib
import re
import textwrap
from typing import NamedTuple

LOG = pathlib.Path(__file__).parents[1] / "dev" / "LOG.md"
BEGIN, END = "<!-- index: python -m tools.log -->\n", "<!-- /index -->"
VERDICTS = ("kept", "dropped", "measured", "open")
HEADING = re.compile(r"### (?P<id>L\d{3}) (?P<topics>[\w, ]+): (?P<title>.+) \[(?P<verdict>\w+)\]")


class Entry(NamedTuple):
    id: str
    topics: list[str]
    title: str
    verdict: str


def entries(log: str) -> list[Entry]:
    """In the log's order. Raises ValueError with the line of a heading that is not of the form above."""
    found = []
    for line in log.splitlines():
        if line.startswith("###"):
            if not (heading := HEADING.fullmatch(line)) or heading["verdict"] not in VERDICTS:
                raise ValueError(f"dev/LOG.md: not `### L042 topic, topic: title [{'|'.join(VERDICTS)}]`: {line}")
            found.append(Entry(heading["id"], heading["topics"].split(", "), heading["title"], heading["verdict"]))
    return found


def index(log: str) -> str:
    """A list: topic, verdict, ids. An entry stands under each of its topics."""
    by_topic: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: {verdict: [] for verdict in VERDICTS})
    for entry in entries(log):
        for topic in entry.topics:
            by_topic[topic][entry.verdict].append(entry.id)
    lines = []
    for topic, ids in sorted(by_topic.items()):
        text = "; ".join(f"{verdict} {' '.join(ids[verdict])}" for verdict in VERDICTS if ids[verdict])
        lines += textwrap.wrap(f"- **{topic}**: {text}", 128, subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def main() -> None:
    log = LOG.read_text()
    before, rest = log.split(BEGIN)
    LOG.write_text(before + BEGIN + index(log) + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
