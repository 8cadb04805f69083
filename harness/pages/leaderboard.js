// The page of the leaderboard; `data` is its content.
const [task, edition, experiment, metric, order] = ["task", "edition", "experiment", "metric", "order"].map(byId);
const isChecked = (id) => byId(id).checked;
const SPLIT = { valid: "validation", test: "test" };

// A cell is { node, key }: node is shown, key sorts the column (null comes last).
const text = (value) => ({ node: none(value) ? DASH : String(value), key: value ?? null });
const marks = (cell) => (cell.official ? "" : "*") + (cell.tuned ? "\u2020" : "");
const nothing = { node: DASH, key: null, number: true };
function score(cell, main = false) {
  const style = main ? { style: "main" } : {};
  if (!cell) return { ...nothing, ...style };
  if (cell.value === null) return { ...nothing, ...style, node: make("span", { title: cell.reason || "" }, DASH) };
  return { node: make("span", { title: cell.signature || "" }, digits(cell.value) + marks(cell), interval(cell)), key: cell.value, number: true, ...style };
}
const plain = (value, main = false) => (value === undefined ? nothing : { node: digits(value), key: value, number: true, ...(main ? { style: "main" } : {}) });
const named = (run, ...tags) => ({ node: make("span", {}, run.run, make("span", { class: "experiment" }, run.experiment), ...tags), key: `${run.experiment}/${run.run}` });
const date = (run) => ({ node: make("span", { class: "date", title: run.date || "" }, (run.date || "").slice(0, 10) || DASH), key: run.date || null });
const tag = (words) => make("span", { class: "tag" }, words);

let tables = 0;
function table(caption, columns, rows) {
  const head = make("tr"), body = make("tbody"), id = `table-${tables++}`;
  const lines = rows.map((row) => {
    const line = make("tr", row.style ? { class: row.style } : {});
    row.cells.forEach((cell, at) => {
      const style = [cell.number ? "number" : "", cell.style || ""].join(" ").trim();
      line.append(make(at === row.head ? "th" : "td", { ...(at === row.head ? { scope: "row" } : {}), ...(style ? { class: style } : {}) }, cell.node));
    });
    return { line, cells: row.cells };
  });
  const show = () => body.replaceChildren(...lines.map((one) => one.line));
  columns.forEach((name, at) => {
    const number = rows.some((row) => row.cells[at].number);
    const button = make("button", { type: "button" }, name);
    const style = [number ? "number" : "", rows.length && rows[0].head === at ? "stays" : ""].join(" ").trim();
    const cell = make("th", { scope: "col", ...(style ? { class: style } : {}) }, button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "descending" || (!number && !cell.hasAttribute("aria-sort"));
      const sign = down ? 1 : -1;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "ascending" : "descending");
      lines.sort((a, b) => {
        const [x, y] = [a.cells[at].key, b.cells[at].key];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
      });
      show();
    });
    head.append(cell);
  });
  show();
  const whole = make("table", { "aria-labelledby": id }, make("thead", {}, head), body);
  return [make("h3", { id }, caption), ...scrolling(id, whole)];
}

