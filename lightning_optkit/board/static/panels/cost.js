/** What the diagnostics cost. */

import { linesOf, TimePanel } from "../time_panel.js";

/** @param {import("../store.js").Store} store */
export const cost = (store) => new TimePanel(store, {
  id: "cost", title: "What the diagnostics cost", topic: "optkit-hessian", scale: "log", yLabel: "seconds",
  help: "Seconds that one measurement took, by callback, and their share of the run's time until then.",
  lines: () => store.about.topics.flatMap(({ name, callbacks }) => linesOf(store, name, "seconds", { label: callbacks[0] })),
  notes: () => store.shown.map((run) => {
    const all = [...run.topics].filter(([topic]) => topic).flatMap(([, instances]) =>
      [...instances.values()].flatMap((names) => names.get("seconds") ?? []));
    const spent = all.flatMap(({ values }) => [...values]).reduce((a, b) => a + b, 0);
    const times = [...run.topics.values()].flatMap((instances) => [...instances.values()].flatMap((names) =>
      [...names.values()].flatMap((series) => [series.times[0], series.times[series.times.length - 1]])));
    const elapsed = Math.max(...times) - Math.min(...times);
    const share = elapsed > 0 ? ` of ${elapsed.toFixed(0)} s since the first point, ${((100 * spent) / elapsed).toFixed(1)} %` : "";
    return all.length ? `${run.name}: ${spent.toFixed(1)} s${share}` : "";
  }).filter(Boolean).slice(0, 8),
});
