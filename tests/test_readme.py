"""The pages say what is true: rooms and modules are the package's, links lead somewhere, commands are understood.

Figures are those that the commands beside them write.
"""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from benchmarks import step
from vlskv_ray import train
from vlskv_ray.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = (
    *(
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        "configs/real/README.md",
        "recipes/README.md",
    ),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def tree(text: str) -> list[tuple[int, str, str]]:
    """Depth, name and description of each line of the package's tree in a page."""
    (block,) = [block for block in blocks(text, "text") if block.startswith("vlskv_ray/")]
    found = []
    for line in block.splitlines():
        match = re.match(r"([│├└─ ]*)([\w./]+)", line)
        assert match is not None, line
        found.append((len(match[1]) // 4, match[2], line.removeprefix(match[0]).strip()))
    return found


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1950


def test_its_rooms_are_those_of_the_package() -> None:
    """Each with a line that says what is in it."""
    lines = tree(README)
    assert all(description for _, _, description in lines)
    rooms = {f"{file.parent.name}/" for file in (ROOT / "vlskv_ray").glob("*/*.py")}
    assert {name for depth, name, _ in lines if depth == 1} == rooms
    assert all((ROOT / name).is_dir() for depth, name, _ in lines if depth == 0)


def test_the_tree_is_the_tree() -> None:
    """Every module of the package is in docs/tree.md, with a line, and nothing else."""
    folders, listed = ["vlskv_ray"], set()
    for depth, name, description in tree((ROOT / "docs/tree.md").read_text())[1:]:
        if depth == 0:
            assert (ROOT / name).is_dir(), name
            continue
        folders = [*folders[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            listed.add("/".join(folders))
            assert description, f"{name}: what is it for?"
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "vlskv_ray").rglob("*.py")}
    assert listed == {file for file in files if file.count("/") == 1 or not file.endswith("/__init__.py")}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To a file or folder of the project and, where they name one, a heading in it."""
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_index_lists_every_page_of_docs() -> None:
    linked = re.findall(r"^\| \[([\w.]+)\]", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
    assert sorted([*linked, "README.md"]) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_snippets_import_what_exists(page: str) -> None:
    """What the one in README.md does is tested on a run's student."""
    for snippet in blocks((ROOT / page).read_text(), "python"):
        for line in re.findall(r"^(?:from|import) .+$", snippet, re.MULTILINE):
            exec(line, {})


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(), re.M)}
    assert {"train", "test", "figures"} <= targets
    assert all(f"\n{target}: " in makefile for target in targets), targets


@cache
def commands() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Page, module and arguments of the commands of all pages, each once."""
    found = {}
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        of_script = rf"\bvlskv-ray (?={'|'.join(COMMANDS)}\b)"  # see `__main__.py`
        text = re.sub(of_script, "python -m vlskv_ray.", text)
        for module, rest in re.findall(r"python -m ((?:vlskv_ray|benchmarks|recipes)\.\w+)\b([^`\n]*)", text):
            for inner in (rest, rest.rstrip("'\"")):  # some stand in a quoted command of another program
                try:
                    found[module, inner] = (page, module, tuple(shlex.split(inner, comments=True)))
                    break
                except ValueError:
                    continue
            else:
                raise AssertionError(f"{page}: {rest}")
    return tuple(found.values())


@pytest.mark.parametrize(("page", "module", "arguments"), commands())
def test_commands_are_understood(
    page: str,
    module: str,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their options exist and take these values; a config that they name is read with the values that they set."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main([*arguments, "--help"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    for option in arguments:
        assert not option.startswith("--") or re.search(rf"{option}\b", printed.out), f"{page}: {option}"
    config = next((part for part in arguments if part.startswith("configs/")), None)
    if config and module.startswith("vlskv_ray."):
        overrides = [part for part in arguments if re.match(r"[a-z_.]+=", part)]
        assert train.main(["--config", config, *overrides, "--print-config"]) == 0, capsys.readouterr().err
        assert "name_or_path" in capsys.readouterr().out


def test_every_kind_of_command_is_shown() -> None:
    """A pattern that finds no command would test none."""
    shown = {module.removeprefix("vlskv_ray.") for _, module, _ in commands() if module.startswith("vlskv_ray.")}
    assert shown == set(COMMANDS)


def test_figures_have_their_places() -> None:
    """Each block that `make figures` writes, once in its page; pages hold no other."""
    recipe = (ROOT / "Makefile").read_text()
    written = re.findall(r"--into (\S+) (?:\\\s*)?--block ([\w$]+)", recipe)
    written += [("docs/sweeps.md", "figures"), ("docs/sweeps.md", "probe"), ("README.md", "speed")]  # by default
    runs = re.search(r"for run in ([\w ]+); do \$\(BIN\)/python -m vlskv_ray.compare", recipe)
    assert runs is not None
    wanted = {(page, run) for page, name in written for run in (runs[1].split() if name == "$$run" else [name])}
    found = [
        (page, name)
        for page in ("README.md", "docs/results.md", "docs/sweeps.md", "docs/teacher.md")
        for name in re.findall(r"^<!-- (\w+): begin -->$", (ROOT / page).read_text(), re.MULTILINE)
    ]
    assert sorted(found) == sorted(wanted)


def test_speed_is_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables of README.md and of benchmarks/README.md are those that the command makes of benchmarks/step.json."""
    stored = ["--from", str(ROOT / "benchmarks/step.json")]
    assert step.main(stored) == 0
    assert capsys.readouterr().out.partition("\n\n")[0] in (ROOT / "benchmarks/README.md").read_text()
    page = tmp_path / "README.md"
    page.write_text(README)
    assert step.main([*stored, "--model", "mid", "--micro-batch", "1", "--into", str(page)]) == 0
    assert page.read_text() == README


def test_results_agree() -> None:
    """The figures of the short table in README.md stand in the whole one, so both are of one run."""
    whole = (ROOT / "docs/results.md").read_text()
    rows = dict(re.findall(r"^\| ([\w, -]+?) \| (.+) \|$", README.partition("<!-- quickstart: end -->")[0], re.M))
    for label in ("accuracy", "KL per token, mean", "top-1 agreement", "prefill CPU time", "prefill operations"):
        figures = [figure for figure in re.sub(r"\(.*\)", "", rows[label]).replace("|", " ").split("  ") if figure]
        (line,) = re.findall(rf"^{label}  +(.+)$", whole, re.MULTILINE)
        assert figures and all(figure.strip() in line for figure in figures), label
