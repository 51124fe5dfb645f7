// A single picture: what it shows, how certain that is, and why.

import { hasKey, json, send, ServiceError } from "./api.js";
import { classNames, load } from "./card.js";
import { announce, byId, duration, make, percent, whole, withShare } from "./dom.js";
import { explainError, inWords } from "./errors.js";

const SHOWN = 10; // classes; more on request
const PIXEL_ART = 128; // pixels; smaller pictures are enlarged with sharp pixels instead of a blur

const answer = byId("answer", HTMLElement);
const preview = byId("preview", HTMLImageElement);
const overlay = byId("overlay", HTMLImageElement);
const evidence = byId("explain", HTMLButtonElement);

/** @type {File | null} */
let picture = null;
let controller = new AbortController();
let explaining = new AbortController();

/** @returns {string} the level of the prediction set */
export const level = () => new FormData(byId("level", HTMLFormElement)).get("level")?.toString() ?? "0.95";

/** @param {File} file */
export async function show(file) {
  picture = file;
  drawPicture(file);
  await classify();
}

/** Classifies the current picture, again if something about the request has changed. */
export async function classify() {
  if (!picture) return;
  controller.abort();
  controller = new AbortController();
  const { signal } = controller;
  answer.ariaBusy = "true";
  try {
    const path = `classify?prediction_set=${level()}`;
    const [reply] = await Promise.all([send(path, { form: formOf(picture), signal, onWait: wait }), load()]);
    const said = await json(reply.body);
    if (!signal.aborted) drawAnswer(said, reply, path);
  } catch (error) {
    if (!signal.aborted) refuse(error, classify);
  }
  if (!signal.aborted) answer.ariaBusy = "false";
}

/** @param {unknown} error @param {(() => void) | null} again offered to the visitor */
export function refuse(error, again = null) {
  if (!(error instanceof ServiceError)) throw error;
  byId("problem", HTMLElement).replaceChildren(explainError(error, again));
  reveal("problem");
  evidence.hidden = true;
}

/** @param {"problem" | "verdict"} id the state of the answer to show, hiding the others */
function reveal(id) {
  for (const state of ["empty", "problem", "verdict"]) byId(state, HTMLElement).hidden = state !== id;
}

/** @param {number} seconds @param {ServiceError} error */
function wait(seconds, error) {
  const text = `${inWords(error.code)[0]}: next attempt in ${seconds} s`;
  byId("problem", HTMLElement).replaceChildren(make("p", { className: "waiting" }, text));
  reveal("problem");
}

/** @param {File} file */
function formOf(file) {
  const form = new FormData();
  form.append("image", file, "image"); // withholds the file's name
  return form;
}

/** @param {File} file */
function drawPicture(file) {
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = `Your picture, ${file.name}`;
  preview.hidden = false;
  hideEvidence();
  byId("prompt", HTMLElement).hidden = true;
  byId("figure", HTMLElement).hidden = false;
  byId("caption", HTMLElement).textContent = file.name;
}

preview.addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = preview;
  preview.classList.toggle("pixels", Math.max(width, height) < PIXEL_ART);
  byId("caption", HTMLElement).textContent = `${picture?.name}, ${whole(width)} × ${whole(height)} pixels`;
});
preview.addEventListener("error", () => {
  preview.hidden = true;
  byId("caption", HTMLElement).textContent = `${picture?.name}: this browser cannot show it`;
});

function hideEvidence() {
  explaining.abort();
  URL.revokeObjectURL(overlay.src);
  overlay.hidden = true;
  overlay.removeAttribute("src");
  evidence.ariaPressed = evidence.ariaBusy = "false";
}

