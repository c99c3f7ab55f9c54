/* The front end of noisyseg's explorer: one ES module, no build step.

   It shows the same dashboard in two places, and differs only in its *host*, which answers with predictions:
   - in Jupyter, `render` (called by anywidget) makes a KernelHost: each frame is asked of noisyseg/show/explorer.py;
   - on a web page, `mount` makes a StaticHost: frames were computed before, and are read from files or from the page.

   A host has   info          what there is: classes, palette, models, disturbances, … (see `NoiseExplorer.info`)
                state         level, disturbance, params, where, seed, lock, sample, corruption, severity, opacity,
                mask, hidden, layer, protected, rescued, stability
                costs(state)  where there is a kernel: a promise of {group of layers: share of pixels that change}
                set(changes)  change the state; `onChange` is called when it changed, from here or from elsewhere
                frame(state, shrink)  a promise of {image, truth, preds: [{classes, confidence, reference}], hists,
                text, name, shrink}; where shrink > 1 it may be a preview
   From a frame on all is done here: blending, errors, IoU, curves. */

// Okabe and Ito's, safe for colour-blind eyes
const MODEL_COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']
const css = `
.nse { --ink: var(--jp-ui-font-color1, var(--bs-body-color, CanvasText));
  --line: color-mix(in srgb, var(--ink) 22%, transparent);
  --soft: color-mix(in srgb, var(--ink) 62%, transparent); --tint: color-mix(in srgb, var(--ink) 7%, transparent);
    --accent: #0072B2;
  color: var(--ink); font: 13px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; max-width: 1200px;
    margin: 0 auto;
  padding: 6px 2px; box-sizing: border-box; outline: none; text-align: left }
.nse.dark { --accent: #56B4E9 } .nse.dark figcaption .name { filter: brightness(1.35) }
.nse *, .nse *::before { box-sizing: border-box }
.nse button, .nse select, .nse input { font: inherit; color: inherit }
.nse button, .nse select, .nse input[type=number], .nse input[type=text] { background: transparent;
  border: 1px solid var(--line); border-radius: 6px;
  padding: 2px 8px; height: 27px; margin: 0 }
.nse button { cursor: pointer } .nse button:hover { background: var(--tint) }
.nse button[aria-pressed=true] { background: var(--tint); border-color: var(--soft) }
.nse :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
.nse:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px }
.nse input[type=range] { accent-color: var(--accent); margin: 0; vertical-align: middle }
.nse .level { display: flex; align-items: center; gap: 10px; margin: 2px 0 8px;
  flex-wrap: wrap } .nse .level input[type=range] { width: 100%; height: 26px; cursor: grab }
.nse .track { position: relative; flex: 1 1 200px; height: 26px } .nse .track > i { position: absolute; top: 17px;
  width: 0; height: 0; margin-left: -6px; border: 6px solid transparent; border-top-width: 0; cursor: help }
.nse .layers { display: grid; grid-template-columns: max-content minmax(90px, 1fr) max-content; gap: 2px 10px;
  align-items: center; max-width: 640px; margin-bottom: 8px } .nse .layers label { display: inline-flex; gap: 6px;
  align-items: center; cursor: pointer; overflow-wrap: anywhere } 
.nse .layers input { accent-color: var(--accent); margin: 0 }
.nse .layers .share { color: var(--soft); font-variant-numeric: tabular-nums; text-align: right }
.nse .layers.old .bars { opacity: .4 }
.nse .level b { font-size: 15px } .nse .level input[type=number] { width: 96px; font-size: 15px;
  font-variant-numeric: tabular-nums }
.nse .level .unit { min-width: 96px; font-weight: 600 }
.nse .bar { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 8px }
.nse .bar label, .nse .group { display: inline-flex; align-items: center; gap: 5px; color: var(--soft);
  white-space: nowrap }
.nse .bar input[type=number], .nse .bar input[type=text] { width: 66px;
  color: var(--ink) } .nse .bar select { color: var(--ink); padding-right: 2px }
.nse select option { background: Canvas; color: CanvasText }
.nse [hidden] { display: none !important } .nse .level .unit, .nse .severity { white-space: nowrap;
  font-variant-numeric: tabular-nums }
.nse input:disabled { opacity: .4; cursor: default }
.nse .panels { display: grid; gap: 10px 8px; margin-bottom: 8px } .nse figure { margin: 0; min-width: 0 }
.nse figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 0 8px;
  padding: 0 1px 3px; min-height: 21px }
.nse .panels figure { display: flex; flex-direction: column; justify-content: flex-end }
.nse figcaption .name { font-weight: 600; overflow-wrap: anywhere } .nse figcaption .note { color: var(--soft);
  font-variant-numeric: tabular-nums }
.nse canvas { display: block; width: 100%; border-radius: 6px; cursor: crosshair; touch-action: none;
  background: var(--tint) }
.nse .under { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 14px }
.nse h4 { margin: 0 0 2px; font-size: 13px; font-weight: 600; color: var(--ink) } .nse svg { display: block;
  width: 100%; overflow: visible }
.nse svg text { fill: var(--soft); font-size: 11px } .nse svg .grid { stroke: var(--line);
  stroke-width: 1 } .nse svg.curve { cursor: pointer }
.nse .classes { display: grid; grid-template-columns: minmax(86px, max-content) minmax(60px, 1fr) 42px; gap: 3px 8px;
  align-items: center }
.nse .chip { display: flex; align-items: center; gap: 6px; border: none; padding: 0 5px; height: 22px;
  overflow: hidden }
.nse .chip i { width: 12px; height: 12px; border-radius: 3px; flex: none; border: 1px solid var(--line) }
.nse .chip[aria-pressed=false] { opacity: .38; text-decoration: line-through; background: none }
.nse .only { border: none; padding: 0 4px; height: 20px; color: var(--soft); opacity: .85;
  font-size: 12px } .nse .only:hover, .nse .only:focus-visible { opacity: 1 }
.nse .bars { display: grid; gap: 2px } .nse .bars span { display: block; height: 7px; background: var(--tint);
  border-radius: 3px; overflow: hidden }
.nse .bars.absent span { display: none } .nse .bars.absent::before { content: 'not in this picture';
  color: var(--soft); font-size: 12px; opacity: .8 }
.nse .bars span > i { display: block; height: 100%; width: 0; border-radius: 3px }
.nse .legend { color: var(--soft); margin: -2px 0 6px } .nse .legend i { display: inline-block; width: 11px;
  height: 11px; border-radius: 3px; vertical-align: -1px; margin-right: 4px; background: #262626;
  border: 1px solid var(--line) }
.nse .hover, .nse .error { min-height: 20px; color: var(--soft); font-variant-numeric: tabular-nums }
.nse .error { display: none; white-space: pre-wrap; color: var(--ink); border-left: 3px solid #D55E00;
  background: color-mix(in srgb, #D55E00 12%, transparent);
  padding: 6px 10px; margin-bottom: 8px; border-radius: 0 6px 6px 0 }
.nse.failed .error { display: block } .nse.failed .panels, .nse.failed .under { opacity: .4 }
.nse .about { color: var(--soft); max-width: 80ch;
  margin: 0 0 6px } .nse .keys { color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 8px 0 }
.nse kbd { border: 1px solid var(--line); border-radius: 4px;
  padding: 0 4px; font: 12px ui-monospace, monospace }
.nse .said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.nse { container-type: inline-size; position: relative }
@container (max-width: 640px) {
  .nse .panels { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
  .nse .panels figure { order: var(--narrow) } .nse .under { grid-template-columns: minmax(0, 1fr) }
  .nse .level { gap: 6px } .nse .level input[type=number] { width: 68px } .nse .level .unit { min-width: 0; flex: 1 }
  .nse .track { flex-basis: 100%; order: 1 } }`

// ---------------------------------------------------------------- small helpers

