/** One row a layer, over time: where in the net it happens. */

import { Panel, dot, element } from "../panel.js";
import { arrayAt, namesAt, nearest } from "../payload.js";
import { extent, format, makeScale } from "../scale.js";
import { colorOf } from "../store.js";
import { colors, viridis } from "../theme.js";
import { paintCursor, paintEvents, timeAxis, timePlot } from "../time_panel.js";

/** @typedef {import("../store.js").Track} Track */

/** What can be shown: array, column in it, names, whether it spans decades. */
const QUANTITIES = /** @type {Record<string, [string, string, string, number, string, boolean]>} */ ({
  trust: ["trust ratio (weights / gradient)", "optkit-gradient", "layer_steps", 3, "layer_names", true],
  gradient: ["gradient norm", "optkit-gradient", "layer_steps", 0, "layer_names", true],
  update: ["update / weights", "optkit-gradient", "layer_steps", 4, "layer_names", true],
  rate: ["effective learning rate", "optkit-gradient", "layer_steps", 5, "layer_names", true],
  lambda_max: ["λmax of the layer's block", "optkit-hessian", "layers", 0, "layer_names", true],
  minimum_ratio: ["minimum ratio of the block", "optkit-hessian", "layers", 3, "layer_names", false],
  factor: ["factor of LARS or LAMB", "optkit-trust", "trust_ratios", 0, "layer_names", true],
  dead: ["dead units of ReLUs", "optkit-gradient", "activations", 0, "activation_names", false],
  saturated: ["saturated values", "optkit-gradient", "activations", 1, "activation_names", false],
});
const MOST = 4;

/** @typedef {{track: Track, names: string[], x: Float64Array, value: (row: number, i: number) => number}} Grid */

export class Layers extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "layers", title: "Layer by layer", size: "wide", topic: "optkit-gradient",
      help: "One row a layer, from input to output; brighter is more, on one scale for all runs. Hatched: not defined.",
    });
    /** @type {Grid[]} */
    this.grids = [];
    /** @type {import("../plot.js").Plot[]} */
    this.plots = [];
  }

  build() {
    const labels = Object.fromEntries(Object.entries(QUANTITIES).map(([key, [label]]) => [key, label]));
    this.choice("Quantity", labels, "trust");
    this.body.dataset.names = "";
  }

  update() {
    const { store } = this;
    this.setEmpty(!Object.values(QUANTITIES).some(([, topic, array]) => store.tracks(topic, array).length));
    if (this.isEmpty) return this.note();
    const [, topic, array, column, namesTag, isLog] = QUANTITIES[this.picked("trust", this.spec.id, QUANTITIES)];
    const tracks = store.arrayTracks(topic, array, MOST);
    const all = store.tracks(topic, array).length;
    this.grids = tracks.map((track) => {
      const { series } = track;
      const names = namesAt(track.run.topics.get(topic)?.get(track.instance)?.get(namesTag), Infinity);
      const width = series.shape.length > 1 ? series.shape[1] : 1;
      return {
        track, names: names.slice(0, series.shape[0]), x: store.places(track.run, series.steps),
        value: (/** @type {number} */ row, /** @type {number} */ i) => arrayAt(series, i)[row * width + column],
      };
    });
    this.arrange();
    this.note(...[
      this.paint(isLog),
      all > MOST ? `Shown: the first ${MOST} of ${all} runs. Switch others off to see the rest.` : "",
      all ? "" : "This quantity was not logged in the runs shown.",
    ].filter(Boolean));
    this.cursor();
  }

  arrange() {
    const key = JSON.stringify(this.grids.map(({ track, names }) => [track.label, names.length]));
    if (key === this.body.dataset.names) return;
    this.body.dataset.names = key;
    const several = element("div", { class: "several" });
    this.body.replaceChildren(several);
    this.plots = this.grids.map(({ track, names }) => {
      const cell = several.appendChild(element("div", {}, element("h3", {}, dot(colorOf(track.run)), track.label)));
      const height = Math.min(480, Math.max(150, 56 + 16 * names.length));
      return timePlot(this.store, cell, `${this.spec.title} of ${track.label}`, height);
    });
  }

  /**
   * @param {boolean} isLog
   * @returns {string} what the colours mean
   */
  paint(isLog) {
    const values = this.grids.map(({ names, x, value }) => names.flatMap((_, row) => Array.from(x, (_, i) => value(row, i))));
    const range = extent(values, isLog) ?? [0, 1];
    const shade = makeScale(isLog ? "log" : "linear", range[0], range[1]);
    this.grids.forEach(({ track, names, x, value }, k) => {
      const plot = this.plots[k];
      plot.draw({
        ...timeAxis(this.store),
        y: makeScale("linear", 0, Math.max(1, names.length)), rows: names,
        paint: (context) => {
          hatch(context, plot);
          const height = plot.innerHeight / Math.max(1, names.length);
          x.forEach((place, i) => {
            const from = i ? plot.px((x[i - 1] + place) / 2) : plot.left;
            const to = i + 1 < x.length ? plot.px((x[i + 1] + place) / 2) : plot.left + plot.innerWidth;
            names.forEach((_, row) => {
              const v = value(row, i);
              if (!Number.isFinite(v) || (isLog && v < 0)) return;
              context.fillStyle = `rgb(${viridis(shade.share(Math.max(v, range[0])))})`;
              context.fillRect(from, plot.top + row * height, to - from + 0.5, height - (height > 6 ? 1 : 0));
            });
          });
          paintEvents(context, plot, this.store, track.run);
        },
      });
    });
    return values.some((one) => one.length) ? `Darkest is ${format(range[0])}, brightest ${format(range[1])}.` : "";
  }

  cursor() {
    if (this.isEmpty) return;
    const { store } = this;
    this.grids.forEach(({ track }, k) => this.plots[k].mark((context, plot) => {
      context.clearRect(0, 0, plot.width, plot.height);
      paintCursor(context, plot, store);
      plot.describe(`${this.spec.title}, ${track.label}`);
    }));
    this.read(this.grids.map((grid) => ({ run: grid.track.run, ...grid })), ({ track, names, x, value }) => {
      const i = nearest(x, store.cursor);
      const found = names.map((name, row) => ({ name, v: value(row, i) })).filter(({ v }) => Number.isFinite(v)).sort((a, b) => a.v - b.v);
      const [low, high] = [found[0], found[found.length - 1]];
      return low ? `${track.label} least ${low.name} ${format(low.v)}, most ${high.name} ${format(high.v)}` : track.label;
    });
  }

  table() {
    /** @type {import("../panel.js").Row[]} */
    const rows = [["run", "step", "layer", "value"]];
    for (const { track, names, x, value } of this.grids) {
      x.forEach((_, i) => names.forEach((name, row) => rows.push([track.label, track.series.steps[i], name, value(row, i)])));
    }
    return rows;
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {import("../plot.js").Plot} plot
 */
export function hatch(context, plot) {
  context.strokeStyle = colors.grid;
  context.lineWidth = 1;
  context.beginPath();
  for (let x = plot.left - plot.innerHeight; x < plot.left + plot.innerWidth; x += 8) {
    context.moveTo(x, plot.bottom);
    context.lineTo(x + plot.innerHeight, plot.top);
  }
  context.stroke();
}
