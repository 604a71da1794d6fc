/** The gradient's noise against the batch, and what a step does. */

import { linesOf, TimePanel } from "../time_panel.js";

const TOPIC = "optkit-gradient";

/** @param {import("../store.js").Store} store */
export const noise = (store) => new TimePanel(store, {
  id: "noise", title: "Gradient noise scale", topic: TOPIC, scale: "log", yLabel: "samples",
  help: "Batch at which noise and signal of the gradient are level. Dashed: the batch in use. Far below it steps are noise; far above, samples are wasted.",
  lines: () => [
    ...linesOf(store, TOPIC, "noise_scale", { label: "", error: "noise_scale_standard_error" }),
    ...linesOf(store, TOPIC, "batch_size", { label: "batch", dash: [5, 4] }),
  ],
});

/** @type {Record<string, string>} */
const QUANTITIES = {
  gradient_norm: "gradient norm", update_ratio: "update / weights", trust_ratio: "weights / gradient",
  update_norm: "update norm", weight_norm: "weight norm", effective_learning_rate: "effective learning rate",
  dead: "dead ReLU units", saturated: "saturated values",
};

/** @param {import("../store.js").Store} store */
export const steps = (store) => new TimePanel(store, {
  id: "steps", title: "What a step is made of", topic: TOPIC, scale: "log",
  help: "Norms of the whole gradient, of the weights and of what one optimizer step changed; shares of units that learn nothing.",
  tools: (panel) => panel.choice("Quantity", QUANTITIES, "gradient_norm"),
  lines: (_, panel) => linesOf(store, TOPIC, panel.picked("gradient_norm", panel.spec.id, QUANTITIES), { label: "" }),
});
