// Makes elements. Text only ever becomes text: nothing here, or anywhere else, parses markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.setAttribute("class", value);
    else if (name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Return an HTML element; strings among the children become text. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Return an SVG element. */
export function s(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** Whether elements are being replaced: who loses the focus then was not left. */
export let replacing = false;

/** Replace what a node holds; the focus stays on the element with the same `data-key`. */
export function show(node, ...children) {
  const held = node.contains(document.activeElement) ? document.activeElement.dataset?.key : undefined;
  replacing = true;
  node.replaceChildren();
  replacing = false;
  append(node, children);
  if (held === undefined) return;
  const again = [...node.querySelectorAll("[data-key]")].find((one) => one.dataset.key === held);
  again?.focus({ preventScroll: true });
}

const shown = new WeakMap();

/** Do `show` with what `build` returns, unless nothing of `data` has changed since. */
export function showChanged(node, data, build) {
  const state = JSON.stringify(data);
  if (shown.get(node) === state) return;
  shown.set(node, state);
  show(node, build());
}

/** Return text of others: its direction cannot turn the text around it. */
export function said(text, properties) {
  return h("bdi", { dir: "auto", ...properties }, text);
}

/** Say something to those who hear the page. */
export function announce(text) {
  document.getElementById("live").textContent = text;
}

/** Show a line for a while; it is spoken too. */
export function toast(text, kind = "") {
  const line = h("div", { class: `toast ${kind}`, role: kind === "bad" ? "alert" : "status" }, said(text));
  document.getElementById("toasts").append(line);
  setTimeout(() => line.remove(), kind === "bad" ? 12000 : 6000);
}

/** Return a section with a heading. */
export function card(title, ...children) {
  const id = `h-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return h("section", { class: "card", "aria-labelledby": id }, h("h2", { id }, title), ...children);
}

/** Return what stands where nothing is yet. */
export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("p", { class: "empty-title" }, title), text && h("p", null, text), ...more);
}

/** Return an error's line. */
export function problem(text) {
  return h("p", { class: "note bad", role: "alert" }, said(text));
}

/**
 * Return a dialog that is opened at once and gone when it is closed.
 *
 * @param build Called with `close`; returns what the dialog holds.
 */
export function dialog(title, build, kind = "") {
  const back = document.activeElement;
  const box = h("dialog", { class: kind, "aria-labelledby": "dialog-title" });
  const close = () => box.close();
  box.append(
    h("div", { class: "dialog-head" }, h("h2", { id: "dialog-title" }, title),
      h("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: close }, "✕")),
  );
  append(box, [build(close)]);
  box.addEventListener("close", () => {
    box.remove();
    // What opened it may have been replaced meanwhile.
    const key = back?.dataset?.key;
    const again = key && [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key);
    (back?.isConnected ? back : again || document.getElementById("main")).focus();
  });
  box.addEventListener("click", (event) => event.target === box && close());
  document.body.append(box);
  box.showModal();
  box.querySelector("[data-first]")?.focus();
  return box;
}
