// Learning curves of the served runs as inline SVG.
import { el, fetchJson } from "./pieces.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 280, 50, 14, 10, 30];
const CHARTS = [
  { title: "Loss", unit: "nats per token", lines: [["val_loss", "validation"], ["loss", "training"]] },
  { title: "Validation bits per byte", unit: "bits", lines: [["val_bits_per_byte", "validation"]] },
  { title: "Learning rate", unit: "", lines: [["lr", ""]] },
];

/** Return about `count` round values within [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [10, 5, 2, 1].map((m) => m * power).find((s) => s <= rough * 1.4);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) values.push(value);
  return values;
}

const format = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3)));

function chart({ title, unit, lines }, runs) {
  const series = runs.flatMap(({ name, points }, number) => lines.flatMap(([field, label], index) => points[field]?.length
    ? [{ name: [runs.length > 1 ? name : "", label].filter(Boolean).join(", "), points: points[field], number, faint: index > 0, dots: field.startsWith("val_") }] : []));
  if (!series.length) return null;
  const all = series.flatMap((s) => s.points);
  const [x0, x1] = [0, Math.max(...all.map((p) => p[0]))];
  const values = all.map((p) => p[1]);
  const pad = (Math.max(...values) - Math.min(...values)) * 0.05 || 1;
  const [y0, y1] = [Math.max(0, Math.min(...values) - pad), Math.max(...values) + pad];
  const x = (step) => LEFT + ((step - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0",
    "aria-label": `${title}: ${series.map((s) => `${s.name || title} ends at ${format(s.points.at(-1)[1])}`).join("; ")}` });
  for (const value of ticks(y0, y1, 5)) {
    svg.append(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      el("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const step of ticks(x0, x1, 6)) {
    svg.append(el("text", { x: x(step), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, step.toLocaleString("en")));
  }
  for (const { points, number, faint, dots } of [...series].reverse()) {
    const path = points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(el("path", { class: `line-${number + 1}${faint ? " faint" : ""}`, d: path, fill: "none" }));
    if (dots && points.length <= 40) {
      svg.append(...points.map(([step, value]) => el("circle", { class: `line-${number + 1}`, cx: x(step), cy: y(value), r: 3 })));
    }
  }
  const cross = el("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(cross);
  const readout = el("p", { class: "readout small", "aria-live": "polite" });
  const showStep = (step) => {
    cross.setAttribute("x1", x(step));
    cross.setAttribute("x2", x(step));
    const values = series.map(({ name, points }) => {
      const nearest = points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));
      return `${name || "value"} ${format(nearest[1])}`;
    });
    readout.textContent = `step ${Math.round(step).toLocaleString("en")}: ${values.join(" · ")}`;
  };
  const showFinalValues = () => {
    cross.setAttribute("x1", -9);
    cross.setAttribute("x2", -9);
    readout.replaceChildren(...series.map((s) => el("span", { class: "nowrap" }, el("i", { class: `key-line line-${s.number + 1}${s.faint ? " faint" : ""}` }),
      `${s.name ? `${s.name} ` : ""}${format(s.points.at(-1)[1])}`)));
  };
  let step = x1;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    showStep((step = x0 + Math.min(Math.max(share, 0), 1) * (x1 - x0)));
  });
  svg.addEventListener("pointerleave", showFinalValues);
  svg.addEventListener("blur", showFinalValues);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move) event.preventDefault(), showStep((step = Math.min(Math.max(step + (move * (x1 - x0)) / 50, x0), x1)));
  });
  showFinalValues();
  const head = el("h3", {}, title, unit ? el("span", { class: "muted small" }, ` ${unit}`) : null);
  return el("figure", { class: "chart card" }, head, svg, readout);
}

const POLL_MS = 4000;
const count = (value) => value.toLocaleString("en");

/** The line about one run: its progress, a newer checkpoint than the one that is served or the run itself to serve, its report. */
function runStatus(run, { key, load, served }) {
  const parts = [`${run.id}: step ${count(run.step)} of ${count(run.steps)}`];
  if (run.loaded !== null) parts.push(`step ${count(run.loaded)} is served`);
  const line = el("p", { class: "run-status small" }, el("span", {}, parts.join(", ")));
  if (run.loaded !== null && run.saved !== null && run.saved !== run.loaded) {
    line.append(el("button", { type: "button", class: "load", onclick: (event) => load(run, event.target) },
      `Load step ${count(run.saved)}`));
  }
  if (run.loaded === null && run.saved !== null) {
    line.append(...served.map((model) => el("button", { type: "button", class: "serve", title: "Requests in progress end with the model that they began with.",
      onclick: (event) => load(run, event.target, model) }, `Serve in place of ${model}`)));
  }
  if (run.report && !key()) {
    line.append(el("a", { href: `/api/report?run=${encodeURIComponent(run.id)}`, target: "_blank", rel: "noopener" }, "Report"));
  }
  return line;
}

