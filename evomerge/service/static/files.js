// What can be taken away: exported models, the report, recipes; and the config.

import { at, download, get, repeat, save } from "./api.js";
import { card, empty, h, problem, said, show, toast } from "./dom.js";
import { ago, bytes } from "./format.js";
import { yaml } from "./yaml.js";

const SECONDS = 2;

/** Return the part. */
export function filesPart(run) {
  const [exports, config] = [1, 2].map(() => h("div", null, h("p", { class: "soft" }, "Reading…")));
  const leaving = new AbortController();
  const signal = AbortSignal.any([run.signal, leaving.signal]);
  const node = h("div", { class: "cards" }, card("Exported models", exports), card("Report and recipes", take(run)), card("Config", config));
  let before = "";

  async function ask() {
    try {
      const found = run.begun ? (await get(at(run.name, "/exports"), signal)).exports : [];
      const state = JSON.stringify(found);
      if (state !== before) show(exports, list(run, found));
      before = state;
    } catch (error) {
      if (!signal.aborted) show(exports, problem(error.message));
    }
  }

  get(at(run.name, "/config"), signal).then((found) => show(config, configText(run, found)), () => {});
  repeat(ask, SECONDS, signal);
  return { node, refresh: () => {}, leave: () => leaving.abort() };
}

function list(run, found) {
  if (!found.length) return empty("No model was exported", "Export writes the winner, or any candidate, as a plain Hugging Face model.");
  return h("ul", { class: "exports" }, found.toReversed().map((one) => h("li", { "data-state": one.state },
    h("div", { class: "export-head" },
      h("strong", null, one.candidate === null ? "Winner" : `Candidate ${one.candidate}`),
      h("span", { class: `badge plain ${one.state}` }, one.state), h("span", { class: "soft" }, ago(one.updated))),
    one.error && h("p", { class: "reason" }, said(one.error)),
    one.state === "done" && [
      h("p", { class: "path" }, h("span", { class: "soft" }, "On the service’s machine: "), h("code", null, one.path)),
      h("ul", { class: "files" }, one.files.map((file) => h("li", null,
        file.download
          ? h("button", { type: "button", class: "link", "data-key": `file-${one.id}-${file.name}`, onclick: () => fetchFile(at(run.name, `/exports/${one.id}/files/${encodeURIComponent(file.name)}`), file.name) }, file.name)
          : h("span", { title: "Too large to be sent; take it from the path above" }, file.name),
        h("span", { class: "soft" }, bytes(file.bytes)))))])));
}

const fetchFile = (path, name) => download(path, name).catch((error) => toast(error.message, "bad"));

function take(run) {
  if (!run.shown.outcomes) return empty("Nothing yet", "They come with the first scores.");
  const button = (text, path, name) => h("button", { type: "button", onclick: async (event) => {
    const pressed = event.currentTarget;
    pressed.disabled = true;
    await fetchFile(at(run.name, path), name);
    pressed.disabled = false;
  } }, text);
  return h("div", { class: "actions" },
    button("Report (HTML)", "/report", `${run.name}.html`),
    run.shown.best && [button("Recipe", "/recipe", `${run.name}.json`), button("Recipe for mergekit", "/recipe?format=mergekit", `${run.name}-mergekit.json`)]);
}

function configText(run, found) {
  const text = yaml(found.config);
  return [
    h("div", { class: "actions" },
      h("button", { type: "button", onclick: () => save(new Blob([`${text}\n`], { type: "text/yaml" }), `${run.name}.yaml`) }, "Save"),
      h("a", { class: "button", href: `#/new/${encodeURIComponent(run.name)}` }, "Start another from it")),
    h("p", { class: "soft path" }, "Paths are relative to ", h("code", null, found.folder)),
    h("pre", { tabindex: "0", role: "region", "aria-label": "Config" }, text)];
}
