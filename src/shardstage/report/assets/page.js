"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const KINDS = {F: "forward", B: "backward", I: "backward: input", W: "backward: weights", STEP: "optimizer"};
const TALK = {pp: "between stages", tp: "tensor parallel", dp: "data parallel", copy: "copies"};
const seconds = s => s >= 1 ? s.toPrecision(4) + " s" : s >= 1e-3 ? (s * 1e3).toPrecision(4) + " ms" : (s * 1e6).toPrecision(3) + " µs";
const bytes = n => { for (const u of ["B", "KiB", "MiB", "GiB", "TiB"]) { if (Math.abs(n) < 1024 || u === "TiB") return (n < 10 && u !== "B" ? n.toFixed(2) : n < 100 ? n.toFixed(1) : n.toFixed(0)) + " " + u; n /= 1024; } };
const percent = r => (100 * r).toFixed(1) + " %";
const element = (tag, text, attributes = {}) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); return e; };
const by = source => data.timelines.find(t => t.source === source);

/* What is shown: rows of the grid, the part of the step, the row that is chosen, the act that is chosen in it. */
const longest = Math.max(1, ...data.timelines.map(t => t.step_ns));
const view = {source: data.timelines.length > 1 ? "both" : data.timelines[0].source, from: 0, to: longest, top: 0, row: 0, act: -1};
const HEIGHT = 22, TALKING = 4, AXIS = 22, LEFT = () => Math.min(190, $("grid").clientWidth / 4);
let rows = [];

function makeRows() {
  const shown = data.timelines.filter(t => view.source === "both" || t.source === view.source);
  const found = [];
  for (const t of shown) for (const r of t.ranks) found.push({t, r, acts: r.streams[0], talks: exposed(t, r)});
  found.sort((a, b) => a.r.rank - b.r.rank || (a.t.source < b.t.source ? -1 : 1));
  rows = found; rows.forEach((row, at) => { row.at = at; row.longestTalk = row.talks.reduce((most, t) => Math.max(most, t[3] - t[2]), 0); });
  view.row = Math.min(view.row, rows.length - 1);
}

/* Communication of a row: [stream, name, start, end, is it exposed?], cut where compute begins or ends. */
function exposed(t, r) {
  if (r.talks) return r.talks;
  const busy = r.streams[0], found = [];
  for (let s = 1; s < data.streams.length; s++) {
    const list = r.streams[s];
    for (let i = 0; i < list.length; i += 3) {
      let at = list[i + 1]; const end = list[i + 2];
      let k = lowerBound(busy, at);
      while (at < end) {
        while (k < busy.length && busy[k + 2] <= at) k += 3;
        const start = k < busy.length ? busy[k + 1] : Infinity;
        if (start <= at) { const stop = Math.min(end, busy[k + 2]); found.push([s, list[i], at, stop, false]); at = stop; }
        else { const stop = Math.min(end, start); found.push([s, list[i], at, stop, true]); at = stop; }
      }
    }
  }
  return r.talks = found.sort((a, b) => a[2] - b[2]);
}
/* Index (a multiple of 3) of the first span that ends after a time. */
function lowerBound(list, time) { let low = 0, high = list.length / 3; while (low < high) { const mid = (low + high) >> 1; if (list[3 * mid + 2] <= time) low = mid + 1; else high = mid; } return 3 * low; }

function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px";
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
  const c = canvas.getContext("2d"); c.setTransform(ratio, 0, 0, ratio, 0, 0); c.clearRect(0, 0, width, height); c.font = "12px system-ui, sans-serif"; c.textBaseline = "middle";
  return [c, width];
}
const shownRows = () => Math.min(rows.length, 24);
const label = row => (view.source === "both" ? row.t.source.slice(0, 4) + " " : "") + "rank " + row.r.rank + (row.r.alike.length > 1 ? " ×" + row.r.alike.length : "") + (view.source === "both" ? "" : "  " + row.r.label);

