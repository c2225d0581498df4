// The list of runs, kept up to date while it is looked at.

import { at, get, repeat } from "./api.js";
import { announce, empty, h, problem, said, show } from "./dom.js";
import { NONE, ago, count, gainEnds, moment, points, score } from "./format.js";
import { LIVE, STATUSES, badge, progressBar } from "./status.js";

const PAGE = 50;
const SECONDS = 2;

const gains = new Map();

/** Show the list until the signal says that the page is left. */
export function listPage(main, signal) {
  const wanted = { status: "", contains: "", shown: PAGE };
  const body = h("div", { class: "list", "aria-busy": "true" });
  const more = h("div", { class: "more" });
  const found = h("p", { class: "soft found", role: "status" });
  let before = null;
  let asked = 0;

  const refresh = async () => {
    const turn = (asked += 1);
    const query = new URLSearchParams({ limit: String(wanted.shown) });
    if (wanted.status) query.set("status", wanted.status);
    if (wanted.contains) query.set("contains", wanted.contains);
    try {
      const page = await get(`/runs?${query}`, signal);
      if (turn !== asked) return;
      before = tell(before, page.runs);
      paint(page);
      await lookUp(page.runs, signal, () => turn === asked && paint(page));
    } catch (error) {
      if (!signal.aborted && error.status !== 401) show(body, problem(error.message));
    }
  };

  function paint(page) {
    body.removeAttribute("aria-busy");
    const filtered = wanted.status || wanted.contains;
    show(body, page.runs.length ? table(page.runs) : filtered
      ? empty("No run fits", "Change the filter to see others.")
      : empty("No runs yet", "Start one from a config; it is checked before it begins.", h("a", { class: "button first", href: "#/new" }, "New run")));
    found.textContent = page.total > page.runs.length || filtered ? `${count(page.runs.length)} of ${count(page.total)}` : "";
    show(more, page.next !== null && h("button", { type: "button", "data-key": "more", onclick: () => { wanted.shown = Math.min(500, wanted.shown + PAGE); refresh(); } }, "Show more"));
  }

  let typing = 0;
  show(main,
    h("div", { class: "title" }, h("h1", null, "Runs"), h("a", { class: "button first", href: "#/new" }, "New run")),
    h("div", { class: "filters" },
      h("input", { type: "search", "aria-label": "Name contains", maxlength: "100", placeholder: "Filter by name", autocomplete: "off", spellcheck: "false",
          oninput: (event) => { clearTimeout(typing); wanted.contains = event.target.value.trim(); typing = setTimeout(refresh, 250); } }),
      h("select", { "aria-label": "Status", onchange: (event) => { wanted.status = event.target.value; refresh(); } },
          h("option", { value: "" }, "Every status"), STATUSES.map((status) => h("option", { value: status }, status))),
      found),
    body, more);
  repeat(refresh, SECONDS, signal);
}

/** Say aloud whose status has changed. */
function tell(before, runs) {
  const now = new Map(runs.map((run) => [run.name, run.status]));
  const changed = before ? runs.filter((run) => before.has(run.name) && before.get(run.name) !== run.status) : [];
  if (changed.length) announce(changed.map((run) => `${run.name} is ${run.status}`).join(", "));
  return now;
}

/** Ask for gains of runs that have ended, one after another: each is computed once for a state of its run. */
async function lookUp(runs, signal, paint) {
  const key = (run) => `${run.name} ${run.updated}`;
  for (const run of runs) {
    if (run.status !== "finished" || gains.has(key(run))) continue;
    gains.set(key(run), (await get(at(run.name, "/gain"), signal)).gain);
    paint();
  }
}

function table(runs) {
  const columns = ["Run", "Status", "Progress", "Best on search", "Gain on test", "Started"];
  return h("table", { class: "runs", role: "table" },
    h("caption", { class: "unseen" }, "Runs, the newest first"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map((name, i) => h("th", { scope: "col", role: "columnheader", class: i === 3 || i === 4 ? "number" : null }, name)))),
    h("tbody", { role: "rowgroup" }, runs.map(row)));
}

function row(run) {
  const href = `#${at(run.name)}`;
  const cell = (name, kind, ...children) => h("td", { role: "cell", class: kind, "data-name": name }, ...children);
  return h("tr", { role: "row", onclick: (event) => !event.target.closest("a") && !String(getSelection()) && (location.hash = href) },
    h("th", { scope: "row", role: "rowheader" }, h("a", { href, "data-key": `run-${run.name}` }, run.name),
      run.error && h("small", { class: "reason" }, said(run.error))),
    cell("Status", "status", badge(run.status)),
    cell("Progress", "progress", run.evaluations || LIVE.includes(run.status)
      ? [progressBar(run.evaluations, run.budget, `Progress of ${run.name}`), h("small", null, run.budget ? `${count(run.evaluations)} of ${count(run.budget)}` : "waits")]
      : h("span", { class: "none" }, NONE)),
    cell("Best on search", "number", score(run.best_search_score)),
    cell("Gain on test", "number", gainOf(run)),
    cell("Started", "when", h("time", { datetime: new Date(1000 * run.created).toISOString(), title: moment(run.created) }, ago(run.created))));
}

function gainOf(run) {
  const gain = gains.get(`${run.name} ${run.updated}`);
  if (!gain) return NONE;
  const ends = gainEnds(gain);
  return [h("span", { class: gain.shown ? "gain shown" : "gain" }, points(gain.mean)), ends && h("small", null, ends)];
}
