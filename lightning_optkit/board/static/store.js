/** What is known and what is looked at: runs, their data, and the view that a link restores. */

import { decode, nearest } from "./payload.js";
import { extent } from "./scale.js";
import { runColor } from "./theme.js";

/** @typedef {import("./payload.js").Series} Series */
/** @typedef {import("./source.js").About} About */
/** @typedef {import("./source.js").Alert} Alert */

/**
 * @typedef {object} Run
 * @property {string} name
 * @property {number} index
 * @property {string} stamp of what was read last
 * @property {Map<string, Map<string, Map<string, Series>>>} topics topic → instance → name → series
 * @property {import("./payload.js").Problem[]} problems
 * @property {Alert[]} alerts
 * @property {string|null} error
 * @property {[number, number][]} epochs step at which each epoch begins
 */

/** @typedef {{run: Run, instance: string, series: Series, label: string}} Track */

/**
 * @typedef {object} View
 * @property {"step"|"epoch"} axis
 * @property {number|null} at the cursor; null follows the end
 * @property {number|null} pin another point, to compare with
 * @property {number} bandwidth
 * @property {boolean} ridge
 * @property {string[]} off runs that are not shown
 * @property {[number, number]|null} zoom
 * @property {Record<string, string>} picks what is chosen in a panel
 */

/** @returns {View} */
const firstView = () => ({
  axis: "step", at: null, pin: null, bandwidth: 1, ridge: false, off: [], zoom: null, picks: {},
});

const KEY = "optkit";
const MAX_ARRAYS = 24; // kept at once: a spectrum of 1,000 points is 2.5 MB

export class Store {
  /** @param {import("./source.js").Source} source */
  constructor(source) {
    this.source = source;
    /** @type {Run[]} */
    this.runs = [];
    /** @type {About} */
    this.about = { version: "", topics: [] };
    this.view = readView();
    /** @type {number|null} */
    this.hover = null;
    this.error = "";
    /** @type {Map<string, {series: Series|null, error: string, stamp: string}>} */
    this.arrays = new Map();
    /** @type {Promise<void>} */
    this.reading = Promise.resolve();
    /** @type {WeakMap<Float64Array, {of: [number, number][], places: Float64Array}>} */
    this.epochs = new WeakMap();
    /** @type {((what: "data"|"view"|"cursor") => void)[]} */
    this.listeners = [];
    /** @type {Set<"data"|"view"|"cursor">} */
    this.waiting = new Set();
  }

  /** @param {"data"|"view"|"cursor"} what changed: told once a frame */
  tell(what) {
    if (!this.waiting.size) {
      requestAnimationFrame(() => {
        const told = [...this.waiting];
        this.waiting.clear();
        for (const one of told) for (const listener of this.listeners) listener(one);
      });
    }
    this.waiting.add(what);
  }

  /** @param {Partial<View>} change */
  look(change) {
    Object.assign(this.view, change);
    writeView(this.view);
    this.tell(Object.keys(change).every((key) => key === "at") ? "cursor" : "view");
  }

  /** Reads what is new, after what is being read now. */
  refresh() {
    return (this.reading = this.reading.then(() => this.readNew()));
  }

  /** Reads what is new, and says so as it comes. */
  async readNew() {
    try {
      if (!this.about.topics.length) this.about = await this.source.about();
      const listed = await this.source.runs();
      const known = new Map(this.runs.map((run) => [run.name, run]));
      this.runs = listed.map(({ name, index }) => known.get(name) ?? newRun(name, index));
      const stale = listed.filter(({ name, stamp }) => this.isOn(name) && known.get(name)?.stamp !== (stamp || "read"));
      const queue = stale.map(({ name, stamp }) => () => this.read(name, stamp || "read"));
      const worker = async () => {
        for (let next = queue.shift(); next; next = queue.shift()) await next();
      };
      await Promise.all(Array.from({ length: 6 }, worker)); // as many as a browser opens
      this.error = "";
      if (listed.length !== known.size || !stale.length) this.tell("data");
    } catch (error) {
      this.error = String(error instanceof Error ? error.message : error);
      this.tell("data");
    }
  }

