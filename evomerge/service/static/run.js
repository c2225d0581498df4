// A run's page: its head, which follows the run's events, and one part below it at a time.

import { cancelDialog, exportDialog, resumeDialog } from "./actions.js";
import { activityPart } from "./activity.js";
import { at, follow, get, repeat, seldom } from "./api.js";
import { candidatesPart, openCandidate } from "./candidates.js";
import { announce, h, problem, said, show, showChanged } from "./dom.js";
import { failuresPart } from "./failures.js";
import { filesPart } from "./files.js";
import { NONE, count, duration, gainEnds, interval, moment, points, score } from "./format.js";
import { overviewPart } from "./overview.js";
import { populationPart } from "./population.js";
import { LIVE, badge, progressBar } from "./status.js";

const PARTS = { "": ["Overview", overviewPart], candidates: ["Candidates", candidatesPart], population: ["Population", populationPart],
  failures: ["Failures", failuresPart], activity: ["Activity", activityPart], files: ["Files", filesPart] };
const BACKLOG = 300;

/** Show a run until the signal says that the page is left. Returns a function that changes the part. */
export async function runPage(main, name, signal) {
  show(main, h("p", { class: "soft" }, "Reading…"));
  const run = { name, signal, line: null, shown: null, config: {}, events: [], lost: false, begun: false, open: null };
  try {
    [run.shown, run.config] = await Promise.all([get(at(name), signal), get(at(name, "/config"), signal).then((found) => found.config)]);
  } catch (error) {
    if (!signal.aborted && error.status !== 401) show(main, h("h1", null, name), problem(error.message), h("p", null, h("a", { href: "#/" }, "All runs")));
    return () => {};
  }
  run.open = (number) => openCandidate(run, number);
  const head = h("div", { class: "run-head" });
  const tabs = h("nav", { class: "tabs", "aria-label": "Parts of the run" });
  const body = h("div", { class: "part" });
  show(main, head, tabs, body);

  let part = null;
  let chosen = "";
  let waits = false;
  const paint = () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      showChanged(head, [run.line, run.shown, run.lost, run.begun], () => runHead(run));
      paintTimes(head, run);
      const before = tabs.firstChild;
      showChanged(tabs, [chosen, run.shown.failures], () => runTabs(run, chosen));
      if (tabs.firstChild !== before) tabs.scrollLeft = tabs.querySelector("[aria-current]").offsetLeft - tabs.offsetLeft - 60;
    });
  };
  const refresh = seldom(async () => {
    try {
      if (run.line === null || run.line.candidates > 0) run.shown = await get(at(name), signal);
      run.begun = (run.line?.candidates ?? run.shown.outcomes) > 0;
      paint();
      await part?.refresh();
    } catch (error) {
      if (!signal.aborted && error.status !== 401) announce(error.message);
    }
  }, signal);

  function choose(wanted) {
    chosen = wanted in PARTS ? wanted : "";
    part?.leave?.();
    part = PARTS[chosen][1](run);
    show(body, part.node);
    paint();
    refresh();
  }

  run.again = () => watch(run, refresh, paint);
  run.begun = run.shown.outcomes > 0;
  paint();
  run.again();
  // A browser keeps few connections to one host: tabs that nobody looks at give theirs back.
  document.addEventListener("visibilitychange", () => (document.hidden ? run.stop.abort() : run.again()), { signal });
  repeat(async () => LIVE.includes(run.line?.status) && paintTimes(head, run), 1, signal);
  return choose;
}

/** Follow the events: they say when there is something new to read. */
async function watch(run, refresh, paint) {
  run.stop?.abort();
  run.stop = new AbortController();
  const signal = AbortSignal.any([run.signal, run.stop.signal]);
  let place = run.events.at(-1)?.id ?? 0;
  if (place === 0 && run.begun) {
    const curve = await get(at(run.name, "/progress?most=10"), signal).catch(() => ({ event: 0 }));
    place = Math.max(0, curve.event - BACKLOG);
  }
  await follow(run.name, place, signal, (kind, data) => {
    if (kind === "state") {
      const before = run.line?.status;
      run.line = data;
      if (before !== undefined && before !== data.status) announce(`${run.name} is ${data.status}`);
    } else if (data.id) {
      run.events.push(data);
      if (run.events.length > 2000) run.events.splice(0, 1000);
      if (data.kind === "phase") announce(`${run.name}: ${data.data.phase}`);
    }
    paint();
    refresh();
  }, (lost) => {
    run.lost = lost;
    paint();
  });
}

