// The search's progress: every score, best so far, moving mean, sources and baselines as lines.

import { apart, axes, colour, drawing, image, legend, line, mark, shape } from "./chart.js";
import { h, replacing, s, show } from "./dom.js";
import { count, score } from "./format.js";

const DOT = "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z";
const STEP = "M-7 4h7v-8h7";
const FLAT = "M-7 0h14";
const CROSS = "M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5";
const WIDE = 620;

/**
 * Return the figure.
 *
 * @param curve What `progress` answers.
 * @param baselines `[{name, search}]`.
 * @param budget Evaluations in all, or null.
 * @param open Called with a candidate's number.
 * @param walk Holds `at`, the evaluation that a reader has walked to; it outlives the figure.
 */
export function curveFigure(curve, baselines, budget, open, walk) {
  const points = curve.points;
  const lines = baselines.map((one, place) => ({ ...one, place })).filter((one) => one.search !== null);
  const readout = h("p", { class: "readout", "aria-live": "polite" }, summary(curve));
  const failed = points.reduce((sum, point) => sum + point.failed, 0);
  const draw = (width) => figure(width, { points, lines, budget, readout, open, walk, words: summary(curve) });
  return h("figure", null,
    legend([
      ["candidate", DOT, "dot"], ["best so far", STEP, "best stroke"], ["mean of the last 20", FLAT, "mean stroke"],
      ...(failed ? [[`without a score (${count(failed)})`, CROSS, "failed stroke"]] : []),
    ]),
    drawing(draw, "curve"),
    readout,
    h("div", { class: "narrow-legend" }, legend(lines.map((one) => [`${one.name} ${score(one.search)}`, shape(one.place), colour(one.place)]))));
}

function summary(curve) {
  const last = curve.points.findLast((point) => point.best !== null);
  if (!last) return `${count(curve.evaluations)} evaluations, no score yet.`;
  return `${count(curve.evaluations)} evaluations; best search score ${score(last.best)}, mean of the last 20 ${score(last.mean)}.`;
}

function figure(width, { points, lines, budget, readout, open, walk, words }) {
  const wide = width >= WIDE;
  const height = wide ? 340 : 260;
  const box = { left: 48, right: width - (wide ? 150 : 12), top: 26, bottom: height - 42 };
  const y = scores(points, lines);
  const last = Math.max(points.length ? points.at(-1).at : 0, budget ?? 0, 2);
  const { node, across, up } = axes(box, { range: [0, last], name: "evaluations", whole: true }, { range: y, name: "search score" });
  const held = (value) => Math.min(y[1], Math.max(y[0], value));
  const marker = s("g", { class: "cursor", hidden: true });
  const drawn = image(width, height, `${words} ${lines.map((one) => `${one.name} ${score(one.search)}.`).join(" ")}`,
    node,
    s("g", null, lines.map((one) => s("line", { class: `baseline ${colour(one.place)}`, x1: box.left, x2: box.right, y1: up(held(one.search)), y2: up(held(one.search)) }))),
    wide && labels(lines, box, (value) => up(held(value))),
    s("g", { class: "dots" }, points.filter((p) => p.score !== null).map((p) => mark(across(p.at), up(held(p.score)), DOT, "dot"))),
    s("g", null, points.filter((p) => p.failed).map((p) => mark(across(p.at), box.bottom - 6, CROSS, "failed stroke"))),
    s("path", { class: "mean stroke", d: line(points.map((p) => [across(p.at), up(held(p.mean ?? NaN))])) }),
    s("path", { class: "best stroke", d: line(points.map((p) => [across(p.at), up(held(p.best ?? NaN))]), true) }),
    marker);
  if (points.length) follow(drawn, { points, across, up: (v) => up(held(v)), box, marker, readout, open, walk, words });
  return drawn;
}

/** Return the ends of the scores; what is far below all others does not press them together. */
function scores(points, lines) {
  const own = points.map((p) => p.score).filter((v) => v !== null).sort((a, b) => a - b);
  const all = [...own, ...lines.map((one) => one.search)].sort((a, b) => a - b);
  if (!all.length) return [0, 1];
  const high = all.at(-1);
  const middle = all[Math.floor(all.length / 2)];
  const low = Math.max(all[0], middle - 4 * (high - middle || 0.05));
  const room = 0.05 * (high - low || Math.abs(high) || 1);
  return [low - room, high + room];
}

function labels(lines, box, up) {
  const shown = lines.toSorted((a, b) => b.search - a.search).slice(0, Math.floor((box.bottom - box.top) / 15));
  const places = apart(shown.map((one) => up(one.search)), 15, box.top, box.bottom);
  return s("g", null, shown.map((one, i) => s("g", { class: `line-label ${colour(one.place)}` },
    s("path", { class: "lead", d: `M${box.right} ${up(one.search).toFixed(1)}L${box.right + 10} ${places[i].toFixed(1)}` }),
    mark(box.right + 17, places[i], shape(one.place), colour(one.place)),
    s("text", { x: box.right + 26, y: places[i] + 4 }, shorten(one.name, 17)), s("title", null, `${one.name} ${score(one.search)}`))));
}

/** Return a name of at most so many characters. */
export const shorten = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);

/** Let pointer and arrow keys walk along the points; Enter opens the candidate. */
function follow(drawn, { points, across, up, box, marker, readout, open, walk, words }) {
  let place = -1;
  function go(to) {
    place = Math.min(points.length - 1, Math.max(0, to));
    const p = points[place];
    walk.at = p.at;
    const x = across(p.at);
    marker.removeAttribute("hidden");
    show(marker, s("line", { x1: x, x2: x, y1: box.top, y2: box.bottom }), p.score !== null && mark(x, up(p.score), DOT, "at"));
    const who = p.candidate === null ? "no score" : `candidate ${p.candidate}: ${score(p.score)}`;
    readout.textContent = `Evaluation ${count(p.at)}, ${who}; best so far ${score(p.best)}, mean ${score(p.mean)}.`;
  }
  function end() {
    if (replacing) return;
    place = -1;
    walk.at = null;
    marker.setAttribute("hidden", "");
    readout.textContent = words;
  }
  if (walk.at !== null) go(points.findIndex((p) => p.at >= walk.at));
  drawn.setAttribute("tabindex", "0");
  drawn.dataset.key = "curve";
  drawn.addEventListener("pointermove", (event) => {
    const x = event.clientX - drawn.getBoundingClientRect().left;
    let nearest = 0;
    points.forEach((p, i) => {
      if (Math.abs(across(p.at) - x) < Math.abs(across(points[nearest].at) - x)) nearest = i;
    });
    go(nearest);
  });
  drawn.addEventListener("pointerleave", end);
  drawn.addEventListener("blur", end);
  drawn.addEventListener("click", () => place >= 0 && points[place].candidate !== null && open(points[place].candidate));
  drawn.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: points.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      go(to);
    } else if (event.key === "Enter" && place >= 0 && points[place].candidate !== null) {
      event.preventDefault(); // else the same key press would go on to the dialog's first button
      open(points[place].candidate);
    }
  });
}