  /**
   * @param {string} name
   * @param {string} stamp
   */
  async read(name, stamp) {
    const run = this.runs.find((one) => one.name === name);
    if (!run) return;
    try {
      const [buffer, alerts] = await Promise.all([this.source.scalars(name), this.source.alerts(name)]);
      const found = decode(buffer);
      Object.assign(run, { stamp, alerts, problems: found.problems, error: null });
      run.topics = byTopic(found.series, this.about.topics.map((topic) => topic.name));
      run.epochs = beginnings(run.topics.get("")?.get("")?.get("epoch"));
    } catch (error) {
      run.error = String(error instanceof Error ? error.message : error);
    }
    this.tell("data");
  }

  /** @param {string} name */
  isOn(name) {
    return !this.view.off.includes(name);
  }

  get shown() {
    return this.runs.filter((run) => this.isOn(run.name) && run.stamp);
  }

  /**
   * Everything shown that was logged under a name, of all runs and instances of a callback.
   * @param {string} topic
   * @param {string} name
   * @returns {Track[]}
   */
  tracks(topic, name) {
    return this.shown.flatMap((run) => {
      const found = [];
      for (const [instance, names] of run.topics.get(topic) ?? []) {
        const series = names.get(name);
        if (series) found.push({ run, instance, series, label: instance ? `${run.name} · ${instance}` : run.name });
      }
      return found;
    });
  }

  /**
   * The same for arrays, which are read when they are asked for: those still on their way are left
   * out, and all are told of when they have come.
   * @param {string} topic
   * @param {string} name
   * @param {number} [most] how many at most
   * @returns {Track[]}
   */
  arrayTracks(topic, name, most = 4) {
    return this.tracks(topic, name).slice(0, most).flatMap((track) => {
      if (track.series.values.length) return [track];
      const tag = `${topic}${track.instance ? `-${track.instance}` : ""}/${name}`;
      const series = this.array(track.run, tag);
      return series ? [{ ...track, series }] : [];
    });
  }

  /**
   * @param {Run} run
   * @param {string} tag
   * @returns {Series|null}
   */
  array(run, tag) {
    const key = JSON.stringify([run.name, tag]);
    const kept = this.arrays.get(key);
    if (kept) {
      this.arrays.delete(key); // and again at the end: the first is the one not used for longest
      this.arrays.set(key, kept);
      if (kept.stamp === run.stamp) return kept.series;
    }
    const entry = { series: kept?.series ?? null, error: "", stamp: run.stamp };
    this.arrays.set(key, entry);
    for (const old of this.arrays.keys()) if (this.arrays.size > MAX_ARRAYS) this.arrays.delete(old);
    this.source.array(run.name, tag).then(
      (buffer) => {
        entry.series = decode(buffer).series.get(tag) ?? null;
        this.tell("data");
      },
      (error) => {
        const others = run.problems.filter((problem) => problem.tag !== tag);
        run.problems = [...others, { tag, step: null, message: String(error.message ?? error) }];
        this.tell("data");
      },
    );
    return entry.series;
  }

  /**
   * Places on the time axis of now, shape `(n,)`.
   * @param {Run} run
   * @param {Float64Array} steps
   */
  places(run, steps) {
    if (this.view.axis === "step") return steps;
    const kept = this.epochs.get(steps);
    if (kept?.of === run.epochs) return kept.places;
    const places = Float64Array.from(steps, (step) => epochOf(run, step));
    this.epochs.set(steps, { of: run.epochs, places });
    return places;
  }

  /** Ends of the time axis: all that is shown, or what was zoomed into. */
  get timeRange() {
    if (this.view.zoom) return this.view.zoom;
    const series = (/** @type {Run} */ run) => [...run.topics.values()].flatMap((instances) =>
      [...instances.values()].flatMap((names) => [...names.values()].filter(({ steps }) => steps.length)));
    const ends = this.shown.flatMap((run) => series(run).map(({ steps }) =>
      this.places(run, Float64Array.of(steps[0], steps[steps.length - 1]))));
    const [low, high] = extent(ends) ?? [0, 1];
    return /** @type {[number, number]} */ ([low, low < high ? high : low + 1]);
  }

  /** Where the cursor is on the time axis. */
  get cursor() {
    return this.hover ?? this.view.at ?? this.timeRange[1];
  }

  /**
   * The point of a track nearest to a place on the time axis, or -1.
   * @param {Track} track
   * @param {number} place
   */
  pointAt(track, place) {
    return nearest(this.places(track.run, track.series.steps), place);
  }
}

