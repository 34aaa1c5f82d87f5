// The form: which models there are, what fields each takes, and the requests that it sends.

import { key, models } from "./requests.js";
import { Panel } from "./panel.js";

const RELOAD_MS = 5000;
const TEXT_FIELDS = ["max_tokens", "temperature", "seed"];
const NO_DEFAULTS = {};

const form = document.getElementById("form");
const field = form.elements;
const problem = document.getElementById("problem");
const panels = document.getElementById("panels");
let served = [];
let running = null;

// -- models and profiles ------------------------------------------------------------------------------------------

/** The name without the profile. */
const nameOf = (model) => (model.profile ? model.id.replace(new RegExp(`:${model.profile}$`), "") : model.id);
const named = (id) => served.find((model) => model.id === id);
/** The limits of the model that does the work: of a chain, those of the model that draws. */
const limitsOf = (model) => (model.type === "pipeline" ? named(model.limits.generate)?.limits : model.limits) ?? {};
const outputOf = (model) => (model.type === "ar" ? "text" : (limitsOf(model).output ?? "image"));

/** How a model is asked: chat, images, a video job, or a chain through chat. */
const kindOf = (model) => (model.type === "pipeline" && outputOf(model) === "image" ? "chain" : outputOf(model));

const KINDS = {
  text: "Text",
  image: "Images",
  video: "Video",
  chain: "Chains: text, then image",
};

async function load() {
  try {
    served = await models();
  } catch (error) {
    say(error.message);
    if (error.status === 401 || error.status === 403) document.getElementById("access").open = true;
    else setTimeout(load, RELOAD_MS);
    return;
  }
  say("");
  for (const which of ["model", "other_model"]) fillModels(which);
  showFields();
  if (served.some((model) => !model.ready || (model.type === "dit" && !model.limits.fields))) {
    setTimeout(load, RELOAD_MS);
  }
}

function fillModels(which) {
  const chosen = field[which].value;
  const output = which === "other_model" && chosenModel("model") && outputOf(chosenModel("model"));
  const found = served.filter((model) => !output || outputOf(model) === output);
  const groups = Object.entries(KINDS).map(([kind, label]) => {
    const group = Object.assign(document.createElement("optgroup"), { label });
    const names = found.filter((model) => (model.type === "pipeline" ? "chain" : outputOf(model)) === kind).map(nameOf);
    group.append(...[...new Set(names)].map((name) => new Option(name)));
    return group;
  });
  field[which].replaceChildren(...groups.filter((group) => group.children.length));
  if ([...field[which].options].some((option) => option.value === chosen)) field[which].value = chosen;
  fillProfiles(which);
}

function fillProfiles(which) {
  const select = field[which.replace("model", "profile")];
  const chosen = select.value;
  const profiles = served.filter((model) => model.profile && nameOf(model) === field[which].value);
  select.replaceChildren(...[...new Set(profiles.map((model) => model.profile))].map((name) => new Option(name)));
  if (profiles.some((model) => model.profile === chosen)) select.value = chosen;
  else if (which === "other_model" && select.options.length > 1) select.selectedIndex = 1;
  document.querySelector(`[data-profiles="${which}"]`).hidden = select.options.length === 0;
}

function chosenModel(which) {
  const profile = field[which.replace("model", "profile")].value;
  return named(profile ? `${field[which].value}:${profile}` : field[which].value) ?? named(field[which].value);
}

const chosenModels = () =>
  ["model", ...(field.compare.checked ? ["other_model"] : [])].map(chosenModel).filter(Boolean);

// -- fields -------------------------------------------------------------------------------------------------------

/** The fields that a model takes, in view of the files that are chosen. */
function fieldsOf(model) {
  if (model.type === "ar") return new Set(TEXT_FIELDS);
  const { fields = [], edits = {}, output } = limitsOf(model);
  const files = edits.mask ? ["image", "mask"] : edits.image || fields.includes("image") ? ["image"] : [];
  const edit = field.image.files.length && !fields.includes("image");
  const taken = edit ? ((field.mask.files.length && edits.mask) || edits.image || fields) : fields;
  return new Set([...taken, ...files, "seed", ...(output === "video" ? ["fps"] : ["partial_images"])]);
}

