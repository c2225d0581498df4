// A new run: a config as text or file, checked while it is written, with what is wrong at its line.

import { at, get, post } from "./api.js";
import { announce, h, said, show, toast } from "./dom.js";
import { count } from "./format.js";
import { lineOf, yaml } from "./yaml.js";

const EXAMPLE = `name: my-run

sources:
  base: ./base              # below the service's folders
  models: [./math, ./code]

space:
  method: ties
  granularity: {anchors: 3}

fitness:
  tasks: [gsm8k]

budget: {evaluations: 100}
`;
const TYPING = 400;

/** Show the page; `from` is the name of a run whose config it begins with. */
export async function submitPage(main, from, signal) {
  const [info, text, folder] = await begin(from, signal);
  const editor = h("textarea", { id: "config", spellcheck: "false", autocapitalize: "off", autocomplete: "off", wrap: "off", rows: "24", value: text, "aria-describedby": "verdict" });
  const gutter = h("div", { class: "gutter", "aria-hidden": "true" });
  const place = h("input", { id: "folder", value: folder, placeholder: info.roots?.[0] ?? "", maxlength: "4096", list: "roots", spellcheck: "false", autocomplete: "off" });
  const priority = h("input", { id: "priority", type: "number", min: "-1000", max: "1000", value: "0" });
  const verdict = h("div", { id: "verdict", class: "verdict-box", role: "status" });
  const check = h("button", { type: "button", onclick: () => validate(false) }, "Check all");
  const go = h("button", { type: "submit", class: "first" }, "Submit");
  let typing = 0;
  const state = { turn: 0, wrong: new Set(), key: "", sent: "" };

  const wish = () => ({ config: editor.value, folder: place.value.trim() || null });

  function paintGutter() {
    const lines = editor.value.split("\n").length;
    show(gutter, Array.from({ length: lines }, (_, i) => h("span", { class: state.wrong.has(i) ? "wrong" : null }, String(i + 1))));
    gutter.scrollTop = editor.scrollTop;
  }

  function tell(error) {
    const faults = error ? [error, ...(error.others ?? [])] : [];
    const places = faults.map(({ key }) => (key ? lineOf(editor.value, key) : null));
    state.wrong = new Set(places.filter((place) => place !== null));
    editor.toggleAttribute("aria-invalid", Boolean(error));
    if (error) show(verdict, faults.map((fault, i) => told(fault, places[i])));
    paintGutter();
  }

  function told({ key, message }, place) {
    return [
      h("p", { class: "note bad" }, key && h("code", { class: "key" }, key),
        said(key ? message.replace(`config: ${key}: `, "").replace(`${key}: `, "") : message)),
      place !== null && h("button", { type: "button", class: "link", "data-key": `jump ${key}`, onclick: () => jump(place) }, `Go to line ${place + 1}`)];
  }

  function jump(place) {
    const lines = editor.value.split("\n");
    const begin = lines.slice(0, place).reduce((sum, line) => sum + line.length + 1, 0);
    editor.focus();
    editor.setSelectionRange(begin, begin + lines[place].length);
    editor.scrollTop = Math.max(0, (place - 5) * parseFloat(getComputedStyle(editor).lineHeight));
  }

  async function validate(quick) {
    clearTimeout(typing);
    const turn = (state.turn += 1);
    if (!quick) {
      show(verdict, h("p", { class: "soft" }, "Reading sources and tasks…"));
      check.disabled = true;
    }
    try {
      const [found] = await post("/configs/validate", { ...wish(), quick }, { signal });
      if (turn !== state.turn) return;
      tell(null);
      show(verdict, quick ? h("p", { class: "note good" }, "The keys and values fit. “Check all” reads sources and tasks too.") : summary(found));
    } catch (error) {
      if (turn === state.turn && !signal.aborted) tell(error);
    } finally {
      if (!quick) check.disabled = false;
    }
  }

  async function submit(event) {
    event.preventDefault();
    clearTimeout(typing);
    state.turn += 1;
    go.disabled = true;
    const body = { ...wish(), priority: Number(priority.value) || 0 };
    const sent = JSON.stringify(body);
    if (sent !== state.sent) Object.assign(state, { sent, key: random() });
    try {
      const [line, status] = await post("/runs", body, { headers: { "idempotency-key": state.key } });
      if (status === 200) toast(`${line.name} was submitted before; this is it`);
      location.hash = `#${at(line.name)}`;
    } catch (error) {
      tell(error);
      announce("The config was refused.");
    }
    go.disabled = false;
  }

  const typed = () => {
    paintGutter();
    clearTimeout(typing);
    typing = setTimeout(() => validate(true), TYPING);
  };
  editor.addEventListener("input", typed);
  editor.addEventListener("scroll", () => (gutter.scrollTop = editor.scrollTop));
  place.addEventListener("input", typed);
  const file = h("input", { type: "file", id: "file", class: "unseen", accept: ".yaml,.yml,.json,.txt", onchange: async (event) => {
    const [chosen] = event.target.files;
    if (!chosen) return;
    editor.value = await chosen.text();
    typed();
  } });

  show(main,
    h("div", { class: "title" }, h("h1", null, "New run")),
    h("form", { class: "new", onsubmit: submit },
      h("div", { class: "write" },
        h("div", { class: "write-head" }, h("label", { for: "config" }, "Config"), h("span", { class: "file" }, file, h("label", { for: "file", class: "button" }, "Open a file"))),
        h("div", { class: "editor" }, gutter, editor)),
      h("div", { class: "side" },
        h("label", { for: "folder" }, "Folder that paths are relative to", place, h("datalist", { id: "roots" }, (info.roots ?? []).map((root) => h("option", { value: root })))),
        h("label", { for: "priority" }, "Priority; higher ones start first", priority),
        h("div", { class: "actions" }, go, check),
        verdict,
        h("p", { class: "soft" }, `${info.running ?? 0} running, ${info.queued ?? 0} waiting; ${info.at_once ?? 1} at once.`))));
  paintGutter();
  validate(true);
}

async function begin(from, signal) {
  const info = await get("/info", signal).catch(() => ({}));
  if (!from) return [info, EXAMPLE, ""];
  try {
    const { config, folder } = await get(at(from, "/config"), signal);
    // The service decides about some keys itself, and refuses them.
    const own = { ...config, name: `${config.name}-2`.slice(-100), output: { ...config.output }, workers: { ...config.workers } };
    delete own.store;
    delete own.output.folder;
    delete own.workers.ray_address;
    return [info, `${yaml(own)}\n`, folder];
  } catch (error) {
    toast(error.message, "bad");
    return [info, EXAMPLE, ""];
  }
}

const random = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Return what a run would do. */
function summary(found) {
  const row = ([key, value]) => [h("dt", null, key.replaceAll("_", " ")), h("dd", null, said(typeof value === "number" ? count(value) : typeof value === "object" ? yaml(value) : String(value)))];
  return [
    h("p", { class: "note good" }, "Everything that needs no worker was checked."),
    found.warnings.map((warning) => h("p", { class: "note" }, said(warning))),
    h("dl", { class: "facts" }, Object.entries(found.summary).filter(([, value]) => value !== null && value !== "").map(row)),
  ];
}
