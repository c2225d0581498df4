// The little that all drawings share: scales, ticks, axes, and drawing anew when the width changes.

import { h, s, show } from "./dom.js";

const COLOURS = 8;

/** Return the class of a series' colour. */
export const colour = (place) => `c${((place % COLOURS) + COLOURS) % COLOURS}`;

/** Return round numbers between two ends, at most `most` (two at least), and the step between them. */
export function ticks(low, high, most = 5, whole = false) {
  const span = high - low || 1;
  const first = (step) => Math.ceil(low / step - 1e-9);
  const number = (step) => Math.floor(high / step + 1e-9) - first(step) + 1;
  const power = 10 ** (Math.floor(Math.log10(span)) - 2);
  const steps = [0, 1, 2, 3].flatMap((e) => [1, 2, 2.5, 5].map((f) => f * power * 10 ** e)).filter((step) => !whole || Number.isInteger(step));
  const step = steps.find((one) => number(one) <= Math.max(2, most)) ?? Math.max(1, span);
  return { step, values: Array.from({ length: Math.max(0, number(step)) }, (_, i) => (first(step) + i) * step) };
}

/** Return a function from data to pixels. */
export const scale = (from, to) => (value) => to[0] + ((value - from[0]) / (from[1] - from[0] || 1)) * (to[1] - to[0]);

/** Return a tick's text: as many decimals as tell neighbours apart. */
export function label(value, step) {
  const decimals = Math.min(6, Math.max(0, -Math.floor(Math.log10(step || 1) + 1e-9)));
  const more = decimals < 6 && Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6 ? 1 : 0;
  return value.toFixed(decimals + more).replace("-", "\u2212");
}

/**
 * Return axes over a box: grid lines, tick labels, names of the axes.
 *
 * @param box `{left, right, top, bottom}` in pixels.
 * @param x,y `{range, name, whole, count}`.
 */
export function axes(box, x, y) {
  const across = scale(x.range, [box.left, box.right]);
  const up = scale(y.range, [box.bottom, box.top]);
  const rows = ticks(...y.range, y.count ?? Math.max(2, Math.round((box.bottom - box.top) / 48)), y.whole);
  const columns = ticks(...x.range, x.count ?? Math.max(2, Math.round((box.right - box.left) / 90)), x.whole);
  const node = s("g", { class: "axes" },
    rows.values.map((v) => s("g", null,
      s("line", { x1: box.left, x2: box.right, y1: up(v), y2: up(v) }),
      s("text", { x: box.left - 8, y: up(v) + 4, "text-anchor": "end" }, label(v, rows.step)))),
    columns.values.map((v) => s("text", { x: across(v), y: box.bottom + 18, "text-anchor": "middle" }, label(v, columns.step))),
    s("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    x.name && s("text", { class: "name", x: box.right, y: box.bottom + 34, "text-anchor": "end" }, x.name),
    y.name && s("text", { class: "name", x: box.left - 8, y: box.top - 10, "text-anchor": "start" }, y.name));
  return { node, across, up };
}

/** Return a path through points; a point without a number breaks it. */
export function line(points, steps = false) {
  let text = "";
  let before = null;
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) {
      before = null;
      continue;
    }
    const place = `${x.toFixed(1)} ${y.toFixed(1)}`;
    if (before === null) text += `M${place}`;
    else text += steps ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `L${place}`;
    before = y;
  }
  return text;
}

/** Return an image of so many pixels that says in words what it shows. */
export function image(width, height, words, ...children) {
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": words }, ...children);
}

const widths = new Map();

/**
 * Return a box whose drawing is made for its width, and made anew when that changes.
 *
 * @param key Of a drawing that takes the focus: it is there at once, with the width of the one before it.
 */
export function drawing(draw, key = "") {
  let width = widths.get(key) ?? 0;
  const box = h("div", { class: "drawing" }, width > 0 && draw(width));
  new ResizeObserver(() => {
    const now = Math.floor(box.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      if (key) widths.set(key, width);
      show(box, draw(width));
    }
  }).observe(box);
  return box;
}

const SHAPES = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-4.6L4.6 3.7h-9.2z", "M0-5L5 0L0 5L-5 0z",
  "M0 4.6L4.6-3.7h-9.2z", "M-1.6-4.8h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z",
];
export const STAR = "M0-6.5L1.6-2.1L6.2-2L2.6.9L3.9 5.3L0 2.8L-3.9 5.3L-2.6.9L-6.2-2L-1.6-2.1z";

/** Return the shape of a series: with its colour it tells series apart, without it too. */
export const shape = (place) => SHAPES[(place + Math.floor(place / COLOURS)) % SHAPES.length];

/** Return a mark at a place. */
export function mark(x, y, outline, kind) {
  return s("path", { class: `mark ${kind}`, d: outline, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
}

/** Return a legend: `[[name, outline, class]]`. */
export function legend(entries) {
  return h("ul", { class: "legend" }, entries.map(([name, outline, kind]) =>
    h("li", null, s("svg", { viewBox: "-7 -7 14 14", width: 12, height: 12, "aria-hidden": "true" },
      s("path", { class: `mark ${kind}`, d: outline })), h("span", null, name))));
}

/** Move labels apart that would lie on each other; they stay in order and inside. */
export function apart(places, least, low, high) {
  const order = places.map((place, i) => [place, i]).sort((a, b) => a[0] - b[0]);
  const found = new Array(places.length);
  let last = low - least;
  for (const [place, i] of order) last = found[i] = Math.max(place, last + least);
  let next = high + least;
  for (const [, i] of order.reverse()) next = found[i] = Math.min(found[i], next - least);
  return found;
}
