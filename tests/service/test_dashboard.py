"""The dashboard in a real Chromium, against a real service with real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("playwright.sync_api", reason="the Python package playwright is missing")

from playwright.sync_api import Browser, Page, expect

from evomerge.records import Outcome
from tests.e2e.test_niches import SEGMENTS
from tests.e2e.world import make_world, write_config
from tests.report.synthetic import finished
from tests.service.browser import CONTRAST, SLOW, Dash, launched, tab
from tests.service.live import TOKEN, Live, running, settings_in

LONG = "a-rather-long-name-that-somebody-chose-for-an-experiment-with-many-words-2026-11-26.version-2"
MARKUP = "<img src=x onerror=\"window.hit='yes'\"><script>window.hit='yes'</script>\u202e"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def live(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service that runs what is submitted, with two finished runs in its store."""
    del browser  # without one, nothing here is needed
    settings = settings_in(tmp_path_factory.mktemp("service"))
    make_world(settings.roots[0])
    with running(settings) as live:
        finished(live.store, 120)
        finished(live.store, 60, name=LONG)
        yield live


@pytest.fixture
def dash(browser: Browser, live: Live) -> Iterator[Dash]:
    with tab(browser, live) as dash:
        yield dash


def config_text(live: Live, **changes: Any) -> str:
    path = write_config(live.root, "submitted.yaml", **changes)
    return path.read_text("utf-8")


def submit(page: Page, text: str) -> None:
    page.get_by_label("Config").fill(text)
    page.get_by_role("button", name="Submit").click()


def badge(page: Page) -> Any:
    return page.locator(".run-head .badge").first


# The token.


def test_a_wrong_token_is_refused_and_asked_for_again(dash: Dash) -> None:
    page = dash.page
    dash.expected = [(401, "/info")]
    page.goto(f"{dash.live.service.address}/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type("not-the-token")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The service refused the token.")
    assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("Token").fill(f"  {TOKEN}\n")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("link", name="demo", exact=True)).to_be_visible()
    assert TOKEN not in page.url
    assert page.evaluate("Object.values(localStorage).length") == 0
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_token_that_is_not_taken_any_more_is_asked_for(dash: Dash) -> None:
    dash.expected = [(401, "")]
    dash.page.add_init_script("sessionStorage.setItem('evomerge-token', 'of-yesterday')")
    dash.page.goto(f"{dash.live.service.address}/#/runs/demo")
    expect(dash.page.get_by_role("alert")).to_have_text("The service refused the token.")


# A run from its config to its model.


def test_submit_watch_to_the_end_and_export(dash: Dash) -> None:
    page = dash.open("new")
    submit(page, config_text(dash.live))
    expect(page.get_by_role("heading", name="small", level=1)).to_be_visible()
    expect(badge(page)).to_have_text(re.compile("queued|starting|running"))
    expect(badge(page)).to_have_text("finished", timeout=SLOW)
    expect(page.locator("#live")).to_have_text("small is finished")
    expect(page.locator(".tile", has_text="Evaluations")).to_contain_text("12 of 12")
    expect(page.locator(".dots path")).to_have_count(12)
    shown = dash.live.http.get("/runs/small").json()
    expect(page.locator(".verdict")).to_have_text(shown["verdict"])
    expect(page.locator("table.scores tbody tr")).to_have_count(1 + len(shown["baselines"]))
    expect(page.locator("table.scores tr.winner")).to_contain_text(
        f"{shown['best']['test']['score']:.3f}".replace("-", "\u2212")
    )
    expect(page.get_by_role("img", name=re.compile("^weight, all tensors"))).to_be_visible()

    page.get_by_role("button", name="Export").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Back").click()
    expect(dialog).to_have_count(0)
    assert dash.live.http.get("/runs/small/exports").json()["exports"] == []
    page.get_by_role("button", name="Export").click()
    dialog.get_by_role("button", name="Export").click()
    expect(page.locator("[data-state]")).to_have_attribute("data-state", "done", timeout=SLOW)
    with page.expect_download() as download:
        page.get_by_role("button", name="config.json", exact=True).click()
    assert json.loads(Path(download.value.path()).read_text())["architectures"] == ["LlamaForCausalLM"]

    page.get_by_role("link", name="Start another from it").click()
    expect(page.locator("textarea")).to_have_value(re.compile("^name: small-2"))
    expect(page.locator("#verdict .good")).to_be_visible()
    page.go_back()

    page.get_by_role("link", name="Activity").click()
    expect(page.locator(".log")).to_contain_text("starting workers")
    expect(page.locator(".events")).to_contain_text("is measured on the test documents; look 1")


