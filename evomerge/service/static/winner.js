// The winner: its parameters over depth, those that are one number, and its layer path.

import { axes, colour, drawing, image, legend, line, mark, shape } from "./chart.js";
import { h, s } from "./dom.js";
import { value } from "./format.js";
import { placeOf } from "./scores.js";

const MOST_PANELS = 12;
const WHOLE = "merge";

/** Return the drawings and tables of what `winner` answers; `shown` says which colours the models have. */
export function winnerFigures(found, shown) {
  const varies = found.parameters.filter((one) => Object.values(one.values).some(Array.isArray));
  const constant = found.parameters.filter((one) => !Object.values(one.values).some(Array.isArray));
  const ofMerge = constant.filter((one) => WHOLE in one.values);
  const ofSources = constant.filter((one) => !(WHOLE in one.values));
  const names = sources(found);
  const look = looks(names, shown);
  return [
    found.path.length > 0 && pathFigure(found.path, shown),
    varies.length > 0 && h("figure", null,
      legend(names.filter((name) => varies.some((one) => name in one.values)).map((name) => [name === WHOLE ? "whole merge" : name, ...look(name)])),
      h("div", { class: varies.length === 1 ? "panels single" : "panels" }, varies.slice(0, MOST_PANELS).map((one) => depthPanel(one, look, found.layers))),
      varies.length > MOST_PANELS && h("figcaption", null, `The first ${MOST_PANELS} of ${varies.length} parameters; the recipe has all.`)),
    ofSources.length > 0 && constants(ofSources, names.filter((name) => name !== WHOLE)),
    ofMerge.length > 0 && h("dl", { class: "facts whole" }, ofMerge.map((one) =>
      [h("dt", null, one.parameter, one.tensors === "all tensors" ? null : `, ${one.tensors}`), h("dd", null, value(one.values.merge))])),
  ].filter(Boolean);
}

/** Return a function from a source's name to shape and colour. */
function looks(names, shown) {
  return (name) => {
    const place = name === WHOLE ? 0 : placeOf(shown, name, names.indexOf(name));
    return name === WHOLE ? [shape(0), "ink"] : [shape(place), colour(place)];
  };
}

function sources(found) {
  const names = new Set(found.parameters.flatMap((one) => Object.keys(one.values)));
  names.delete(WHOLE);
  return [...names, WHOLE];
}

/** Return one parameter from the first layer to the last. */
function depthPanel(one, look, layers) {
  const rows = Object.entries(one.values).map(([name, found]) => ({
    name, look: look(name), values: Array.isArray(found) ? found : new Array(layers).fill(found),
  }));
  const known = rows.flatMap((row) => row.values).filter((v) => typeof v === "number");
  const low = Math.min(0, ...known);
  const high = Math.max(...known, low + 0.01);
  const draw = (width) => {
    const box = { left: 40, right: width - 10, top: 12, bottom: 150 };
    const { node, across, up } = axes(box, { range: [0, Math.max(1, layers - 1)], name: "layer", whole: true },
      { range: [low, high + 0.06 * (high - low)], count: 4 });
    const words = rows.map((row) => `${row.name} ${value(row.values[0])} to ${value(row.values.at(-1))}`).join(", ");
    const each = Math.max(1, Math.ceil(layers / 12));
    return image(width, 188, `${one.parameter}, ${one.tensors}, from the first layer to the last: ${words}.`, node,
      rows.map((row) => s("g", null,
        s("path", { class: `stroke ${row.look[1]}`, d: line(row.values.map((v, layer) => [across(layer), up(v ?? NaN)])) }),
        row.values.map((v, layer) => v !== null && layer % each === 0 && mark(across(layer), up(v), ...row.look)))));
  };
  return h("div", { class: "panel" }, h("h3", null, one.parameter, h("small", null, ` ${one.tensors}`)), drawing(draw));
}

function constants(rows, names) {
  const shown = names.filter((name) => rows.some((row) => name in row.values));
  const numbers = rows.flatMap((row) => Object.values(row.values)).filter((v) => typeof v === "number");
  const most = Math.max(...numbers.map(Math.abs), 1e-9);
  const cell = (found) => h("td", { class: "number" }, value(found),
    typeof found === "number" && s("svg", { class: "meter", viewBox: "0 0 60 4", width: 60, height: 4, preserveAspectRatio: "none", "aria-hidden": "true" },
      s("rect", { class: "track", width: 60, height: 4 }), s("rect", { class: "value", width: (60 * Math.abs(found)) / most, height: 4 })));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Parameters with one value for each source" },
    h("table", null, h("caption", null, "One value each, not by layer"),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Parameter"), h("th", { scope: "col" }, "Tensors"),
        shown.map((name) => h("th", { scope: "col", class: "number" }, name)))),
      h("tbody", null, rows.map((row) => h("tr", null, h("th", { scope: "row" }, row.parameter), h("td", null, row.tensors),
        shown.map((name) => cell(row.values[name])))))));
}

/** Return a layer path from left to right, and the scales between. */
function pathFigure(path, shown) {
  const names = [...new Set(path.map((step) => step.source))];
  const scaled = path.some((step) => step.scale !== 1);
  const layers = Math.max(...path.map((step) => step.layer), 1);
  const look = looks(names, shown);
  const dot = (x, y, step) => mark(x, y, ...look(step.source));
  const draw = (width) => {
    const box = { left: 44, right: width - 14, top: 26, bottom: 216 };
    const x = { range: [0, Math.max(1, path.length - 1)], whole: true, name: scaled ? "" : "place in the path" };
    const upper = axes(box, x, { range: [0, layers * 1.05], name: "layer of the source", whole: true, count: 5 });
    const parts = [upper.node,
      s("path", { class: "trail", d: line(path.map((step, i) => [upper.across(i), upper.up(step.layer)])) }),
      path.map((step, i) => dot(upper.across(i), upper.up(step.layer), step))];
    if (scaled) {
      const low = Math.min(1, ...path.map((step) => step.scale));
      const high = Math.max(1, ...path.map((step) => step.scale));
      const room = 0.1 * (high - low || 1);
      const below = axes({ ...box, top: 270, bottom: 360 }, { ...x, name: "place in the path" }, { range: [low - room, high + room], name: "scale before it", count: 3 });
      parts.push(below.node, s("line", { class: "unit", x1: box.left, x2: box.right, y1: below.up(1), y2: below.up(1) }),
        path.map((step, i) => [s("line", { class: "stem", x1: below.across(i), x2: below.across(i), y1: below.up(1), y2: below.up(step.scale) }),
          dot(below.across(i), below.up(step.scale), step)]));
    }
    return image(width, scaled ? 402 : 256, `The model runs through ${path.length} layers: ${stretches(path)}.`, ...parts.flat(2));
  };
  return h("figure", null, legend(names.map((name) => [name, ...look(name)])), drawing(draw),
    h("figcaption", null, `${path.length} layers: ${stretches(path)}.`));
}

function stretches(path) {
  const runs = [];
  for (const step of path) {
    const last = runs.at(-1);
    if (last && last.source === step.source && last.end + 1 === step.layer) last.end = step.layer;
    else runs.push({ source: step.source, first: step.layer, end: step.layer });
  }
  return runs.map((run) => `${run.source} ${run.first}${run.end > run.first ? ` to ${run.end}` : ""}`).join(", ");
}
