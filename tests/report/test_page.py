"""The report: what it says for runs in every state, and that it is safe, self-contained and whole."""

from __future__ import annotations

import errno
import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.records import Candidate, Outcome
from evomerge.report import page
from evomerge.report.figures import COLOURS
from evomerge.report.page import render, write_report
from evomerge.report.summary import Summary
from evomerge.store import Store
from tests.report.synthetic import Made, finished

FEW = {"search": 8, "select": 10, "test": 14}
VOID = {"meta", "br", "path", "use", "circle", "link", "input"}


class Reader(HTMLParser):
    """Reads a page: raises on tags that do not match, collects attributes, texts and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        if self.open:
            raise ValueError(f"still open: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and self.open.pop() != tag:
            raise ValueError(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if self.rows and self.rows[-1] and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += f" {data.strip()}"

    def row(self, name: str) -> list[str]:
        """Return the cells of the first row that begins with a word."""
        return next(
            [cell.strip() for cell in row] for row in self.rows if row and row[0].split()[:1] == [name]
        )

    @property
    def text(self) -> str:
        """All text on one line."""
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("store") / "runs.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def full(store: Store) -> tuple[Summary, str]:
    """A finished run with everything in it, and its page."""
    finished(store, 80, name="full", counts=FEW)
    run = store.run("full")
    return Summary(run), render(run)


def _alarms(text: str) -> list[str]:
    """Return whatever could load or run something."""
    found = re.findall(r"<(?:script|link|iframe|object|embed|img|base|form)\b", text)
    found += re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", text)
    found += re.findall(r"url\((?!#)|@import|javascript:|\son\w+=", text)
    return found + [u for u in re.findall(r"https?://[^\s\"'<]+", text) if "www.w3.org" not in u]


def test_it_loads_nothing(full: tuple[Summary, str]) -> None:
    assert _alarms(full[1]) == []


def test_tags_match_and_references_resolve(full: tuple[Summary, str]) -> None:
    read = Reader(full[1])
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', full[1]))
    assert wanted
    assert {"".join(groups) for groups in wanted} <= set(ids)


def test_figures_and_tables_are_labelled(full: tuple[Summary, str]) -> None:
    read = Reader(full[1])
    drawings = [a for tag, a in read.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 8
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in drawings)
    assert all("scope" in a for tag, a in read.tags if tag == "th")
    assert [tag for tag, _ in read.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 10
    assert dict(read.tags)["html"] == {"lang": "en"}


def test_every_colour_is_defined_for_light_and_dark(full: tuple[Summary, str]) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", full[1], re.DOTALL)[:2]
    for name, value in COLOURS.items():
        assert f"--{name}: {value};" in light
        assert f"--{name}: #" in dark
    drawings = "".join(re.findall(r"<svg.*?</svg>", full[1], re.DOTALL))
    assert re.findall(r"(?<!, )#[0-9a-f]{6}\b(?!-)", drawings) == []


def test_results_are_those_of_the_summary(full: tuple[Summary, str]) -> None:
    summary, text = full
    data, read = summary.to_json(), Reader(full[1])
    best = data["best"]
    name, search, select, test = read.row("winner")
    assert f"candidate {best['candidate']}" in name
    assert search == f"{best['search']:.3f}"
    assert select.split()[0] == f"{best['select']['score']:.3f}"
    assert test == f"{best['test']['score']:.3f} {best['test']['low']:.3f} to {best['test']['high']:.3f}"
    assert "baseline, scale 0." in read.row("task_arithmetic")[0]
    assert "best on select" in read.row(data["gain"]["over"])[0]
    assert '<tr class="winner">' in text
    assert data["verdict"] in read.text


def test_failures_are_grouped(full: tuple[Summary, str]) -> None:
    row = Reader(full[1]).row("merged")
    assert row[0].startswith("merged weights are not finite")
    assert row[1:3] == ["invalid", "2"]
    assert len(row[3].split(", ")) == 2


def test_the_rest_of_the_page(full: tuple[Summary, str]) -> None:
    summary, text = full
    read = Reader(text)
    assert "method: ties" in text
    assert read.row("base")[0] == "base source"
    assert ["math", f"models/math {'0b' * 32}"] in [[c.strip() for c in row] for row in read.rows]
    assert read.row("total")[1] == str(len(summary.outcomes))
    for wanted in ("lm-eval 0.4.13", "f" * 64, "Looks at the test documents 1", "Seed 3", "1,235,814,400"):
        assert wanted in read.text
    assert ["total", "24", "30", "42"] in [[c.strip() for c in row] for row in read.rows]
    assert "search score is optimistic" in read.text


def test_a_fresh_interpreter_writes_the_same_bytes_without_torch(
    store: Store, full: tuple[Summary, str], tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from evomerge.store import Store\n"
        "from evomerge.report.page import write_report\n"
        "with Store.open(sys.argv[1]) as store: write_report(store.run('full'), Path(sys.argv[2]))\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'matplotlib.pyplot') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, store.location, str(tmp_path / "r.html")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert (tmp_path / "r.html").read_text("utf-8") == full[1]


def test_matplotlib_stays_as_it_was(full: tuple[Summary, str]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page.figures.gains([("base", page.Estimate(1.0, 0.5, 2.0))], "gain")
    assert dict(matplotlib.rcParams) == before


def test_a_run_that_is_still_searching(store: Store) -> None:
    made = Made(store, name="searching", counts=FEW, space={"method": "linear", "granularity": "layer"})
    made.baselines()
    made.search(25, resampled=True)
    text = render(store.run("searching"))
    read = Reader(text)
    assert "No winner has been chosen yet." in read.text
    assert "The run goes on" in read.text
    assert "on documents of its own" in read.text
    assert "from the standard errors" in read.text
    assert "Gain over each baseline" not in read.text
    made.run.release("stopped")
    assert "The run goes on" not in render(store.run("searching"))


def test_a_run_without_anything(store: Store) -> None:
    Made(store, name="empty")
    text = render(store.run("empty"))
    assert "No candidate has been scored." in Reader(text).text
    assert 'role="img"' not in text


def test_a_run_without_facts_or_config(store: Store) -> None:
    store.create_run("bare", {}, {}).release("stopped")
    assert "Nothing has been scored" in Reader(render(store.run("bare"))).text


def test_nothing_a_run_holds_becomes_markup(store: Store) -> None:
    evil = "<script>alert('x')</script>\x1b[31m\x00\u202e\udc80\r\n<b>"
    made = Made(
        store, name="evil", counts=FEW, sources=("math",), tasks=(evil, "$\\frac{1}{0}$", "\u6f22\u5b57" * 40)
    )
    baselines = made.baselines()
    searched = made.search(8, fails={3: ("failed", evil + "\x07" * 900), 4: ("failed", "")})
    made.finish(baselines, searched)
    made.run.set_facts({**made.run.facts, "versions": {"torch": evil}, "family": evil})
    made.run.add_event("drift_accepted", {"changes": [evil]})
    made.run.release("failed", evil)
    text = render(store.run("evil"))
    text.encode("utf-8")
    read = Reader(text)
    assert _alarms(text) == []
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", text)
    assert read.text.count("<script>alert('x')</script>") > 6
    assert "no reason given" in read.text
    assert "ended with an error" in read.text


def test_what_the_optimizer_did_by_itself_is_told(store: Store) -> None:
    made = Made(store, name="told", counts=FEW, sources=("math",))
    baselines, searched = made.baselines(), made.search(4)
    made.run.add_event("optimizer", {"note": "restarted with 16 candidates: a plateau"})
    made.finish(baselines, searched)
    made.run.add_event("optimizer_finished", {"reason": "nothing to climb"})
    made.run.release("finished")
    view = store.run("told")
    assert Summary(view).optimizer_lines() == [
        "optimizer: restarted with 16 candidates: a plateau",
        "optimizer: nothing to climb",
    ]
    text = Reader(render(view)).text
    assert "restarted with 16 candidates: a plateau" in text
    assert "nothing to climb" in text


def test_no_baselines(store: Store) -> None:
    made = Made(store, name="alone", counts=FEW, space={"method": "linear"})
    searched = made.search(10)
    made.finish([], searched)
    made.run.release("finished")
    assert "no baseline to compare it with" in Reader(render(store.run("alone"))).text


def test_one_number_per_task_has_no_interval(store: Store) -> None:
    made = Made(store, name="numbers", one_number=True, tasks=("score",))
    baselines = made.baselines()
    made.finish(baselines, made.search(12))
    made.run.release("finished")
    read = Reader(render(store.run("numbers")))
    assert "how much of it is chance is unknown" in read.text
    assert " to " not in read.row("winner")[3]
    assert "paired bootstrap" not in read.text


def test_metrics_on_other_scales_get_axes_of_their_own(store: Store) -> None:
    tasks = ("arc", "wikitext")
    finished(
        store,
        10,
        name="perplexity",
        sources=("math",),
        space={"method": "linear"},
        counts=FEW,
        tasks=tasks,
        kinds={"wikitext": "perplexity"},
    )
    text = render(store.run("perplexity"))
    assert "perplexity (lower is better)" in html.unescape(text)
    assert text.count(">score over all tasks<") >= 2
    assert "mathdefault" not in text


def test_many_tasks(store: Store) -> None:
    tasks = [f"mmlu_{'long_' * 7}{i}" for i in range(57)]
    counts = {"search": 2, "select": 2, "test": 4}
    made = Made(
        store, name="tasks", counts=counts, tasks=tasks, sources=("math",), space={"method": "linear"}
    )
    made.finish([], made.search(8))
    made.run.release("finished")
    text = render(store.run("tasks"))
    assert len(Reader(text).rows) > 2 * 57
    assert len(text) < 1_500_000


def test_an_unknown_method_is_printed_as_stored(store: Store) -> None:
    made = Made(store, name="later", counts=FEW)
    made.baselines()
    recipe = made.decoder.decode(made.decoder.centre())
    data = {**recipe.to_json(), "method": "of_2031"}
    number = len(made.numbers)
    made.run.add_candidate(Candidate(number, "optimizer", 0, 0, None, data, "d" * 64), 0)
    made.good[str(number)] = 4.0
    made.score(number, "search")
    text = render(store.run("later"))
    assert "does not know" in text
    assert "of_2031" in text


def test_a_candidate_that_comes_while_the_report_is_made(store: Store) -> None:
    made = Made(store, name="racing", counts=FEW)
    made.search(3)
    run = store.run("racing")
    read: Any = run.outcomes

    def outcomes(*args: Any, **options: Any) -> list[Outcome]:
        if len(made.numbers) == 3:
            number = made.add("optimizer", made.decoder.decode(made.decoder.centre()), 3.0, 3, 0)
            made.score(number, "search")
        return read(*args, **options)  # type: ignore[no-any-return]

    run.outcomes = outcomes  # type: ignore[method-assign]
    assert "candidate 3" in Reader(render(run)).row("best")[0]


def test_it_replaces_a_file_whole(
    store: Store, full: tuple[Summary, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "render", lambda run: full[1])
    target = tmp_path / "report.html"
    target.write_text("before")
    assert write_report(store.run("full"), target) == target
    assert target.read_text("utf-8") == full[1]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("where", ["missing/report.html", "", "file/report.html"])
def test_a_place_that_cannot_be_written(store: Store, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    Made(store, name=f"place{len(where)}")
    with pytest.raises(UserError) as caught:
        write_report(store.run(f"place{len(where)}"), tmp_path / where)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Made(store, name="disk")
    target = tmp_path / "report.html"
    target.write_text("before")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_report(store.run("disk"), target)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
