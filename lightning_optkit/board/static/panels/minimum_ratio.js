/** The share of positive eigenvalues, with the interval that is certain to hold it. */

import { linesOf, TimePanel } from "../time_panel.js";

const LABELS = { minimum_ratio: "positive", negative_ratio: "negative", zero_ratio: "zero" };

/** @param {import("../store.js").Store} store */
export const minimumRatio = (store) => new TimePanel(store, {
  id: "minimum_ratio", title: "Minimum ratio", topic: "optkit-hessian",
  help: "Share of eigenvalues of one sign; all are positive at a minimum. The band is certain to hold the exact share.",
  yLabel: "share",
  tools: (panel) => panel.choice("Share of which eigenvalues", LABELS, "minimum_ratio"),
  lines: (_, panel) => {
    const name = panel.picked("minimum_ratio", panel.spec.id, LABELS);
    return linesOf(store, "optkit-hessian", name, { label: "", low: `${name}_lower`, high: `${name}_upper` });
  },
});

/** @param {import("../store.js").Store} store */
export const loss = (store) => new TimePanel(store, {
  id: "loss", title: "Loss", topic: "optkit-hessian", scale: "log", yLabel: "loss",
  help: "On the held batches, where the spectrum was taken, to compare with the shares; or a metric of your own.",
  tools: (panel) => panel.choice("Which loss", choices(store), "optkit-hessian/loss"),
  lines: (_, panel) => {
    const tag = panel.picked("optkit-hessian/loss", panel.spec.id, choices(store));
    const slash = tag.indexOf("/");
    return tag.startsWith("optkit-")
      ? linesOf(store, tag.slice(0, slash), tag.slice(slash + 1), { label: "" })
      : linesOf(store, "", tag, { label: "" });
  },
});

/**
 * What the page has of losses, and of the run's own metrics.
 * @param {import("../store.js").Store} store
 * @returns {Record<string, string>}
 */
function choices(store) {
  /** @type {Record<string, string>} */
  const found = { "optkit-hessian/loss": "held batches", "optkit-gradient/loss": "training step" };
  for (const run of store.shown) {
    for (const name of run.topics.get("")?.get("")?.keys() ?? []) if (name !== "epoch") found[name] = name;
  }
  return found;
}
