// The parts of the page of a run; `data` is its content.
const shown = (value) => (none(value) ? DASH : typeof value === "object" ? JSON.stringify(value) : String(value));
const CAPTIONED = data.tasks.includes("captions"), DETECTED = data.tasks.includes("concepts");

// A cell is text, a node, or { node, style }.
function table(title, columns, rows, marked = -1) {
  const id = `table-${document.querySelectorAll("table").length}-${title.length}-${rows.length}`;
  const numbers = columns.map((_, at) => rows.some((row) => row[at].style === "number"));
  const head = make("tr", {}, ...columns.map((name, at) => make("th", { scope: "col", ...(numbers[at] ? { class: "number" } : {}) }, name)));
  const body = make("tbody", {}, ...rows.map((row, line) => make("tr", line === marked ? { class: "here" } : {}, ...row.map((cell, at) => {
    const plain = typeof cell === "string" || cell instanceof Node;
    return make(at ? "td" : "th", { ...(at ? {} : { scope: "row" }), ...(plain ? {} : { class: cell.style }) }, plain ? cell : cell.node);
  }))));
  const whole = make("table", { "aria-labelledby": id }, make("thead", {}, head), body);
  return [make("h3", { id }, title), ...scrolling(id, whole)];
}
const number = (text) => ({ node: text, style: "number" });
const long = (text) => ({ node: text, style: "text" });
const facts = (values) => Object.entries(values).filter(([, value]) => !none(value))
  .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, make("bdi", {}, shown(value)))]);

function score(cell) {
  if (!cell) return number(DASH);
  if (none(cell.value)) return number(make("span", { title: cell.reason || "" }, DASH));
  return number(make("span", {}, digits(cell.value) + (cell.official ? "" : "*"), interval(cell)));
}
const unofficial = new Set(data.scores.filter((row) => [row.before, row.after].some((cell) => cell && !none(cell.value) && !cell.official)).map((row) => row.metric));
const star = (metric) => (unofficial.has(metric) ? "*" : "");
function scoreTable() {
  const has = (cell) => cell && !none(cell.value);
  const lines = data.scores.map((row) => {
    const one = row.after || row.before, change = has(row.before) && has(row.after) ? row.after.value - row.before.value : null;
    return [row.metric, score(row.before), score(row.after), number(change === null ? DASH : signed(change)),
      number(none(row.baseline) ? DASH : digits(row.baseline) + (row.baseline_official ? "" : "*")), ...(data.nearest ? [score(row.nearest)] : []), number(shown(one.n)),
      long(none(one.value) ? `absent: ${one.reason}` : make("code", {}, one.signature))];
  });
  const parts = table("Before and after post-processing", ["metric", "before [95 %]", "after [95 %]", "change", "constant caption", ...(data.nearest ? ["nearest image"] : []), "images", "signature"], lines);
  if (unofficial.size) {
    parts.push(make("p", { class: "soft" }, "A star marks a score that is not comparable with official ones: another model or another precision."));
  }
  if (data.baseline) parts.push(make("p", { class: "soft" }, "The constant caption is the training caption that is most similar to all others: ", make("bdi", {}, `\u201c${data.baseline.caption}\u201d`)));
  if (data.nearest) parts.push(make("p", { class: "soft" }, "Nearest image: the caption of the most similar training image, by the run ", make("bdi", {}, data.nearest), "."));
  return parts;
}
function gapTable() {
  const lines = Object.entries(data.image_gap).map(([name, gap]) => (none(gap.gap) ? [name, long(`absent: ${gap.reason}`), "", ""]
    : [name, number(digits(gap.value) + star(name)), number(digits(gap.permuted) + star(name)), number(make("span", {}, signed(gap.gap) + star(name), interval(gap)))]));
  return lines.length ? [...table("Image gap", ["metric", "own images", "other images", "gap [95 %]"], lines),
    make("p", { class: "soft" }, "The loss of score if each caption is given to another image. A gap whose interval excludes 0 shows that the captions belong to their images.")] : [];
}
function halfTable() {
  if (!data.halves) return [];
  const { tune, held } = data.halves;
  const gap = (one) => number(none(one.image_gap.gap) ? DASH : make("span", {}, signed(one.image_gap.gap), interval(one.image_gap)));
  const lines = Object.keys(tune.scores).map((name) => [name, score(tune.scores[name]), score(held.scores[name]), number(`${shown(tune.scores[name].n)} / ${shown(held.scores[name].n)}`)]);
  return [...table("Halves of validation, after post-processing", ["metric", "tune [95 %]", "held [95 %]", "images"], [...lines, ["image gap (rouge1)", gap(tune), gap(held), ""]]),
    make("p", { class: "soft" }, "What is chosen on the tune half is reported on the held half. An image's half depends on its id only. ", [tune.few, held.few].filter(Boolean).map((text) => `Warning: ${text}.`).join(" "))];
}
function warned() {
  const warnings = data.warnings.map((text) => make("li", {}, text));
  return warnings.length ? [make("h3", {}, "Warnings"), make("ul", { class: "warnings" }, ...warnings)] : [];
}

