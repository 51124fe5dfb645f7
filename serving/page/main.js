// Ties the page together: one picture goes to the single view, several to the table.

import { json, send, ServiceError, useKey } from "./api.js";
import * as batch from "./batch.js";
import * as card from "./card.js";
import { announce, byId, make } from "./dom.js";
import { listen } from "./intake.js";
import * as single from "./single.js";

/** What to repeat once a key is entered. @type {() => unknown} */
let repeat = () => {};

/** @param {File[]} files */
function take(files) {
  const [first] = files;
  if (!first) return single.refuse(new ServiceError({ code: "no_file", message: "no file came with it" }));
  if (files.length === 1) return look(first);
  repeat = batch.resume;
  card.load(); // the CSV needs the class names
  batch.start(files);
}

/** @param {File} file */
function look(file) {
  repeat = single.classify;
  byId("stage", HTMLElement).scrollIntoView({ block: "nearest" });
  single.show(file);
}

async function offerSamples() {
  /** @type {string[]} */
  const paths = await json((await send("page/samples.json")).body);
  const known = paths.filter((path) => card.classNames().includes(className(path)) || !card.classNames().length);
  byId("sample-list", HTMLElement).replaceChildren(...known.map(sample));
  byId("samples", HTMLElement).hidden = !known.length;
}

/** @param {string} path */
const className = (path) => path.replace(/^.*\/|\.\w+$/g, "");

/** @param {string} path */
function sample(path) {
  const url = `page/${path.replace(/[^/]+/g, encodeURIComponent)}`; // a class may be called "50%" or "no. #1?"
  const image = make("img", { src: url, alt: `Sample: ${className(path)}`, width: 64, height: 64 });
  const choose = async () => {
    try {
      const { body } = await send(url);
      look(new File([body], path.replace(/^.*\//, ""), { type: body.type }));
    } catch (error) {
      single.refuse(error, choose);
    }
  };
  return make("button", { className: "sample", onclick: choose }, image);
}

document.addEventListener("key-wanted", () => {
  const form = byId("key", HTMLFormElement);
  if (!form.hidden) return;
  form.hidden = false;
  byId("key-value", HTMLInputElement).focus();
  announce("This service asks for an API key.");
});
byId("key", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(byId("key-value", HTMLInputElement).value.trim());
  byId("key", HTMLElement).hidden = true;
  await card.load();
  repeat();
  await offerSamples();
});
byId("level", HTMLElement).addEventListener("change", single.classify);

batch.prepare(look);
listen(take);
await card.load();
await offerSamples();
