// ---- The viewer: two canvases of the image's own size, the left one above the right one and cut at the border. ----

const LARGEST_ZOOM = 8;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const view = {
  image: null,
  left: INPUT, // a key of image.pictures
  right: models[0],
  split: 50, // where the border is, per cent of the visible part of the image
  zoom: 1, // CSS pixels for one pixel of the image
  x: 0, // of the image's top left corner in the stage
  y: 0,
  fitted: true, // zoom and place follow from the size of the stage
  errors: false,
};
let decoded = new Map(); // name of a picture of the image -> promise of its ImageData
let current = {}; // ImageData of left, right and clean, as they are shown

function namesOfPictures(image) {
  return [INPUT, ...report.models, CLEAN].filter((name) => Object.hasOwn(image.pictures, name));
}

function openViewer(image) {
  if (!byId("viewer").open) {
    view.right = byId("model").value;
    byId("viewer").showModal();
    byId("divider").focus();
  }
  if (image !== view.image) decoded = new Map();
  Object.assign(view, { image, fitted: true });
  const names = namesOfPictures(image);
  for (const side of ["left", "right"]) {
    if (!names.includes(view[side])) view[side] = side === "left" ? INPUT : CLEAN; // this model was not run here
    setOptions(byId(`${side}-side`), names);
  }
  byId("viewer-name").textContent = image.name;
  const [size, place] = [`${image.width} × ${image.height}`, `${shown.indexOf(image) + 1} of ${shown.length}`];
  byId("viewer-about").textContent = [image.data, image.degraded, size, place].join(" · ");
  showScores();
  showPictures();
}

/** Opens the image `offset` places further in the list, going round at its ends. */
function turnTo(offset) {
  openViewer(shown.at((shown.indexOf(view.image) + offset) % shown.length));
}

