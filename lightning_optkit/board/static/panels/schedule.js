/** Learning rates as steps were made at them. */

import { linesOf, TimePanel } from "../time_panel.js";

const TOPIC = "optkit-lr";

/** @param {import("../store.js").Store} store */
export const schedule = (store) => new TimePanel(store, {
  id: "schedule", title: "Learning rate", topic: TOPIC, scale: "symlog", zero: true,
  help: "The rate that each step was made at, with all that was done to it. Dashed: the rate of a minimum along the gradient, where Stability is on.",
  lines: () => {
    const names = new Set(store.shown.flatMap((run) =>
      [...(run.topics.get(TOPIC)?.values() ?? [])].flatMap((all) => [...all.keys()])));
    const rates = [...names].filter((name) => name.startsWith("effective/"))
      .flatMap((name) => linesOf(store, TOPIC, name, { label: names.size > 2 ? name.slice(10) : "" }));
    const used = linesOf(store, "optkit-stability", "learning_rate", { label: "" });
    return [
      ...rates,
      ...used.filter(({ run }) => !rates.some((line) => line.run === run)),
      ...linesOf(store, "optkit-stability", "step_along_gradient", { label: "best along the gradient", dash: [5, 4] }),
    ];
  },
});