function links(run) {
  const found = [];
  if (run.links["report.html"]) found.push(make("a", { href: run.links["report.html"] }, "report"));
  if (run.links["config.yaml"]) found.push(make("a", { href: run.links["config.yaml"] }, "config"));
  for (const place of run.mlflow) {
    found.push(place.link ? make("a", { href: place.link, rel: "noreferrer", title: `${place.run} on ${place.server}` }, "MLflow")
      : make("span", {}, `MLflow ${place.run} on ${place.server}`));
  }
  const node = make("span");
  found.forEach((link, at) => node.append(at ? ", " : "", link));
  return { node: found.length ? node : "\u2013", key: null };
}
const commit = (run) => text(run.commit ? run.commit.slice(0, 10) + (run.dirty ? " (changed since)" : "") : null);
const gap = (run) => (run.image_gap && !none(run.image_gap.gap) ? { node: make("span", {}, signed(run.image_gap.gap), interval(run.image_gap)), key: run.image_gap.gap, number: true } : nothing);
const taskOf = (board) => board.task ?? "captions", GAP = (board) => (board.task ? [] : ["image gap"]), gaps = (board, run) => (board.task ? [] : [gap(run)]);
function beaten(run) {
  const lines = Object.entries(run.beats).map(([name, teams]) => make("div", {}, `${name}: ${teams.join(", ") || "none"}`));
  return { node: lines.length ? make("div", {}, ...lines) : DASH, key: null, style: "long" };
}
// The compact view leaves out where a run comes from, and intervals of all but the score that ranks.
const ORIGIN = () => (isChecked("compact") ? ["date (UTC)", "more"] : ["date (UTC)", "seed", "commit", "command", "more"]);
const origin = (run) => (isChecked("compact") ? [date(run), links(run)] : [date(run), text(run.seed), commit(run), { node: make("code", {}, run.command), key: run.command, style: "long" }, links(run)]);
const scores = (board, names, run) => names.map((name) => score(run.scores[name], name === board.primary));
const where = (board, split) => SPLIT[split] + (board.half && split === "valid" ? ` (the ${board.half} half)` : "");

// "2nd, 95 %: 1st to 3rd" as a number with its interval below.
function ranked(said, key) {
  if (!said) return { node: DASH, key: null };
  const [place, ends] = said.split(", 95 %: ");
  return { node: make("span", {}, place, ends ? make("span", { class: "interval" }, `95 %: ${ends}`) : null), key, style: "main" };
}
const lastOf = (board) => Math.max(0, ...board.standings.map((row) => row.rank));
const placed = (board, run) => ranked(run.place?.text, run.place ? (run.place.place ?? lastOf(board) + 1) - 0.5 : null);

function standings(board, runs) {
  const own = [...runs.filter((run) => !run.apart && run.split === "test"), ...(isChecked("ours") ? bestOf(runs.filter((run) => !run.apart && run.split === "valid")) : [])];
  byId("ours-choice").hidden = !board.standings.length || !board.runs.some((run) => !run.apart && run.split === "valid");
  if (!board.standings.length && !own.some((run) => run.split === "test")) return [make("p", {}, "There are no official standings for this edition.")];
  const names = board.metrics.filter((name) => board.standings.some((row) => name in row.scores)), main = (name) => name === board.primary;
  const lines = board.standings.map((row) => ({ head: 1, at: row.scores[board.primary],
    cells: [{ ...text(row.rank), key: row.rank, style: "main" }, text(row.team), ...names.map((name) => plain(row.scores[name], main(name))), text(row.run), { ...text(row.source), style: "long" }] }));
  for (const run of own) {
    const test = run.split === "test", why = test ? "our run; the place that it would take" : `our run on ${where(board, "valid")}; hypothetical`;
    lines.push({ head: 1, at: run.scores[board.primary].value, style: test ? "ours" : "ours maybe", cells: [placed(board, run), named(run, tag(test ? "ours, test" : "ours, validation")),
      ...names.map((name) => score(run.scores[name], main(name))), text(null), { ...text(why), style: "long" }] });
  }
  lines.sort((a, b) => b.at - a.at || Boolean(b.style) - Boolean(a.style));
  return [...table(`${board.known}${own.length ? `, and ${plural(own.length, "run")} of ours${isChecked("ours") ? ", the best of each experiment on validation" : ""}` : ""}`, ["rank", "team", ...names, "run", "source"], lines),
    own.length ? make("p", { class: "soft" }, "The interval of a place comes from our scores alone: our images are resampled, and the official scores are fixed numbers. Validation has other images than test, so a place by validation is a guess.") : ""];
}