function showScores() {
  const { scores } = view.image;
  const headings = report.metrics.map(({ title }) => element("th", { scope: "col", className: "number" }, title));
  byId("scores").tHead.replaceChildren(element("tr", {}, element("th", { scope: "col" }, "this image"), ...headings));
  const names = namesOfPictures(view.image).filter((name) => Object.hasOwn(scores, name));
  byId("scores").tBodies[0].replaceChildren(...names.map((name) => {
    const cells = report.metrics.map((metric) => {
      const cell = element("td", { className: "number" }, format(scores[name][metric.name], metric));
      const difference = change(view.image, name, metric);
      if (name !== INPUT && !Number.isNaN(difference)) {
        cell.append(" ", element("small", {}, format(difference, metric, { signed: true })));
      }
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  }));
}

function pixelsOf(name) {
  const { pictures, width, height } = view.image;
  if (!decoded.has(name)) {
    const decode = async () => {
      const picture = element("img", { src: dataUri(pictures[name]) });
      await picture.decode();
      const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      return context.getImageData(0, 0, width, height);
    };
    decoded.set(name, decode());
  }
  return decoded.get(name);
}

/** Draws both sides, as pictures or as error maps. */
async function showPictures() {
  const { image, left, right } = view;
  byId("left-side").value = left;
  byId("right-side").value = right;
  const [leftPixels, rightPixels, cleanPixels] = await Promise.all([left, right, CLEAN].map(pixelsOf));
  if (image !== view.image || left !== view.left || right !== view.right) return; // another one was chosen meanwhile
  current = { left: leftPixels, right: rightPixels, clean: cleanPixels };
  for (const side of ["left", "right"]) {
    const canvas = byId(side);
    Object.assign(canvas, { width: image.width, height: image.height });
    const pixels = view.errors ? errorMap(current[side], current.clean, Number(byId("factor").value)) : current[side];
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    canvas.ariaLabel = `${view.errors ? "Error map of " : ""}${view[side]}, ${image.name}`;
  }
  const factor = byId("factor").value;
  byId("scale-end").textContent = `${factor > 1 ? "≥ " : ""}${Number((255 / factor).toFixed(1))}`;
  byId("scale-caption").textContent = `|image − clean| in levels of 255, × ${factor}`;
  byId("viewer").classList.toggle("with-errors", view.errors);
  byId("errors").ariaPressed = view.errors;
  place();
}

/** |a - b|, the mean over the channels, times `factor`, on a scale from black over red and yellow to white at 255. */
function errorMap(a, b, factor) {
  const map = new ImageData(a.width, a.height);
  for (let i = 0; i < map.data.length; i += 4) {
    const level = factor * meanError(a.data, b.data, i);
    map.data[i] = 3 * level; // such an array rounds, and clips to 0..255
    map.data[i + 1] = 3 * level - 255;
    map.data[i + 2] = 3 * level - 510;
    map.data[i + 3] = 255;
  }
  return map;
}

function meanError(a, b, i) {
  return (Math.abs(a[i] - b[i]) + Math.abs(a[i + 1] - b[i + 1]) + Math.abs(a[i + 2] - b[i + 2])) / 3;
}


// ---- Zoom, place and border. ----

const stage = byId("stage");

/** The zoom at which the whole image is seen; where it is enlarged, by a whole number, so that pixels stay square. */
function fittingZoom() {
  const zoom = Math.min(stage.clientWidth / view.image.width, stage.clientHeight / view.image.height);
  return zoom < 1 ? zoom : Math.min(Math.floor(zoom), LARGEST_ZOOM);
}

/** Puts the canvases and the border where `view` says. */
function place() {
  if (view.fitted) view.zoom = fittingZoom();
  const [width, height] = [view.image.width * view.zoom, view.image.height * view.zoom];
  // Centred where it fits, else without a gap at any side; whole pixels keep it sharp.
  const along = (start, size, room) => Math.round(size <= room ? (room - size) / 2 : clamp(start, room - size, 0));
  view.x = along(view.fitted ? 0 : view.x, width, stage.clientWidth);
  view.y = along(view.fitted ? 0 : view.y, height, stage.clientHeight);
  for (const side of ["left", "right"]) {
    const { style } = byId(side);
    style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
    style.imageRendering = view.zoom < 1 ? "auto" : "pixelated";
  }
  const [low, high] = visibleRange();
  const border = low + (high - low) * view.split / 100;
  byId("left-clip").style.clipPath = `inset(0 calc(100% - ${border}px) 0 0)`;
  const divider = byId("divider");
  divider.style.left = `${border}px`;
  divider.ariaValueNow = Math.round(view.split);
  divider.ariaValueText = `${Math.round(view.split)} % ${view.left}, the rest ${view.right}`;
  byId("zoom").textContent = `${Number(view.zoom.toFixed(view.zoom < 1 ? 2 : 1))}×`;
  stage.classList.toggle("movable", !isWhole());
}

/** From where to where the image is seen, along the stage's width. */
function visibleRange() {
  return [Math.max(view.x, 0), Math.min(view.x + view.image.width * view.zoom, stage.clientWidth)];
}

/** Whether all of the image is seen; what a fraction of a zoom is off by rounding is less than a pixel. */
function isWhole() {
  const { image, zoom } = view;
  return image.width * zoom < stage.clientWidth + 1 && image.height * zoom < stage.clientHeight + 1;
}

function setSplit(split) {
  view.split = clamp(split, 0, 100);
  place();
}

/** Zooms so that the image's point under (x, y) of the stage stays there; by default its centre. */
function zoomTo(zoom, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const wanted = clamp(zoom, Math.min(fittingZoom(), 1), LARGEST_ZOOM);
  const ratio = wanted / view.zoom;
  Object.assign(view, { zoom: wanted, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, fitted: false });
  place();
}

/** The next of the whole zooms, or of that which fits, up or down. */
function zoomStep(up) {
  const stops = [fittingZoom(), 1, 2, 3, 4, 6, LARGEST_ZOOM].sort((a, b) => a - b);
  zoomTo(up ? stops.find((stop) => stop > view.zoom) ?? LARGEST_ZOOM : stops.findLast((stop) => stop < view.zoom) ?? 0);
}

function fit() {
  view.fitted = true;
  place();
}

function move(dx, dy) {
  Object.assign(view, { x: view.x + dx, y: view.y + dy, fitted: false });
  place();
}


// ---- Pointers: one moves the border, or the image where it is larger than the stage; two zoom. ----

const pointers = new Map(); // id -> place in the stage
let dragsBorder = false;

function pointOf(event) {
  const box = stage.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

function borderTo(x) {
  const [low, high] = visibleRange();
  setSplit(100 * (x - low) / (high - low));
}

stage.onpointerdown = (event) => {
  if (event.button !== 0) return;
  stage.setPointerCapture(event.pointerId);
  const point = pointOf(event);
  pointers.set(event.pointerId, point);
  dragsBorder = pointers.size === 1 && (isWhole() || event.target === byId("divider"));
  if (dragsBorder) borderTo(point.x);
};

stage.onpointermove = (event) => {
  const point = pointOf(event);
  showPixel(point);
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  pointers.set(event.pointerId, point);
  if (others.length) {
    const distance = (place) => Math.hypot(place.x - others[0].x, place.y - others[0].y);
    const centre = { x: (point.x + others[0].x) / 2, y: (point.y + others[0].y) / 2 };
    move((point.x - before.x) / 2, (point.y - before.y) / 2);
    zoomTo(view.zoom * distance(point) / Math.max(distance(before), 1), centre.x, centre.y);
  } else if (dragsBorder) {
    borderTo(point.x);
  } else {
    move(point.x - before.x, point.y - before.y);
  }
};

stage.onpointerup = stage.onpointercancel = (event) => pointers.delete(event.pointerId);

stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const point = pointOf(event);
  const pixels = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 * event.deltaY : event.deltaY;
  zoomTo(view.zoom * Math.exp(-pixels / 400), point.x, point.y);
}, { passive: false });

/** The values of the pixel at a point of the stage, on both sides and in the clean image. */
function showPixel(point) {
  const { image } = view;
  const [x, y] = [Math.floor((point.x - view.x) / view.zoom), Math.floor((point.y - view.y) / view.zoom)];
  if (!current.clean || x < 0 || y < 0 || x >= image.width || y >= image.height) return;
  const i = 4 * (y * image.width + x);
  byId("pixel").caption.textContent = `Pixel x ${x}, y ${y}`;
  byId("pixel").tBodies[0].replaceChildren(...["left", "right", "clean"].map((side) => {
    const values = [...current[side].data.subarray(i, i + 3)];
    const error = meanError(current[side].data, current.clean.data, i);
    return element("tr", {},
      element("th", { scope: "row" }, side === "clean" ? CLEAN : view[side]),
      ...values.map((value) => element("td", { className: "number" }, String(value))),
      element("td", { className: "number muted" }, side === "clean" ? "" : `error ${error.toFixed(1)}`));
  }));
}


// ---- Buttons and keys. ----

function toggleErrors() {
  view.errors = !view.errors;
  showPictures();
}

function swap() {
  [view.left, view.right] = [view.right, view.left];
  showPictures();
}

byId("previous").onclick = () => turnTo(-1);
byId("next").onclick = () => turnTo(1);
byId("close").onclick = () => byId("viewer").close();
byId("swap").onclick = swap;
byId("zoom-in").onclick = () => zoomStep(true);
byId("zoom-out").onclick = () => zoomStep(false);
byId("fit").onclick = fit;
byId("errors").onclick = toggleErrors;
byId("factor").onchange = showPictures;
for (const side of ["left", "right"]) {
  byId(`${side}-side`).onchange = (event) => {
    view[side] = event.target.value;
    showPictures();
  };
}

const KEYS = {
  ArrowLeft: () => setSplit(view.split - 1),
  ArrowRight: () => setSplit(view.split + 1),
  PageDown: () => setSplit(view.split - 10),
  PageUp: () => setSplit(view.split + 10),
  Home: () => setSplit(0),
  End: () => setSplit(100),
  "+": () => zoomStep(true),
  "=": () => zoomStep(true), // the key of + without Shift
  "-": () => zoomStep(false),
  0: fit,
  e: toggleErrors,
  s: swap,
  n: () => turnTo(1),
  p: () => turnTo(-1),
};
const SHIFT_KEYS = {
  ArrowLeft: () => move(40, 0),
  ArrowRight: () => move(-40, 0),
  ArrowUp: () => move(0, 40),
  ArrowDown: () => move(0, -40),
};

// On the document, since a click into the picture takes the focus out of the viewer.
document.onkeydown = (event) => {
  if (!byId("viewer").open || event.target.tagName === "SELECT") return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const action = (event.shiftKey && SHIFT_KEYS[key]) || KEYS[key];
  if (!action) return;
  event.preventDefault();
  action();
};

// After the viewer the list goes on at the image seen last.
byId("viewer").onclose = () => cardOf(view.image).button.focus();

new ResizeObserver(() => byId("viewer").open && place()).observe(stage);
