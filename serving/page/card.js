// The model card for people: what the model knows, how good it is, where it is weak, where it comes from.

import { json, send, ServiceError } from "./api.js";
import { byId, make, percent, whole, withShare } from "./dom.js";

const SHOWN = 20; // classes: those with the lowest accuracy

/** @type {any} */
let card = {};

/** @returns {string[]} by index; empty until the card is loaded */
export const classNames = () => card.classes ?? [];

/** Loads the card unless it is loaded already, and draws what it has: a model that was never evaluated has no figures. */
export async function load() {
  if (card.classes) return;
  try {
    card = await json((await send("model")).body);
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    byId("about", HTMLElement).textContent = "What this model knows cannot be told at the moment.";
    return;
  }
  const figures = card.metrics?.[card.runtime];
  const accuracy = figures ? `, right on ${percent(figures.accuracy)} of ${whole(figures.images)} test pictures` : "";
  byId("about", HTMLElement).textContent = `${card.name} tells ${whole(card.classes.length)} classes apart${accuracy}.`;
  byId("card-body", HTMLElement).replaceChildren(
    ...(figures ? measured(figures) : [make("p", { className: "muted" }, "This model has not been evaluated yet.")]),
    origin(card),
  );
  byId("card", HTMLElement).hidden = false;
}

/** @param {any} figures of the runtime that answers */
function measured(figures) {
  const spoiled = harder(card.metrics);
  return [
    tiles(figures, card.metrics.foreign),
    byClass(Object.entries(figures.per_class)),
    ...(spoiled.length ? [bars("Accuracy on corrupted pictures and on photographs", spoiled)] : []),
    mistakes(figures.confusion),
  ];
}

/** @param {any} figures @param {any} foreign */
function tiles(figures, foreign) {
  const [low, high] = figures.accuracy_95;
  const set = figures.prediction_sets?.["0.99"];
  const shown = [
    ["Accuracy", percent(figures.accuracy), `${percent(low)} to ${percent(high)} with 95% confidence`],
    ["Calibration error", percent(figures.ece), `how far “90% sure” is from 90% right; ${percent(figures.ece_raw)} before calibration`],
    ...(set ? [["99% sets", percent(set.coverage), `hold the right class, with ${set.size.toFixed(2)} classes on average`]] : []),
    ...(foreign ? [["False alarms", percent(foreign.told_wrongly), "of ordinary pictures are called unlike the training pictures"]] : []),
  ];
  return make("dl", { className: "tiles" },
    ...shown.map(([name, value, note]) => make("div", {}, make("dt", {}, String(name)),
      make("dd", { className: "figures" }, String(value)), make("dd", { className: "muted" }, String(note)))));
}

/** @param {[string, number][]} shares of all classes, of which a thousand would be no use to anyone */
function byClass(shares) {
  if (shares.length <= SHOWN) return bars("Accuracy by class", shares);
  const lowest = shares.toSorted(([, a], [, b]) => a - b).slice(0, SHOWN);
  return bars(`Accuracy by class: the lowest ${SHOWN} of ${whole(shares.length)}`, lowest);
}

/** @param {string} title @param {[string, number][]} shares */
function bars(title, shares) {
  const lines = shares.map(([name, share]) =>
    make("li", {}, make("span", {}, name), withShare(make("span", { className: "bar" }), share),
      make("span", { className: "figures" }, percent(share))));
  return make("div", {}, make("h3", {}, title), make("ul", { className: "bars two" }, ...lines));
}

/** @param {any} metrics @returns {[string, number][]} accuracy on corrupted images and on photographs */
function harder({ robustness, photographs }) {
  /** @type {[string, number][]} */
  const families = Object.entries(robustness?.families ?? {}).map(([family, { accuracy }]) => [family, accuracy]);
  return photographs ? [...families, ["photographs", photographs.accuracy]] : families;
}

/** @param {number[][]} matrix rows are the true classes */
function mistakes(matrix) {
  const names = classNames();
  const chips = matrix
    .flatMap((row, truth) => {
      const total = row.reduce((a, b) => a + b, 0);
      return row.flatMap((count, taken) => (count && truth !== taken ? [{ truth, taken, share: count / total }] : []));
    })
    .sort((a, b) => b.share - a.share)
    .slice(0, 6)
    .map(({ truth, taken, share }) => make("li", { className: "figures" }, `${names[truth]}, taken for ${names[taken]}: ${percent(share)}`));
  return make("div", {}, make("h3", {}, "Most frequent mistakes"), make("ul", { className: "chips" }, ...chips));
}

/** @param {any} training its record, by train.fit or train.convert @returns {[string, unknown][]} */
function trained({ images, source, recipe, device, network }) {
  return network
    ? [["Trained", `elsewhere, as ${network}`], ["Calibrated on", `${whole(images.val)} pictures of ${source}`]]
    : [["Trained on", `${whole(images.train)} pictures of ${source}, ${recipe.epochs} epochs, on ${device}`]];
}

/** @param {any} shown */
function origin({ members, name, version, input_size: [height, width], runtime, topology, training, git_commit: commit }) {
  const models = (members ?? [{ name, version }]).map((/** @type {any} */ one) => `${one.name}:${one.version}`);
  /** @type {[string, unknown][]} */
  const facts = [
    [models.length > 1 ? "Models, together" : "Model", models.join(", ")],
    ["Runs on", `${runtime}, ${topology}`],
    ["Looks at", `${width} × ${height} pixels`],
    ["Parameters", training && whole(training.parameters)],
    ...(training ? trained(training) : []),
    ["Code", commit],
    ["Data, SHA-256", training?.data_sha256],
  ];
  const known = facts.filter(([, value]) => value);
  return make("div", {}, make("h3", {}, "Where it comes from"),
    make("dl", { className: "facts" }, ...known.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, String(value))])));
}