function drawGrid() {
  const canvas = $("grid"), [c, width] = prepare(canvas, AXIS + shownRows() * HEIGHT + 2), left = LEFT(), scale = (width - left) / (view.to - view.from);
  const ink = colour("ink"), soft = colour("soft"), line = colour("line"), bad = colour("bad"), paper = colour("paper"), tints = {};
  for (const k of [...Object.keys(KINDS), "pp", "tp", "dp", "copy"]) tints[k] = colour(k);
  const x = ns => left + (ns - view.from) * scale;
  axis(c, width, left, soft, line, AXIS + shownRows() * HEIGHT);
  for (let i = 0; i < shownRows(); i++) {
    const row = rows[view.top + i]; if (!row) break;
    const y = AXIS + i * HEIGHT;
    if (view.top + i === view.row) { c.fillStyle = colour("F") + "22"; c.fillRect(0, y, width, HEIGHT); }
    c.save(); c.beginPath(); c.rect(left, y, width - left, HEIGHT); c.clip();
    c.fillStyle = line; c.globalAlpha = .45; c.fillRect(x(0), y + 3, (row.t.step_ns) * scale, HEIGHT - TALKING - 6); c.globalAlpha = 1;
    drawSpans(c, row, y, x, tints, ink, paper);
    drawTalks(c, row, y, x, tints, bad);
    c.restore();
    c.fillStyle = view.top + i === view.row ? ink : soft; c.textAlign = "left"; c.fillText(label(row), 8, y + HEIGHT / 2, left - 12);
  }
  if (rows.length > shownRows()) { c.fillStyle = soft; c.textAlign = "left"; c.fillText("rows " + (view.top + 1) + "–" + (view.top + shownRows()) + " of " + rows.length, 8, AXIS / 2); }
  canvas.setAttribute("aria-label", rows.length + " rows of ranks, " + seconds((view.to - view.from) / 1e9) + " shown of a step of " + seconds(longest / 1e9));
}
function drawSpans(c, row, y, x, tints, ink, paper) {
  const list = row.acts, kinds = row.t.kinds; let drawnTo = -1, tint = "";
  for (let i = lowerBound(list, view.from); i < list.length && list[i + 1] < view.to; i += 3) {
    const a = x(list[i + 1]), b = x(list[i + 2]);
    if (b < drawnTo + 1 && b - a < 1) continue;             // many acts in one pixel: the first stands for them
    drawnTo = b;
    const kind = kinds[list[i]]; const wanted = tints[kind] || tints.dp; if (wanted !== tint) c.fillStyle = tint = wanted;      // a change of style costs more than a rectangle
    c.fillRect(a, y + 3, Math.max(.6, b - a - (b - a > 3 ? .8 : 0)), HEIGHT - TALKING - 6);
    if (kind === "I") { c.fillStyle = tint = "#ffffff66"; c.fillRect(a, y + 3, Math.max(.6, b - a - .8), 3); }
    if (view.row === row.at && view.act === i) { c.strokeStyle = ink; c.lineWidth = 2; c.strokeRect(a + 1, y + 4, Math.max(2, b - a - 2), HEIGHT - TALKING - 8); }
    if (b - a > 30) { c.fillStyle = tint = paper; c.textAlign = "center"; c.fillText(row.t.names[list[i]], (a + b) / 2, y + (HEIGHT - TALKING) / 2 + .5, b - a - 4); }
  }
}
/* What is exposed comes last, so that what compute covers cannot hide it where many share a pixel. */
function drawTalks(c, row, y, x, tints, bad) {
  const talks = row.talks, first = firstAfter(talks, view.from - row.longestTalk);
  for (const exposedOnes of [false, true]) {
    let drawnTo = -1, tint = "";
    for (let i = first; i < talks.length && talks[i][2] < view.to; i++) {
      const talk = talks[i]; if (talk[4] !== exposedOnes || talk[3] <= view.from) continue;
      const b = x(talk[3]); if (b < drawnTo + 1) continue;
      const a = x(talk[2]); drawnTo = Math.max(b, a + .6);
      const wanted = exposedOnes ? bad : tints[data.streams[talk[0]]] || tints.dp; if (wanted !== tint) c.fillStyle = tint = wanted;
      c.fillRect(a, y + HEIGHT - TALKING - 1, drawnTo - a, TALKING);
    }
  }
}
/* Index of the first piece of communication that begins at a time or later. */
function firstAfter(talks, time) { let low = 0, high = talks.length; while (low < high) { const mid = (low + high) >> 1; if (talks[mid][2] < time) low = mid + 1; else high = mid; } return low; }
function axis(c, width, left, soft, line, height) {
  const span = (view.to - view.from) / 1e9, count = Math.max(2, Math.floor((width - left) / 110)), raw = span / count, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(k => k * power >= raw) * power;
  c.textAlign = "center";
  for (let t = Math.ceil(view.from / 1e9 / step) * step; t <= view.to / 1e9; t += step) {
    const at = left + (t * 1e9 - view.from) / (view.to - view.from) * (width - left);
    c.fillStyle = line; c.fillRect(at, AXIS - 5, 1, height); c.fillStyle = soft;
    if (at < width - 30) c.fillText(seconds(Math.max(0, t)).replace(/\.?0+ /, " "), Math.max(at, left + 14), AXIS / 2 - 1);
  }
}