/** An HTML element; attributes that begin with on are listeners. */
export function tag(name, attributes = {}, ...children) {
  const e = document.createElement(name)
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v)
    else if (v === true) e.setAttribute(k, '')
    else if (v !== false && v != null) e.setAttribute(k, v)
  }
  e.append(...children.filter(c => c != null))
  return e
}
function svg(name, attributes = {}, text) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v)
  if (text != null) e.textContent = text
  return e
}
const clamp = (v, low, high) => Math.min(high, Math.max(low, v))
const short = v => String(+Number(v).toPrecision(3))        // 0.150 -> 0.15
/** Where a level stands on a slider from 0 to 1, and the way back. Where levels span orders of magnitude the slider is
    logarithmic from the mildest one on, and its first twentieth is the way there from nothing. */
const FIRST = .05
const place = (kind, v) => !kind.log ? v / kind.top : v <= kind.mildest ? FIRST * v / kind.mildest
  : FIRST + (1 - FIRST) * Math.log(v / kind.mildest) / Math.log(kind.top / kind.mildest)
const levelAt = (kind, x) => !kind.log || x >= 1 ? x * kind.top : x < FIRST / 2 ? 0 : +(kind.mildest *
  (kind.top / kind.mildest) ** Math.max(0, (x - FIRST) / (1 - FIRST))).toPrecision(3)
const percent = v => Number.isNaN(v) ? '–' : (100 * v).toFixed(1)
const words = name => name.replaceAll('_', ' ')
const corrupted = s => s.corruption ? `${words(s.corruption)}, severity ${s.severity}` : ''
const css_rgb = c => `rgb(${c.join(',')})`

/** IoU of each class that the truth of this one picture has, and their mean. A class that is not in the truth has
    no IoU: it would be 0 from the first wrong pixel on, and drag the mean down as far as a class that is lost.
    Pixels labelled `ignore` do not count. */
export function scores(truth, pred, n, ignore) {
  const both = new Uint32Array(n), either = new Uint32Array(n), there = new Uint8Array(n)
  for (let i = 0; i < truth.length; i++) {
    const t = truth[i], p = pred[i]
    if (t === ignore || t >= n) continue
    there[t] = 1
    if (t === p) { both[t]++; either[t]++ } else { either[t]++; if (p < n) either[p]++ }
  }
  const iou = [...both].map((b, c) => there[c] ? b / either[c] : NaN), found = iou.filter(v => !Number.isNaN(v))
  return {iou, miou: found.length ? found.reduce((a, b) => a + b) / found.length : NaN}
}

/** RGBA pixels of a mask over its picture. Only classes in `shown` are painted. */
function blend(image, classes, palette, shown, opacity, out) {
  for (let i = 0, j = 0, k = 0; i < classes.length; i++, j += 3, k += 4) {
    const c = classes[i], a = shown[c] ? opacity : 0, p = palette[c] || [128, 128, 128]
    out[k] = image[j] + a * (p[0] - image[j]); out[k + 1] = image[j + 1] + a * (p[1] - image[j + 1])
    out[k + 2] = image[j + 2] + a * (p[2] - image[j + 2]); out[k + 3] = 255
  }
}

/** RGBA pixels of a map: the picture grey and dark; where draws of the noise disagree, orange, the brighter the fewer
    agree. */
function unstable(image, agree, out) {
  let all = 0
  for (let i = 0, j = 0, k = 0; i < agree.length; i++, j += 3, k += 4) {
    const grey = .35 * (.3 * image[j] + .6 * image[j + 1] + .1 * image[j + 2])
    const d = Math.min(1, 1.6 * (1 - agree[i] / 255))
    if (agree[i] === 255) all++
    const a = d ? .3 + .7 * d : 0
    out[k] = grey + a * (255 - grey); out[k + 1] = grey + a * (120 + 120 * d - grey)
    out[k + 2] = grey + a * (160 * d * d - grey); out[k + 3] = 255
  }
  return all / agree.length
}

/** RGBA pixels of what is wrong: the picture grey and dark, wrong pixels in the colour of the class they were taken
    for; colours that would drown in the dark are made lighter. */
function errors(image, truth, classes, palette, shown, ignore, out) {
  let wrong = 0, counted = 0
  palette = palette.map(c => c[0] + c[1] + c[2] < 240 ? c.map(v => 110 + v / 2) : c)
  for (let i = 0, j = 0, k = 0; i < classes.length; i++, j += 3, k += 4) {
    const grey = .28 * (.3 * image[j] + .6 * image[j + 1] + .1 * image[j + 2]), t = truth[i], c = classes[i]
    const bad = t !== ignore && t !== c, p = bad && (shown[c] || shown[t]) ? palette[c] || [128, 128, 128]
      : [grey, grey, grey]
    counted += t !== ignore; wrong += bad
    out[k] = p[0]; out[k + 1] = p[1]; out[k + 2] = p[2]; out[k + 3] = 255
  }
  return counted ? wrong / counted : NaN
}

// ---------------------------------------------------------------- one picture, with the zoom that all share

class Panel {
  constructor(name, view, colour) {
    this.view = view
    // the picture at its own size; drawn enlarged on this.canvas
    this.buffer = document.createElement('canvas')
    this.canvas = tag('canvas', {role: 'img', 'aria-label': name})
    this.note = tag('span', {class: 'note'})
    this.figure = tag('figure', {}, tag('figcaption', {}, tag('span', {class: 'name', style: colour
      ? `color:${colour}` : ''}, name), this.note), this.canvas)
  }
  rename(name) {
    this.figure.querySelector('.name').textContent = name
    this.canvas.setAttribute('aria-label', name)
  }
  resize(w, h) {
    if (this.buffer.width === w && this.buffer.height === h && this.pixels) return
    Object.assign(this.buffer, {width: w, height: h})
    this.pixels = this.buffer.getContext('2d').createImageData(w, h)
    this.canvas.style.aspectRatio = `${w} / ${h}`
  }
  paint() {                                                  // the pixels changed
    this.buffer.getContext('2d').putImageData(this.pixels, 0, 0)
    this.draw()
  }
  draw() {                                                   // the zoom or the size changed
    const w = Math.max(1, Math.round(this.canvas.clientWidth * devicePixelRatio)),
      h = Math.round(w * this.buffer.height / this.buffer.width)
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, {width: w, height: h})
    const context = this.canvas.getContext('2d'), scale = w / this.buffer.width * this.view.zoom
    context.imageSmoothingEnabled = false
    context.clearRect(0, 0, w, h)
    context.setTransform(scale, 0, 0, scale, -this.view.x * scale, -this.view.y * scale)
    context.drawImage(this.buffer, 0, 0)
    const m = this.view.mark
    if (m) { context.lineWidth = 1.2 * devicePixelRatio / scale; context.strokeStyle = '#fff';
      context.strokeRect(m.x, m.y, 1, 1) }
    context.setTransform(1, 0, 0, 1, 0, 0)
  }
  at(event) {                                                // the pixel of the picture under the pointer
    const r = this.canvas.getBoundingClientRect(), s = this.buffer.width / r.width / this.view.zoom
    return {x: Math.floor(this.view.x + (event.clientX - r.left) * s),
      y: Math.floor(this.view.y + (event.clientY - r.top) * s)}
  }
}

// ---------------------------------------------------------------- figures in SVG

function axes(target, w, h, left, bottom, xs, ys, xlabel, x, y, factor) {
  for (const v of ys) {
    target.append(svg('line', {class: 'grid', x1: left, x2: w, y1: y(v), y2: y(v)}),
      svg('text', {x: left - 6, y: y(v) + 4, 'text-anchor': 'end'}, short(v * 100)))
  }
  for (const [v, text] of xs) target.append(svg('text', {x: x(v), y: h - bottom + 15, 'text-anchor': 'middle'},
    text ?? short(v * factor)))
  target.append(svg('text', {x: (left + w) / 2, y: h - 1, 'text-anchor': 'middle'}, xlabel))
}

/** mIoU of each model against the level, as far as levels were visited, and a cursor at the present one. Where
    level 0 is not beside the mildest level (0 bits: not quantized) it is a line to compare with, and not a point of
    the curve. */
