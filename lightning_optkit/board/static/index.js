/** Where the page begins: `render` in TensorBoard's frame, `renderReport` in a file. */

import { start } from "./app.js";
import { element } from "./panel.js";
import { embedded, tensorBoard } from "./source.js";

export function render() {
  document.head.append(element("link", { rel: "stylesheet", href: "./style.css" }));
  return start(tensorBoard());
}

export function renderReport() {
  return start(embedded());
}
