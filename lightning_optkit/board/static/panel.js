/** A card of the page: title, tools, a body, and what to write where there is nothing to show. */

import { colorOf } from "./store.js";
import { colors } from "./theme.js";

/** @typedef {import("./store.js").Store} Store */

/**
 * @typedef {object} PanelSpec
 * @property {string} id
 * @property {string} title
 * @property {string} help what one sees, in a sentence
 * @property {string} topic whose callback fills it
 * @property {"wide"|"full"|""} [size]
 */

/** @typedef {(string|number|null)[]} Row */

const MOST_READ = 8; // values at the cursor: more would be a wall of numbers

/**
 * Text only: nothing that a user named is ever read as markup.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Partial<Record<string, string>>} [attributes]
 * @param {...(Node|string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** @param {string} color */
export function dot(color) {
  const made = element("i", { class: "dot", "aria-hidden": "true" });
  made.style.background = color;
  return made;
}

export class Panel {
  /**
   * @param {Store} store
   * @param {PanelSpec} spec
   */
  constructor(store, spec) {
    this.store = store;
    this.spec = spec;
    this.tools = element("div", { class: "tools" });
    this.body = element("div", { class: "body" });
    this.readout = element("div", { class: "readout" });
    this.notes = element("div");
    this.root = element(
      "section",
      { id: spec.id, class: spec.size ?? "", "aria-label": spec.title },
      element("div", { class: "head" }, element("h2", {}, spec.title), this.tools),
      element("p", { class: "help" }, spec.help),
      this.body, this.readout, this.notes,
    );
    /** @type {boolean|null} */
    this.isEmpty = null;
    this.hasPicture = true;
    this.isSeen = true;
    this.isBehind = false; // the cursor has moved while nobody could see it
    new IntersectionObserver(([entry]) => {
      this.isSeen = entry.isIntersecting;
      if (this.isSeen && this.isBehind) this.follow();
    }).observe(this.root);
  }

  /** Draws anew; a subclass says how. */
  update() {}

  /** Draws what follows the cursor; a subclass says how. */
  cursor() {}

  /** Follows the cursor, once the panel is in sight: most panels of a page are not. */
  follow() {
    this.isBehind = !this.isSeen;
    if (this.isSeen) this.cursor();
  }

  /**
   * Keeps the height that readings have now while the cursor moves: numbers of other lengths would
   * move everything below them, and drawing all that anew takes longer than a frame.
   * @param {Panel[]} panels
   */
  static settle(panels) {
    for (const { readout } of panels) readout.style.height = readout.style.contain = "";
    const heights = panels.map(({ readout }) => readout.scrollHeight);
    panels.forEach(({ readout }, i) => {
      if (heights[i]) Object.assign(readout.style, { height: `${heights[i]}px`, contain: "strict" });
    });
  }

  /** What is drawn as a table: a row of headings first.
   * @returns {Row[]} */
  table() {
    return [];
  }

  /**
   * Shows the body, or the two lines of code that fill it.
   * @param {boolean} isEmpty
   */
  setEmpty(isEmpty) {
    if (isEmpty === this.isEmpty && this.store.about.topics.length) return;
    this.isEmpty = isEmpty;
    this.root.classList.toggle("empty", isEmpty);
    this.body.replaceChildren();
    this.readout.replaceChildren();
    this.tools.replaceChildren();
    if (isEmpty) {
      const topic = this.store.about.topics.find(({ name }) => name === this.spec.topic);
      this.body.append("Nothing logged yet. Two lines fill this panel:", element("pre", {}, (topic?.example ?? []).join("\n")));
    } else {
      this.build();
      this.addExports();
    }
  }

  /** Makes what `update` draws upon; called again after the panel was empty. */
  build() {}

  addExports() {
    const csv = element("button", { type: "button", title: "The numbers drawn, as a table" }, "CSV");
    csv.addEventListener("click", () => download(`${this.spec.id}.csv`, new Blob([csvText(this.table())], { type: "text/csv" })));
    this.tools.append(csv);
    if (!this.hasPicture) return;
    const png = element("button", { type: "button", title: "The picture as it is" }, "PNG");
    png.addEventListener("click", () => this.picture().toBlob((blob) => blob && download(`${this.spec.id}.png`, blob)));
    this.tools.append(png);
  }