function ours(board, runs, split) {
  const found = runs.filter((run) => run.split === split && !run.apart), title = `Ranked, on ${where(board, split)}`, test = split === "test", full = !isChecked("compact");
  if (!found.length) return test ? [] : [make("h3", {}, title), make("p", {}, "None can be ranked.")];
  const names = board.metrics.filter((name) => found.some((run) => name in run.scores)), places = !test && board.standings.length;
  const lines = found.map((run) => ({ head: 1, cells: [test ? placed(board, run) : ranked(run.rank_text, run.rank), named(run), ...scores(board, names, run), ...gaps(board, run),
    ...(places ? [placed(board, run)] : []), ...(full ? [beaten(run)] : []), ...origin(run)] }));
  const [how, beats] = test ? ["the place that each would take", "would have beaten"] : ["among each other", "would have beaten (hypothetical)"];
  return [...table(`${title}, ${how}`, ["rank", "run", ...names, ...GAP(board), ...(places ? ["hypothetical place"] : []), ...(full ? [beats] : []), ...ORIGIN()], lines),
    test ? "" : make("p", { class: "soft" }, `${board.without_intervals ? `Ranks have no interval: ${board.without_intervals}.` : "The interval of a rank is that of a bootstrap over images, the same ones for all runs."} Hypothetical: among the teams, by our score on validation and theirs on test. The splits have different images, so this is not a rank.`)];
}

function seeds(board, chosen) {
  const groups = board.seeds.filter((group) => !chosen || group.experiment === chosen);
  if (!groups.length) return [];
  const names = board.metrics.filter((name) => groups.some((group) => name in group.scores));
  const cell = (one) => (!one ? plain() : one.mean === null ? { node: make("span", { title: one.reason }, "\u2013"), key: null, number: true }
    : { node: make("span", { title: one.signature }, digits(one.mean) + marks(one), make("span", { class: "interval" }, `\u00b1 ${digits(one.sd)}`)), key: one.mean, number: true, style: "sd" });
  const lines = groups.map((group) => ({ head: 1, cells: [text(group.experiment), text(group.variant), text(where(board, group.split)), text(group.seeds.join(", ")), ...names.map((name) => cell(group.scores[name]))] }));
  return [...table("Our runs over seeds: mean \u00b1 standard deviation, not ranked", ["experiment", "variant", "split", "seeds", ...names], lines)];
}

function aside(board, all, split) {
  const apart = all.filter((run) => run.apart && run.split === split);
  if (!apart.length) return [];
  const names = board.metrics.filter((name) => apart.some((run) => name in run.scores));
  const reasons = [...new Set(apart.map((run) => run.apart))];
  const lines = apart.map((run) => ({ head: 0, cells: [named(run), ...scores(board, names, run), ...gaps(board, run), text(`note ${reasons.indexOf(run.apart) + 1}`), ...origin(run)] }));
  return [...table(`Not ranked, on ${where(board, split)}`, ["run", ...names, ...GAP(board), "why", ...ORIGIN()], lines),
    make("ul", { class: "reasons" }, ...reasons.map((reason, at) => make("li", {}, make("b", {}, `Note ${at + 1}: `), reason)))];
}

function paper(rows, chosen) {
  const lines = rows.filter((row) => !chosen || !row.run || row.experiment === chosen);
  if (!lines.length) return [];
  const beside = (cell) => [plain(cell.paper), score(cell.ours), cell.difference === undefined ? { node: "\u2013", key: null, number: true }
    : { node: signed(cell.difference) + (cell.significant === undefined ? "" : cell.significant ? " (significant)" : " (within interval)"), key: cell.difference, number: true }];
  const cells = (row) => [text(row.row), text(row.run || "not run yet"), ...beside(row.scores.bertscore), ...beside(row.scores.rouge1)];
  return [...table("Table 3 of closeAI2023 and our runs, validation", ["row", "our run", "BERTScore, paper", "ours", "difference", "ROUGE-1, paper", "ours", "difference"],
    lines.map((row) => ({ head: 0, cells: cells(row) }))),
    make("p", { class: "soft" }, "Significant: the paper's value, which has no interval, lies outside the 95 % interval of ours. A run that is not ranked has no difference; the table above gives the reason.")];
}

