// Grey PNG files at their full depth (browsers keep 8 of 16 bits), by https://www.w3.org/TR/png/

const SIGNATURE = "\x89PNG\r\n\x1a\n";
const GREY = 0; // colour type

/**
 * What a grey PNG of 8 or 16 bit holds: {width, pixels, texts, notes}, pixels from 0 to 1, row by row.
 *
 * bytes: Uint8Array of the file. checkSize: called with width and height before memory is taken for pixels. Null for
 * any other file, which is the browser's to read. Throws an Error for grey PNGs that are not read exactly here.
 */
export async function decodeGreyPng(bytes, checkSize) {
  if (ascii(bytes.subarray(0, 8)) !== SIGNATURE) return null;
  const chunks = readChunks(bytes);
  const header = chunks.find((chunk) => chunk.type === "IHDR");
  if (!header) throw new Error("is a damaged PNG");
  const about = view(header.data);
  const [width, height, depth] = [about.getUint32(0), about.getUint32(4), about.getUint8(8)];
  checkSize(width, height);
  if (about.getUint8(9) !== GREY) return null;
  refuseExtras(chunks, depth, about.getUint8(12));
  const lines = await inflate(chunks.filter((chunk) => chunk.type === "IDAT").map((chunk) => chunk.data));
  const stride = (width * depth) / 8;
  if (lines.length !== height * (stride + 1)) throw new Error("is a truncated PNG");
  const pixels = toUnit(unfilter(lines, stride, height, depth / 8), depth);
  return { width, pixels, texts: readTexts(chunks), notes: [] };
}

function refuseExtras(chunks, depth, interlaced) {
  const has = (type) => chunks.some((chunk) => chunk.type === type);
  if (depth < 8) throw new Error(`is a ${depth}-bit picture; expected 8 or 16 bit`);
  if (interlaced) throw new Error("is an interlaced PNG; expected one saved without interlacing");
  if (has("tRNS")) throw new Error("has transparent pixels; expected an opaque picture");
  if (has("acTL")) throw new Error("is animated; expected one picture");
  if (has("eXIf")) throw new Error("has EXIF data, which may turn it; expected an upright picture without them");
  const density = chunks.find((chunk) => chunk.type === "pHYs");
  if (density && view(density.data).getUint32(0) !== view(density.data).getUint32(4)) {
    throw new Error("has pixels that are not square");
  }
}

/** [{type, data}] of all chunks. */
function readChunks(bytes) {
  const chunks = [];
  const whole = view(bytes);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 8 + whole.getUint32(at);
    if (end + 4 > bytes.length) throw new Error("is a truncated PNG");
    chunks.push({ type: ascii(bytes.subarray(at + 4, at + 8)), data: bytes.subarray(at + 8, end) });
    at = end + 4; // behind the checksum
  }
  return chunks;
}

async function inflate(parts) {
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error("is a damaged PNG");
  }
}

/** Undo the filter of each line (specification, section 9): bytes of the pixels. step: bytes of one pixel. */
function unfilter(lines, stride, height, step) {
  const pixels = new Uint8Array(stride * height);
  for (let row = 0; row < height; row++) {
    const kind = lines[row * (stride + 1)];
    if (kind > 4) throw new Error("is a damaged PNG");
    for (let i = 0; i < stride; i++) {
      const at = row * stride + i;
      const left = i < step ? 0 : pixels[at - step];
      const up = row === 0 ? 0 : pixels[at - stride];
      const corner = i < step || row === 0 ? 0 : pixels[at - stride - step];
      const guess = predict(kind, left, up, corner);
      pixels[at] = lines[row * (stride + 1) + 1 + i] + guess; // modulo 256
    }
  }
  return pixels;
}

function predict(kind, left, up, corner) {
  if (kind === 4) return paeth(left, up, corner);
  if (kind === 3) return (left + up) >> 1;
  return kind === 2 ? up : kind === 1 ? left : 0;
}

function paeth(left, up, corner) {
  const toLeft = Math.abs(up - corner);
  const toUp = Math.abs(left - corner);
  const toCorner = Math.abs(left + up - 2 * corner);
  if (toLeft <= toUp && toLeft <= toCorner) return left;
  return toUp <= toCorner ? up : corner;
}

/** Float32Array of samples as shares of the largest value; 16-bit samples have their high byte first. */
function toUnit(bytes, depth) {
  if (depth === 8) return Float32Array.from(bytes, (value) => value / 255);
  const samples = view(bytes);
  return new Float32Array(bytes.length / 2).map((_, i) => samples.getUint16(2 * i) / 65535);
}

/** {keyword: text} of the uncompressed text chunks. */
function readTexts(chunks) {
  const texts = chunks.filter((chunk) => chunk.type === "tEXt").map((chunk) => ascii(chunk.data).split("\0"));
  return Object.fromEntries(texts);
}

function ascii(bytes) {
  return String.fromCharCode(...bytes.subarray(0, 4096));
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