/* ---- memory of the chosen row's rank ---- */
const TINTS = {parameters: "F", master: "I", gradients: "W", optimizer: "STEP", activations: "pp", recompute: "tp", transient: "dp", communication: "copy", allocated: "dp", resident: "dp"};

/* The other timeline's memory of the same rank: [samples, source]. */
function otherMemory(row) {
  for (const t of data.timelines) if (t !== row.t) for (const r of t.ranks) if ((r.rank === row.r.rank || r.alike.includes(row.r.rank)) && t.memory[r.rank]) return [t.memory[r.rank], t];
  return null;
}
function memoryRow() { const row = rows[view.row]; const own = row && row.t.memory[row.r.rank]; return own && own.length ? row : rows.find(o => o.t.memory[o.r.rank] && (!row || o.r.alike.includes(row.r.rank))) || rows.find(o => o.t.memory[o.r.rank]); }
function drawMemory() {
  const row = memoryRow(); $("memory-section").hidden = !row; if (!row) return;
  const other = otherMemory(row), otherTotals = other ? other[0].map(s => s.slice(2).reduce((a, b) => a + b, 0)) : [];
  const samples = row.t.memory[row.r.rank], names = row.t.categories, [c, width] = prepare($("memory"), 240), left = LEFT(), soft = colour("soft");
  const totals = samples.map(s => s.slice(2).reduce((a, b) => a + b, 0)), most = Math.max(...totals), peakAt = totals.indexOf(most), height = 190, top = Math.max(most, ...otherTotals), y = n => 20 + height * (1 - n / (top * 1.08));
  const x = ns => left + (ns - view.from) / (view.to - view.from) * (width - left);
  for (let k = 0; k <= 4; k++) { const n = top * k / 4; c.fillStyle = colour("line"); c.fillRect(left, y(n), width - left, 1); c.fillStyle = soft; c.textAlign = "right"; c.fillText(bytes(n), left - 8, y(n)); }
  c.save(); c.beginPath(); c.rect(left, 0, width - left, 240); c.clip();
  const below = samples.map(() => 0);
  names.forEach((name, k) => {
    c.fillStyle = colour(TINTS[name] || "dp"); c.beginPath(); c.moveTo(x(samples[0][0]), y(below[0]));
    samples.forEach((s, i) => { const end = i + 1 < samples.length ? samples[i + 1][0] : Math.max(row.t.step_ns, s[0]); c.lineTo(x(s[0]), y(below[i] + s[2 + k])); c.lineTo(x(end), y(below[i] + s[2 + k])); });
    for (let i = samples.length - 1; i >= 0; i--) { const end = i + 1 < samples.length ? samples[i + 1][0] : Math.max(row.t.step_ns, samples[i][0]); c.lineTo(x(end), y(below[i])); c.lineTo(x(samples[i][0]), y(below[i])); below[i] += samples[i][2 + k]; }
    c.fill();
  });
  if (other) {
    c.strokeStyle = colour("ink"); c.lineWidth = 1.5; c.setLineDash([5, 3]); c.beginPath();
    other[0].forEach((s, i) => { const end = i + 1 < other[0].length ? other[0][i + 1][0] : Math.max(other[1].step_ns, s[0]); i ? c.lineTo(x(s[0]), y(otherTotals[i])) : c.moveTo(x(s[0]), y(otherTotals[i])); c.lineTo(x(end), y(otherTotals[i])); });
    c.stroke(); c.setLineDash([]);
  }
  const at = x(samples[peakAt][0]); c.fillStyle = colour("bad"); c.beginPath(); c.moveTo(at, y(most) - 1); c.lineTo(at - 6, y(most) - 11); c.lineTo(at + 6, y(most) - 11); c.fill(); c.fillRect(at - .5, y(most), 1, y(0) - y(most));
  c.restore();
  const parts = names.map((name, k) => [samples[peakAt][2 + k], name]).filter(p => p[0]).sort((a, b) => b[0] - a[0]).map(p => p[1] + " " + bytes(p[0]));
  $("peak").textContent = "Peak of rank " + row.r.rank + " (" + row.t.source + "): " + bytes(most) + " at " + seconds(samples[peakAt][0] / 1e9) + (samples[peakAt][1] ? ", in " + samples[peakAt][1] : "") + ". " + parts.join(", ") + "." + (other ? " Dashed: " + other[1].source + ", at most " + bytes(Math.max(...otherTotals)) + "." : "");
  $("memory").setAttribute("aria-label", $("peak").textContent);
  $("categories").replaceChildren(...names.flatMap(name => [element("i", "", {style: "background:var(--" + (TINTS[name] || "dp") + ")"}), document.createTextNode(name)]));
}

