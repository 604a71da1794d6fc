/** A canvas with axes, and a second one over it for what follows the cursor. */

import { format } from "./scale.js";
import { colors } from "./theme.js";

/** @typedef {import("./scale.js").Scale} Scale */

/**
 * @typedef {object} Frame
 * @property {Scale} x
 * @property {Scale} y
 * @property {string} [xLabel]
 * @property {string} [yLabel]
 * @property {(value: number) => string} [xFormat]
 * @property {string[]} [rows] names in place of numbers along y, the first one at the top
 * @property {(context: CanvasRenderingContext2D, plot: Plot) => void} paint what is inside
 */

const FONT = "11px system-ui, sans-serif";
const RIGHT = 14;
const TOP = 14;

export class Plot {
  /**
   * @param {HTMLElement} host
   * @param {{height: number, label: string, onMove?: (x: number, y: number) => void,
   *   onLeave?: () => void, onPick?: (x: number, y: number) => void,
   *   onZoom?: (range: [number, number]|null) => void}} options
   */
  constructor(host, options) {
    this.options = options;
    this.root = document.createElement("div");
    this.root.className = "plot";
    this.root.style.minHeight = `${options.height}px`;
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "img");
    this.root.setAttribute("aria-label", options.label);
    this.base = this.root.appendChild(document.createElement("canvas"));
    this.over = this.root.appendChild(document.createElement("canvas"));
    host.append(this.root);
    /** @type {Frame|null} */
    this.frame = null;
    /** @type {((context: CanvasRenderingContext2D, plot: Plot) => void)|null} */
    this.marks = null;
    this.left = this.width = this.height = this.bottom = 0;
    this.ratio = 1;
    new ResizeObserver(() => this.redraw()).observe(this.root);
    this.listen();
  }

  /** @param {number} value */
  px(value) {
    return this.frame ? this.left + this.frame.x.share(value) * this.innerWidth : 0;
  }

  /** @param {number} value */
  py(value) {
    return this.frame ? this.bottom - this.frame.y.share(value) * (this.bottom - TOP) : 0;
  }

  /** @param {number} x whether the plot shows so far */
  isInside(x) {
    const share = this.frame?.x.share(x) ?? -1;
    return share >= -1e-9 && share <= 1 + 1e-9;
  }

  get innerWidth() {
    return Math.max(1, this.width - this.left - RIGHT);
  }

  get innerHeight() {
    return Math.max(1, this.bottom - TOP);
  }

  get top() {
    return TOP;
  }

  /** @param {Frame} frame */
  draw(frame) {
    this.frame = frame;
    this.redraw();
  }

  redraw() {
    const { width, height } = this.root.getBoundingClientRect();
    if (!this.frame || width < 10) return;
    [this.width, this.height, this.ratio] = [width, height, window.devicePixelRatio || 1];
    for (const canvas of [this.base, this.over]) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
    }
    const context = this.context(this.base);
    this.axes(context, this.frame);
    context.save();
    context.beginPath();
    context.rect(this.left, TOP, this.innerWidth, this.innerHeight);
    context.clip();
    this.frame.paint(context, this);
    context.restore();
    this.mark();
  }

  /** @param {(context: CanvasRenderingContext2D, plot: Plot) => void} [marks] drawn from now on */
  mark(marks) {
    this.marks = marks ?? this.marks;
    if (!this.frame || !this.width) return;
    const context = this.context(this.over);
    context.clearRect(0, 0, this.width, this.height);
    this.marks?.(context, this);
  }

  /**
   * @param {HTMLCanvasElement} canvas
   * @returns {CanvasRenderingContext2D}
   */
  context(canvas) {
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.font = FONT;
    return context;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Frame} frame
   */
  axes(context, frame) {
    this.bottom = this.height - (frame.xLabel ? 36 : 20);
    const rows = frame.rows;
    const yTicks = rows ? [] : frame.y.ticks(Math.max(2, Math.floor(this.innerHeight / 36)));
    const yTexts = rows ? rows.map((name) => shortened(context, name, this.width * 0.3)) : yTicks.map(format);
    const widest = Math.max(0, ...yTexts.map((text) => context.measureText(text).width));
    this.left = Math.ceil(widest) + (frame.yLabel ? 26 : 10);
    context.fillStyle = context.strokeStyle = colors.grid;
    context.lineWidth = 1;
    for (const tick of yTicks) line(context, [this.left, this.py(tick), this.width - RIGHT, this.py(tick)]);
    context.fillStyle = colors.muted;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const rowHeight = this.innerHeight / (rows?.length || 1);
    const every = Math.ceil(12 / rowHeight);
    yTexts.forEach((text, i) => {
      if (rows && i % every) return;
      context.fillText(text, this.left - 6, rows ? TOP + (i + 0.5) * rowHeight : this.py(yTicks[i]));
    });
    context.textAlign = "center";
    context.textBaseline = "top";
    let end = -Infinity;
    for (const tick of frame.x.ticks(Math.max(2, Math.floor(this.innerWidth / 70)))) {
      const text = (frame.xFormat ?? format)(tick);
      const half = context.measureText(text).width / 2;
      const at = Math.min(Math.max(this.px(tick), this.left), this.width - half - 1);
      if (at - half < end + 8) continue;
      context.fillText(text, at, this.bottom + 5);
      end = at + half;
    }
    if (frame.xLabel) context.fillText(frame.xLabel, this.left + this.innerWidth / 2, this.bottom + 20);
    if (!frame.yLabel) return;
    context.save();
    context.translate(11, TOP + this.innerHeight / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    context.fillText(frame.yLabel, 0, 0);
    context.restore();
  }

  /** Says where the pointer is, in the numbers of the axes. */
  listen() {
    /** @type {number|null} */
    let start = null;
    const place = (/** @type {PointerEvent|MouseEvent} */ event) => {
      const box = this.root.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - box.left - this.left) / this.innerWidth, 0), 1);
      const up = Math.min(Math.max((this.bottom - (event.clientY - box.top)) / this.innerHeight, 0), 1);
      return /** @type {[number, number]} */ ([this.frame?.x.value(share) ?? 0, this.frame?.y.value(up) ?? 0]);
    };
    const moved = (/** @type {number} */ x) => start !== null && Math.abs(this.px(x) - this.px(start)) > 8;
    this.root.addEventListener("pointerdown", (event) => {
      if (this.frame && event.button === 0) [start] = place(event);
    });
    this.root.addEventListener("pointermove", (event) => {
      if (!this.frame) return;
      const [x, y] = place(event);
      this.options.onMove?.(x, y);
      const from = start;
      if (!this.options.onZoom || from === null || !moved(x)) return;
      const context = this.context(this.over);
      context.fillStyle = colors.shade;
      context.fillRect(this.px(from), TOP, this.px(x) - this.px(from), this.innerHeight);
    });
    this.root.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [x, y] = place(event);
      if (this.options.onZoom && moved(x)) this.options.onZoom([Math.min(start, x), Math.max(start, x)]);
      else this.options.onPick?.(x, y);
      start = null;
    });
    this.root.addEventListener("pointerleave", () => {
      start = null;
      this.options.onLeave?.();
    });
    this.root.addEventListener("dblclick", () => this.options.onZoom?.(null));
  }

  /** @param {string} text for those who do not see the canvas */
  describe(text) {
    this.root.setAttribute("aria-label", text);
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {[number, number, number, number]} ends x and y, twice
 */
export function line(context, [x0, y0, x1, y1]) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

/**
 * The end of a long name tells more than its beginning.
 * @param {CanvasRenderingContext2D} context
 * @param {string} text
 * @param {number} width
 */
function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let from = 1;
  while (from < text.length && context.measureText(`…${text.slice(from)}`).width > width) from++;
  return `…${text.slice(from)}`;
}
