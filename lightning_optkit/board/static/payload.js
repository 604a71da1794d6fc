/** One run as bytes, decoded without a copy. The format is that of `board/payload.py`. */

/**
 * What was logged under one tag.
 * @typedef {object} Series
 * @property {Float64Array} steps growing
 * @property {Float64Array} times seconds since 1970
 * @property {Float32Array} values one value a step, or `size(shape)` of them
 * @property {number[]} shape of the array at a step; empty for a number
 * @property {[number, string[]][]} names where they changed, for arrays of names
 */

/**
 * @typedef {{tag: string, step: number|null, message: string}} Problem
 * @typedef {{name: string, series: Map<string, Series>, problems: Problem[]}} Decoded
 */

export const FORMAT = 1;

/**
 * @param {ArrayBuffer} buffer
 * @returns {Decoded}
 */
export function decode(buffer) {
  const head = new DataView(buffer);
  const magic = String.fromCharCode(...new Uint8Array(buffer, 0, 4));
  if (magic !== "OPTK") throw new Error("The server sent something that is not a run.");
  const length = head.getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  if (header.version !== FORMAT) {
    throw new Error(`Made by a newer lightning-optkit (format ${header.version}): reload the page.`);
  }
  const body = 8 + length;
  const series = new Map();
  for (const block of header.blocks) {
    const size = block.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
    const count = block.kind === "names" ? 0 : block.count * size;
    series.set(block.tag, {
      steps: new Float64Array(buffer, body + block.steps, block.count),
      times: new Float64Array(buffer, body + block.times, block.count),
      values: new Float32Array(buffer, body + (block.values ?? 0), count),
      shape: block.shape,
      names: block.names ?? [],
    });
  }
  return { name: header.run, series, problems: header.problems };
}

/**
 * Returns the array at one measured point.
 * @param {Series} series
 * @param {number} index
 */
export function arrayAt(series, index) {
  const size = series.shape.reduce((a, b) => a * b, 1);
  return series.values.subarray(index * size, (index + 1) * size);
}

/**
 * Returns the names that hold at a step.
 * @param {Series|undefined} series
 * @param {number} step
 * @returns {string[]}
 */
export function namesAt(series, step) {
  let found = series?.names[0]?.[1] ?? [];
  for (const [from, names] of series?.names ?? []) if (from <= step) found = names;
  return found;
}

/**
 * Returns the index of the point nearest to `x` among growing numbers, or -1 if there are none.
 * @param {ArrayLike<number>} xs
 * @param {number} x
 */
export function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  if (high < 0) return -1;
  return Math.abs(xs[high] - x) < Math.abs(x - xs[low]) ? high : low;
}
