/** What happened, and when: a table whose rows move the cursor. */

import { Panel, dot, element } from "../panel.js";
import { format } from "../scale.js";
import { colorOf } from "../store.js";
import { eventsOf } from "../time_panel.js";

/** What an event is called, and what its value is. @type {Record<string, [string, string]>} */
const KINDS = {
  warmup: ["end of warmup", "steps"],
  averaging: ["averaging", "models in the average"],
  norm_swap: ["norm layers swapped", "layers"],
  batch_scaling: ["batch scaling reached", "factor"],
  escape: ["step off a saddle", "length"],
};

export class Events extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "events", title: "Events", topic: "optkit-events",
      help: "Marked by a triangle on every time axis. A row moves the cursor there.",
    });
    this.hasPicture = false;
  }

  get rows() {
    return eventsOf(this.store).flatMap(({ run, name, steps, values }) => {
      const kind = Object.keys(KINDS).find((key) => name === key || name.startsWith(`${key}_`));
      const [what, unit] = kind ? KINDS[kind] : [name, ""];
      const suffix = kind && name !== kind ? ` (${name.slice(kind.length + 1)})` : "";
      return [...steps].map((step, i) => ({ run, step, text: `${what}${suffix}`, value: values[i], unit }));
    });
  }

  update() {
    const { rows, store } = this;
    this.setEmpty(!rows.length);
    this.note(rows.length > 50 ? `Shown: the first 50 of ${rows.length}. The CSV has all.` : "");
    if (this.isEmpty) return;
    const lines = rows.slice(0, 50).map(({ run, step, text, value, unit }) => {
      const go = element("button", { type: "button", "aria-label": `go to step ${step}` }, format(step));
      go.addEventListener("click", () => store.look({ at: store.places(run, Float64Array.of(step))[0] }));
      return element("tr", {}, element("td", { class: "number" }, go), element("td", {}, text),
        element("td", { class: "number" }, `${format(value)} ${unit}`), element("td", {}, dot(colorOf(run)), ` ${run.name}`));
    });
    const head = element("tr", {}, ...["step", "event", "value", "run"].map((name, i) => element("th", i % 2 ? {} : { class: "number" }, name)));
    this.body.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines)));
  }

  table() {
    return [["run", "step", "event", "value", "unit"],
      ...this.rows.map(({ run, step, text, value, unit }) => [run.name, step, text, value, unit])];
  }
}
