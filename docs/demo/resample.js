// Square pictures to another size as the project's reader does: averaged by area down, interpolated linearly up.

/** Float32Array (size x size) of the picture pixels (edge x edge). */
export function resample(pixels, edge, size) {
  if (edge === size) return Float32Array.from(pixels);
  const cells = shares(edge, size);
  const rows = alongRows(pixels, edge, cells); // edge x size
  return Float32Array.from(transposed(alongRows(transposed(rows, edge, size), edge, cells), size, size));
}

/** For each of size cells the first of the edge pixels that it sees, and the weights of it and those behind it. */
function shares(edge, size) {
  const make = size < edge ? areaShares : linearShares;
  return Array.from({ length: size }, (_, cell) => make(cell, edge, size));
}

/** A pixel that lies in two cells counts in both by its share. */
function areaShares(cell, edge, size) {
  const [low, high] = [(cell * edge) / size, ((cell + 1) * edge) / size];
  const start = Math.floor(low);
  const length = Math.min(Math.ceil(high), edge) - start;
  const overlap = (pixel) => Math.max(0, Math.min(high, pixel + 1) - Math.max(low, pixel));
  return { start, weights: Array.from({ length }, (_, i) => (overlap(start + i) * size) / edge) };
}

/** Between the two nearest pixel centres; beyond the outermost, its value. */
function linearShares(cell, edge, size) {
  const centre = Math.min(Math.max(((cell + 0.5) * edge) / size - 0.5, 0), edge - 1);
  const start = Math.min(Math.floor(centre), edge - 2);
  return { start, weights: [1 - (centre - start), centre - start] };
}

/** Each row of length edge -> its cells; in double precision. */
function alongRows(pixels, edge, cells) {
  const rows = pixels.length / edge;
  const result = new Float64Array(rows * cells.length);
  for (let row = 0; row < rows; row++) {
    cells.forEach(({ start, weights }, cell) => {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * pixels[row * edge + start + i];
      result[row * cells.length + cell] = sum;
    });
  }
  return result;
}

function transposed(pixels, rows, columns) {
  const result = new Float64Array(pixels.length);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) result[column * rows + row] = pixels[row * columns + column];
  }
  return result;
}
