// A volume in Hounsfield units, its slices, and its NIfTI file.

/** Int16Array of HU (D x H x W) from the network's values, 0 to 1 of the window [low, high]. */
export function toHu(values, [low, high]) {
  return Int16Array.from(values, (value) => roundHalfEven(value * (high - low) + low));
}

/** Halves go to the even neighbour, as they do in NumPy. */
function roundHalfEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/**
 * How each plane lies in a volume (D, H, W): the axis across it, its rows and its columns.
 * D runs from head to feet, H from front to back, W from the patient's right to left.
 */
export const PLANES = [
  { name: "Axial", axis: 0, rows: 1, columns: 2, sides: ["R", "L"], from: "head" },
  { name: "Coronal", axis: 1, rows: 0, columns: 2, sides: ["R", "L"], from: "front" },
  { name: "Sagittal", axis: 2, rows: 0, columns: 1, sides: ["A", "P"], from: "right" },
];

/** Int16Array (rows x columns) of one slice. */
export function slice(hu, shape, plane, index) {
  const strides = [shape[1] * shape[2], shape[2], 1];
  const [rows, columns] = [shape[plane.rows], shape[plane.columns]];
  const result = new Int16Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const at = index * strides[plane.axis] + row * strides[plane.rows] + column * strides[plane.columns];
      result[row * columns + column] = hu[at];
    }
  }
  return result;
}

/** Blob of a .nii.gz: the header that the build wrote for this network, then the voxels, W fastest. */
export function niftiFile(hu, headerBase64) {
  const header = Uint8Array.from(atob(headerBase64), (letter) => letter.charCodeAt(0));
  const voxels = new DataView(new ArrayBuffer(2 * hu.length));
  hu.forEach((value, i) => voxels.setInt16(2 * i, value, true));
  const stream = new Blob([header, voxels]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Response(stream).blob();
}
