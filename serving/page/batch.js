// Many pictures: sent in portions, shown in a sortable table, downloadable as CSV.

import { json, LONGEST_WAIT, send, ServiceError } from "./api.js";
import { classNames } from "./card.js";
import { announce, byId, make, percent, whole } from "./dom.js";
import { inWords } from "./errors.js";
import { level } from "./single.js";

const PORTION = 16; // pictures per request
const PORTION_BYTES = 8 * 2 ** 20;
const SHOWN = 200; // rows; more on request, because the browser lays out the whole table again for every answer
const COLLATOR = new Intl.Collator("en", { numeric: true });
/** Errors that the next portion would get as well. */
const FINAL = new Set(["unauthorized", "forbidden", "quota_exceeded", "unreachable"]);
/** Errors that a smaller portion may avoid, and that the same file would get again. */
const OF_A_FILE = new Set(["too_large", "unreadable"]);

/**
 * @typedef {object} Row
 * @property {File} file
 * @property {string} [picture] URL, once the row is shown
 * @property {HTMLTableRowElement} element
 * @property {any} [result] the service's result for this picture
 * @property {{code: string, message: string, request_id: string}} [error] set in place of a result
 * @property {boolean} [again] whether another attempt may help
 */

/** @type {Row[]} */
let rows = [];
let shown = SHOWN;
let controller = new AbortController();
/** @type {{column: number, descending: boolean} | null} */
let order = null;
let asked = "0.95";
/** @type {(file: File) => void} */
let open = () => {};

/** Each column's heading and sort key; rows without a value sort last. */
const COLUMNS = [
  { name: "File", value: (/** @type {Row} */ row) => row.file.name },
  { name: "Class", value: (/** @type {Row} */ row) => row.result?.class_name },
  { name: "Confidence", value: (/** @type {Row} */ row) => row.result?.confidence },
  { name: "Familiar", wide: true, value: (/** @type {Row} */ row) => row.result && (row.result.in_distribution ? "yes" : "no") },
  { name: "Set", wide: true, value: (/** @type {Row} */ row) => row.result?.prediction_set.length },
];

/** @param {(file: File) => void} opened called with the picture that was clicked in the table */
export function prepare(opened) {
  open = opened;
  byId("stop", HTMLButtonElement).onclick = () => controller.abort();
  byId("retry", HTMLButtonElement).onclick = resume;
  byId("csv", HTMLButtonElement).onclick = download;
  byId("rest", HTMLButtonElement).onclick = () => {
    shown += SHOWN;
    drawBody();
  };
}

/** @param {File[]} files */
export async function start(files) {
  controller.abort();
  for (const { picture } of rows) if (picture) URL.revokeObjectURL(picture);
  asked = level();
  order = null;
  shown = SHOWN;
  rows = files.map((file) => ({ file, element: make("tr"), again: true }));
  drawHead();
  drawBody();
  byId("batch", HTMLElement).hidden = false;
  byId("batch", HTMLElement).scrollIntoView({ block: "nearest" });
  await resume();
}

/** Classifies every row that has no answer yet and may get one. */
export async function resume() {
  controller = new AbortController();
  const { signal } = controller;
  drawProgress(true);
  try {
    for (const portion of portions(rows.filter((row) => row.again))) {
      await classify(portion, signal);
      if (signal.aborted) return;
      drawProgress(true);
    }
  } catch (error) {
    if (!(error instanceof ServiceError) && !signal.aborted) throw error;
  } finally {
    if (controller.signal === signal) {
      if (order) drawBody(); // only at the end: nobody can read rows that keep moving
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

/** @param {Row[]} portion @param {AbortSignal} signal @returns {Promise<void>} */
async function classify(portion, signal) {
  const form = new FormData();
  for (const { file } of portion) form.append("images", file, "image");
  try {
    const { body } = await send(`classify/batch?prediction_set=${asked}`, { form, signal, onWait: wait });
    const { results } = await json(body);
    portion.forEach((row, i) => settle(row, results[i].error ? { error: results[i].error } : { result: results[i] }));
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    if (OF_A_FILE.has(error.code) && portion.length > 1) {
      // The service may accept less at once than this page sends, and an unreadable file must not fail the others.
      const half = Math.ceil(portion.length / 2);
      await classify(portion.slice(0, half), signal);
      return classify(portion.slice(half), signal);
    }
    const said = { code: error.code, message: error.message, request_id: error.requestId };
    portion.forEach((row) => settle(row, { error: said, again: !OF_A_FILE.has(error.code) }));
    if (FINAL.has(error.code) || Number(error.wait) > LONGEST_WAIT) throw error;
  }
}

/** @param {Row} row @param {Partial<Row>} outcome */
function settle(row, outcome) {
  Object.assign(row, { result: undefined, error: undefined, again: false }, outcome);
  if (row.element.isConnected) drawRow(row);
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
    return sign * (typeof a === "number" ? a - b : COLLATOR.compare(String(a), String(b)));
  });
}

function drawBody() {
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  const some = sorted().slice(0, shown);
  some.forEach(drawRow);
  byId("rows", HTMLElement).replaceChildren(...some.map((row) => row.element));
  focused?.focus({ preventScroll: true }); // moving its row took the focus away
  byId("rest", HTMLElement).hidden = rows.length <= shown;
}

/** @param {Row} row */
function drawRow(row) {
  const { file, element, result, error } = row;
  if (!row.picture) {
    row.picture = URL.createObjectURL(file);
    const image = make("img", { alt: "", width: 40, height: 40, loading: "lazy", decoding: "async", src: row.picture });
    image.onerror = () => image.removeAttribute("src");
    const name = make("button", { className: "link", onclick: () => open(file) }, file.name);
    element.append(make("td", {}, image), make("th", { scope: "row" }, name));
  }
  const outcome = error ? `${inWords(error.code)[0]} (${error.code})` : "…";
  const narrow = result
    ? [make("td", {}, result.class_name), make("td", {}, percent(result.confidence))]
    : [make("td", { colSpan: 2 }, outcome)];
  const wide = result ? [result.in_distribution ? "yes" : "no", result.prediction_set.join(", ")] : ["", ""];
  element.className = error ? "failed" : "";
  element.dataset.familiar = result?.in_distribution ?? "";
  element.title = error ? `${error.message}; request ${error.request_id}` : "";
  for (const cell of [...element.cells].slice(2)) cell.remove(); // the first two stay: one of them may have the focus
  element.append(...narrow, ...wide.map((cell) => make("td", { className: "wide" }, cell)));
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
    // A spreadsheet would run a name with such a prefix as a formula.
    file.name.replace(/^(?=[=+\-@\t\r])/, "'"),
    result?.class_name, result?.confidence, result?.in_distribution, result?.prediction_set.join(" "),
    error?.code, error?.message, (result ?? error)?.request_id, result?.model,
    ...classNames().map((_, index) => result?.all_probabilities[index]),
  ]);
  return [[...head, ...classNames().map((name) => `probability ${name}`)], ...lines]
    .map((line) => line.map((field) => `"${String(field ?? "").replaceAll('"', '""')}"`).join(",") + "\r\n")
    .join("");
}