class Curve {
  constructor(names, pick) {
    this.names = names
    this.el = svg('svg', {class: 'curve', role: 'img',
      'aria-label': 'mIoU against noise level; click to set the level'})
    this.el.addEventListener('click', e => {
      const r = this.el.getBoundingClientRect(), left = 34
      pick(levelAt(this.kind, clamp(((e.clientX - r.left) - left) / (r.width - left - 8), 0, 1)))
    })
  }
  draw(points, level, kind) {                                // points: Map level -> [mIoU of each model]
    const w = Math.max(220, this.el.clientWidth || 420), h = 176, left = 34, bottom = 32, {top} = kind
    const x = v => left + (w - left - 8) * place(kind, v), y = v => 6 + (h - bottom - 6) * (1 - v)
    this.kind = kind
    this.el.setAttribute('viewBox', `0 0 ${w} ${h}`)
    this.el.style.height = `${h}px`
    this.el.replaceChildren()
    const ticks = kind.log ? kind.ticks : [0, .25, .5, .75, 1].map(f => [f * top])
    axes(this.el, w, h, left, bottom, ticks, [0, .25, .5, .75, 1],
      kind.axis + (kind.apart ? ` (dashed: ${kind.off})` : ''), x, y, kind.share ? 100 : 1)
    this.el.append(svg('line', {x1: x(level), x2: x(level), y1: 4, y2: h - bottom, stroke: 'currentColor',
      'stroke-opacity': .55, 'stroke-dasharray': '3 3'}))
    const visited = [...points].sort((a, b) => a[0] - b[0])
    this.names.forEach((name, i) => {
      const colour = MODEL_COLOURS[i % MODEL_COLOURS.length], at = visited.filter(([, m]) => !Number.isNaN(m[i]))
      const clean = kind.apart && at[0]?.[0] === 0 ? at[0][1][i] : null, line = clean === null ? at : at.slice(1)
      if (clean !== null) this.el.append(svg('line', {x1: left, x2: w - 8, y1: y(clean), y2: y(clean), stroke: colour,
        'stroke-width': 1.2, 'stroke-dasharray': '5 4', 'stroke-opacity': .8}))
      this.el.append(svg('polyline', {points: line.map(([v, m]) => `${x(v)},${y(m[i])}`).join(' '), fill: 'none',
        stroke: colour, 'stroke-width': 2, 'stroke-linejoin': 'round'}))
      const now = at.find(([v]) => v === level)
      if (now) this.el.append(svg('circle', {cx: x(level), cy: y(now[1][i]), r: 4.5, fill: colour,
        stroke: 'var(--jp-layout-color0, Canvas)', 'stroke-width': 1.5}))
    })
  }
}

/** The weights of a layer before (grey) and after (line), one small histogram for each model. */
function drawHistograms(target, hists) {
  target.replaceChildren()
  const n = hists.length, w = Math.max(220, target.clientWidth || 420), h = 104, gap = 14,
    each = (w - gap * (n - 1)) / n, bottom = 18
  target.setAttribute('viewBox', `0 0 ${w} ${h}`)
  target.style.height = `${h}px`
  hists.forEach(({edge, before, after}, i) => {
    const x0 = i * (each + gap), top = Math.sqrt(Math.max(1, ...before, ...after)), step = each / before.length
    const y = v => (h - bottom) * (1 - .94 * Math.sqrt(v) / top)     // root scale: tails matter here
    const outline = counts => counts.map((c, k) => `${x0 + k * step},${y(c)} ${x0 + (k + 1) * step},${y(c)}`).join(' ')
    target.append(svg('polygon', {points: `${x0},${h - bottom} ${outline(before)} ${x0 + each},${h - bottom}`,
      fill: 'currentColor', 'fill-opacity': .2}))
    target.append(svg('polyline', {points: outline(after), fill: 'none',
      stroke: MODEL_COLOURS[i % MODEL_COLOURS.length], 'stroke-width': 1.6}))
    for (const [f, anchor] of [[-1, 'start'], [0, 'middle'], [1, 'end']]) {
      target.append(svg('text', {x: x0 + each * (f + 1) / 2, y: h - 3, 'text-anchor': anchor}, short(f * edge)))
    }
  })
}

// ---------------------------------------------------------------- the dashboard

const SLOW = 200, RESTED = 250                               // ms: what a hand notices, and when it rests

export class Explorer {
  constructor(el, host) {
    this.el = el; this.host = host
    this.curves = new Map(); this.frame = null; this.busy = false; this.waiting = false; this.closed = false
    this.view = {zoom: 1, x: 0, y: 0, mark: null}
    this.shrink = 1; this.slow = 0; this.moved = -Infinity   // of previews; slow frames in a row; the last move
    this.build()
    this.unlisten = host.onChange(keys => this.changed(keys))
    this.resizer = new ResizeObserver(() => this.redraw())
    this.resizer.observe(el)
    this.themes = new MutationObserver(() => this.theme())
    this.themes.observe(document.body, {attributes: true, attributeFilter: ['class', 'data-jp-theme-light']})
    this.scheme = matchMedia('(prefers-color-scheme: dark)')
    this.onScheme = () => this.theme()
    this.scheme.addEventListener('change', this.onScheme)
    this.theme()
    this.sync()
    this.ask()
  }

  get draws() { return this.kind.random !== false }            // is there anything to draw anew in the noise?
  get kind() { return this.host.info.disturbances.find(d => d.id === this.host.state.disturbance) ||
    this.host.info.disturbances[0] }
  set(changes) { this.host.set(changes) }

  close() {
    this.closed = true
    clearTimeout(this.idle)
    clearTimeout(this.saying)
    this.scheme.removeEventListener('change', this.onScheme)
    this.unlisten(); this.resizer.disconnect(); this.themes.disconnect(); this.host.close?.()
    this.el.replaceChildren()
  }

  theme() {                                                  // native controls follow the page, light or dark
    this.el.style.colorScheme = ''                           // what it was set to would colour the ink
    const ink = getComputedStyle(this.el).color.match(/[\d.]+/g)?.map(Number) || [0, 0, 0]
    const dark = ink[0] + ink[1] + ink[2] > (ink.some((v, i) => i < 3 && v > 1) ? 384 : 1.5)
    this.el.style.colorScheme = dark ? 'dark' : 'light'
    this.el.classList.toggle('dark', dark)
  }

  // ---- building

  build() {
    const {info} = this.host, {models, classes, palette} = info
    this.el.tabIndex = 0
    this.el.classList.add('nse')
    this.el.setAttribute('data-lm-suppress-shortcuts', 'true')   // or JupyterLab takes M and R for itself
    this.el.setAttribute('role', 'group')
    this.el.setAttribute('aria-label', 'noise explorer')
    this.el.addEventListener('keydown', e => this.key(e))
    this.slider = tag('input', {type: 'range', 'aria-label': 'noise level',
      title: 'How much of it: drag, or use the arrow keys.', oninput: e => {
        this.moved = performance.now()
        this.setLevel(this.kind.log ? levelAt(this.kind, +e.target.value) : +e.target.value)
      }})
    this.number = tag('input', {type: 'number', 'aria-label': 'noise level, as a number',
      title: 'The same as a number.', min: 0, onchange: e => this.setLevel(+e.target.value)})
    this.levelName = tag('b')
    this.unit = tag('span', {class: 'unit'})
    this.error = tag('div', {class: 'error', role: 'alert'})
    this.panels = {image: new Panel('image', this.view)}
    const truth = new Panel('truth', this.view)
    this.panels.truth = truth
    const masks = models.map((m, i) => new Panel(m, this.view, MODEL_COLOURS[i % MODEL_COLOURS.length]))
    const wrongs = models.map((m, i) => new Panel('wrong', this.view, MODEL_COLOURS[i % MODEL_COLOURS.length]))
    Object.assign(this.panels, {masks, wrongs})
    this.all = [this.panels.image, ...masks, truth, ...wrongs]
    // where there is room for two columns only: image and truth, then each model with what is wrong in it
    const narrow = [this.panels.image, truth, ...masks.flatMap((m, i) => [m, wrongs[i]])]
    narrow.forEach((p, i) => p.figure.style.setProperty('--narrow', i))
    const grid = tag('div',
      {class: 'panels', style: `grid-template-columns: repeat(${models.length + 1}, minmax(0, 1fr))`},
      ...this.all.map(p => p.figure))
    this.all.forEach(p => this.listen(p))
    this.hover = tag('div', {class: 'hover', 'aria-live': 'off'})
    this.said = tag('div', {class: 'said', role: 'status'})      // read aloud once the hand rests
    this.legend = tag('div', {class: 'legend'})
    this.curve = new Curve(models, v => this.setLevel(this.kind.step ? Math.round(v / this.kind.step) * this.kind.step
      : v))
    this.curveTitle = tag('h4',
      {title: 'mean intersection over union, over the classes in the truth of this picture'})
    this.histogram = svg('svg', {role: 'img', 'aria-label': 'weights of a layer before and after'})
    this.layer = tag('select', {'aria-label': 'layer of the histogram',
      onchange: e => this.set({layer: e.target.value})},
      ...info.layers.map(l => tag('option', {value: l}, l)))
    this.rows = classes.map((name, c) => {
      const chip = tag('button', {class: 'chip', title: 'Show or hide this class in the masks.',
        onclick: () => this.toggleClass(c)},
        tag('i', {style: `background:${css_rgb(palette[c])}`}), name)
      const only = tag('button', {class: 'only', 'aria-label': `show only ${name}`,
        title: 'Show this class alone; press again for all.', onclick: () => this.solo(c)},
        'only')
      const bars = models.map((m, i) => tag('i', {style: `background:${MODEL_COLOURS[i % MODEL_COLOURS.length]}`}))
      return {chip, only, bars, 
        box: tag('div', {class: 'bars', role: 'img', 'aria-label': 'not measured yet'}, ...bars.map(b => tag('span', {}, b)))}
    })
    const under = tag('div', {class: 'under'},
      tag('div', {}, this.curveTitle, this.curve.el),
      tag('div', {}, tag('h4', {}, 'IoU by class'), tag('div', {class: 'classes'},
        ...this.rows.flatMap(r => [r.chip, r.box, r.only]))))
    this.track = tag('span', {class: 'track'}, this.slider)
    this.el.replaceChildren(tag('style', {}, css), tag('div', {class: 'level'}, this.levelName, this.track,
      this.number, this.unit, this.draw = this.drawControl()), this.first(), this.error,
      grid, this.legend, this.hover, this.said, under)
  }

