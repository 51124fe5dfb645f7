// Many pictures: sent in portions, a table that can be sorted, a CSV file.

import { isReadable, json, send, ServiceError } from "./api.js";
import { classNames } from "./card.js";
import { announce, byId, make, percent, whole } from "./dom.js";
import { inWords } from "./errors.js";
import { level } from "./single.js";

const PORTION = 16; // pictures of one request
const PORTION_BYTES = 8 * 2 ** 20;
/** Errors that the next portion would meet as well. */
const FINAL = new Set(["unauthorized", "forbidden", "quota_exceeded", "unreachable"]);

/**
 * @typedef {object} Row
 * @property {File} file
 * @property {string} picture URL
 * @property {HTMLTableRowElement} element
 * @property {any} [result] the service's, of this picture
 * @property {{code: string, message: string, request_id: string}} [error] in its place
 * @property {boolean} [again] whether another attempt may help
 */

/** @type {Row[]} */
let rows = [];
let controller = new AbortController();
/** @type {{column: number, descending: boolean} | null} */
let order = null;
let asked = "0.95";
/** @type {(file: File) => void} */
let open = () => {};

/** What a cell shows, and what its column sorts by; nothing sorts last. */
const COLUMNS = [
  { name: "File", value: (/** @type {Row} */ row) => row.file.name },
  { name: "Class", value: (/** @type {Row} */ row) => row.result?.class_name },
  { name: "Confidence", value: (/** @type {Row} */ row) => row.result?.confidence },
  { name: "Familiar", wide: true, value: (/** @type {Row} */ row) => row.result && (row.result.in_distribution ? "yes" : "no") },
  { name: "Set", wide: true, value: (/** @type {Row} */ row) => row.result?.prediction_set.length },
];

/** @param {(file: File) => void} opened told which picture of the table to look at */
export function prepare(opened) {
  open = opened;
  byId("stop", HTMLButtonElement).onclick = () => controller.abort();
  byId("retry", HTMLButtonElement).onclick = resume;
  byId("csv", HTMLButtonElement).onclick = download;
}

/** @param {File[]} files */
export async function start(files) {
  controller.abort();
  for (const row of rows) URL.revokeObjectURL(row.picture);
  asked = level();
  order = null;
  rows = files.map((file) => ({ file, picture: URL.createObjectURL(file), element: make("tr"), again: true }));
  rows.forEach(drawRow);
  drawHead();
  drawBody();
  byId("batch", HTMLElement).hidden = false;
  byId("batch", HTMLElement).scrollIntoView({ block: "nearest" });
  await resume();
}

/** Asks for every row that has no answer and may get one. */
export async function resume() {
  controller = new AbortController();
  const { signal } = controller;
  drawProgress(true);
  try {
    for (const portion of portions(rows.filter((row) => row.again))) {
      await classify(await readable(portion), signal);
      if (signal.aborted) return;
      drawBody();
      drawProgress(true);
    }
  } catch (error) {
    if (!(error instanceof ServiceError) && !signal.aborted) throw error;
  } finally {
    if (controller.signal === signal) {
      drawProgress(false);
      announce(byId("batch-summary", HTMLElement).textContent ?? "");
    }
  }
}

/** @param {Row[]} some @returns {Generator<Row[]>} */
function* portions(some) {
  /** @type {Row[]} */
  let portion = [];
  let bytes = 0;
  for (const row of some) {
    if (portion.length && (portion.length === PORTION || bytes + row.file.size > PORTION_BYTES)) {
      yield portion;
      [portion, bytes] = [[], 0];
    }
    portion.push(row);
    bytes += row.file.size;
  }
  if (portion.length) yield portion;
}

/** Those that can be read; the others are told now. @param {Row[]} portion */
async function readable(portion) {
  const can = await Promise.all(portion.map(({ file }) => isReadable(file)));
  return portion.filter((row, i) => {
    if (!can[i]) settle(row, { error: { code: "unreadable", message: "the browser could not read it", request_id: "" } });
    return can[i];
  });
}

/** @param {Row[]} portion @param {AbortSignal} signal @returns {Promise<void>} */
async function classify(portion, signal) {
  if (!portion.length) return;
  const form = new FormData();
  for (const { file } of portion) form.append("images", file, "image");
  try {
    const { body } = await send(`classify/batch?prediction_set=${asked}`, { form, signal, onWait: wait });
    const { results } = await json(body);
    portion.forEach((row, i) => settle(row, results[i].error ? { error: results[i].error } : { result: results[i] }));
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    if (error.code === "too_large" && portion.length > 1) {
      // The service may take less at once than this page sends.
      const half = Math.ceil(portion.length / 2);
      await classify(portion.slice(0, half), signal);
      return classify(portion.slice(half), signal);
    }
    const said = { code: error.code, message: error.message, request_id: error.requestId };
    portion.forEach((row) => settle(row, { error: said, again: error.code !== "too_large" }));
    if (FINAL.has(error.code)) throw error;
  }
}

