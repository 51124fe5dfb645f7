// Every error of the service, and of Nginx in front of it, in plain words: what happened, and what to do about it.

import { make, whole } from "./dom.js";

/** @type {Record<string, [string, string]>} */
const WORDS = {
  invalid_image: ["This picture cannot be read", "The file is damaged or incomplete. Open it in a picture viewer, save it again, and try once more."],
  unsupported_media_type: ["This is not a picture the service knows", "It reads JPEG, PNG, WebP, BMP, GIF and TIFF. Save the picture as one of these."],
  too_large: ["This file is too large", "Make the picture smaller, or save it as a JPEG."],
  too_many_pixels: ["This picture has too many pixels", "Scale it down and try again; the network looks at a small version of it anyway."],
  invalid_request: ["The service did not understand the request", "This should not happen from this page. Reload it; if that does not help, tell whoever runs the service."],
  no_evidence: ["This model cannot show its evidence", "Its network does not tell which places of a picture its answer comes from. The answer itself is not affected."],
  not_found: ["There is nothing at this address", "The service may have been updated. Reload the page."],
  method_not_allowed: ["The service did not understand the request", "The service may have been updated. Reload the page."],
  uri_too_long: ["The address is too long", "Reload the page and try again."],
  headers_too_large: ["The browser sent too much about itself", "Delete the cookies of this site and try again."],
  request_timeout: ["The picture took too long to arrive", "The connection is slow. Try a smaller picture."],
  overloaded: ["The service is busy", "Too many pictures are waiting already. Try again in a moment."],
  too_many_requests: ["Too many requests from your address", "Try again in a moment."],
  rate_limited: ["Too many pictures at once for this API key", "Try again in a moment, or ask for a higher rate."],
  quota_exceeded: ["This API key has used up its pictures for today", "The count starts again at midnight UTC."],
  unauthorized: ["This service asks for an API key", "Enter yours above; whoever runs the service gives them out."],
  forbidden: ["This API key may not do that", "It has expired or is meant for something else. Ask whoever gave it to you."],
  not_ready: ["The service is not ready yet", "It is starting and checking its model. Try again in a moment."],
  bad_gateway: ["The service cannot be reached", "It may be restarting. Try again in a moment."],
  deadline_exceeded: ["The service did not answer in time", "It has too much to do, or the picture is very large. Try again."],
  disconnected: ["The connection ended too early", "Try again."],
  internal: ["Something went wrong inside the service", "It has been logged. Tell whoever runs the service the request's id."],
  unreachable: ["The service cannot be reached", "Check your connection; the service may also be down."],
  unreadable: ["This file cannot be read", "It has been moved, changed or deleted, or you may not read it. Choose it again."],
  no_file: ["There was no picture in that", "Save the picture as a file, then drop or choose that file."],
  unknown: ["The service gave an answer this page does not know", "Something between this page and the service may have answered instead."],
};

/** @param {string} code @returns {[string, string]} what happened, what to do */
export const inWords = (code) => WORDS[code] ?? WORDS.unknown ?? [code, ""];

/**
 * @param {import("./api.js").ServiceError} error
 * @param {(() => void) | null} again
 */
export function explainError(error, again) {
  const [title, advice] = inWords(error.code);
  const details = [make("dt", {}, "Details"), make("dd", {}, error.message)];
  details.push(make("dt", {}, "Code"), make("dd", {}, make("code", {}, error.code)));
  if (error.requestId) details.push(make("dt", {}, "Request id"), make("dd", {}, make("code", {}, error.requestId)));
  /** @type {HTMLElement[]} */
  const parts = [make("h3", {}, title), make("p", {}, advice)];
  if (error.wait !== null) parts.push(make("p", {}, `The service asks to wait ${inTime(error.wait)}.`));
  if (again) parts.push(make("button", { className: "button", onclick: again }, "Try again"));
  return make("div", { className: "problem", role: "alert" }, ...parts, make("dl", { className: "facts" }, ...details));
}

/** @param {number} seconds */
function inTime(seconds) {
  const [count, unit] = seconds < 120 ? [seconds, "second"] : seconds < 7200 ? [Math.ceil(seconds / 60), "minute"] : [Math.ceil(seconds / 3600), "hour"];
  return `${whole(count)} ${unit}${count === 1 ? "" : "s"}`;
}
