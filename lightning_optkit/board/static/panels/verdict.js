/** What is wrong, how sure that is, and what to do: worst first. */

import { Panel, dot, element } from "../panel.js";
import { colorOf, epochOf } from "../store.js";

const WORDS = /** @type {const} */ ({ critical: "Critical", warning: "Warning", info: "Note" });
const ORDER = ["critical", "warning", "info"];
const FEW = 6; // notes that are shown without being asked for, where nothing is wrong

export class Verdict extends Panel {
  /** @param {import("../store.js").Store} store */
  constructor(store) {
    super(store, {
      id: "verdict", title: "Verdict", size: "full", topic: "optkit-hessian",
      help: "What the measurements say about each run, the worst first, how sure that is, and what to do about it.",
    });
    this.hasPicture = false;
    /** @type {boolean|null} */
    this.isOpen = null; // the notes, once somebody has said so
  }

  /** Alerts of all runs, the worst first. */
  get alerts() {
    return this.store.shown
      .flatMap((run) => run.alerts.map((alert) => ({ run, alert })))
      .sort((a, b) => ORDER.indexOf(a.alert.severity) - ORDER.indexOf(b.alert.severity));
  }

  update() {
    const { store, alerts } = this;
    this.setEmpty(!store.shown.length);
    this.notes.replaceChildren(
      ...(store.error ? [element("p", { class: "note problem", role: "alert" }, store.error)] : []),
      ...store.runs.filter((run) => run.error).map((run) =>
        element("p", { class: "note problem" }, `${run.name} could not be read: ${run.error}`)),
      ...store.shown.filter((run) => store.view.axis === "epoch" && run.epochs.length < 2).map((run) =>
        element("p", { class: "note" }, `${run.name} has logged no two epochs: it is shown over steps alone.`)),
      ...store.shown.flatMap((run) => run.problems.filter(({ tag }) => !tag.startsWith("optkit-")).map(({ message }) =>
        element("p", { class: "note problem" }, `${run.name}: ${message}`))),
    );
    if (this.isEmpty) return;
    const wrong = alerts.filter(({ alert }) => alert.severity !== "info");
    const notes = alerts.filter(({ alert }) => alert.severity === "info");
    const summary = element("summary", {}, `Notes (${notes.length})`);
    const details = element("details", { class: "notes" }, summary, this.cards(notes));
    details.open = this.isOpen ?? (!wrong.length && notes.length <= FEW);
    summary.addEventListener("click", () => (this.isOpen = !details.open)); // before it opens
    this.body.replaceChildren(this.cards(wrong), ...(notes.length ? [details] : []));
  }

  /** @param {{run: import("../store.js").Run, alert: import("../source.js").Alert}[]} alerts */
  cards(alerts) {
    return element("ul", { class: "alerts" }, ...alerts.map((one) => this.card(one)));
  }

  /** @param {{run: import("../store.js").Run, alert: import("../source.js").Alert}} one */
  card({ run, alert }) {
    const word = WORDS[alert.severity] ?? "Note";
    const card = element(
      "li", { class: "alert" },
      element("b", {}, `${word}: ${alert.title}`),
      element("p", {}, dot(colorOf(run)), " ", element("small", {}, `${run.name} · ${alert.confidence}`)),
      element("p", {}, ...withCode(alert.evidence)),
      element("p", {}, ...withCode(alert.advice)),
    );
    card.style.setProperty("--tone", `var(--${alert.severity in WORDS ? alert.severity : "info"})`);
    const { step } = alert;
    if (step !== null) {
      const go = element("button", { type: "button" }, `go to step ${step.toLocaleString("en")}`);
      go.addEventListener("click", () => this.store.look({ at: this.store.view.axis === "step" ? step : epochOf(run, step) }));
      card.append(go);
    }
    return card;
  }

  table() {
    return [["run", "severity", "rule", "title", "confidence", "step", "evidence", "advice"],
      ...this.alerts.map(({ run, alert: a }) => [run.name, a.severity, a.rule, a.title, a.confidence, a.step, a.evidence, a.advice])];
  }
}

/**
 * What stands between backticks is code; all of it stays text.
 * @param {string} text
 */
function withCode(text) {
  return text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}
