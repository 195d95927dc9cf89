// Three planes with sliders, and the grey window.

import { PLANES, slice } from "./volume.js";

// Centre and width in HU.
const WINDOWS = { Chest: [-300, 1400], Lung: [-600, 1500], "Soft tissue": [40, 400], Bone: [400, 1800] };

export class Viewer {
  /** planes, windows: the elements that are filled. */
  constructor(planes, windows) {
    this.window = WINDOWS.Chest;
    this.planes = PLANES.map((plane) => new Plane(plane, planes, this));
    Object.entries(WINDOWS).forEach(([name, range], i) => windows.append(this.#choice(name, range, i === 0)));
  }

  /** hu: Int16Array (D x H x W) of shape. */
  show(hu, shape) {
    [this.hu, this.shape] = [hu, shape];
    this.planes.forEach((plane) => plane.reset());
  }

  #choice(name, range, checked) {
    const input = make("input", { type: "radio", name: "window", value: name, checked });
    input.addEventListener("change", () => {
      this.window = range;
      this.planes.forEach((plane) => plane.draw());
    });
    const label = make("label");
    label.append(input, name);
    return label;
  }
}

class Plane {
  constructor(plane, parent, viewer) {
    [this.plane, this.viewer] = [plane, viewer];
    const name = plane.name.toLowerCase();
    this.slider = make("input", { type: "range", id: `${name}-slice`, min: 0, step: 1 });
    this.slider.addEventListener("input", () => this.draw());
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.place = make("output");
    this.place.htmlFor = this.slider.id;
    const heading = make("h3");
    heading.append(make("label", { htmlFor: this.slider.id, textContent: plane.name }));
    const head = make("div", { className: "plane-head" });
    head.append(heading, this.place);
    const picture = make("div", { className: "slice" });
    picture.append(this.canvas, ...plane.sides.map((side) => make("span", { className: "side", textContent: side })));
    const box = make("div", { className: "plane" });
    box.append(head, this.slider, picture);
    parent.append(box);
  }

  /** To the middle of a new volume. */
  reset() {
    const { axis, rows, columns } = this.plane;
    const shape = this.viewer.shape;
    this.slider.max = shape[axis] - 1;
    this.slider.value = Math.floor(shape[axis] / 2);
    [this.canvas.width, this.canvas.height] = [shape[columns], shape[rows]];
    this.draw();
  }

  draw() {
    const { hu, shape, window } = this.viewer;
    const { name, axis, from } = this.plane;
    const index = Number(this.slider.value);
    drawGrey(this.canvas, slice(hu, shape, this.plane, index), window);
    this.place.textContent = `${index + 1} of ${shape[axis]} from ${from}`;
    this.slider.setAttribute("aria-valuetext", this.place.textContent);
    this.canvas.setAttribute("aria-label", `${name} slice ${this.place.textContent}, synthetic`);
  }
}

/** Fill a canvas with values, black at the lower end of a window (centre, width) and white at its upper. */
export function drawGrey(canvas, values, [centre, width]) {
  const picture = new ImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    const grey = 255 * Math.min(1, Math.max(0, (value - centre) / width + 0.5));
    picture.data.set([grey, grey, grey, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
