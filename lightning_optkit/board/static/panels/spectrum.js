/** The spectrum over time: a heatmap, or ridges, one picture a run on shared axes. */

import { densityAt, makeGrid, spectralRange } from "../density.js";
import { Panel, dot, element } from "../panel.js";
import { nearest } from "../payload.js";
import { line, Plot } from "../plot.js";
import { format, makeScale } from "../scale.js";
import { colorOf } from "../store.js";
import { colors, viridis } from "../theme.js";
import { paintCursor, paintEvents, timeAxis, timePlot } from "../time_panel.js";

const TOPIC = "optkit-hessian";
const ROWS = 160;
const DECADES = 5; // of the density, from its peak down
const RIDGES = 16;
const RIDGE = { decades: 3, height: 0.14 }; // of the plot
const MOST = 4; // pictures side by side

/** @typedef {import("../store.js").Track} Track */
/** @typedef {{track: Track, x: Float64Array, columns: (Float32Array|null)[], plot: Plot}} Picture */

/**
 * Ends of the axis of eigenvalues that all spectra of the page share.
 * @param {import("../store.js").Store} store
 * @param {Track[]} tracks
 */
export function sharedRange(store, tracks) {
  const tolerances = store.tracks(TOPIC, "tol").map(({ series }) => series.values[series.values.length - 1]);
  return spectralRange(tracks.map(({ series }) => series), Math.max(0, ...tolerances.filter(Number.isFinite)));
}

