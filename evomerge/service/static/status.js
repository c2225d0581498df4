// A run's status, and what it looks like.

import { empty, h } from "./dom.js";

export const STATUSES = ["queued", "starting", "running", "stopped", "failed", "finished", "interrupted", "cancelled"];
export const LIVE = ["queued", "starting", "running"];

export const badge = (status) => h("span", { class: `badge ${status}` }, status);

/** Return a bar of how much of the budget is spent. */
export function progressBar(done, total, name) {
  const most = Math.max(1, total ?? done);
  return h("progress", { max: most, value: Math.min(done, most), "aria-label": name });
}

/** Return what a part shows while its run has nothing yet. */
export function waiting(run) {
  const status = run.line?.status ?? run.shown.status;
  if (status === "queued") return empty("It waits", "Other runs are before it. It starts by itself.");
  if (LIVE.includes(status)) return empty("It begins", "Sources and tasks are read; the first scores come soon.");
  return empty("Nothing was scored", "The run ended before its first outcome.");
}
