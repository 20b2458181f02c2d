// The server's page: text generation with one or two runs, a chat, learning curves, and the tokenizer playground.
import { TokenCard, el, enableArrowKeys, fetchJson, legend, tokenElement } from "./pieces.js";
import { playground } from "./playground.js";
import { chatView } from "./chat.js";
import { curves } from "./curves.js";
import { randomSeed, streamEvents, surprise } from "./stream.js";

const $ = (id) => document.getElementById(id);
let key = "";
const apiKey = () => key;

const FINISH_REASONS = { stop: "end of document", length: "token limit reached" };

/** The text of one run. */
class Panel {
  constructor(models, selected, card) {
    const options = models.map((m) => el("option", { value: m.id, selected: m.id === selected }, m.id || "nothing"));
    this.models = models;
    this.select = el("select", { onchange: () => this.describe() }, ...options);
    this.description = el("span", { class: "muted small" });
    this.prompt = el("span", { class: "prompt-text" });
    this.generated = el("span");
    this.row = el("div", { class: "pieces", tabindex: "0", role: "region",
      "aria-label": "Generated text; arrow keys move between tokens" }, this.prompt, this.generated);
    this.status = el("p", { class: "status muted small", role: "status" });
    const label = models[0].id ? "run" : "compare with";
    const head = el("div", { class: "side-head" }, el("label", { class: "field" }, el("span", {}, label), this.select),
      this.description);
    this.box = el("section", { class: "panel card" }, head, this.row, this.status);
    enableArrowKeys(this.row, card);
    this.describe();
  }

  describe() {
    const model = this.models.find((m) => m.id === this.select.value);
    this.description.textContent = model?.id
      ? `${(model.parameters / 1e6).toFixed(1)} M parameters · step ${model.step.toLocaleString("en")} · context ${model.context}` : "";
    this.row.hidden = this.status.hidden = !model?.id;
  }

  async generate(settings, signal) {
    const model = this.select.value;
    if (!model) return;
    this.prompt.textContent = settings.prompt;
    this.generated.replaceChildren();
    this.status.classList.remove("problem");
    this.status.textContent = "waiting…";
    this.box.classList.add("generating");
    const start = performance.now();
    let count = 0;
    let firstToken = 0;
    let end = "stopped";
    try {
      const body = { ...settings, model, token_details: true };
      for await (const { choices: [choice] } of streamEvents("/v1/completions", body, key, signal)) {
        firstToken ||= performance.now() - start;
        for (const token of choice.details) this.append({ ...token, source: model });
        count += choice.details.length;
        end = FINISH_REASONS[choice.finish_reason] ?? end;
        this.status.textContent = `${count} tokens`;
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        this.status.classList.add("problem");
        this.status.textContent = error.message;
        return;
      }
    } finally {
      this.box.classList.remove("generating");
    }
    const seconds = (performance.now() - start) / 1000;
    this.status.textContent = [
      `${count} tokens`, `${(count / seconds).toFixed(0)} tokens/s`, `first token after ${firstToken.toFixed(0)} ms`, end,
      `seed ${settings.seed}`,
    ].join(" · ");
  }

  append(token) {
    const element = tokenElement(token);
    element.style.setProperty("--surprise", surprise(token.logprob));
    const atEnd = this.row.scrollHeight - this.row.scrollTop - this.row.clientHeight < 40;
    this.generated.append(element);
    if (atEnd) this.row.scrollTop = this.row.scrollHeight;
  }
}

function readSettings() {
  const number = (id) => Number($(id).value);
  const seed = $("seed").value === "" ? randomSeed() : number("seed");
  return {
    prompt: $("prompt").value, temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    max_tokens: number("max_tokens"), seed,
  };
}

const explain = (token) => fetchJson(`/api/explain?vocabulary=${encodeURIComponent(token.source)}&id=${token.id}`, undefined, key);