// What opens the page: a failure, the scores as tiles, warnings, and six examples.
const STARRED = "A star marks a score that is not comparable with official ones: another model, precision or reading.";
function tile(name, cell, more, main) {
  const value = none(cell.value) ? DASH : digits(cell.value) + (cell.official === false ? "*" : "");
  return make("li", main ? { class: "main" } : {}, make("span", { class: "name" }, name), make("b", {}, value), interval(cell) ?? make("span", { class: "interval" }, none(cell.value) ? cell.reason ?? "absent" : "no interval"),
    more ? make("span", { class: "interval" }, more) : null);
}
function captionTiles() {
  const found = data.scores.map((row) => ({ ...row, cell: row.after || row.before })), main = (row) => row.metric === data.main_metric;
  const floor = (row) => (none(row.baseline) ? null : `constant caption ${digits(row.baseline)}${row.baseline_official ? "" : "*"}`);
  const tiles = [...found.filter(main), ...found.filter((row) => !main(row) && !none(row.cell.value))].map((row) => tile(row.metric, row.cell, floor(row), main(row)));
  const gap = data.image_gap.rouge1;
  if (gap && !none(gap.gap)) tiles.splice(1, 0, make("li", {}, make("span", { class: "name" }, "image gap"), make("b", {}, signed(gap.gap)), interval(gap), make("span", { class: "interval" }, none(gap.low) ? null : gap.low > 0 ? "captions belong to their images" : "not shown to depend on the image")));
  return tiles;
}
function conceptTiles() {
  const first = data.concepts.scores.flatMap((row) => [["held half", row.held], ["all of validation", row.whole]].filter(([, cell]) => cell && !none(cell.value))
    .map(([half, cell]) => tile(`${row.metric}, ${half}`, cell, plural(cell.n, "image"), row.metric === "f1" && half === "held half")));
  return [...first, ...data.concepts.baselines.filter((one) => !none(one.held.value)).map((one) => tile(`f1 of the ${one.name}`, one.held, "held half, without a model"))];
}
function overview() {
  const failed = data.facts.status.startsWith("FINISHED") ? [] : facts(Object.fromEntries(["status", "failed in", "why", "what helps"].map((name) => [name, data.facts[name]])));
  const tiles = [...(CAPTIONED ? captionTiles() : []), ...(DETECTED ? conceptTiles() : [])], cells = data.scores.map((row) => row.after || row.before);
  const some = cells.find((cell) => !none(cell.value)), stars = tiles.some((one) => one.textContent.includes("*"));
  const words = [some && `On ${plural(some.n, "validation image")}; 95 % intervals in brackets.`, stars && STARRED, (data.facts["captions by"] ?? data.facts["concepts by"]).startsWith("a stand-in") && `The ${CAPTIONED ? "captions" : "concepts"} are by a STAND-IN model.`];
  return [...(failed.length ? [make("dl", { class: "facts failed" }, ...failed)] : []), ...(tiles.length ? [make("ul", { class: "tiles", "aria-label": "Scores" }, ...tiles), make("p", { class: "soft" }, words.filter(Boolean).join(" "))] : []), ...warned()];
}
const KINDS = { best: "Best", worst: "Worst", random: "At random" };
function openers({ metric, chosen }, rows, show, scoreOf, control = null) {
  const byKey = new Map(rows.map((row) => [row.id, row]));
  const groups = Object.entries(KINDS).map(([kind, name]) => [name, chosen.filter(([one]) => one === kind).map(([, key]) => byKey.get(key))]).filter(([, found]) => found.length);
  const said = metric ? `By ${metric}, the two best, the two worst and two images at random, always the same ones.` : "Images at random, always the same ones.";
  if (!groups.length) return [];
  const column = ([name, found]) => make("section", {}, make("h3", {}, name), ...found.map((row) => show(row, metric ? `${metric} ${none(scoreOf(row)) ? DASH : digits(scoreOf(row)) + star(metric)}` : null)));
  return [make("p", { class: "soft" }, said), control, make("div", { class: "openers" }, ...groups.map(column))];
}
function examples() {
  const at = metrics.indexOf(data.examples.metric);
  return [...(CAPTIONED ? openers(data.examples, all, opener, (row) => own(row)[at], lookSwitch()) : []), ...(DETECTED ? openers(data.concepts.examples, data.concepts.rows, imageOpener, (row) => row.f1) : [])];
}