  drawControl() {
    return tag('span', {class: 'group'}, tag('button', {'aria-label': 'a new draw (R)',
      title: 'Draw the noise anew: another device of the same kind (key R).', onclick: () => this.reroll()},
      'new draw'))
  }
  first() {                                                  // what one needs at first, and the rest under "more"
    const {info} = this.host, button = (text, label, title, f) => tag('button',
      {'aria-label': label, title, onclick: f}, text)
    this.sample = tag('span',
      {style: 'min-width:52px;text-align:center;font-variant-numeric:tabular-nums;color:var(--ink)'})
    const sample = tag('span', {class: 'group'}, 'sample',
      button('‹', 'previous sample ([)', 'The picture before (key [).', () => this.step(-1)),
      this.sample, button('›', 'next sample (])', 'The next picture (key ]).', () => this.step(1)))
    const rest = this.rest = tag('div', {hidden: true}, this.controls(), this.mending(),
      info.layers.length ? tag('h4', {}, 'weights of ', this.layer, ', before (grey) and with the noise') : null,
        this.histogram, this.keys())
    const more = tag('button', {class: 'more', 'aria-expanded': 'false',
      title: 'Other kinds of noise, which layers, the seed of the draw, and saving.', onclick: () => {
      rest.hidden = !rest.hidden
      more.setAttribute('aria-expanded', !rest.hidden)
      more.textContent = rest.hidden ? 'more ▾' : 'less ▴'
      this.redraw()
      if (!this.busy) this.fill()                            // the bars of the layers
    }}, 'more ▾')
    return tag('div', {}, tag('div', {class: 'bar'}, sample, more), rest)
  }
  mending() {                                                // what can be done about it: protect layers, rescue
    const {info} = this.host, groups = info.groups || []
    this.groups = groups.map(g => {
      const box = tag('input', {type: 'checkbox', 'aria-label': `keep ${g.name} exact`,
        onchange: () => this.protect(g.name)})
      const bars = info.models.map((m, i) => tag('i', {style: `background:${MODEL_COLOURS[i % MODEL_COLOURS.length]}`}))
      const label = tag('label', {title: 'Keep these layers exact, and the noise of the others as it is.'}, box, g.name)
      const bar = tag('div', {class: 'bars', role: 'img', 'aria-label': 'not measured yet'}, ...bars.map(b => tag('span', {}, b)))
      return {name: g.name, box, bars, label, bar,
        share: tag('span', {class: 'share'}, `${short(100 * g.share)} %`)}
    })
    this.stability = tag('button', {'aria-label': 'where draws disagree (S)',
      title: 'Draw eight times, and show where the draws disagree (key S).',
      onclick: () => this.set({stability: !this.host.state.stability})}, 'stability')
    this.layers = tag('div', {class: 'layers old'}, ...this.groups.flatMap(g => [g.label, g.bar, g.share]))
    this.rescue = tag('button', {'aria-label': 'rescued',
      title: 'Give each channel the mean and spread that it has without noise, found on eight pictures without labels.',
      onclick: () => this.set({rescued: !this.host.state.rescued})}, 'rescued')
    return tag('div', {hidden: !groups.length}, tag('h4', {}, 'what helps'), tag('p', {class: 'about'},
      'Tick layers to keep them exact, and watch the masks. ',
      tag('b', {}, 'Bars'), ': the share of this picture that changes when only these layers are noisy. ',
      tag('b', {}, 'Right'), ': their share of the weights.'), this.layers, tag('div', {class: 'bar'}, this.rescue,
      this.stability))
  }
  protect(name) {
    const {protected: now} = this.host.state
    this.set({protected: now.includes(name) ? now.filter(n => n !== name) : [...now, name]})
  }
  keys() {
    const known = [['← →', 'level'], ['[ ]', 'sample'], ['M', 'mask on, off'], ['R', 'new draw'],
      ...(this.groups.length ? [['S', 'stability']] : []),
      ...(this.host.info.corruptions?.length ? [['C', 'next corruption'], ['1 … 5', 'its severity']] : [])]
    return tag('div', {class: 'keys'}, ...known.map(([k, what]) => tag('span', {}, tag('kbd', {}, k), ` ${what}`)),
      tag('span', {}, 'wheel: zoom'), tag('span', {}, 'drag: pan'), tag('span', {}, 'double click: whole picture'))
  }

  controls() {
    const {info} = this.host, button = (text, label, title, f) => tag('button',
      {'aria-label': label, title, onclick: f}, text)
    const label = (text, title, ...rest) => tag('label', {title}, text, ...rest)
    this.kindSelect = tag('select', {'aria-label': 'what disturbs the network',
      onchange: e => this.setKind(e.target.value)}, ...info.disturbances.map(d => tag('option', {value: d.id}, d.id)))
    this.about = tag('p', {class: 'about'})
    this.params = tag('span', {class: 'group'})
    this.where = tag('select', {'aria-label': 'which layers are disturbed',
      onchange: e => this.set({where: e.target.value})}, ...info.wheres.map(w => tag('option', {value: w}, w)))
    this.whereLabel = label('layers', 'Which weights of the network are disturbed.', this.where)
    this.seed = tag('input', {type: 'number', min: 0, step: 1, 'aria-label': 'seed of the draw',
      onchange: e => this.set({seed: Math.max(0, Math.round(+e.target.value))})})
    this.lock = tag('button', {'aria-label': 'keep the draw while the level moves',
      title: 'Keep the draw while the level moves; else each level is a new draw.',
      onclick: () => this.set({lock: !this.host.state.lock})}, 'keep draw')
    this.seedGroup = tag('span',
      {class: 'group', title: 'The number that fixes the draw: the same number is the same noise.'}, 'seed',
      this.seed, this.lock)
    this.opacity = tag('input', {type: 'range', min: 0, max: 1, step: .05, 'aria-label': 'opacity of the masks',
      title: 'How much the masks cover the picture.', style: 'width:84px',
      oninput: e => this.set({opacity: +e.target.value})})
    this.mask = tag('button', {'aria-label': 'masks on or off (M)', title: 'Show or hide the masks (key M).',
      onclick: () => this.set({mask: !this.host.state.mask})}, 'mask')
    const offered = info.corruptions || [], families = [...new Set(offered.map(c => c.family))]
    this.corruption = tag('select', {'aria-label': 'corruption of the picture',
      title: 'What camera or weather do to the picture (key C: the next).',
      onchange: e => this.set({corruption: e.target.value || null})},
      tag('option', {value: ''}, 'none'), ...families.map(f => tag('optgroup', {label: f},
        ...offered.filter(c => c.family === f).map(c => tag('option', {value: c.name}, words(c.name))))))
    this.severity = tag('input', {type: 'range', min: 1, max: 5, step: 1, 'aria-label': 'severity of the corruption',
      title: 'How strong it is (keys 1 to 5).', style: 'width:64px',
      oninput: e => this.set({severity: +e.target.value})})
    this.severityText = tag('span', {class: 'severity', style: 'min-width:1ch'})
    return tag('div', {}, tag('div', {class: 'bar'},
      info.fixed ? null : label('noise', 'What disturbs the network: each kind of noise that is known.',
        this.kindSelect), info.fixed ? null : this.params, info.fixed ? null : this.whereLabel,
      info.fixed ? null : this.seedGroup, ...(offered.length ? [label('picture',
        'A corruption of the picture itself.', this.corruption), label('severity', 'How strong it is, from 1 to 5.',
        this.severity, this.severityText)] : []),
      tag('span', {class: 'group'}, this.mask, this.opacity), tag('span', {class: 'group'},
        button('PNG', 'save the panels as a PNG', 'Save the panels as a picture.', () => this.savePNG()),
        this.host.html ? button('HTML', 'save all of it as one HTML file',
          'Save this sample at all levels as one page.', () => this.saveHTML()) : null)), this.about)
  }

