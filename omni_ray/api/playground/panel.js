// One result: the text, image or video as it comes to be, how far it is, and what it cost.

import { chain, chat, draw, video } from "./requests.js";

const DENSE = 100; // steps, from which on the strip has no gaps

export class Panel {
  /** `kind` is text, image, video or chain. */
  constructor(model, kind) {
    this.model = model;
    this.kind = kind;
    this.element = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.element.querySelector(selector);
    this.find("h2").textContent = model;
    this.element.addEventListener("dropped", () => this.url?.startsWith("blob:") && URL.revokeObjectURL(this.url));
  }

  /** Ends when the request has: done, failed or cancelled, which the panel shows. */
  async run(prompt, fields, files, signal) {
    this.began = performance.now();
    this.alt = prompt;
    this.state("waiting", "Sent");
    try {
      for await (const event of this.events(prompt, fields, files, signal)) this.show(event);
      this.now("");
      this.state("done", `Done in ${seconds(performance.now() - this.began)}`);
    } catch (error) {
      this.now("");
      if (signal.aborted) return this.state("cancelled", this.at ? `Cancelled after ${this.at}` : "Cancelled");
      this.state("failed", "Failed");
      this.find(".problem").textContent = error.message;
      this.find(".problem").hidden = false;
    }
  }

  events(prompt, fields, files, signal) {
    if (this.kind === "text") return chat(this.model, prompt, fields, signal);
    if (this.kind === "video") return video(this.model, prompt, fields, files, signal);
    if (this.kind === "chain" && !files.image) return chain(this.model, prompt, fields, signal);
    return draw(this.model, prompt, fields, files, signal);
  }

  show(event) {
    if (event.state === "queued") this.showQueued(event);
    else if (event.state === "running") this.showStep(event);
    if (event.text || event.thought) this.showText(event);
    if (event.tokens) this.showTokens(event.tokens);
    if (event.caption) this.showCaption(event.caption);
    if (event.preview) this.showPreview(event);
    if (event.image || event.video) this.showMedia(event);
    if (event.cost) this.showCost(event.cost);
    if (event.note) this.now(event.note);
  }

  /** The status is read out, so it changes seldom; the line below it may change at every step. */
  state(state, words) {
    this.element.dataset.state = state;
    const status = this.find(".state");
    if (status.textContent !== words) status.textContent = words;
  }

  now(words) {
    this.find(".now").textContent = words;
  }

  showQueued({ position, start_s, seconds_left }) {
    const ahead = position ? `Queued, ${position} before it` : "Queued, next in line";
    this.state("queued", ahead);
    this.now([start_s && `starts in about ${left(start_s)}`, seconds_left && `${left(seconds_left)} left`]
      .filter(Boolean).join(" · "));
  }

  showStep({ step, num_steps, computed, seconds_left }) {
    this.state("running", "Running");
    this.strip(step, num_steps, computed === false ? "skipped" : "computed");
    if (num_steps) this.at = `step ${step} of ${num_steps}`;
    const skip = computed === false && " (skipped)";
    this.now([this.at && `${this.at}${skip || ""}`, seconds_left != null && `${left(seconds_left)} left`]
      .filter(Boolean).join(" · "));
  }

  /** A mark for each step; those up to `step` that have none yet get `mark`. */
  strip(step, num_steps, mark) {
    const strip = this.find(".strip");
    if (!num_steps) return;
    if (strip.children.length !== num_steps) {
      strip.replaceChildren(...Array.from({ length: num_steps }, () => document.createElement("span")));
      strip.classList.toggle("dense", num_steps > DENSE);
      strip.hidden = false;
    }
    for (const each of [...strip.children].slice(0, step)) each.className ||= mark;
    strip.setAttribute("aria-valuemax", num_steps);
    strip.setAttribute("aria-valuenow", step);
    strip.setAttribute("aria-valuetext", `step ${step} of ${num_steps}`);
  }

  showText({ text, thought }) {
    if (!this.first) {
      this.first = performance.now();
      this.state("running", "Running");
      this.fact("First token", seconds(this.first - this.began));
    }
    const span = document.createElement("span");
    span.textContent = text ?? thought;
    if (thought) span.className = "thought";
    this.find(".text").append(span);
    this.find(".text").hidden = false;
  }

  /** The speed is that of the tokens after the first piece, which may have held several. */
  showTokens({ prompt_tokens, completion_tokens }) {
    if (!this.first) return;
    this.numFirst ??= completion_tokens;
    const span = (performance.now() - this.first) / 1000;
    const num = completion_tokens - this.numFirst;
    this.fact("Prompt", `${prompt_tokens} tokens`);
    this.fact("Answer", `${completion_tokens} tokens`);
    if (num && span) this.fact("Speed", `${(num / span).toFixed(1)} tokens/s`);
  }

  showCaption(caption) {
    this.find(".caption").textContent = this.alt = caption;
    this.find(".caption").hidden = false;
  }

  showPreview({ preview, step }) {
    this.state("running", `Preview after step ${step}`);
    this.picture(preview, `Preview after step ${step}: ${this.alt}`);
    const item = document.createElement("li");
    item.append(Object.assign(new Image(), { src: preview, alt: "" }), `after step ${step}`);
    this.find(".previews").append(item);
    this.find(".previews").hidden = false;
  }

  showMedia({ image, video }) {
    this.url = image ?? video;
    if (image) this.picture(image, this.alt);
    else {
      Object.assign(this.find("video"), { src: video, hidden: false, ariaLabel: this.alt });
      this.find("figure").hidden = false;
      this.find("video").play().catch(() => {}); // where a browser plays nothing by itself, there are the controls
    }
    const kind = image ? image.slice("data:image/".length, image.indexOf(";")) : "mp4";
    Object.assign(this.find(".save"), { href: this.url, download: `${this.model.replace(":", "-")}.${kind}` });
    this.find(".save").hidden = false;
  }

  picture(src, alt) {
    Object.assign(this.find("figure img"), { src, alt, hidden: false });
    this.find("figure").hidden = false;
  }

  showCost(cost) {
    const { steps_computed, steps_skipped } = cost;
    this.strip(steps_computed + steps_skipped, steps_computed + steps_skipped, "computed");
    this.fact("Steps computed", steps_computed);
    this.fact("Steps skipped", steps_skipped);
    this.fact("Device time", seconds(1000 * cost.device_s));
    this.fact("In the queue", seconds(1000 * cost.queue_s));
    this.fact("Run", seconds(1000 * cost.run_s));
    this.fact("Peak memory", cost.peak_memory_gib ? `${cost.peak_memory_gib.toFixed(1)} GiB` : "not measured");
    if (cost.cache !== "none") this.fact("Cache", cost.cache);
    if (cost.offload_hidden_s || cost.offload_paid_s) {
      this.fact("Offload", `${cost.offload_paid_s.toFixed(2)} s paid, ${cost.offload_hidden_s.toFixed(2)} s hidden`);
    }
    this.fact("Seed", cost.seed);
    this.find(".warnings").append(
      ...cost.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
    this.find(".warnings").hidden = !cost.warnings.length;
  }

  fact(name, value) {
    this.facts ??= new Map();
    if (!this.facts.has(name)) {
      const row = document.createElement("div");
      row.append(Object.assign(document.createElement("dt"), { textContent: name }), document.createElement("dd"));
      this.find(".facts").append(row);
      this.facts.set(name, row.lastChild);
    }
    this.facts.get(name).textContent = value;
  }
}

const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
const left = (s) => (s < 90 ? `${s.toFixed(1)} s` : `${Math.round(s / 60)} min`);
