// The chat view: a conversation with one model, whose tokens can be inspected.
import { el, enableArrowKeys, tokenElement } from "./pieces.js";
import { randomSeed, streamEvents, surprise } from "./stream.js";

const FINISH_REASONS = { stop: "end of turn", length: "token limit reached" };
const counted = (count) => `${count} ${count === 1 ? "token" : "tokens"}`;
const $ = (id) => document.getElementById(id);

/** A message in the list: the text of the user, or the tokens of an answer with a line of figures. */
class Turn {
  constructor(role, card, text = "") {
    this.role = role;
    this.text = text;
    this.row = role === "user" ? el("p", { class: "said" }, text)
      : el("div", { class: "pieces", tabindex: "0", role: "group", "aria-label": "Answer; arrow keys move between tokens" });
    this.status = el("p", { class: "status muted small" });
    this.box = el("li", { class: `turn turn-${role}` }, el("span", { class: "who" }, role === "user" ? "You" : "Model"), this.row,
      role === "user" ? null : this.status);
    if (role === "assistant") enableArrowKeys(this.row, card);
  }

  append(choice, model) {
    const content = choice.delta.content ?? "";
    const tokens = choice.details ?? [];
    this.text += content;
    for (const token of tokens) {
      const element = tokenElement({ ...token, source: model });
      element.style.setProperty("--surprise", surprise(token.logprob));
      this.row.append(element);
    }
    this.row.append(content.slice(tokens.map((token) => token.text).join("").length)); // an incomplete character at the end
  }
}

/** Set up the view; returns { show }, which takes the models that are served from now on. */
export function chatView(models, apiKey, card) {
  const turns = [];
  const list = $("turns");
  const input = $("message");
  const status = $("chat-status");
  let current; // the AbortController of the answer that is being generated

  const selected = () => models.find((model) => model.id === $("chat-model").value);
  const describe = () => {
    const model = selected();
    $("chat-note").hidden = model.chat && model.chat_trained;
    $("chat-note").textContent = model.chat
      ? "This run was not trained on conversations: it continues them as it would continue any text."
      : "The tokenizer of this run has no chat template: use the view Generate.";
    $("send").disabled = !model.chat;
    $("chat-max").max = model.max_tokens;
  };
  const show = (served) => {
    models = served;
    const wanted = $("chat-model").value || (models.find((model) => model.chat_trained) ?? models[0]).id;
    $("chat-model").replaceChildren(...models.map(({ id }) => el("option", { value: id, selected: id === wanted }, id)));
    $("chat-model-field").hidden = models.length === 1;
    describe();
  };
  const report = (text, isProblem = false) => {
    status.textContent = text;
    status.classList.toggle("problem", isProblem);
  };
  const enable = () => {
    const busy = Boolean(current);
    $("chat-stop").disabled = !busy;
    $("retry").disabled = busy || !turns.length;
    $("new-chat").disabled = busy || !turns.length;
    $("export").disabled = busy || !turns.length;
    $("chat-empty").hidden = Boolean(turns.length);
  };
  const messages = () => {
    const system = $("system").value.trim();
    return [...(system ? [{ role: "system", content: system }] : []), ...turns.map(({ role, text }) => ({ role, content: text }))];
  };
  const follow = () => scrollTo(0, document.documentElement.scrollHeight); // the form covers the end of the list
  const add = (turn) => {
    turns.push(turn);
    list.append(turn.box);
    follow();
    return turn;
  };
  const remove = () => turns.pop().box.remove();

  async function answer() {
    const controller = (current = new AbortController());
    const model = $("chat-model").value;
    const seed = $("chat-seed").value === "" ? randomSeed() : Number($("chat-seed").value);
    const limit = $("chat-max").value === "" ? {} : { max_completion_tokens: Number($("chat-max").value) };
    const body = { model, messages: messages(), temperature: Number($("chat-temperature").value), top_p: Number($("chat-top_p").value),
      ...limit, seed, token_details: true, stream_options: { include_usage: true } };
    const turn = add(new Turn("assistant", card));
    turn.box.classList.add("generating");
    report("The model answers…");
    enable();
    const start = performance.now();
    let count = 0;
    let first = 0;
    let end = "stopped";
    let reused = 0;
    let atEnd = true; // whether the end of the page is in view, which then stays there
    try {
      for await (const event of streamEvents("/v1/chat/completions", body, apiKey(), controller.signal)) {
        reused = event.usage?.prompt_tokens_details.cached_tokens ?? reused;
        const choice = event.choices[0];
        if (!choice) continue;
        if (choice.details?.length) first ||= performance.now() - start;
        atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
        turn.append(choice, model);
        count += choice.details?.length ?? 0;
        end = FINISH_REASONS[choice.finish_reason] ?? end;
        turn.status.textContent = counted(count);
        if (atEnd) follow();
      }
      report("");
    } catch (error) {
      report(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
    }
    turn.box.classList.remove("generating");
    current = undefined;
    if (!count && end === "stopped") { // nothing was generated: the message goes back to the field
      remove();
      input.value ||= turns.at(-1).text;
      remove();
    } else {
      const seconds = (performance.now() - start) / 1000;
      turn.status.textContent = [counted(count), `${(count / seconds).toFixed(0)} tokens/s`, `first token after ${first.toFixed(0)} ms`,
        end, `seed ${seed}`, ...(reused ? [`${counted(reused)} reused`] : [])].join(" · ");
      if (!status.textContent) report(`Answer complete, ${counted(count)}.`);
    }
    enable();
    if (atEnd) follow();
  }

  const stop = () => current?.abort();
  const clear = () => {
    stop();
    card.hide();
    while (turns.length) remove();
    report("");
    enable();
    input.focus();
  };

  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current || !input.value.trim()) return;
    card.hide();
    add(new Turn("user", card, input.value));
    input.value = "";
    answer();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat-form").requestSubmit();
  });
  addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("chat-stop").addEventListener("click", stop);
  $("retry").addEventListener("click", () => {
    if (turns.at(-1).role === "assistant") remove();
    answer();
  });
  $("new-chat").addEventListener("click", clear);
  $("export").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([`${JSON.stringify({ messages: messages() })}\n`], { type: "application/json" }));
    el("a", { href: url, download: "conversation.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  $("chat-model").addEventListener("change", describe);
  $("chat-color").addEventListener("change", () => {
    list.classList.toggle("no-colors", $("chat-color").value === "none");
    list.classList.toggle("probability-colors", $("chat-color").value === "probability");
  });
  for (const id of ["chat-temperature", "chat-top_p"]) {
    $(id).addEventListener("input", () => ($(`${id}-shown`).textContent = $(id).value));
  }
  show(models);
  enable();
  return { show };
}