// Mean scores of modalities and concepts, as dots with intervals.
function grouped(found, title, prefix) {
  if (!found) return [];
  const choice = make("select", { id: `${prefix}metric` }, ...found.metrics.map((name) => option(name, name))), box = make("div");
  choice.value = found.metrics.includes(data.main_metric) ? data.main_metric : found.metrics[0];
  const charts = [[`${title} by modality`, found.modalities], [`${title} by concept${found.more ? `, the ${found.concepts.length} most frequent` : ""}`, found.concepts]].filter(([, rows]) => rows.length > 1);
  if (!charts.length) return [];
  const show = (begun) => {
    const at = found.metrics.indexOf(choice.value), mean = found.all.scores[at];
    const line = (row) => ({ name: `${row.name} (${row.n.toLocaleString("en")})`, value: row.scores[at][0], low: row.scores[at][1], high: row.scores[at][2], kind: "ours", said: digits(row.scores[at][0]) + star(choice.value) });
    const drawnOf = ([name, rows]) => {
      const known = rows.filter((row) => row.scores[at]).map(line).sort((a, b) => b.value - a.value);
      return known.length > 1 ? make("div", {}, make("h3", {}, name), dots(`${choice.value}, ${name}`, known, mean && mean[0])) : make("p", {}, `${name}: some images have no ${choice.value}.`);
    };
    redraw = redraw.filter((draw) => !draws.includes(draw));
    const before = redraw.length;
    box.replaceChildren(...charts.map(drawnOf));
    draws = redraw.slice(before);
    if (!begun) draws.forEach((draw) => draw());
  };
  let draws = [];
  choice.addEventListener("change", () => show(false));
  show(true);
  return [found.metrics.length > 1 ? make("div", { class: "bar" }, make("label", {}, "Mean of ", choice)) : null, make("p", { class: "soft" }, "Number of images in parentheses; lines are 95 % intervals of a bootstrap over these images; the dashed line is the mean of all images. The axis begins where the values do. Groups overlap, and their images differ in more than the concept."), box];
}
const captionGroups = () => grouped(data.groups, "Captions", "group-");
function scores() {
  const why = data.unscored ? `This run has no scores on validation: ${data.unscored}.` : "This run has no scores yet.";
  const parts = data.scores.length ? [...scoreTable(), ...gapTable(), ...halfTable()] : [make("p", {}, why)];
  return parts;
}

