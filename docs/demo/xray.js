// A picture file -> one X-ray as the network reads it, or a sentence that says why not.

import { decodeGreyPng } from "./png.js";
import { resample } from "./resample.js";

const MIN_EDGE = 32;
const MAX_EDGE = 8192;

/**
 * One X-ray: {pixels, notes}; pixels: Float32Array (size x size) from 0 to 1, notes: sentences for the user.
 *
 * file: File or Blob; name: how messages call it; view: 0 PA, 1 lateral; about: see about.json (xray_size, own_mark,
 * bright). The values are taken as the project renders X-rays: full scale means a line integral of xray_scale.
 * Throws an Error naming the file: unreadable, not square, of a size that is none, transparent, without contrast, bone
 * dark.
 */
export async function readXray(file, name, view, about) {
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const { width, pixels, texts, notes } = (await decodeGreyPng(bytes, checkSize)) ?? (await decodeByBrowser(file));
    checkContrast(pixels);
    checkPolarity(pixels, width);
    const known = texts[about.own_mark[0]] === about.own_mark[1];
    const scale = known ? [] : scaleNotes(pixels, about.bright[view]);
    return { pixels: resample(pixels, width, about.xray_size), notes: [...notes, ...scale] };
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
}

/** What the browser makes of a JPEG, a coloured PNG, ...: 8 bits, grey by ITU-R BT.601. */
async function decodeByBrowser(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const picture = await createImageBitmap(file, options).catch(() => {
    throw new Error("cannot be read as a picture; expected PNG or JPEG (reconstruct.py also reads DICOM and TIFF)");
  });
  const { width, height } = picture;
  checkSize(width, height);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = toGrey(context.getImageData(0, 0, width, height).data);
  return { width, pixels, texts: {}, notes: ["Read with 8 bits, as browsers do; colours are made grey."] };
}

function toGrey(rgba) {
  const grey = new Float32Array(rgba.length / 4);
  for (let i = 0; i < grey.length; i++) {
    const [red, green, blue, alpha] = rgba.subarray(4 * i, 4 * i + 4);
    if (alpha < 255) throw new Error("has transparent pixels; expected an opaque picture");
    grey[i] = Math.floor(0.299 * red + 0.587 * green + 0.114 * blue + 0.5) / 255;
  }
  return grey;
}

function checkSize(width, height) {
  if (width !== height) {
    throw new Error(`is ${width} x ${height} pixels; expected a square picture (reconstruct.py takes others)`);
  }
  if (width < MIN_EDGE || width > MAX_EDGE) {
    throw new Error(`is ${width} x ${height} pixels; expected an edge of ${MIN_EDGE} to ${MAX_EDGE}`);
  }
}

function checkContrast(pixels) {
  const range = pixels.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [1, 0]);
  if (range[1] - range[0] >= 1 / 16) return;
  const [low, high] = range.map((value) => `${Math.round(100 * value)} %`);
  throw new Error(`holds values from ${low} to ${high} of full white; expected the contrast of an X-ray`);
}

/** Air beside the body is dark where bone is bright: a border far brighter than the middle is inverted. */
function checkPolarity(pixels, edge) {
  const margin = Math.max(1, Math.floor(edge / 32));
  const [first, last] = [Math.floor(edge / 4), edge - Math.ceil(edge / 4)];
  const inside = (index) => index >= first && index < last;
  const border = pixels.filter((_, i) => i % edge < margin || i % edge >= edge - margin);
  const middle = pixels.filter((_, i) => inside(i % edge) && inside(Math.floor(i / edge)));
  const span = quantile(pixels, 1) - quantile(pixels, 0);
  if (quantile(border, 0.5) > quantile(middle, 0.5) + 0.25 * span) {
    throw new Error("bone looks dark and air bright; expected bone bright: invert the picture");
  }
}

/** Whether a picture that the project has not marked as its rendering is at least as bright as one. */
function scaleNotes(pixels, [low, high]) {
  const notes = ["Not marked as a rendering of this project. It is taken as one; a film is not (see below)."];
  const level = quantile(pixels, 0.99);
  if (level > low && level < high) return notes;
  const what = level <= low ? "darker" : "brighter";
  return [...notes, `Far ${what} than renderings are: the volume will be wrong. Use reconstruct.py for films.`];
}

/** The value that a share of the values lie below; between two values, their mean by distance. */
function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  const at = share * (sorted.length - 1);
  const low = sorted[Math.floor(at)];
  return low + (sorted[Math.ceil(at)] - low) * (at - Math.floor(at));
}
