// The page's side of the network: a promise for each volume.

export class Network {
  /** about: see about.json; onLoaded: called with the share of the network that is downloaded. */
  constructor(about, onLoaded) {
    this.about = about;
    this.onLoaded = onLoaded;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  }

  /** {volume, seconds} of X-rays (2 x size x size); volume: Float32Array (D x H x W), 0 to 1. One call at a time. */
  run(xrays) {
    return new Promise((resolve, reject) => {
      this.worker.onerror = () => reject(new Error("The network did not start: a file of the page is missing."));
      this.worker.onmessage = ({ data }) => {
        if (data.error) reject(new Error(data.error));
        else if (data.volume) resolve(data);
        else this.onLoaded(data.loaded);
      };
      const { model, model_bytes: bytes, xray_size: edge } = this.about;
      this.worker.postMessage({ model, bytes, xrays, edge });
    });
  }
}