evidence.addEventListener("click", async () => {
  if (evidence.ariaPressed === "true") {
    hideEvidence();
    return reveal("verdict"); // it may be hidden by a notice to wait
  }
  if (!picture) return;
  explaining = new AbortController();
  const { signal } = explaining;
  evidence.ariaPressed = evidence.ariaBusy = "true";
  try {
    const { body } = await send("explain", { form: formOf(picture), signal, onWait: wait });
    if (signal.aborted) return;
    reveal("verdict");
    overlay.src = URL.createObjectURL(body);
    overlay.alt = `Where the evidence for ${byId("class-name", HTMLElement).textContent} lies: the bright areas`;
    overlay.hidden = false;
    evidence.ariaBusy = "false";
    announce("The evidence is shown over the picture; bright areas count most.");
  } catch (error) {
    if (signal.aborted) return;
    hideEvidence();
    refuse(error, classify);
  }
});

/**
 * @param {any} said @param {{timing: Map<string, number>, roundTrip: number}} reply @param {string} path
 */
function drawAnswer(said, reply, path) {
  const sure = percent(said.confidence);
  byId("class-name", HTMLElement).textContent = said.class_name;
  byId("confidence", HTMLElement).textContent = sure;
  const familiar = byId("familiar", HTMLElement);
  familiar.textContent = said.in_distribution
    ? "Resembles the training pictures"
    : "Unlike the training pictures: do not rely on this answer";
  familiar.dataset.familiar = said.in_distribution;
  drawBars(said.all_probabilities);
  const chips = said.prediction_set.map((/** @type {string} */ name) => make("li", {}, name));
  byId("set", HTMLElement).replaceChildren(...(chips.length ? chips : [make("li", {}, "no class is likely enough")]));
  drawTiming(reply);
  byId("curl", HTMLElement).textContent = curl(path);
  byId("raw", HTMLElement).textContent = JSON.stringify(said, null, 2);
  reveal("verdict");
  evidence.hidden = false;
  byId("headline", HTMLElement).scrollIntoView({ block: "nearest" });
  announce(`${said.class_name}, ${sure}. ${familiar.textContent}.`);
}

/** @param {Record<string, number>} probabilities by class index */
function drawBars(probabilities) {
  const names = classNames();
  const sorted = Object.entries(probabilities).sort(([, a], [, b]) => b - a);
  const bars = sorted.map(([index, share], rank) => {
    const bar = withShare(make("span", { className: "bar" }), share);
    return make("li", { hidden: rank >= SHOWN }, make("span", {}, names[Number(index)] ?? `class ${index}`), bar,
      make("span", { className: "figures" }, percent(share)));
  });
  byId("bars", HTMLElement).replaceChildren(...bars);
  const more = byId("more", HTMLButtonElement);
  more.hidden = bars.length <= SHOWN;
  more.textContent = `Show all ${bars.length} classes`;
  more.onclick = () => {
    for (const bar of bars) bar.hidden = false;
    more.hidden = true;
  };
}

/** @param {{timing: Map<string, number>, roundTrip: number}} reply */
function drawTiming({ timing, roundTrip }) {
  byId("round-trip", HTMLElement).textContent = duration(roundTrip);
  const inside = timing.get("total") ?? 0;
  const stages = [
    ["Network and browser", roundTrip - inside],
    ["Receive", timing.get("read")],
    ["Decode", timing.get("decode")],
    ["Queue and model", timing.get("classify")],
    ["Reply", timing.get("reply")],
  ].flatMap(([name, ms]) => (inside && typeof ms === "number" ? [{ name: String(name), ms }] : []));
  byId("stack", HTMLElement).replaceChildren(...stages.map(({ ms }) => withShare(make("span"), ms / roundTrip)));
  byId("stages", HTMLElement).replaceChildren(
    ...stages.map(({ name, ms }) => make("div", {}, make("dt", {}, name), make("dd", { className: "figures" }, duration(ms)))),
  );
}

/** @param {string} path */
function curl(path) {
  // Quoted for curl, which would split a name at commas and semicolons, and quoted again for the shell.
  const form = `image=@"${picture?.name.replace(/[\\"]/g, "\\$&")}"`.replaceAll("'", "'\\''");
  const key = hasKey() ? '-H "Authorization: Bearer $API_KEY" ' : "";
  return `curl ${key}-F '${form}' '${new URL(path, location.href)}'`;
}