  /** All canvases of the panel, one below another, under their titles. */
  picture() {
    const plots = [...this.body.querySelectorAll(".plot")].map((plot) => /** @type {HTMLElement} */ (plot));
    const width = Math.max(...plots.map((plot) => plot.clientWidth));
    const heights = plots.map((plot) => plot.clientHeight + 22);
    const canvas = document.createElement("canvas");
    const ratio = 2;
    canvas.width = (width + 24) * ratio;
    canvas.height = (heights.reduce((a, b) => a + b, 0) + 44) * ratio;
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.scale(ratio, ratio);
    context.fillStyle = colors.panel;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = colors.ink;
    context.font = "600 13px system-ui, sans-serif";
    context.fillText(this.spec.title, 12, 22);
    context.font = "12px system-ui, sans-serif";
    let y = 36;
    plots.forEach((plot, i) => {
      context.fillText(plot.previousElementSibling?.textContent ?? "", 12, y + 10);
      for (const layer of plot.querySelectorAll("canvas")) context.drawImage(layer, 12, y + 16, plot.clientWidth, plot.clientHeight);
      y += heights[i];
    });
    return canvas;
  }

  /**
   * A choice that the page's address keeps.
   * @param {string} label
   * @param {Record<string, string>} choices by what is stored
   * @param {string} fallback
   * @param {string} [key]
   */
  choice(label, choices, fallback, key = this.spec.id) {
    const select = element("select", { "aria-label": label });
    for (const [value, text] of Object.entries(choices)) select.append(element("option", { value }, text));
    select.value = this.picked(fallback, key, choices);
    select.addEventListener("change", () => this.store.look({ picks: { ...this.store.view.picks, [key]: select.value } }));
    this.tools.prepend(select);
    return select;
  }

  /**
   * @param {string} fallback
   * @param {string} [key]
   * @param {Record<string, unknown>} [choices]
   */
  picked(fallback, key = this.spec.id, choices) {
    const value = this.store.view.picks[key] ?? fallback;
    return choices && !(value in choices) ? fallback : value;
  }

  /** What went wrong with the data of this topic, and notes of how it is shown.
   * @param {...string} notes */
  note(...notes) {
    const problems = this.store.shown.flatMap((run) =>
      run.problems.filter(({ tag }) => tag.split("/")[0].startsWith(this.spec.topic))
        .map(({ tag, step, message }) => `${run.name}: ${tag}${step === null ? "" : ` at step ${step}`}: ${message}`));
    this.notes.replaceChildren(
      ...problems.slice(0, 5).map((text) => element("p", { class: "note problem" }, text)),
      ...notes.map((text) => element("p", { class: "note" }, text)),
    );
  }

  /**
   * Shows what is at the cursor.
   * @template {{run: import("./store.js").Run}} T
   * @param {T[]} all
   * @param {(one: T) => string} textOf asked for those alone that are shown
   * @returns {string} the same as one text
   */
  read(all, textOf) {
    const texts = all.slice(0, MOST_READ).map(textOf);
    const shown = all.length > MOST_READ ? [...texts, `and ${all.length - MOST_READ} more`] : texts;
    const spans = this.readout.children;
    if (spans.length !== shown.length) this.readout.replaceChildren(...shown.map(() => element("span", {}, dot(""), element("b"))));
    shown.forEach((text, i) => { // new elements at each move of the cursor cost more than all drawing
      const [circle, said] = /** @type {Iterable<HTMLElement>} */ (spans[i].children);
      const color = i < texts.length ? colorOf(all[i].run) : "transparent";
      if (circle.dataset.color !== color) circle.style.background = circle.dataset.color = color;
      if (said.textContent !== text) said.textContent = text;
    });
    return texts.join("; ");
  }
}

/**
 * A cell that a spreadsheet would run as a formula begins with a quote.
 * @param {Row[]} rows
 */
export function csvText(rows) {
  const cell = (/** @type {string|number|null} */ value) => {
    if (typeof value !== "string") return value === null || Number.isNaN(value) ? "" : String(value);
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return `${rows.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}

/**
 * @param {string} name
 * @param {Blob} blob
 */
function download(name, blob) {
  const address = URL.createObjectURL(blob);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