def test_watch_a_population_cancel_and_resume(dash: Dash) -> None:
    page = dash.open("new")
    submit(
        page,
        config_text(
            dash.live, **{**SEGMENTS, "name": "herd", "budget": {"evaluations": 10**6, "finalists": 1}}
        ),
    )
    page.get_by_role("link", name="Population").click()
    expect(page.locator("table.population tbody tr")).to_have_count(5, timeout=SLOW)
    expect(page.get_by_role("img", name=re.compile("near 100 %")).first).to_be_visible()
    page.get_by_role("link", name="Activity").click()
    expect(page.locator(".worker")).to_contain_text("Worker 0")
    submit(dash.open("new"), config_text(dash.live, name="waits"))
    expect(badge(page)).to_have_text("queued")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the run").click()
    expect(badge(page)).to_have_text("cancelled")

    dash.open("runs/herd")
    expect(badge(page)).to_have_text("running")
    page.get_by_role("button", name="Cancel").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the run").click()
    expect(badge(page)).to_have_text("stopped", timeout=SLOW)

    page.get_by_role("button", name="Resume").click()
    dash.expected = [(422, "/resume")]
    page.get_by_label("Evaluations in all").fill("1")
    page.get_by_label("Workers").fill("2")
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    expect(badge(page)).to_have_text(re.compile("queued|starting|running|finished"))
    expect(badge(page)).to_have_text("finished", timeout=SLOW)
    assert dash.live.store.run("herd").config["budget"]["evaluations"] == 1


# What is wrong with a config, at its key.


def test_a_wrong_config_is_shown_at_its_line(dash: Dash) -> None:
    dash.expected = [(422, "/validate"), (422, "/runs")]
    page = dash.open("new")
    text = config_text(dash.live, name="wrong", space={"method": "tis", "granularity": {"anchors": 2}})
    page.get_by_label("Config").fill(text)
    expect(page.locator("#verdict .key")).to_have_text("space.method")
    expect(page.locator("#verdict")).to_contain_text('did you mean "ties"')
    line = text.splitlines().index("  method: tis") + 1
    expect(page.locator(".gutter .wrong")).to_have_text(str(line))
    page.get_by_role("button", name=f"Go to line {line}").click()
    assert page.evaluate("getSelection().toString()") == "  method: tis"
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#live")).to_have_text("The config was refused.")
    assert "/new" in page.url
    page.get_by_label("Config").fill(text.replace("tis", MARKUP.replace('"', "'")))
    expect(page.locator("#verdict")).to_contain_text("<img src=x")
    page.get_by_label("Config").fill(text.replace("tis", "ties") + "budgt: 1\nseed: x\n")
    expect(page.locator("#verdict .note.bad")).to_have_count(2)
    expect(page.locator("#verdict")).to_contain_text('did you mean "budget"')
    expect(page.locator("#verdict .key")).to_have_text("seed")
    page.get_by_label("Config").fill(text.replace("tis", "ties"))
    expect(page.locator("#verdict .good")).to_be_visible()
    expect(page.locator(".gutter .wrong")).to_have_count(0)
    page.get_by_role("button", name="Check all").click()
    expect(page.locator("#verdict")).to_contain_text(
        "Everything that needs no worker was checked.", timeout=SLOW
    )
    expect(page.locator("#verdict dl")).to_contain_text("base, one, two")