function lines(title, given) {
  const series = given.filter((one) => one.points?.length), points = series.flatMap((one) => one.points), box = make("div");
  if (!series.some((one) => one.points.length > 1)) return []; // one point is no curve; tables have it
  const ends = (at) => [Math.min(...points.map((point) => point[at])), Math.max(...points.map((point) => point[at]))];
  const label = `${title}: ` + series.map((one) => `${one.name} from ${short(one.points[0][1])} to ${short(one.points.at(-1)[1])}`).join(", ");
  const draw = () => {
    const { picture, across, up, bottom } = axes(box, ends(0), ends(1), label, "optimiser step");
    const [first, last] = ends(0);
    for (const [stage, step] of data.curves.stages.slice(1).filter(([, at]) => first < at && at <= last)) {
      picture.append(drawn("line", { x1: across(step), x2: across(step), y1: 4, y2: bottom, class: "stage" }));
      picture.append(drawn("text", { x: across(step) + 4, y: 13, class: "axis" }, `stage ${stage}`));
    }
    series.forEach((one, at) => {
      const place = one.points.map(([step, value]) => `${across(step).toFixed(1)},${up(value).toFixed(1)}`);
      picture.append(drawn("path", { d: `M${place.join("L")}`, class: `ink-${one.ink ?? at % 4}` }));
      if (one.dots && one.points.length <= 40) for (const [step, value] of one.points) {
        const dot = drawn("circle", { cx: across(step), cy: up(value), r: 3.5, class: `ink-${one.ink ?? at % 4}` });
        dot.append(drawn("title", {}, `${one.name} ${digits(value)} at step ${step}`));
        picture.append(dot);
      }
    });
    box.replaceChildren(picture);
  };
  redraw.push(draw);
  const samples = series.map((one, at) => [one.name, drawn("path", { d: "M0,5L28,5", class: `ink-${one.ink ?? at % 4}` })]);
  return [make("div", {}, make("h3", {}, title), series.length > 1 ? legend(samples) : null, box)];
}
function training() {
  const { train, valid, steps_per_point: size } = data.curves;
  if (data.untrained) return [make("p", {}, "Nothing is trained in this run.")];
  if (!train.loss) return [make("p", {}, "This run has no training steps yet.")];
  const validation = (name) => valid.filter((row) => name in row).map((row) => [row.step, row[name]]);
  const names = [...new Set(valid.flatMap((row) => Object.keys(row)))].filter((name) => /^(ema_)?valid_/.test(name) && !name.endsWith("_primary"));
  const scored = names.filter((name) => !name.endsWith("valid_loss") && validation(name).length), shown = (name) => name.replace("valid_", "").replace("ema_", "average's ");
  const starred = (name) => shown(name) + star(name.replace(/^(ema_)?valid_/, ""));
  // each loss of each stage has a scale of its own; their weighted sum is shown where there are no parts
  const UNITS = { caption_loss: ", nats per token", concept_loss: ", nats per token", reward_loss: ", per sample", loss: "" }, many = data.curves.stages.length > 1;
  const within = (points, from, to) => points.filter(([step]) => from <= step && step < to);
  const stage = ([number, from], at) => {
    const to = data.curves.stages[at + 1]?.[1] ?? Infinity, own = Object.keys(train).filter((name) => /(^|_)loss$/.test(name) && within(train[name], from, to).length);
    const parts = own.length > 1 ? own.filter((name) => name !== "loss") : own, first = parts.includes("caption_loss") ? "caption_loss" : parts[0];
    const held = [["validation", "valid_loss", 3], ["validation, of the average", "ema_valid_loss", 2]].map(([name, key, ink]) => ({ name, ink, dots: true, points: valid.filter((row) => key in row && row.stage === number).map((row) => [row.step, row[key]]) }));
    const title = (name) => `${(name.charAt(0).toUpperCase() + name.slice(1)).replace("_", " ")}${many ? `, stage ${number}` : ""}${UNITS[name] ?? ""}`;
    return parts.flatMap((name) => lines(title(name), [{ name: "training", points: within(train[name], from, to) }, ...(name === first ? held : [])]));
  };
  const sampled = (...names) => names.filter((name) => train[name]).map((name) => ({ name: name.replace("_", " "), points: train[name] }));
  // the mean of the others' rewards has the same mean as the rewards; that line would hide the other one
  const apart = (train.reward_baseline || []).some(([, value], i) => Math.abs(value - train.reward[i][1]) > 1e-6);
  const charts = [...data.curves.stages.flatMap(stage), ...lines("Reward of sampled captions", sampled("reward", ...(apart ? ["reward_baseline"] : []))),
    ...lines("Distinct captions among an image\u2019s samples", sampled("distinct_samples")), ...lines("Tokens of a sample", sampled("sample_length")),
    ...lines("Entropy of a sampled token, nats", sampled("sample_entropy")), ...lines("Learning rate", [{ name: "learning rate", points: train.learning_rate }]),
    ...lines("Scores on validation while training", scored.map((name) => ({ name: starred(name), points: validation(name), dots: true })))];
  const cells = valid.map((row) => [`stage ${row.stage}, epoch ${+row.epoch.toFixed(2)}`, number(row.step.toLocaleString("en")), ...names.map((name) => number(none(row[name]) ? DASH : digits(row[name]) + star(name.replace(/^(ema_)?valid_/, ""))))]);
  return [...(size > 1 ? [make("p", { class: "soft" }, `A point of training is the mean of ${size} steps.`)] : []), make("div", { class: "charts" }, ...charts),
    ...(cells.length ? [folded("Validation while training, as a table", ...table("Each validation", ["after", "step", ...names.map(shown)], cells))] : [])];
}
function lengths() {
  if (!data.lengths) return [make("p", {}, "This run has no captions yet.")];
  const { width, counts, mean } = data.lengths, names = Object.keys(counts), box = make("div");
  const most = Math.max(...names.flatMap((name) => counts[name])), bins = counts[names[0]].length;
  const label = "Words per caption: " + names.map((name) => `${name}, mean ${mean[name].toFixed(1)}`).join("; ");
  redraw.push(() => {
    const { picture, across, up, bottom } = axes(box, [0, bins * width], [0, most], label, "words per caption");
    names.forEach((name, at) => counts[name].forEach((count, bin) => {
      const room = (across(width) - across(0)) * 0.9, x = across(bin * width) + (room / names.length) * at;
      const bar = drawn("rect", { x, y: up(count), width: room / names.length, height: bottom - up(count), class: `fill-${at}` });
      bar.append(drawn("title", {}, `${name} of ${bin * width} to ${(bin + 1) * width - 1} words: ${count}`));
      picture.append(bar);
    }));
    box.replaceChildren(picture);
  });
  const cells = counts[names[0]].map((_, bin) => [width > 1 ? `${bin * width} to ${(bin + 1) * width - 1}` : `${bin}`, ...names.map((name) => number(String(counts[name][bin])))]);
  return [legend(names.map((name, at) => [`${name} (mean ${mean[name].toFixed(1)} words)`, drawn("rect", { width: 28, height: 10, class: `fill-${at}` })])), box,
    folded("As a table", ...table("Captions by their number of words", ["words", ...names], cells))];
}

