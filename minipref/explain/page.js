"use strict";
// The page has one explanation at a time (`data`) and what is chosen of it (`chosen`). Every view is drawn from these
// two. All texts go into the page as text nodes, so a response that holds HTML stays text.

const by = id => document.getElementById(id);
const page = JSON.parse(by("page").textContent);
const chosen = {layer: page.layer, head: page.head, query: 2, key: null, pointed: null};   // pointed: under the mouse
const history = [];                                                     // states before, the newest first
const TERMS = ["c2c", "c2p", "p2c"], KEYS = 12, HISTORY = 10;
const panelNames = Object.keys(page.panels);
let data = null, L = 0, matrices = null;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function label(n) { return (data.tokens[n].trim() || "\u2423"); }
function named(n) { return label(n) + " (token " + (n + 1) + ")"; }
function fixed(x, digits = 2) { return x.toFixed(digits).replace("-", "\u2212"); }
function signed(x, digits = 2) { return (x < 0 ? "" : "+") + fixed(x, digits); }
function percent(p) { return (100 * p).toFixed(0) + "%"; }

// --- numbers --------------------------------------------------------------------------------------------------------

function numbers(text, kind) {
  return new kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
}

function receive(received) {
  data = received;
  L = data.tokens.length;
  data.probs = numbers(data.probs, Uint16Array);
  data.means = numbers(data.means, Float32Array);
  for (const matrix of [data.scores, ...Object.values(data.vectors)]) matrix.values = numbers(matrix.values, Int16Array);
}

// Matrix n of a list of matrices that were stored as 16-bit integers.
function unpacked(stored, n, size) {
  return Float32Array.from(stored.values.subarray(n * size, (n + 1) * size), x => x * stored.steps[n]);
}

function probabilities(layer, head) {
  const part = h => data.probs.subarray((layer * data.heads + h) * L * L, (layer * data.heads + h + 1) * L * L);
  if (head < data.heads) return Float32Array.from(part(head), x => x / 65535);
  const mean = new Float32Array(L * L);                                 // the column after the last head
  for (let h = 0; h < data.heads; h++) part(h).forEach((x, n) => { mean[n] += x / 65535 / data.heads; });
  return mean;
}

// The matrices of the chosen head, L * L numbers each. The mean over heads has probabilities only.
function chosenMatrices() {
  const found = {}, number = chosen.layer * data.heads + chosen.head;
  if (chosen.head < data.heads) {
    TERMS.forEach((name, t) => { found[name] = unpacked(data.scores, number * 3 + t, L * L); });
    found.sum = found.c2c.map((x, n) => x + found.c2p[n] + found.p2c[n]);
  }
  found.probs = probabilities(chosen.layer, chosen.head);
  return found;
}

function query() { return chosen.pointed ?? chosen.query; }

function keysOf(i) {
  const probs = matrices.probs;
  return [...Array(L).keys()].sort((a, b) => probs[i * L + b] - probs[i * L + a]);
}

// --- colours --------------------------------------------------------------------------------------------------------

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(" ").map(Number);
}

