const PAGE = 20, all = data.captions.rows, metrics = data.captions.metrics;
const words = (text) => text.split(/\s+/).filter(Boolean);
const prediction = (row) => row.after ?? row.before ?? "";
const own = (row) => row.scores_after ?? row.scores_before ?? [];
all.forEach((row, at) => { row.at = at; row.removed = words(row.before ?? "").length - words(prediction(row)).length; });

const bare = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || word;

// The longest common subsequence of words, ignoring case and outer punctuation; of repetitions the first is kept.
function removedWords(before, after) {
  const a = before.map(bare), b = after.map(bare), gone = new Array(a.length).fill(false);
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const n = a.length - end - start, m = b.length - end - start;
  if (n * m > 4e6) return gone.fill(true, start, a.length - end);
  const best = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) {
    best[i][j] = a[start + i] === b[start + j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  }
  for (let i = 0, j = 0; i < n;) {
    if (j < m && a[start + i] === b[start + j]) { i++; j++; } else if (j < m && best[i][j + 1] > best[i + 1][j]) j++; else gone[start + i++] = true;
  }
  return gone;
}
// The words of a text, runs of the marked ones in an element.
function marked(text, marks, element) {
  const parts = [];
  for (let at = 0; at < text.length;) {
    let to = at + 1;
    while (to < text.length && marks[to] === marks[at]) to++;
    const run = text.slice(at, to).join(" ");
    parts.push(at ? " " : "", marks[at] ? make(element, {}, run) : run);
    at = to;
  }
  return parts;
}
const struck = (before, after) => marked(words(before), removedWords(words(before), words(after)), "del");
const changed = (row) => row.before !== undefined && row.after !== undefined && words(row.before).map(bare).join(" ") !== words(row.after).map(bare).join(" ");
// Which words of a text are in the other one, each as often as it is there; ROUGE-1 counts them alike.
function sharedWords(text, other) {
  const left = new Map();
  for (const word of words(other).map(bare)) left.set(word, (left.get(word) ?? 0) + 1);
  return words(text).map((word) => { const count = left.get(bare(word)) ?? 0; left.set(bare(word), count - 1); return count > 0; });
}
function captionParts(row, fold = false) {
  const line = (name, ...text) => [make("dt", {}, name), make("dd", { class: "caption", dir: "auto" }, ...text)];
  const said = row.after ?? row.before, both = row.reference !== undefined && said !== undefined;
  const plain = (text, other) => (!text ? [make("span", { class: "soft" }, "(empty)")] : both ? marked(words(text), sharedWords(text, other), "mark") : [text]);
  const parts = [];
  if (row.reference !== undefined) parts.push(...line("Reference", ...plain(row.reference, said)));
  if (row.after !== undefined) parts.push(...line("Prediction", ...plain(row.after, row.reference)));
  if (row.before !== undefined && row.after === undefined) parts.push(...line("Prediction, not post-processed", ...plain(row.before, row.reference)));
  const before = changed(row) ? line("Before post-processing", ...struck(row.before, row.after)) : [];
  if (fold && before.length) return make("div", {}, make("dl", {}, ...parts), folded(before[0].textContent, make("dl", {}, before[1])));
  return make("dl", {}, ...parts, ...before);
}
const pictured = new Map(all.map((row) => [row.id, row]));
function picture(one, loading = "lazy") {
  const row = one.thumbnail || one.image ? one : pictured.get(one.id) ?? one;
  if (!row.thumbnail && !row.image) return make("div", { class: "picture" }, "no image");
  const image = make("img", { loading, alt: `image ${row.id}`, src: row.thumbnail ? `data:image/jpeg;base64,${row.thumbnail}` : row.image });
  return make("a", { class: "picture", href: row.image, title: "The whole image, from its file" }, make("span", { class: "frame" }, image, row.attention ? looked(row.attention) : null));
}
// Where the queries look, over the image: the more, the stronger the colour.
function looked(text) {
  const [height, width] = data.captions.attention_grid, node = make("canvas", { width, height, class: "look", "aria-hidden": "true" });
  const values = Uint8Array.from(atob(text), (one) => one.charCodeAt(0)), pen = node.getContext("2d"), pixels = pen.createImageData(width, height);
  values.forEach((value, at) => pixels.data.set([255, 110 + (value * 120) / 255, 0, value * 0.75], 4 * at));
  pen.putImageData(pixels, 0, 0);
  return node;
}
function lookSwitch() {
  if (!data.captions.attention_grid) return null;
  const box = make("input", { type: "checkbox", id: "look" });
  box.addEventListener("change", () => document.body.classList.toggle("looking", box.checked));
  return make("div", { class: "bar" }, make("label", { class: "check" }, box, "Show where the model looks:"),
    make("p", { class: "soft" }, "the mean attention of the Q-Former\u2019s queries over the image, relative to its highest value in that image. It is the same for all words."));
}
function opener(row, said) {
  return make("article", { class: "opener" }, picture(row, "eager"), make("div", {}, make("h4", {}, make("bdi", {}, row.id)), said ? make("p", { class: "soft" }, said) : null, captionParts(row, true)));
}
function scoresOf(row) {
  if (!own(row).length) return null;
  const two = row.scores_after && row.scores_before && changed(row), before = row.scores_before ?? [];
  const cell = (name, value) => make("td", { class: "number" }, none(value) ? DASH : digits(value) + star(name));
  const lines = metrics.map((name, at) => make("tr", byId("sort").value === `score ${name}` ? { class: "sorted" } : {}, make("th", { scope: "row" }, name),
    ...(two ? [cell(name, before[at])] : []), cell(name, own(row)[at])));
  const head = make("tr", {}, make("th", { scope: "col" }, "score"), ...(two ? [make("th", { scope: "col", class: "number" }, "before")] : []), make("th", { scope: "col", class: "number" }, two ? "after" : "value"));
  return make("table", { "aria-label": `Scores of ${row.id}` }, make("thead", {}, head), make("tbody", {}, ...lines));
}
function card(row) {
  const named = (row.concepts ?? []).map((at) => make("li", { title: data.captions.concepts[at][0] }, make("bdi", {}, data.captions.concepts[at][1])));
  return make("li", {}, picture(row), make("div", {}, make("h3", {}, make("bdi", {}, row.id)), captionParts(row),
    named.length ? make("ul", { class: "concepts", "aria-label": "Concepts" }, ...named) : null), make("div", { class: "scores" }, scoresOf(row)));
}

