"""How texts that come from elsewhere are written on a terminal."""


def printable(text: str) -> str:
    """A text on one line of a terminal: what would steer it, such as an escape sequence, is written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))