function changes(rows, chosen) {
  const lines = rows.filter((row) => !chosen || !row.a || row.experiment === chosen);
  if (!lines.length) return [];
  const p = (value) => (value < 0.0001 ? "<\u00a00.0001" : `=\u00a0${digits(value)}`);
  const cells = (paper, one) => [{ node: signed(paper), key: paper, number: true },
    one && one.difference !== null ? { node: make("span", {}, signed(one.difference) + (one.official ? "" : "*"), interval(one)), key: one.difference, number: true } : plain(),
    !one ? text(null) : { node: one.reason ? `not compared: ${one.reason}`
      : `${one.real ? `significant: ${one.verdict}` : "no difference shown"}, p\u00a0${p(one.p)}, corrected\u00a0${p(one.adjusted_p)}`, key: one.adjusted_p, style: "why" }];
  return [...table("What each row of Table 3 changes over the row above, validation",
    ["row", "row above", "our runs", "BERTScore, paper", "ours [95 %]", "significance", "ROUGE-1, paper", "ours [95 %]", "significance"],
    lines.map((row) => ({ head: 0, cells: [text(row.to), text(row.from), text(row.a ? `${row.experiment}: ${row.b} \u2212 ${row.a}` : "no two runs of an experiment and seed differ only in this"),
      ...cells(row.paper.bertscore, row.scores.bertscore), ...cells(row.paper.rouge1, row.scores.rouge1)] }))),
    make("p", { class: "soft" }, "Significant: p of a paired approximate randomisation, corrected over the steps of an experiment and seed (Holm), is below 0.05 and the paired bootstrap interval does not contain 0. \"No difference shown\" does not mean that the two are equal. The significance of the paper's differences is not known.")];
}

const SAMPLES = { team: "team, test (no interval is published)", ours: "our run", apart: "our run, not comparable" };
function charts(board, runs) {
  const name = metric.value, has = (run) => run.scores[name] && run.scores[name].value !== null, fair = (run) => !run.apart && run.scores[name].official;
  const line = (kind) => (run) => ({ name: `${run.experiment}/${run.run}, ${where(board, run.split)}`, kind, strong: kind === "ours", ...run.scores[name], said: digits(run.scores[name].value) + marks(run.scores[name]) });
  const teams = board.standings.filter((row) => name in row.scores).map((row) => ({ name: row.team, kind: "team", value: row.scores[name], said: digits(row.scores[name]) }));
  const own = runs.filter(has), parts = [["Official standings on test, and our runs that can be ranked", [...teams, ...own.filter(fair).map(line("ours"))]],
    ["Our runs that can't be compared with the teams", own.filter((run) => !fair(run)).map(line("apart"))]].filter(([, rows]) => rows.length > 1);
  if (!parts.length) return [make("p", { class: "soft" }, `There are fewer than two values of ${name}; the tables have them.`)];
  const kinds = Object.keys(SAMPLES).filter((kind) => parts.some(([, rows]) => rows.some((row) => row.kind === kind)));
  return [make("p", { class: "soft" }, "Lines are 95 % intervals. Each axis begins where its values do."), legend(kinds.map((kind) => [SAMPLES[kind], dot(kind, 14, 5, 3.5)])),
    ...parts.flatMap(([title, rows]) => [make("h3", {}, `${title}: ${name}`), dots(`${name}: ${title}`, rows.sort((a, b) => b.value - a.value))])];
}

