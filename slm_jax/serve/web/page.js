// The server's page: write with a run or with two side by side, look at tokens, at training curves, at tokenizers.
import { TokenCard, el, enableArrowKeys, fetchJson, legend, tokenElement } from "./pieces.js";
import { playground } from "./playground.js";
import { curves } from "./curves.js";

const $ = (id) => document.getElementById(id);
let key = "";
const withKey = () => key;

/** The parts of a stream of server-sent events, as they come. Raises Error with the server's own words. */
async function* completion(body, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch("/v1/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) {
    const tree = await answer.json().catch(() => ({}));
    throw new Error(tree.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const tree = JSON.parse(data);
      if (tree.error) throw new Error(tree.error.message);
      yield tree.choices[0];
    }
  }
}

/** One run's text. */
class Side {
  constructor(models, chosen, card) {
    const options = models.map((m) => el("option", { value: m.id, selected: m.id === chosen }, m.id || "nothing"));
    this.models = models;
    this.select = el("select", { onchange: () => this.describe() }, ...options);
    this.about = el("span", { class: "muted small" });
    this.given = el("span", { class: "given" });
    this.drawn = el("span");
    this.row = el("div", { class: "pieces", tabindex: "0", role: "region", "aria-label": "The text; arrow keys walk its tokens" },
      this.given, this.drawn);
    this.status = el("p", { class: "status muted small", role: "status" });
    const name = models[0].id ? "run" : "compare with";
    const head = el("div", { class: "side-head" }, el("label", { class: "field" }, el("span", {}, name), this.select), this.about);
    this.box = el("section", { class: "side card" }, head, this.row, this.status);
    enableArrowKeys(this.row, card);
    this.describe();
  }

  describe() {
    const model = this.models.find((m) => m.id === this.select.value);
    this.about.textContent = model?.id
      ? `${(model.parameters / 1e6).toFixed(1)} M parameters · step ${model.step.toLocaleString("en")} · context ${model.context}` : "";
    this.row.hidden = this.status.hidden = !model?.id;
  }

  async write(settings, signal) {
    const model = this.select.value;
    if (!model) return;
    this.given.textContent = settings.prompt;
    this.drawn.replaceChildren();
    this.status.classList.remove("problem");
    this.status.textContent = "waiting…";
    this.box.classList.add("writing");
    const clock = performance.now();
    let [count, first, end] = [0, 0, "stopped"];
    try {
      for await (const choice of completion({ ...settings, model, stream: true, token_details: true }, signal)) {
        first ||= performance.now() - clock;
        for (const token of choice.details) this.add({ ...token, source: model });
        count += choice.details.length;
        end = { stop: "the model ended its text", length: "as long as asked for" }[choice.finish_reason] ?? end;
        this.status.textContent = `${count} tokens`;
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        this.status.classList.add("problem");
        this.status.textContent = error.message;
        return;
      }
    } finally {
      this.box.classList.remove("writing");
    }
    const seconds = (performance.now() - clock) / 1000;
    this.status.textContent = `${count} tokens · ${(count / seconds).toFixed(0)} a second · first after ${first.toFixed(0)} ms · ${end} · seed ${settings.seed}`;
  }

  add(token) {
    const made = tokenElement(token);
    // How much of a surprise: nothing for what was certain, all for one in a thousand.
    made.style.setProperty("--surprise", `${Math.min(100, Math.max(0, (-token.logprob / 6.9) * 55)).toFixed(0)}%`);
    const follow = this.row.scrollHeight - this.row.scrollTop - this.row.clientHeight < 40;
    this.drawn.append(made);
    if (follow) this.row.scrollTop = this.row.scrollHeight;
  }
}

function settings() {
  const number = (id) => Number($(id).value);
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : number("seed");
  return {
    prompt: $("prompt").value, temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    max_tokens: number("max_tokens"), seed,
  };
}

function writing(models) {
  const explain = (token) => fetchJson(`/api/explain?vocabulary=${encodeURIComponent(token.source)}&id=${token.id}`, undefined, key);
  const card = new TokenCard(explain);
  const sides = [new Side(models, models[0].id, card), new Side([{ id: "" }, ...models], models[1]?.id ?? "", card)];
  $("sides").replaceChildren(...(models.length > 1 ? sides : sides.slice(0, 1)).map((side) => side.box));
  $("legend").replaceChildren(legend());
  $("max_tokens").max = models[0].max_tokens;
  let running;
  const stop = () => running?.abort();
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    stop();
    const mine = (running = new AbortController());
    card.hide();
    $("stop").disabled = false;
    const asked = settings();
    await Promise.all(sides.map((side) => side.write(asked, mine.signal)));
    if (running === mine) $("stop").disabled = true;
  });
  $("stop").addEventListener("click", stop);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  for (const id of ["temperature", "top_p"]) {
    $(id).addEventListener("input", () => ($(`${id}-shown`).textContent = $(id).value));
  }
  $("colours").addEventListener("change", () => {
    $("sides").classList.toggle("plain", $("colours").value === "plain");
    $("sides").classList.toggle("chances-shown", $("colours").value === "chances");
    $("legend").hidden = $("colours").value !== "kinds";
  });
}

/** Tabs as the ARIA practices have them: arrow keys move between them; a view is made when first shown. */
function tabs(makers) {
  const all = [...document.querySelectorAll("[role=tab]")];
  const made = new Set();
  const show = (tab) => {
    for (const each of all) {
      each.setAttribute("aria-selected", each === tab);
      each.tabIndex = each === tab ? 0 : -1;
      $(each.getAttribute("aria-controls")).hidden = each !== tab;
    }
    const name = tab.getAttribute("aria-controls");
    history.replaceState(null, "", `#${name}`);
    if (!made.has(name)) made.add(name), makers[name]?.().catch((error) => (made.delete(name), told(error)));
  };
  all.forEach((tab, at) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + all.length }[event.key];
      if (to !== undefined) all[to % all.length].focus(), show(all[to % all.length]);
    });
  });
  show(all.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? all[0]);
}

function told(error) {
  $("problem").hidden = false;
  $("problem").textContent = error.message;
}

async function begin() {
  try {
    const { data } = await fetchJson("/v1/models", undefined, key);
    $("unlock").hidden = true;
    writing(data);
    document.body.dataset.ready = "yes";
    tabs({
      training: () => curves($("training"), data.map((model) => model.id), withKey),
      tokenizer: () => playground($("tokenizer"), { first: data[0].id, key: withKey }),
    });
  } catch (error) {
    if (error.status !== 401) return told(error);
    $("unlock").hidden = false;
    $("key").focus();
  }
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  begin();
});
begin();
