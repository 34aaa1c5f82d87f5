// What the page asks of the API. Each request is an async generator of what happens, as plain objects:
//   {state: "queued", position, start_s, seconds_left}, {state: "running", step, num_steps, computed, seconds_left},
//   {text}, {thought}, {tokens}, {caption}, {preview, step}, {image} or {video}, {cost}, {note}.
// Aborting the signal ends the work on the server too.

const ROOT = new URL("..", import.meta.url);
const POLL_MS = 500;
const KEY = "omni_ray.key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The models that the server has, as /v1/models tells them. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** An LLM's answer. `fields` are those of /v1/chat/completions beside model and messages. */
export async function* chat(model, prompt, fields, signal) {
  const usage = { include_usage: true, continuous_usage_stats: true };
  const body = { model, messages: [{ role: "user", content: prompt }], stream: true, stream_options: usage, ...fields };
  for await (const chunk of events(await call("v1/chat/completions", { body, signal }))) {
    const delta = chunk.choices[0]?.delta ?? {};
    const thought = delta.reasoning ?? delta.reasoning_content;
    if (thought) yield { thought };
    if (delta.content) yield { text: delta.content };
    if (chunk.usage) yield { tokens: chunk.usage };
  }
}

/** An image of a model that draws; with `files`, drawn from them. */
export async function* draw(model, prompt, fields, files, signal) {
  const asked = { model, prompt, stream: true, progress: true, ...fields };
  const path = files.image ? "v1/images/edits" : "v1/images/generations";
  const body = files.image ? form(asked, files) : asked;
  for await (const event of events(await call(path, { body, signal }))) {
    const url = event.b64_json && `data:image/${event.output_format};base64,${event.b64_json}`;
    const kind = event.type.split(".")[1];
    if (kind === "progress") yield event;
    else if (kind === "partial_image") yield { preview: url, step: event.step };
    else {
      if (event.revised_prompt) yield { caption: event.revised_prompt };
      yield { image: url };
      yield { cost: event.omni };
      return;
    }
  }
  throw new ApiError("The connection ended before the image was whole; send it again.");
}

/** A chain's caption and image, through chat, which tells the caption before it is drawn. */
export async function* chain(model, prompt, fields, signal) {
  const messages = [{ role: "user", content: prompt }];
  const body = { model, messages, stream: true, progress: true, ...fields };
  for await (const chunk of events(await call("v1/chat/completions", { body, signal }))) {
    const { delta, finish_reason } = chunk.choices[0];
    for (const part of delta.content ?? []) {
      if (part.type === "text") yield { caption: part.text };
      else if (chunk.omni) yield { preview: part.image_url.url, step: chunk.omni.step };
      else yield { image: part.image_url.url };
    }
    if (finish_reason) {
      yield { cost: chunk.omni };
      return;
    }
    if (chunk.omni?.state) yield chunk.omni;
  }
  throw new ApiError("The connection ended before the image was whole; send it again.");
}

/** A video: a job that is created, polled and downloaded. */
export async function* video(model, prompt, fields, files, signal) {
  const asked = { model, prompt, ...fields };
  const body = files.image ? form(asked, { input_reference: files.image }) : asked;
  let job = await (await call("v1/videos", { body })).json(); // not aborted, as its id is needed to cancel it
  let skipped = 0;
  try {
    while (["queued", "in_progress"].includes(job.status)) {
      if (job.status === "queued") yield { ...job, state: "queued", position: job.queue_position };
      else {
        const since = job.steps_skipped - skipped; // which of the steps since the last poll is not told
        if (since > 0) yield { ...job, state: "running", step: job.step - since };
        yield { ...job, state: "running", computed: since <= 0 };
        skipped = job.steps_skipped;
      }
      await pause(POLL_MS, signal);
      try {
        job = await (await call(`v1/videos/${job.id}`, { signal })).json();
      } catch (error) {
        if (signal.aborted || (error.status && error.status < 500)) throw error;
        yield { note: "The server does not answer; asking again." };
      }
    }
  } catch (error) {
    if (signal.aborted) await call(`v1/jobs/${job.id}/cancel`, { method: "POST" });
    throw error;
  }
  if (job.error) throw new ApiError(job.error.message);
  yield { video: URL.createObjectURL(await (await call(`v1/videos/${job.id}/content`, { signal })).blob()) };
  yield { cost: job.omni };
}

async function call(path, { body, signal, method = body ? "POST" : "GET" } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const isForm = body instanceof FormData;
  if (body && !isForm) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { method, headers, signal, body: isForm ? body : JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server does not answer.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  let message;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = `The server answered ${response.status}: ${text.slice(0, 300)}`;
  }
  const retry = response.headers.get("Retry-After");
  return new ApiError(retry ? `${message} (try again in ${retry} s)` : message, response.status);
}

function form(fields, files) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  for (const [name, file] of Object.entries(files)) if (file) data.append(name, file, file.name);
  return data;
}

/** The events of a stream as objects; an error in it is thrown. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split(/\r?\n\r?\n/);
      rest = pieces.pop();
      for (const piece of pieces) {
        const lines = piece.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trim()).join("\n");
        if (!data || data === "[DONE]") continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function pause(ms, signal) {
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
