// What changes a run: cancel, resume, export. Each asks first.

import { at, post } from "./api.js";
import { dialog, h, problem, show, toast } from "./dom.js";

/** Return the foot of a dialog: the buttons, and where a refusal is shown. */
function foot(close, text, kind, action) {
  const refusal = h("div");
  const go = h("button", { type: "submit", class: kind }, text);
  const back = h("button", { type: "button", onclick: close }, "Back");
  const submit = async (event) => {
    event.preventDefault();
    go.disabled = true;
    try {
      await action();
      close();
    } catch (error) {
      show(refusal, problem(error.message));
      go.disabled = false;
    }
  };
  return { submit, nodes: [refusal, h("div", { class: "dialog-foot" }, back, go)], go };
}

/** Ask how to end a run. */
export function cancelDialog(run) {
  const waits = run.line?.status === "queued";
  dialog(`Cancel ${run.name}?`, (close) => {
    const now = h("input", { type: "checkbox", id: "now" });
    const { submit, nodes } = foot(close, "Cancel the run", "danger", async () => {
      const [line] = await post(at(run.name, "/cancel"), { now: now.checked });
      toast(line.status === "running" ? `${run.name} stops ${now.checked ? "now" : "after the candidates that are running"}` : `${run.name} is ${line.status}`);
    });
    return h("form", { onsubmit: submit },
      h("p", null, waits ? "It leaves the queue." : "It ends after the candidates that are running, and can be resumed later. What it has found is kept."),
      !waits && h("label", { class: "check" }, now, "Do not wait for the running candidates"), nodes);
  });
}

/** Ask for a new budget and go on. */
export function resumeDialog(run) {
  const spent = run.line?.evaluations ?? run.shown.evaluations;
  const budget = run.line?.budget ?? run.config.budget?.evaluations ?? spent;
  const proposed = run.shown.status === "finished" || spent >= budget ? Math.max(budget, 2 * spent) : budget;
  dialog(`Resume ${run.name}?`, (close) => {
    const evaluations = h("input", { type: "number", id: "evaluations", min: "1", max: "1000000000", required: true, value: String(proposed), "data-first": true });
    const workers = h("input", { type: "number", id: "workers", min: "1", max: "10000", placeholder: "as before" });
    const drift = h("input", { type: "checkbox", id: "drift" });
    const { submit, nodes } = foot(close, "Resume", "first", async () => {
      const wish = { evaluations: Number(evaluations.value), accept_drift: drift.checked };
      if (workers.value) wish.workers = Number(workers.value);
      await post(at(run.name, "/resume"), wish);
      toast(`${run.name} is queued`);
      run.again();
    });
    return h("form", { onsubmit: submit },
      h("p", null, `${spent} of ${budget} evaluations are done. The search goes on where it stopped.`),
      h("div", { class: "fields" },
        h("label", { for: "evaluations" }, "Evaluations in all", evaluations),
        h("label", { for: "workers" }, "Workers", workers)),
      h("label", { class: "check" }, drift, "Go on although sources or tasks have changed"), nodes);
  });
}

/** Ask whether to write a candidate as a model. */
export function exportDialog(run, number, winner) {
  dialog(`Export candidate ${number}?`, (close) => {
    const { submit, nodes, go } = foot(close, "Export", "first", async () => {
      await post(at(run.name, "/exports"), { candidate: number });
      for (const open of document.querySelectorAll("dialog[open]")) open.close();
      location.hash = `#${at(run.name, "/files")}`;
      toast(`candidate ${number} is being written; see Files`);
    });
    go.dataset.first = "";
    return h("form", { onsubmit: submit },
      h("p", null, `${winner ? "The winner" : "It"} is written as a plain Hugging Face model below the service’s folder, in the background. Small files can be taken away over this page; for large ones it shows the path.`), nodes);
  });
}