const chosenBoard = () => data.boards.find((one) => taskOf(one) === task.value && String(one.edition) === edition.value);
function about(board) {
  const half = !board.half ? "" : ` Our scores${board.task ? " (f1, f1_secondary)" : ", gaps"} and numbers of images are those of the ${board.half} half of validation`
    + `${board.half === "held" ? "; settings that are chosen on the tune half have not seen it" : ", by which settings are chosen"}.`;
  const whole = board.task ? " f1_whole is f1 on all of validation; a dagger (\u2020) marks it if the tune half of it chose the thresholds." : "";
  return `Ranking: ${board.ranking}. A star marks a score that is not comparable with official ones: another model, precision or reading.${half}${whole}`;
}
// The run of each experiment with the highest score that ranks, among those with the same signature.
function bestOf(runs) {
  const primary = chosenBoard().primary, value = (run) => run.scores[primary]?.value ?? -Infinity, best = new Map();
  const like = (run) => `${run.experiment}\n${run.split}\n${Boolean(run.apart)}\n${run.scores[primary]?.signature}`;
  for (const run of runs) if (!best.has(like(run)) || value(run) > value(best.get(like(run)))) best.set(like(run), run);
  return runs.filter((run) => best.get(like(run)) === run);
}
// The runs that are shown: those of the experiment, the best of each one if asked for, in the order asked for.
function selected(board) {
  const own = board.runs.filter((run) => !experiment.value || run.experiment === experiment.value), kept = isChecked("best") ? bestOf(own) : own;
  return order.value === "newest" ? [...kept].sort((a, b) => (b.date || "").localeCompare(a.date || "")) : kept;
}
function fill(id, parts) {
  byId(id).replaceChildren(...parts);
  return parts.length;
}
function show() {
  redraw = [];
  const board = chosenBoard(), chosen = experiment.value, runs = selected(board);
  byId("title").textContent = `ImageCLEFmedical Caption ${board.edition}${board.task ? ": concept detection" : ""}`;
  byId("about").textContent = about(board);
  byId("status").textContent = `${runs.length} of our ${board.runs.length} runs shown`;
  byId("runs-body").className = isChecked("compact") ? "compact" : "";
  byId("standings-body").className = byId("runs-body").className;
  fill("standings-body", standings(board, runs));
  fill("chart-body", charts(board, runs));
  fill("runs-body", board.runs.length ? [...ours(board, runs, "test"), ...ours(board, runs, "valid"), ...Object.keys(SPLIT).flatMap((split) => aside(board, runs, split)), ...seeds(board, chosen)] : [make("p", {}, "There are no runs yet.")]);
  byId("paper").hidden = !fill("paper-body", [...paper(board.table_3, chosen), ...changes(board.table_3_steps, chosen)]);
  redraw.forEach((draw) => draw());
}

function years() {
  const before = edition.value, boards = data.boards.filter((board) => taskOf(board) === task.value).sort((a, b) => b.edition - a.edition), found = boards.map((board) => String(board.edition));
  edition.replaceChildren(...found.map((year) => option(year, year)));
  edition.value = found.includes(before) ? before : String((boards.find((board) => board.runs.length) ?? boards[0]).edition);
}
function choices() {
  const board = chosenBoard(), before = metric.value;
  experiment.replaceChildren(option("", "all"), ...[...new Set(board.runs.map((run) => run.experiment))].sort().map((name) => option(name, name)));
  metric.replaceChildren(...board.metrics.map((name) => option(name, name)));
  metric.value = board.metrics.includes(before) ? before : board.metrics.includes(board.primary) ? board.primary : board.metrics[0];
}

byId("made").textContent = `Made ${data.made}`;
const tasks = [...new Set(data.boards.map(taskOf))];
task.append(...tasks.map((name) => option(name, name)));
byId("task-choice").hidden = tasks.length < 2;
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
task.addEventListener("change", () => { years(); choices(); show(); });
edition.addEventListener("change", () => { choices(); show(); });
for (const id of ["experiment", "metric", "order", "best", "compact", "ours"]) byId(id).addEventListener("change", show);
if (data.boards.length) { years(); choices(); show(); } else { byId("main").replaceChildren(make("p", {}, "There are no runs and no standings yet.")); }