/**
 * @param {string} name
 * @param {number} index
 * @returns {Run}
 */
function newRun(name, index) {
  return { name, index, stamp: "", topics: new Map(), problems: [], alerts: [], error: null, epochs: [] };
}

/** @param {Run} run */
export const colorOf = (run) => runColor(run.index);

/**
 * @param {Map<string, Series>} all
 * @param {string[]} topics
 * @returns {Run["topics"]}
 */
function byTopic(all, topics) {
  /** @type {Run["topics"]} */
  const found = new Map();
  for (const [tag, series] of all) {
    const slash = tag.indexOf("/");
    const first = tag.slice(0, slash);
    const topic = topics.find((name) => first === name || first.startsWith(`${name}-`)) ?? "";
    const instance = topic ? first.slice(topic.length + 1) : "";
    const name = topic ? tag.slice(slash + 1) : tag;
    const instances = found.get(topic) ?? new Map();
    found.set(topic, instances.set(instance, (instances.get(instance) ?? new Map()).set(name, series)));
  }
  return found;
}

/**
 * Lightning logs the epoch beside everything else: the steps at which it grows.
 * @param {Series|undefined} series
 * @returns {[number, number][]}
 */
function beginnings(series) {
  /** @type {[number, number][]} */
  const found = [];
  series?.steps.forEach((step, i) => {
    const epoch = series.values[i];
    if (!found.length || epoch > found[found.length - 1][1]) found.push([step, epoch]);
  });
  return found;
}

/**
 * Epochs behind a step, between whole ones in proportion; NaN where none was logged.
 * @param {Run} run
 * @param {number} step
 */
export function epochOf(run, step) {
  const { epochs } = run;
  if (epochs.length < 2) return epochs.length ? epochs[0][1] : NaN;
  let i = 0;
  while (i < epochs.length - 2 && epochs[i + 1][0] <= step) i++;
  const [[s0, e0], [s1, e1]] = [epochs[i], epochs[i + 1]];
  return Math.max(0, e0 + ((step - s0) / (s1 - s0)) * (e1 - e0));
}

/** TensorBoard keeps what it does not know in the address of its own page; a frame of others is theirs. */
function address() {
  try {
    return window.parent.location.hash === undefined ? window : window.parent;
  } catch {
    return window;
  }
}

function readView() {
  const view = firstView();
  const pairs = address().location.hash.slice(1).split("&").map((pair) => pair.split("="));
  const text = pairs.find(([key, value]) => key === KEY && value)?.[1]; // the tab is called so, too
  if (!text) return view;
  try {
    const given = JSON.parse(decodeURIComponent(text));
    const isNumber = (/** @type {unknown} */ v) => typeof v === "number" && Number.isFinite(v);
    if (given.axis === "epoch") view.axis = "epoch";
    if (isNumber(given.at)) view.at = given.at;
    if (isNumber(given.pin)) view.pin = given.pin;
    if (isNumber(given.bandwidth)) view.bandwidth = Math.min(Math.max(given.bandwidth, 0.2), 5);
    view.ridge = given.ridge === true;
    if (Array.isArray(given.off)) view.off = given.off.filter((/** @type {unknown} */ v) => typeof v === "string");
    if (Array.isArray(given.zoom) && given.zoom.every(isNumber) && given.zoom[0] < given.zoom[1]) view.zoom = given.zoom;
    for (const [key, value] of Object.entries(given.picks ?? {})) if (typeof value === "string") view.picks[key] = value;
  } catch {
    return firstView(); // a link that was cut short shows the page as it begins
  }
  return view;
}

/** @param {View} view */
function writeView(view) {
  const standard = /** @type {Record<string, unknown>} */ (firstView());
  const changed = Object.entries(view).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(standard[key]));
  const { location, history } = address();
  const others = location.hash.slice(1).split("&").filter((pair) => pair && !pair.startsWith(`${KEY}=`));
  if (changed.length) others.push(`${KEY}=${encodeURIComponent(JSON.stringify(Object.fromEntries(changed)))}`);
  try {
    history.replaceState(history.state, "", `#${others.join("&")}`);
  } catch {
    // browsers allow some hundred changes a minute: the next one writes the address
  }
}