/** @param {Row} row @param {Partial<Row>} outcome */
function settle(row, outcome) {
  Object.assign(row, { result: undefined, error: undefined, again: false }, outcome);
  drawRow(row);
}

/** @param {number} seconds @param {ServiceError} error */
function wait(seconds, error) {
  byId("batch-summary", HTMLElement).textContent = `${inWords(error.code)[0]}: next attempt in ${seconds} s`;
}

/** @param {boolean} running */
function drawProgress(running) {
  const done = rows.filter((row) => row.result).length;
  const failed = rows.filter((row) => row.error).length;
  const bar = byId("progress", HTMLProgressElement);
  bar.max = rows.length;
  bar.value = done + failed;
  bar.hidden = !running;
  byId("stop", HTMLButtonElement).hidden = !running;
  byId("retry", HTMLButtonElement).hidden = running || !rows.some((row) => row.again);
  byId("batch-summary", HTMLElement).textContent =
    `${whole(done)} of ${whole(rows.length)} classified${failed ? `, ${whole(failed)} failed` : ""}`;
}

function drawHead() {
  const heads = COLUMNS.map(({ name, wide }, column) => {
    const label = name === "Set" ? `${Number(asked) * 100}% set` : name;
    const sorting = order?.column === column ? (order.descending ? "descending" : "ascending") : "none";
    const button = make("button", { className: "sort", onclick: () => sortBy(column) }, label);
    return make("th", { scope: "col", ariaSort: sorting, className: wide ? "wide" : "" }, button);
  });
  byId("columns", HTMLElement).replaceChildren(make("td"), ...heads);
}

/** @param {number} column */
function sortBy(column) {
  order = { column, descending: order?.column === column && !order.descending };
  drawHead();
  drawBody();
  /** @type {HTMLElement | null | undefined} */ (byId("columns", HTMLElement).children[column + 1]?.querySelector("button"))?.focus();
  announce(`Sorted by ${COLUMNS[column]?.name}, ${order.descending ? "descending" : "ascending"}`);
}

/** @returns {Row[]} in the order of the table */
function sorted() {
  const column = order && COLUMNS[order.column];
  if (!column) return rows;
  const sign = order?.descending ? -1 : 1;
  return rows.toSorted((one, other) => {
    const [a, b] = [column.value(one), column.value(other)];
    if (a === undefined || b === undefined) return Number(a === undefined) - Number(b === undefined);
    return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  });
}

function drawBody() {
  byId("rows", HTMLElement).replaceChildren(...sorted().map((row) => row.element));
}

/** @param {Row} row */
function drawRow({ file, picture, element, result, error }) {
  const image = make("img", { src: picture, alt: "", width: 40, height: 40, loading: "lazy", decoding: "async" });
  image.onerror = () => image.removeAttribute("src");
  const name = make("button", { className: "link", title: file.name, onclick: () => open(file) }, file.name);
  const outcome = error ? `${inWords(error.code)[0]} (${error.code})` : "…";
  const narrow = result
    ? [make("td", {}, result.class_name), make("td", {}, percent(result.confidence))]
    : [make("td", { colSpan: 2 }, outcome)];
  const wide = result ? [result.in_distribution ? "yes" : "no", result.prediction_set.join(", ")] : ["", ""];
  element.className = error ? "failed" : "";
  element.dataset.familiar = result?.in_distribution ?? "";
  element.title = error ? `${error.message}; request ${error.request_id}` : "";
  element.replaceChildren(
    make("td", {}, image),
    make("th", { scope: "row" }, name),
    ...narrow,
    ...wide.map((cell) => make("td", { className: "wide" }, cell)),
  );
}

function download() {
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  make("a", { href: url, download: "classified.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may still be reading it
}

/** @returns {string} RFC 4180 */
function csv() {
  const head = ["file", "class_name", "confidence", "in_distribution", "prediction_set", "error_code", "error_message", "request_id", "model"];
  const lines = sorted().map(({ file, result, error }) => [
    // A spreadsheet would run a name that begins like this as a formula.
    file.name.replace(/^(?=[=+\-@\t\r])/, "'"),
    result?.class_name, result?.confidence, result?.in_distribution, result?.prediction_set.join(" "),
    error?.code, error?.message, (result ?? error)?.request_id, result?.model,
    ...classNames().map((_, index) => result?.all_probabilities[index]),
  ]);
  return [[...head, ...classNames().map((name) => `probability ${name}`)], ...lines]
    .map((line) => line.map((field) => `"${String(field ?? "").replaceAll('"', '""')}"`).join(",") + "\r\n")
    .join("");
}
