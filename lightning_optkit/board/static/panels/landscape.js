/** The loss on a plane or along a line, with the way that training came. */

import { Panel, dot, element } from "../panel.js";
import { arrayAt } from "../payload.js";
import { Plot } from "../plot.js";
import { extent, format, makeScale } from "../scale.js";
import { colorOf } from "../store.js";
import { viridis } from "../theme.js";
import { hatch } from "./layers.js";

/** @typedef {import("../store.js").Track} Track */

const TOPIC = "optkit-landscape";
const MOST = 3;
const LEVELS = 12;

/**
 * @typedef {object} Picture
 * @property {Track} track
 * @property {number} point which of the pictures
 * @property {number[]} shape
 * @property {Float32Array} losses rows from low y to high y
 * @property {Float32Array} x
 * @property {Float32Array} y
 * @property {[number, number][]} path
 * @property {Float32Array|null} pathSteps
 */

export class Landscape extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "landscape", title: "Loss landscape", size: "wide", topic: TOPIC,
      help: "The loss around the weights, with the way of training in white. The dot is where the cursor is. Hatched: NaN or infinite.",
    });
    /** @type {Picture[]} */
    this.pictures = [];
    /** @type {Plot[]} */
    this.plots = [];
  }

  build() {
    this.body.dataset.names = "";
    this.choice("Colours", { log: "log of the loss", linear: "loss" }, "log");
  }

  update() {
    const { store } = this;
    const all = store.tracks(TOPIC, "losses").length;
    this.setEmpty(!all);
    this.note(...(all > MOST ? [`Shown: the first ${MOST} of ${all}. Switch others off to see the rest.`] : []));
    if (this.isEmpty) return;
    const parts = ["losses", "axes", "path", "path_steps"].map((name) => store.arrayTracks(TOPIC, name, MOST));
    const [losses, axes, paths, steps] = parts;
    const same = (/** @type {Track[]} */ tracks, /** @type {Track} */ track) => tracks.find(({ label }) => label === track.label);
    this.pictures = losses.flatMap((track) => {
      const frame = same(axes, track);
      if (!frame) return [];
      const point = store.pointAt(track, store.cursor);
      const [path, when] = [same(paths, track), same(steps, track)];
      const [ends, count] = [arrayAt(frame.series, point), frame.series.shape[1]];
      return [{
        track, point, shape: track.series.shape, losses: arrayAt(track.series, point),
        x: ends.subarray(0, count), y: ends.subarray(count, 2 * count),
        path: path ? pairs(arrayAt(path.series, Math.min(point, path.series.steps.length - 1))) : [],
        pathSteps: when ? arrayAt(when.series, Math.min(point, when.series.steps.length - 1)) : null,
      }];
    });
    this.arrange();
    this.pictures.forEach((picture, k) => (picture.shape.length > 1 ? this.plane(picture, this.plots[k]) : this.line(picture, this.plots[k])));
    this.dots();
  }

  arrange() {
    const key = JSON.stringify(this.pictures.map(({ track }) => track.label));
    if (key === this.body.dataset.names) return;
    this.body.dataset.names = key;
    const several = element("div", { class: "several" });
    this.body.replaceChildren(several);
    this.plots = this.pictures.map(({ track }) => {
      const cell = several.appendChild(element("div", {}, element("h3", {}, dot(colorOf(track.run)), track.label)));
      return new Plot(cell, { height: 300, label: `Loss landscape of ${track.label}` });
    });
  }

  /**
   * @param {Picture} picture
   * @param {Plot} plot
   */
  plane({ losses, shape: [rows, columns], x, y, path }, plot) {
    const isLog = this.picked("log") === "log";
    const range = extent([losses], isLog) ?? [0, 1];
    const shade = makeScale(isLog ? "log" : "linear", range[0], range[1]);
    const half = [(x[columns - 1] - x[0]) / (columns - 1) / 2, (y[rows - 1] - y[0]) / (rows - 1) / 2];
    plot.draw({
      x: makeScale("linear", x[0] - half[0], x[columns - 1] + half[0]),
      y: makeScale("linear", y[0] - half[1], y[rows - 1] + half[1]),
      xLabel: "first direction", yLabel: "second direction",
      paint: (context) => {
        hatch(context, plot);
        const image = shaded(losses, rows, columns, (loss) => (isLog && loss <= 0 ? NaN : 1 - shade.share(loss)));
        context.imageSmoothingQuality = "high";
        context.drawImage(image, plot.left, plot.top, plot.innerWidth, plot.innerHeight);
        contours(context, plot, { losses, rows, columns, x, y, levels: Array.from({ length: LEVELS }, (_, i) => shade.value((i + 0.5) / LEVELS)) });
        context.strokeStyle = "#ffffff";
        context.lineWidth = 2;
        context.beginPath();
        for (const [u, v] of path) context.lineTo(plot.px(u), plot.py(v));
        context.stroke();
      },
    });
  }

  /**
   * @param {Picture} picture
   * @param {Plot} plot
   */
  line({ track, losses, x }, plot) {
    const isLog = this.picked("log") === "log";
    const range = extent([losses], isLog) ?? [0, 1];
    const y = makeScale(isLog ? "log" : "linear", range[0], range[1]);
    plot.draw({
      x: makeScale("linear", x[0], x[x.length - 1]), y: makeScale(isLog ? "log" : "linear", y.value(-0.05), y.value(1.05)),
      xLabel: "along the direction", yLabel: "loss",
      paint: (context) => {
        context.strokeStyle = colorOf(track.run);
        context.lineWidth = 1.6;
        context.beginPath();
        losses.forEach((loss, i) => (Number.isFinite(loss) && Number.isFinite(losses[i - 1] ?? NaN)
          ? context.lineTo(plot.px(x[i]), plot.py(loss)) : context.moveTo(plot.px(x[i]), plot.py(loss))));
        context.stroke();
      },
    });
  }

  cursor() {
    if (this.isEmpty) return;
    const moved = this.pictures.some(({ track, point }) => this.store.pointAt(track, this.store.cursor) !== point);
    if (moved) this.update();
    else this.dots();
  }

  /** Where training was at the cursor, if its way is known. */
  dots() {
    const { store } = this;
    this.pictures.forEach((picture, k) => this.plots[k].mark((context, plot) => {
      context.clearRect(0, 0, plot.width, plot.height);
      const at = this.placeOf(picture);
      if (!at) return;
      context.beginPath();
      context.arc(plot.px(at[0]), plot.py(at[1]), 6, 0, 7);
      context.fillStyle = "#ff7043";
      context.fill();
      context.lineWidth = 2;
      context.strokeStyle = "#ffffff";
      context.stroke();
    }));
    this.read(this.pictures.map((picture) => ({ run: picture.track.run, ...picture })), ({ track, point, losses, shape }) => {
      const [low, high] = extent([losses]) ?? [NaN, NaN];
      const explained = store.tracks(TOPIC, "explained").find(({ label }) => label === track.label);
      const share = explained ? `, ${(100 * explained.series.values[Math.min(point, explained.series.values.length - 1)]).toFixed(0)} % of the path` : "";
      const gaps = losses.filter((loss) => !Number.isFinite(loss)).length;
      const said = `${track.label} at step ${format(track.series.steps[point])}: loss ${format(low)} to ${format(high)}${share}${gaps ? `, ${gaps} gaps` : ""}`;
      this.plots[this.pictures.findIndex((one) => one.track === track)]?.describe(`${said}, ${shape.join(" × ")} points`);
      return said;
    });
  }

  /** @param {Picture} picture */
  placeOf({ track, point, path, pathSteps }) {
    if (!path.length) return null;
    const { store } = this;
    const last = track.series.steps[point];
    const steps = pathSteps?.slice(0, path.length) ?? path.map((_, i) => (last * i) / Math.max(1, path.length - 1));
    const places = store.places(track.run, Float64Array.from(steps));
    let i = 0;
    while (i < path.length - 1 && places[i + 1] <= store.cursor) i++;
    return path[i];
  }

  table() {
    /** @type {import("../panel.js").Row[]} */
    const rows = [["run", "step", "x", "y", "loss"]];
    for (const { track, point, shape, losses, x, y } of this.pictures) {
      const columns = shape[shape.length - 1];
      losses.forEach((loss, k) => rows.push([track.label, track.series.steps[point], x[k % columns], shape.length > 1 ? y[Math.floor(k / columns)] : null, loss]));
    }
    return rows;
  }
}