/* ---- tables and figures ---- */
function figures() {
  const measured = by("measured"), predicted = by("predicted"), main = measured || predicted, found = [];
  found.push([seconds(main.step_ns / 1e9), "step time, " + main.source]);
  if (measured && predicted) found.push([seconds(predicted.step_ns / 1e9), "predicted, " + (data.comparison.error >= 0 ? "+" : "") + percent(data.comparison.error)]);
  if (data.tokens) found.push([Math.round(data.tokens / (main.step_ns / 1e9)).toLocaleString("en"), "tokens/s, of " + data.tokens.toLocaleString("en") + " a step"]);
  let weight = 0, waits = 0, talks = 0; for (const r of main.ranks) { const n = r.alike.length, all = r.use.reduce((a, b) => a + b, 0) || 1; weight += n; waits += n * (r.use[2] + r.use[3]) / all; talks += n * r.use[2] / all; }
  found.push([percent(waits / weight), "of the ranks' time is no work"], [percent(talks / weight), "exposed communication"]);
  const peaks = Object.values(main.memory).flat().map(s => s.slice(2).reduce((a, b) => a + b, 0)); if (peaks.length) found.push([bytes(Math.max(...peaks)), "peak memory of the fullest rank"]);
  found.push([main.ranks.reduce((a, r) => a + r.alike.length, 0).toLocaleString("en"), "ranks" + (main.ranks.some(r => r.alike.length > 1) ? " of " + main.ranks.length + " kinds" : "")]);
  $("figures").replaceChildren(...found.map(([value, what]) => { const f = element("div", undefined, {class: "figure"}); f.append(element("b", value), element("span", what)); return f; }));
}
function rankTable() {
  const table = $("ranks"), head = element("tr"); for (const [text, kind] of [["rank", "text"], ["stages", "text"], ["", ""], ["compute", ""], ["exposed talk", ""], ["idle", ""], ["peak memory", ""]]) head.append(element("th", text, {class: kind, scope: "col"}));
  const body = element("tbody");
  for (const t of data.timelines) for (const r of t.ranks) {
    const all = r.use.reduce((a, b) => a + b, 0) || 1, row = element("tr"), held = t.memory[r.rank];
    const who = element("td", (data.timelines.length > 1 ? t.source + ", " : "") + "rank " + r.rank + "  " + r.label);
    if (r.alike.length > 1) { const more = element("details"); more.append(element("summary", "and " + (r.alike.length - 1) + " alike"), document.createTextNode(r.alike.slice(1, 400).join(", ") + (r.alike.length > 400 ? " …" : ""))); who.append(more); }
    const pp = (/pp=(\d+)/.exec(r.label) || [])[1];
    const share = element("div", undefined, {class: "share"}); for (const [i, name] of [[0, "F"], [1, "STEP"], [2, "bad"]]) share.append(element("span", undefined, {style: "width:" + 100 * r.use[i] / all + "%;background:var(--" + name + ")"}));
    const cell = element("td"); cell.append(share);
    row.append(who, element("td", data.stages[pp] || "", {class: "text"}), cell, element("td", percent((r.use[0] + r.use[1]) / all)), element("td", percent(r.use[2] / all)), element("td", percent(r.use[3] / all)), element("td", held ? bytes(Math.max(...held.map(s => s.slice(2).reduce((a, b) => a + b, 0)))) : "–"));
    body.append(row);
  }
  const top = element("thead"); top.append(head); table.replaceChildren(top, body);
}
function comparisonTable() {
  $("comparison-section").hidden = !data.comparison; if (!data.comparison) return;
  const head = element("tr"), body = element("tbody"); for (const text of ["act", "predicted", "measured", "error"]) head.append(element("th", text, {scope: "col"}));
  const worst = Math.max(.01, ...data.comparison.acts.map(a => Math.abs(a[4] || 0)));
  for (const [kind, stage, predicted, measured, error] of data.comparison.acts) {
    const row = element("tr"); row.append(element("td", (KINDS[kind] || kind) + (stage === null ? "" : ", stage " + stage)), element("td", predicted === null ? "–" : seconds(predicted)), element("td", measured === null ? "–" : seconds(measured)));
    const cell = element("td", error === null ? "–" : (error >= 0 ? "+" : "−") + percent(Math.abs(error))); if (error !== null) cell.append(element("span", undefined, {class: "error", style: "width:" + 60 * Math.abs(error) / worst + "px"}));
    row.append(cell); body.append(row);
  }
  const top = element("thead"); top.append(head); $("comparison").replaceChildren(top, body);
}

