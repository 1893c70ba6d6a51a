// How often two heads select the same key: a matrix of all heads, and the nearest heads of one.
const similarChoice = { order: 'layers', head: null };

// Greedy chain: each head is followed by the one most similar to it that has no place yet.
function chainOrder(values, size) {
  const [order, left] = [[0], new Set(Array.from({ length: size - 1 }, (_, i) => i + 1))];
  while (left.size) {
    const last = order.at(-1);
    let [best, highest] = [null, -Infinity];
    for (const other of left) {
      const value = values[last * size + other];
      if (best === null || value > highest) [best, highest] = [other, Number.isNaN(value) ? -Infinity : value];
    }
    order.push(best);
    left.delete(best);
  }
  return order;
}

function similarOrder(atlas, values) {
  const places = atlas.heads.map((_, i) => i);
  if (similarChoice.order === 'kinds') return places.sort((a, b) => atlas.heads[a].head_kind.localeCompare(atlas.heads[b].head_kind) || a - b);
  return similarChoice.order === 'chain' ? chainOrder(values, places.length) : places;
}

function drawSimilarity(canvas, values, order) {
  const size = order.length;
  Object.assign(canvas, { width: size, height: size });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  // The values have 251 steps; a pixel is its bytes red, green, blue, opacity in the order of memory.
  const colours = Array.from({ length: 251 }, (_, step) => new Uint32Array(Uint8Array.from([...viridisRgb(step / 250), 255]).buffer)[0]);
  order.forEach((row, y) => order.forEach((column, x) => {
    const value = values[row * size + column];
    pixels[y * size + x] = Number.isNaN(value) ? 0 : colours[Math.round(250 * value)];
  }));
  context.putImageData(image, 0, 0);
}

function nearestTable(atlas, values, place, id) {
  const size = atlas.heads.length;
  const others = atlas.heads.map((head, i) => ({ head, value: values[place * size + i] })).filter(({ head, value }) => head !== atlas.heads[place] && !Number.isNaN(value));
  others.sort((a, b) => b.value - a.value);
  return el('table', { class: 'plain', id },
    el('caption', { class: 'unseen' }, `Heads most similar to ${atlas.heads[place].label}`),
    el('thead', {}, el('tr', {}, ...['Head', 'Agreement', 'Kind', 'Beside it'].map((name) => el('th', { scope: 'col', class: name === 'Agreement' && 'figure' }, name)))),
    el('tbody', {}, ...others.slice(0, 10).map(({ head, value }) => el('tr', {},
      el('td', {}, el('a', { href: `#${head.label}` }, head.label)), el('td', { class: 'figure' }, value.toFixed(3)), el('td', {}, kindName(head.head_kind)),
      el('td', {}, el('a', { href: `#${atlas.heads[place].label}~${head.label}` }, 'compare'))))));
}

function similarityView() {
  return viewSection('Similarity of heads', ['The share of the sampled queries for which two heads select the same key.'], ...atlases.map(similarityPart));
}

function similarityPart(atlas) {
  const box = el('div', { class: 'similarity' });
  const prefix = `similar-${atlas.index}`;
  atlas.similarity().then((values) => {
    if (!values) { box.append(el('p', { class: 'notice' }, 'This run recorded no similarities.')); return; }
    const canvas = el('canvas', { class: 'similar-matrix', role: 'img', 'aria-label': 'Matrix of the similarity of all heads; the list beside it says the same for one head' });
    const readout = el('p', { class: 'readout', 'aria-hidden': 'true' }, 'Point at the matrix to read two heads; press to list the nearest of one.');
    const list = el('div', { class: 'nearest' });
    let order = [];
    const draw = () => { order = similarOrder(atlas, values); drawSimilarity(canvas, values, order); };
    const choose = (place) => {
      similarChoice.head = atlas.heads[place].label;
      select.value = String(place);
      list.replaceChildren(nearestTable(atlas, values, place, `${prefix}-nearest`));
    };
    const at = (event) => {
      const { left, top, width, height } = canvas.getBoundingClientRect();
      const clip = (share) => order[Math.min(order.length - 1, Math.max(0, Math.floor(share * order.length)))];
      return [clip((event.clientY - top) / height), clip((event.clientX - left) / width)];
    };
    canvas.addEventListener('pointermove', (event) => {
      const [row, column] = at(event);
      const value = values[row * order.length + column];
      readout.textContent = `${atlas.heads[row].label} and ${atlas.heads[column].label}: ${Number.isNaN(value) ? 'not defined' : value.toFixed(3)}`;
    });
    canvas.addEventListener('click', (event) => choose(at(event)[0]));
    const select = picker(`${prefix}-head`, atlas.heads.map(({ label }, i) => [String(i), label]), null, (place) => choose(Number(place)));
    const orders = [['layers', 'by layer'], ['kinds', 'by kind of head'], ['chain', 'similar heads together']];
    const sort = picker(`${prefix}-order`, orders, similarChoice.order, (order) => { similarChoice.order = order; draw(); });
    const number = (value) => (Number.isNaN(value) ? null : Number(value.toFixed(3)));
    const lines = () => atlas.heads.map(({ label }, i) => [label, ...[...values.subarray(i * atlas.heads.length, (i + 1) * atlas.heads.length)].map(number)]);
    const save = () => saveCsv([['head', ...atlas.heads.map(({ label }) => label)], ...lines()], 'similarity');
    box.append(
      ...(atlases.length > 1 ? [el('h3', {}, el('bdi', {}, atlas.name))] : []),
      el('div', { class: 'tools' }, labelled('Order', sort), labelled('Nearest heads of', select),
        exportButton('PNG ↓', 'Download the matrix as PNG', () => savePng(canvas, 'similarity')), exportButton('CSV ↓', 'Download the matrix as CSV', save)),
      el('div', { class: 'similar-columns' }, el('div', {}, canvas, readout, colourLegend(0, 1, viridisRgb, { scale: UNIT_SCALE })), list),
    );
    draw();
    choose(atlas.place.get(similarChoice.head) ?? 0);
  });
  return box;
}
