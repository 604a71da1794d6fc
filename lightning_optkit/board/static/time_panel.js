/** Lines over steps or epochs, with bounds, events, and the cursor that all panels share. */

import { Panel } from "./panel.js";
import { nearest } from "./payload.js";
import { line, Plot } from "./plot.js";
import { extent, format, makeScale } from "./scale.js";
import { colorOf } from "./store.js";
import { colors } from "./theme.js";

/** @typedef {import("./store.js").Store} Store */
/** @typedef {import("./store.js").Run} Run */

/**
 * @typedef {object} Line
 * @property {Run} run
 * @property {string} label
 * @property {Float64Array} steps
 * @property {Float64Array} x on the axis of now
 * @property {Float32Array} y
 * @property {Float32Array} [low]
 * @property {Float32Array} [high]
 * @property {number[]} [dash]
 */

/**
 * @typedef {object} TimeSpec
 * @property {import("./scale.js").ScaleKind} [scale]
 * @property {string} [yLabel]
 * @property {number} [height]
 * @property {boolean} [zero] whether the axis must hold zero
 * @property {(store: Store, panel: TimePanel) => Line[]} lines
 * @property {(store: Store, panel: TimePanel) => string[]} [notes]
 * @property {(panel: TimePanel) => void} [tools]
 */

/**
 * The lines of one quantity in all runs; bounds are series beside it.
 * @param {Store} store
 * @param {string} topic
 * @param {string} name
 * @param {{label?: string, low?: string, high?: string, error?: string, dash?: number[]}} [options]
 * @returns {Line[]}
 */
export function linesOf(store, topic, name, { label = name, low, high, error, dash } = {}) {
  return store.tracks(topic, name).map(({ run, instance, series, label: owner }) => {
    const siblings = run.topics.get(topic)?.get(instance);
    const aligned = (/** @type {string|undefined} */ other) => alignedTo(series, other ? siblings?.get(other) : undefined);
    const spread = aligned(error);
    return {
      run, dash, label: label ? `${owner} ${label}` : owner,
      steps: series.steps, x: store.places(run, series.steps), y: series.values,
      low: aligned(low) ?? spread?.map((e, i) => series.values[i] - e),
      high: aligned(high) ?? spread?.map((e, i) => series.values[i] + e) ?? (low ? series.values : undefined),
    };
  });
}

/**
 * Another series at the steps of the first; NaN where it has none.
 * @param {import("./payload.js").Series} first
 * @param {import("./payload.js").Series|undefined} other
 */
function alignedTo(first, other) {
  if (!other) return undefined;
  return Float32Array.from(first.steps, (step) => {
    const i = nearest(other.steps, step);
    return i >= 0 && other.steps[i] === step ? other.values[i] : NaN;
  });
}

export class TimePanel extends Panel {
  /**
   * @param {Store} store
   * @param {import("./panel.js").PanelSpec & TimeSpec} spec
   */
  constructor(store, spec) {
    super(store, spec);
    this.time = spec;
    /** @type {Line[]} */
    this.lines = [];
    /** @type {Plot|null} */
    this.plot = null;
  }

  build() {
    this.plot = timePlot(this.store, this.body, this.spec.title, this.time.height ?? 220);
    this.choice("Scale of the vertical axis", { linear: "linear", log: "log", symlog: "symlog" }, this.time.scale ?? "linear", `${this.spec.id}.scale`);
    this.time.tools?.(this);
  }

  update() {
    this.lines = this.time.lines(this.store, this).filter(({ y }) => y.length);
    this.setEmpty(!this.lines.length && !this.store.tracks(this.spec.topic, "seconds").length);
    this.note(...(this.time.notes?.(this.store, this) ?? []));
    if (this.isEmpty || !this.plot) return;
    const kind = /** @type {import("./scale.js").ScaleKind} */ (this.picked(this.time.scale ?? "linear", `${this.spec.id}.scale`));
    this.plot.draw({
      ...timeAxis(this.store),
      y: fitted(kind, this.lines, this.time.zero ?? false),
      yLabel: this.time.yLabel,
      paint: (context, plot) => {
        paintEvents(context, plot, this.store);
        for (const one of this.lines) paintLine(context, plot, one);
      },
    });
    this.cursor();
  }

  cursor() {
    if (this.isEmpty || !this.plot) return;
    const { cursor, view } = this.store;
    this.plot.mark((context, plot) => {
      context.clearRect(0, 0, plot.width, plot.height);
      paintCursor(context, plot, this.store);
      for (const one of this.lines) {
        const i = nearest(one.x, cursor);
        if (i >= 0 && plot.isInside(one.x[i])) paintPoint(context, plot, one, i);
      }
    });
    const at = (/** @type {Line} */ one, /** @type {number} */ place) => {
      const i = nearest(one.x, place);
      return i < 0 ? "–" : `${format(one.y[i])}${boundsText(one, i)}`;
    };
    const said = this.read(this.lines, (one) =>
      `${one.label} ${view.pin === null ? "" : `${at(one, view.pin)} → `}${at(one, cursor)}`);
    this.plot.describe(`${this.spec.title}. ${said}`);
  }

  table() {
    /** @type {import("./panel.js").Row[]} */
    const rows = [["run", "line", "step", "value", "lower", "upper"]];
    for (const { run, label, steps, y, low, high } of this.lines) {
      steps.forEach((step, i) => rows.push([run.name, label, step, y[i], low?.[i] ?? null, high?.[i] ?? null]));
    }
    return rows;
  }
}

/**
 * @param {Line} one
 * @param {number} i
 */
function boundsText({ low, high }, i) {
  const ends = [low?.[i] ?? NaN, high?.[i] ?? NaN];
  const [from, to] = ends.map(format);
  return ends.some(Number.isNaN) || from === to ? "" : ` [${from}, ${to}]`;
}

