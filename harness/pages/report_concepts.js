const pValue = (p) => (none(p) ? "" : p < 0.0001 ? "p\u00a0<\u00a00.0001" : `p\u00a0=\u00a0${digits(p)}`);
function conceptScores() {
  const { scores: rows, baselines, told, tuned, few, predictor, labels, table: counted } = data.concepts;
  const about = [predictor && `Predictor: ${predictor}`, labels && plural(labels, "concept") + " to choose from"].filter(Boolean).join("; ");
  const parts = about ? [make("p", {}, about + ".")] : [];
  if (told) parts.push(make("p", {}, told.charAt(0).toUpperCase() + told.slice(1) + (told.endsWith(".") ? "" : ".")));
  if (!rows.length) return [...parts, make("p", {}, data.unscored ? `This run has no scores on validation: ${data.unscored}.` : "Its concepts have no scores yet."), ...(counted.length ? conceptTable() : [])];
  const counts = (row) => number([row.held, row.whole, row.tune].map((one) => (one ? one.n.toLocaleString("en") : DASH)).join(" / "));
  const lines = rows.map((row) => [row.metric, score(row.held), score(row.whole), score(row.tune), counts(row),
    long(none(row.whole.value) ? `absent: ${row.whole.reason}` : make("code", {}, row.whole.signature))]);
  const floor = (one) => score({ official: true, ...one });
  lines.push(...baselines.map((one) => [one.name, floor(one.held), floor(one.whole), number(DASH), number(""), ""]));
  parts.push(...table("F1, averaged over images", ["score", "held half [95 %]", "all of validation [95 %]", "tune half [95 %]", "images", "signature"], lines));
  if (rows.some((row) => [row.whole, row.held].some((one) => one && !none(one.value) && !one.official))) parts.push(make("p", { class: "soft" }, "A star marks a score that is not comparable with official ones; its signature says why."));
  parts.push(make("p", { class: "soft" }, tuned ? "Compare runs by the held half: the tune half chose thresholds, so the scores on it and on all of validation are too high. An image's half depends on its id only."
    : "No image of validation chose a threshold. An image's half depends on its id only."), ...few.map((text) => make("p", { class: "soft" }, `Warning: ${text}.`)));
  const gain = (one) => (!one || none(one.difference) ? long(one && one.reason ? `absent: ${one.reason}` : DASH) : number(make("span", {}, signed(one.difference), interval(one), make("span", { class: "interval" }, pValue(one.p)))));
  if (baselines.length) parts.push(...table("What the run gains over baselines", ["f1 of the run minus that of the", "held half [95 %]", "all of validation [95 %]"], baselines.map((one) => [one.name, gain(one.gain_held), gain(one.gain)])),
    make("p", { class: "soft" }, "Each baseline gives every image the same concepts: the most frequent one, or the most frequent set, of the training images. The tests are paired by image."));
  return [...parts, ...grouped(data.concepts.groups, "F1 of images", "image-group-").filter((one) => one), ...conceptTable()];
}

// A table of thousands of concepts: a page at a time, sorted by any column. An absent value comes last.
const WRONG = (row) => (none(row[2]) ? null : row[2] + row[3] - 2 * row[4]);
const count = (value) => (none(value) ? DASH : value.toLocaleString("en")), ratio = (value) => (none(value) ? DASH : digits(value));
const CONCEPT_COLUMNS = [["concept", (row) => row[1] || row[0]], ["wrong", WRONG, count], ["true", (row) => row[2], count], ["predicted", (row) => row[3], count],
  ["right", (row) => row[4], count], ["precision", (row) => row[5], ratio], ["recall", (row) => row[6], ratio], ["f1", (row) => row[7], ratio]];
function inOrder(rows, key, sign) {
  const keyed = rows.map((row, at) => [key(row), at, row]);
  keyed.sort(([x, a], [y, b]) => (none(x) || none(y) ? none(x) - none(y) : sign * (typeof x === "number" ? x - y : x.localeCompare(y))) || a - b);
  return keyed.map(([, , row]) => row);
}
function conceptTable() {
  const SHOWN = 15, every = data.concepts.table, scored = every.some((row) => !none(row[2]));
  const columns = CONCEPT_COLUMNS.filter(([name]) => scored || name === "concept" || name === "predicted");
  const head = make("tr"), body = make("tbody"), status = make("p", { class: "soft", role: "status" }), search = make("input", { type: "search", autocomplete: "off", id: "table-search" });
  const boxes = [make("div", { class: "pages", role: "group", "aria-label": "Pages of the table of concepts" })];
  let order = every, rows = every, page = 0;
  const turn = pager({ pages: () => Math.max(Math.ceil(rows.length / SHOWN), 1), page: () => page, go: (to) => { page = to; show(); } });
  boxes.forEach((box) => turn.fill(box));
  function show() {
    body.replaceChildren(...rows.slice(page * SHOWN, (page + 1) * SHOWN).map((row) => {
      const only = make("button", { type: "button", title: "Show its images" }, make("bdi", {}, row[1] || row[0]));
      only.addEventListener("click", () => images.only(every.indexOf(row)));
      return make("tr", {}, ...columns.map(([, key, text]) => (text ? make("td", { class: "number" }, text(key(row)))
        : make("th", { scope: "row", class: "concept" }, only, row[1] ? make("code", {}, row[0]) : null))));
    }));
    status.textContent = `${plural(rows.length, "concept")}` + (rows.length < every.length ? `, out of ${every.length.toLocaleString("en")}` : "");
    turn.update();
  }
  const select = () => { const wanted = words(search.value.toLowerCase()); rows = order.filter((row) => wanted.every((word) => `${row[0]} ${row[1]}`.toLowerCase().includes(word))); page = 0; show(); };
  columns.forEach(([name, key, numeric]) => {
    const button = make("button", { type: "button" }, name), cell = make("th", { scope: "col", class: numeric ? "sortable number" : "sortable" }, button);
    if (name === (scored ? "wrong" : "predicted")) cell.setAttribute("aria-sort", "descending");
    button.addEventListener("click", () => {
      const down = !numeric ? cell.getAttribute("aria-sort") === "ascending" : cell.getAttribute("aria-sort") !== "descending";
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      order = inOrder(every, key, down ? -1 : 1);
      select();
    });
    head.append(cell);
  });
  search.addEventListener("input", select);
  show();
  const title = scored ? "Each concept, worst first" : "Predicted concepts";
  const whole = make("table", { "aria-labelledby": "concept-table" }, make("thead", {}, head), body);
  return [make("h3", { id: "concept-table" }, title),
    ...(scored ? [make("p", { class: "soft" }, "Over all images of validation. The worst is wrong, that is missed or invented, in most images. Precision is absent (\u2013) for a concept that is never predicted, recall for one that no image has.")] : []),
    make("form", {}, make("label", {}, "Search concept or CUI ", search)), status, ...scrolling("concept-table", whole), ...boxes];
}