function runHead(run) {
  const { shown, line, config } = run;
  const status = line?.status ?? shown.status;
  const error = line?.error || shown.error;
  const gain = shown.gain;
  return [
    h("p", { class: "crumbs" }, h("a", { href: "#/", "data-key": "back" }, "Runs"), " / "),
    h("div", { class: "title" },
      h("div", { class: "named" }, h("h1", null, run.name), badge(status), run.lost && h("span", { class: "badge lost" }, "connecting again")),
      h("div", { class: "actions" }, actions(run, status))),
    h("p", { class: "soft meta" }, meta(run, config).map((text) => h("span", null, text)), h("span", { id: "times" })),
    error && h("p", { class: "note bad" }, said(error)),
    shown.outcomes > 0 && h("p", { class: gain?.shown && gain.low !== null ? "verdict good" : "verdict" }, shown.verdict),
    shown.looks_at_test > 1 && h("p", { class: "note" }, `The test documents were looked at ${shown.looks_at_test} times; each look after the first makes the result more optimistic than its interval says.`),
    tiles(run, status)];
}

function meta(run, config) {
  const space = config.space ?? {};
  return [
    config.optimizer?.name ? `optimizer ${config.optimizer.name}` : null,
    space.kind && space.kind !== "parameter" ? `space ${space.kind}` : null,
    space.method ? `method ${space.method}` : null,
    config.seed === undefined ? null : `seed ${config.seed}`,
  ].filter(Boolean);
}

function paintTimes(head, run) {
  const line = run.line ?? run.shown;
  const end = LIVE.includes(line.status) ? Date.now() / 1000 : line.updated;
  const place = head.querySelector("#times");
  if (place) place.textContent = `started ${moment(line.created)}, ${LIVE.includes(line.status) ? "for" : "took"} ${duration(end - line.created)}`;
}

function actions(run, status) {
  const button = (name, text, action, kind) => h("button", { type: "button", class: kind, "data-key": name, onclick: action }, text);
  const known = run.begun || run.shown.outcomes > 0;
  return [
    LIVE.includes(status) && button("cancel", "Cancel", () => cancelDialog(run), "danger"),
    !LIVE.includes(status) && known && button("resume", "Resume", () => resumeDialog(run)),
    run.shown.best && button("export", "Export", () => exportDialog(run, run.shown.best.candidate, true), LIVE.includes(status) ? null : "first"),
  ];
}

function tiles(run, status) {
  const { shown, line } = run;
  const budget = line?.budget ?? run.config.budget?.evaluations ?? null;
  const done = line?.evaluations ?? shown.evaluations;
  const test = shown.best?.test;
  const tile = (name, number, ...more) => h("div", { class: "tile" }, h("dt", null, name), h("dd", null, h("strong", null, number), ...more));
  return h("dl", { class: "tiles" },
    tile("Evaluations", budget ? [count(done), h("span", { class: "of" }, ` of ${count(budget)}`)] : count(done), progressBar(done, budget, "Evaluations of the budget")),
    tile("Best on search", score(line?.best_search_score ?? shown.best?.search), h("small", null, "baselines included")),
    tile("Winner on test", test ? score(test.score) : NONE, h("small", null, test ? interval(test) : LIVE.includes(status) ? "measured at the end" : "not measured")),
    tile("Gain, in points", shown.gain ? points(shown.gain.mean) : NONE,
      h("small", null, shown.gain ? gainEnds(shown.gain) : "over the best baseline")),
    tile("Failures", count(shown.failures), h("small", null, `of ${count(shown.outcomes)} outcomes`)));
}

function runTabs(run, chosen) {
  const niches = run.config.optimizer?.name === "niches";
  return Object.entries(PARTS).filter(([key]) => key !== "population" || niches).map(([key, [title]]) => {
    const number = key === "failures" && run.shown.failures > 0 ? h("span", { class: "pill" }, count(run.shown.failures)) : null;
    return h("a", { href: `#${at(run.name, key ? `/${key}` : "")}`, "data-key": `tab-${key}`, "aria-current": key === chosen ? "page" : null }, title, number);
  });
}
