/** The page: runs and controls above, panels below, and the keys. */

import { element, Panel } from "./panel.js";
import { nearest } from "./payload.js";
import { averaging } from "./panels/averaging.js";
import { cost } from "./panels/cost.js";
import { Events } from "./panels/events.js";
import { extremes } from "./panels/extremes.js";
import { noise, steps } from "./panels/gradients.js";
import { Landscape } from "./panels/landscape.js";
import { Layers } from "./panels/layers.js";
import { loss, minimumRatio } from "./panels/minimum_ratio.js";
import { mixing } from "./panels/mixing.js";
import { schedule } from "./panels/schedule.js";
import { sharpness } from "./panels/sharpness.js";
import { Spectrum } from "./panels/spectrum.js";
import { SpectrumAtStep } from "./panels/spectrum_at_step.js";
import { Verdict } from "./panels/verdict.js";
import { format } from "./scale.js";
import { colorOf, epochOf, Store } from "./store.js";
import { setDark, watchDark } from "./theme.js";

const PERIOD = 5000; // between looks at what is new, in milliseconds: as often as TensorBoard reads

/** In the order of a person's questions. */
const panelsOf = (/** @type {Store} */ store) => [
  new Verdict(store), new Spectrum(store), new SpectrumAtStep(store), extremes(store), minimumRatio(store),
  loss(store), sharpness(store), new Landscape(store), new Layers(store), noise(store), steps(store),
  schedule(store), mixing(store), averaging(store), new Events(store), cost(store),
];

/** @param {import("./source.js").Source} source */
export async function start(source) {
  document.documentElement.lang = "en";
  document.head.append(element("meta", { name: "viewport", content: "width=device-width, initial-scale=1" }));
  const store = new Store(source);
  const panels = panelsOf(store);
  const toolbar = new Toolbar(store);
  const main = element("main", {}, ...panels.map((panel) => panel.root));
  const spoken = element("div", { class: "quiet", "aria-live": "polite" });
  const footer = element("footer");
  document.body.append(toolbar.root, main, spoken, footer);
  const opened = performance.now();
  store.listeners.push((what) => {
    const began = performance.now();
    toolbar.update(what);
    for (const panel of panels) what === "cursor" ? panel.follow() : panel.update();
    if (what !== "cursor") Panel.settle(panels);
    footer.textContent = [`lightning-optkit ${store.about.version}`, ...(store.about.notes ?? [])].join(" · ");
    performance.measure(`optkit-${what}`, { start: began, end: performance.now() });
  });
  watchDark((dark) => {
    setDark(dark);
    store.tell("view");
  });
  document.addEventListener("keydown", (event) => {
    if (onKey(store, event)) {
      event.preventDefault();
      const values = document.activeElement?.closest(".plot")?.parentElement?.parentElement?.querySelector(".readout");
      setTimeout(() => (spoken.textContent = `${store.view.axis} ${format(store.cursor)} ${values?.textContent ?? ""}`.trim()), 50);
    }
  });
  await store.refresh();
  performance.measure("optkit-first-data", { start: opened, end: performance.now() });
  if (!source.isLive) return;
  document.documentElement.addEventListener("pointerenter", () => window.focus()); // for the keys
  for (;;) { // the next look begins when this one is over
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
    if (!document.hidden) await store.refresh();
  }
}

/** Runs as chips, and what holds for all panels. */
class Toolbar {
  /** @param {Store} store */
  constructor(store) {
    this.store = store;
    this.chips = element("div", { class: "chips", role: "group", "aria-label": "Runs; with Alt, one alone" });
    this.place = element("span", { class: "help" });
    const button = (/** @type {string} */ text, /** @type {string} */ title, /** @type {() => void} */ act) => {
      const made = element("button", { type: "button", title }, text);
      made.addEventListener("click", act);
      return made;
    };
    const { view } = store;
    this.axis = button("epochs", "Epochs in place of steps (e)", () => switchAxis(store));
    this.ridge = button("ridges", "Spectra as ridges in place of a heatmap (r)", () => store.look({ ridge: !store.view.ridge }));
    this.pin = button("pin", "Keep this point to compare with (p)", () => store.look({ pin: store.view.pin === null ? store.cursor : null }));
    this.reset = button("reset", "The cursor at the end, no pin, no zoom (Esc)", () => store.look({ at: null, pin: null, zoom: null }));
    this.bandwidth = element("input", { type: "range", min: "-1.6", max: "1.6", step: "0.1", value: String(Math.log2(view.bandwidth)), "aria-label": "Bandwidth of densities" });
    this.bandwidth.addEventListener("input", () => store.look({ bandwidth: 2 ** Number(this.bandwidth.value) }));
    this.root = element("header", {}, element("h1", {}, "Optkit"), this.chips, element("span", { class: "grow" }), this.place,
      this.axis, this.ridge, element("label", {}, "bandwidth", this.bandwidth), this.pin, this.reset);
  }