  // a control for each parameter of the disturbance, made from what Python says of it
  fields() {
    const {kind} = this, known = this.host.state.params
    if (this.fieldsOf !== kind.id) {
      this.fieldsOf = kind.id
      this.fieldControls = kind.fields.map(f => {
        const set = v => this.set({params: {...this.host.state.params, [f.name]: v}}), label = `${f.name} of the noise`
        const e = f.choices ? tag('select', {'aria-label': label, onchange: e => set(e.target.value)},
          ...f.choices.map(c => tag('option', {value: c}, c)))
          : tag('input', {type: 'text', inputmode: f.type === 'float' ? 'decimal' : 'text', 'aria-label': label,
            onchange: e => set(f.type === 'float' && e.target.value.trim() !== '' && !Number.isNaN(+e.target.value)
            ? +e.target.value : e.target.value.trim())})
        return [f, e]
      })
      this.params.replaceChildren(...this.fieldControls.map(([f, e]) => tag('label', {title: f.doc || ''}, f.name, e)))
    }
    for (const [f, e] of this.fieldControls) if (e !== e.getRootNode().activeElement ||
      e.tagName === 'SELECT') e.value = known[f.name] ?? f.default
  }

  // zoom with the wheel, pan by dragging: the same part of every picture
  listen(panel) {
    const c = panel.canvas, v = this.view
    c.addEventListener('wheel', e => {
      e.preventDefault()
      const r = c.getBoundingClientRect(), fx = (e.clientX - r.left) / r.width, fy = (e.clientY - r.top) / r.height,
        old = v.zoom, {width: w, height: h} = panel.buffer
      v.zoom = clamp(v.zoom * Math.exp(-.0016 * e.deltaY), 1, 24)
      v.x += fx * w * (1 / old - 1 / v.zoom); v.y += fy * h * (1 / old - 1 / v.zoom)
      this.pan(panel, 0, 0)
    }, {passive: false})
    c.addEventListener('pointerdown', e => { this.drag = {x: e.clientX, y: e.clientY};
      c.setPointerCapture(e.pointerId) })
    c.addEventListener('pointerup', () => { this.drag = null })
    c.addEventListener('pointercancel', () => { this.drag = null })
    c.addEventListener('pointermove', e => {
      if (this.drag && this.view.zoom > 1) {
        const s = panel.buffer.width / c.clientWidth / v.zoom
        this.pan(panel, (this.drag.x - e.clientX) * s, (this.drag.y - e.clientY) * s)
        this.drag = {x: e.clientX, y: e.clientY}
      }
      this.tell(panel.at(e))
    })
    c.addEventListener('pointerleave', () => this.tell(null))
    c.addEventListener('dblclick', () => { Object.assign(v, {zoom: 1, x: 0, y: 0}); this.redraw() })
  }
  pan(panel, dx, dy) {
    const v = this.view, {width: w, height: h} = panel.buffer
    v.x = clamp(v.x + dx, 0, w - w / v.zoom); v.y = clamp(v.y + dy, 0, h - h / v.zoom)
    this.all.forEach(p => p.draw())
  }
  tell(at) {                                                 // class and confidence under the pointer, in every panel
    const f = this.frame, {info} = this.host
    this.view.mark = f && at && at.x >= 0 && at.y >= 0 && at.x < f.width && at.y < f.height ? at : null
    this.all.forEach(p => p.draw())
    if (!this.view.mark) { this.hover.textContent = ''; return }
    const i = at.y * f.width + at.x, name = c => c === info.ignore ? 'not counted' : info.classes[c] ?? c
    this.hover.textContent = [`row ${at.y}, column ${at.x}`, ...(f.truth ? [`truth: ${name(f.truth[i])}`] : []),
      ...f.preds.map((p, m) =>
        `${info.models[m]}: ${name(p.classes[i])}, ${info.fixed ? '≈ ' : ''}` +
          `${Math.round(p.confidence[i] / 2.55)} % ${f.state.stability ? 'of draws agree' : 'sure'}`)].join('  ·  ')
  }

  // ---- what the controls and keys do