function showFields() {
  const chosen = chosenModels();
  if (!chosen.length) return;
  const limits = limitsOf(chosen[0]);
  const taken = chosen.map(fieldsOf);
  const defaults = limits.defaults ?? NO_DEFAULTS;
  document.getElementById("other").hidden = !field.compare.checked;
  for (const label of form.querySelectorAll("[data-needs]")) {
    const name = label.dataset.needs;
    const input = label.querySelector("input, select");
    label.hidden = !taken.every((fields) => fields.has(name));
    const usual = name === "width" ? `${defaults.width}x${defaults.height}` : (defaults[name] ?? limits[name]);
    if (usual !== undefined && input.placeholder !== undefined) input.placeholder = usual;
  }
}

/** The fields that are shown and filled, under their names in the API. */
function filled() {
  const said = {};
  for (const label of form.querySelectorAll("[data-needs]:not([hidden])")) {
    const input = label.querySelector("input, select");
    if (input.type === "file" || !input.value.trim()) continue;
    said[input.name] = input.type === "number" || input.tagName === "SELECT" ? Number(input.value) : input.value.trim();
  }
  return said;
}

function files() {
  const chosen = ["image", "mask"].filter((name) => !field[name].closest("label").hidden && field[name].files.length);
  return Object.fromEntries(chosen.map((name) => [name, field[name].files[0]]));
}

/** What is wrong with what was typed, in words, and where; nothing if it can be sent. */
function mistake() {
  if (!chosenModels().length) return ["There is no model to choose; the server is still starting.", field.model];
  if (!field.prompt.value.trim()) return ["Type a prompt first.", field.prompt];
  const wrong = [...form.querySelectorAll("label:not([hidden]) input")].find((input) => !input.validity.valid);
  return wrong && [`${wrong.closest("label").innerText.trim()}: ${wrong.validationMessage}`, wrong];
}

function say(message) {
  problem.textContent = message;
  problem.hidden = !message;
}

// -- requests -----------------------------------------------------------------------------------------------------

async function send() {
  if (running) return;
  const wrong = mistake();
  say(wrong?.[0] ?? "");
  if (wrong) return wrong[1].focus();
  const chosen = chosenModels();
  const asked = filled();
  if (chosen.length > 1) asked.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  running = new AbortController();
  showRunning();
  const made = chosen.map((model) => new Panel(model.id, kindOf(model)));
  for (const old of panels.children) old.dispatchEvent(new Event("dropped"));
  panels.replaceChildren(...made.map((panel) => panel.element));
  panels.classList.toggle("two", made.length > 1);
  if (panels.getBoundingClientRect().top > innerHeight / 2) panels.scrollIntoView({ block: "start" }); // below the form
  const prompt = field.prompt.value.trim();
  await Promise.all(made.map((panel) => panel.run(prompt, asked, files(), running.signal)));
  running = null;
  showRunning();
}

function cancel() {
  running?.abort();
}

function showRunning() {
  const button = document.getElementById("cancel");
  if (!running && document.activeElement === button) field.prompt.focus();
  button.disabled = !running;
  document.getElementById("send").setAttribute("aria-disabled", String(Boolean(running)));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
form.addEventListener("change", ({ target }) => {
  if (target === field.model || target === field.profile) {
    fillProfiles("model");
    fillModels("other_model");
  } else if (target === field.other_model) fillProfiles("other_model");
  if (target === field.key) {
    key.set(target.value.trim());
    load();
  }
  showFields();
});
field.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") cancel();
});
document.getElementById("cancel").addEventListener("click", cancel);

field.key.value = key.get();
field.prompt.focus();
load();
