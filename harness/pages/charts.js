// Charts are drawn again when their width changes; lines and dots never differ by colour alone.
let redraw = [];
addEventListener("resize", () => redraw.forEach((draw) => draw()));
const short = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3))));
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough)), step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
  return found;
}
const spread = (ends) => (ends[0] === ends[1] ? [ends[0] - (Math.abs(ends[0]) || 1) / 2, ends[1] + (Math.abs(ends[1]) || 1) / 2] : ends);
function axes(box, x, y, label, name) {
  const width = Math.max(box.clientWidth, 240), height = 240, left = 52, bottom = height - 40;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  const [x0, x1] = spread(x), [y0, y1] = spread(y);
  const across = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - 12), up = (value) => bottom - ((value - y0) / (y1 - y0)) * (bottom - 22);
  for (const tick of ticks(y0, y1, 5)) {
    picture.append(drawn("line", { x1: left, x2: width - 12, y1: up(tick), y2: up(tick), class: "grid" }));
    picture.append(drawn("text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end", class: "axis" }, short(tick)));
  }
  for (const tick of ticks(x0, x1, Math.floor(width / 70))) picture.append(drawn("text", { x: across(tick), y: bottom + 16, "text-anchor": "middle", class: "axis" }, tick.toLocaleString("en")));
  picture.append(drawn("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle", class: "axis" }, name));
  return { picture, across, up, bottom };
}
function legend(items) {
  return make("ul", { class: "legend" }, ...items.map(([name, sample]) => {
    const swatch = drawn("svg", { "aria-hidden": "true", viewBox: "0 0 28 10" });
    swatch.append(sample);
    return make("li", {}, swatch, name);
  }));
}

// A dot is a circle for a team, a diamond for a run of ours, and an open diamond for one without a rank.
function dot(kind, x, y, r = 5) {
  const place = { class: `dot dot-${kind}` };
  return kind === "team" ? drawn("circle", { cx: x, cy: y, r: r - 0.5, ...place }) : drawn("path", { d: `M${x - r - 1},${y}L${x},${y - r - 1}L${x + r + 1},${y}L${x},${y + r + 1}Z`, ...place });
}
// The width of a text of a chart in pixels, and the text cut to such a width.
const pen = document.createElement("canvas").getContext("2d");
function wide(text, strong = false) {
  pen.font = `${strong ? "600 " : ""}13px system-ui, sans-serif`;
  return pen.measureText(text).width;
}
function cut(text, room, strong) {
  if (wide(text, strong) <= room) return text;
  let length = text.length;
  while (length > 1 && wide(text.slice(0, length) + "\u2026", strong) > room) length--;
  return text.slice(0, length) + "\u2026";
}
// Values as dots with their intervals on one axis, which begins where the values do. `rows` have name, value,
// low, high, kind, `said` (the value as text) and `strong`; `mean` is a line across all.
function dots(label, rows, mean = null) {
  const box = make("div"), full = (row) => row.said + (none(row.low) ? "" : ` ${range(row)}`);
  const known = rows.flatMap((row) => [row.value, row.low, row.high]).concat(mean).filter((value) => !none(value));
  const [least, most] = spread([Math.min(...known), Math.max(...known)]), margin = (most - least) * 0.05;
  const draw = () => {
    const width = Math.max(box.clientWidth, 240), narrow = width < 560, step = narrow ? 42 : 28, text = narrow ? (row) => row.said : full, said = Math.max(...rows.map((row) => wide(text(row))));
    const right = narrow ? 6 : said + 14, left = narrow ? 8 : Math.min(Math.max(...rows.map((row) => wide(row.name, row.strong))) + 16, width * 0.36);
    const height = rows.length * step + 26, room = narrow ? width - said - 16 : left - 10;
    const across = (value) => left + 8 + ((value - least + margin) / (most - least + 2 * margin)) * (width - left - right - 16);
    const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${label}: ` + rows.map((row) => `${row.name} ${full(row)}`).join(", ") });
    for (const tick of ticks(least, most, Math.max(Math.floor((width - left - right) / 80), 2))) {
      picture.append(drawn("line", { x1: across(tick), x2: across(tick), y1: 0, y2: height - 22, class: "grid" }), drawn("text", { x: across(tick), y: height - 6, "text-anchor": "middle", class: "axis" }, short(tick)));
    }
    if (!none(mean)) picture.append(drawn("line", { x1: across(mean), x2: across(mean), y1: 0, y2: height - 22, class: "mean" }));
    rows.forEach((row, at) => {
      const top = at * step, y = narrow ? top + 29 : top + step / 2, line = narrow ? top + 15 : y + 4.5, mine = row.strong ? "strong" : "";
      const name = drawn("text", { x: narrow ? 2 : left - 8, y: line, "text-anchor": narrow ? "start" : "end", class: mine }, cut(row.name, room, row.strong));
      name.append(drawn("title", {}, row.name));
      picture.append(name, drawn("text", { x: width - 2, y: line, "text-anchor": "end", class: "axis" }, text(row)));
      if (!none(row.low)) picture.append(drawn("line", { x1: across(row.low), x2: across(row.high), y1: y, y2: y, class: `whisker whisker-${row.kind}` }));
      picture.append(dot(row.kind, across(row.value), y));
    });
    box.replaceChildren(picture);
  };
  redraw.push(draw);
  return box;
}
