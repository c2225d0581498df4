// The overview: how the search went, the scores, and the winner.

import { at, get } from "./api.js";
import { card, h, showChanged } from "./dom.js";
import { curveFigure } from "./curve.js";
import { waiting } from "./status.js";
import { gainPanel, scoreTable, taskPanels } from "./scores.js";
import { winnerFigures } from "./winner.js";

/** Return the part. */
export function overviewPart(run) {
  const node = h("div", { class: "cards" });
  let split = "test";
  let winner = null;
  let winnerOf = "";
  let curve = null;
  const walk = { at: null };
  const budget = () => run.line?.budget ?? run.config.budget?.evaluations ?? null;

  function paint() {
    const status = run.line?.status ?? run.shown.status;
    if (!run.begun || !curve) showChanged(node, status, () => waiting(run));
    else showChanged(node, [run.shown, curve.points, winner, split, budget()], build);
  }

  function build() {
    const shown = run.shown;
    const tasks = taskPanels(shown, split, (wanted) => {
      split = wanted;
      paint();
    });
    const figures = winner ? winnerFigures(winner, shown) : [];
    return [
      card("Search", curveFigure(curve, shown.baselines, budget(), run.open, walk)),
      (shown.best || shown.baselines.length > 0) && card("Result", scoreTable(shown, run.open), gainPanel(shown)),
      tasks && card("Scores by task", tasks),
      figures.length > 0 && card(shown.best?.chosen_on === "select" ? "Winner" : "Best so far", how(run), figures)];
  }

  async function refresh() {
    if (run.begun) {
      curve = await get(at(run.name, "/progress?most=400"), run.signal);
      const best = run.shown.best;
      const key = best ? `${best.candidate} ${best.digest}` : "";
      if (best && key !== winnerOf) {
        winner = await get(at(run.name, "/winner"), run.signal);
        winnerOf = key;
      }
    }
    paint();
  }

  return { node, refresh };
}

/** Return a sentence on how the winner is made. */
function how(run) {
  const recipe = run.shown.best?.recipe ?? {};
  const merge = recipe.path ? recipe.sources?.find((one) => one.recipe)?.recipe : recipe;
  const names = merge?.sources?.map((one) => one.name).join(", ");
  if (!merge?.method) return null;
  const base = merge.base ? `, with ${merge.base.name} as the base` : "";
  return h("p", null, `Candidate ${run.shown.best.candidate}: `, h("code", null, merge.method), ` over ${names}${base}.`);
}
