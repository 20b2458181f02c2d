"use strict";
// Displays the values of the charts under the pointer or by the arrow keys. Everything else works without scripts.
(() => {
  const element = document.getElementById("x-values");
  if (!element) return;
  const xValues = JSON.parse(element.textContent);
  const axisNames = { step: "step", tokens: "tokens", seconds: "time", flops: "FLOPs" };

  const formatNumber = (value) => {
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  };
  const formatDuration = (value) => {
    if (value < 60) return formatNumber(value) + " s";
    const s = Math.round(value), pad = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(s / 60);
    return minutes < 60 ? `${minutes}:${pad(s % 60)}` : `${Math.floor(minutes / 60)}:${pad(minutes % 60)}:${pad(s % 60)}`;
  };
  const formats = { number: formatNumber, percent: (value) => (100 * value).toFixed(1) + " %" };

  // Returns the index of the point nearest to x; the points are sorted.
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - points[low - 1] < points[low] - x ? low - 1 : low;
  };

  const visible = (plot) => [...plot.querySelectorAll(".view")].find((view) => view.offsetParent !== null);

  for (const figure of document.querySelectorAll("figure.chart")) {
    const plot = figure.querySelector(".plot");
    const lines = JSON.parse(figure.querySelector("script.lines").textContent);
    const formatY = formats[figure.dataset.format];
    const ruler = document.createElement("div"), readout = document.createElement("div");
    ruler.className = "ruler"; readout.className = "readout";
    ruler.hidden = readout.hidden = true;
    plot.append(ruler, readout);
    let current = -1; // index of the selected point of the first line, for the arrow keys

    const show = (x, announce) => {
      const view = visible(plot);
      if (!view) return;
      const axis = view.dataset.axis, low = Number(view.dataset.low), high = Number(view.dataset.high);
      const smooth = !document.querySelector(".smoothing:not(:checked)");
      const rows = [];
      let selected = null; // the x value that all lines are read at
      for (const line of lines) {
        const points = xValues[line.x][axis], i = nearest(points, x);
        const y = smooth && line.smooth ? line.smooth[i] : line.y[i];
        if (y === null || points[i] === null) continue;
        if (selected === null) { selected = points[i]; current = i; }
        if (Math.abs(points[i] - selected) > 0.5 * (high - low)) continue;
        const isApart = Math.abs(points[i] - selected) > 0.01 * (high - low);
        rows.push({ line, y, where: isApart ? points[i] : null });
      }
      if (selected === null) { hide(); return; }
      const formatX = (value) => (axis === "seconds" ? formatDuration(value) : formatNumber(value));
      const head = document.createElement("b");
      head.textContent = `${axisNames[axis]} ${formatX(selected)}`;
      readout.replaceChildren(head);
      for (const { line, y, where } of rows) {
        const row = document.createElement("div"), key = document.createElement("span");
        key.className = "key " + line.style;
        row.append(key, `${line.name} ${formatY(y)}` + (where === null ? "" : ` (at ${formatX(where)})`));
        readout.append(row);
      }
      readout.setAttribute("aria-live", announce ? "polite" : "off");
      const area = view.querySelector(".area"), share = (selected - low) / (high - low);
      const left = area.offsetLeft + share * area.offsetWidth;
      ruler.style.left = left + "px";
      ruler.style.top = area.offsetTop + "px";
      ruler.style.height = area.offsetHeight + "px";
      ruler.hidden = readout.hidden = false;
      const target = share < 0.5 ? left + 12 : left - readout.offsetWidth - 12;
      readout.style.left = Math.max(0, Math.min(target, plot.offsetWidth - readout.offsetWidth)) + "px";
    };
    const hide = () => { ruler.hidden = readout.hidden = true; };

    const follow = (event) => {
      const view = visible(plot);
      if (!view) return;
      const box = view.querySelector(".area").getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const low = Number(view.dataset.low), high = Number(view.dataset.high);
      show(low + share * (high - low), false);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const view = visible(plot);
      if (!view || !lines.length) return;
      const points = xValues[lines[0].x][view.dataset.axis], last = points.length - 1;
      const pageSize = Math.max(1, Math.round(points.length / 20));
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -pageSize, PageDown: pageSize, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") { hide(); return; }
      if (step === undefined) return;
      event.preventDefault();
      current = Math.min(last, Math.max(0, (current < 0 ? last + 1 : current) + step));
      show(points[current], true);
    });
  }
})();
