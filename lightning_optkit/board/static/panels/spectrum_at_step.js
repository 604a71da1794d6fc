/** The spectrum at the cursor, and at the pinned point. */

import { densityAt, makeGrid } from "../density.js";
import { Panel } from "../panel.js";
import { line, Plot } from "../plot.js";
import { format, makeScale } from "../scale.js";
import { colorOf } from "../store.js";
import { colors } from "../theme.js";
import { sharedRange } from "./spectrum.js";

const TOPIC = "optkit-hessian";
const PLACES = 400;
const MOST = 6;

export class SpectrumAtStep extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "density", title: "Spectrum at the cursor", topic: TOPIC,
      help: "Share of eigenvalues per decade. Grey: within the tolerance of zero. Dashed: the pinned point.",
    });
    /** @type {Plot|null} */
    this.plot = null;
    /** @type {import("../store.js").Track[]} */
    this.tracks = [];
    /** @type {[number, number, number]|null} */
    this.range = null;
  }

  build() {
    this.plot = new Plot(this.body, { height: 300, label: this.spec.title });
  }

  update() {
    this.tracks = this.store.arrayTracks(TOPIC, "quadrature", MOST);
    this.range = sharedRange(this.store, this.tracks); // of all points: too many to look at each time
    this.setEmpty(!this.store.tracks(TOPIC, "quadrature").length);
    this.note();
    if (!this.isEmpty) this.cursor();
  }

  /** Curves of now: `[track, point, is pinned, density]`. */
  get curves() {
    const { store, tracks, range } = this;
    if (!range) return null;
    const grid = makeGrid(range[0], range[1], range[2], PLACES);
    const places = /** @type {[number, boolean][]} */ (store.view.pin === null ? [[store.cursor, false]] : [[store.view.pin, true], [store.cursor, false]]);
    const curves = tracks.flatMap((track) => places.map(([place, isPinned]) => {
      const point = store.pointAt(track, place);
      return { track, point, isPinned, density: densityAt(track.series, point, grid, store.view.bandwidth) };
    }));
    return { range, grid, curves };
  }

  cursor() {
    const found = this.isEmpty ? null : this.curves;
    if (!found || !this.plot) return;
    const { range: [low, high, linear], curves } = found;
    const peak = Math.max(1e-30, ...curves.map(({ density }) => Math.max(...density)));
    const tolerance = this.store.tracks(TOPIC, "tol")[0]?.series.values.at(-1) ?? 0;
    this.plot.draw({
      x: makeScale("symlog", low, high, linear),
      y: makeScale("log", peak * 1e-6, peak * 2),
      xLabel: "eigenvalue", yLabel: "share per decade",
      paint: (context, plot) => {
        context.fillStyle = colors.shade;
        context.fillRect(plot.px(-tolerance), plot.top, plot.px(tolerance) - plot.px(-tolerance), plot.innerHeight);
        for (const { track, isPinned, density } of curves) {
          context.strokeStyle = colorOf(track.run);
          context.setLineDash(isPinned ? [3, 3] : []);
          context.lineWidth = 1.6;
          context.beginPath();
          density.forEach((value, i) => context.lineTo(
            plot.left + ((i + 0.5) / PLACES) * plot.innerWidth, plot.py(Math.max(value, peak * 1e-7))));
          context.stroke();
        }
        context.setLineDash([4, 4]);
        for (const { run, series } of this.store.tracks("optkit-stability", "threshold")) {
          if (!curves.some(({ track }) => track.run === run)) continue;
          const at = plot.px(series.values[this.store.pointAt({ run, series, instance: "", label: "" }, this.store.cursor)]);
          context.strokeStyle = colorOf(run);
          context.lineWidth = 1;
          line(context, [at, plot.top, at, plot.bottom]);
        }
        context.setLineDash([]);
      },
    });
    const said = this.read(curves.map(({ track, point, isPinned }) => ({ run: track.run, track, point, isPinned })),
      ({ track, point, isPinned }) => `${track.label} step ${format(track.series.steps[point])}${isPinned ? " (pinned)" : ""}`);
    this.plot.describe(`${this.spec.title}: ${said}`);
  }

  table() {
    const found = this.curves;
    /** @type {import("../panel.js").Row[]} */
    const rows = [["run", "step", "eigenvalue", "share_per_decade"]];
    for (const { track, point, density } of found?.curves ?? []) {
      density.forEach((value, i) => rows.push([
        track.label, track.series.steps[point], Math.sinh(found?.grid.places[i] ?? 0) * (found?.grid.linear ?? 1), value]));
    }
    return rows;
  }
}
