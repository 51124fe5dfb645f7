// Helpers for every module: elements by id, new elements, numbers formatted for people.

/**
 * The element with this id; throws if index.html lacks it.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html has no ${kind.name} #${id}`);
  return found;
}

/**
 * A new element; text is never parsed as HTML.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} [properties] properties of the element; names with a dash are attributes
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, String(value));
    else Object.assign(element, { [name]: value });
  }
  element.append(...children);
  return element;
}

/**
 * Sets the custom property from which the style sheet draws a share. A `style` attribute would violate the policy.
 * @template {HTMLElement} T
 * @param {T} element
 * @param {number} share
 */
export function withShare(element, share) {
  element.style.setProperty("--share", String(share));
  return element;
}

/** @param {string} text for screen readers */
export function announce(text) {
  byId("status", HTMLElement).textContent = text;
}

const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const WHOLE = new Intl.NumberFormat("en");

/** @param {number} share in [0, 1]; certainty is never rounded up to 100 % */
export function percent(share) {
  if (share > 0.999 && share < 1) return "> 99.9%";
  if (share > 0 && share < 0.001) return "< 0.1%";
  return PERCENT.format(share);
}

/** @param {number} number */
export const whole = (number) => WHOLE.format(number);

/** @param {number} milliseconds */
export const duration = (milliseconds) =>
  milliseconds >= 1000 ? `${(milliseconds / 1000).toFixed(2)} s` : `${milliseconds.toFixed(milliseconds < 10 ? 2 : 0)} ms`;