  setLevel(v) {
    const {fixed} = this.host.info
    v = clamp(Number.isFinite(v) ? v : 0, 0, fixed ? this.kind.top : Infinity)
    if (fixed) v = fixed.levels.reduce((a, b) => Math.abs(b - v) < Math.abs(a - v) ? b : a)
    else v = +v.toFixed(6)
    if (v === this.host.state.level) return this.sync()
    this.set(this.host.state.lock || fixed || !this.draws ? {level: v} : {level: v, seed: this.host.state.seed + 1})
  }
  setKind(id) {
    const kind = this.host.info.disturbances.find(d => d.id === id)
    this.set({disturbance: id, params: Object.fromEntries(kind.fields.map(f => [f.name, f.default])),
      level: kind.level})
  }
  step(by) { const n = this.host.info.samples; this.set({sample: (this.host.state.sample + by + n) % n}) }
  corrupt(by) {                                              // the next one of the menu, which begins with none
    const all = [null, ...(this.host.info.corruptions || []).map(c => c.name)],
      at = all.indexOf(this.host.state.corruption ?? null)
    this.set({corruption: all[(at + by + all.length) % all.length]})
  }
  reroll() {
    if (this.draw.hidden) return
    const draws = this.host.info.fixed?.seeds, {seed} = this.host.state
    this.set({seed: draws ? draws[(draws.indexOf(seed) + 1) % draws.length] : seed + 1})
  }
  toggleClass(c) {
    const {hidden} = this.host.state
    this.set({hidden: hidden.includes(c) ? hidden.filter(h => h !== c) : [...hidden, c].sort((a, b) => a - b)})
  }
  solo(c) {                                                  // a second time: all of them again
    const rest = this.host.info.classes.map((_, i) => i).filter(i => i !== c), {hidden} = this.host.state
    this.set({hidden: hidden.length === rest.length && !hidden.includes(c) ? [] : rest})
  }
  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return
    const typing = e.target.matches('input[type=number], input[type=text], select'), slider = e.target === this.slider
    // JupyterLab keeps Enter from doing so
    if (typing && e.key === 'Enter') { e.preventDefault(); e.target.dispatchEvent(new Event('change')) }
    const step = (by) => this.setLevel(this.neighbour(by * (e.shiftKey ? 5 : 1)))
    const keys = {ArrowRight: () => step(1), ArrowUp: () => step(1), ArrowLeft: () => step(-1),
      ArrowDown: () => step(-1),
      '[': () => this.step(-1), ']': () => this.step(1), m: () => this.set({mask: !this.host.state.mask}),
        r: () => this.reroll(),
      ...(this.groups.length ? {s: () => this.set({stability: !this.host.state.stability})} : {}),
      ...(this.host.info.corruptions?.length ? {c: () => this.corrupt(e.shiftKey ? -1 : 1)} : {}),
      ...(this.host.state.corruption && !this.host.info.fixed ? Object.fromEntries([1, 2, 3, 4,
        5].map(v => [v, () => this.set({severity: v})])) : {})}
    const f = keys[e.key] || keys[e.key.toLowerCase()]
    if (!f || typing || (e.target.type === 'range' && !slider && e.key.startsWith('Arrow'))) return
    e.preventDefault(); e.stopPropagation()
    f()
  }
  neighbour(by) {
    const {levels} = this.host.info.fixed || {}, {level} = this.host.state
    return levels ? levels[clamp(levels.indexOf(level) + by, 0, levels.length - 1)]
      : this.kind.log ? levelAt(this.kind, clamp(place(this.kind, level) + by / 60, 0, 1))
        : clamp(level + by * (this.kind.step || this.kind.top / 60), 0, this.kind.top)
  }

  // ---- state in, pictures out

  changed(keys) {
    if (this.closed) return
    this.sync()
    const asked = ['level', 'disturbance', 'params', 'where', 'seed', 'sample', 'corruption', 'severity',
      'layer', 'protected', 'rescued', 'stability'].some(k => keys.includes(k))
    if (asked) this.ask()
    else this.show()
  }

  sync() {                                                   // controls show the state
    const {state: s, info} = this.host, {kind} = this
    this.levelName.textContent = kind.label
    this.levelName.title = kind.doc
    this.about.textContent = kind.doc
    Object.assign(this.slider, kind.log ? {min: 0, max: 1, step: .005} : {min: 0, max: Math.max(kind.top, s.level),
      step: info.fixed ? kind.top / 240 : kind.step || kind.top / 300})
    this.slider.value = kind.log ? place(kind, s.level) : s.level
    this.number.value = short(s.level)
    this.number.step = short(kind.step || kind.top / 60)
    this.slider.setAttribute('aria-valuetext', this.frame?.text || `${kind.field} = ${short(s.level)}`)
    // a seed that nothing depends on is not shown
    this.draw.hidden = this.seedGroup.hidden = !this.draws && !s.corruption; this.lock.hidden = !this.draws
    this.whereLabel.hidden = !kind.where
    this.corruption.value = s.corruption || ''; this.severity.value = s.severity ?? 3;
      this.severityText.textContent = s.severity ?? 3
    this.severity.disabled = !s.corruption
    this.panels.image.note.textContent = [corrupted(s), info.channels > 3 ? `channels 1 to 3 of ${info.channels}`
      : ''].filter(t => t).join(' · ')
    this.kindSelect.value = kind.id; this.where.value = s.where; this.seed.value = s.seed; this.layer.value = s.layer
    this.lock.setAttribute('aria-pressed', s.lock); this.mask.setAttribute('aria-pressed', s.mask);
      this.opacity.value = s.opacity
    this.sample.textContent = `${s.sample + 1} of ${info.samples}`
    this.stability.setAttribute('aria-pressed', !!s.stability)
    this.stability.disabled = !this.draws
    this.rescue.setAttribute('aria-pressed', !!s.rescued)
    this.groups.forEach(g => { g.box.checked = (s.protected || []).includes(g.name) })
    this.layers.classList.toggle('old', this.costsOf !== this.costs_key(s))
    this.sync_marks()
    if (!info.fixed) this.fields()
    this.rows.forEach((r, c) => r.chip.setAttribute('aria-pressed', !s.hidden.includes(c)))
  }

  sync_marks() {                                             // how much each model stands, on the slider's track
    const {info} = this.host, {kind} = this, top = kind.log ? kind.top : +this.slider.max
    this.track.querySelectorAll('i').forEach(e => e.remove())
    for (const t of info.tolerances || []) {
      if (t.disturbance !== kind.id || t.level > top) continue
      const colour = MODEL_COLOURS[t.model % MODEL_COLOURS.length]
      this.track.append(tag('i', {role: 'img', title: t.text, 'aria-label': t.text,
        style: `left: calc(8px + (100% - 16px) * ${place({...kind, top}, t.level)}); border-bottom-color: ${colour}`}))
    }
  }

  // latest wins: one request at a time, and after it the then newest state
  async ask() {
    clearTimeout(this.idle)
    if (this.busy) { this.waiting = true; return }
    this.busy = true
    do {
      this.waiting = false
      const state = {...this.host.state}, begun = performance.now()
      const shrink = begun - this.moved < RESTED ? this.shrink : 1
      try {
        const frame = await this.host.frame(state, shrink)
        if (this.closed) return
        this.pace(performance.now() - begun, frame, shrink)
        this.el.classList.remove('failed')
        this.frame = {...frame, state}
        this.remember(this.frame)
        this.show()
      } catch (e) {
        if (this.closed) return
        this.fail(e)
      }
    } while (this.waiting)
    this.busy = false
    const preview = this.frame?.shrink > 1 && !this.el.classList.contains('failed')
    this.idle = preview ? setTimeout(() => this.ask(), RESTED) : setTimeout(() => this.fill(), 500)
  }
  // while the slider moves, a picture that takes long, twice in a row, is seen at half of its size, or at a quarter
  pace(took, {shrink = 1, width, height}, asked) {
    const next = 2 * asked, possible = next <= 4 && Math.min(width, height) >= 64 * next
    this.slow = took > SLOW ? this.slow + 1 : 0
    if (shrink < asked || asked === 1 && took < SLOW / 2) this.shrink = 1   // one size only, or fast enough without
    else if (this.slow > 1 && possible && next > this.shrink) { this.shrink = next; this.slow = 0 }
  }

  fail(e) {                                                  // said where it is seen; what was shown before stays, pale
    this.error.textContent = e.message
    this.el.classList.add('failed')
  }

  key_of(s) { return JSON.stringify([s.disturbance, s.params, s.where, s.seed, s.sample, corrupted(s),
    s.protected, s.rescued, s.stability]) }
  points(s) {
    const k = this.key_of(s)
    if (!this.curves.has(k)) this.curves.set(k, new Map())
    if (this.curves.size > 200) this.curves.delete(this.curves.keys().next().value)
    return this.curves.get(k)
  }
  remember(f) {
    const n = this.host.info.classes.length
    f.scores = f.preds.map(p => scores(p.reference || f.truth, p.classes, n, this.host.info.ignore))
    if (!(f.shrink > 1)) this.points(f.state).set(f.state.level, f.scores.map(s => s.miou))
  }
  // while nobody touches anything: the rest of the curve, level by level
  async fill() {
    const s = {...this.host.state}, {top, step} = this.kind, points = this.points(s), n = step
      ? Math.floor(top / step) : 12
    const grid = this.host.info.fixed?.levels || Array.from({length: n + 1},
      (_, i) => this.kind.log ? levelAt(this.kind, i / n) : +(i * (step || top / 12)).toFixed(6))
    const missing = grid.filter(v => !points.has(v))
    if (this.busy || this.closed || document.hidden || this.el.classList.contains('failed')) return
    if (this.groups.length && !this.rest.hidden && this.costsOf !== this.costs_key(s)) return this.fill_costs(s)
    if (!missing.length || s.stability) return               // eight draws a level are too dear to run ahead
    this.busy = true
    try { this.remember({...await this.host.frame({...s, level: missing[0], layer: ''}),
      state: {...s, level: missing[0]}}) } catch { this.busy = false; return }
    this.busy = false
    if (this.closed) return
    if (this.waiting) return this.ask()
    this.drawCurve()
    this.idle = setTimeout(() => this.fill(), this.host.info.fixed ? 0 : 60)
  }

  costs_key(s) { return JSON.stringify([s.disturbance, s.params, s.where, s.seed, s.sample, s.level, corrupted(s)]) }
  async fill_costs(s) {                                      // the bars of the layers, once nobody drags
    this.busy = true
    try {
      const costs = await this.host.costs(s)
      if (this.closed) return
      this.costsOf = this.costs_key(s)
      const top = Math.max(1e-9, ...Object.values(costs).flat())
      for (const g of this.groups) {
        g.bars.forEach((b, m) => { b.style.width = `${100 * costs[g.name][m] / top}%` })
        const text = this.host.info.models.map((m, i) => `${m} ${percent(costs[g.name][i])} %`).join(', ')
        g.bar.setAttribute('aria-label', text)
        g.bar.title = text
      }
      this.layers.dataset.done = this.costsOf
      this.layers.classList.toggle('old', this.costsOf !== this.costs_key(this.host.state))
    } catch (e) { if (!this.closed) this.fail(e) }
    this.busy = false
    if (this.waiting) return this.ask()
    this.idle = setTimeout(() => this.fill(), 60)
  }

  label(truth, stable) {          // what is compared with: masks made by hand, or clean ones; or draws with one another
    const [below, text, rest] = stable ? ['draws disagree',
      ': orange, the brighter the fewer of eight draws agree; the masks show the class of most draws', null]
      : truth ? ['wrong', ': pixels in the colour of the class they were taken for; ', 'right']
        : ['changed', ': pixels that are another class than without noise, in the colour of that class; ', 'unchanged']
    this.labelled = truth + 2 * stable
    this.panels.truth.rename(truth ? 'truth' : 'clean prediction')
    this.panels.wrongs.forEach(p => p.rename(below))
    this.legend.replaceChildren(tag('b', {}, below), text, ...(rest ? [tag('i'), rest] : []))
    this.curveTitle.textContent = truth ? 'mIoU (%) of this picture, over its classes'
      : 'agreement with the clean prediction, mIoU (%)'
  }

  show() {                                                   // the frame, as the state wants it seen
    const f = this.frame
    if (!f) return
    const {state: s, info} = this.host, {width: w, height: h} = f, n = info.classes.length
    const shown = Array.from({length: 256}, (_, c) => c < n && !s.hidden.includes(c)), opacity = s.mask ? s.opacity
      : 0, none = new Uint8Array(w * h).fill(255)
    this.all.forEach(p => p.resize(w, h))
    blend(f.image, none, info.palette, shown, 0, this.panels.image.pixels.data)
    blend(f.image, f.truth || f.preds[0].reference, info.palette, shown, opacity, this.panels.truth.pixels.data)
    const preview = f.shrink > 1 ? 'preview: ' : ''
    const stable = !!f.state.stability && this.draws && this.groups.length > 0
    if (this.labelled !== !!f.truth + 2 * stable) this.label(!!f.truth, stable)
    f.preds.forEach((p, i) => {
      blend(f.image, p.classes, info.palette, shown, opacity, this.panels.masks[i].pixels.data)
      const below = this.panels.wrongs[i].pixels.data
      const wrong = stable ? 1 - unstable(f.image, p.confidence, below)
        : errors(f.image, p.reference || f.truth, p.classes, info.palette, shown, info.ignore, below)
      this.panels.masks[i].note.textContent = `${preview}mIoU ${percent(f.scores[i].miou)}`
      this.panels.wrongs[i].note.textContent = `${preview}${percent(wrong)} % of pixels`
    })
    this.all.forEach(p => p.paint())
    this.rows.forEach((r, c) => {
      const v = f.scores.map(o => o.iou[c])
      r.bars.forEach((b, i) => { b.style.width = Number.isNaN(v[i]) ? 0 : `${100 * v[i]}%` })
      r.box.setAttribute('aria-label', v.every(Number.isNaN) ? 'not in this picture'
        : info.models.map((m, i) => `${m} ${percent(v[i])} %`).join(', '))
      r.box.title = r.box.getAttribute('aria-label')
      r.box.classList.toggle('absent', v.every(Number.isNaN))
    })
    this.drawCurve()
    this.unit.textContent = f.text || ''
    this.slider.setAttribute('aria-valuetext', f.text || short(s.level))
    clearTimeout(this.saying)
    this.saying = setTimeout(() => { this.said.textContent = [f.text, ...info.models.map((m, i) =>
      `${m}: mIoU ${percent(f.scores[i].miou)} %`)].filter(t => t).join(', ') }, 900)
    drawHistograms(this.histogram, f.hists || [])
    // what is seen, for tests and screen readers
    this.el.dataset.level = f.state.level; this.el.dataset.sample = f.state.sample; this.el.dataset.seed = f.state.seed
    this.el.dataset.corruption = corrupted(f.state)
    this.el.dataset.mended = [...(f.state.protected || []), ...(f.state.rescued ? ['rescued'] : [])].join(' ')
    this.el.dataset.stability = stable
    this.el.dataset.shrink = f.shrink || 1
    this.el.dataset.miou = f.scores.map(o => o.miou.toFixed(4)).join(' ')
  }
  drawCurve() { if (this.frame) this.curve.draw(this.points(this.frame.state), this.frame.state.level, this.kind) }
  redraw() {
    if (!this.frame) return
    this.all.forEach(p => p.draw())
    this.drawCurve()
    drawHistograms(this.histogram, this.frame.hists || [])
  }

  // ---- export

  caption() {
    const s = this.frame.state
    const picture = [s.corruption ? `, ${corrupted(s)}` : '',
      s.protected?.length ? `, ${s.protected.join(' and ')} protected` : '', s.rescued ? ', rescued' : ''].join('')
    return `${this.frame.name} on ${s.where}, seed ${s.seed}, sample ${s.sample + 1}${picture}`
  }
  png() {                                                    // a canvas with the panels and the parameters
    const columns = this.host.info.models.length + 1, side = 320, {width, height} = this.frame,
      h = Math.round(side * height / width), gap = 10, head = 24
    const c = Object.assign(document.createElement('canvas'), {width: columns * (side + gap) + gap,
      height: 2 * (h + head) + gap + 34}), x = c.getContext('2d')
    x.fillStyle = '#fff'; x.fillRect(0, 0, c.width, c.height)
    x.imageSmoothingEnabled = false
    this.all.forEach((p, i) => {
      const left = gap + (i % columns) * (side + gap), top = Math.floor(i / columns) * (h + head)
      const {zoom, x: vx, y: vy} = this.view, [name, note] = [p.figure.querySelector('.name').textContent,
        p.note.textContent]
      x.fillStyle = '#222'; x.font = '600 13px system-ui, sans-serif'; x.fillText(name, left, top + 17)
      x.font = '13px system-ui, sans-serif'; x.textAlign = 'right'; x.fillText(note, left + side, top + 17);
        x.textAlign = 'left'
      x.drawImage(p.buffer, vx, vy, width / zoom, height / zoom, left, top + head, side, h)
    })
    x.fillStyle = '#555'; x.font = '13px system-ui, sans-serif'; x.fillText(this.caption(), gap, c.height - 12)
    return c
  }
  savePNG() { if (this.frame) this.png().toBlob(blob => download(blob, 'noisyseg.png')) }
  async saveHTML() {
    try { download(new Blob([await this.host.html()], {type: 'text/html'}), 'noisyseg.html') }
    catch (e) { this.fail(e) }
  }
}

