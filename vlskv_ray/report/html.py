"""The pieces of a page that needs nothing but itself: the document, its tables, its style."""

from collections.abc import Sequence
from html import escape


def document(title: str, header: str, body: str) -> str:
    """A page that needs nothing but itself; header and body are HTML, the title is not."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
{header}</header>
{body}</main>
</body>
</html>
"""


def grid(plots: str) -> str:
    return f'<div class="plots">{plots}</div>\n' if plots else ""


def html_table(head: Sequence[str], rows: Sequence[tuple[str, list[str]]], caption: str) -> str:
    """A table of labels and texts, none of them HTML; without a head it is a list of facts. Nothing without rows."""
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>\n'
        for label, texts in rows
    )
    return (
        f'<div class="scroll"><table class="{"figures" if head else "facts"}">\n<caption>{escape(caption)}</caption>\n'
        + (f"<thead><tr><td></td>{titles}</tr></thead>\n" if head else "")
        + f"<tbody>\n{lines}</tbody>\n</table></div>\n"
    )


CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --faint: #d5dbe1; --paper: #fdfdfc; --card: #f4f5f3;
  --teacher: #6b7785; --student: #1f6fb2; --third: #b4570f; --right: #1b7040; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa7b4; --faint: #3c4650; --paper: #14181c; --card: #1d2328;
    --teacher: #a3b0bd; --student: #6db3ee; --third: #eda263; --right: #6fcf97; --wrong: #f28b82; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem; }
header p, section > p, caption, figcaption { color: var(--soft); overflow-wrap: anywhere; }
.headline { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0; }
.headline div { flex: 1 1 8.5rem; padding: .7rem .9rem; background: var(--card); border-radius: .5rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
caption { caption-side: bottom; padding-top: .5rem; text-align: left; font-size: .85rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--faint); text-align: left; vertical-align: top; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .85rem; }
.facts th { width: 11rem; color: var(--soft); }
.facts td { overflow-wrap: anywhere; }
.figures thead td { width: 40%; }
.figures td, .figures thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.plots { display: grid; gap: 1rem; margin-bottom: 1rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
section > figure { max-width: 32rem; }
figcaption { font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
article { padding: .75rem; background: var(--card); border-radius: .5rem; overflow-wrap: anywhere; }
article caption { caption-side: top; padding: 0 0 .25rem; }
article th { width: 8rem; color: var(--soft); font-size: .85rem; }
article td { white-space: pre-wrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .5rem; }
.pictures img { max-width: 100%; height: 8rem; object-fit: contain; border-radius: .25rem; }
.right, .wrong { white-space: nowrap; font-size: .85rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.differs { border-bottom: 1px dotted var(--third); }
.warning { padding: .6rem .9rem; border-left: .25rem solid var(--third); background: var(--card); }
pre { overflow-x: auto; padding: .9rem; background: var(--card); border-radius: .5rem; font-size: .8rem; }
@media (max-width: 32rem) {
  .figures, .facts { font-size: .88rem; }
  .figures thead td { width: auto; }
  .figures thead th { white-space: normal; }
  .facts th { width: 7rem; }
}
"""
