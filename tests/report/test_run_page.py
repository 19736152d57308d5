"""The report of a run is one safe, whole page that shows every figure there is, and says what there is not."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import (
    PICTURE,
    PLOTS,
    SAVINGS,
    SECTIONS,
    SUMMARY,
    Page,
    evaluation,
    free_text,
    metrics,
    of_earlier_version,
    planted,
    planted_run,
    run_folder,
    sft_evaluation,
    written,
)
from waiting import HANG_SECONDS

from vlskv_ray.report.figures import result_rows
from vlskv_ray.report.model_card import write_model_card
from vlskv_ray.report.plots import curve
from vlskv_ray.report.run_page import write_report
from vlskv_ray.report.summary import evaluation_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that has everything."""
    return write_report(run_folder(tmp_path_factory.mktemp("whole"), evaluation=evaluation()))


def test_a_whole_run_shows_everything(whole: Path) -> None:
    """Every section, plot and picture is there, and every figure that stands in a table of it."""
    page = Page(whole.read_text())
    assert page.ids("section") == SECTIONS
    assert page.ids("figure") == PLOTS
    assert [image["src"] for image in page.all("img")] == [PICTURE] * 6
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["aria-label"] for svg in page.all("svg")) and len(page.all("svg")) == len(PLOTS)
    assert len(page.all("article")) == 8
    cells = [line for table in page.tables for line in table]
    assert ["accuracy", "94.0%", "31.0%", "92.0%"] in cells
    assert ["KL per token, mean", "0", "1.913", "0.01234"] in cells
    assert ["colour (40)", "94.0%", "31.0%", "92.0%"] in cells
    assert ["prefill operations", "19 GFLOP", "10.1 GFLOP", "0.53"] in cells
    assert ["too_long", "12"] in cells and ["torch", "2.13.0+cpu"] in cells
    assert ["teacher", "red ✓ right"] in cells and ["student copied", "blue ✗ wrong"] in cells
    assert tiles(whole.read_text()) == [
        ("mean KL", "1.913 → 0.01234"),
        ("top-1 agreement", "62.2% → 98.1%"),
        ("perplexity, teacher / student", "1.106 / 1.12"),
        ("agreed greedy prefix", "62.2% → 98.1%"),
        ("prefill operations saved", "46.8%"),
        ("accuracy kept", "97.9%"),
        ("training", "246 s"),
    ]


def tiles(page: str) -> list[tuple[str, str]]:
    """What heads a page: labels and figures."""
    return re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)


def test_the_measures_come_in_the_order_of_what_they_say(whole: Path) -> None:
    """Of any answers first, then exact match."""
    page = Page(whole.read_text())
    assert [label for label, *_ in page.tables[0][1:]] == [
        *("KL per token, mean", "KL per token, 95th percentile", "top-1 agreement", "perplexity", "cross-entropy"),
        *("agreed greedy prefix, tokens", "agreed greedy prefix, share"),
        *("accuracy", "accuracy, with images", "accuracy, text only"),
    ]


@pytest.mark.parametrize("objective", ["distill", "sft"])
def test_free_text_has_no_accuracy(tmp_path: Path, objective: str) -> None:
    """Where no reference is given word for word, no figure, mark or curve is of exact match, and it is said why."""
    found = free_text(evaluation() if objective == "distill" else sft_evaluation())
    folder = run_folder(tmp_path, objective=objective, evaluation=found)
    page = written(folder)
    shown = page.text[: page.text.index("Configuration")]
    assert not re.search(r"\b0\.0%|✓|✗", shown)
    who = "teacher" if objective == "distill" else "model"
    assert shown.count("ccuracy") == shown.count("matches its reference word for word, so no accuracy is shown.") == 1
    assert f"None of the {who}'s matches" in shown
    labels = [label for label, _ in tiles((folder / "report.html").read_text())]
    assert labels[:2] == (["mean KL", "top-1 agreement"] if objective == "distill" else ["cross-entropy", "perplexity"])


def test_accuracy_where_the_teacher_has_hardly_any_right_is_not_shown(tmp_path: Path) -> None:
    """A few of many match by chance: no student is judged by what it kept of those."""
    found = evaluation()
    for side in ("teacher", "student_before", "student"):
        found[side] |= {"accuracy": 0.06, "accuracy_vision": 0.02, "accuracy_text": 0.0}
        found[side]["by_kind"] |= {"count": 0.01}
    folder = run_folder(tmp_path, evaluation=found, plots=False)
    page = written(folder)
    assert "accuracy kept" in dict(tiles((folder / "report.html").read_text()))
    labels = [label for table in page.tables[:2] for label, *_ in table]
    assert {"accuracy", "colour (40)", "sum (30)"} <= set(labels)
    assert not {"accuracy, with images", "accuracy, text only", "count (30)"} & set(labels)
    found["teacher"]["accuracy"] = 0.04
    folder = run_folder(tmp_path / "other", evaluation=found, plots=False)
    page = written(folder)
    assert "accuracy kept" not in dict(tiles((folder / "report.html").read_text()))
    assert "accuracy" not in [label for table in page.tables[:2] for label, *_ in table]