/**
 * A plot whose horizontal axis is the time of the run.
 * @param {Store} store
 * @param {HTMLElement} host
 * @param {string} label
 * @param {number} height
 */
export function timePlot(store, host, label, height) {
  const follow = (/** @type {number|null} */ x) => {
    store.hover = x;
    store.tell("cursor");
  };
  return new Plot(host, {
    height, label,
    onMove: follow,
    onLeave: () => follow(null),
    onPick: (x) => store.look({ at: x }),
    onZoom: (range) => store.look({ zoom: range }),
  });
}

/** @param {Store} store */
export function timeAxis(store) {
  const [low, high] = store.timeRange;
  return { x: makeScale("linear", low, high), xLabel: store.view.axis };
}

/**
 * @param {import("./scale.js").ScaleKind} kind
 * @param {Line[]} lines
 * @param {boolean} zero
 */
function fitted(kind, lines, zero) {
  const lists = lines.flatMap(({ y, low, high }) => [y, low ?? [], high ?? []]);
  let [low, high] = extent(lists, kind === "log") ?? [kind === "log" ? 0.1 : 0, 1];
  if (zero && kind !== "log") [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const small = Math.min(...lists.flatMap((list) => Array.from(list, Math.abs).filter((v) => v > 0 && Number.isFinite(v))), Infinity);
  const linear = kind === "symlog" ? Math.max(small, Math.max(-low, high) * 1e-4) : 1;
  const plain = makeScale(kind, low, high, linear);
  const margin = 0.05;
  return makeScale(kind, zero && low === 0 && kind === "linear" ? 0 : plain.value(-margin), plain.value(1 + margin), linear);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Plot} plot
 * @param {Line} one
 */
export function paintLine(context, plot, { run, x, y, low, high, dash }) {
  context.strokeStyle = context.fillStyle = colorOf(run);
  if (low && high) {
    context.globalAlpha = 0.18;
    const isSolid = (/** @type {number} */ i) => Number.isFinite(plot.py(low[i])) && Number.isFinite(plot.py(high[i]));
    for (let from = 0, to = 0; from < x.length; from = to + 1) {
      for (to = from; to < x.length && isSolid(to); to++); // a band without a gap
      context.beginPath();
      for (let i = from; i < to; i++) context.lineTo(plot.px(x[i]), plot.py(high[i]));
      for (let i = to - 1; i >= from; i--) context.lineTo(plot.px(x[i]), plot.py(low[i]));
      context.fill();
    }
    context.globalAlpha = 1;
  }
  context.setLineDash(dash ?? []);
  context.lineWidth = dash ? 1.2 : 1.6;
  context.beginPath();
  let isDown = false;
  for (let i = 0; i < x.length; i++) {
    const v = plot.py(y[i]);
    if (!Number.isFinite(v)) {
      isDown = false; // NaN is a gap
      continue;
    }
    if (isDown) context.lineTo(plot.px(x[i]), v);
    else context.moveTo(plot.px(x[i]), v);
    if (!isDown && !Number.isFinite(plot.py(y[i + 1]))) context.arc(plot.px(x[i]), v, 1, 0, 7);
    isDown = true;
  }
  context.stroke();
  context.setLineDash([]);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Plot} plot
 * @param {Line} one
 * @param {number} i
 */
function paintPoint(context, plot, { run, x, y, dash }, i) {
  const v = plot.py(y[i]);
  if (dash || !Number.isFinite(v)) return;
  context.fillStyle = colorOf(run);
  context.beginPath();
  context.arc(plot.px(x[i]), v, 3, 0, 7);
  context.fill();
}

/**
 * The cursor, and the point that is pinned.
 * @param {CanvasRenderingContext2D} context
 * @param {Plot} plot
 * @param {Store} store
 */
export function paintCursor(context, plot, store) {
  for (const [place, dash] of /** @type {[number|null, number[]][]} */ ([[store.view.pin, [2, 3]], [store.cursor, []]])) {
    if (place === null) continue;
    const at = plot.px(place);
    if (at < plot.left - 1 || at > plot.width) continue;
    for (const [color, width] of /** @type {[string, number][]} */ ([[colors.panel, 3], [colors.accent, 1.5]])) {
      context.strokeStyle = color; // a rim, to stand out on any heatmap
      context.lineWidth = width;
      context.setLineDash(dash);
      line(context, [at, plot.top, at, plot.bottom]);
    }
  }
  context.setLineDash([]);
}

/**
 * What happened, on every time axis.
 * @param {CanvasRenderingContext2D} context
 * @param {Plot} plot
 * @param {Store} store
 * @param {Run} [only] of this run alone
 */
export function paintEvents(context, plot, store, only) {
  context.lineWidth = 1;
  for (const { run, steps } of eventsOf(store)) {
    if (only && run !== only) continue;
    context.strokeStyle = context.fillStyle = colorOf(run);
    for (const place of store.places(run, steps)) {
      const at = plot.px(place);
      context.globalAlpha = 0.35;
      context.setLineDash([1, 3]);
      line(context, [at, plot.top, at, plot.bottom]);
      context.globalAlpha = 1;
      context.beginPath();
      context.moveTo(at - 4, plot.top);
      context.lineTo(at + 4, plot.top);
      context.lineTo(at, plot.top + 6);
      context.fill();
    }
  }
  context.setLineDash([]);
}

/** @param {Store} store */
export function eventsOf(store) {
  return store.shown.flatMap((run) =>
    [...(run.topics.get("optkit-events")?.values() ?? [])].flatMap((names) =>
      [...names].map(([name, series]) => ({ run, name, steps: series.steps, values: series.values }))));
}
