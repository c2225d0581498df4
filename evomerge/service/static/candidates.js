// The table of candidates, sorted, filtered and paged by the service; and one candidate by itself.

import { exportDialog } from "./actions.js";
import { at, download, get } from "./api.js";
import { announce, card, dialog, empty, h, problem, said, show } from "./dom.js";
import { NONE, count, duration, many, moment, score } from "./format.js";
import { waiting } from "./status.js";
import { yaml } from "./yaml.js";

const PAGE = 50;
const COLUMNS = [["number", "Candidate", ""], ["", "Status", ""], ["score", "Search score", "number"], ["", "Select", "number"], ["", "Test", "number"],
  ["generation", "Generation", "number"], ["", "Time", "number"], ["", "Origin", ""], ["", "Note", "note-column"]];

/** Return the part. */
export function candidatesPart(run) {
  const wanted = { status: "", sort: "number", descending: false, offset: 0 };
  const body = h("div");
  const foot = h("div", { class: "pager" });
  const filter = h("select", { "aria-label": "Status of candidates", onchange: (event) => ask({ status: event.target.value, offset: 0 }) },
    [["", "Every status"], ["ok", "ok"], ["failed", "failed"], ["invalid", "invalid"], ["stopped", "stopped by racing"], ["pending", "not scored yet"]]
      .map(([value, text]) => h("option", { value }, text)));
  const node = card("Candidates", h("div", { class: "filters" }, filter), body, foot);
  let turn = 0;
  let before = "";

  async function ask(change) {
    Object.assign(wanted, change);
    await refresh();
  }

  async function refresh() {
    if (!run.begun) {
      show(body, waiting(run));
      return;
    }
    const mine = (turn += 1);
    const query = new URLSearchParams({ sort: wanted.sort, descending: String(wanted.descending), offset: String(wanted.offset), limit: String(PAGE) });
    if (wanted.status) query.set("status", wanted.status);
    try {
      const page = await get(at(run.name, `/candidates?${query}`), run.signal);
      if (mine !== turn) return;
      const state = JSON.stringify([page, wanted, run.shown.best?.candidate]);
      if (state !== before) paint(page);
      before = state;
    } catch (error) {
      if (!run.signal.aborted) show(body, problem(error.message));
    }
  }

  function sort(key) {
    const descending = wanted.sort === key ? !wanted.descending : key === "score";
    announce(`sorted by ${key}, ${descending ? "the highest first" : "the lowest first"}`);
    ask({ sort: key, descending, offset: 0 });
  }

  function paint(page) {
    const head = COLUMNS.map(([key, title, kind]) => {
      if (!key) return h("th", { scope: "col", class: kind }, title);
      const order = wanted.sort !== key ? "none" : wanted.descending ? "descending" : "ascending";
      return h("th", { scope: "col", class: kind, "aria-sort": order },
        h("button", { type: "button", class: "sort", "data-key": `sort-${key}`, onclick: () => sort(key) }, title, h("span", { class: "arrow", "aria-hidden": "true" })));
    });
    show(body, page.candidates.length === 0 ? empty("No candidate fits", "Change the filter to see others.")
      : h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Candidates" },
        h("table", { class: "candidates" }, h("caption", { class: "unseen" }, "Candidates of the run"),
          h("thead", null, h("tr", null, head)), h("tbody", null, page.candidates.map((one) => row(run, one))))));
    const last = wanted.offset + page.candidates.length;
    const turnTo = (offset, text, possible) => h("button", { type: "button", "data-key": text, disabled: !possible, onclick: () => ask({ offset }) }, text);
    show(foot, h("span", { class: "soft", role: "status" }, page.total ? `${count(wanted.offset + 1)} to ${count(last)} of ${count(page.total)}` : ""),
      page.total > PAGE && [turnTo(Math.max(0, wanted.offset - PAGE), "Previous", wanted.offset > 0), turnTo(wanted.offset + PAGE, "Next", last < page.total)]);
  }

  return { node, refresh };
}

