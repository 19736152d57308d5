"""Layouts: which columns of a row hold its conversation, and how they become turns.

A further layout is one more `register(Layout(...))`. Readers of files and the checks of rows ask what it declares, and
know no column by name.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from vlskv_ray.data.image_columns import IMAGE_COLUMNS
from vlskv_ray.data.sample import Rejected, SourceError

TEXT = "text"


@dataclass(frozen=True)
class Layout:
    """One way of writing conversations in columns. A source is read in one layout, which travels with it to workers."""

    name: str
    required: Mapping[str, str | tuple[str, ...]]
    """The columns that it needs, and what each holds: TEXT; a list of objects, by the keys of them that are read; or
    anything else, in words. Rows in which a column holds no text, or no such list, never reach `make_turns`."""
    make_turns: Callable[[Mapping[str, Any]], Any]
    """Makes a list of {"role": "system", "user" or "assistant", "content": text or parts} of a row's columns. It may
    raise `Rejected`. It is pickled with the source: a function of a module, which must be importable where rows are
    read, or one of the script that runs."""
    optional: tuple[str, ...] = ()
    """Columns beside them that `make_turns` reads where they are there."""
    image_columns: tuple[str, ...] = IMAGE_COLUMNS
    """In which a row may have its pictures, preferred first. They come where a question's text has `<image>`, or before
    the first question."""

    @functools.cached_property  # asked for each row
    def columns(self) -> tuple[str, ...]:
        """All that is read."""
        return tuple(dict.fromkeys((*self.required, *self.optional, *self.image_columns)))

    def __str__(self) -> str:
        """What is wanted, for a reader."""
        held = {
            column: what if isinstance(what, str) else f"list of {{{', '.join(what)}}}"
            for column, what in self.required.items()
        }
        wanted = " and ".join(f"{column} ({what})" for column, what in held.items())
        return wanted + (f", with {' or '.join(self.image_columns)} for images" if self.image_columns else "")


LAYOUTS: dict[str, Layout] = {}
"""By name, see `register`."""


def register(layout: Layout) -> None:
    """Adds a layout to those in which sources are opened from now on.

    Raises:
        ValueError: it needs no column, takes pictures from a column of text, has the name of another, or needs the very
            columns of another, so that no source could tell them apart.
    """
    if not layout.required:
        raise ValueError(f"the layout {layout.name!r} needs no column, so it would fit every source")
    texts = {column for column, what in layout.required.items() if what == TEXT}
    if both := texts & set(layout.image_columns):
        raise ValueError(f"the layout {layout.name!r} has {min(both)!r} for text and for pictures; wanted one of them")
    for other in LAYOUTS.values():
        if layout.name == other.name or layout.required.keys() == other.required.keys():
            same = "name" if layout.name == other.name else "columns"
            raise ValueError(f"the layout {layout.name!r} has the {same} of the layout {other.name!r}")
    LAYOUTS[layout.name] = layout


register(Layout("messages", {"messages": ("role", "content")}, itemgetter("messages")))


def find_layout(columns: Iterable[str], ignored: Collection[str] = ()) -> Layout:
    """The one layout that these columns fit.

    Of several, the one that needs all columns of another and more is preferred to it; one that needs a column among
    those `ignored` is not meant.

    Raises:
        Rejected: schema: they fit none, or several.
    """
    columns = list(columns)
    fitting = [layout for layout in LAYOUTS.values() if layout.required.keys() <= {*columns}]
    if not fitting:
        raise no_fit(columns, known_layouts())
    if len(fitting) == 1:
        return fitting[0]
    meant = [layout for layout in fitting if layout.required.keys().isdisjoint(ignored)]
    meant = [layout for layout in meant if not any(layout.required.keys() < of.required.keys() for of in meant)]
    if len(meant) != 1:
        names = [f"{layout.name} ({', '.join(layout.required)})" for layout in meant or fitting]
        remedy = "to read it in one of them, list a column of each of the others in ignore_columns of the source"
        raise Rejected("schema", f"has the columns of {len(names)} layouts: {' and '.join(names)}; {remedy}")
    return meant[0]


def has_known_column(columns: Collection[str]) -> bool:
    """Whether any layout needs one of these columns."""
    return any(column in columns for layout in LAYOUTS.values() for column in layout.required)


def known_layouts() -> str:
    """What every layout wants, for a reader."""
    return "; or ".join(map(str, LAYOUTS.values()))


def no_fit(columns: Iterable[str], wanted: str) -> Rejected:
    """Why a row of these columns is in no layout that is wanted."""
    return Rejected("schema", f"found the columns {', '.join(map(repr, columns)) or '(none)'}; wanted {wanted}")


def layout_of_file(columns: Iterable[str], place: str, ignored: Collection[str], so_far: Layout | None) -> Layout:
    """The layout of a file, the same as of the files of its source before it.

    Args:
        columns: of the file.
        place: whose they are, for a reader.
        ignored: see `find_layout`.
        so_far: the layout of the files before it; None: it is the first.

    Raises:
        SourceError: it has none, or another one.
    """
    try:
        layout = find_layout(columns, ignored)
    except Rejected as reason:
        raise SourceError(f"{place}: {reason.detail}") from reason
    if so_far is not None and layout is not so_far:
        raise SourceError(
            f"{place}: has the layout {layout.name}, and files before it {so_far.name}; list them as two sources"
        )
    return layout
