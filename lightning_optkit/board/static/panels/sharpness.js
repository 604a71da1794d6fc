/** Sharpness by kind: how much the loss rises around the weights. */

import { linesOf, TimePanel } from "../time_panel.js";

/** @type {Record<string, string>} */
const KINDS = {
  epsilon: "ε-sharpness (Keskar), %", ball: "ball (SAM), loss", adaptive: "adaptive ball (ASAM), loss",
  average: "average, loss", adaptive_average: "adaptive average, loss", lambda_max: "λmax, eigenvalue",
};

/** @param {import("../store.js").Store} store */
export const sharpness = (store) => new TimePanel(store, {
  id: "sharpness", title: "Sharpness", topic: "optkit-sharpness", zero: true,
  help: "Rise of the loss around the weights, between its certificate below and what was found. Only adaptive kinds survive a rescaling of layers.",
  tools: (panel) => panel.choice("Kind of sharpness", KINDS, "adaptive"),
  lines: (_, panel) => {
    const kind = panel.picked("adaptive", panel.spec.id, KINDS);
    const isMean = kind.endsWith("average");
    return linesOf(store, "optkit-sharpness", kind, {
      label: KINDS[kind].split(",")[0],
      ...(isMean ? { error: `${kind}_standard_error` } : { low: `${kind}_lower` }),
    });
  },
});
