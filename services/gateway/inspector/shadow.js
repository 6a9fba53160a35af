// The comparison with full precision: how far the cache is from it, token by token.

import { bytes } from "./panel.js";

const LEAST = 1e-5; // nats of the shortest bar
const MOST = 3; // and of the longest; in between the scale is logarithmic
const BARS = 128;
const $ = (id) => document.getElementById(id);

const WHY = {
  busy: "Its worker compares another session now; it compares one at a time.",
  too_long: "The session is longer than its worker compares (QAQ_SHADOW_TOKENS).",
  failed: "Full precision could not be computed; the worker's log says why.",
};

const nats = (value) => (value < 0.001 ? value.toExponential(1) : value.toFixed(value < 0.1 ? 4 : 2));

export class Shadow {
  /** @param set called with whether to compare. */
  constructor(set) {
    this.input = $("shadow");
    this.words = $("shadow-text");
    this.canvas = $("distance");
    this.rest = this.words.textContent;
    this.shadow = null;
    this.input.addEventListener("change", () => {
      this.update(null);
      set(this.input.checked);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  get wanted() {
    return this.input.checked;
  }

  update(view) {
    this.shadow = view?.shadow ?? null;
    this.words.textContent = this.#told(view);
    this.canvas.hidden = !this.shadow?.compared;
    this.#draw();
  }

  #told(view) {
    const { shadow } = this;
    if (!shadow) return this.input.checked ? "Waits for a cache." : this.rest;
    if (WHY[shadow.state]) return WHY[shadow.state];
    if (!shadow.compared) {
      return shadow.state === "comparing" ? "Tokens of the next answer are compared."
        : `The text so far is computed in full precision: ${shadow.cached} of ${view.total} tokens.`;
    }
    const recent = Math.min(shadow.compared, 32);
    return `KL divergence ${nats(shadow.kl_recent)} nats over the last ${recent} tokens, ${nats(shadow.kl_mean)} over all `
      + `${shadow.compared.toLocaleString()}. The most likely token is the same for ${shadow.same_top_recent} of the last `
      + `${recent}, ${shadow.same_top.toLocaleString()} of all. Full precision takes ${bytes(shadow.kv_bytes)}.`;
  }

  #draw() {
    if (this.canvas.hidden) return;
    const { canvas, shadow } = this;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const [calm, alarm] = ["--accent", "--alarm"].map((name) => style.getPropertyValue(name).trim());
    const from = Math.max(0, shadow.kl.length - BARS);
    canvas.width = BARS * 4;
    canvas.height = 96;
    for (let bar = from; bar < shadow.kl.length; bar++) {
      const share = Math.log(Math.max(shadow.kl[bar], LEAST) / LEAST) / Math.log(MOST / LEAST);
      const height = Math.max(3, Math.min(1, share) * canvas.height);
      context.fillStyle = shadow.same[bar] ? calm : alarm;
      context.fillRect((bar - from) * 4, canvas.height - height, 3, height);
    }
    const label = `Distance from full precision of the last ${shadow.kl.length - from} tokens, on a logarithmic scale.`;
    canvas.setAttribute("aria-label", label);
  }
}