/* ---- moving about ---- */
function zoom(factor, centre) { const span = Math.min(longest * 1.02, Math.max(longest / 2e5, (view.to - view.from) * factor)), share = (centre - view.from) / (view.to - view.from); view.from = centre - span * share; move(0); view.to = view.from + span; move(0, span); }
function move(ns, span = view.to - view.from) { view.from = Math.max(-longest * .01, Math.min(longest * 1.01 - span, view.from + ns)); view.to = view.from + span; draw(); }
function whole() { view.from = 0; view.to = longest * 1.005; draw(); }
function choose(row) { view.row = Math.max(0, Math.min(rows.length - 1, row)); view.act = -1; if (view.row < view.top) view.top = view.row; if (view.row >= view.top + shownRows()) view.top = view.row - shownRows() + 1; $("rank").value = view.row; draw(); }
function step(by) {
  const row = rows[view.row]; if (!row.acts.length) return;
  view.act = view.act < 0 ? (by > 0 ? lowerBound(row.acts, view.from) : 0) : Math.max(0, Math.min(row.acts.length - 3, view.act + 3 * by));
  const [number, start, end] = row.acts.slice(view.act, view.act + 3), span = view.to - view.from;
  if (start < view.from || end > view.to) { view.from = (start + end - span) / 2; view.to = view.from + span; }
  $("here").textContent = describe(row, number, start, end); draw();
}
const describe = (row, number, start, end) => label(row) + ": " + row.t.names[number] + " (" + (KINDS[row.t.kinds[number]] || row.t.kinds[number]) + "), " + seconds((end - start) / 1e9) + ", from " + seconds(Math.max(0, start) / 1e9) + " to " + seconds(end / 1e9);
function under(event) {
  const box = $("grid").getBoundingClientRect(), left = LEFT(), at = Math.floor((event.clientY - box.top - AXIS) / HEIGHT) + view.top, row = rows[at];
  const ns = view.from + (event.clientX - box.left - left) / (box.width - left) * (view.to - view.from);
  return {row, at, ns, low: (event.clientY - box.top - AXIS) % HEIGHT > HEIGHT - TALKING - 3, isLeft: event.clientX - box.left < left};
}
function tip(event) {
  const {row, ns, low} = under(event), box = $("tip"); box.style.visibility = "hidden"; if (!row || ns < 0) return;
  let text = "";
  const talk = row.talks.slice(firstAfter(row.talks, ns - row.longestTalk), firstAfter(row.talks, ns + 1)).find(t => ns <= t[3]), k = lowerBound(row.acts, ns), isIn = k < row.acts.length && row.acts[k + 1] <= ns;
  if (talk && (low || !isIn)) text = row.t.names[talk[1]] + "\n" + (TALK[data.streams[talk[0]]] || "") + ", " + seconds((talk[3] - talk[2]) / 1e9) + (talk[4] ? ", exposed" : ", under compute");
  else if (isIn) text = row.t.names[row.acts[k]] + "\n" + (KINDS[row.t.kinds[row.acts[k]]] || row.t.kinds[row.acts[k]]) + ", " + seconds((row.acts[k + 2] - row.acts[k + 1]) / 1e9) + "\nfrom " + seconds(row.acts[k + 1] / 1e9);
  else if (ns < row.t.step_ns) text = "idle\n" + seconds(((k < row.acts.length ? row.acts[k + 1] : row.t.step_ns) - (k ? row.acts[k - 1] : 0)) / 1e9);
  if (!text) return;
  box.textContent = label(row) + "\n" + text; box.style.visibility = "visible";
  box.style.left = Math.min(window.innerWidth - box.offsetWidth - 8, event.clientX + 14) + "px"; box.style.top = Math.min(window.innerHeight - box.offsetHeight - 8, event.clientY + 14) + "px";
}
let waiting = false; function draw() { if (waiting) return; waiting = true; requestAnimationFrame(() => { waiting = false; drawGrid(); drawMemory(); }); }

