/** Axes: numbers to shares of a length and back, ticks, and numbers as people write them. */

/**
 * @typedef {"linear"|"log"|"symlog"} ScaleKind
 * @typedef {object} Scale
 * @property {number} low
 * @property {number} high
 * @property {(value: number) => number} share 0 at `low`, 1 at `high`
 * @property {(share: number) => number} value
 * @property {(count: number) => number[]} ticks
 */

/**
 * @param {ScaleKind} kind
 * @param {number} low
 * @param {number} high
 * @param {number} [linear] of "symlog": it is linear within so much of zero
 * @returns {Scale}
 */
export function makeScale(kind, low, high, linear = 1) {
  if (!(high > low)) {
    const margin = Math.abs(low) * 0.05 || 1;
    [low, high] = kind === "log" ? [low / 1.2, low * 1.2] : [low - margin, low + margin];
  }
  const to = {
    linear: (/** @type {number} */ v) => v,
    log: Math.log10,
    symlog: (/** @type {number} */ v) => Math.asinh(v / linear),
  }[kind];
  const from = {
    linear: (/** @type {number} */ v) => v,
    log: (/** @type {number} */ v) => 10 ** v,
    symlog: (/** @type {number} */ v) => Math.sinh(v) * linear,
  }[kind];
  const start = to(low);
  const length = to(high) - start;
  const ticks = {
    linear: (/** @type {number} */ count) => linearTicks(low, high, count),
    log: (/** @type {number} */ count) => logTicks(low, high, count),
    symlog: (/** @type {number} */ count) => symlogTicks(low, high, linear, count),
  }[kind];
  return {
    low,
    high,
    share: (value) => (to(value) - start) / length,
    value: (share) => from(start + share * length),
    ticks,
  };
}

/**
 * Round numbers: 1, 2 or 5 times a power of ten apart.
 * @param {number} low
 * @param {number} high
 * @param {number} count at most about so many
 */
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((m) => m * power >= rough) ?? 10);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

/**
 * @param {number} low
 * @param {number} high
 * @param {number} count
 */
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, count).filter((v) => v > 0);
  const within = decades < count / 2.5 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / Math.max(1, count)));
  const ticks = [];
  for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high) + 1e-9; k++) {
    if (k % every) continue;
    for (const m of within) if (m * 10 ** k >= low * 0.999 && m * 10 ** k <= high * 1.001) ticks.push(m * 10 ** k);
  }
  return ticks;
}

/**
 * Zero, and powers of ten on either side, out of the linear part.
 * @param {number} low
 * @param {number} high
 * @param {number} linear
 * @param {number} count
 */
function symlogTicks(low, high, linear, count) {
  const least = 10 ** Math.ceil(Math.log10(2 * linear));
  const sides = [high, -low].map((end) => (end > least ? logTicks(least, end, count * 2) : []));
  const whole = sides.map((side) => side.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-6));
  const every = Math.max(1, Math.ceil((whole[0].length + whole[1].length) / Math.max(1, count - 1)));
  const kept = whole.map((side) => side.filter((_, i) => (side.length - 1 - i) % every === 0));
  const zero = low <= 0 && high >= 0 ? [0] : [];
  return [...kept[1].map((v) => -v).reverse(), ...zero, ...kept[0]];
}

/**
 * Three digits, and powers of ten where zeros would have to be counted.
 * @param {number|null|undefined} value
 */
export function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en").replace("-", "−");
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  return text.replace(/\.?0*e/, "e").replace("e+", "e").replaceAll("-", "−");
}

/**
 * Least and greatest finite number, of positive ones alone if asked.
 * @param {Iterable<ArrayLike<number>>} lists
 * @param {boolean} [positive]
 * @returns {[number, number]|null}
 */
export function extent(lists, positive = false) {
  let low = Infinity;
  let high = -Infinity;
  for (const list of lists) {
    for (let i = 0; i < list.length; i++) {
      const value = list[i];
      if (!Number.isFinite(value) || (positive && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}
