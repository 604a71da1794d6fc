/** Where runs come from: TensorBoard's server, or the file that the page is. */

/**
 * @typedef {{name: string, unit: string, meaning: string}} Tag
 * @typedef {{name: string, callbacks: string[], scalars: Tag[], example: string[]}} Topic
 * @typedef {{version: string, topics: Topic[], notes?: string[]}} About
 * @typedef {{severity: "critical"|"warning"|"info", rule: string, title: string, evidence: string,
 *   advice: string, confidence: string, step: number|null, tags: string[]}} Alert
 * @typedef {{name: string, index: number, stamp: string}} Listed
 * @typedef {object} Source
 * @property {boolean} isLive whether more may come
 * @property {() => Promise<About>} about
 * @property {() => Promise<Listed[]>} runs
 * @property {(run: string) => Promise<ArrayBuffer>} scalars
 * @property {(run: string, tag: string) => Promise<ArrayBuffer>} array
 * @property {(run: string) => Promise<Alert[]>} alerts
 */

/**
 * Relative addresses alone: then `--path_prefix` and a proxy need nothing.
 * @param {string} route
 * @param {Record<string, string>} [query]
 */
async function get(route, query = {}) {
  const response = await fetch(`./${route}?${new URLSearchParams(query)}`);
  if (!response.ok) {
    const text = (await response.text()).slice(0, 300);
    throw new Error(text || `The server answered ${response.status}.`);
  }
  return response;
}

/** @returns {Source} */
export function tensorBoard() {
  return {
    isLive: true,
    about: async () => (await get("about")).json(),
    runs: async () => (await get("runs")).json(),
    scalars: async (run) => (await get("scalars", { run })).arrayBuffer(),
    array: async (run, tag) => (await get("array", { run, tag })).arrayBuffer(),
    alerts: async (run) => (await get("alerts", { run })).json(),
  };
}

/**
 * Base64 of what zlib packed, as `board/page.py` writes it.
 * @param {string} text
 */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** @returns {Source} */
export function embedded() {
  const text = document.getElementById("optkit-data")?.textContent ?? "{}";
  /** @type {{about: About, runs: {name: string, payload: string, alerts: Alert[]}[]}} */
  const data = JSON.parse(text);
  const find = (/** @type {string} */ name) => {
    const found = data.runs.find((run) => run.name === name);
    if (!found) throw new Error(`No run ${name} in this report.`);
    return found;
  };
  return {
    isLive: false,
    about: async () => data.about,
    runs: async () => data.runs.map(({ name }, index) => ({ name, index, stamp: "" })),
    scalars: async (run) => unpacked(find(run).payload),
    array: async (run) => unpacked(find(run).payload),
    alerts: async (run) => find(run).alerts,
  };
}
