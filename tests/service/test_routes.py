"""Routes return what the commands print, in pages where it is much, and errors in one shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.report.overview import shown
from tests.e2e.world import evomerge
from tests.report.synthetic import finished
from tests.service.live import Live, running, settings_in


def test_health_and_info(live: Live) -> None:
    assert live.http.get("/health").json()["status"] == "ok"
    info = live.http.get("/info").json()
    assert (info["launcher"], info["roots"], info["at_once"]) == ("local", [str(live.root)], 0)
    assert info["store"].endswith("runs.db")


def test_show_is_what_the_command_prints(live: Live) -> None:
    answer = live.http.get("/runs/demo").json()
    printed = evomerge(live.root, "show", "demo", "--json", "--store", live.store.location)
    assert answer == json.loads(printed.stdout)
    assert answer["status"] == "finished"
    assert answer["best"]["test"]["low"] < answer["best"]["test"]["score"]
    assert answer == json.loads(json.dumps(shown(live.store, "demo")))


def test_list_and_filter(live: Live) -> None:
    page = live.http.get("/runs").json()
    assert "demo" in [run["name"] for run in page["runs"]]
    assert page["next"] is None
    finished_runs = live.http.get("/runs", params={"status": "finished"}).json()
    assert [run["name"] for run in finished_runs["runs"]] == ["demo"]
    assert live.http.get("/runs", params={"status": "failed"}).json()["runs"] == []


def test_candidates(live: Live) -> None:
    query = {"sort": "score", "descending": True, "limit": 3}
    page = live.http.get("/runs/demo/candidates", params=query).json()
    scores = [candidate["score"] for candidate in page["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert page["total"] == len(live.store.run("demo").candidates())
    failed = live.http.get("/runs/demo/candidates", params={"status": "failed"}).json()
    assert failed["total"] == 2
    assert {c["outcomes"][0]["reason"].split(":")[0] for c in failed["candidates"]} == {
        "CUDA out of memory",
        "no answer within 600 s; the worker was ended",
    }
    number = page["candidates"][0]["number"]
    whole = live.http.get(f"/runs/demo/candidates/{number}").json()
    assert whole["recipe"] == dict(live.store.run("demo").candidate(number).recipe)
    assert {k: whole[k] for k in page["candidates"][0]} == page["candidates"][0]


def test_winner_has_values_over_depth(live: Live) -> None:
    found = live.http.get("/runs/demo/winner").json()
    assert found["best"] == live.http.get("/runs/demo").json()["best"]
    assert found["layers"] == 16
    by_name = {(p["parameter"], p["tensors"]): p["values"] for p in found["parameters"]}
    weights = by_name["weight", "attention"]
    assert set(weights) == {"math", "code", "german"}
    assert all(len(values) == 16 for values in weights.values())
    assert found["path"] == []


def test_progress_is_the_search_in_a_bounded_number_of_points(live: Live) -> None:
    whole = live.http.get("/runs/demo/progress").json()
    proposed = [c for c in live.store.run("demo").candidates() if c.index is not None]
    assert whole["evaluations"] == len(whole["points"]) == len(proposed) == 60
    assert whole["event"] == live.store.run("demo").last_event()
    scores = [point["score"] for point in whole["points"] if point["score"] is not None]
    assert whole["points"][-1]["best"] == max(scores)
    assert whole["points"][-1]["mean"] == pytest.approx(sum(scores[-20:]) / 20)
    assert sum(point["failed"] for point in whole["points"]) == 4
    few = live.http.get("/runs/demo/progress?most=10").json()
    assert [point["at"] for point in few["points"]] == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    assert [point["best"] for point in few["points"]] == [point["best"] for point in whole["points"][5::6]]
    assert max(point["score"] for point in few["points"]) == max(scores)
    assert sum(point["failed"] for point in few["points"]) == 4


def test_a_line_has_budget_evaluations_and_error_and_is_found_by_a_part_of_its_name(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, at_once=0)) as live:
        finished(live.store, 30)
        live.store.create_run("broken", {}, {}).release("failed", "the benchmark is down")
        lines = {line["name"]: line for line in live.http.get("/runs").json()["runs"]}
        assert (lines["demo"]["evaluations"], lines["demo"]["budget"], lines["demo"]["error"]) == (
            30,
            200,
            "",
        )
        assert (lines["broken"]["budget"], lines["broken"]["error"]) == (None, "the benchmark is down")
        found = live.http.get("/runs", params={"contains": "DEM"}).json()
        assert ([line["name"] for line in found["runs"]], found["total"]) == (["demo"], 1)
        shown = live.http.get("/runs/demo").json()
        gain = live.http.get("/runs/demo/gain").json()
        assert gain == {"gain": shown["gain"], "verdict": shown["verdict"]}


def test_recipe_config_logs_workers_population(live: Live) -> None:
    printed = evomerge(live.root, "recipe", "demo", "--json", "--store", live.store.location)
    assert live.http.get("/runs/demo/recipe").json() == json.loads(printed.stdout)
    assert live.http.get("/runs/demo/config").json()["config"] == live.store.run("demo").config
    assert "begun without the service" in live.error(live.http.get("/runs/demo/logs"), 404)
    assert live.http.get("/runs/demo/workers").json()["workers"] == []
    assert "niches" in live.error(live.http.get("/runs/demo/population"), 409)


def test_report_is_one_file_in_a_sandbox(live: Live) -> None:
    answer = live.http.get("/runs/demo/report")
    assert answer.status_code == 200
    assert answer.text.startswith("<!DOCTYPE html>")
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    again = live.http.get("/runs/demo/report")
    assert again.text == answer.text
    reports = live.service.parts.settings.folder / "reports"
    assert len(list(reports.glob("demo-*"))) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/runs/dem", 404, 'did you mean "demo"'),
        ("GET", "/runs/nothing-like-it/candidates", 404, 'there is no run "nothing-like-it"'),
        ("GET", "/runs/demo/candidates/999", 404, "there is no candidate 999"),
        ("GET", "/runs/demo/candidates/-1", 404, "there is no candidate -1"),
        ("GET", "/runs/demo/candidates/1e3", 404, "nothing at"),
        ("GET", "/runs/demo/candidates?limit=-1", 422, "query.limit"),
        ("GET", "/runs/demo/candidates?limit=1000000000", 422, "query.limit"),
        ("GET", "/runs/demo/candidates?sort=x", 422, "query.sort"),
        ("GET", "/runs?after=../x", 422, "query.after"),
        ("GET", "/runs/demo/events?after=x", 422, "query.after"),
        ("POST", "/runs/demo/cancel", 409, "it is finished"),
        ("POST", "/runs/nobody/cancel", 404, 'no run "nobody"'),
        ("GET", "/nothing", 404, "Not Found"),
        ("DELETE", "/runs/demo", 405, "Method Not Allowed"),
        ("GET", "/runs/demo/exports/7", 404, "no export 7"),
    ],
)
def test_errors_have_one_shape(live: Live, method: str, path: str, status: int, message: str) -> None:
    assert message in live.error(live.http.request(method, path), status)


def test_metrics(live: Live) -> None:
    address = live.service.address
    text = live.http.get(f"{address}/metrics").text
    assert 'evomerge_runs{status="finished"} 1.0' in text
    assert 'evomerge_request_seconds_count{method="GET",status="404"}' in text
    run = live.store.create_run("measured", {}, {})
    run.set_activity({"workers": [{"state": "busy"}, {"state": "idle"}], "busy_share": 0.5})
    try:
        text = live.http.get(f"{address}/metrics").text
        assert 'evomerge_run_workers{run="measured",state="busy"} 1.0' in text
        assert 'evomerge_run_busy_share{run="measured"} 0.5' in text
    finally:
        run.release("stopped")
    assert "measured" not in live.http.get(f"{address}/metrics").text


def test_a_refusal_has_every_fault_with_its_key(live: Live) -> None:
    config = {"name": "x", "sede": 1, "space": {"method": "tie"}, "budget": {"hours": 0}}
    answer = live.http.post("/configs/validate", json={"config": config})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["kind"], error["key"]) == ("config", None)
    assert error["message"] == 'config: unknown key "sede"; did you mean "seed"?'
    assert [fault["key"] for fault in error["others"]] == [
        "space.method",
        "budget.hours",
        "sources",
        "fitness",
    ]
    assert error["others"][1]["message"] == "config: budget.hours: expected more than 0, got 0"


def test_openapi_has_examples_and_one_error(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    submit = document["paths"]["/api/v1/runs"]["post"]
    assert {"200", "201", "401", "409", "413", "422"} <= set(submit["responses"])
    schemas = document["components"]["schemas"]
    assert schemas["Submission"]["properties"]["config"]["examples"][0]["space"]["method"] == "ties"
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["description"], (path, method)


def test_the_documents_table_names_every_route(live: Live, repository: Path) -> None:
    text = (repository / "docs/service.md").read_text("utf-8")
    listed = {
        (method, path.partition("?")[0])
        for method, path in (
            line.split("`")[1].split(" ", 1)
            for line in text.splitlines()
            if line.startswith(("| `GET", "| `POST"))
        )
    }
    names = {"{name}": "NAME", "{number}": "N", "{file}": "FILE"}
    document = live.http.get("/openapi.json").json()
    served = set()
    for path, methods in document["paths"].items():
        plain = path.removeprefix("/api/v1/")
        for part, name in names.items():
            plain = plain.replace(part, name)
        served |= {(method.upper(), plain) for method in methods}
    assert listed == served


def test_text_of_others_is_shown_as_text(tmp_path: Path) -> None:
    """A reason with markup, escapes and line breaks comes back as it is, in JSON; nothing is rendered."""
    with running(settings_in(tmp_path, at_once=0)) as live:
        bad = "<script>alert(1)</script>\x1b[31m\n\u202e"
        live.store.create_run("odd", {}, {}).release("failed", bad)
        answer = live.http.get("/runs/odd")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"] == bad
