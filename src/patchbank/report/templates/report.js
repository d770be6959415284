"use strict";
(() => {
  const images = JSON.parse(document.getElementById("data").textContent);
  if (!images.length) return;
  const $ = (id) => document.getElementById(id);

  // cividis at even steps (Nuñez, Anderton and Renslow 2018): even in lightness, also in grey and to the colour-blind.
  const CIVIDIS = [
    [0, 34, 78], [0, 48, 111], [39, 63, 108], [60, 77, 110], [82, 92, 109], [102, 105, 112], [121, 119, 119], [140, 135, 121],
    [162, 151, 119], [184, 168, 112], [207, 186, 99], [230, 205, 80], [254, 232, 56],
  ];
  const BINS = 7; // a side of a box, as the library's pool_regions has them

  function colour(share) {
    const place = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
    const low = Math.min(Math.floor(place), CIVIDIS.length - 2);
    return CIVIDIS[low].map((value, index) => Math.round(value + (CIVIDIS[low + 1][index] - value) * (place - low)));
  }

  function bytesOf(text) {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  }

  /** The image's tokens at unit length, (N x K) row by row, and their lengths. Made once. */
  async function tokensOf(image) {
    if (image.tokens || !image.levels) return image.tokens;
    const stream = new Blob([bytesOf(image.levels)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const levels = new Int8Array(await new Response(stream).arrayBuffer());
    const count = image.grid[0] * image.grid[1], components = image.components;
    const units = new Float32Array(count * components);
    for (let token = 0; token < count; token++) {
      let square = 0;
      for (let each = 0; each < components; each++) square += levels[each * count + token] ** 2;
      const length = Math.sqrt(square) || 1;
      for (let each = 0; each < components; each++) units[token * components + each] = levels[each * count + token] / length;
    }
    const raw = bytesOf(image.norms);
    const norms = Float32Array.from({ length: count }, (_, token) => (raw[2 * token] + 256 * raw[2 * token + 1]) * image.normStep);
    image.tokens = { units, norms, count, components };
    return image.tokens;
  }

  /** The cosine similarity of every patch to the mean of the tokens with these weights. */
  function similarities(tokens, weights) {
    const { units, norms, count, components } = tokens;
    const query = new Float64Array(components);
    for (let token = 0; token < count; token++) {
      const weight = weights[token] * norms[token];
      if (weight) for (let each = 0; each < components; each++) query[each] += weight * units[token * components + each];
    }
    const length = Math.hypot(...query) || 1;
    const found = new Float32Array(count);
    for (let token = 0; token < count; token++) {
      let sum = 0;
      for (let each = 0; each < components; each++) sum += units[token * components + each] * query[each];
      found[token] = sum / length;
    }
    return found;
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

  /** The patches' shares in what is pooled in a box of original pixels, as far as the model saw it. */
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

  const state = { image: null, token: 0, chosen: [], held: false, serial: 0 };
  const limits = (image) => {
    const [x1, y1, x2, y2] = image.frame;
    return [Math.min(x1, 0), Math.min(y1, 0), Math.max(x2, image.size[0]), Math.max(y2, image.size[1])];
  };

  // Drawing. Both canvases show image and input together, in original pixels.

  function prepare(canvas) {
    const [left, top, right, bottom] = limits(state.image);
    const width = 720, height = Math.max(1, Math.round((width * (bottom - top)) / (right - left)));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = width / (right - left);
    context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
    return [context, 1 / scale];
  }

  function cell(token) {
    const [x1, y1, x2, y2] = state.image.frame, [rows, columns] = state.image.grid;
    const [width, height] = [(x2 - x1) / columns, (y2 - y1) / rows];
    return [x1 + (token % columns) * width, y1 + Math.floor(token / columns) * height, width, height];
  }

  function isValid(token) {
    const [first, last, left, right] = state.image.valid, columns = state.image.grid[1];
    const row = Math.floor(token / columns), column = token % columns;
    return row >= first && row < last && column >= left && column < right;
  }

  const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function outline(context, pixel, box, kind, strong) {
    context.lineWidth = (strong ? 8 : 5) * pixel;
    context.setLineDash([]);
    context.strokeStyle = "white";
    context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
    context.lineWidth = (strong ? 5 : 2.5) * pixel;
    context.setLineDash(kind === "union" ? [10 * pixel, 6 * pixel] : []);
    context.strokeStyle = { human: "#0072b2", object: "#d55e00", union: "#cc79a7" }[kind];
    context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
    context.setLineDash([]);
  }

  function mark(context, pixel) {
    const [x, y, width, height] = cell(state.token);
    context.lineWidth = 6 * pixel;
    context.strokeStyle = "black";
    context.strokeRect(x, y, width, height);
    context.lineWidth = 2.5 * pixel;
    context.strokeStyle = "white";
    context.strokeRect(x, y, width, height);
  }

  function drawImage() {
    const image = state.image, [context, pixel] = prepare($("image")), [width, height] = image.size;
    context.fillStyle = styled("--rule");
    context.fillRect(0, 0, width, height);
    if (image.element) context.drawImage(image.element, 0, 0, width, height);
    const [x1, y1, x2, y2] = image.frame;
    context.fillStyle = "rgba(0, 0, 0, 0.6)";
    context.beginPath();
    context.rect(0, 0, width, height);
    context.rect(Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width) - Math.max(x1, 0), Math.min(y2, height) - Math.max(y1, 0));
    context.fill("evenodd");
    const [rows, columns] = image.grid;
    context.lineWidth = 1 * pixel;
    context.strokeStyle = "rgba(255, 255, 255, 0.35)";
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
    drawBoxes(context, pixel);
    if (!state.chosen.length && image.levels) mark(context, pixel);
  }

  function drawBoxes(context, pixel) {
    const image = state.image;
    if ($("show-boxes").checked)
      (image.boxes || []).forEach((each, index) => outline(context, pixel, each.box, each.kind, state.chosen.includes(index)));
    if (state.chosen.length === 2) outline(context, pixel, union(state.chosen.map((each) => image.boxes[each])), "union", true);
  }

  function drawMap(values, low, high) {
    const image = state.image, [context, pixel] = prepare($("map")), colours = image.colours && bytesOf(image.colours);
    if (image.element) {
      context.globalAlpha = 0.25;
      context.drawImage(image.element, 0, 0, ...image.size);
      context.globalAlpha = 1;
    }
    const asColours = mode() === "colours" && colours;
    for (let token = 0; token < image.grid[0] * image.grid[1]; token++) {
      if (!isValid(token) || !(asColours || values)) continue;
      const shade = asColours ? colours.subarray(3 * token, 3 * token + 3) : colour((values[token] - low) / (high - low || 1));
      context.fillStyle = `rgb(${shade[0]}, ${shade[1]}, ${shade[2]})`;
      const [x, y, width, height] = cell(token);
      context.fillRect(x, y, width + 0.6 * pixel, height + 0.6 * pixel);
    }
    if (state.chosen.length) drawBoxes(context, pixel);
    else if (values) mark(context, pixel);
  }

  const mode = () => document.querySelector("input[name=mode]:checked").value;
  const number = (value) => value.toFixed(2).replace("-", "−");

  async function draw() {
    const image = state.image, serial = ++state.serial;
    const tokens = await tokensOf(image);
    if (serial !== state.serial) return; // something else is to be drawn by now
    drawImage();
    const boxes = state.chosen.map((each) => image.boxes[each]);
    let values = null, low = 0, high = 1;
    if (tokens) {
      const weights = boxes.length ? boxWeights(image, union(boxes)) : Float64Array.from({ length: tokens.count }, (_, token) => Number(token === state.token));
      if (weights.some((weight) => weight > 0)) values = similarities(tokens, weights);
    }
    if (values) {
      const shown = values.filter((_, token) => isValid(token));
      low = Math.min(...shown);
      high = Math.max(...shown);
    }
    drawMap(values, low, high);
    const asColours = mode() === "colours";
    $("scale").hidden = asColours || !values;
    $("low").textContent = number(low);
    $("high").textContent = number(high);
    const shares = (image.shares || []).map((share) => `${Math.round(100 * share)} %`).join(", ");
    $("map-caption").textContent = asColours
      ? `Principal components 1, 2, 3 as red, green and blue: ${shares} of the variance over the patches.`
      : "Cosine similarity of every patch; padding is left out.";
    $("readout").textContent = tell(values, boxes, low, high);
    window.patchbank = { image: image.key, token: state.token, chosen: [...state.chosen], values: values && Array.from(values) };
  }

  function tell(values, boxes, low, high) {
    if (!state.image.levels) return "No similarity can be computed for this image.";
    const range = values ? ` Similarities go from ${number(low)} to ${number(high)}.` : "";
    if (boxes.length === 1) return values ? `Pooled in the box “${boxes[0].name}”.${range}` : `The model saw nothing of the box “${boxes[0].name}”.`;
    if (boxes.length === 2) {
      const names = `“${boxes[0].name}” and “${boxes[1].name}”`;
      return values ? `Pooled in the union of ${names}.${range}` : `The model saw nothing of the union of ${names}.`;
    }
    const columns = state.image.grid[1];
    return `Patch in row ${Math.floor(state.token / columns) + 1}, column ${(state.token % columns) + 1}${state.held ? ", held" : ""}.${range}`;
  }

  // Choosing.

  function point(token) {
    state.token = token;
    if (state.chosen.length) choose([]);
    else draw();
  }

  function choose(chosen) {
    state.chosen = chosen;
    for (const button of $("boxes").children) button.setAttribute("aria-pressed", String(chosen.includes(Number(button.dataset.index))));
    draw();
  }

  function tokenAt(event) {
    const canvas = event.currentTarget, area = canvas.getBoundingClientRect(), [left, top, right, bottom] = limits(state.image);
    const x = left + ((event.clientX - area.left) / area.width) * (right - left);
    const y = top + ((event.clientY - area.top) / area.height) * (bottom - top);
    const [x1, y1, x2, y2] = state.image.frame, [rows, columns] = state.image.grid;
    const column = Math.floor(((x - x1) / (x2 - x1)) * columns), row = Math.floor(((y - y1) / (y2 - y1)) * rows);
    const token = row * columns + column;
    return row >= 0 && row < rows && column >= 0 && column < columns && isValid(token) ? token : null;
  }

  function hold(held) {
    state.held = held;
    $("fixed").checked = held;
    draw();
  }

  for (const id of ["image", "map"]) {
    $(id).addEventListener("pointermove", (event) => {
      const token = tokenAt(event);
      if (event.pointerType === "touch" || state.held || state.chosen.length || token === null || token === state.token) return;
      point(token);
    });
    $(id).addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token === null) return;
      const mouse = event.pointerType !== "touch";
      state.held = mouse && !(state.held && token === state.token);
      $("fixed").checked = state.held;
      point(token);
    });
  }

  $("image").addEventListener("keydown", (event) => {
    const columns = state.image.grid[1], [first, last, left, right] = state.image.valid;
    let row = Math.floor(state.token / columns), column = state.token % columns;
    if (event.key === "ArrowLeft") column--;
    else if (event.key === "ArrowRight") column++;
    else if (event.key === "ArrowUp") row--;
    else if (event.key === "ArrowDown") row++;
    else if (event.key === "Home") column = left;
    else if (event.key === "End") column = right - 1;
    else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return hold(!state.held);
    } else return;
    event.preventDefault();
    row = Math.min(Math.max(row, first), last - 1);
    column = Math.min(Math.max(column, left), right - 1);
    point(row * columns + column);
  });

  $("fixed").addEventListener("change", () => hold($("fixed").checked));
  $("show-boxes").addEventListener("change", draw);
  $("modes").addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  function item(text) {
    const element = document.createElement("li");
    element.textContent = text;
    return element;
  }

  function open(image, focus) {
    state.image = image;
    state.chosen = [];
    const [first, last, left, right] = image.valid || [0, 1, 0, 1];
    state.token = Math.floor((first + last) / 2) * (image.grid ? image.grid[1] : 1) + Math.floor((left + right) / 2);
    state.held = false;
    $("fixed").checked = false;
    $("viewer").hidden = false;
    $("name").textContent = image.key;
    for (const { button, image: other } of thumbnails) button.setAttribute("aria-current", String(other === image));
    $("image").setAttribute("aria-label", `${image.key}: patches`);
    const boxes = image.boxes || [];
    $("pairs").hidden = !boxes.length;
    $("boxes-label").hidden = !boxes.length;
    $("boxes").replaceChildren(
      ...boxes.map((each, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.className = each.kind;
        button.dataset.index = index;
        button.textContent = each.kind === "human" ? `human ${each.name === "person" ? "" : each.name}`.trim() : each.name;
        button.setAttribute("aria-pressed", "false");
        button.addEventListener("click", () => {
          const chosen = state.chosen.includes(index) ? state.chosen.filter((other) => other !== index) : [...state.chosen, index].slice(-2);
          choose(chosen);
        });
        return button;
      }),
    );
    $("relations").replaceChildren(...(image.pairs || []).map(([human, thing, verb]) => item(`human ${human + 1}, ${verb}, ${boxes[thing].name} (box ${thing + 1})`)));
    $("notes").replaceChildren(...image.notes.map(item));
    const hasMap = Boolean(image.frame);
    document.querySelector(".panels").hidden = !hasMap;
    if (hasMap) draw();
    else $("readout").textContent = "";
    if (focus) $("name").focus();
  }

  // The list, and searching in it.

  const thumbnails = images.map((image) => {
    const place = document.createElement("li"), button = document.createElement("button");
    place.id = image.id;
    button.type = "button";
    const thumb = document.createElement("span"), name = document.createElement("span");
    thumb.className = "thumb";
    name.className = "name";
    name.textContent = image.key;
    button.title = image.key;
    if (image.picture) {
      image.element = new Image();
      image.element.alt = "";
      image.element.addEventListener("load", () => image === state.image && draw());
      image.element.src = image.picture;
      thumb.append(image.element.cloneNode());
    } else thumb.textContent = "no image";
    button.append(thumb, name);
    button.addEventListener("click", () => open(image, true));
    place.append(button);
    $("thumbnails").append(place);
    const words = [image.key, ...(image.boxes || []).map((each) => each.name), ...(image.pairs || []).map((each) => each[2])];
    return { image, place, button, words: words.join(" ").toLowerCase() };
  });

  function search() {
    const wanted = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const each of thumbnails) {
      const found = wanted.every((word) => each.words.includes(word));
      each.place.hidden = !found;
      count += found;
    }
    $("matches").textContent = wanted.length ? `${count} of ${thumbnails.length}` : "";
  }
  $("query").addEventListener("input", search);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const first = thumbnails.find((each) => !each.place.hidden);
    if (first) open(first.image, true);
  });

  function follow() {
    const linked = thumbnails.find((each) => each.image.id === location.hash.slice(1));
    if (linked) open(linked.image, true);
  }
  window.addEventListener("hashchange", follow);

  const ramp = $("ramp").getContext("2d");
  for (let x = 0; x < 256; x++) {
    ramp.fillStyle = `rgb(${colour(x / 255).join(", ")})`;
    ramp.fillRect(x, 0, 1, 1);
  }
  open(images[0], false);
  follow();
})();
