/** λmax and λmin against the largest eigenvalue at which the optimizer is stable. */

import { linesOf, TimePanel } from "../time_panel.js";

/** @param {import("../store.js").Store} store */
export const extremes = (store) => new TimePanel(store, {
  id: "extremes", title: "λmax, λmin and the stability threshold", topic: "optkit-stability",
  help: "Above the dashed threshold a step along the sharpest direction grows. λmax as the optimizer scales it, with its error.",
  zero: true, yLabel: "eigenvalue",
  lines: () => {
    const preconditioned = linesOf(store, "optkit-stability", "lambda_max", { label: "λmax", error: "lambda_max_error" });
    const plain = linesOf(store, "optkit-hessian", "lambda_max", { label: "λmax" });
    return [
      ...preconditioned,
      ...plain.filter(({ run }) => !preconditioned.some((line) => line.run === run)),
      ...linesOf(store, "optkit-hessian", "lambda_min", { label: "λmin" }),
      ...linesOf(store, "optkit-stability", "threshold", { label: "threshold", dash: [5, 4] }),
    ];
  },
});