// Draw shares from -1 to 1, one pixel each, on a canvas of `width` pixels a row.
function paint(canvas, shares, width) {
  canvas.width = width;
  canvas.height = shares.length / width;
  const mean = colour("--mean"), most = colour("--most"), least = colour("--least");
  const context = canvas.getContext("2d"), image = context.createImageData(width, canvas.height);
  shares.forEach((share, n) => {
    const end = share > 0 ? most : least;
    for (let c = 0; c < 3; c++) image.data[4 * n + c] = mean[c] + (end[c] - mean[c]) * Math.abs(share);
    image.data[4 * n + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

function largest(values) {
  let limit = 1e-9;
  for (const x of values) limit = Math.max(limit, Math.abs(x));
  return limit;
}

// --- prediction -----------------------------------------------------------------------------------------------------

function barCells(probs) {
  return probs.map(p => {
    const cell = element("td", {class: "bar"}, p.toFixed(3));
    cell.style.setProperty("--share", p);
    return cell;
  });
}

function drawPrediction() {
  const found = data.prediction;
  by("orders").hidden = by("shade").parentElement.hidden = !found;
  if (!found) {
    by("outcome").textContent = "There is no trained classifier here, so there is no prediction: this is what an " +
      "encoder attends to before fine-tuning. train.py trains a classifier.";
    return;
  }
  const difference = Math.max(...found.orders[0].map((p, c) => Math.abs(p - found.orders[1][c])));
  by("outcome").replaceChildren(element("strong", {}, found.outcome), found.outcome === "undecided" ? "" :
    " (" + percent(found.averaged[found.label]) + ")", ". ", found.order_sensitive ?
    element("strong", {}, "Order-sensitive: exchanging A and B changes the winner.") :
    "The two orders differ by at most " + difference.toFixed(3) + ".");
  const rows = [["A first", found.orders[0]], ["B first", found.orders[1]], ["mean", found.averaged]];
  if (found.untruncated) rows.push(["mean, without truncation", found.untruncated]);
  const head = ["", ...page.labels].map(name => element("th", {scope: "col"}, name));
  by("orders").tHead.replaceChildren(element("tr", {}, ...head));
  by("orders").tBodies[0].replaceChildren(...rows.map(([name, probs]) =>
    element("tr", {}, element("th", {scope: "row"}, name), ...barCells(probs))));
}

// What differs between two texts: the words between their common start and their common end.
function edit(before, after) {
  const a = before.split(/(\s+)/), b = after.split(/(\s+)/);
  while (a.length && b.length && a[0] === b[0]) { a.shift(); b.shift(); }
  while (a.length && b.length && a[a.length - 1] === b[b.length - 1]) { a.pop(); b.pop(); }
  const short = words => words.join("").length > 40 ? words.join("").slice(0, 40) + "\u2026" : words.join("");
  return a.length || b.length ? "\u201c" + short(a) + "\u201d \u2192 \u201c" + short(b) + "\u201d" : "";
}

function remember() {
  if (!page.live || !data.prediction) return;
  const before = history[0];
  if (before && before.texts.every((text, n) => text === data.texts[n])) return;
  const changes = before ? ["prompt", "A", "B"].map((name, n) => [name, edit(before.texts[n], data.texts[n])]) : [];
  const words = changes.filter(([, change]) => change).map(([name, change]) => name + ": " + change);
  history.unshift({texts: data.texts, averaged: data.prediction.averaged, before: before && before.averaged,
                   words: words.length > 2 ? "another pair" : words.join("; ") || "the first pair"});
  history.splice(HISTORY);
}

function drawHistory() {
  by("history").hidden = !history.length;
  const head = ["edit", ...page.labels, ""].map(name => element("th", {scope: "col"}, name));
  by("history").tHead.replaceChildren(element("tr", {}, ...head));
  by("history").tBodies[0].replaceChildren(...history.map(state => {
    const button = element("button", {type: "button", "aria-label": "Show this pair again: " + state.words}, "show");
    button.addEventListener("click", () => { write(state.texts); ask(); });
    const cells = state.averaged.map((p, c) => element("td", {}, p.toFixed(3) +
      (state.before ? " (" + signed(p - state.before[c], 3) + ")" : "")));
    return element("tr", {}, element("th", {scope: "row"}, state.words), ...cells, element("td", {}, button));
  }));
}

// --- tokens ---------------------------------------------------------------------------------------------------------

function buildTokens() {
  const lines = [["prompt", element("div")], ["A", element("div")], ["B", element("div")]];
  let line = 0;
  data.tokens.forEach((token, n) => {
    if (data.gaps[n]) lines[line][1].append(element("span", {class: "left-out"},
      " [" + data.gaps[n].toLocaleString("en") + " tokens left out] "));
    const special = !data.segments[n];
    const span = element("span", {class: special ? "token special" : "token", role: "option", id: "token-" + n}, token);
    span.addEventListener("pointerenter", () => { chosen.pointed = n; drawTokens(); });
    span.addEventListener("pointerleave", () => { chosen.pointed = null; drawTokens(); });
    span.addEventListener("click", () => choose({query: n, key: null}));
    lines[line][1].append(span);
    if (special && n && line < 2) line += 1;                            // a [SEP] ends its segment
  });
  by("tokens").replaceChildren(...lines.flatMap(([name, spans]) => [element("span", {}, name), spans]));
}

function drawTokens() {
  const found = data.prediction, i = query();
  const attention = !found || by("shade").value === "attention" || chosen.pointed !== null;
  let shares;
  if (attention) {
    shares = [...matrices.probs.subarray(i * L, (i + 1) * L)].map(Math.sqrt);
    by("shade-words").textContent = "Orange: where " + named(i) + " looks in the chosen head. Point at a token to see " +
      "where that one looks.";
  } else {
    const [a, b] = found.attributions, which = by("shade").value;
    const values = which === "mean" ? a.map((x, n) => (x + b[n]) / 2) : found.attributions[+which];
    const limit = largest([...a, ...b]);
    shares = values.map(x => x / limit);
    by("shade-words").textContent = "Gradient times input, a local sensitivity and not a causal explanation. Orange: " +
      "the token raises the log odds of \u2018" + page.labels[found.label] + "\u2019; blue: it lowers them. Strongest: " +
      [...values.keys()].sort((m, n) => Math.abs(values[n]) - Math.abs(values[m])).slice(0, 5)
        .map(n => named(n) + " " + signed(values[n])).join(", ") + ". Point at a token to see where it looks.";
  }
  const most = colour("--most").join(" "), least = colour("--least").join(" ");
  shares.forEach((share, n) => {
    const span = by("token-" + n);
    span.style.setProperty("--colour", share > 0 ? most : least);
    span.style.setProperty("--share", Math.abs(share).toFixed(3));
    span.setAttribute("aria-selected", n === chosen.query);
  });
  by("tokens").setAttribute("aria-activedescendant", "token-" + chosen.query);
  by("looks").textContent = named(i) + " looks at " + keysOf(i).slice(0, 3).map(j => named(j) + " with " +
    percent(matrices.probs[i * L + j]) + (matrices.c2c ? " (" + TERMS.map(name => name + " " +
      signed(matrices[name][i * L + j])).join(", ") + ")" : "")).join("; ") + ".";
}

// --- heads ----------------------------------------------------------------------------------------------------------

function headName(layer, head) {
  return "layer " + (layer + 1) + ", " + (head < data.heads ? "head " + (head + 1) : "mean of all heads");
}

function buildHeads() {
  const columns = data.heads + 1, cells = [element("span")];
  for (let h = 0; h < columns; h++) cells.push(element("span", {}, h < data.heads ? "head " + (h + 1) : "mean"));
  for (let layer = 0; layer < data.layers; layer++) {
    cells.push(element("span", {}, "layer " + (layer + 1)));
    for (let head = 0; head < columns; head++) {
      const canvas = element("canvas"), probs = probabilities(layer, head);
      const best = probs.indexOf(probs.reduce((a, b) => Math.max(a, b)));
      const button = element("button", {type: "button", id: "head-" + layer + "-" + head, "aria-label":
        headName(layer, head) + "; the highest probability: " + label(Math.floor(best / L)) + " to " + label(best % L)}, canvas);
      paint(canvas, probs.map(Math.sqrt), L);
      button.addEventListener("click", () => choose({layer, head, key: null}));
      cells.push(button);
    }
  }
  by("heads").style.gridTemplateColumns = "auto repeat(" + columns + ", auto)";
  by("heads").replaceChildren(...cells);
}

function markHead() {
  for (const button of by("heads").querySelectorAll("button")) {
    const pressed = button.id === "head-" + chosen.layer + "-" + chosen.head;
    button.setAttribute("aria-pressed", pressed);
    button.tabIndex = pressed ? 0 : -1;
  }
}

// --- the chosen head ------------------------------------------------------------------------------------------------

function buildPanels() {
  by("panels").replaceChildren(...panelNames.map(name => {
    const canvas = element("canvas", {id: "panel-" + name, role: "img"});
    const title = name === "probs" ? page.panels[name] : name + ", " + page.panels[name];
    canvas.setAttribute("aria-label", title + ": rows are queries, columns are keys; the text below names the largest");
    const at = event => {
      const cell = +canvas.dataset.cell, margin = +canvas.dataset.margin;
      const [i, j] = [event.offsetY, event.offsetX].map(x => Math.floor((x - margin) / cell));
      return i >= 0 && j >= 0 && i < L && j < L ? [i, j] : null;
    };
    canvas.addEventListener("pointermove", event => { const place = at(event); if (place) drawCell(...place); });
    canvas.addEventListener("click", event => {
      const place = at(event);
      if (place) choose({query: place[0], key: place[1]});
    });
    return element("figure", {}, element("figcaption", {}, title), canvas);
  }));
}

// A matrix with token labels on both axes. Where cells are small, only as many labels as fit are drawn.
function drawPanel(canvas, shares) {
  const cell = Math.max(5, Math.min(16, Math.floor(480 / L))), margin = 76, ratio = window.devicePixelRatio || 1;
  const side = margin + cell * L + 2, small = document.createElement("canvas"), context = canvas.getContext("2d");
  Object.assign(canvas.dataset, {cell, margin});
  canvas.width = canvas.height = Math.round(side * ratio);
  canvas.style.width = canvas.style.height = side + "px";
  paint(small, shares, L);
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, margin, margin, cell * L, cell * L);
  const style = getComputedStyle(document.documentElement), every = Math.ceil(12 / cell);
  context.font = "12px ui-monospace, monospace";
  context.textBaseline = "middle";
  for (let n = 0; n < L; n++) {
    if (n % every && n !== chosen.query) continue;
    if (every > 1 && n !== chosen.query && Math.abs(n - chosen.query) < every) continue;
    const text = label(n).length > 10 ? label(n).slice(0, 9) + "\u2026" : label(n), middle = margin + cell * (n + 0.5);
    context.fillStyle = style.getPropertyValue(n === chosen.query ? "--chosen" : "--ink");
    context.textAlign = "right";
    context.fillText(text, margin - 4, middle);
    context.save();
    context.translate(middle, margin - 4);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(text, 0, 0);
    context.restore();
  }
  context.strokeStyle = style.getPropertyValue("--chosen");
  context.strokeRect(margin - 0.5, margin + cell * chosen.query - 0.5, cell * L + 1, cell + 1);
  if (chosen.key !== null) context.strokeRect(margin + cell * chosen.key - 0.5, margin - 0.5, cell + 1, cell * L + 1);
}

function drawHead() {
  const words = headName(chosen.layer, chosen.head), scores = TERMS.map(name => matrices[name]).filter(Boolean);
  const limit = largest([...scores, matrices.sum ?? []].flatMap(matrix => [...matrix]));
  by("head-title").textContent = words[0].toUpperCase() + words.slice(1);
  by("head-words").textContent = scores.length ? "c2c compares the contents of query and key. c2p depends on the query and " +
    "the distance, whatever the key is; p2c on the key and the distance, whatever the query is. Their sum is the score, and " +
    "softmax over a row makes the probabilities. Orange: above its row's mean; blue: below. Subtracting the mean changes " +
    "no probability. \u2423 is a space." :
    "The mean of the heads' probabilities. A mean has no terms: choose one head to see them.";
  by("least").textContent = fixed(-limit);
  by("most").textContent = signed(limit);
  for (const name of panelNames) {
    const canvas = by("panel-" + name), matrix = matrices[name];
    canvas.parentElement.hidden = !matrix;
    if (matrix) drawPanel(canvas, matrix.map(name === "probs" ? Math.sqrt : x => x / limit));
  }
  by("scores-scale").parentElement.hidden = !scores.length;
  by("cell").textContent = "Point at a cell to see its numbers" +
    (scores.length ? "; click to choose its query and key, which are outlined." : ".");
  const order = [...matrices.probs.keys()].sort((a, b) => matrices.probs[b] - matrices.probs[a]).slice(0, 5);
  by("words").textContent = "The strongest: " + order.map(n => named(Math.floor(n / L)) + " attends to " + named(n % L) +
    " with " + percent(matrices.probs[n]) + (scores.length ? ", mostly through " +
      TERMS.reduce((a, b) => matrices[b][n] > matrices[a][n] ? b : a) : "")).join("; ") + ".";
}

function drawCell(i, j) {
  by("cell").textContent = "Query " + named(i) + ", key " + named(j) + ", distance " + fixed(i - j, 0) + ": " +
    [...TERMS, "sum"].filter(name => matrices[name]).map(name => name + " " + signed(matrices[name][i * L + j]) + ", ")
      .join("") + "probability " + (100 * matrices.probs[i * L + j]).toFixed(1) + "%.";
}

// --- one query, and one pair of tokens ------------------------------------------------------------------------------

function drawQuery() {
  by("query-section").hidden = !matrices.c2c;
  if (!matrices.c2c) { chosen.key = null; return; }
  const i = chosen.query, keys = keysOf(i).slice(0, KEYS), most = colour("--most"), least = colour("--least");
  if (chosen.key === null) chosen.key = keys[0];
  if (!keys.includes(chosen.key)) keys.push(chosen.key);
  const limit = largest(keys.flatMap(j => [...TERMS, "sum"].map(name => matrices[name][i * L + j])));
  by("query-title").textContent = "Where " + named(i) + " looks, and through which term";
  by("keys-words").textContent = "The keys with the highest probabilities. Each row of a term has its mean subtracted. " +
    "The bucket of a distance is the distance itself up to \u00b1" + data.exact + " and stands for a range of distances beyond.";
  by("keys").replaceChildren(...keys.map(j => {
    const button = element("button", {type: "button", "aria-label": "Show this key's dimensions: " + named(j)}, label(j));
    button.addEventListener("click", () => { choose({key: j}); by("keys").querySelector("[aria-selected=true] button").focus(); });
    const row = element("tr", {"aria-selected": j === chosen.key}, element("th", {scope: "row"}, button));
    for (const text of [j + 1, fixed(i - j, 0), fixed(data.buckets[data.rows[i - j + L - 1]], 0)])
      row.append(element("td", {}, text));
    for (const name of [...TERMS, "sum"]) {
      const x = matrices[name][i * L + j], cell = element("td", {class: "signed"}, signed(x));
      const end = 50 + 50 * x / limit;                                  // percent; zero is in the middle
      cell.style.setProperty("--from", Math.min(50, end) + "%");
      cell.style.setProperty("--to", Math.max(50, end) + "%");
      cell.style.setProperty("--colour", (x > 0 ? most : least).join(" "));
      row.append(cell);
    }
    row.append(element("td", {}, matrices.probs[i * L + j].toFixed(3)));
    return row;
  }));
  drawNeuron(i, chosen.key);
}

// The three products of one query and one key, dimension by dimension.
function drawNeuron(i, j) {
  const d = data.size, number = chosen.layer * data.heads + chosen.head, row = data.rows[i - j + L - 1];
  const vector = (name, n) => {
    const rows = data.vectors[name].values.length / (data.layers * data.heads * d);
    return unpacked(data.vectors[name], number, rows * d).subarray(n * d, (n + 1) * d);
  };
  const vectors = {q: vector("q", i), k: vector("k", j), pos_q: vector("pos_q", row), pos_k: vector("pos_k", row)};
  const limits = Object.fromEntries(Object.entries(vectors).map(([name, values]) => [name, largest(values)]));
  const products = [["c2c", "q", "k"], ["c2p", "q", "pos_k"], ["p2c", "k", "pos_q"]]
    .map(([term, a, b]) => [term, a, b, vectors[a].map((x, n) => x * vectors[b][n] / Math.sqrt(3 * d))]);
  const limit = largest(products.flatMap(([, , , values]) => [...values]));
  const parts = [], names = {q: "q of " + label(i), k: "k of " + label(j), pos_q: "pos_q of the distance",
                             pos_k: "pos_k of the distance"};
  let total = 0, mean = 0;
  products.forEach(([term, a, b, values], t) => {
    const sum = values.reduce((x, y) => x + y, 0);
    total += sum;
    mean += data.means[(number * 3 + t) * L + i];
    const strip = (name, shares, text, last) => {
      const canvas = element("canvas", {role: "img", "aria-label": name + ", " + d + " numbers"});
      paint(canvas, shares, d);
      const kind = last ? {class: "total last"} : {class: "total"};
      parts.push(element("span", last ? {class: "last"} : {}, name), element("div", last ? {class: "last"} : {}, canvas),
                 element("span", kind, text));
    };
    strip(names[a], vectors[a].map(x => x / limits[a]), "\u00b1" + fixed(limits[a]));
    strip(names[b], vectors[b].map(x => x / limits[b]), "\u00b1" + fixed(limits[b]));
    strip(term + " = " + a + " \u00b7 " + b, values.map(x => x / limit), signed(sum, 3), true);
    values.sum = sum;
  });
  by("neuron-title").textContent = named(i) + " at " + named(j) + ", distance " + fixed(i - j, 0) + ", bucket " +
    fixed(data.buckets[row], 0);
  by("neuron").replaceChildren(...parts);
  by("adds-up").textContent = products.map(([, , , values]) => signed(values.sum, 3)).join(" ") + " = " +
    fixed(total, 3) + ", the score before its row's mean of " + fixed(mean, 3) + " is subtracted; after that it is " +
    signed(total - mean, 3) + ", as in the table. Softmax makes " + matrices.probs[i * L + j].toFixed(3) + " of it.";
  by("neuron-words").textContent = "q and k are the query and key vectors of a token, pos_q and pos_k those of a distance, " +
    "from the same projections; each has d = " + d + " numbers, drawn as a row of colours. The third row is the product " +
    "of the two above it. Its sum, divided by \u221a(3d), is the term.";
}

// --- what happens when ----------------------------------------------------------------------------------------------

function choose(change) {
  const head = "layer" in change || "head" in change;
  Object.assign(chosen, change);
  if (head) matrices = chosenMatrices();
  markHead();
  drawTokens();
  drawQuery();
  drawHead();
}

function show(received) {
  receive(received);
  chosen.layer = Math.min(chosen.layer, data.layers - 1);
  chosen.head = Math.min(chosen.head, data.heads);
  chosen.query = Math.min(chosen.query, L - 1);
  chosen.pointed = chosen.key = null;
  by("model").textContent = data.model;
  matrices = chosenMatrices();
  remember();
  drawPrediction();
  drawHistory();
  buildTokens();
  buildHeads();
  choose({});
}

by("shade").addEventListener("change", drawTokens);
by("tokens").addEventListener("keydown", event => {
  const next = {ArrowLeft: chosen.query - 1, ArrowUp: chosen.query - 1, ArrowRight: chosen.query + 1,
                ArrowDown: chosen.query + 1, Home: 0, End: L - 1}[event.key];
  if (next === undefined || !data) return;
  event.preventDefault();
  choose({query: Math.max(0, Math.min(L - 1, next)), key: null});
});
by("heads").addEventListener("keydown", event => {
  const [down, right] = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key] ?? [0, 0];
  const layer = chosen.layer + down, head = chosen.head + right;
  if (!(down || right) || layer < 0 || head < 0 || layer >= data.layers || head > data.heads) return;
  event.preventDefault();
  choose({layer, head, key: null});
  by("head-" + layer + "-" + head).focus();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (data) { buildHeads(); choose({}); } });
buildPanels();

// --- live: the server explains what is typed ------------------------------------------------------------------------

const fields = ["prompt", "a", "b"].map(by);
let asking = false, again = false, timer = 0;

function write(texts) { fields.forEach((field, n) => { field.value = texts[n]; }); }

// One request at a time; what was typed meanwhile is asked for when its answer is there.
async function ask() {
  clearTimeout(timer);
  if (asking) { again = true; return; }
  asking = true;
  const began = performance.now();
  by("status").textContent = "computing";
  try {
    const answer = await fetch("explain", {method: "POST", headers: {"Content-Type": "application/json"},
                                           body: JSON.stringify(fields.map(field => field.value))});
    const received = await answer.json();
    if (!answer.ok) throw new Error(received.error);
    show(received);
    by("status").textContent = "computed in " + (performance.now() - began).toFixed(0) + " ms";
  } catch (problem) {
    by("status").textContent = problem instanceof TypeError ? "the server does not answer" : problem.message;
  }
  asking = false;
  if (again) { again = false; ask(); }
}

async function askRow() {
  const answer = await fetch("row?n=" + by("row").value);
  const received = await answer.json();
  if (!answer.ok) { by("status").textContent = received.error; return; }
  by("example").value = "";
  write(received.texts);
  ask();
}

if (page.live) {
  by("form").hidden = false;
  by("form").addEventListener("submit", event => event.preventDefault());
  by("example").append(...page.examples.map(([name], n) => element("option", {value: n}, name)),
                       element("option", {value: "", hidden: ""}, "typed"));
  by("example").addEventListener("change", () => { write(page.examples[by("example").value][1]); ask(); });
  by("from-row").hidden = !page.rows;
  by("row-count").textContent = page.rows.toLocaleString("en");
  by("row").max = page.rows;
  by("row").addEventListener("change", askRow);
  for (const field of fields) field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 150);
    by("example").value = "";
  });
  write(page.examples[0][1]);
  ask();
} else {
  // #layer=2&head=3&query=5 opens the page there.
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (["layer", "head", "query"].includes(name) && +value >= 1) chosen[name] = +value - 1;
  show(page.data);
}
