// The page: pictures in, buttons, messages, volume out.

import { Network } from "./network.js";
import { drawGrey, Viewer } from "./viewer.js";
import { niftiFile, toHu } from "./volume.js";
import { readXray } from "./xray.js";

const VIEWS = ["pa", "lateral"];
const NAMES = ["PA", "lateral"];
const byId = (id) => document.getElementById(id);
const about = await loadAbout();
const viewer = new Viewer(byId("planes"), byId("windows"));
const network = new Network(about, showLoaded);
const xrays = [null, null];
let hu = null;

start();

function start() {
  VIEWS.forEach((view, index) => {
    byId(view).addEventListener("change", ({ target }) => guarded(() => choose(index, target.files[0])));
  });
  byId("example").addEventListener("click", () => guarded(reconstructExample));
  byId("reconstruct").addEventListener("click", () => guarded(reconstruct));
  byId("download").addEventListener("click", () => guarded(download));
  describe();
}

async function loadAbout() {
  const answer = await fetch("about.json").catch(() => null);
  if (answer?.ok) return answer.json();
  byId("problem").textContent = "about.json is missing: the page has to be built (docs/demo.md) and served over HTTP.";
  throw new Error("about.json is missing");
}

function describe() {
  const [size, spacing] = [about.volume_size.join(" x "), about.spacing_mm.toFixed(1)];
  byId("scale").textContent = `: full white is a line integral of ${about.xray_scale}`;
  byId("about").textContent = `Network: ${about.name}, ${(about.model_bytes / 1e6).toFixed(0)} MB, `
    + `${about.origin}; volumes of ${size} voxels of ${spacing} mm. `;
  about.licences.forEach(({ text, href }) => {
    byId("about").append(Object.assign(document.createElement("a"), { textContent: text, href }), " ");
  });
}

/** Run a step with the buttons off; what it throws is shown to the user. */
async function guarded(step) {
  const controls = document.querySelectorAll("button, input[type=file]");
  controls.forEach((control) => (control.disabled = true));
  byId("problem").textContent = "";
  try {
    await step();
  } catch (error) {
    byId("status").textContent = "";
    byId("problem").textContent = error.message;
  }
  byId("progress").hidden = true;
  controls.forEach((control) => (control.disabled = false));
}

/** Read one picture for a view (0 PA, 1 lateral) and show it; nothing is left of the one before. */
async function choose(index, file, name = file?.name) {
  forget(index);
  if (!file) return;
  const xray = await readXray(file, name, index, about);
  xrays[index] = xray.pixels;
  show(index, xray.pixels, xray.notes, `${NAMES[index]} X-ray ${name}`);
}

function forget(index) {
  xrays[index] = null;
  show(index, new Float32Array(about.xray_size ** 2), [], `No ${NAMES[index]} X-ray`);
  byId("viewer").hidden = true; // it belongs to other pictures
  byId("status").textContent = "";
}

function show(index, pixels, notes, label) {
  const canvas = document.querySelector(`[data-view=${VIEWS[index]}] canvas`);
  canvas.width = canvas.height = about.xray_size;
  canvas.setAttribute("aria-label", label);
  drawGrey(canvas, pixels, [0.4, 0.8]);
  const items = notes.map((note) => Object.assign(document.createElement("li"), { textContent: note }));
  byId(`${VIEWS[index]}-notes`).replaceChildren(...items);
}

async function reconstructExample() {
  for (const [index, view] of VIEWS.entries()) {
    byId(view).value = "";
    const answer = await fetch(`example/${view}.png`);
    if (!answer.ok) throw new Error(`The example's ${NAMES[index]} X-ray cannot be loaded (${answer.status}).`);
    await choose(index, await answer.blob(), `example/${view}.png`);
  }
  await reconstruct();
}

async function reconstruct() {
  const missing = NAMES.filter((_, index) => !xrays[index]);
  if (missing.length) throw new Error(`Missing: the ${missing.join(" and the ")} X-ray; expected two pictures.`);
  if (xrays[0].every((value, i) => value === xrays[1][i])) {
    throw new Error("Both pictures are the same; expected a PA and a lateral X-ray.");
  }
  byId("status").textContent = "Reconstructing ...";
  const { volume, seconds } = await network.run(Float32Array.of(...xrays[0], ...xrays[1]));
  hu = toHu(volume, about.hu_window);
  byId("viewer").hidden = false;
  viewer.show(hu, about.volume_size);
  byId("status").textContent = `Reconstructed in ${seconds.toFixed(1)} s on this machine.`;
}

function showLoaded(share) {
  byId("progress").hidden = share === 1;
  byId("progress").value = share;
  byId("status").textContent = share < 1 ? "Loading the network, once ..." : "Reconstructing ...";
}

async function download() {
  const href = URL.createObjectURL(await niftiFile(hu, about.nifti_header));
  Object.assign(document.createElement("a"), { href, download: "synthetic_ct.nii.gz" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
