/** How much of the batches is mixed. */

import { linesOf, TimePanel } from "../time_panel.js";

/** @param {import("../store.js").Store} store */
export const mixing = (store) => new TimePanel(store, {
  id: "mixing", title: "Mixing", topic: "optkit-mixing", yLabel: "share",
  help: "λ, what a batch's own samples weigh; 1 is not mixed. Dashed: the share of batches that were mixed in the epoch so far.",
  zero: true,
  lines: () => [
    ...linesOf(store, "optkit-mixing", "mixing", { label: "λ" }),
    ...linesOf(store, "optkit-mixing", "share", { label: "share mixed", dash: [5, 4] }),
  ],
});
