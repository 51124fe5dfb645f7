// Talks to the service: its error format, Retry-After, and Server-Timing.

const ATTEMPTS = 4;
export const LONGEST_WAIT = 30; // seconds; if told to wait longer, the page reports it instead of waiting
const NOT_READY_WAIT = 2; // seconds; the service's own 503 has no Retry-After
const STORED = "api-key";

export class ServiceError extends Error {
  /** @param {{code: string, message: string, request_id?: string}} said @param {number | null} wait seconds */
  constructor(said, wait = null) {
    super(said.message);
    this.code = said.code;
    this.requestId = said.request_id ?? "";
    this.wait = wait;
  }
}

/** @param {string} value an empty string removes the key */
export function useKey(value) {
  if (value) sessionStorage.setItem(STORED, value);
  else sessionStorage.removeItem(STORED);
}

/** @returns {boolean} */
export const hasKey = () => sessionStorage.getItem(STORED) !== null;

/**
 * @typedef {object} Options
 * @property {FormData} [form] the body of a POST; without it the request is a GET
 * @property {AbortSignal} [signal]
 * @property {(seconds: number, error: ServiceError) => void} [onWait] called every second until the next attempt
 */

/**
 * Sends a request, and retries it when the service says when to; resolves to a 2xx reply or throws ServiceError.
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<{body: Blob, timing: Map<string, number>, roundTrip: number}>} times in milliseconds
 */
export async function send(path, options = {}) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await attemptOnce(path, options);
    } catch (error) {
      if (!(error instanceof ServiceError) || error.wait === null) throw error;
      if (attempt === ATTEMPTS || error.wait > LONGEST_WAIT) throw error;
      for (let left = error.wait; left > 0; left--) {
        options.onWait?.(left, error);
        await sleep(1000, options.signal);
      }
    }
  }
}

/** Throws ServiceError if it is not JSON: a proxy may have answered instead, such as with a sign-in page. @param {Blob} body */
export async function json(body) {
  try {
    return JSON.parse(await body.text());
  } catch {
    throw new ServiceError({ code: "unknown", message: "the reply is not JSON" });
  }
}

/** @param {string} path @param {Options} options */
async function attemptOnce(path, { form, signal }) {
  const started = performance.now();
  const key = sessionStorage.getItem(STORED);
  let response, body;
  try {
    response = await fetch(path, {
      method: form ? "POST" : "GET",
      body: form ?? null,
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      signal: signal ?? null,
    });
    body = await response.blob();
  } catch (error) {
    if (signal?.aborted) throw error;
    // fetch fails in the same way for a file that has been deleted and for a service that is out of reach.
    const code = (await canBeRead(form)) ? "unreachable" : "unreadable";
    throw new ServiceError({ code, message: String(error) });
  }
  if (response.status === 401 || (key && response.status === 403)) document.dispatchEvent(new Event("key-wanted"));
  if (!response.ok) throw await failure(response, body);
  return { body, timing: stages(response), roundTrip: performance.now() - started };
}

/** @param {FormData} [form] its values are files */
async function canBeRead(form) {
  try {
    for (const file of form?.values() ?? []) await /** @type {File} */ (file).slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}

/** @param {Response} response @param {Blob} body */
async function failure(response, body) {
  const asked = Number(response.headers.get("Retry-After") ?? (response.status === 503 ? NOT_READY_WAIT : NaN));
  const wait = [429, 502, 503].includes(response.status) && asked >= 0 ? Math.max(1, Math.ceil(asked)) : null;
  try {
    return new ServiceError((await json(body)).error, wait);
  } catch {
    // Not the service's error format: something between it and this page has answered.
    return new ServiceError({ code: "unknown", message: `HTTP status ${response.status}` }, wait);
  }
}

/** @param {Response} response */
function stages(response) {
  const told = response.headers.get("Server-Timing") ?? "";
  return new Map([...told.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, stage, ms]) => [String(stage), Number(ms)]));
}

/** @param {number} milliseconds @param {AbortSignal} [signal] */
function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
