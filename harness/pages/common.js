"use strict";
const byId = (id) => document.getElementById(id);
const DASH = "\u2013", none = (value) => value === null || value === undefined;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// Text is only set as text: nothing in a name or a caption can become markup.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function drawn(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const folded = (title, ...children) => make("details", {}, make("summary", {}, title), ...children);
const option = (value, name) => make("option", { value }, name);
// A value that rounds to zero has no sign: -1e-17 is no gap.
const digits = (value) => value.toFixed(4).replace(/^-(?=0\.0000$)/, "");
const signed = (value) => (digits(value).startsWith("-") ? "\u2212" : "+") + Math.abs(value).toFixed(4);
const range = (cell) => `[${digits(cell.low)}, ${digits(cell.high)}]`;
const interval = (cell) => (none(cell.low) ? null : make("span", { class: "interval" }, range(cell)));

// A table that is wider than the page scrolls, and says so as long as there is more to the right.
const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => target.fits()));
function scrolling(named, whole) {
  const box = make("div", { class: "scroll", role: "region", tabindex: "0", "aria-labelledby": named }, whole);
  const sign = make("p", { class: "sign", "aria-hidden": "true" }, "scroll for more columns \u2192");
  box.fits = () => {
    sign.hidden = box.scrollWidth <= box.clientWidth + 1;
    box.toggleAttribute("data-more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  };
  box.addEventListener("scroll", box.fits);
  sizes.observe(box);
  sizes.observe(Object.assign(whole, { fits: box.fits }));
  return [sign, box];
}