function download(blob, name) {
  const a = tag('a', {href: URL.createObjectURL(blob), download: name})
  a.click()
  setTimeout(() => URL.revokeObjectURL(a.href), 10_000)
}

// ---------------------------------------------------------------- the two hosts

const STATE = ['level', 'disturbance', 'params', 'where', 'seed', 'lock', 'sample', 'corruption', 'severity',
  'opacity', 'mask', 'hidden', 'layer', 'protected', 'rescued', 'stability']

/** Frames from Python, over the widget's messages. */
class KernelHost {
  constructor(model) {
    this.model = model; this.info = model.get('info'); this.replies = new Map(); this.id = 0
    this.image = {}                                          // the picture that we have: its pixels travel once
    this.onMessage = (m, buffers) => { const r = this.replies.get(m.id); this.replies.delete(m.id); r?.(m, buffers) }
    model.on('msg:custom', this.onMessage)
  }
  get state() { return Object.fromEntries(STATE.map(k => [k, this.model.get(k)])) }
  set(changes) { this.model.set(changes); this.model.save_changes() }
  onChange(f) {                                              // several keys that are set together are one change
    let changed = []
    const listeners = STATE.map(k => [`change:${k}`, () => {
      if (!changed.length) queueMicrotask(() => { const keys = changed; changed = []; f(keys) })
      changed.push(k)
    }])
    listeners.forEach(([event, l]) => this.model.on(event, l))
    return () => listeners.forEach(([event, l]) => this.model.off(event, l))
  }
  close() { this.model.off('msg:custom', this.onMessage); this.replies.clear() }
  ask(content) {
    const id = `${Date.now()}-${++this.id}`
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => { this.replies.delete(id);
        reject(Error('The kernel has not answered for 60 seconds. Is it busy, or gone? Run the cell again.')) }, 60_000)
      this.replies.set(id, (m, buffers) => { clearTimeout(timer); m.error ? reject(Error(m.error))
        : resolve([m, buffers]) })
      this.model.send({...content, id})
    })
  }
  async frame(state, shrink = 1) {
    const [m, buffers] = await this.ask({kind: 'frame', state, shrink, have: this.image.key ?? null})
    const bytes = b => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength), {width, height} = m,
      size = width * height, rest = buffers.map(bytes)
    if (m.image) {
      this.image = {key: m.picture, image: rest.shift()}
      this.image.truth = m.truth ? rest.shift() : null
    }
    const preds = rest.map(b => ({classes: b.subarray(0, size), confidence: b.subarray(size, 2 * size),
      reference: b.length > 2 * size ? b.subarray(2 * size) : null}))
    return {width, height, image: this.image.image, truth: this.image.truth, preds, hists: m.hists, text: m.text,
      name: m.name, shrink: m.shrink}
  }
  async html() { return (await this.ask({kind: 'html'}))[0].html }
  async costs(state) { return (await this.ask({kind: 'costs', state}))[0].costs }
}