function setUpGeneration(models, card) {
  let panels;
  const show = (shown) => {
    models = shown;
    panels = [new Panel(models, models[0].id, card), new Panel([{ id: "" }, ...models], models[1]?.id ?? "", card)];
    $("panels").replaceChildren(...(models.length > 1 ? panels : panels.slice(0, 1)).map((panel) => panel.box));
    $("max_tokens").max = models[0].max_tokens;
  };
  show(models);
  $("legend").replaceChildren(legend());
  const onload = (steps) => { // of the served models by name: another one may have taken the place of one of them
    if (models.some(({ id }) => !(id in steps)) || Object.keys(steps).length !== models.length) return false;
    models.forEach((model) => (model.step = steps[model.id]));
    panels.forEach((panel) => panel.describe());
    return true;
  };
  let current; // the AbortController of the text being generated
  const stop = () => current?.abort();
  $("generation-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    stop();
    const controller = (current = new AbortController());
    card.hide();
    $("stop").disabled = false;
    const settings = readSettings();
    await Promise.all(panels.map((panel) => panel.generate(settings, controller.signal)));
    if (current === controller) $("stop").disabled = true;
  });
  $("stop").addEventListener("click", stop);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("generate").hidden) $("generation-form").requestSubmit();
  });
  for (const id of ["temperature", "top_p"]) {
    $(id).addEventListener("input", () => ($(`${id}-shown`).textContent = $(id).value));
  }
  $("color-by").addEventListener("change", () => {
    $("panels").classList.toggle("no-colors", $("color-by").value === "none");
    $("panels").classList.toggle("probability-colors", $("color-by").value === "probability");
    $("legend").hidden = $("color-by").value !== "kind";
  });
  return { onload, show: (shown) => (stop(), card.hide(), show(shown)) };
}

/** Set up the tabs by the ARIA tab pattern: arrow keys move between them; a view is built when it is first shown. */
function setUpTabs(builders) {
  const all = [...document.querySelectorAll("[role=tab]")];
  const built = new Set();
  const show = (tab) => {
    for (const other of all) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
      $(other.getAttribute("aria-controls")).hidden = other !== tab;
    }
    const name = tab.getAttribute("aria-controls");
    history.replaceState(null, "", `#${name}`);
    if (built.has(name)) return;
    built.add(name);
    builders[name]?.().catch((error) => {
      built.delete(name);
      showError(error);
    });
  };
  all.forEach((tab, index) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1 + all.length }[event.key];
      if (to === undefined) return;
      all[to % all.length].focus();
      show(all[to % all.length]);
    });
  });
  show(all.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? all[0]);
  return (name) => built.delete(name); // it is built again when it is shown
}

function showError(error) {
  $("error").hidden = false;
  $("error").textContent = error.message;
}

/** Show the progress of compilation until it is complete; requests are answered meanwhile. */
async function followCompilation() {
  const response = await fetch("/health?code=200").catch(() => null);
  const { starting = {} } = (await response?.json().catch(() => null)) ?? {};
  const models = Object.entries(starting);
  $("starting").hidden = !models.length;
  $("starting").textContent = `Compiling: ${models.map(([name, { done, total }]) => `${name} ${done} of ${total}`).join(", ")}. `
    + "Texts are generated already; the first ones take longer.";
  if (models.length) setTimeout(followCompilation, 1000);
}

async function start() {
  try {
    const { data } = await fetchJson("/v1/models", undefined, key);
    $("unlock").hidden = true;
    const card = new TokenCard(explain);
    const generation = setUpGeneration(data, card);
    const chat = chatView(data, apiKey, card);
    if (data.some((model) => model.chat_trained)) $("tab-generate").before($("tab-chat")); // the first view
    let shown = data.map((model) => model.id);
    const onload = async (steps) => {
      if (generation.onload(steps)) return;
      const { data: models } = await fetchJson("/v1/models", undefined, key).catch(() => ({})); // the server may be back later
      if (!models || models.map((model) => model.id).join("\n") === shown.join("\n")) return;
      generation.show(models);
      chat.show(models);
      shown = models.map((model) => model.id);
      rebuild("tokenizer");
      followCompilation();
    };
    document.body.dataset.ready = "yes";
    const rebuild = setUpTabs({
      training: () => curves($("training"), apiKey, onload),
      tokenizer: () => playground($("tokenizer"), { first: shown[0], key: apiKey }),
    });
  } catch (error) {
    if (error.status !== 401) return showError(error);
    $("unlock").hidden = false;
    $("key").focus();
  }
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  start();
});
followCompilation();
start();