  /** @param {"data"|"view"|"cursor"} what */
  update(what) {
    const { store } = this;
    const { axis, ridge, pin } = store.view;
    const pinned = pin === null ? "" : `${format(pin)} → `;
    this.place.textContent = store.shown.length ? `${axis} ${pinned}${format(store.cursor)}` : "";
    this.pin.setAttribute("aria-pressed", String(pin !== null));
    this.pin.textContent = pin === null ? "pin" : "unpin";
    if (what === "cursor") return;
    this.axis.setAttribute("aria-pressed", String(axis === "epoch"));
    this.ridge.setAttribute("aria-pressed", String(ridge));
    const focused = /** @type {HTMLElement|null} */ (document.activeElement)?.dataset?.run;
    this.chips.replaceChildren(...store.runs.map((run) => this.chip(run)));
    for (const chip of this.chips.children) if (chip instanceof HTMLElement && chip.dataset.run === focused) chip.focus();
  }

  /** @param {import("./store.js").Run} run */
  chip(run) {
    const { store } = this;
    const circle = element("i");
    circle.style.background = colorOf(run);
    const chip = element("button", { type: "button", class: "chip", title: `${run.name} (with Alt: this one alone)`, "aria-pressed": String(store.isOn(run.name)) }, circle, element("span", {}, run.name));
    chip.dataset.run = run.name;
    chip.addEventListener("click", async (event) => {
      const others = store.runs.map(({ name }) => name).filter((name) => name !== run.name);
      const { off } = store.view;
      if (event.altKey) store.look({ off: others });
      else store.look({ off: store.isOn(run.name) ? [...off, run.name] : off.filter((name) => name !== run.name) });
      await store.refresh(); // what was off was not read
    });
    return chip;
  }
}

/**
 * The other axis, the cursor and the pin staying where they are in the first run.
 * @param {Store} store
 */
function switchAxis(store) {
  const { view, runs } = store;
  const to = view.axis === "step" ? "epoch" : "step";
  const run = store.shown[0] ?? runs[0];
  const moved = (/** @type {number|null} */ place) => {
    if (place === null || !run || run.epochs.length < 2) return null;
    if (to === "epoch") return epochOf(run, place);
    const steps = run.epochs.map(([step]) => step);
    return steps[nearest(run.epochs.map(([, epoch]) => epoch), place)];
  };
  store.look({ axis: to, at: moved(view.at), pin: moved(view.pin), zoom: null });
}

/**
 * @param {Store} store
 * @param {KeyboardEvent} event
 * @returns {boolean} whether the key was one of ours
 */
function onKey(store, event) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName)) return false;
  const jump = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (jump !== undefined) {
    const places = measuredPlaces(store);
    if (!places.length) return false;
    const i = nearest(places, store.cursor) + jump * (event.shiftKey ? 10 : 1);
    store.hover = null;
    store.look({ at: places[Math.min(Math.max(i, 0), places.length - 1)] });
    return true;
  }
  const acts = /** @type {Record<string, () => void>} */ ({
    p: () => store.look({ pin: store.view.pin === null ? store.cursor : null }),
    e: () => switchAxis(store),
    r: () => store.look({ ridge: !store.view.ridge }),
    Escape: () => store.look({ at: null, pin: null, zoom: null }),
  });
  acts[event.key]?.();
  return event.key in acts;
}

/** Where anything was measured, for the arrow keys: spectra, or what there is.
 * @param {Store} store */
function measuredPlaces(store) {
  const placesOf = (/** @type {string} */ topic) => store.shown.flatMap((run) =>
    [...(run.topics.get(topic)?.values() ?? [])].flatMap((names) =>
      [...names.values()].slice(0, 3).flatMap(({ steps }) => [...store.places(run, steps)])));
  const found = store.about.topics.map(({ name }) => placesOf(name)).find((places) => places.length);
  return [...new Set(found ?? [])].sort((a, b) => a - b);
}