def test_a_run_of_an_earlier_version_is_a_page(tmp_path: Path) -> None:
    """What it did not measure is left out; its times are those of a clock."""
    folder = run_folder(tmp_path, evaluation=of_earlier_version(evaluation()))
    page = written(folder)
    assert page.ids("section") == SECTIONS and page.ids("figure") == PLOTS
    labels = {label for table in page.tables for label, *_ in table}
    newer = {"perplexity", "agreed greedy prefix, share", "prefill CPU time"}
    assert "prefill time" in labels and not newer & labels
    assert "Prefill of a prompt of 2,048 tokens, with threads: 2. Teacher and student in turn, medians." in page.text
    assert "Seconds until the first token" in page.text and "CPU seconds" not in page.text


@pytest.mark.parametrize(("ratio", "warned"), [(0.32, True), (0.36, False), (0.79, False), (0.81, True)])
@pytest.mark.parametrize("name", ["prefill_cpu_time_ratio", "prefill_time_ratio"])
def test_times_that_contradict_the_operations_are_warned_of(
    tmp_path: Path, name: str, ratio: float, warned: bool
) -> None:
    """By more than a factor of 1.5 off their 0.5316, in report, card and table."""
    found = evaluation()
    found["savings"][name] = ratio
    folder = run_folder(tmp_path, evaluation=found, plots=False)
    (folder / "final").mkdir()
    texts = [written(folder).text, write_model_card(folder).read_text(), "\n".join(evaluation_table(found))]
    label = "prefill CPU time" if "cpu" in name else "prefill time"
    for text in texts:
        assert (f"Warning: the ratio of {label} ({ratio}) is more than a factor of 1.5 off" in text) == warned
        assert ("(0.53): the machine was busy" in text) == warned


def test_an_answer_is_set_off_where_it_leaves_the_teachers(tmp_path: Path) -> None:
    """Nothing of one that does not; a long one is cut and says how long it is."""
    found = evaluation()
    long = "so " * 2000
    for example, student in zip(found["examples"], ("red", "rose & <b>", "reddish", "blue", "", long), strict=False):
        example["student"] = student
    folder = run_folder(tmp_path, evaluation=found, plots=False)
    page = written(folder)
    source = (folder / "report.html").read_text()
    of_student = re.findall('<th scope="row">student distilled</th><td>(.*?) <span class="(?:right|wrong)', source)
    assert of_student[:5] == [
        "red",
        'r<span class="differs">ose &amp; &lt;b&gt;</span>',
        'red<span class="differs">dish</span>',
        '<span class="differs">blue</span>',
        "",
    ]
    assert len(of_student[5]) < 2100 and "… (of 6,000 characters)" in of_student[5]
    assert "dotted from where an answer is no longer the teacher's" in page.text


def test_rows_match_their_columns(whole: Path) -> None:
    page = Page(whole.read_text())
    assert all(len({len(line) for line in table}) == 1 for table in page.tables)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</pre></section><b>", "&lt;b&gt;"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, text: str) -> None:
    """In questions, answers, ids, kinds, reasons, names and config: the same elements, and the text as it is."""
    harmless = written(
        run_folder(tmp_path / "harmless", evaluation=planted("harmless"), plots=False, **planted_run("harmless"))
    )
    page = written(run_folder(tmp_path / "hostile", evaluation=planted(text), plots=False, **planted_run(text)))
    assert [name for name, _ in page.elements] == [name for name, _ in harmless.elements]
    assert page.text.count(text) == harmless.text.count("harmless") >= 60
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_only_images_in_data_uris_are_shown(tmp_path: Path) -> None:
    """Whatever else stands where a picture should is left out, and said to be."""
    found = evaluation()
    for uri in (
        "http://example.org/a.png",
        "file:///etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        PICTURE + "\n",
        PICTURE + '" onload="alert(1)',
        None,
    ):
        found["examples"] = [evaluation()["examples"][0] | {"images": [uri, PICTURE]}]
        page = written(run_folder(tmp_path, evaluation=found, plots=False))
        assert [image["src"] for image in page.all("img")] == [PICTURE]
        assert "1 not shown" in page.text


def test_the_page_loads_nothing(whole: Path) -> None:
    """No script, link or address that leads out of the page, and the browser is told to follow none."""
    page = Page(whole.read_text())
    assert {"script", "link", "iframe", "object", "embed", "base", "form"}.isdisjoint(name for name, _ in page.elements)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/"))
    source = whole.read_text()
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert any(str(meta.get("content")).startswith("default-src 'none'") for meta in page.all("meta"))


def test_ids_are_unique_and_references_lead_somewhere(whole: Path) -> None:
    """The parts of one plot are never taken for those of another."""
    page = Page(whole.read_text())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', whole.read_text())
    assert used and set(used) <= set(ids)