/** Why the losses of two runs cannot be compared; "" if they can. */
function caution([first, second]) {
  if (!second) return "";
  if (first.objective !== second.objective) {
    return `These runs have different objectives (${first.objective}, ${second.objective}): their losses cannot be compared.`;
  }
  if (first.held_out !== second.held_out || !first.held_out) {
    return "These runs are validated on different text: their validation losses and bits per byte cannot be compared.";
  }
  if (first.tokenizer !== second.tokenizer) {
    return "These runs have different tokenizers: compare their bits per byte, not their losses per token.";
  }
  return "";
}

/** Fetch the curves of runs with the same number of steps per point. */
async function fetchCurves(runs, key) {
  const fetchOne = (run, width = 0) =>
    fetchJson(`/api/curve?run=${encodeURIComponent(run.id)}${width ? `&width=${width}` : ""}`, undefined, key());
  const points = await Promise.all(runs.map((run) => fetchOne(run)));
  const width = Math.max(...points.map((each) => each.width));
  return Promise.all(points.map((each, index) => (each.width === width ? each : fetchOne(runs[index], width))));
}

/**
 * Fill an element with the charts of one or two runs, and follow them while they train.
 * `key` returns the API key; `onload` is called with the step that each model is served at, by name.
 */
export async function curves(root, key, onload = () => {}) {
  const fetchRuns = async () => (await fetchJson("/api/runs", undefined, key())).runs;
  root.replaceChildren(el("p", { class: "muted" }, "Loading…"));
  let runs = await fetchRuns();
  const select = (label, chosen, none) => el("select", { "aria-label": label },
    ...(none ? [el("option", { value: "" }, "no second run")] : []),
    ...runs.map((run) => el("option", { value: run.id, selected: run.id === chosen }, run.id)));
  const served = runs.filter((run) => run.loaded !== null);
  const selects = [select("Run", runs[0]?.id)];
  if (runs.length > 1) selects.push(select("Second run", served[1]?.id ?? "", true));
  const status = el("div", { class: "run-states", role: "status" });
  const note = el("p", { class: "caution small", role: "note", hidden: true });
  const charts = el("div", { class: "charts" });
  let shown = "";
  const fill = (chosen, points) => {
    const state = JSON.stringify([chosen.map((run) => run.id), points]);
    if (state === shown) return;
    shown = state;
    const focused = [...charts.querySelectorAll("svg")].indexOf(document.activeElement);
    const figures = CHARTS.map((spec) => chart(spec, chosen.map((run, i) => ({ name: run.id, points: points[i] })))).filter(Boolean);
    charts.replaceChildren(...(figures.length ? figures : ["This run has no metrics yet."]));
    if (focused >= 0) charts.querySelectorAll("svg")[focused]?.focus({ preventScroll: true });
  };
  let states = "";
  const draw = async () => {
    const ids = [...new Set(selects.map((each) => each.value))].filter(Boolean);
    const chosen = ids.map((id) => runs.find((run) => run.id === id)).filter(Boolean);
    const served = runs.filter((run) => run.loaded !== null).map((run) => run.id);
    const newStates = JSON.stringify([served, chosen.map(({ id, step, steps, loaded, saved, report }) => [id, step, steps, loaded, saved, report])]);
    if (newStates !== states) { // else the button would lose the focus
      states = newStates;
      status.replaceChildren(...chosen.map((run) => runStatus(run, { key, load, served })));
    }
    note.textContent = caution(chosen);
    note.hidden = !note.textContent;
    fill(chosen, await fetchCurves(chosen, key));
  };
  const refresh = async () => {
    runs = await fetchRuns();
    onload(Object.fromEntries(runs.filter((run) => run.loaded !== null).map((run) => [run.id, run.loaded])));
    for (const list of selects) {
      const known = new Set([...list.options].map((option) => option.value));
      list.append(...runs.filter((run) => !known.has(run.id)).map((run) => el("option", { value: run.id }, run.id)));
    }
    await draw();
  };
  const load = async (run, button, replace) => {
    button.disabled = true;
    button.textContent = "loading…";
    try {
      await fetchJson("/api/load", { run: run.id, ...(replace === undefined ? {} : { replace }) }, key());
      await refresh();
    } catch (error) {
      button.replaceWith(el("span", { class: "problem", role: "alert" }, error.message));
    }
  };
  const poll = async () => {
    if (!document.hidden && root.offsetParent) await refresh().catch(() => {}); // the server may be back later
    setTimeout(poll, POLL_MS);
  };
  selects.forEach((each) => each.addEventListener("change", draw));
  root.replaceChildren(el("div", { class: "actions" }, ...selects), status, note, charts);
  await draw();
  setTimeout(poll, POLL_MS);
}
