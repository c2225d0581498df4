// Begins: the token, the colours, and which page is shown.

import { ServiceError, get, onRefused, repeat, token } from "./api.js";
import { h, problem, show } from "./dom.js";
import { count } from "./format.js";
import { listPage } from "./list.js";
import { runPage } from "./run.js";
import { submitPage } from "./submit.js";

const main = document.getElementById("main");
const THEMES = ["system", "light", "dark"];
let leaving = new AbortController();
let loading = null;
let shownRun = null;

function paintTheme() {
  const chosen = localStorage.getItem("evomerge-theme");
  const theme = THEMES.includes(chosen) ? chosen : "system";
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
  button.title = `Colours: ${theme}`;
  button.setAttribute("aria-label", `Colours: ${theme}. Change`);
}

function changeTheme() {
  const now = THEMES.indexOf(localStorage.getItem("evomerge-theme") ?? "system");
  localStorage.setItem("evomerge-theme", THEMES[(now + 1) % THEMES.length]);
  paintTheme();
}

/** Ask for the token; `refused` says why the last one is gone. */
function gate(refused = "") {
  leave();
  loading?.abort();
  document.getElementById("nav").hidden = true;
  document.getElementById("leave").hidden = true;
  document.getElementById("load").textContent = "";
  document.title = "Sign in · evomerge";
  for (const open of document.querySelectorAll("dialog[open]")) open.close();
  const input = h("input", { type: "password", id: "token", required: true, autocomplete: "current-password", spellcheck: "false", "aria-describedby": "refused" });
  const said = h("div", { id: "refused" }, refused && problem(refused));
  const submit = async (event) => {
    event.preventDefault();
    token.set(input.value.trim());
    try {
      await get("/info");
      begin();
    } catch (error) {
      token.forget();
      if (!(error instanceof ServiceError) || error.status !== 401) show(said, problem(error.message));
    }
  };
  show(main, h("form", { class: "gate card", onsubmit: submit },
    h("h1", null, "Sign in"),
    h("p", null, "This service asks for its token. Its operator finds it in the file ", h("code", null, "token"), " of the service’s folder; ", h("code", null, "evomerge serve"), " prints where that is."),
    said, h("label", { for: "token" }, "Token", input),
    h("button", { type: "submit", class: "first" }, "Sign in"),
    h("p", { class: "soft" }, "It is kept until this tab is closed.")));
  input.focus();
}

function leave() {
  leaving.abort();
  leaving = new AbortController();
  shownRun = null;
}

function begin() {
  document.getElementById("nav").hidden = false;
  document.getElementById("leave").hidden = false;
  loading = new AbortController();
  repeat(paintLoad, 5, loading.signal);
  route();
}

async function paintLoad() {
  const info = await get("/info", loading.signal).catch(() => null);
  document.getElementById("load").textContent = info ? `${count(info.running)} running, ${count(info.queued)} waiting` : "";
}

/** Show the page of the address. */
async function route() {
  if (!token.get()) {
    gate();
    return;
  }
  const [, page = "", name = "", part = ""] = location.hash.split("/").map(decode);
  for (const link of document.querySelectorAll("#nav a")) {
    const own = link.getAttribute("href") === (page === "new" ? "#/new" : "#/");
    if (own) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (page === "runs" && name && shownRun?.name === name) {
    (await shownRun.choose)(part);
    return;
  }
  leave();
  const { signal } = leaving;
  document.title = `${page === "runs" && name ? name : page === "new" ? "New run" : "Runs"} · evomerge`;
  scrollTo(0, 0);
  if (page === "runs" && name) {
    const choose = runPage(main, name, signal);
    shownRun = { name, choose };
    (await choose)(part);
  } else if (page === "new") await submitPage(main, name, signal);
  else listPage(main, signal);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

onRefused(() => {
  if (!token.get()) return;
  token.forget();
  gate("The service refused the token.");
});
document.getElementById("theme").addEventListener("click", changeTheme);
document.getElementById("leave").addEventListener("click", () => {
  token.forget();
  gate();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", route);
paintTheme();
if (token.get()) begin();
else gate();
