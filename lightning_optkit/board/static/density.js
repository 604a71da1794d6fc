/** The density of a spectrum from Ritz values and their weights. */

import { arrayAt } from "./payload.js";

/** @typedef {import("./payload.js").Series} Series */

const WIDEST = 0.3; // of a Gaussian, in units of the axis: an eighth of a decade
const MANY = 1.001e-3; // a larger share is no single eigenvalue: below 1,000 parameters all are known

/**
 * Places on the axis of eigenvalues: asinh(λ / linear), which is linear near zero and counts
 * decades beyond.
 * @typedef {{low: number, high: number, linear: number, places: Float64Array}} Grid
 */

/**
 * @param {number} low eigenvalue
 * @param {number} high eigenvalue
 * @param {number} linear
 * @param {number} count
 * @returns {Grid}
 */
export function makeGrid(low, high, linear, count) {
  const [from, to] = [Math.asinh(low / linear), Math.asinh(high / linear)];
  const places = Float64Array.from({ length: count }, (_, i) => from + ((i + 0.5) / count) * (to - from));
  return { low, high, linear, places };
}

/**
 * Returns the share of eigenvalues per decade at each place of the grid, shape `(places,)`.
 *
 * Each Ritz value θ stands for the eigenvalues between its neighbours: its weight w is spread by a
 * Gaussian as wide as they are apart, times `bandwidth`. A fixed width would show single Ritz
 * values where they are apart, as a ringing that no eigenvalue makes. One that stands alone is an
 * eigenvalue that has converged, and stays narrow; one that stands for many may be twice as wide.
 * @param {Series} series of quadratures, `(probes, nodes, 2)`
 * @param {number} index of the measured point
 * @param {Grid} grid
 * @param {number} bandwidth 1 is the distance of neighbours
 */
export function densityAt(series, index, grid, bandwidth) {
  const [probes, nodes] = series.shape;
  const values = arrayAt(series, index);
  const density = new Float32Array(grid.places.length);
  const spacing = grid.places[1] - grid.places[0];
  for (let p = 0; p < probes; p++) {
    /** @type {{u: number, w: number}[]} */
    const rule = [];
    for (let n = 0; n < nodes; n++) {
      const at = 2 * (p * nodes + n);
      if (values[at + 1] > 0) rule.push({ u: Math.asinh(values[at] / grid.linear), w: values[at + 1] });
    }
    rule.sort((a, b) => a.u - b.u);
    const least = Math.min(...rule.map(({ w }) => w));
    rule.forEach(({ u, w }, i) => {
      const below = rule[Math.max(0, i - 1)].u;
      const above = rule[Math.min(rule.length - 1, i + 1)].u;
      const apart = (above - below) / (i && i < rule.length - 1 ? 2 : 1);
      const widest = w > Math.max(MANY, 1.5 * least) ? 2 * WIDEST : WIDEST;
      const width = Math.max(spacing, bandwidth * Math.min(apart, widest));
      spread(density, grid, u, width, (w / probes) * Math.LN10);
    });
  }
  return density;
}

/**
 * Adds a Gaussian whose integral over the places is `mass`.
 * @param {Float32Array} density
 * @param {Grid} grid
 * @param {number} centre
 * @param {number} width its standard deviation
 * @param {number} mass
 */
function spread(density, grid, centre, width, mass) {
  const { places } = grid;
  const spacing = places[1] - places[0];
  const first = Math.max(0, Math.floor((centre - 4 * width - places[0]) / spacing));
  const last = Math.min(places.length - 1, Math.ceil((centre + 4 * width - places[0]) / spacing));
  const peak = mass / (width * Math.sqrt(2 * Math.PI));
  for (let i = first; i <= last; i++) density[i] += peak * Math.exp(-0.5 * ((places[i] - centre) / width) ** 2);
}

/**
 * Ends of a grid that holds all spectra, and its linear part.
 * @param {Series[]} spectra
 * @param {number} tolerance what counts as zero; 0 if not known
 * @returns {[number, number, number]|null} low, high, linear
 */
export function spectralRange(spectra, tolerance) {
  let low = 0;
  let high = 0;
  for (const { values } of spectra) {
    for (let i = 0; i < values.length; i += 2) {
      if (!(values[i + 1] > 0) || !Number.isFinite(values[i])) continue;
      low = Math.min(low, values[i]);
      high = Math.max(high, values[i]);
    }
  }
  const radius = Math.max(-low, high);
  if (!(radius > 0)) return null;
  const linear = Math.max(tolerance, radius * 1e-4);
  const wider = (/** @type {number} */ v, /** @type {number} */ by) => Math.sinh(Math.asinh(v / linear) + by) * linear;
  return [wider(low, -0.8), wider(high, 0.8), linear];
}