function chip(at, mark, kind) {
  const [cui, name] = data.concepts.table[at];
  return make("li", kind ? { class: kind } : {}, make("b", {}, mark), make("bdi", {}, name || cui), name ? make("code", {}, cui) : null);
}
function conceptLists(row) {
  const list = (title, places, mark) => [make("dt", {}, `${title} (${places.length})`),
    make("dd", {}, places.length ? make("ul", { class: "concepts", "aria-label": title }, ...places.map((at) => chip(at, ...mark(at)))) : make("span", { class: "none" }, "none"))];
  const unknown = row.true === undefined, both = ["\u2713", ""];
  return make("dl", {}, ...(unknown ? [] : list("True", row.true, (at) => (row.missed.includes(at) ? ["missed", "missed"] : both))),
    ...list("Predicted", row.predicted, (at) => (unknown ? ["", ""] : row.invented.includes(at) ? ["invented", "invented"] : both)));
}
function imageOpener(row, said) {
  return make("article", { class: "opener" }, picture(row, "eager"), make("div", {}, make("h4", {}, make("bdi", {}, row.id)), said ? make("p", { class: "soft" }, said) : null, conceptLists(row)));
}
function imageCard(row) {
  const lines = [["f1", none(row.f1) ? DASH : digits(row.f1)], ["right", String(row.right.length)], ["missed", String(row.missed.length)], ["invented", String(row.invented.length)]];
  const scores = make("table", { "aria-label": `Scores of ${row.id}` }, make("tbody", {}, ...lines.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "number" }, value)))));
  return make("li", {}, picture(row), make("div", {}, make("h3", {}, make("bdi", {}, row.id)), conceptLists(row)), make("div", { class: "scores" }, row.true === undefined ? null : scores));
}
function imageGallery() {
  const { rows, table: named, notes } = data.concepts, scored = rows.some((row) => row.true !== undefined);
  rows.forEach((row, at) => {
    const true_ = row.true ?? [];
    Object.assign(row, { at, right: true_.filter((one) => row.predicted.includes(one)), missed: true_.filter((one) => !row.predicted.includes(one)), invented: row.true === undefined ? [] : row.predicted.filter((one) => !true_.includes(one)) });
  });
  byId("image-notes").append(...notes.map((text) => make("p", {}, text)));
  byId("image-key").hidden = !scored;
  const marked = (kind) => (row, only) => (only === null ? row[kind].length > 0 : row[kind].includes(only));
  const filters = { all: ["all images", () => true], ...(scored ? { missed: ["missed concepts", marked("missed")], invented: ["invented concepts", marked("invented")],
    wrong: ["missed or invented concepts", (row, only) => filters.missed[1](row, only) || filters.invented[1](row, only)], right: ["all concepts right", (row) => row.true !== undefined && !row.missed.length && !row.invented.length] } : {}) };
  const keys = { ...(scored ? { "score f1": ["f1", (row) => row.f1 ?? null] } : {}), order: ["order of the data", (row) => row.at], id: ["id", (row) => row.id],
    ...(scored ? { true: ["number of true concepts", (row) => (row.true ?? []).length] } : {}), predicted: ["number of predicted concepts", (row) => row.predicted.length],
    ...(scored ? { missed: ["number of missed concepts", (row) => row.missed.length], invented: ["number of invented concepts", (row) => row.invented.length] } : {}) };
  return gallery("image-", { rows, word: "image", title: "image-title", keys, first: scored ? "score f1" : "order", filters, card: imageCard,
    concepts: named.map(([cui, name, support, predicted]) => `${name || cui} (${none(support) ? "" : `true ${support.toLocaleString("en")}, `}predicted ${predicted.toLocaleString("en")})`),
    has: (row, only) => row.predicted.includes(only) || (row.true ?? []).includes(only),
    haystack: (row) => (row.text ??= [row.id, ...(row.true ?? []), ...row.predicted].map((one) => (typeof one === "number" ? named[one].slice(0, 2).join("\n") : one)).join("\n").toLowerCase()) });
}