// First, previous, next and last, in one or more boxes, for pages that `go` shows.
function pager({ pages, page, go }) {
  const updates = [];
  const fill = (box, after = () => {}) => {
    const targets = { First: () => 0, Previous: () => page() - 1, Next: () => page() + 1, Last: () => pages() - 1 }, place = make("span", { class: "soft" });
    const buttons = Object.entries(targets).map(([name, target]) => {
      const button = make("button", { type: "button" }, name);
      const possible = () => target() >= 0 && target() < pages() && target() !== page();
      button.addEventListener("click", () => { if (possible()) { go(target()); after(); } });
      updates.push(() => button.setAttribute("aria-disabled", String(!possible())));
      return button;
    });
    updates.push(() => { place.textContent = `page ${(page() + 1).toLocaleString("en")} of ${pages().toLocaleString("en")}`; });
    box.append(buttons[0], buttons[1], place, buttons[2], buttons[3]);
  };
  return { fill, update: () => updates.forEach((update) => update()) };
}

// A list of images with search, order, filters and pages. `prefix` is that of the ids of its controls.
function gallery(prefix, { rows, word, title, keys, first, filters, concepts, has, haystack, card }) {
  const part = (name) => byId(prefix + name), [search, sort, filter, concept] = ["search", "sort", "filter", "concept"].map(part);
  let found = [], page = 0, lowFirst = true;
  const turn = pager({ pages: () => Math.max(Math.ceil(found.length / PAGE), 1), page: () => page, go: (to) => { page = to; show(); } });
  function show() {
    const from = page * PAGE, shown = found.slice(from, from + PAGE);
    part("list").replaceChildren(...shown.map(card));
    part("list").setAttribute("start", from + 1);
    const range = shown.length ? `${(from + 1).toLocaleString("en")} to ${(from + shown.length).toLocaleString("en")} of ` : "";
    part("status").textContent = `${range}${plural(found.length, word)}` + (found.length < rows.length ? `, out of ${rows.length.toLocaleString("en")}` : "");
    turn.update();
  }
  function select() {
    const wanted = words(search.value.toLowerCase()), only = concept.value === "" ? null : Number(concept.value), passes = filters[filter.value][1];
    found = rows.filter((row) => passes(row, only) && (only === null || has(row, only)) && wanted.every((one) => haystack(row).includes(one)));
    const [, key] = keys[sort.value], sign = lowFirst ? 1 : -1, keyed = found.map((row) => [key(row), row]);
    keyed.sort(([x, a], [y, b]) => (x === null || y === null ? (x === null) - (y === null) : sign * (typeof x === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0)) || a.at - b.at);
    found = keyed.map(([, row]) => row);
    page = 0;
    show();
  }
  function order(low) {
    lowFirst = low;
    const isScore = sort.value.startsWith("score ");
    part("low").textContent = isScore ? "worst first" : "lowest first";
    part("high").textContent = isScore ? "best first" : "highest first";
    part("low").setAttribute("aria-pressed", String(low));
    part("high").setAttribute("aria-pressed", String(!low));
  }
  if (!rows.length) { for (const name of ["controls", "pages-above", "pages-below"]) part(name).hidden = true; return { only: () => {} }; }
  const option = (value, text) => make("option", { value }, text);
  sort.append(...Object.entries(keys).map(([value, [name]]) => option(value, name)));
  sort.value = first;
  filter.append(...Object.entries(filters).map(([value, [name, passes]]) => option(value, `${name} (${rows.filter((row) => passes(row, null)).length.toLocaleString("en")})`)));
  concept.append(option("", "any"), ...concepts.map((name, at) => option(String(at), name)));
  turn.fill(part("pages-above"));
  turn.fill(part("pages-below"), () => { part("status").scrollIntoView(); byId(title).focus({ preventScroll: true }); });
  part("controls").addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", select);
  sort.addEventListener("change", () => { order(lowFirst); select(); });
  for (const one of [filter, concept]) one.addEventListener("change", select);
  part("low").addEventListener("click", () => { order(true); select(); });
  part("high").addEventListener("click", () => { order(false); select(); });
  order(true);
  select();
  return { only(at) { search.value = ""; filter.value = "all"; concept.value = String(at); select(); part("controls").scrollIntoView(); byId(title).focus({ preventScroll: true }); } };
}
function captionGallery() {
  byId("notes").append(...data.captions.notes.map((text) => make("p", {}, text)));
  const named = data.captions.concepts, keys = { order: ["order of the data", (row) => row.at], id: ["id", (row) => row.id],
    words: ["words in the prediction", (row) => words(prediction(row)).length], removed: ["words removed", (row) => row.removed] };
  metrics.forEach((name, at) => { keys[`score ${name}`] = [name, (row) => own(row)[at] ?? null]; });
  const filters = { all: ["all captions", () => true], removed: ["with words removed", (row) => row.removed > 0],
    changed: ["changed by post-processing", (row) => row.after !== undefined && row.after !== row.before], same: ["not changed", (row) => row.after === row.before] };
  gallery("", { rows: all, word: "caption", title: "captions-title", keys, first: metrics.includes(data.main_metric) ? `score ${data.main_metric}` : "order", filters,
    concepts: named.map(([, name, count]) => `${name} (${count.toLocaleString("en")})`), has: (row, only) => (row.concepts ?? []).includes(only), card,
    haystack: (row) => (row.text ??= [row.id, row.reference, row.before, row.after, ...(row.concepts ?? []).flatMap((at) => named[at].slice(0, 2))].join("\n").toLowerCase()) });
}

