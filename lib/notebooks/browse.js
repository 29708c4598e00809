// Panels of one image: zoomed, panned and read out together, without the kernel.
const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };
const READ = { // class indices, millimetres, confidence
  uint8: (value, classes) => classes[value] ?? "unlabelled",
  uint16: (value) => (value ? `${(value / 1000).toFixed(2)} m` : "not measured"),
  float32: (value) => value.toFixed(2),
};

function array({ kind, bytes }) {
  return new ARRAYS[kind](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

function element(tag, parent, style, text = "") {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  made.textContent = text;
  parent.append(made);
  return made;
}

function render({ model, el }) {
  const text = { color: "var(--jp-ui-font-color1, inherit)", font: "13px var(--jp-ui-font-family, sans-serif)" };
  const root = element("div", el, { ...text, width: "100%" });
  const row = element("div", root, { display: "flex", gap: "6px", flexWrap: "wrap" });
  const readout = element("div", root, { minHeight: "1.5em", padding: "4px 0" });
  const legend = element("div", root, { display: "flex", gap: "2px 12px", flexWrap: "wrap" });
  const choices = element("div", root, { display: "flex", gap: "12px", flexWrap: "wrap", padding: "6px 0" });
  readout.className = "browse-readout";
  let image = null, shown = null, panels = [], values = [], pointer = null, view = { x: 0, y: 0, scale: 1 };

  function draw() {
    for (const { canvas, bitmap } of panels) {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(canvas.clientWidth * ratio);
      canvas.height = Math.round((canvas.width * image.height) / image.width);
      const context = canvas.getContext("2d");
      const zoom = (canvas.width / image.width) * view.scale;
      context.imageSmoothingEnabled = zoom < 1;
      context.setTransform(zoom, 0, 0, zoom, -view.x * zoom, -view.y * zoom);
      context.drawImage(bitmap, 0, 0, image.width, image.height);
      if (!pointer) continue;
      for (const [colour, width] of [["white", 3], ["black", 1]]) {
        context.strokeStyle = colour;
        context.lineWidth = (width * ratio) / zoom;
        context.strokeRect(pointer.x - 3 / view.scale, pointer.y - 3 / view.scale, 1 + 6 / view.scale, 1 + 6 / view.scale);
      }
    }
    root.dataset.scale = view.scale;
  }

  function read() {
    const at = pointer ? pointer.y * image.width + pointer.x : 0;
    const found = values.map(({ name, kind, array }) => `${name}: ${READ[kind](array[at], image.classes)}`);
    readout.textContent = pointer
      ? [`x ${pointer.x}, y ${pointer.y}`, ...found].join(" · ")
      : "The wheel zooms, dragging pans, a double click resets; arrow keys go to the previous or next image.";
  }

  function move(x, y, scale) {
    const clamp = (value, room) => Math.min(room - room / scale, Math.max(0, value));
    view = { x: clamp(x, image.width), y: clamp(y, image.height), scale };
    draw();
  }

  function place(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const zoom = (box.width / image.width) * view.scale;
    return [view.x + (event.clientX - box.left) / zoom, view.y + (event.clientY - box.top) / zoom, zoom];
  }

  function listen(canvas) {
    canvas.addEventListener("wheel", (event) => {
      if (!event.deltaY) return; // a horizontal swipe
      const scale = Math.min(32, Math.max(1, view.scale * (event.deltaY < 0 ? 1.25 : 0.8)));
      if (scale === view.scale) return; // the page scrolls
      event.preventDefault();
      const [x, y] = place(canvas, event);
      move(x - ((x - view.x) * view.scale) / scale, y - ((y - view.y) * view.scale) / scale, scale);
    }, { passive: false });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y, zoom] = place(canvas, event);
      const inside = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value)));
      pointer = { x: inside(x, image.width), y: inside(y, image.height) };
      if (event.buttons) move(view.x - event.movementX / zoom, view.y - event.movementY / zoom, view.scale);
      else draw();
      read();
    });
    canvas.addEventListener("pointerleave", () => { pointer = null; draw(); read(); });
    canvas.addEventListener("dblclick", () => move(0, 0, 1));
  }

  function lay() {
    row.replaceChildren();
    panels = image.panels.filter(({ title }) => shown.has(title));
    for (const panel of panels) {
      const box = element("div", row, { flex: "1 1 0", minWidth: "200px" });
      element("div", box, { paddingBottom: "2px" }, panel.title);
      panel.canvas = element("canvas", box, { width: "100%", display: "block", cursor: "crosshair" });
      panel.canvas.dataset.title = panel.title;
      listen(panel.canvas);
    }
    draw();
  }

  function explain() {
    legend.replaceChildren();
    const present = new Set(values.flatMap(({ kind, array }) => (kind === "uint8" ? [...new Set(array)] : [])));
    image.classes.forEach((name, index) => {
      if (!present.has(index)) return;
      const entry = element("span", legend, {});
      const square = { background: image.colours[index], border: "1px solid #888", display: "inline-block" };
      element("span", entry, { ...square, width: "10px", height: "10px", marginRight: "4px" });
      entry.append(name);
    });
    choices.replaceChildren("show:");
    for (const { title } of image.panels) {
      const label = element("label", choices, {}), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", checked: shown.has(title) });
      box.onchange = () => { box.checked ? shown.add(title) : shown.delete(title); lay(); };
      label.append(box, title);
    }
  }

  async function load() {
    const loaded = model.get("image");
    const bitmaps = await Promise.all(loaded.panels.map(({ bytes }) => createImageBitmap(new Blob([bytes]))));
    if (loaded !== model.get("image")) return; // a later one has come
    const [width, height] = loaded.size;
    image = { ...loaded, width, height, panels: loaded.panels.map((panel, index) => ({ ...panel, bitmap: bitmaps[index] })) };
    shown ??= new Set(loaded.shown);
    values = loaded.values.map((value) => ({ ...value, array: array(value) }));
    [view, pointer] = [{ x: 0, y: 0, scale: 1 }, null];
    lay();
    explain();
    read();
    root.dataset.drawn = Number(root.dataset.drawn ?? 0) + 1;
  }

  function press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const box = el.closest(".browse") ?? el, target = event.target;
    const typing = target.matches?.("input[type=text], textarea, [contenteditable=true]");
    const near = box.contains(target) || target.closest?.(".jp-Cell")?.contains(box) || (!typing && box.matches(":hover"));
    if (!step || typing || !near || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    model.send({ step });
  }

  const watch = new ResizeObserver(() => image && draw());
  watch.observe(root);
  document.addEventListener("keydown", press, true);
  model.on("change:image", load);
  load();
  model.send({ ready: true });
  return () => {
    watch.disconnect();
    document.removeEventListener("keydown", press, true);
    model.off("change:image", load);
  };
}

export default { render };