function row(run, one) {
  const on = (split) => one.outcomes.find((outcome) => outcome.split === split);
  const searched = on("search");
  const best = run.shown.best?.candidate === one.number;
  const reason = one.outcomes.map((outcome) => outcome.reason).find(Boolean) ?? "";
  const number = (outcome) => h("td", { class: "number" }, outcome ? score(outcome.score) : NONE);
  const seconds = one.outcomes.reduce((sum, outcome) => sum + (outcome.cost.total ?? 0), 0);
  return h("tr", { class: best ? "winner" : null },
    h("th", { scope: "row" }, h("button", { type: "button", class: "link", "data-key": `candidate-${one.number}`, onclick: () => run.open(one.number) }, `#${one.number}`), best && h("small", null, run.shown.best.chosen_on === "select" ? "winner" : "best so far")),
    h("td", null, h("span", { class: `badge plain ${one.status}` }, one.status)),
    number(searched), number(on("select")), number(on("test")),
    h("td", { class: "number" }, one.index === null ? NONE : count(one.generation)),
    h("td", { class: "number" }, seconds > 0 ? duration(seconds) : NONE),
    h("td", null, origin(one.origin)),
    h("td", { class: "note-column", title: reason || null }, reason && said(reason)));
}

const origin = (text) => text.replace(":", " ").replace("@", ", scale ");

/** Open one candidate: its outcomes, recipe and genome. */
export function openCandidate(run, number) {
  dialog(`Candidate ${number}`, () => {
    const body = h("div", null, h("p", { class: "soft" }, "Reading…"));
    get(at(run.name, `/candidates/${number}`), run.signal).then((one) => show(body, whole(run, one)), (error) => show(body, problem(error.message)));
    return body;
  }, "wide");
}

function whole(run, one) {
  const file = (format) => download(at(run.name, `/recipe?candidate=${one.number}&format=${format}`), `${run.name}-${one.number}${format === "mergekit" ? "-mergekit" : ""}.json`)
    .catch((error) => announceProblem(error));
  const failure = h("div");
  const announceProblem = (error) => show(failure, problem(error.message));
  return [
    h("dl", { class: "facts" },
      h("dt", null, "Origin"), h("dd", null, origin(one.origin)),
      h("dt", null, "Status"), h("dd", null, h("span", { class: `badge plain ${one.status}` }, one.status)),
      one.index !== null && [h("dt", null, "Generation"), h("dd", null, count(one.generation))],
      h("dt", null, "Digest"), h("dd", { class: "hash" }, one.digest)),
    one.outcomes.length > 0 && outcomes(one.outcomes),
    h("div", { class: "actions" },
      one.status === "ok" && h("button", { type: "button", class: "first", onclick: () => exportDialog(run, one.number, false) }, "Export this candidate"),
      h("button", { type: "button", onclick: () => file("evomerge") }, "Recipe"),
      h("button", { type: "button", onclick: () => file("mergekit") }, "Recipe for mergekit")),
    failure,
    h("h3", null, "Recipe"), h("pre", { tabindex: "0", role: "region", "aria-label": "Recipe" }, clipped(yaml(one.recipe))),
    one.genome && h("details", null, h("summary", null, `Genome (${many(one.genome.length, "number")})`),
      h("pre", { tabindex: "0", role: "region", "aria-label": "Genome" }, clipped(one.genome.map((gene) => (typeof gene === "number" ? gene.toFixed(4) : String(gene))).join("  ")))),
  ];
}

const clipped = (text) => (text.length > 20000 ? `${text.slice(0, 20000)}\n… ${count(text.length - 20000)} more characters` : text);

function outcomes(found) {
  const tasks = [...new Set(found.flatMap((one) => Object.keys(one.tasks)))];
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Outcomes" }, h("table", null,
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "Documents"), h("th", { scope: "col", class: "number" }, "Score"),
      tasks.map((task) => h("th", { scope: "col", class: "number" }, task)), h("th", { scope: "col", class: "number" }, "Time"), h("th", { scope: "col" }, "Recorded"))),
    h("tbody", null, found.map((one) => [
      h("tr", null, h("th", { scope: "row" }, one.documents), h("td", { class: "number" }, score(one.score), one.stderr ? h("small", null, `± ${score(one.stderr)}`) : null),
        tasks.map((task) => h("td", { class: "number" }, one.tasks[task] ? score(one.tasks[task][0]) : NONE)),
        h("td", { class: "number" }, one.cost.total ? duration(one.cost.total) : NONE), h("td", { class: "when" }, moment(one.at))),
      one.reason && h("tr", null, h("td", { colspan: tasks.length + 4, class: "reason" }, said(one.reason)))]))));
}
