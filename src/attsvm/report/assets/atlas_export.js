// Files made in the page, from a click: an address of the blob: scheme needs no network.
const EXPORT_STYLES = ['fill', 'fill-opacity', 'stroke', 'stroke-width', 'stroke-opacity', 'stroke-dasharray', 'opacity',
  'font-family', 'font-size', 'font-style', 'font-weight', 'text-anchor', 'visibility'];

// Run a function with an element that is laid out but not seen, in light colours whatever the theme of the page.
function onLightStage(use) {
  const stage = el('div', { class: 'hd-stage', 'aria-hidden': 'true' });
  document.body.append(stage);
  try {
    return use(stage);
  } finally {
    stage.remove();
  }
}

// A copy for papers: light colours, every style written into the elements, nothing that only the page understands.
function standaloneSvg(svg, title) {
  return onLightStage((stage) => {
    const copied = svg.cloneNode(true);
    stage.append(copied);
    const nodes = [copied, ...copied.querySelectorAll('*')];
    const styles = nodes.map((node) => {
      const style = getComputedStyle(node);
      return EXPORT_STYLES.map((name) => [name, style.getPropertyValue(name)]);
    });
    nodes.forEach((node, i) => {
      for (const [name, value] of styles[i]) node.setAttribute(name, value);
      for (const { name } of [...node.attributes]) {
        if (name === 'class' || name === 'style' || name === 'role' || name === 'tabindex' || name.startsWith('aria-') || name.startsWith('data-')) node.removeAttribute(name);
      }
    });
    const [, , width, height] = (copied.getAttribute('viewBox') ?? `0 0 ${copied.clientWidth} ${copied.clientHeight}`).split(' ');
    fill(copied, { width, height }, []);
    copied.prepend(svgEl('title', {}, title), svgEl('rect', { width: '100%', height: '100%', fill: '#fff' }));
    return new XMLSerializer().serializeToString(copied);
  });
}

const saveSvg = (svg, part, title = part) => download(fileName(part, 'svg'), 'image/svg+xml', standaloneSvg(svg, title));

// The first row is the head. A mark of UTF-8 in front, which spreadsheets need.
function saveCsv(rows, part) {
  const text = rows.map((row) => row.map(field).join(',')).join('\r\n');
  download(fileName(part, 'csv'), 'text/csv;charset=utf-8', `\ufeff${text}\r\n`);
}

function savePng(canvas, part) {
  canvas.toBlob((blob) => { if (blob) download(fileName(part, 'png'), 'image/png', blob); }, 'image/png');
}

function exportButton(label, explained, save) {
  return el('button', { type: 'button', class: 'quiet', 'aria-label': explained, title: explained, click: save }, label);
}

// The shown range of a matrix as a drawing: cells as rectangles while they are few, else as one embedded picture.
const MOST_RECTANGLES = 3000;
function matrixSvg({ grid, range, scale, marks, name }) {
  const [r0, r1, c0, c1] = [Math.floor(range.r0), Math.ceil(range.r1), Math.floor(range.c0), Math.ceil(range.c1)];
  const cell = Math.max(1, Math.min(18, 560 / Math.max(r1 - r0, c1 - c0)));
  const [left, top] = [110, cell >= LABEL_ROOM ? 100 : 48];
  const [width, height] = [left + (c1 - c0) * cell + 10, top + (r1 - r0) * cell + 10];
  const svg = svgEl('svg', { viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, class: 'hd-chart-svg' });
  const colours = weightColours(false);
  const place = (i, j) => ({ x: left + (j - c0) * cell, y: top + (i - r0) * cell, width: cell, height: cell });
  if ((r1 - r0) * (c1 - c0) <= MOST_RECTANGLES) {
    for (let i = r0; i < r1; i += 1) {
      for (let j = c0; j < c1; j += 1) svg.append(svgEl('rect', { ...place(i, j), fill: headColour(colours, scale, grid.weights[i * grid.columns.length + j]) }));
    }
  } else {
    const part = el('canvas', { width: c1 - c0, height: r1 - r0 });
    part.getContext('2d').drawImage(matrixPicture(grid, scale, colours), -c0, -r0);
    svg.append(svgEl('image', { x: left, y: top, width: (c1 - c0) * cell, height: (r1 - r0) * cell, href: part.toDataURL('image/png'), 'image-rendering': 'pixelated', preserveAspectRatio: 'none' }));
  }
  if (marks && cell >= 3.5) {
    for (let i = r0; i < r1; i += 1) {
      for (let j = c0; j < c1; j += 1) if (grid.support?.[i * grid.columns.length + j]) svg.append(svgEl('rect', { ...place(i, j), fill: 'none', stroke: '#555', 'stroke-dasharray': '2 2' }));
      if (grid.selected[i] >= c0 && grid.selected[i] < c1) svg.append(svgEl('rect', { ...place(i, grid.selected[i]), fill: 'none', stroke: '#c24a00', 'stroke-width': 1.5 }));
    }
  }
  for (const i of matrixTicks(r0, r1, cell, LABEL_ROOM)) svg.append(svgEl('text', { x: left - 6, y: place(i, c0).y + cell / 2 + 4, 'text-anchor': 'end' }, matrixLabel(grid.rows[i], cell, 16)));
  for (const j of matrixTicks(c0, c1, cell, LABEL_ROOM)) {
    const x = place(r0, j).x + cell / 2;
    const turned = cell >= LABEL_ROOM ? { x: x + 4, y: top - 6, transform: `rotate(-90 ${x + 4} ${top - 6})` } : { x, y: top - 8, 'text-anchor': 'middle' };
    svg.append(svgEl('text', turned, matrixLabel(grid.columns[j], cell, 14)));
  }
  svg.append(svgEl('rect', { x: left, y: top, width: (c1 - c0) * cell, height: (r1 - r0) * cell, fill: 'none', stroke: '#777' }), svgEl('text', { x: 4, y: 14 }, `${name}: queries down, keys across`));
  return svg;
}
function saveMatrixSvg(view, part) {
  onLightStage((stage) => {
    const svg = matrixSvg(view);
    stage.append(svg);
    saveSvg(svg, part, view.name);
  });
}

// What of a line view is in view. Its drawing becomes a PNG by way of an image.
function saveLines(view, part, kind) {
  if (kind === 'svg') { saveSvg(view.svg, part, view.name); return; }
  const text = standaloneSvg(view.svg, view.name);
  const [width, height] = [view.svg.clientWidth, view.svg.clientHeight];
  const image = new Image();
  image.addEventListener('load', () => {
    const canvas = el('canvas', { width: width * 2, height: height * 2 });
    canvas.getContext('2d').drawImage(image, 0, 0, width * 2, height * 2);
    savePng(canvas, part);
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}
