// Every way to bring in a picture: drop, paste, choose, photograph.

import { byId } from "./dom.js";

/** @param {(files: File[]) => void} take called with what came in, which may be nothing */
export function listen(take) {
  for (const id of ["choose", "photo"]) {
    const input = byId(id, HTMLInputElement);
    input.addEventListener("change", () => {
      take([...(input.files ?? [])]);
      input.value = ""; // otherwise choosing the same file again would fire no change event
    });
  }
  addEventListener("paste", ({ clipboardData, target }) => {
    const files = [...(clipboardData?.files ?? [])];
    if (files.length || !(target instanceof HTMLInputElement)) take(files);
  });
  listenForDrops(take);
}

/** @param {(files: File[]) => void} take */
function listenForDrops(take) {
  const veil = byId("veil", HTMLElement);
  addEventListener("dragover", (event) => {
    event.preventDefault(); // otherwise the browser would leave this page for the picture
    veil.hidden = !event.dataTransfer?.types.includes("Files");
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) veil.hidden = true;
  });
  addEventListener("drop", async (event) => {
    event.preventDefault();
    veil.hidden = true;
    // Get the entries before the first await: afterwards the event has none.
    const items = [...(event.dataTransfer?.items ?? [])].filter((item) => item.kind === "file");
    const found = items.map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
    take((await Promise.all(found.map(filesIn))).flat());
  });
}

/** @param {FileSystemEntry | File | null} found @returns {Promise<File[]>} for a folder, all its files at any depth, named by their paths */
async function filesIn(found) {
  if (found === null || found.name.startsWith(".")) return [];
  if (found instanceof File) return [found];
  const path = found.fullPath.slice(1);
  try {
    if (found.isFile) {
      /** @type {File} */
      const file = await new Promise((resolve, reject) => /** @type {FileSystemFileEntry} */ (found).file(resolve, reject));
      return [Object.defineProperty(file, "name", { value: path })];
    }
    return (await Promise.all((await entriesOf(/** @type {FileSystemDirectoryEntry} */ (found))).map(filesIn))).flat();
  } catch {
    return [new File([], path)]; // empty: the service refuses this file and no other
  }
}

/** @param {FileSystemDirectoryEntry} folder */
async function entriesOf(folder) {
  const reader = folder.createReader();
  /** @type {FileSystemEntry[]} */
  const entries = [];
  for (;;) {
    /** @type {FileSystemEntry[]} */
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return entries; // readEntries returns them in portions
    entries.push(...some);
  }
}