function config() {
  const { keys, runs } = data.siblings, link = (one) => (one.link && !one.here ? make("a", { href: one.link }, one.run) : one.run);
  const beside = runs.length < 2 ? [] : table("Compared with the other runs of this experiment", ["run", "status", data.main_metric ? data.main_metric + (CAPTIONED ? "" : " (held)") : "score", ...keys],
    runs.map((one) => [link(one), one.status, score(one.score), ...one.values.map((value) => shown(value))]), runs.findIndex((one) => one.here));
  const base = data.from_base, other = (base ? base.changed : []).map(([key, value, usual]) => [key, long(shown(value)), long(shown(usual))]);
  const changed = data.differences.map(([key, value, usual]) => [key, long(shown(value)), long(shown(usual))]);
  return [...beside, ...(other.length ? table(`What differs from the base, ${base.file}`, ["key", "this run", "base"], other) : []), ...(changed.length ? table("What differs from the defaults", ["key", "this run", "default"], changed) : []),
    folded("The whole config", make("pre", { tabindex: "0", role: "region", "aria-label": "Config" }, data.config))];
}
function origin() {
  const steps = data.steps.map((one) => [one.step, number(none(one.seconds) ? "not done" : one.seconds.toLocaleString("en", { minimumFractionDigits: 1 })), long(make("code", {}, one.folder)),
    long(shown(one.by)), one.commit ? one.commit.slice(0, 10) : DASH]);
  const profile = Object.entries(data.profile).flatMap(([name, href]) => [" ", make("a", { href }, name)]);
  return [...(steps.length ? table("Steps", ["step", "seconds", "folder", "made by", "commit"], steps) : []),
    ...(profile.length ? [make("p", {}, "Profile of some steps of training; open the trace in chrome://tracing or ui.perfetto.dev:", ...profile)] : []),
    make("div", { class: "charts" }, ...[["Data", data.data], ["Environment", data.environment]].map(([name, values]) => make("div", {}, make("h3", {}, name), make("dl", { class: "facts" }, ...facts(values)))))];
}

document.title = `${data.experiment}/${data.run}`;
byId("title").textContent = `${data.experiment}/${data.run}`;
byId("made").textContent = [data.facts.status, data.facts["captions by"] && `captions by ${data.facts["captions by"]}`, data.facts["concepts by"] && `concepts by ${data.facts["concepts by"]}`, data.facts.checkpoint, `edition ${data.facts.edition}`, `seed ${data.facts.seed}`, data.facts.ended ?? data.facts.started].filter(Boolean).join(" \u00b7 ");
byId("facts").append(...facts({ ...data.facts, "page made": data.made }));
const SECTIONS = { scores: CAPTIONED, groups: CAPTIONED && data.groups, lengths: CAPTIONED, captions: CAPTIONED, concepts: DETECTED, images: DETECTED, examples: data.examples.chosen.length || data.concepts?.examples.chosen.length };
for (const [id, shown] of Object.entries(SECTIONS).filter(([, shown]) => !shown)) for (const node of [byId(id), document.querySelector(`nav a[href="#${id}"]`).parentElement]) node.remove();
const images = DETECTED ? imageGallery() : null;
for (const [id, build] of Object.entries({ "overview": overview, "example-parts": examples, "score-parts": scores, "group-parts": captionGroups, "concept-parts": conceptScores, "training-parts": training, "length-parts": lengths, "config-parts": config, "origin-parts": origin })) byId(id)?.append(...build().filter((part) => part));
redraw.forEach((draw) => draw());
if (CAPTIONED) captionGallery();