/**
 * A pixel a loss, bright where it is low, for that is where training goes; clear where there is none.
 * @param {Float32Array} losses
 * @param {number} rows
 * @param {number} columns
 * @param {(loss: number) => number} shade
 */
function shaded(losses, rows, columns, shade) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const pixels = context.createImageData(columns, rows);
  losses.forEach((loss, k) => {
    const share = Number.isFinite(loss) ? shade(loss) : NaN;
    if (Number.isNaN(share)) return;
    const row = rows - 1 - Math.floor(k / columns); // y grows upwards
    pixels.data.set([...viridis(share), 255], 4 * (row * columns + (k % columns)));
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/**
 * Pairs of numbers, without the padding behind a shorter path.
 * @param {Float32Array} flat
 * @returns {[number, number][]}
 */
function pairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, i) => /** @type {[number, number]} */ ([flat[2 * i], flat[2 * i + 1]]))
    .filter(([u, v]) => Number.isFinite(u) && Number.isFinite(v));
}

/**
 * Lines of equal loss: in each square of four points, between the sides that the level crosses.
 * @param {CanvasRenderingContext2D} context
 * @param {Plot} plot
 * @param {{losses: Float32Array, rows: number, columns: number, x: Float32Array, y: Float32Array, levels: number[]}} grid
 */
function contours(context, plot, { losses, rows, columns, x, y, levels }) {
  context.strokeStyle = "rgba(0, 0, 0, .45)";
  context.lineWidth = 0.8;
  context.beginPath();
  const corners = [[0, 0], [0, 1], [1, 1], [1, 0]];
  for (let row = 0; row + 1 < rows; row++) {
    for (let column = 0; column + 1 < columns; column++) {
      const square = corners.map(([r, c]) => [x[column + c], y[row + r], losses[(row + r) * columns + column + c]]);
      if (!square.every(([, , loss]) => Number.isFinite(loss))) continue;
      for (const level of levels) {
        const crossed = square.flatMap((a, i) => {
          const b = square[(i + 1) % 4];
          if (a[2] > level === b[2] > level) return [];
          const share = (level - a[2]) / (b[2] - a[2]);
          return [[plot.px(a[0] + share * (b[0] - a[0])), plot.py(a[1] + share * (b[1] - a[1]))]];
        });
        for (let i = 0; i + 1 < crossed.length; i += 2) {
          context.moveTo(crossed[i][0], crossed[i][1]);
          context.lineTo(crossed[i + 1][0], crossed[i + 1][1]);
        }
      }
    }
  }
  context.stroke();
}