def test_plots_follow_the_page_into_the_dark(whole: Path) -> None:
    """No colour is fixed in a plot."""
    source = whole.read_text()
    assert not re.findall(r"(?:fill|stroke): *#[0-9a-f]+", source)


def test_the_same_files_make_the_same_page(whole: Path) -> None:
    before = whole.read_bytes()
    assert write_report(whole.parent).read_bytes() == before


def test_without_held_out_samples_it_says_so(tmp_path: Path) -> None:
    """What the student saves still shows."""
    page = written(run_folder(tmp_path, evaluation={"savings": SAVINGS, "examples": []}))
    assert page.ids("section") == [name for name in SECTIONS if name != "samples"]
    assert "No held-out samples were given (evaluation.sources), so answers were not measured." in page.text
    assert "accuracy kept" not in page.text and "prefill operations saved" in page.text


def test_a_plain_model_has_one_column(tmp_path: Path) -> None:
    """Supervised fine-tuning: no teacher, no savings, nothing about SwiftKV."""
    page = written(run_folder(tmp_path, objective="sft", evaluation=sft_evaluation()))
    assert page.ids("section") == [name for name in SECTIONS if name not in ("prefill", "savings")]
    assert page.ids("figure") == [name for name in PLOTS if name != "prefill-time"]
    assert ["", "model"] in page.tables[0] and ["accuracy", "94.0%"] in page.tables[0]
    assert "SwiftKV" not in page.text and "KL" not in page.text


def test_an_empty_folder_is_a_page_too(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert page.ids("section") == ["result"]
    assert "This run was not evaluated." in page.text


def test_missing_numbers_show_as_a_dash(tmp_path: Path) -> None:
    """null, a text and NaN where a number belongs; the rest of the page stands."""
    found = evaluation()
    found["student"] |= {"accuracy": None, "kl_mean": "many", "cross_entropy": math.nan, "by_kind": None}
    found["savings"] |= {"teacher_prefill_seconds": [], "student_prefill_flops": None, "cache_bytes_ratio": None}
    page = written(run_folder(tmp_path, evaluation=found, plots=False))
    cells = [line for table in page.tables for line in table]
    assert ["accuracy", "94.0%", "31.0%", "–"] in cells
    assert ["KL per token, mean", "0", "1.913", "–"] in cells
    assert ["cross-entropy", "0.101", "2.207", "–"] in cells
    assert ["colour (40)", "94.0%", "31.0%", "–"] in cells
    assert ["prefill time", "–", "260 ms", "0.55"] in cells
    assert ["cache bytes per token", "2,048", "1,536", "–"] in cells
    assert not re.search(r"\b(None|nan|null)\b", page.text[: page.text.index("Configuration")])


def test_nothing_left_out_is_said(tmp_path: Path) -> None:
    page = written(run_folder(tmp_path, summary=SUMMARY | {"rejected": {}}, plots=False))
    assert [["", "rows"], ["none", "0"]] in page.tables


def test_long_runs_are_averaged(whole: Path) -> None:
    """400 steps become 100 points with the same mean, 60 stay as they are; the caption says so."""
    lines = metrics("distill")
    points = curve(lines, "loss")
    assert len(points) == 100 and points[0][0] == 2.5
    assert sum(y for _, y in points) / 100 == pytest.approx(sum(line["loss"] for line in lines) / 400)
    assert curve(lines[:60], "loss") == [(line["step"], line["loss"]) for line in lines[:60]]
    assert "averaged to at most 120 points a curve" in Page(whole.read_text()).text


@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "metrics.jsonl", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run_folder(tmp_path, evaluation=evaluation())
    for damage in ("{", "[]"):
        (tmp_path / name).write_text(damage)
        with pytest.raises(ValueError, match=re.escape(name)):
            write_report(tmp_path)


def test_text_that_no_file_can_hold_does_no_harm(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    found = evaluation()
    found["examples"][0]["student"] = "\ud800 red"
    assert "? red" in written(run_folder(tmp_path, evaluation=found, plots=False)).text


def test_a_browser_shows_it(whole: Path, tmp_path: Path) -> None:
    """Its own parser finds the sections and plots."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    found = subprocess.run([chromium, *flags, whole.as_uri()], capture_output=True, text=True, timeout=HANG_SECONDS)
    dom = Page(found.stdout)
    assert dom.ids("section") == SECTIONS and dom.ids("figure") == PLOTS


def test_kl_by_modality_shows_where_there_are_both() -> None:
    """Of one alone it is the mean of all."""
    teacher, student = ({"kl_mean": kl, "kl_vision": kl, "kl_text": kl / 2} for kl in (0.0, 0.5))
    evaluation = {"teacher": teacher, "student": student}
    rows = dict(result_rows(evaluation))
    assert rows["KL per token, with images"] == ["0", "0.5"] and rows["KL per token, text only"] == ["0", "0.25"]
    teacher["kl_text"] = student["kl_text"] = None
    assert list(dict(result_rows(evaluation))) == ["KL per token, mean"]