def test_a_config_from_a_file_and_from_a_run(dash: Dash, tmp_path: Path) -> None:
    dash.expected = [(422, "/validate")]
    page = dash.open("new")
    file = tmp_path / "mine.yaml"
    file.write_text("name: from-a-file\n")
    page.locator("#file").set_input_files(file)
    expect(page.get_by_label("Config")).to_have_value("name: from-a-file\n")
    dash.open("new/demo")
    expect(page.get_by_label("Config")).to_have_value(re.compile("^name: "))
    assert yaml.safe_load(page.get_by_label("Config").input_value())["name"] == "demo-2"


# Tables.


def test_candidates_are_sorted_filtered_and_paged(dash: Dash) -> None:
    page = dash.open("runs/demo/candidates")
    rows, number = (
        page.locator("table.candidates tbody tr"),
        page.get_by_role("columnheader", name="Candidate"),
    )
    expect(rows).to_have_count(50)
    expect(number).to_have_attribute("aria-sort", "ascending")
    expect(rows.first).to_contain_text("#0")
    page.get_by_role("button", name="Next").click()
    expect(rows.first).to_contain_text("#50")

    score = page.get_by_role("columnheader", name="Search score")
    score.get_by_role("button").click()
    expect(score).to_have_attribute("aria-sort", "descending")
    expect(number).to_have_attribute("aria-sort", "none")
    expect(page.locator(".pager")).to_contain_text("1 to 50 of 127")
    best = dash.live.http.get("/runs/demo/candidates?sort=score&descending=true&limit=2").json()["candidates"]
    expect(rows.first).to_contain_text(f"#{best[0]['number']}")
    expect(rows.nth(1)).to_contain_text(f"{best[1]['score']:.3f}")
    score.get_by_role("button").click()
    expect(score).to_have_attribute("aria-sort", "ascending")

    page.get_by_label("Status of candidates").select_option("failed")
    expect(rows).to_have_count(2)
    expect(page.locator("table.candidates")).to_contain_text("CUDA out of memory")
    page.get_by_label("Status of candidates").select_option("stopped")
    expect(page.locator(".empty")).to_contain_text("No candidate fits")
    page.get_by_role("link", name="Failures").click()
    expect(page.locator(".reasons li")).to_have_count(3)
    expect(page.locator(".reasons li").first).to_contain_text("2\u00d7")
    page.locator(".reasons button").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("merged weights are not finite")


def test_the_list_is_filtered(dash: Dash) -> None:
    page = dash.open()
    demo = page.get_by_role("row", name=re.compile("^demo "))
    expect(demo).to_contain_text("finished")
    gain = dash.live.http.get("/runs/demo").json()["gain"]
    expect(demo).to_contain_text(f"+{100 * gain['mean']:.1f}")
    page.get_by_label("Name contains").fill("RATHER")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)
    expect(page.locator("table.runs tbody tr")).to_contain_text(LONG)
    page.get_by_label("Status", exact=True).select_option("failed")
    expect(page.locator(".empty")).to_contain_text("No run fits")


def test_the_drawn_numbers_are_the_service_s(dash: Dash) -> None:
    page = dash.open("runs/demo")
    curve = dash.live.http.get("/runs/demo/progress?most=400").json()
    scored = [point for point in curve["points"] if point["score"] is not None]
    expect(page.locator(".dots path")).to_have_count(len(scored))
    expect(page.locator(".readout")).to_contain_text(f"best search score {scored[-1]['best']:.3f}")
    shown = dash.live.http.get("/runs/demo").json()
    for task, found in shown["best"]["test"]["tasks"].items():
        panel = page.get_by_role("img", name=re.compile(f"^{task}: winner {found['metric']:.3f}"))
        expect(panel).to_be_visible()
    page.get_by_label("select", exact=True).check()
    task, found = next(iter(shown["best"]["select"]["tasks"].items()))
    expect(page.get_by_role("img", name=re.compile(f"^{task}: winner {found['metric']:.3f}"))).to_be_visible()
    expect(page.get_by_label("select", exact=True)).to_be_checked()


