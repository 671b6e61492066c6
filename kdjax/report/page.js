"use strict";

// What `_payload` of kdjax/report/__init__.py wrote. Names in it come from users: they reach the page as text only.
const report = JSON.parse(document.getElementById("payload").textContent);
const INPUT = "input"; // names of pictures, as there
const CLEAN = "clean (gt)";

const byId = (id) => document.getElementById(id);

/** A new element; strings among the children become text. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function setOptions(select, names) {
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
}


// ---- Numbers. JSON has no nan and inf: they come as the strings "NaN", "Infinity" and "-Infinity". ----

const isText = (column) => column.digits === null;

function format(value, column, { signed = false } = {}) {
  if (value === undefined || isText(column)) return value ?? "";
  const number = Number(value);
  if (Number.isNaN(number)) return "nan";
  const options = { minimumFractionDigits: column.digits, maximumFractionDigits: column.digits };
  const text = Number.isFinite(number) ? Math.abs(number).toLocaleString("en-US", options) : "∞";
  const isZero = Number(text) === 0; // once it is rounded
  return (number < 0 && !isZero ? "−" : signed ? "+" : "") + text;
}

/** 1 where more of a metric is better, -1 where less is. */
const direction = (metric) => (metric.higherIsBetter ? 1 : -1);

const score = (image, model, metric) => Number(image.scores[model]?.[metric.name]); // missing: nan

/** How the score changed from the input to the model's output. */
function change(image, model, metric) {
  const [before, after] = [score(image, INPUT, metric), score(image, model, metric)];
  return before === after ? 0 : after - before; // inf to inf is no change
}

/** Items in ascending order of a number or text; what is nan stays last when the order is reversed. */
function sorted(items, key, reversed = false) {
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
    return a === b ? 0 : a - b;
  };
  const isNan = (item) => Number.isNaN(key(item));
  const known = items.filter((item) => !isNan(item)).sort((a, b) => compare(key(a), key(b)) * (reversed ? -1 : 1));
  return [...known, ...items.filter(isNan)];
}


// ---- The table of means, and the settings. ----

let summaryRows = report.rows;
let sortedBy = { column: null, reversed: false }; // null: in the order of the report

const inOneGroup = (row, other) => row.data === other.data && row.degraded === other.degraded;

/** Whether a row has the best value among the models of its group; the input is no rival. */
function isBest(row, column) {
  if (column.higherIsBetter === null || row.model === INPUT) return false;
  const goodness = (other) => Number(other[column.name]) * direction(column);
  const rivals = report.rows.filter((other) => inOneGroup(row, other) && other.model !== INPUT);
  const known = rivals.map(goodness).filter((value) => !Number.isNaN(value));
  return rivals.length > 1 && goodness(row) === Math.max(...known);
}

function showSummary() {
  byId("summary").tHead.replaceChildren(element("tr", {}, ...report.columns.map((column) => {
    const heading = element("th", { scope: "col", className: isText(column) ? "" : "number" });
    const active = sortedBy.column === column;
    heading.ariaSort = active ? (sortedBy.reversed ? "descending" : "ascending") : "none";
    const arrow = element("span", { ariaHidden: "true" }, active ? (sortedBy.reversed ? " ▾" : " ▴") : " ↕");
    const button = element("button", { type: "button", title: "Sort by this column" }, column.title, arrow);
    button.onclick = () => {
      sortSummary(column);
      byId("summary").querySelectorAll("th button")[report.columns.indexOf(column)].focus();
    };
    heading.append(button);
    return heading;
  })));
  byId("summary").tBodies[0].replaceChildren(...summaryRows.map((row, i) => {
    const cells = report.columns.map((column) => {
      const cell = element("td", { className: isText(column) ? "" : "number" }, format(row[column.name], column));
      if (isBest(row, column)) {
        cell.classList.add("best");
        cell.append(element("span", { className: "hidden" }, " best"));
      }
      return cell;
    });
    const startsGroup = sortedBy.column === null && i > 0 && !inOneGroup(row, summaryRows[i - 1]);
    return element("tr", { className: startsGroup ? "group" : "" }, ...cells);
  }));
}