export class Spectrum extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "spectrum", title: "Hessian spectrum over training", size: "wide", topic: TOPIC,
      help: "Share of eigenvalues per decade, brighter is more. Dashed: the largest eigenvalue at which the optimizer is stable.",
    });
    /** @type {Picture[]} */
    this.pictures = [];
    this.drawn = "";
  }

  update() {
    const { store } = this;
    const all = store.tracks(TOPIC, "quadrature");
    this.setEmpty(!all.length);
    const tracks = store.arrayTracks(TOPIC, "quadrature", MOST);
    const range = sharedRange(store, tracks);
    this.note(...[
      all.length > MOST ? `Shown: the first ${MOST} of ${all.length} runs. Switch others off to see the rest.` : "",
      !tracks.length && all.length ? "Reading spectra …" : "",
    ].filter(Boolean));
    if (this.isEmpty || !range) return;
    this.arrange(tracks);
    const [low, high, linear] = range;
    const grid = makeGrid(low, high, linear, ROWS);
    const { bandwidth, ridge } = store.view;
    const key = JSON.stringify([low, high, bandwidth]);
    if (key !== this.drawn) for (const picture of this.pictures) picture.columns = [];
    this.drawn = key;
    for (const picture of this.pictures) {
      const { series } = picture.track;
      const column = (/** @type {number} */ i) => // made when it is first drawn
        (picture.columns[i] ??= densityAt(series, i, grid, bandwidth));
      picture.x = store.places(picture.track.run, series.steps);
      if (ridge) this.ridges(picture, column, range);
      else this.heatmap(picture, column, range);
    }
    this.cursor();
  }

  /** One plot a run, made anew only where the runs are others.
   * @param {Track[]} tracks */
  arrange(tracks) {
    const { ridge } = this.store.view;
    const names = JSON.stringify([tracks.map(({ label }) => label), ridge]);
    const isSame = names === this.body.dataset.names;
    if (isSame) {
      tracks.forEach((track, i) => {
        if (this.pictures[i].track.series !== track.series) this.pictures[i].columns = [];
        this.pictures[i].track = track;
      });
      return;
    }
    this.body.dataset.names = names;
    const several = element("div", { class: "several" });
    this.body.replaceChildren(several);
    this.pictures = tracks.map((track) => {
      const cell = several.appendChild(element("div", {}, element("h3", {}, dot(colorOf(track.run)), track.label)));
      const label = `Spectrum of ${track.label}`;
      const plot = ridge ? new Plot(cell, { height: 300, label }) : timePlot(this.store, cell, label, tracks.length > 2 ? 240 : 300);
      return { track, x: new Float64Array(), columns: [], plot };
    });
  }

  /**
   * @param {Picture} picture
   * @param {(i: number) => Float32Array} column
   * @param {[number, number, number]} range
   */
  heatmap(picture, column, [low, high, linear]) {
    const { plot, track } = picture;
    plot.draw({
      ...timeAxis(this.store),
      y: makeScale("symlog", low, high, linear),
      yLabel: "eigenvalue",
      paint: (context) => {
        const image = this.image(picture, column, Math.round(plot.innerWidth));
        context.imageSmoothingEnabled = false;
        if (image) context.drawImage(image, plot.left, plot.top, plot.innerWidth, plot.innerHeight);
        this.threshold(context, picture);
        paintEvents(context, plot, this.store, track.run);
      },
    });
    plot.describe(`Spectrum of ${track.label} over ${this.store.view.axis}s, ${track.series.steps.length} measured points.`);
  }

  /**
   * One column a measured point, as wide as halfway to its neighbours.
   * @param {Picture} picture
   * @param {(i: number) => Float32Array} column
   * @param {number} width
   */
  image({ x, plot }, column, width) {
    if (!x.length) return null;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, ROWS];
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const pixels = context.createImageData(width, ROWS);
    const at = Int32Array.from({ length: width }, (_, i) => nearest(x, plot.frame?.x.value((i + 0.5) / width) ?? 0));
    const peak = Math.log10(Math.max(1e-30, ...[...new Set(at)].map((i) => Math.max(...column(i)))));
    for (let i = 0; i < width; i++) {
      const density = column(at[i]);
      for (let row = 0; row < ROWS; row++) {
        const share = 1 + (Math.log10(Math.max(density[ROWS - 1 - row], 1e-30)) - peak) / DECADES;
        pixels.data.set([...viridis(share), 255], 4 * (row * width + i));
      }
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Picture} picture
   */
  threshold(context, { track, plot }) {
    const found = this.store.tracks("optkit-stability", "threshold").find(({ run }) => run === track.run);
    if (!found) return;
    const x = this.store.places(found.run, found.series.steps);
    context.strokeStyle = "#ffffff";
    context.setLineDash([5, 4]);
    context.beginPath();
    x.forEach((place, i) => context.lineTo(plot.px(place), plot.py(found.series.values[i])));
    context.stroke();
    context.setLineDash([]);
  }

  /**
   * Curves of some points, the last one in front.
   * @param {Picture} picture
   * @param {(i: number) => Float32Array} column
   * @param {[number, number, number]} range
   */
  ridges({ plot, track, x }, column, [low, high, linear]) {
    const y = timeAxis(this.store).x;
    const count = Math.min(RIDGES, x.length);
    const kept = [...new Set(Array.from({ length: count }, (_, i) => Math.round((i * (x.length - 1)) / Math.max(1, count - 1))))];
    plot.draw({
      x: makeScale("symlog", low, high, linear),
      y: makeScale("linear", y.low, y.high + (y.high - y.low) * RIDGE.height),
      xLabel: "eigenvalue", yLabel: this.store.view.axis,
      paint: (context) => {
        const peak = Math.log10(Math.max(1e-30, ...kept.map((i) => Math.max(...column(i)))));
        const selected = this.store.pointAt(track, this.store.cursor);
        for (const i of kept.reverse()) {
          const foot = plot.py(x[i]);
          context.beginPath();
          column(i).forEach((density, k) => {
            const share = Math.max(0, 1 + (Math.log10(Math.max(density, 1e-30)) - peak) / RIDGE.decades);
            context.lineTo(plot.left + ((k + 0.5) / ROWS) * plot.innerWidth, foot - share * plot.innerHeight * RIDGE.height);
          });
          context.fillStyle = colors.panel;
          context.fill();
          context.lineWidth = i === selected ? 2 : 1;
          context.strokeStyle = i === selected ? colors.accent : colorOf(track.run);
          context.stroke();
        }
      },
    });
  }

  cursor() {
    if (this.isEmpty) return;
    const { store } = this;
    for (const { plot, x } of this.pictures) {
      plot.mark((context) => {
        context.clearRect(0, 0, plot.width, plot.height);
        if (!store.view.ridge) return paintCursor(context, plot, store);
        const at = plot.py(x[nearest(x, store.cursor)]);
        context.strokeStyle = colors.accent;
        return line(context, [plot.left, at, plot.width - 14, at]);
      });
    }
    this.read(this.pictures.map(({ track }) => track), (track) =>
      `${track.label} step ${format(track.series.steps[store.pointAt(track, store.cursor)])}`);
  }

  table() {
    /** @type {import("../panel.js").Row[]} */
    const rows = [["run", "step", "probe", "ritz_value", "ritz_weight"]];
    for (const { track: { label, series } } of this.pictures) {
      const [probes, nodes] = series.shape;
      for (let k = 0; k < series.steps.length * probes * nodes; k++) {
        const point = Math.floor(k / (probes * nodes));
        const [value, weight] = series.values.subarray(2 * k, 2 * k + 2);
        if (weight > 0) rows.push([label, series.steps[point], Math.floor(k / nodes) % probes, value, weight]);
      }
    }
    return rows;
  }
}