function start() {
  document.title = data.title; $("title").textContent = data.title;
  $("facts").append(...data.facts.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  const has = new Set(data.timelines.flatMap(t => t.kinds));
  $("legend").append(...Object.keys(KINDS).filter(k => has.has(k)).flatMap(k => [element("i", "", {style: "background:var(--" + k + ")"}), document.createTextNode(KINDS[k])]), ...data.streams.slice(1).filter((_, s) => data.timelines.some(t => t.ranks.some(r => r.streams[s + 1].length))).flatMap(s => [element("i", "", {class: "thin", style: "background:var(--" + s + ")"}), document.createTextNode(TALK[s])]), element("i", "", {class: "thin", style: "background:var(--bad)"}), document.createTextNode("exposed communication"));
  if (data.timelines.length > 1) for (const [source, text] of [["both", "both"], ["measured", "measured"], ["predicted", "predicted"]]) {
    const button = element("button", text, {"aria-pressed": String(view.source === source)});
    button.onclick = () => { view.source = source; for (const b of $("choice").children) b.setAttribute("aria-pressed", String(b === button)); makeRows(); fillRanks(); view.top = 0; choose(0); };
    $("choice").append(button);
  }
  makeRows(); fillRanks(); figures(); rankTable(); comparisonTable(); whole();
  const told = rows.findIndex(row => row.t.categories.length > 1); if (told > 0) choose(told);
  const grid = $("grid"); let held = null;
  grid.addEventListener("wheel", e => { e.preventDefault(); if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) move((e.deltaX || e.deltaY) * (view.to - view.from) / 1500); else zoom(Math.exp(e.deltaY / 400), under(e).ns); }, {passive: false});
  grid.addEventListener("pointerdown", e => { held = {x: e.clientX, y: e.clientY, top: view.top, moved: false}; grid.setPointerCapture(e.pointerId); });
  grid.addEventListener("pointermove", e => { if (!held) return tip(e); const dx = e.clientX - held.x; if (Math.abs(dx) > 2 || Math.abs(e.clientY - held.y) > HEIGHT / 2) held.moved = true; view.top = Math.max(0, Math.min(rows.length - shownRows(), held.top - Math.round((e.clientY - held.y) / HEIGHT))); move(-dx * (view.to - view.from) / (grid.clientWidth - LEFT())); held.x = e.clientX; });
  grid.addEventListener("pointerup", e => { const found = under(e); if (held && !held.moved && found.row) choose(found.at); held = null; });
  grid.addEventListener("pointerleave", () => { $("tip").style.visibility = "hidden"; });
  grid.addEventListener("keydown", e => {
    const centre = (view.from + view.to) / 2, width = view.to - view.from;
    const acts = {"+": () => zoom(.6, centre), "=": () => zoom(.6, centre), "-": () => zoom(1 / .6, centre), "0": whole, ArrowLeft: () => move(-width / 10), ArrowRight: () => move(width / 10), ArrowUp: () => choose(view.row - 1), ArrowDown: () => choose(view.row + 1), n: () => step(1), p: () => step(-1)};
    if (acts[e.key]) { e.preventDefault(); acts[e.key](); }
  });
  $("in").onclick = () => zoom(.6, (view.from + view.to) / 2); $("out").onclick = () => zoom(1 / .6, (view.from + view.to) / 2); $("all").onclick = whole;
  $("rank").onchange = () => choose(Number($("rank").value));
  window.addEventListener("resize", draw); matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
function fillRanks() { $("rank").replaceChildren(...rows.map((row, i) => element("option", label(row), {value: i}))); }
start();