# Text of others.


def test_markup_of_others_stays_text(dash: Dash) -> None:
    made = finished(dash.live.store, 12, name="odd", tasks=("<b>task</b>", "arc"))
    failed = dash.live.store.create_run(
        "bad", {"name": MARKUP, "optimizer": {"name": MARKUP}, "seed": 0}, made.run.facts
    )
    failed.add_event("optimizer", {"note": MARKUP})
    failed.add_event(MARKUP, {MARKUP: MARKUP})
    failed.add_candidate(dash.live.store.run("odd").candidates()[0], 0)
    failed.add_outcome(Outcome(0, "search", "failed", reason=MARKUP, cost={}), "f" * 64)
    failed.release("failed", MARKUP)
    dash.expected = [(422, "/validate")]
    page = dash.open()
    for place in (
        "",
        "runs/bad",
        "runs/bad/activity",
        "runs/bad/files",
        "runs/bad/candidates",
        "runs/odd",
        "new/bad",
    ):
        dash.open(place)
        page.wait_for_load_state("networkidle" if place == "new/bad" else "load")
        if place != "runs/odd":
            needle = "<img src=x"
            value = page.get_by_label("Config").input_value() if place == "new/bad" else None
            assert value is None or needle in value
            if value is None and place:
                expect(page.locator("main")).to_contain_text(needle)
        else:
            expect(page.get_by_role("heading", name="<b>task</b>")).to_be_visible()
        assert page.locator("main img, main script, main b").count() == 0
    assert page.evaluate("window.hit") is None


# Keyboard, phone, colours.


def test_the_keyboard_is_enough(dash: Dash) -> None:
    page = dash.open()
    expect(page.locator("table.runs")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline not in ("none", ""), seen
        if seen[-1] == "demo":
            break
    assert seen[0] == "New run"
    assert seen[-1] == "demo"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="demo", level=1)).to_be_visible()

    page.locator("[data-key=curve]").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator(".readout")).to_contain_text("Evaluation 2, candidate")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("[data-key=curve]")).to_be_focused()

    page.locator("[data-key=tab-candidates]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("table.candidates")).to_be_visible()
    page.locator("[data-key=sort-score]").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("columnheader", name="Search score")).to_have_attribute("aria-sort", "descending")
    expect(page.locator("[data-key=sort-score]")).to_be_focused()


def test_nothing_hangs_over_on_a_phone(browser: Browser, live: Live) -> None:
    with tab(browser, live, viewport={"width": 360, "height": 740}) as dash:
        page = dash.page
        for place in (
            "",
            "new",
            *(f"runs/{LONG}{part}" for part in ("", "/candidates", "/failures", "/activity", "/files")),
        ):
            dash.open(place)
            expect(page.locator(".card, .list table, .editor").first).to_be_visible()
            page.wait_for_load_state("load")
            assert dash.overflow() == 0, place
        page.get_by_role("button", name="Resume").click()
        assert dash.overflow() == 0
        assert page.get_by_role("dialog").bounding_box()["width"] <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colours(browser: Browser, live: Live, scheme: str) -> None:
    other = {"light": "dark", "dark": "light"}[scheme]
    with tab(browser, live, color_scheme=other) as dash:
        page = dash.open()
        switch = page.get_by_role("button", name="Colours")
        expect(switch).to_have_accessible_name("Colours: system. Change")
        while f"Colours: {scheme}" not in (switch.get_attribute("aria-label") or ""):
            switch.click()
        for place in ("", "runs/demo", "runs/demo/failures", "runs/demo/candidates", "new"):
            dash.open(place)
            expect(page.locator(".card, .list table, .note.good").first).to_be_visible()
            assert page.evaluate("document.documentElement.dataset.theme") == scheme
            assert page.evaluate(CONTRAST) == [], place
