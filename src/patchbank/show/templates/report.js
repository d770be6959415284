"use strict";
(() => {
  const images = JSON.parse(document.getElementById("data").textContent);
  if (!images.length) return;
  const $ = (id) => document.getElementById(id);

  // cividis at even steps (Nuñez, Anderton and Renslow 2018): its lightness is even, in grey and for the colour-blind too.
  const CIVIDIS = [
    [0, 34, 78], [0, 48, 111], [39, 63, 108], [60, 77, 110], [82, 92, 109], [102, 105, 112], [121, 119, 119], [140, 135, 121],
    [162, 151, 119], [184, 168, 112], [207, 186, 99], [230, 205, 80], [254, 232, 56],
  ];
  // Okabe and Ito's, as in the figures of `patchbank show`.
  const STYLES = { human: "#0072b2", object: "#d55e00", union: "#cc79a7" };
  const BINS = 7; // a side of a box, as the library's pool_regions has them
  const TAG = 18; // CSS pixels a side of a box's number
  const LEAST = 0.01; // the smallest range that the colours span: less is rounding
  const NEAR = 4; // CSS pixels: a point this near is on a box's outline
  const CROWD = 8; // with more boxes, only their numbers can be clicked
  const NEAREST = 8; // other images shown
  const SEARCHED = 64e6; // bytes of tokens in which the nearest are looked for
  const WAIT = 60; // milliseconds that the pointer rests before they are
  const CROP = 144, AROUND = 6; // pixels a side of one, and what it shows in patches

  // Numbers.

  function colour(share) {
    const place = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
    const low = Math.min(Math.floor(place), CIVIDIS.length - 2);
    return CIVIDIS[low].map((value, index) => Math.round(value + (CIVIDIS[low + 1][index] - value) * (place - low)));
  }

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const opened = new Map(); // an image -> its tokens: levels component by component, their inverse lengths, and norms

  function unpacked(image) {
    if (!opened.has(image)) opened.set(image, unpack(image));
    return opened.get(image);
  }

  async function unpack(image) {
    const stream = new Blob([bytesOf(image.levels)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const levels = new Int8Array(await new Response(stream).arrayBuffer());
    const count = image.grid[0] * image.grid[1], components = image.components, inverse = new Float32Array(count);
    for (let place = 0; place < levels.length; place++) inverse[place % count] += levels[place] ** 2;
    for (let token = 0; token < count; token++) inverse[token] = inverse[token] ? 1 / Math.sqrt(inverse[token]) : 0;
    return { levels, inverse, norms: new Float32Array(bytesOf(image.norms).buffer), count, components };
  }

  /** The mean of the tokens with these weights, at unit length, on the axes that all images share. */
  function pooled({ levels, inverse, norms, count, components }, weights) {
    const query = new Float64Array(components);
    for (let token = 0; token < count; token++) {
      const weight = weights[token] * norms[token] * inverse[token];
      if (weight) for (let each = 0; each < components; each++) query[each] += weight * levels[each * count + token];
    }
    const length = Math.hypot(...query) || 1;
    return query.map((value) => value / length);
  }

  /** The cosine similarity of every patch of an image to a vector of unit length. */
  function similarities({ levels, inverse, count, components }, query) {
    const found = new Float32Array(count);
    for (let each = 0; each < Math.min(components, query.length); each++) {
      const value = query[each], start = each * count;
      for (let token = 0; token < count; token++) found[token] += value * levels[start + token];
    }
    return found.map((value, token) => value * inverse[token]);
  }

  /** Along one side: the mean of linear interpolation's weights over RoIAlign's samples of a box on the grid. */
  function sampleWeights(first, last, cells) {
    const weights = new Float64Array(cells);
    const [start, end] = [first - 0.5, last - 0.5];
    const samples = BINS * Math.max(0, Math.ceil((end - start) / BINS));
    for (let sample = 0; sample < samples; sample++) {
      const place = Math.min(Math.max(start + ((end - start) * (sample + 0.5)) / samples, 0), cells - 1);
      const low = Math.min(Math.floor(place), cells - 1);
      weights[low] += (1 - (place - low)) / samples;
      if (low + 1 < cells) weights[low + 1] += (place - low) / samples;
    }
    return weights;
  }

  /** The patches' weights when tokens are pooled in the visible part of a box of original pixels. */
  function boxWeights(image, box) {
    const [x1, y1, x2, y2] = image.frame, [rows, columns] = image.grid, [width, height] = image.size;
    const seen = [Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width), Math.min(y2, height)];
    const clip = (value, side) => Math.min(Math.max(value, seen[side]), seen[side + 2]);
    const toColumn = (x) => ((clip(x, 0) - x1) / (x2 - x1)) * columns, toRow = (y) => ((clip(y, 1) - y1) / (y2 - y1)) * rows;
    const across = sampleWeights(toColumn(box[0]), toColumn(box[2]), columns);
    const down = sampleWeights(toRow(box[1]), toRow(box[3]), rows);
    return Float64Array.from({ length: rows * columns }, (_, token) => down[Math.floor(token / columns)] * across[token % columns]);
  }

  const union = (boxes) => [0, 1, 2, 3].map((side) => (side < 2 ? Math.min : Math.max)(...boxes.map((each) => each.box[side])));

  // The shown image, the query (a patch, or boxes), and the patch to read out while the query is held.

  const state = { image: null, tokens: null, element: null, token: 0, reading: null, chosen: [], held: false, serial: 0, timer: 0 };
  const isFixed = () => state.held || state.chosen.length > 0;

  function cell(token, image = state.image) {
    const [x1, y1, x2, y2] = image.frame, [rows, columns] = image.grid;
    const [width, height] = [(x2 - x1) / columns, (y2 - y1) / rows];
    return [x1 + (token % columns) * width, y1 + Math.floor(token / columns) * height, width, height];
  }

  function isValid(token, image = state.image) {
    const [first, last, left, right] = image.valid, columns = image.grid[1];
    const row = Math.floor(token / columns), column = token % columns;
    return row >= first && row < last && column >= left && column < right;
  }

  /** Image and input together, x1, y1, x2, y2 in original pixels; only the part of a long image near the input. */
  function limits() {
    const [x1, y1, x2, y2] = state.image.frame, [width, height] = state.image.size, [across, down] = [x2 - x1, y2 - y1];
    return [Math.min(x1, Math.max(0, x1 - across)), Math.min(y1, Math.max(0, y1 - down)), Math.max(x2, Math.min(width, x2 + across)), Math.max(y2, Math.min(height, y2 + down))];
  }

  // Drawing, in original pixels.

  /** A canvas's context, and the size of a CSS pixel in original pixels. */
  function prepare(canvas) {
    const [left, top, right, bottom] = limits(), aspect = (bottom - top) / (right - left);
    canvas.style.width = `${Math.min(100, 160 / aspect)}%`; // a tall image becomes narrow
    const finer = Math.min(devicePixelRatio || 1, 2);
    const width = Math.max(16, Math.round(canvas.clientWidth * finer)), height = Math.max(1, Math.round(width * aspect));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d"), scale = width / (right - left);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
    return [context, finer / scale];
  }

  const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function strokeBox(context, [x1, y1, x2, y2], width, style, dash = []) {
    context.lineWidth = width;
    context.strokeStyle = style;
    context.setLineDash(dash);
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.setLineDash([]);
  }

  function outline(context, pixel, box, kind, strong) {
    strokeBox(context, box, (strong ? 6 : 4) * pixel, "rgba(255, 255, 255, 0.85)");
    const dash = { human: [], object: [12, 2], union: [5, 4] }[kind].map((each) => each * pixel); // in print, too
    strokeBox(context, box, (strong ? 3.5 : 2) * pixel, STYLES[kind], dash);
  }

  function mark(context, pixel, token, inner) {
    const [x, y, width, height] = cell(token), box = [x, y, x + width, y + height];
    strokeBox(context, box, 4 * pixel, inner === "white" ? "black" : "white");
    strokeBox(context, box, 2 * pixel, inner);
  }

  function drawMarks(context, pixel) {
    if (!state.chosen.length && state.image.levels) mark(context, pixel, state.token, "white");
    if (state.reading !== null && isFixed()) mark(context, pixel, state.reading, "black");
  }

  /** Where the boxes' numbers stand: [x, y, side] of each, at its corner or in the next free place; null without room. */
  function tags(pixel) {
    const [left, top, right, bottom] = limits(), side = TAG * pixel, step = side + pixel, placed = [];
    const room = Math.max(1, Math.floor((right - left) / step) * Math.floor((bottom - top) / step));
    for (const { box } of state.image.boxes || []) {
      let x = Math.max(left, Math.min(box[0], right - side)), y = Math.max(top, Math.min(box[1], bottom - side)), tries = 0;
      const taken = () => placed.some((other) => other && Math.abs(other[0] - x) < side && Math.abs(other[1] - y) < side);
      const shown = box[0] < right && box[1] < bottom && box[2] > left && box[3] > top;
      while (shown && taken() && tries++ < 4 * room) {
        x += step;
        if (x > right - side) [x, y] = [left, y + step];
        if (y > bottom - side) y = top;
      }
      placed.push(shown && !taken() ? [x, y, side] : null);
    }
    return placed;
  }

  function drawBoxes(context, pixel, all) {
    const boxes = state.image.boxes || [];
    boxes.forEach((each, index) => {
      if (all || state.chosen.includes(index)) outline(context, pixel, each.box, each.kind, state.chosen.includes(index));
    });
    if (state.chosen.length === 2) outline(context, pixel, union(state.chosen.map((each) => boxes[each])), "union", true);
    if (!all) return;
    context.font = `600 ${12 * pixel}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    tags(pixel).forEach((tag, index) => {
      if (!tag) return;
      const [x, y, side] = tag;
      context.fillStyle = STYLES[boxes[index].kind];
      context.fillRect(x, y, side, side);
      strokeBox(context, [x, y, x + side, y + side], pixel, "white");
      context.fillStyle = boxes[index].kind === "object" ? "black" : "white"; // either can be read on its colour
      context.fillText(String(index + 1), x + side / 2, y + side / 2 + 0.5 * pixel);
    });
  }

  function drawImage() {
    const image = state.image, [context, pixel] = prepare($("image")), [width, height] = image.size, [x1, y1, x2, y2] = image.frame;
    context.fillStyle = styled("--rule");
    context.fillRect(0, 0, width, height);
    if (state.element) context.drawImage(state.element, 0, 0, width, height);
    $("dimmed").hidden = Math.max(x1, y1, width - x2, height - y2) < 0.5;
    context.fillStyle = "rgba(0, 0, 0, 0.6)";
    context.beginPath();
    context.rect(0, 0, width, height);
    context.rect(Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width) - Math.max(x1, 0), Math.min(y2, height) - Math.max(y1, 0));
    context.fill("evenodd");
    const [rows, columns] = image.grid;
    context.lineWidth = 0.5 * pixel;
    context.strokeStyle = "rgba(255, 255, 255, 0.45)";
    context.beginPath();
    for (let each = 0; each <= columns; each++) {
      const x = x1 + ((x2 - x1) * each) / columns;
      context.moveTo(x, y1);
      context.lineTo(x, y2);
    }
    for (let each = 0; each <= rows; each++) {
      const y = y1 + ((y2 - y1) * each) / rows;
      context.moveTo(x1, y);
      context.lineTo(x2, y);
    }
    context.stroke();
    drawBoxes(context, pixel, $("show-boxes").checked);
    drawMarks(context, pixel);
  }

  /** Draw each patch in `shade(token)`: on the faint image, or over it. */
  function drawPatches(id, shade) {
    const image = state.image, [context, pixel] = prepare($(id)), over = $("over").checked && state.element;
    if (state.element) {
      context.globalAlpha = over ? 1 : 0.25;
      context.drawImage(state.element, 0, 0, ...image.size);
    }
    context.globalAlpha = over ? 0.55 : 1;
    for (let token = 0; shade && token < image.grid[0] * image.grid[1]; token++) {
      if (!isValid(token)) continue;
      const [x, y, width, height] = cell(token), seam = over ? 0 : 0.6 * pixel;
      context.fillStyle = `rgb(${shade(token).join(", ")})`;
      context.fillRect(x, y, width + seam, height + seam);
    }
    context.globalAlpha = 1;
    drawBoxes(context, pixel, false);
    if (shade) drawMarks(context, pixel);
  }

  const number = (value) => value.toFixed(2).replace("-", "−");

  // The nearest patch of every other image.

  async function drawNearest(image, query, serial) {
    const found = [];
    let bytes = 0;
    for (const other of query ? images : []) {
      if (other === image || !other.levels || bytes > SEARCHED) continue;
      const tokens = await unpacked(other);
      if (serial !== state.serial) return; // another patch was asked for
      bytes += tokens.levels.length;
      const values = similarities(tokens, query);
      let best = -1;
      for (let token = 0; token < tokens.count; token++)
        if (isValid(token, other) && (best < 0 || values[token] > values[best])) best = token;
      found.push({ image: other, token: best, value: values[best] });
    }
    found.sort((one, other) => other.value - one.value);
    const shown = found.slice(0, NEAREST), crops = await Promise.all(shown.map(crop));
    if (serial !== state.serial) return;
    $("others").hidden = !shown.length;
    $("nearest").replaceChildren(...crops);
    window.patchbank.nearest = found.map((each) => ({ ...each, image: each.image.key }));
  }

  /** A patch of another image with what is around it: an entry that opens it there. */
  async function crop({ image, token, value }) {
    const entry = document.createElement("li"), button = document.createElement("button"), canvas = document.createElement("canvas");
    const [x, y, width, height] = cell(token, image), side = AROUND * Math.max(width, height), context = canvas.getContext("2d");
    canvas.width = canvas.height = CROP;
    context.scale(CROP / side, CROP / side);
    context.translate(side / 2 - x - width / 2, side / 2 - y - height / 2);
    if (image.picture) {
      const element = new Image();
      element.src = image.picture;
      await element.decode().then(() => context.drawImage(element, 0, 0, ...image.size), () => null);
    }
    strokeBox(context, [x, y, x + width, y + height], (4 * side) / CROP, "black");
    strokeBox(context, [x, y, x + width, y + height], (2 * side) / CROP, "white");
    button.type = "button";
    button.title = image.key;
    button.setAttribute("aria-label", `${number(value)}: ${image.key}, ${place(token, image)}`);
    button.append(canvas, number(value));
    button.addEventListener("click", () => {
      open(image, true);
      change({ token, held: true });
    });
    entry.append(button);
    return entry;
  }

  async function draw() {
    const image = state.image, serial = ++state.serial;
    if (!image.frame) return; // an unreadable feature; a note says so
    if (image.levels && state.tokens === null) {
      const tokens = await unpacked(image);
      if (image !== state.image) return;
      state.tokens = tokens;
    }
    if (serial !== state.serial) return; // a later call draws
    const boxes = state.chosen.map((each) => image.boxes[each]), tokens = state.tokens;
    let query = null, values = null, low = 0, high = 1;
    if (tokens) {
      const weights = boxes.length ? boxWeights(image, union(boxes)) : Float64Array.from({ length: tokens.count }, (_, token) => Number(token === state.token));
      if (weights.some((weight) => weight > 0)) values = similarities(tokens, (query = pooled(tokens, weights)));
    }
    if (values) {
      const shown = values.filter((_, token) => isValid(token));
      low = Math.min(...shown);
      high = Math.max(...shown);
    }
    drawImage();
    const range = Math.max(high - low, LEAST), middle = (low + high) / 2;
    drawPatches("map", values && ((token) => colour(0.5 + (values[token] - middle) / range)));
    const colours = image.colours && bytesOf(image.colours);
    drawPatches("components", colours && ((token) => [...colours.subarray(3 * token, 3 * token + 3)]));
    $("scale").hidden = !values;
    $("low").textContent = number(low);
    $("high").textContent = number(high);
    $("readout").textContent = describe(values, low, high);
    clearTimeout(state.timer);
    state.timer = setTimeout(() => drawNearest(image, query, serial), WAIT);
    window.patchbank = { image: image.key, token: state.token, reading: state.reading, chosen: [...state.chosen], values: values && Array.from(values) };
  }

  const label = (index) => `${state.image.boxes[index].kind === "human" ? "human" : state.image.boxes[index].name} ${index + 1}`;
  /** A patch by its row and column in the grid, from 0, and its centre, as `patchbank show --at` takes it. */
  function place(token, image = state.image) {
    const [x, y, width, height] = cell(token, image), columns = image.grid[1];
    return `row ${Math.floor(token / columns)}, column ${token % columns} (x ${Math.round(x + width / 2)}, y ${Math.round(y + height / 2)})`;
  }

  /** The visible fraction of a box. */
  function visibleFraction([x1, y1, x2, y2]) {
    const [left, top, right, bottom] = state.image.frame, [width, height] = state.image.size;
    const across = Math.min(x2, right, width) - Math.max(x1, left, 0), down = Math.min(y2, bottom, height) - Math.max(y1, top, 0);
    return (Math.max(across, 0) * Math.max(down, 0)) / ((x2 - x1) * (y2 - y1) || 1);
  }

  function describe(values, low, high) {
    if (!state.image.levels) return "This image has no similarities.";
    const names = state.chosen.map((index) => `“${label(index)}”`).join(" and ");
    const what = state.chosen.length === 2 ? `the union of ${names}` : `the box ${names}`;
    if (!values) return `The model does not see ${what}.`;
    const seen = state.chosen.length ? visibleFraction(union(state.chosen.map((index) => state.image.boxes[index]))) : 1;
    const partly = seen > 0.995 ? "" : ` (${seen < 0.01 ? "less than 1" : Math.round(100 * seen)}% visible)`;
    const range = `Similarities range from ${number(low)} to ${number(high)}.`;
    const query = state.chosen.length ? `Compared with the tokens pooled in ${what}${partly}.` : `Compared with the patch at ${place(state.token)}${state.held ? ", held" : ""}.`;
    const read = isFixed() && state.reading !== null ? `${number(values[state.reading])} at ${place(state.reading)}. ` : "";
    return `${read}${query} ${range}`;
  }

  // Choosing.

  function change(what) {
    Object.assign(state, what);
    $("fixed").checked = state.held;
    for (const button of [...$("boxes").children, ...$("relations").children]) {
      const own = button.dataset.boxes.split(" ").map(Number);
      const pressed = own.length === 1 ? state.chosen.includes(own[0]) : own.length === state.chosen.length && own.every((each) => state.chosen.includes(each));
      button.setAttribute("aria-pressed", String(pressed));
    }
    draw();
  }

  const toggle = (index) =>
    change({ held: false, reading: null, chosen: state.chosen.includes(index) ? state.chosen.filter((other) => other !== index) : [...state.chosen, index].slice(-2) });

  /** An event's place in original pixels, and the size of a CSS pixel in them. */
  function placeOf(event) {
    const area = event.currentTarget.getBoundingClientRect(), [left, top, right, bottom] = limits();
    const x = left + ((event.clientX - area.left) / area.width) * (right - left);
    return [x, top + ((event.clientY - area.top) / area.height) * (bottom - top), (right - left) / area.width];
  }

  function tokenAt([x, y]) {
    const [x1, y1, x2, y2] = state.image.frame, [rows, columns] = state.image.grid;
    const column = Math.floor(((x - x1) / (x2 - x1)) * columns), row = Math.floor(((y - y1) / (y2 - y1)) * rows);
    const token = row * columns + column;
    return row >= 0 && row < rows && column >= 0 && column < columns && isValid(token) ? token : null;
  }

  /** The box with its number or outline at a place; null if there is none. */
  function boxAt([x, y, pixel]) {
    if (!$("show-boxes").checked || !state.image.levels) return null;
    const tag = tags(pixel).findIndex((each) => each && x >= each[0] && x <= each[0] + each[2] && y >= each[1] && y <= each[1] + each[2]);
    if (tag >= 0) return tag;
    if ((state.image.boxes || []).length > CROWD) return null;
    const near = NEAR * pixel;
    const found = (state.image.boxes || []).findIndex(({ box: [x1, y1, x2, y2] }) => {
      if (x < x1 - near || x > x2 + near || y < y1 - near || y > y2 + near) return false;
      return Math.min(Math.abs(x - x1), Math.abs(x - x2), Math.abs(y - y1), Math.abs(y - y2)) <= near;
    });
    return found < 0 ? null : found;
  }

  for (const id of ["image", "map", "components"]) {
    const canvas = $(id);
    const box = (at) => (id === "image" ? boxAt(at) : null);
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch" || !state.image.frame) return;
      const at = placeOf(event), token = tokenAt(at), on = box(at);
      canvas.style.cursor = on === null ? "" : "pointer";
      canvas.title = on === null ? "" : label(on);
      if (!state.image.levels) return;
      if (token === null) return void (isFixed() || ($("readout").textContent = "This place is not visible to the model."));
      if (isFixed()) token !== state.reading && change({ reading: token });
      else token !== state.token && change({ token });
    });
    canvas.addEventListener("click", (event) => {
      const at = placeOf(event), token = tokenAt(at), on = box(at);
      if (on !== null) return toggle(on);
      if (token === null || !state.image.levels) return;
      const again = state.held && token === state.token, touch = event.pointerType === "touch";
      if (touch && isFixed() && !again) return change({ reading: token }); // touch has no hover
      change({ token, chosen: [], reading: null, held: !touch && !again });
    });
  }

  $("image").addEventListener("keydown", (event) => {
    if (!state.image.levels) return;
    const columns = state.image.grid[1], [first, last, left, right] = state.image.valid;
    const from = isFixed() ? state.reading ?? state.token : state.token;
    let row = Math.floor(from / columns), column = from % columns;
    if (event.key === "ArrowLeft") column--;
    else if (event.key === "ArrowRight") column++;
    else if (event.key === "ArrowUp") row--;
    else if (event.key === "ArrowDown") row++;
    else if (event.key === "Home") column = left;
    else if (event.key === "End") column = right - 1;
    else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return change({ held: !state.held && !state.chosen.length, chosen: [], reading: null });
    } else if (event.key === "Escape") return change({ held: false, chosen: [], reading: null });
    else return;
    event.preventDefault();
    row = Math.min(Math.max(row, first), last - 1);
    column = Math.min(Math.max(column, left), right - 1);
    change({ [isFixed() ? "reading" : "token"]: row * columns + column });
  });

  $("fixed").addEventListener("change", () => change({ held: $("fixed").checked, chosen: [], reading: null }));
  for (const id of ["show-boxes", "over"]) $(id).addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  window.addEventListener("resize", draw);

  // Opening an image.

  function item(text) {
    const element = document.createElement("li");
    element.textContent = text;
    return element;
  }

  function chooser(text, kind, boxes, choose) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = kind;
    button.dataset.boxes = boxes.join(" ");
    button.textContent = text;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", choose);
    return button;
  }

  function open(image, focus) {
    const [first, last, left, right] = image.valid || [0, 1, 0, 1];
    const middle = Math.floor((first + last) / 2) * (image.grid ? image.grid[1] : 1) + Math.floor((left + right) / 2);
    Object.assign(state, { image, tokens: null, element: null });
    if (image.picture) {
      const element = new Image();
      element.addEventListener("load", () => image === state.image && ((state.element = element), draw()));
      element.src = image.picture;
    }
    $("viewer").hidden = false;
    $("name").textContent = image.key;
    for (const { button, image: other } of thumbnails) button.setAttribute("aria-current", String(other === image));
    $("image").setAttribute("aria-label", `${image.key}: patches`);
    const boxes = image.boxes || [], pairs = image.pairs || [], shares = (image.shares || []).map((share) => `${Math.round(100 * share)}%`);
    $("pairs").hidden = !boxes.length || !image.levels;
    $("boxes-label").hidden = !boxes.length;
    $("relations-title").hidden = !pairs.length;
    $("boxes").replaceChildren(...boxes.map((each, index) => chooser(label(index), each.kind, [index], () => toggle(index))));
    $("relations").replaceChildren(
      ...pairs.map(([human, thing, verb]) =>
        chooser(`${label(human)}, ${verb}, ${label(thing)}`, "union", [human, thing], () =>
          change({ held: false, reading: null, chosen: state.chosen.length === 2 && [human, thing].every((each) => state.chosen.includes(each)) ? [] : [human, thing] }),
        ),
      ),
    );
    $("notes").replaceChildren(...image.notes.map(item));
    const none = "No principal components: all tokens are nearly equal.";
    $("shares").textContent = (image.shares || []).every((share) => share === 0) ? none : shares.length ? `Principal components 1, 2, 3 of all images' patches as red, green, blue: ${shares.join(", ")} of the variance.` : "";
    const panels = document.querySelector(".panels");
    panels.classList.toggle("broad", Boolean(image.frame) && image.size[0] > 1.8 * image.size[1]);
    for (const part of [...panels.querySelectorAll("figure"), document.querySelector(".controls")]) part.hidden = !image.frame;
    $("help").hidden = !image.levels;
    $("components-figure").hidden = !image.colours;
    $("readout").textContent = "";
    change({ token: middle, reading: null, chosen: [], held: false });
    if (!focus) return;
    history.replaceState(null, "", `#image-${images.indexOf(image)}`);
    $("name").focus();
  }

  // The list and its search.

  const thumbnails = images.map((image, index) => {
    const entry = document.createElement("li"), button = document.createElement("button");
    entry.id = `image-${index}`;
    button.type = "button";
    const thumb = document.createElement("span"), name = document.createElement("span");
    thumb.className = "thumb";
    name.className = "name";
    name.textContent = image.key;
    button.title = image.key;
    if (image.picture) {
      const picture = document.createElement("img");
      picture.alt = "";
      picture.loading = "lazy";
      picture.src = image.picture;
      thumb.append(picture);
    } else thumb.textContent = "no image";
    button.append(thumb, name);
    button.addEventListener("click", () => open(image, true));
    entry.append(button);
    $("thumbnails").append(entry);
    const words = [image.key, ...(image.boxes || []).map((each) => each.name), ...(image.pairs || []).map((each) => each[2])];
    return { image, entry, button, words: words.join(" ").toLowerCase() };
  });

  function search() {
    const wanted = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const each of thumbnails) {
      const found = wanted.every((word) => each.words.includes(word));
      each.entry.hidden = !found;
      count += found;
    }
    $("found").textContent = wanted.length ? `${count} of ${thumbnails.length}` : "";
  }
  $("query").addEventListener("input", search);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const first = thumbnails.find((each) => !each.entry.hidden);
    if (first) open(first.image, true);
  });

  function follow() {
    const linked = thumbnails.find((each) => each.entry.id === location.hash.slice(1));
    if (!linked) return;
    $("query").value = "";
    search();
    open(linked.image, true);
  }
  window.addEventListener("hashchange", follow);
  for (const link of document.querySelectorAll('a[href^="#image-"]'))
    link.addEventListener("click", (event) => {
      event.preventDefault(); // also where it is the page's address already
      history.replaceState(null, "", link.hash);
      follow();
    });

  const ramp = $("ramp").getContext("2d");
  for (let x = 0; x < 256; x++) {
    ramp.fillStyle = `rgb(${colour(x / 255).join(", ")})`;
    ramp.fillRect(x, 0, 1, 1);
  }
  open(images.find((each) => each.pairs?.length) || images[0], false);
  follow();
})();