/** Frames that were computed before; the state lives in the page's address. */
class StaticHost {
  constructor(info, read, address = true) {
    this.info = info; this.read = read; this.files = new Map(); this.address = address; this.listeners = new Set()
    this.state = {...info.state, ...(address ? this.parse() : {})}
    this.onHash = () => {
      const s = {...info.state, ...this.parse()},
        keys = STATE.filter(k => JSON.stringify(s[k]) !== JSON.stringify(this.state[k]))
      if (keys.length) { this.state = s; this.listeners.forEach(f => f(keys)) }
    }
    if (address) addEventListener('hashchange', this.onHash)
  }
  parse() {                                                  // what the address says, if it makes sense here
    const q = new URLSearchParams(location.hash.slice(1)), out = {}, {fixed, samples, classes, layers} = this.info,
      n = k => Number(q.get(k))
    if (q.has('level')) out.level = fixed.levels.reduce((a, b) => Math.abs(b - n('level')) < Math.abs(a - n('level'))
      ? b : a)
    if (q.has('sample') && n('sample') >= 1 && n('sample') <= samples) out.sample = Math.round(n('sample')) - 1
    if (q.has('draw') && fixed.seeds.includes(n('draw'))) out.seed = n('draw')
    if (q.has('opacity')) out.opacity = clamp(n('opacity') || 0, 0, 1)
    if (q.has('mask')) out.mask = q.get('mask') !== '0'
    if (q.get('hidden')) out.hidden = q.get('hidden').split('.').map(Number).filter(c => classes[c] != null)
    if (layers.includes(q.get('layer'))) out.layer = q.get('layer')
    return out
  }
  set(changes) {
    const keys = Object.keys(changes).filter(k => JSON.stringify(changes[k]) !== JSON.stringify(this.state[k]))
    this.state = {...this.state, ...changes}
    if (this.address) {
      clearTimeout(this.writing)                             // browsers refuse an address that changes too often
      this.writing = setTimeout(() => {
        const s = this.state, q = {level: short(s.level), sample: s.sample + 1, draw: s.seed}, d = this.info.state
        if (s.opacity !== d.opacity) q.opacity = short(s.opacity)
        if (!s.mask) q.mask = 0
        if (s.hidden.length) q.hidden = s.hidden.join('.')
        if (s.layer !== d.layer) q.layer = s.layer
        // of the page: another one was not computed
        if (s.corruption) Object.assign(q, {corruption: s.corruption, severity: s.severity})
        history.replaceState(null, '', `#${new URLSearchParams(q)}`)
      }, 150)
    }
    if (keys.length) this.listeners.forEach(f => f(keys))
  }
  onChange(f) { this.listeners.add(f); return () => this.listeners.delete(f) }
  close() { removeEventListener('hashchange', this.onHash); clearTimeout(this.writing) }

  /** A sample's file, unpacked: the picture (rgb), the truth, and for level 0, then for each draw and each further
    level, a byte for
      each model's pixel: the class in the low five bits, the confidence in the high three. Levels are stored as what
      changed (xor). Under a corruption each draw begins anew with picture, truth and level 0, and without a truth with
      what models said of the clean picture. */
  load(sample) {
    if (!this.files.has(sample)) this.files.set(sample, this.unpack(sample).catch(e => { this.files.delete(sample);
      throw e }))
    return this.files.get(sample)
  }
  async unpack(sample) {
    const {width: w, height: h, models, truth: known, state: {corruption}, fixed: {levels, seeds}} = this.info,
      size = w * h, step = models.length * size
    const stream = new Blob([await this.read(sample)]).stream().pipeThrough(new DecompressionStream('gzip'))
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer()), draws = new Map()
    let at = 0, picture
    const take = n => bytes.subarray(at, at += n)
    for (const seed of seeds) {
      if (!picture || corruption) {
        picture = {image: take(3 * size), truth: take(size), clean: take(step)}
        picture.reference = known ? null : (corruption ? take(step) : picture.clean).map(v => v & 31)
      }
      const frames = new Map([[levels[0], picture.clean]])
      let last = picture.clean
      for (const level of levels.slice(1)) {
        const now = take(step)
        for (let i = 0; i < step; i++) now[i] ^= last[i]
        frames.set(level, last = now)
      }
      draws.set(seed, {...picture, frames})
    }
    return draws
  }
  async frame(state) {
    const {width, height, models, fixed} = this.info, size = width * height,
      {image, truth, reference, frames} = (await this.load(state.sample)).get(state.seed)
    const packed = frames.get(state.level), part = (bytes, m) => bytes.subarray(m * size, (m + 1) * size)
    const preds = models.map((_, m) => ({classes: part(packed, m).map(v => v & 31),
      confidence: part(packed, m).map(v => ((v >> 5) + .5) * 255 / 8),
      reference: reference && part(reference, m)}))
    const at = fixed.levels.indexOf(state.level), hists = fixed.hists?.[state.layer]?.[`${state.seed} ${at}`]
    return {width, height, image, truth: this.info.truth ? truth : null, preds, text: fixed.texts[at],
      name: fixed.names[at], hists: hists?.map((after, m) => ({...fixed.before[state.layer][m], after}))}
  }
}

/** On a web page: an explorer in `el`, from the files under `src`, or from an object {manifest, files} with base64
    text. */
export async function mount(el, src) {
  const inside = typeof src !== 'string'
  const get = async name => {
    const r = await fetch(new URL(name, new URL(src, location.href)))
    if (!r.ok) throw Error(`${name} could not be read (${r.status}).`)
    return r
  }
  try {
    const manifest = inside ? src.manifest : await (await get('manifest.json')).json()
    const read = inside ? async i => Uint8Array.from(atob(src.files[i]), c => c.charCodeAt(0))
      : async i => (await get(manifest.files[i])).arrayBuffer()
    el.explorer = new Explorer(el, new StaticHost(manifest, read))
  } catch (e) { el.textContent = `The explorer could not start: ${e.message}` }
  return el.explorer
}
export const mountAll = () => document.querySelectorAll('.noisyseg-explorer[data-src]').forEach(el =>
  { if (!el.explorer) mount(el, el.dataset.src) })

/** In Jupyter: anywidget calls this for each view. */
function render({model, el}) {
  const root = tag('div')
  el.append(root)
  const explorer = new Explorer(root, new KernelHost(model))
  root.explorer = explorer
  model.on('change:closed', () => explorer.close())
  return () => explorer.close()
}
export default {render}