/** The first click on a number puts the best or the largest on top; the second turns the order round. */
function sortSummary(column) {
  const largestFirst = !isText(column) && column.higherIsBetter !== false;
  const reversed = sortedBy.column === column ? !sortedBy.reversed : largestFirst;
  sortedBy = { column, reversed };
  const key = ({ [column.name]: value }) => (isText(column) ? value ?? "" : Number(value));
  summaryRows = sorted(report.rows, key, reversed);
  showSummary();
}

function showSettings() {
  for (const [name, value] of report.settings) {
    byId("settings").append(element("dt", {}, name), element("dd", {}, value));
  }
}


// ---- The list of images. ----

const models = report.models.length ? report.models : [INPUT];
// The report may hold only some of the images that the table is about.
const groups = report.rows.filter((row, i) => report.rows.findIndex((other) => inOneGroup(row, other)) === i);
const measured = groups.reduce((sum, row) => sum + Number(row.images), 0);

const dataUri = (number) => "data:image/png;base64," + byId(`picture-${number}`).textContent;

// A picture is decoded when its card comes near the window.
const thumbnails = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    target.src = dataUri(target.dataset.picture);
    thumbnails.unobserve(target);
  }
}, { rootMargin: "300px" });

const cards = report.images.map((image) => {
  const thumbnail = element("img", { alt: "" }); // the name stands beside it
  thumbnail.dataset.picture = image.pictures[CLEAN];
  thumbnails.observe(thumbnail);
  const scores = element("span", { className: "card-scores" });
  const button = element("button", { type: "button", className: "card", onclick: () => openViewer(image) },
    thumbnail,
    element("span", { className: "card-text" },
      element("span", { className: "card-name" }, image.name),
      element("span", { className: "muted" }, `${image.data} · ${image.degraded}`),
      scores));
  return { item: element("li", {}, button), button, scores };
});
const cardOf = (image) => cards[report.images.indexOf(image)];

let shown = []; // the images of the list, in its order

/** The metric and the model by which the list is ordered. */
function chosen() {
  return { metric: report.metrics.find(({ name }) => name === byId("metric").value), model: byId("model").value };
}

function orderedImages() {
  const { metric, model } = chosen();
  const [data, degraded] = [byId("data").value, byId("degraded").value];
  const part = byId("search").value.trim().toLowerCase();
  const wanted = report.images.filter((image) => (!data || image.data === data)
    && (!degraded || image.degraded === degraded) && image.name.toLowerCase().includes(part));
  const goodness = (image) => score(image, model, metric) * direction(metric);
  switch (byId("order").value) {
    case "name": return sorted(wanted, (image) => image.name);
    case "best": return sorted(wanted, goodness, true);
    case "gain": return sorted(wanted, (image) => change(image, model, metric) * direction(metric));
    default: return sorted(wanted, goodness);
  }
}

function showList() {
  const { metric, model } = chosen();
  shown = orderedImages();
  for (const image of shown) {
    const { scores } = cardOf(image);
    const value = format(score(image, model, metric), metric);
    scores.replaceChildren(element("strong", {}, value), ` ${metric.unit || metric.title} `);
    const difference = change(image, model, metric);
    if (model !== INPUT && !Number.isNaN(difference)) {
      const text = `${format(difference, metric, { signed: true })} vs input`;
      scores.append(element("span", { className: "muted" }, text));
    }
  }
  byId("images").replaceChildren(...shown.map((image) => cardOf(image).item));
  const count = report.images.length;
  const some = shown.length === count ? `${count} images` : `${shown.length} of ${count} images`;
  byId("count").textContent = count < measured ? `${some}, out of ${measured} that were measured` : some;
}

function prepareList() {
  byId("images-heading").parentElement.hidden = !report.images.length;
  byId("metric").append(...report.metrics.map(({ name, title }) => element("option", { value: name }, title)));
  setOptions(byId("model"), models);
  for (const field of ["data", "degraded"]) {
    const names = [...new Set(report.images.map((image) => image[field]))];
    byId(field).append(...names.map((name) => element("option", { value: name }, name)));
    byId(field).parentElement.hidden = names.length < 2; // nothing to choose
  }
  for (const id of ["order", "metric", "model", "data", "degraded"]) byId(id).onchange = showList;
  byId("search").oninput = showList;
}

showSummary();
showSettings();
prepareList();
showList();
