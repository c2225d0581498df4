// What happens now: workers, events, the end of the driver's log.

import { at, get, repeat } from "./api.js";
import { card, empty, h, said, show } from "./dom.js";
import { clock, count, duration, percent, score } from "./format.js";
import { LIVE, progressBar } from "./status.js";

const SECONDS = 2;
const SHOWN = 200;

/** Return the part. */
export function activityPart(run) {
  const [workers, events, log] = [1, 2, 3].map(() => h("div", null, h("p", { class: "soft" }, "Reading…")));
  const node = h("div", { class: "cards" }, card("Workers", workers), card("Events", events), card("Log", log));
  const leaving = new AbortController();
  const signal = AbortSignal.any([run.signal, leaving.signal]);
  let logged = null;

  async function ask() {
    const status = run.line?.status;
    if (!status) return;
    try {
      if (status === "running" && run.begun) show(workers, workerCards(run, await get(at(run.name, "/workers"), signal)));
      else show(workers, empty("Nobody works", LIVE.includes(status) ? "Workers start when the run begins." : `The run is ${status}.`));
      if (LIVE.includes(status) || logged !== status) await readLog(status);
    } catch (error) {
      if (!signal.aborted) show(workers, empty("Unknown at the moment", error.message));
    }
  }

  async function readLog(status) {
    if (run.line.priority == null) {
      show(log, empty("No log here", "The run was begun without this service."));
    } else {
      const { text } = await get(at(run.name, "/logs"), signal);
      const before = log.querySelector("pre");
      const low = !before || before.scrollHeight - before.scrollTop - before.clientHeight < 30;
      if (before?.textContent !== text || text === "") {
        const pre = h("pre", { class: "log", tabindex: "0", role: "region", "aria-label": "Log", "data-key": "log" }, text);
        show(log, text ? pre : empty("The log is empty", "The driver has not written anything yet."));
        if (low) pre.scrollTop = pre.scrollHeight;
      }
    }
    logged = status;
  }

  let status = null;
  function refresh() {
    show(events, eventList(run));
    if (run.line?.status !== status) {
      status = run.line?.status;
      ask();
    }
  }

  repeat(ask, SECONDS, signal);
  return { node, refresh, leave: () => leaving.abort() };
}

function workerCards(run, found) {
  if (found.at === null || !found.workers.length) return empty("No word yet", "Workers say once a second what they do.");
  const one = (worker) => h("li", { class: `worker ${worker.state}` },
    h("span", { class: "worker-name" }, `Worker ${worker.worker}`), h("span", { class: `badge plain ${worker.state}` }, worker.state),
    h("span", { class: "worker-job" }, worker.candidate === null ? null
      : [h("button", { type: "button", class: "link", "data-key": `worker-${worker.worker}`, onclick: () => run.open(worker.candidate) }, `#${worker.candidate}`), ` on ${worker.documents}`]),
    h("span", { class: "soft" }, worker.since === null ? null : `for ${duration(found.at - worker.since)}`));
  return [
    h("dl", { class: "tiles" },
      h("div", { class: "tile" }, h("dt", null, `Phase: ${found.phase}`), h("dd", null, h("strong", null, count(found.done), h("span", { class: "of" }, ` of ${count(found.total)}`)), progressBar(found.done, found.total, `Phase ${found.phase}`))),
      h("div", { class: "tile" }, h("dt", null, "Busy"), h("dd", null, h("strong", null, percent(found.busy_share)), progressBar(found.busy_share ?? 0, 1, "Share of the workers’ time spent on candidates"))),
      h("div", { class: "tile" }, h("dt", null, "Workers that died"), h("dd", null, h("strong", null, count(found.deaths)), h("small", null, found.deaths ? "others took their work" : "none")))),
    h("ul", { class: "workers" }, found.workers.map(one)),
  ];
}

function eventList(run) {
  if (!run.events.length) return empty("Nothing yet", "Events appear as they happen.");
  const shown = run.events.slice(-SHOWN).reverse();
  return [
    h("ol", { class: "events", tabindex: "0", role: "log", "aria-live": "off", "aria-label": "Events, the newest first", "data-key": "events" }, shown.map((event) => h("li", { class: event.data.status && event.data.status !== "ok" ? "bad" : null },
      h("time", { datetime: new Date(1000 * event.at).toISOString() }, clock(event.at)), h("span", { class: "event-kind" }, event.kind), said(words(event.kind, event.data))))),
    run.events.length > SHOWN && h("p", { class: "soft" }, `The last ${SHOWN} events.`),
  ];
}

/** Return what an event says. */
function words(kind, data) {
  if (kind === "outcome") return `candidate ${data.candidate} on ${data.documents}: ${data.status}${data.score === null || data.score === undefined ? "" : ` ${score(data.score)}`}`;
  if (kind === "started") return `a driver with ${data.workers} worker${data.workers === 1 ? "" : "s"}`;
  if (kind === "phase") return String(data.phase);
  if (kind === "test_opened") return `the winner, candidate ${data.winner}, is measured on the test documents; look ${data.look}`;
  if (kind === "optimizer") return String(data.note);
  const values = Object.entries(data).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`);
  return values.join(", ");
}
