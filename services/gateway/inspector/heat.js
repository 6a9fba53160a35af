// Bits by layer and token, as a map.

import { colours, step } from "./scale.js";

export class Heat {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLElement} words what the cell under the pointer says
   */
  constructor(canvas, words) {
    this.canvas = canvas;
    this.words = words;
    this.rest = words.textContent;
    this.side = "key";
    this.view = null;
    this.cell = null;
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      this.#select((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("keydown", (event) => this.#move(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(side) {
    this.side = side;
    this.draw();
  }

  update(view) {
    this.view = view;
    this.draw();
  }

  draw() {
    const { canvas, view } = this;
    const context = canvas.getContext("2d");
    const { layers = 0, columns = 0 } = view?.grid ?? {};
    canvas.width = Math.max(1, columns);
    canvas.height = Math.max(1, layers);
    if (!columns) return;
    const { steps, exact } = colours();
    const bits = view.grid[`${this.side}_eighths`];
    let sum = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let column = 0; column < columns; column++) {
        const held = bits[layer * columns + column] / 8;
        sum += held;
        context.fillStyle = held >= 15.9 ? exact : steps[step(held)];
        context.fillRect(column, layer, 1, 1);
      }
    }
    const mean = (sum / (layers * columns)).toFixed(1);
    const label = `Bits of the ${this.side}s by layer and token, ${mean} on average. Arrow keys read single cells.`;
    canvas.setAttribute("aria-label", label);
    if (this.cell) this.#tell();
  }

  #select(x, y) {
    const grid = this.view?.grid;
    if (!grid?.columns) return;
    const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    this.cell = [within(y, grid.layers), within(x, grid.columns)];
    this.#tell();
  }

  #move(event) {
    const grid = this.view?.grid;
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!by || !grid?.columns) return;
    event.preventDefault();
    const [layer, column] = this.cell ?? [0, 0];
    this.#select((column + by[1] + 0.5) / grid.columns, (layer + by[0] + 0.5) / grid.layers);
  }

  #tell() {
    const { grid, cached } = this.view;
    const [layer, column] = this.cell.map((place, axis) => Math.min(place, (axis ? grid.columns : grid.layers) - 1));
    const first = Math.floor((column * cached) / grid.columns);
    const last = Math.floor(((column + 1) * cached) / grid.columns) - 1;
    const held = (side) => (grid[`${side}_eighths`][layer * grid.columns + column] / 8).toFixed(1);
    const tokens = first === last ? `token ${first}` : `tokens ${first} to ${last}`;
    this.words.textContent = `Layer ${layer}, ${tokens}: keys ${held("key")} bits, values ${held("value")} bits.`;
  }

  #leave() {
    this.cell = null;
    this.words.textContent = this.rest;
  }
}
