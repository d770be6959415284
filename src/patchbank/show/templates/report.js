"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const images = JSON.parse($("data").textContent);
  if (!images.length) return;

  // inferno at even steps (Smith and van der Walt 2015): as even in grey and to the colour-blind; what is alike is bright.
  const INFERNO = [
    [0, 0, 4], [11, 7, 36], [33, 12, 74], [61, 9, 101], [87, 16, 110], [113, 25, 110], [138, 34, 106], [163, 44, 97], [188, 55, 84],
    [210, 70, 68], [228, 90, 49], [241, 115, 29], [249, 142, 9], [252, 172, 17], [249, 203, 53], [242, 234, 105], [252, 255, 164],
  ];
  const BINS = 7; // a side of a box, as the library's pool_regions has them
  const LEAST = 0.01; // the smallest range that the colours span: less is rounding
  const FIRST = 6; // images of the first screen
  const NEAREST = 8, AROUND = 6; // other images whose nearest patch is shown, with what is around it in patches
  const SEARCHED = 64e6; // bytes of tokens in which the nearest are looked for
  const WAIT = 60; // milliseconds that the pointer rests before they are

  // Numbers.

  const word = ([red, green, blue]) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0; // a pixel of a canvas
  const colours = Uint32Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (INFERNO.length - 1), low = Math.min(Math.floor(place), INFERNO.length - 2);
    return word(INFERNO[low].map((value, each) => Math.round(value + (INFERNO[low + 1][each] - value) * (place - low))));
  });

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  /** An image's tokens: levels component by component, their inverse lengths, and norms. Undefined until they are unpacked. */
  function tokensOf(image) {
    if (image.levels) image.unpacking ??= unpack(image).then((tokens) => ((image.tokens = tokens), ask({})));
    return image.tokens;
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

  /** The part of an image that the model saw: xyxy in original pixels. */
  function visible({ frame: [x1, y1, x2, y2], size: [width, height] }) {
    return [Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width), Math.min(y2, height)];
  }

  /** The patches' weights when tokens are pooled in the visible part of a box of original pixels. */
  function boxWeights(image, box) {
    const [x1, y1, x2, y2] = image.frame, [rows, columns] = image.grid, seen = visible(image);
    const clip = (value, side) => Math.min(Math.max(value, seen[side]), seen[side + 2]);
    const toColumn = (x) => ((clip(x, 0) - x1) / (x2 - x1)) * columns, toRow = (y) => ((clip(y, 1) - y1) / (y2 - y1)) * rows;
    const across = sampleWeights(toColumn(box[0]), toColumn(box[2]), columns);
    const down = sampleWeights(toRow(box[1]), toRow(box[3]), rows);
    return Float64Array.from({ length: rows * columns }, (_, token) => down[Math.floor(token / columns)] * across[token % columns]);
  }

  /** The visible fraction of a box. */
  function visibleFraction(image, [x1, y1, x2, y2]) {
    const [left, top, right, bottom] = visible(image);
    const across = Math.min(x2, right) - Math.max(x1, left), down = Math.min(y2, bottom) - Math.max(y1, top);
    return (Math.max(across, 0) * Math.max(down, 0)) / ((x2 - x1) * (y2 - y1) || 1);
  }

  const union = (boxes) => [0, 1, 2, 3].map((side) => (side < 2 ? Math.min : Math.max)(...boxes.map((each) => each.box[side])));

  /** A patch's xyxy in original pixels. */
  function cell(image, token) {
    const [x1, y1, x2, y2] = image.frame, [rows, columns] = image.grid, [row, column] = [Math.floor(token / columns), token % columns];
    const [width, height] = [(x2 - x1) / columns, (y2 - y1) / rows];
    return [x1 + column * width, y1 + row * height, x1 + (column + 1) * width, y1 + (row + 1) * height];
  }

  function isValid(image, token) {
    const [first, last, left, right] = image.valid, columns = image.grid[1];
    const row = Math.floor(token / columns), column = token % columns;
    return row >= first && row < last && column >= left && column < right;
  }

  function best(image, values) {
    let found = -1;
    for (let token = 0; token < values.length; token++)
      if (isValid(image, token) && (found < 0 || values[token] > values[found])) found = token;
    return found;
  }

  // Views: an image's picture and its map. Everything in them has its place in per cent of the image, and the browser scales it.

  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    element.className = name;
    element.append(...children);
    return element;
  }

  function set(element, attributes) {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  function put(element, [x1, y1, x2, y2], [left, top, right, bottom]) {
    const [across, down] = [100 / (right - left), 100 / (bottom - top)];
    Object.assign(element.style, { left: `${(x1 - left) * across}%`, top: `${(y1 - top) * down}%` });
    Object.assign(element.style, { width: `${(x2 - x1) * across}%`, height: `${(y2 - y1) * down}%` });
    return element;
  }

  /** Image and input together without padding, xyxy; only the part of a long image near the input. */
  function regionOf({ size: [width, height], frame: [x1, y1, x2, y2] }) {
    const [across, down] = [x2 - x1, y2 - y1];
    return [Math.max(0, x1 - across), Math.max(0, y1 - down), Math.min(width, x2 + across), Math.min(height, y2 + down)];
  }

  function shot(image, kind, region) {
    const whole = [0, 0, ...image.size], seen = visible(image), covered = seen.every((side, index) => Math.abs(side - whole[index]) < 0.5);
    const sheet = put(make("span", "sheet"), whole, region), frame = make("span", `shot ${kind}`, sheet);
    frame.style.setProperty("--aspect", (region[2] - region[0]) / (region[3] - region[1]));
    if (image.picture && (kind === "photo" || !covered)) sheet.append(set(make("img", ""), { alt: "", src: image.picture }));
    if (kind === "photo" && !covered) sheet.append(put(make("i", "seen"), seen, whole));
    return frame;
  }

  const views = new Map(); // a tile's button, or a stage -> its view
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) views.get(target).near = isIntersecting;
    ask({});
  }, { rootMargin: "200px" });

  /** Show an image in an element. */
  function view(element, into, image) {
    watcher.unobserve(element);
    views.set(element, { image, chips: [] });
    if (!image.grid) return into.replaceChildren(make("span", "none", "no feature"));
    const region = regionOf(image), frames = ["photo", "map"].map((kind) => shot(image, kind, region));
    const canvas = put(make("canvas", ""), image.frame, [0, 0, ...image.size]), value = make("b", "value");
    [canvas.height, canvas.width] = image.grid;
    frames[1].firstChild.append(canvas);
    frames[1].append(value);
    const layers = frames.map((frame) => make("span", "layer"));
    frames.forEach((frame, index) => frame.firstChild.append(layers[index]));
    into.replaceChildren(...frames.slice(image.picture ? 0 : 1));
    into.style.setProperty("--aspect", (region[2] - region[0]) / (region[3] - region[1]));
    const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
    views.set(element, { image, layers, context, pixels, value, chips: [] });
    show(views.get(element));
    watcher.observe(element); // which says whether it is near
  }

  // The query (a patch, or one or two boxes of an image), the patch to read while it is held, and the boxes pointed at.

  const state = { query: null, reading: null, pointed: null, asked: 0, frame: 0, timer: 0 };

  function ask(what) {
    if ("query" in what) {
      clearTimeout(state.timer);
      state.timer = setTimeout(drawNearest, WAIT);
      state.reading = null;
    }
    if ("query" in what || "reading" in what) state.asked++;
    Object.assign(state, what);
    state.frame ||= requestAnimationFrame(draw);
  }

  const release = () => ask({ query: null });
  const hold = (image, token) => ask({ query: { image, token, boxes: [], held: true } });
  const boxesOf = ({ image, boxes }) => boxes.map((each) => image.boxes[each]);

  /** Compute a query's vector, and the range of its own image's similarities: the scale of all maps. */
  function answer(query, tokens) {
    const boxes = boxesOf(query);
    const weights = boxes.length ? boxWeights(query.image, union(boxes)) : Float64Array.from({ length: tokens.count }, (_, token) => Number(token === query.token));
    query.maps = new Map();
    if (!weights.some((weight) => weight > 0)) return;
    query.vector = pooled(tokens, weights);
    const shown = mapOf(query, query.image).values.filter((_, token) => isValid(query.image, token));
    [query.low, query.high] = [Math.min(...shown), Math.max(...shown)];
  }

  /** An image's similarities to a query, and its nearest patch. Null before its tokens are unpacked. */
  function mapOf(query, image) {
    const tokens = tokensOf(image);
    if (!query.vector || !tokens) return null;
    if (!query.maps.has(image)) {
      const values = similarities(tokens, query.vector);
      query.maps.set(image, { values, best: best(image, values) });
    }
    return query.maps.get(image);
  }

  function draw() {
    state.frame = 0;
    const { query } = state, tokens = query && tokensOf(query.image);
    if (query && !tokens) return; // they ask again
    if (query && !query.maps) answer(query, tokens);
    for (const one of views.values()) if (one.near) show(one);
    const shown = query?.vector;
    $("scale").hidden = !shown;
    $("swatches").hidden = Boolean(shown);
    $("release").hidden = !query?.held;
    if (shown) [$("low").textContent, $("high").textContent] = [number(query.low), number(query.high)];
    $("readout").textContent = query ? describe(query) : REST;
    if (!query) $("others").hidden = true;
    const best = Object.fromEntries([...(query?.maps ?? [])].map(([image, map]) => [image.key, map.best]));
    const of = query && { image: query.image.key, token: query.token, chosen: query.boxes, held: query.held, values: shown && [...mapOf(query, query.image).values] };
    window.patchbank = { ...of, reading: state.reading && [state.reading.image.key, state.reading.token], best, nearest: query?.nearest, asked: state.asked };
  }

  function show({ image, layers, context, pixels, value, chips }) {
    const { query, reading, pointed } = state, map = query && mapOf(query, image), own = query?.image === image;
    const middle = map && (query.low + query.high) / 2, range = map && Math.max(query.high - query.low, LEAST);
    const words = new Uint32Array(pixels.data.buffer);
    image.rest ??= components(image, words.length);
    if (!map) words.set(image.rest);
    else for (let token = 0; token < words.length; token++) {
      const share = 0.5 + (map.values[token] - middle) / range;
      words[token] = isValid(image, token) ? colours[Math.round(255 * Math.min(Math.max(share, 0), 1))] : 0;
    }
    context.putImageData(pixels, 0, 0);
    const marks = [];
    if (own && query.boxes.length) marks.push(...outlines(query));
    else if (map) marks.push([own ? "at" : "at other", cell(image, own ? query.token : map.best)]);
    if (reading?.image === image) marks.push(["at other", cell(image, reading.token)]);
    if (pointed?.image === image) marks.push(...outlines(pointed));
    for (const layer of layers) layer.replaceChildren(...marks.map(([name, box]) => put(make("i", name), box, [0, 0, ...image.size])));
    value.textContent = map && !own ? number(map.values[map.best]) : "";
    for (const { button, boxes } of chips) button.setAttribute("aria-pressed", String(own && isChosen(query, boxes)));
  }

  /** The patches' principal components, as pixels. */
  function components(image, count) {
    const bytes = image.colours && bytesOf(image.colours);
    return Uint32Array.from({ length: count }, (_, token) => (bytes && isValid(image, token) ? word(bytes.subarray(3 * token, 3 * token + 3)) : 0));
  }

  const isChosen = (query, boxes) => boxes.every((each) => query.boxes.includes(each)) && (boxes.length === 1 || query.boxes.length === 2);

  function outlines(query) {
    const boxes = boxesOf(query);
    return [...boxes.map((each) => [`box ${each.kind}`, each.box]), ...(boxes.length === 2 ? [["box union", union(boxes)]] : [])];
  }

  // Words.

  const REST = "Point at a patch, or tap it: its matches light up in every image.";
  const number = (value) => value.toFixed(2).replace("-", "−");
  const label = (image, index) => `${image.boxes[index].kind === "human" ? "human" : image.boxes[index].name} ${index + 1}`;

  /** A patch by its row and column in the grid, from 0, and its centre, as `patchbank show --at` takes it. */
  function place(image, token) {
    const [x1, y1, x2, y2] = cell(image, token), columns = image.grid[1];
    return `row ${Math.floor(token / columns)}, column ${token % columns} (x ${Math.round((x1 + x2) / 2)}, y ${Math.round((y1 + y2) / 2)}) of ${image.key}`;
  }

  function describe(query) {
    const { image, boxes } = query, names = boxes.map((index) => `“${label(image, index)}”`).join(" and ");
    const what = boxes.length === 2 ? `the union of ${names}` : `the box ${names}`;
    if (!query.vector) return `The model does not see ${what}.`;
    const seen = boxes.length ? visibleFraction(image, union(boxesOf(query))) : 1;
    const partly = seen > 0.995 ? "" : ` (${seen < 0.01 ? "less than 1" : Math.round(100 * seen)}% visible)`;
    const text = boxes.length ? `Similarity to the tokens pooled in ${what}${partly} of ${image.key}` : `Similarity to ${place(image, query.token)}`;
    const map = state.reading && mapOf(query, state.reading.image);
    return `${map ? `${number(map.values[state.reading.token])} at ${place(state.reading.image, state.reading.token)}. ` : ""}${text}${query.held ? ", held" : ""}.`;
  }

  // Choosing.

  /** The patch under a pointer; null if there is none. */
  function patchAt(event) {
    const image = views.get(event.target.closest("button, .stage"))?.image, sheet = event.target.closest(".shot")?.firstChild;
    if (!sheet || !image?.levels) return null;
    const area = sheet.getBoundingClientRect(), [x1, y1, x2, y2] = image.frame, [rows, columns] = image.grid;
    const x = ((event.clientX - area.left) / area.width) * image.size[0], y = ((event.clientY - area.top) / area.height) * image.size[1];
    const row = Math.floor(((y - y1) / (y2 - y1)) * rows), column = Math.floor(((x - x1) / (x2 - x1)) * columns);
    const token = row * columns + column, inside = row >= 0 && row < rows && column >= 0 && column < columns;
    return inside && isValid(image, token) ? { image, token } : null;
  }

  const isAt = (one, other) => one?.image === other.image && one.token === other.token;

  function point(at) {
    if (state.query?.held) isAt(state.reading, at) || ask({ reading: at });
    else isAt(state.query, at) || ask({ query: { ...at, boxes: [], held: false } });
  }

  const middleOf = ({ valid: [first, last, left, right], grid }) => Math.floor((first + last) / 2) * grid[1] + Math.floor((left + right) / 2);

  $("gallery").addEventListener("pointermove", (event) => {
    const at = event.pointerType !== "touch" && patchAt(event);
    if (at) point(at);
    else if (!event.target.closest(".tiles, .stage")) leave();
  });
  $("gallery").addEventListener("pointerleave", leave);
  function leave() {
    if (state.query && !state.query.held) release();
    else if (state.reading) ask({ reading: null });
  }

  $("gallery").addEventListener("click", (event) => {
    const at = patchAt(event), { query } = state, { image } = views.get(event.target.closest(".tiles button")) ?? {};
    if (image && query?.held && image !== query.image) return open(opposite(), image, !event.detail);
    if (image) open("left", image, !event.detail); // with the keyboard, the focus goes there
    if (image?.levels) hold(image, at ? at.token : middleOf(image));
    else if (at) query?.held && isAt(query, at) ? release() : hold(at.image, at.token);
  });

  $("pair").addEventListener("keydown", (event) => {
    const image = event.target.matches(".shot") && views.get(event.target.closest(".stage")).image;
    if (!image?.levels) return;
    const { query, reading } = state, columns = image.grid[1], [first, last, left, right] = image.valid;
    const at = [query?.held && reading, query].find((each) => each?.image === image && each.token !== null), token = at ? at.token : middleOf(image);
    const [row, column] = [Math.floor(token / columns), token % columns];
    const moves = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], Home: [row, left], End: [row, right - 1] };
    if (event.key === "Enter" || event.key === " ") query?.held ? release() : hold(image, token);
    else if (moves[event.key]) {
      const [y, x] = moves[event.key];
      point({ image, token: Math.min(Math.max(y, first), last - 1) * columns + Math.min(Math.max(x, left), right - 1) });
    } else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && release());
  $("release").addEventListener("click", release);

  // The pair.

  function chip(image, text, kind, boxes) {
    const button = set(make("button", kind, text), { type: "button" });
    button.addEventListener("click", () => {
      const { query } = state, before = query?.image === image ? query.boxes : [];
      const rest = before.filter((each) => !boxes.includes(each)), chosen = query && isChosen({ boxes: before }, boxes);
      const after = boxes.length === 2 ? (chosen ? [] : boxes) : chosen ? rest : [...rest, ...boxes].slice(-2);
      ask({ query: after.length ? { image, token: null, boxes: after, held: true } : null });
    });
    for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => ask({ pointed: { image, boxes } }));
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => ask({ pointed: null }));
    return { button, boxes };
  }

  const shownOn = (side) => views.get($(side))?.image;
  /** The side on which matches of the query's image are opened. */
  const opposite = () => (shownOn("right") === state.query?.image ? "left" : "right");

  function open(side, image, focus) {
    const stage = $(side), [select, shots, boxes, notes] = stage.children, before = shownOn(side), other = side === "left" ? "right" : "left";
    if (before !== image) {
      view(stage, shots, image);
      if (before && shownOn(other) === image) open(other, before);
      select.value = images.indexOf(image);
      const found = views.get(stage), shot = shots.firstChild, pairs = image.levels ? image.pairs ?? [] : [];
      set(shot, { tabindex: 0, role: "application", "aria-roledescription": "grid of patches", "aria-label": `${image.key}: patches`, "aria-describedby": "help readout" });
      found.chips = (pairs.length ? image.boxes : []).map((each, index) => chip(image, label(image, index), each.kind, [index]));
      found.chips.push(...pairs.map(([human, thing, verb]) => chip(image, `${label(image, human)}, ${verb}, ${label(image, thing)}`, "union", [human, thing])));
      boxes.replaceChildren(...found.chips.map((each) => each.button));
      const crop = shots.querySelector(".seen") ? ["The dimmed part is not visible to the model."] : [];
      notes.replaceChildren(...[...image.notes, ...crop].map((each) => make("li", "", each)));
      ask({});
    }
    if (focus) shots.firstChild.focus();
    if (focus && side === "left") history.replaceState(null, "", `#image-${images.indexOf(image)}`);
  }

  for (const side of ["left", "right"]) {
    const select = $(side).querySelector("select");
    select.append(...images.map((image, index) => new Option(image.key, index)));
    select.addEventListener("change", () => open(side, images[select.value]));
  }

  // The nearest patch of every other image.

  async function drawNearest() {
    const { query } = state, found = [];
    let bytes = 0;
    if (query && !query.maps) return void (state.timer = setTimeout(drawNearest, WAIT)); // its tokens are being unpacked
    for (const image of query?.vector ? images : []) {
      if (image === query.image || !image.levels || bytes > SEARCHED) continue;
      tokensOf(image);
      await image.unpacking;
      if (query !== state.query) return; // another patch was asked for
      bytes += image.tokens.levels.length;
      const { values, best } = mapOf(query, image);
      found.push({ image, token: best, value: values[best] });
    }
    found.sort((one, other) => other.value - one.value);
    $("others").hidden = !found.length;
    $("nearest").replaceChildren(...found.slice(0, NEAREST).map((each) => near(query, each)));
    if (query) query.nearest = found.map((each) => ({ ...each, image: each.image.key }));
    ask({});
  }

  /** A patch of another image with what is around it: an entry that opens it beside the query's image. */
  function near(query, { image, token, value }) {
    const box = cell(image, token), side = (AROUND / 2) * Math.max(box[2] - box[0], box[3] - box[1]);
    const [x, y] = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], frame = shot(image, "photo", [x - side, y - side, x + side, y + side]);
    frame.firstChild.append(put(make("i", "at other"), box, [0, 0, ...image.size]));
    const button = set(make("button", "", frame, number(value)), { type: "button", "aria-label": `${number(value)}: ${place(image, token)}` });
    button.addEventListener("click", () => {
      ask({ query: { ...query, held: true } });
      ask({ reading: { image, token } });
      open(opposite(), image, true);
    });
    return make("li", "", button);
  }

  // The tiles and their search.

  function tile(image, list) {
    const button = set(make("button", ""), { type: "button", "aria-label": image.key }), entry = make("li", "", button);
    list.append(entry);
    view(button, button, image);
    entry.style.setProperty("--aspect", button.style.getPropertyValue("--aspect") || 1);
    const words = [image.key, ...(image.boxes ?? []).map((each) => each.name), ...(image.pairs ?? []).map((each) => each[2])];
    return { image, entry, words: words.join(" ").toLowerCase() };
  }

  for (const image of images.filter((each) => each.colours).slice(0, FIRST)) tile(image, $("first"));
  const tiles = images.map((image) => tile(image, $("all")));

  $("query").addEventListener("input", () => {
    const wanted = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const { entry, words } of tiles) entry.hidden = !wanted.every((word) => words.includes(word));
    $("found").textContent = wanted.length ? `${tiles.filter((each) => !each.entry.hidden).length} of ${tiles.length}` : "";
  });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const first = tiles.find((each) => !each.entry.hidden);
    if (first) open("left", first.image, true);
  });

  function follow() {
    const linked = images[(/^#image-(\d+)$/.exec(location.hash) ?? [])[1]];
    if (linked) open("left", linked, true);
  }
  window.addEventListener("hashchange", follow);
  for (const link of document.querySelectorAll('a[href^="#image-"]'))
    link.addEventListener("click", (event) => {
      event.preventDefault(); // also where it is the page's address already
      open("left", images[link.hash.slice(7)], true);
    });

  const ramp = $("ramp").getContext("2d"), row = ramp.createImageData(256, 1);
  new Uint32Array(row.data.buffer).set(colours);
  ramp.putImageData(row, 0, 0);
  const shares = images.find((each) => each.shares)?.shares ?? [];
  shares.forEach((share, index) => ($("swatches").children[index].textContent = `${Math.round(100 * share)}%`));
  const start = Math.max(0, images.findIndex((each) => each.pairs?.length));
  $("right").hidden = images.length < 2;
  open("left", images[start]);
  open("right", images[(start + 1) % images.length]);
  follow();
})();
