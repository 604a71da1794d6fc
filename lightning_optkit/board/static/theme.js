/** Colours, by day and by night. `style.css` has the rest of the looks. */

/** Those of TensorBoard's Scalars tab, in its order: told apart by colour-blind readers too. */
const RUN_COLORS = ["#ff7043", "#0077bb", "#cc3311", "#33bbee", "#ee3377", "#009988", "#bbbbbb"];

const LIGHT = {
  page: "#f5f6f7", panel: "#ffffff", ink: "#1f2328", muted: "#59636e", grid: "#e4e7eb",
  line: "#d0d7de", accent: "#3b2fb5", focus: "#0969da", shade: "rgba(31,35,40,.06)",
  critical: "#c62828", warning: "#9a6700", info: "#1a7f37",
};
const DARK = {
  page: "#1b1d20", panel: "#26292d", ink: "#e6e9ec", muted: "#a3abb5", grid: "#373b41",
  line: "#454b52", accent: "#c3b8ff", focus: "#6cb2ff", shade: "rgba(230,233,236,.08)",
  critical: "#ff8a80", warning: "#f0c05a", info: "#7bd88f",
};

/** The colours of now: one object, whose values change. */
export const colors = { ...LIGHT };
/** @param {boolean} dark */
export function setDark(dark) {
  Object.assign(colors, dark ? DARK : LIGHT);
  for (const [name, value] of Object.entries(colors)) {
    document.documentElement.style.setProperty(`--${name}`, value);
  }
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
}

/** @param {number} index of the run, as TensorBoard lists it */
export function runColor(index) {
  return RUN_COLORS[index % RUN_COLORS.length];
}

/**
 * Tells whether it is dark, now and whenever that changes: TensorBoard marks its own page, of which
 * the tab is a frame; a report follows the system.
 * @param {(dark: boolean) => void} tell
 */
export function watchDark(tell) {
  const outside = window.parent !== window && window.frameElement ? window.parent.document.body : null;
  if (outside) { // of one origin with us: else there is no frame element
    const look = () => tell(outside.classList.contains("dark-mode"));
    new MutationObserver(look).observe(outside, { attributes: true, attributeFilter: ["class"] });
    look();
    return;
  }
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", () => tell(system.matches));
  window.addEventListener("beforeprint", () => tell(false));
  window.addEventListener("afterprint", () => tell(system.matches));
  tell(system.matches);
}

/** Viridis at ten places: even steps in lightness, whoever looks. */
const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];

/**
 * @param {number} share from 0 to 1
 * @returns {[number, number, number]} red, green, blue
 */
export function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mix = (/** @type {number} */ k) => VIRIDIS[i][k] + (place - i) * (VIRIDIS[i + 1][k] - VIRIDIS[i][k]);
  return [mix(0), mix(1), mix(2)];
}
