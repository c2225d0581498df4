// Candidates without a score, by reason: those that differ in numbers only are one.

import { at, get } from "./api.js";
import { card, empty, h, problem, said, show } from "./dom.js";
import { count } from "./format.js";
import { waiting } from "./status.js";

const MOST = 500;
const NUMBERS = 8;

/** Return the part. */
export function failuresPart(run) {
  const body = h("div");
  const node = card("Failures", h("p", { class: "soft" }, "Invalid: the candidate itself is at fault. Failed: it could not be scored. Neither ends the search."), body);
  let seen = -1;

  async function refresh() {
    if (!run.begun) show(body, waiting(run));
    else if (run.shown.failures !== seen) {
      try {
        const pages = await Promise.all(["failed", "invalid"].map((status) => get(at(run.name, `/candidates?status=${status}&limit=${MOST}`), run.signal)));
        seen = run.shown.failures;
        paint(body, run, pages);
      } catch (error) {
        if (!run.signal.aborted) show(body, problem(error.message));
      }
    }
  }

  return { node, refresh };
}

function paint(body, run, pages) {
  const outcomes = pages.flatMap((page) => page.candidates.flatMap((one) => one.outcomes.map((outcome) => ({ ...outcome, candidate: one.number }))));
  const known = new Set(outcomes.map((one) => `${one.candidate} ${one.documents}`));
  const later = run.shown.failed.filter((one) => !known.has(`${one.candidate} ${one.documents}`));
  const rows = reasons([...outcomes, ...later].filter((one) => one.status === "failed" || one.status === "invalid"));
  const left = pages.reduce((sum, page) => sum + page.total - page.candidates.length, 0);
  if (!rows.length) {
    show(body, empty("Nothing failed", "Every candidate has a score, or was stopped early by racing."));
    return;
  }
  show(body,
    h("ul", { class: "reasons" }, rows.map((row) => h("li", null,
      h("div", { class: "reason-head" }, h("span", { class: `badge plain ${row.status}` }, row.status), h("strong", null, `${count(row.numbers.length)}×`),
        h("span", { class: "numbers" }, row.numbers.slice(0, NUMBERS).map((number) => h("button", { type: "button", class: "link", "data-key": `failed-${number}`, onclick: () => run.open(number) }, `#${number}`)),
          row.numbers.length > NUMBERS && h("span", { class: "soft" }, `and ${count(row.numbers.length - NUMBERS)} more`))),
      h("p", { class: "reason" }, said(row.reason || "no reason given"))))),
    left > 0 && h("p", { class: "soft" }, `${count(left)} more failures are in the table of candidates.`));
}

function reasons(outcomes) {
  const found = new Map();
  for (const one of outcomes) {
    const key = `${one.status} ${one.reason.replace(/\d+/g, "0")}`;
    if (!found.has(key)) found.set(key, { status: one.status, reason: one.reason, numbers: [] });
    found.get(key).numbers.push(one.candidate);
  }
  return [...found.values()].sort((a, b) => b.numbers.length - a.numbers.length);
}
