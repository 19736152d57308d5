"""Tables in Markdown, and texts put into a page."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlskv_ray.files import write_text
from vlskv_ray.report.figures import Rows


def markdown_table(head: Sequence[str], rows: Rows, corner: str = "") -> str:
    """A Markdown table of plain texts; nothing without rows."""
    if not rows:
        return ""
    lines = [[corner, *head], *([label, *texts] for label, texts in rows)]
    cells = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines]
    return "\n".join([cells[0], "| --- |" + " ---: |" * len(head), *cells[1:]])


def write_block(page: Path, name: str, text: str) -> None:
    """Puts a text between the two lines that mark its place in a page. ValueError where they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = page.resolve()  # a link stays one
    try:
        old = page.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--into: {page} cannot be read: {error}") from error
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    if (old.count(begin), old.count(end), rest.count(end)) != (1, 1, 1):  # else what stands between would be lost
        raise ValueError(f"--into: {page} has no place for it; wanted the lines {begin} and {end}, once each")
    line_end = "\r\n" if "\r\n" in old else "\n"
    mode = page.stat().st_mode
    write_text(page, before + line_end.join([begin, *text.split("\n"), end]) + after)
    page.chmod(mode)


def escape_markdown(text: Any) -> str:
    """A text that Markdown shows as it is, on one line: neither markup nor HTML nor the end of a table's cell."""
    escaped = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escaped)
