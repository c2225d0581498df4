// Scores of the winner, the sources and the baselines: in all and by task, with intervals.

import { STAR, colour, drawing, image, mark, scale, shape, ticks, label } from "./chart.js";
import { shorten } from "./curve.js";
import { h, s, show } from "./dom.js";
import { NONE, interval, points, score } from "./format.js";

const ROW = 20;

/** Return how the models are drawn: the winner first. */
function looksOf(shown) {
  const rows = shown.baselines.map((row, place) => ({ row, name: row.name, outline: shape(place), kind: colour(place) }));
  if (shown.best) {
    const name = shown.best.chosen_on === "select" ? "winner" : "best so far";
    rows.unshift({ row: shown.best, name, outline: STAR, kind: "winner" });
  }
  return rows;
}

/** Return the place of a source among the models: it has one colour and shape everywhere. */
export function placeOf(shown, name, otherwise) {
  const place = shown.baselines.findIndex((row) => row.name === name);
  return place >= 0 ? place : shown.baselines.length + otherwise;
}

/** Return the table of models by split. */
export function scoreTable(shown, open) {
  const looks = looksOf(shown);
  const cell = (found) => h("td", { class: "number" }, found ? score(found.score) : NONE, found && interval(found) && h("small", null, interval(found)));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores of the winner and the baselines" },
    h("table", { class: "scores" },
      h("caption", null, "Mean over the tasks, with 95 % intervals."),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Model"), ["Search", "Select", "Test"].map((t) => h("th", { scope: "col", class: "number" }, t)))),
      h("tbody", null, looks.map((look) => h("tr", { class: look.kind === "winner" ? "winner" : null },
        h("th", { scope: "row" }, h("span", { class: "model" },
          s("svg", { viewBox: "-7 -7 14 14", width: 13, height: 13, "aria-hidden": "true" }, s("path", { class: `mark ${look.kind}`, d: look.outline })),
          h("button", { type: "button", class: "link", "data-key": `score-${look.row.candidate}`, onclick: () => open(look.row.candidate) }, look.name)),
          h("small", null, aside(look.row, shown))),
        h("td", { class: "number" }, score(look.row.search)), cell(look.row.select), cell(look.row.test))))));
}

function aside(row, shown) {
  if (row === shown.best) return `candidate ${row.candidate}${row.origin === "mean" ? ", the optimizer’s mean" : ""}`;
  const [kind, rest] = row.origin.split(":", 2);
  const scaled = rest?.includes("@") ? `, scale ${rest.split("@")[1]}` : "";
  return `${kind}${scaled}${shown.gain && shown.gain.over === row.name ? ", best on select" : ""}`;
}

/** Return panels of scores by task on one split, with a choice of the split. */
export function taskPanels(shown, chosen, choose) {
  const splits = ["select", "test"].filter((split) => shown.best?.[split] || shown.baselines.some((row) => row[split]));
  if (!splits.length) return null;
  const split = splits.includes(chosen) ? chosen : splits.at(-1);
  const box = h("div", { class: "panels" });
  const looks = looksOf(shown).filter((look) => look.row[split]);
  const tasks = [...new Set(looks.flatMap((look) => Object.keys(look.row[split].tasks)))];
  const rows = (task) => looks.filter((look) => task === null || look.row[split].tasks[task]).map((look) => {
    const found = task === null ? look.row[split] : look.row[split].tasks[task];
    return { ...look, value: task === null ? found.score : found.metric, low: found.low ?? null, high: found.high ?? null };
  });
  const groups = [...(tasks.length > 1 ? [["All tasks", rows(null)]] : []), ...tasks.map((task) => [task, rows(task)])];
  show(box, groups.map(([title, found]) => panel(title, found, { words: (row) => `${row.name} ${score(row.value)}`, text: score })));
  return h("div", null,
    h("fieldset", { class: "choice" }, h("legend", { class: "unseen" }, "Documents"),
      splits.map((one) => h("label", null, h("input", { type: "radio", name: "split", value: one, checked: one === split, "data-key": `split-${one}`, onchange: () => choose(one) }), one))),
    h("p", { class: "soft" }, split === "test" ? "Nothing was chosen by the test documents: these are the result." : "The winner was chosen on these, so its scores here are a little optimistic."),
    box);
}

/** Return the gains over the baselines. */
export function gainPanel(shown) {
  if (!shown.gains.length) return null;
  const known = new Map(looksOf(shown).map((look) => [look.name, look]));
  const rows = shown.gains.map((gain) => ({ ...(known.get(gain.over) ?? { outline: shape(0), kind: "ink" }), name: gain.over, value: gain.mean, low: gain.low, high: gain.high }));
  return h("div", { class: "panels single" }, panel("Gain on test over each, in points", rows, { words: (row) => `${row.name} ${points(row.value)}`, text: points, zero: true }));
}

/** Return one panel: a row for each model, its value, its interval. */
function panel(title, rows, { words, text, zero = false }) {
  const ends = rows.flatMap((row) => [row.value, row.low, row.high]).filter((v) => v !== null);
  const low = Math.min(...ends, ...(zero ? [0] : []));
  const high = Math.max(...ends, ...(zero ? [0] : []));
  const room = 0.05 * (high - low || Math.abs(high) || 1);
  const range = [low - room, high + room];
  const draw = (width) => {
    const names = Math.min(120, Math.round(0.34 * width));
    const numbers = 52;
    const box = { left: names + 8, right: width - numbers, top: 4, bottom: 4 + ROW * rows.length };
    const across = scale(range, [box.left, box.right]);
    const found = ticks(...range, Math.max(2, Math.floor((box.right - box.left) / 36)));
    return image(width, box.bottom + 24, `${title}: ${rows.map(words).join(", ")}.`,
      s("g", { class: "axes" }, found.values.map((v) => s("g", null,
        s("line", { x1: across(v), x2: across(v), y1: box.top, y2: box.bottom, class: zero && Math.abs(v) < 1e-12 ? "base" : null }),
        s("text", { x: across(v), y: box.bottom + 16, "text-anchor": "middle" }, zero ? points(v).replace(".0", "") : label(v, found.step))))),
      rows.map((row, i) => {
        const y = box.top + ROW * (i + 0.5);
        return s("g", { class: row.kind },
          s("text", { x: names, y: y + 4, "text-anchor": "end", class: row.kind === "winner" ? "row-name strong" : "row-name" }, shorten(row.name, Math.floor(names / 7))),
          s("title", null, row.name),
          row.low !== null && row.low !== row.high && s("line", { class: `whisker ${row.kind}`, x1: across(row.low), x2: across(row.high), y1: y, y2: y }),
          mark(across(row.value), y, row.outline, row.kind),
          s("text", { x: width - 2, y: y + 4, "text-anchor": "end", class: row.kind === "winner" ? "row-value strong" : "row-value" }, text(row.value)));
      }));
  };
  return h("div", { class: "panel" }, h("h3", null, title), drawing(draw));
}
