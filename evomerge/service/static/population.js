// The population of a run with niches: who lives, what each is good at, where it comes from.

import { at, get } from "./api.js";
import { axes, colour, drawing, image, legend, line } from "./chart.js";
import { card, empty, h, problem, s, show } from "./dom.js";
import { NONE, count, fixed, percent, score } from "./format.js";
import { placeOf } from "./scores.js";
import { waiting } from "./status.js";

const SQUARE = "M-5-5h10v10h-10z";
const FLAT = "M-7 0h14";
const CURVES = [["coverage", "solved by somebody", "c1"], ["best", "best score that lives", "winner"], ["entropy", "entropy, bits", "c0"]];

/** Return the part. */
export function populationPart(run) {
  const node = h("div", { class: "cards" });
  let seen = "";

  async function refresh() {
    const state = `${run.shown.outcomes}`;
    if (!run.begun || run.shown.evaluations === 0) show(node, waiting(run));
    else if (state !== seen) {
      try {
        const found = await get(at(run.name, "/population"), run.signal);
        seen = state;
        show(node, cards(run, found));
      } catch (error) {
        if (!run.signal.aborted) show(node, error.status === 409 ? empty("Nobody lives yet", "The first scores come soon.") : problem(error.message));
      }
    }
  }

  return { node, refresh };
}

function cards(run, found) {
  const tasks = names(found.individuals, "niche");
  const sources = names(found.individuals, "ancestry");
  const tile = (name, number, more) => h("div", { class: "tile" }, h("dt", null, name), h("dd", null, h("strong", null, number), h("small", null, more)));
  return [
    h("dl", { class: "tiles" },
      tile("Living", count(found.individuals.length), "individuals"),
      tile("Coverage", percent(found.coverage), `of ${count(found.documents)} documents solved by somebody`),
      tile("Entropy", fixed(found.entropy, 2), "bits; near 0 all behave alike")),
    found.curve.length > 1 && card("Over time", h("figure", null, legend(CURVES.map(([, name, kind]) => [name, FLAT, `stroke ${kind}`])), drawing((width) => curves(width, found.curve)))),
    card("Who lives",
      tasks.length > 0 && h("p", { class: "key" }, h("span", { class: "soft" }, "Niche: the tasks that its fitness comes from"), legend(tasks.map((task, i) => [task, SQUARE, colour(i + 5)]))),
      sources.length > 0 && h("p", { class: "key" }, h("span", { class: "soft" }, "Ancestry: the mean coefficient of each source"), legend(sources.map((source, i) => [source, SQUARE, colour(placeOf(run.shown, source, i))]))),
      table(run, found, tasks, sources)),
  ];
}

const names = (individuals, part) => [...new Set(individuals.flatMap((one) => Object.keys(one[part])))];

function curves(width, curve) {
  const box = { left: 44, right: width - 12, top: 14, bottom: 200 };
  const most = Math.max(1, ...curve.map((point) => point.entropy));
  const { node, across, up } = axes(box, { range: [0, curve.at(-1).told], name: "outcomes", whole: true }, { range: [0, 1.02 * most], count: 4 });
  const last = curve.at(-1);
  return image(width, 240, `After ${last.told} outcomes: coverage ${percent(last.coverage)}, best score ${score(last.best)}, entropy ${fixed(last.entropy, 2)} bits.`, node,
    CURVES.map(([key, , kind]) => s("path", { class: `stroke ${kind}`, d: line(curve.map((point) => [across(point.told), up(point[key])])) })));
}

/** Return a bar in parts. */
function stack(parts, order, place, words) {
  const total = order.reduce((sum, name) => sum + Math.max(0, parts[name] ?? 0), 0) || 1;
  let x = 0;
  return s("svg", { class: "stack", viewBox: "0 0 100 10", width: 110, height: 14, preserveAspectRatio: "none", role: "img", "aria-label": words },
    order.map((name, i) => {
      const size = (100 * Math.max(0, parts[name] ?? 0)) / total;
      const rect = s("rect", { class: colour(place(name, i)), x, y: 0, width: size, height: 10 }, s("title", null, `${name} ${percent(size / 100)}`));
      x += size;
      return rect;
    }));
}

function table(run, found, tasks, sources) {
  const words = (parts, order) => order.map((name) => `${name} ${percent(parts[name] ?? 0)}`).join(", ");
  const open = (number) => h("button", { type: "button", class: "link", "data-key": `living-${number}`, onclick: () => run.open(number) }, `#${number}`);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Who lives" },
    h("table", { class: "population" }, h("caption", { class: "unseen" }, "Who lives, the fittest first"),
      h("thead", null, h("tr", null,
        h("th", { scope: "col" }, "Candidate"), h("th", { scope: "col", class: "number" }, "Score"), h("th", { scope: "col", class: "number" }, "Share of fitness"),
        h("th", { scope: "col", class: "number" }, "Solves alone"), tasks.length > 0 && h("th", { scope: "col" }, "Niche"), sources.length > 0 && h("th", { scope: "col" }, "Ancestry"),
        h("th", { scope: "col", class: "number" }, "Depth"), h("th", { scope: "col" }, "Parents"))),
      h("tbody", null, found.individuals.map((one) => h("tr", { class: one.candidate === run.shown.best?.candidate ? "winner" : null },
        h("th", { scope: "row" }, open(one.candidate)),
        h("td", { class: "number" }, score(one.score)), h("td", { class: "number" }, `${fixed(100 * one.fitness_share, 1)} %`), h("td", { class: "number" }, count(one.documents_alone)),
        tasks.length > 0 && h("td", null, stack(one.niche, tasks, (_, i) => i + 5, words(one.niche, tasks))),
        sources.length > 0 && h("td", null, stack(one.ancestry, sources, (name, i) => placeOf(run.shown, name, i), words(one.ancestry, sources))),
        h("td", { class: "number" }, count(one.depth)),
        h("td", null, one.parents.length ? one.parents.map((parent, i) => [i > 0 && ", ", `#${parent}`]) : h("span", { class: "soft" }, one.depth === 0 ? "founder" : NONE)))))));
}
