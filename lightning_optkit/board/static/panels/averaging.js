/** How far the average of the weights is from the weights. */

import { linesOf, TimePanel } from "../time_panel.js";

const SHOWN = { distance: "distance to the weights", num_averaged: "models averaged", learning_rate: "learning rate" };

/** @param {import("../store.js").Store} store */
export const averaging = (store) => new TimePanel(store, {
  id: "averaging", title: "Averaging", topic: "optkit-averaging", zero: true,
  help: "Distance of the average from the weights, relative to them, and how many models are in it. 0 models: nothing is averaged yet.",
  tools: (panel) => panel.choice("Quantity", SHOWN, "distance"),
  lines: (_, panel) => linesOf(store, "optkit-averaging", panel.picked("distance", panel.spec.id, SHOWN), { label: "" }),
});
