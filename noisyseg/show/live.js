/* The live page: the explorer (explorer.js) on networks that run in this browser, in workers (live_worker.js).

   `LiveHost` answers the explorer with frames of the workers; the rest is what is around it: loading, pictures of the
   visitor's own, the address, and the cell of Python that shows the same. */
import {Explorer, mount, tag} from './explorer.js'
import {read, unpacked} from './live_files.js'

const CLIP = 40                                              // own pictures that are kept, at most
const STATE = ['level', 'disturbance', 'params', 'where', 'seed', 'lock', 'sample', 'opacity', 'mask', 'hidden',
  'layer']
const $ = id => document.getElementById(id)
const short = v => String(+Number(v).toPrecision(6))
const mb = n => (n / 1e6).toFixed(1)

// ---------------------------------------------------------------- the workers

class NetworkWorker {
  constructor() {
    this.worker = new Worker(new URL('./live_worker.js', import.meta.url), {type: 'module'})
    this.waiting = new Map(); this.id = 0
    this.worker.onmessage = ({data}) => this.hear(data)
    this.worker.onerror = e => this.hear({kind: 'error', message: e.message || 'the worker could not start'})
  }
  hear(m) {
    if (m.kind === 'progress') return this.count?.(m.n)
    if (m.kind === 'ready') return this.opened?.resolve()
    const asked = this.waiting.get(m.id)
    this.waiting.delete(m.id)
    if (m.kind !== 'error') asked?.resolve(m)
    else (asked || this.opened)?.reject(Error(m.message))
  }
  open(what, count) {
    this.count = count
    return new Promise((resolve, reject) => {
      this.opened = {resolve, reject}
      this.worker.postMessage({kind: 'open', ...what})
    })
  }
  ask(kind, state) {
    return new Promise((resolve, reject) => {
      this.waiting.set(++this.id, {resolve, reject})
      this.worker.postMessage({kind, id: this.id, state})
    })
  }
}

/** All networks of the page: each in a worker of its own, as far as the processor has cores. */
class Networks {
  constructor(manifest, engine) {
    this.manifest = manifest; this.engine = engine
    const cores = navigator.hardwareConcurrency || 1, {networks, engines, pictures} = manifest
    // a graphics card does one thing after the other
    const n = engine === 'webgpu' ? 1 : Math.min(networks.length, cores)
    this.workers = Array.from({length: n}, () => new NetworkWorker())
    // threads inside a worker need a server that isolates the page; more than four gain little
    this.threads = globalThis.crossOriginIsolated ? Math.max(1, Math.min(4, Math.floor(cores / n))) : 1
    this.bytes = engines[engine].bytes + [...networks, ...pictures].reduce((n, m) => n + m.bytes, 0)
  }
  async open(progress) {                                     // gives what the page shows: pictures with their masks
    const {manifest, engine, workers, threads} = this, [height, width] = manifest.size, size = height * width
    const get = name => read(new URL(name, import.meta.url).href, count)
    let loaded = 0, told = 0
    const count = n => {
      loaded = Math.min(loaded + n, this.bytes)
      if (performance.now() - told < 50 && loaded < this.bytes) return
      told = performance.now()
      progress(loaded)
    }
    const [binary, ...pictures] = await Promise.all([get(manifest.engines[engine].binary).then(unpacked),
      ...manifest.pictures.map(p => get(p.file))])
    await Promise.all(workers.map((w, k) => {
      const mine = [...manifest.networks.keys()].filter(i => i % workers.length === k)
      return w.open({manifest, mine, engine, threads, binary, pictures}, count)
    }))
    return pictures.map((bytes, i) => ({rgb: bytes.slice(0, 3 * size),
      mask: manifest.pictures[i].truth ? bytes.slice(3 * size, 4 * size) : null}))
  }
  async ask(kind, state) {                                   // 'frame', or for tests 'logits'; in the networks' order
    const {workers, manifest} = this, n = workers.length
    const replies = await Promise.all(workers.map(w => w.ask(kind, state)))
    const all = key => manifest.networks.map((_, i) => replies[i % n][key]?.[Math.floor(i / n)])
    return {preds: all('preds'), hists: all('hists').filter(h => h), logits: all('logits'),
      took: replies.map(r => r.took)}
  }
  add(number, rgb) { this.workers.forEach(w => w.worker.postMessage({kind: 'picture', number, rgb})) }
  close() { this.workers.forEach(w => w.worker.terminate()) }
}

// ---------------------------------------------------------------- what the explorer asks

export class LiveHost {
  constructor(manifest, networks, pictures) {
    this.manifest = manifest; this.networks = networks; this.pictures = pictures; this.listeners = new Set()
    this.info = {...manifest.info, disturbances: manifest.disturbances, samples: manifest.pictures.length}
    this.state = {...manifest.state, ...this.parse()}
    this.onHash = () => this.take({...manifest.state, ...this.parse()})
    addEventListener('hashchange', this.onHash)
  }

  // ---- the address

  parse() {                                                  // what the address says, if it makes sense here
    const q = new URLSearchParams(location.hash.slice(1)), out = {}, {info, manifest} = this, n = k => Number(q.get(k))
    const kind = manifest.disturbances.find(d => d.id === q.get('noise'))
    if (kind) Object.assign(out, {disturbance: kind.id, level: kind.level,
      params: Object.fromEntries(kind.fields.map(f => [f.name, f.default]))})
    const {fields, high} = kind || manifest.disturbances.find(d => d.id === manifest.state.disturbance)
    for (const f of fields) {
      const v = q.get(f.name), number = f.type === 'float' && v !== 'inf'
      if (v === null || (f.choices && !f.choices.includes(v)) || (number && !(Number(v) > 0))) continue
      out.params = {...(out.params || manifest.state.params), [f.name]: number ? Number(v) : v}
    }
    if (q.has('level') && n('level') >= 0 && n('level') <= high) out.level = n('level')
    if (q.has('sample') && n('sample') >= 1 && n('sample') <= info.samples) out.sample = Math.round(n('sample')) - 1
    if (q.has('draw') && Number.isSafeInteger(n('draw')) && n('draw') >= 0) out.seed = n('draw')
    if (manifest.wheres[q.get('layers')]) out.where = q.get('layers')
    if (q.has('opacity')) out.opacity = Math.min(1, Math.max(0, n('opacity') || 0))
    if (q.has('mask')) out.mask = q.get('mask') !== '0'
    if (q.get('hidden')) out.hidden = q.get('hidden').split('.').map(Number).filter(c => info.classes[c] != null)
    if (info.layers.includes(q.get('layer'))) out.layer = q.get('layer')
    return out
  }
  address() {
    const s = this.state, d = this.manifest.state, q = {level: short(s.level), draw: s.seed}
    if (s.sample < this.manifest.pictures.length) q.sample = s.sample + 1
    if (s.disturbance !== d.disturbance) q.noise = s.disturbance
    for (const f of this.kind.fields) if (s.params[f.name] !== f.default) q[f.name] = s.params[f.name]
    if (s.where !== d.where) q.layers = s.where
    if (s.opacity !== d.opacity) q.opacity = short(s.opacity)
    if (!s.mask) q.mask = 0
    if (s.hidden.length) q.hidden = s.hidden.join('.')
    if (s.layer !== d.layer) q.layer = s.layer
    return `#${new URLSearchParams(q)}`
  }

  // ---- state

  get kind() { return this.manifest.disturbances.find(d => d.id === this.state.disturbance) }
  take(state) {
    const keys = STATE.filter(k => JSON.stringify(state[k]) !== JSON.stringify(this.state[k]))
    this.state = state
    if (keys.length) this.listeners.forEach(f => f(keys))
  }
  set(changes) {
    clearTimeout(this.writing)                               // browsers refuse an address that changes too often
    this.writing = setTimeout(() => history.replaceState(null, '', this.address()), 150)
    this.take({...this.state, ...changes})
  }
  onChange(f) { this.listeners.add(f); return () => this.listeners.delete(f) }
  close() { removeEventListener('hashchange', this.onHash); clearTimeout(this.writing) }

  // ---- pictures and frames

  add(rgb) {                                                 // a picture of the visitor's own
    let number = this.pictures.length
    if (number >= this.manifest.pictures.length + CLIP) number--
    this.pictures[number] = {own: true, rgb, mask: null}
    this.info.samples = this.pictures.length
    this.networks.add(number, rgb)
    return number
  }
  async frame(state) {
    const [height, width] = this.manifest.size, {rgb, mask} = this.pictures[state.sample]
    const {preds, hists} = await this.networks.ask('frame', state)
    return {width, height, image: rgb, truth: mask, preds, hists, text: this.amount(state), name: this.name(state)}
  }
  amount({disturbance, level}) {
    const kind = this.manifest.disturbances.find(d => d.id === disturbance)
    if (!level) return kind.off
    if (disturbance === 'Quantize') return `${short(level)} bits`
    return kind.share ? `${kind.unit} = ${+(100 * level).toPrecision(4)} %` : `${kind.unit} = ${+level.toPrecision(4)}`
  }
  name({disturbance, level, params}) {
    const kind = this.manifest.disturbances.find(d => d.id === disturbance)
    return `${disturbance}(${[[kind.field, short(level)], ...Object.entries(params)].map(p => p.join('=')).join(', ')})`
  }

  // ---- the same in Python

  python() {
    const {state: s, manifest: m} = this, own = this.pictures[s.sample]?.own, where = m.python.wheres[s.where]
    const value = v => v === 'inf' ? "float('inf')" : typeof v === 'string' ? `'${v}'` : String(v)
    const fields = [[this.kind.field, s.level], ...Object.entries(s.params)].map(([k, v]) => `${k}=${value(v)}`)
    const list = v => `[${v.map(o => +o.toPrecision(8)).join(', ')}]`     // enough for float32
    const law = s.disturbance === 'Quantize' ? 'quantization' : 'laws'
    return [
      'import torch',
      'from noisyseg.nets.adapter import logits_of, to_classes',
      'from noisyseg.perturb.clone import perturbed',
      'from noisyseg.perturb.counter import CounterGenerator',
      `from noisyseg.perturb.${law} import ${s.disturbance}`,
      where.imports,
      `from noisyseg.show.live_page import ${['halved', ...own ? ['picture_input'] : []].join(', ')}`,
      '', m.python.setup,
      own ? '# the button "save the picture" gives this file'
        : null,
      own ? `x = picture_input('picture.png', (${list(m.stats.mean)}, ${list(m.stats.std)}))`
        : `x = images[${s.sample}:${s.sample + 1}]`,
      `law = ${s.disturbance}(${fields.join(', ')})`,
      'masks = {}',
      'for name, model in models.items():',
      `    model = halved(model${m.networks[0].precision === 'half' ? '' : ', rounded=False'})   ` +
        '# as the page has it',
      `    with torch.no_grad(), perturbed(model, law, ${where.code}, CounterGenerator(${s.seed})):`,
      `        masks[name] = to_classes(logits_of(model, x, (${m.size.join(', ')})))[0]`,
      'masks',
    ].filter(l => l !== null).join('\n')
  }
}

// ---------------------------------------------------------------- pictures of one's own

/** A picture file as the networks take it: its middle, at their size. */
async function fitted(source, [height, width]) {
  const w = source.videoWidth || source.width, h = source.videoHeight || source.height
  const canvas = Object.assign(document.createElement('canvas'), {width, height}), context = canvas.getContext('2d',
    {willReadFrequently: true})
  const scale = Math.max(width / w, height / h), sw = width / scale, sh = height / scale
  Object.assign(context, {imageSmoothingEnabled: true, imageSmoothingQuality: 'high', fillStyle: '#fff'})
  context.fillRect(0, 0, width, height)
  context.drawImage(source, (w - sw) / 2, (h - sh) / 2, sw, sh, 0, 0, width, height)
  const {data} = context.getImageData(0, 0, width, height), rgb = new Uint8Array(3 * width * height)
  for (let i = 0, j = 0; i < data.length; i += 4) { rgb[j++] = data[i]; rgb[j++] = data[i + 1]; rgb[j++] = data[i + 2] }
  return rgb
}

function canvasOf(rgb, [height, width]) {
  const canvas = Object.assign(document.createElement('canvas'), {width, height}), context = canvas.getContext('2d'),
    pixels = context.createImageData(width, height)
  for (let i = 0, j = 0; j < rgb.length; i += 4) {
    pixels.data[i] = rgb[j++]; pixels.data[i + 1] = rgb[j++]; pixels.data[i + 2] = rgb[j++]; pixels.data[i + 3] = 255
  }
  context.putImageData(pixels, 0, 0)
  return canvas
}

// ---------------------------------------------------------------- the page

class LivePage {
  constructor(manifest) {
    this.manifest = manifest
    this.own = manifest.channels === 3 && !!manifest.stats
    const asked = new URLSearchParams(location.search).get('engine')
    this.engine = asked === 'webgpu' && manifest.engines.webgpu && navigator.gpu ? 'webgpu' : 'wasm'
  }
  say(text, kind = '') { $('status').textContent = text; $('status').className = kind }

  async start() {
    if (this.manifest.gallery) this.gallery = await mount($('explorer'), this.manifest.gallery)
    if (typeof WebAssembly !== 'object' || typeof Worker !== 'function') {
      return this.fallBack('this browser has no WebAssembly')
    }
    this.networks = new Networks(this.manifest, this.engine)
    const {bytes} = this.networks
    this.say(`Loading the networks, ${mb(bytes)} MB …`)
    try {
      this.pictures = await this.networks.open(loaded => {
        $('progress').value = loaded / bytes
        this.say(loaded < bytes ? `Loading the networks, ${mb(loaded)} of ${mb(bytes)} MB`
          : 'Starting the networks …')
      })
    } catch (e) {
      this.networks.close()
      if (this.engine === 'webgpu') { this.engine = 'wasm'; this.problem = e.message; return this.start() }
      return this.fallBack(e.message)
    }
    this.ready()
  }
  fallBack(why) {
    $('progress').hidden = true
    $('privacy').hidden = true
    document.body.dataset.engine = 'none'
    this.say(`The networks cannot run here: ${why}. ` + (this.gallery
      ? 'Below is what was computed before: some levels and draws.' : ''), 'failed')
  }
  ready() {
    this.gallery?.close()
    $('progress').hidden = true
    const root = tag('div')
    $('explorer').replaceWith(root)
    root.id = 'explorer'
    this.host = new LiveHost(this.manifest, this.networks, this.pictures)
    this.explorer = root.explorer = new Explorer(root, this.host)
    document.body.dataset.engine = this.engine
    this.say(this.problem ? `WebGPU does not work here (${this.problem}); the networks run on the processor.` : '')
    this.strip()
    this.tools()
    this.host.onChange(() => this.changed())
    this.changed()
  }

  // ---- pictures

  strip() { this.host.pictures.forEach((p, i) => this.thumbnail(i, p.rgb)) }   // the pictures to choose from
  thumbnail(number, rgb) {
    const name = this.host.pictures[number].own ? `your picture ${number + 1 - this.manifest.pictures.length}`
      : `sample ${number + 1}`
    const canvas = canvasOf(rgb, this.manifest.size), b = tag('button', {class: 'thumb', 'aria-label': name,
      title: name, 'data-number': number, onclick: () => this.host.set({sample: number})}, canvas)
    canvas.setAttribute('aria-hidden', true)                 // the button says what it is
    const old = document.querySelector(`#strip [data-number="${number}"]`)
    old ? old.replaceWith(b) : $('strip').append(b)
  }
  async take(source) {
    const rgb = await fitted(source, this.manifest.size), number = this.host.add(rgb)
    this.thumbnail(number, rgb)
    this.explorer.curves.clear()
    if (this.host.state.sample === number) this.explorer.ask()
    else this.host.set({sample: number})
    this.say('')
    this.changed()
  }
  async takeFile(file) {
    if (!file) return
    try {
      const image = await createImageBitmap(file)
      await this.take(image)
      image.close()
    } catch {
      this.say(`${file.name || 'What came'} could not be read as a picture: JPEG, PNG, WebP, GIF and AVIF can be.`, 'failed')
    }
  }
  listen() {
    const files = e => [...(e.dataTransfer || e.clipboardData)?.files || []]
    addEventListener('dragover', e => { e.preventDefault(); document.body.classList.add('over') })
    addEventListener('dragleave', e => { if (!e.relatedTarget) document.body.classList.remove('over') })
    addEventListener('drop', e => {
      e.preventDefault()
      document.body.classList.remove('over')
      if (files(e).length) this.takeFile(files(e)[0])
      else this.say('What was dropped is no file: save the picture first, and drop the file.', 'failed')
    })
    addEventListener('paste', e => { if (files(e).length) { e.preventDefault(); this.takeFile(files(e)[0]) } })
  }
  async camera() {
    const dialog = $('camera'), video = dialog.querySelector('video')
    let stream
    try { stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}}) }
    catch (e) { return this.say(`The camera cannot be used: ${e.message}.`, 'failed') }
    video.srcObject = stream
    dialog.showModal()
    dialog.onclose = async () => {
      if (dialog.returnValue === 'take' && video.videoWidth) await this.take(video)
      stream.getTracks().forEach(t => t.stop())
      video.srcObject = null
      dialog.returnValue = ''
    }
  }

  // ---- what is around the explorer

  tools() {
    const file = tag('input', {type: 'file', accept: 'image/*', hidden: true, 'aria-label': 'a picture file',
      onchange: e => { this.takeFile(e.target.files[0]); e.target.value = '' }})
    const copied = (button, text) => async () => {
      const name = button.textContent
      try { await navigator.clipboard.writeText(text()); button.textContent = 'copied' }
      catch { $('python').open = true; this.say('This browser does not let pages copy: select the text below.') }
      setTimeout(() => { button.textContent = name }, 1500)
    }
    if (this.own) {
      $('own').append(tag('button', {onclick: () => file.click()}, 'your picture …'), file)
      if (navigator.mediaDevices?.getUserMedia) $('own').append(tag('button', {onclick: () => this.camera()}, 'camera'))
      $('own').append(tag('span', {class: 'soft'}, 'or drop one here, or paste one'))
      this.listen()
    }
    const python = tag('button', {title: 'the cell of Python that shows the same'}, 'copy as Python')
    python.addEventListener('click', copied(python, () => this.host.python()))
    const link = tag('button', {title: 'the address of this page, as it is now'}, 'copy link')
    link.addEventListener('click', copied(link, () => new URL(this.host.address(), location.href).href))
    const save = tag('button', {title: 'the picture as the networks see it, as a PNG', onclick: () => this.save()},
      'save the picture')
    $('tools').append(python, link, save)
    if (this.manifest.engines.webgpu) this.engines()
    $('python').hidden = false
  }
  async engines() {                                          // another engine is another page: it is loaded anew
    const card = await navigator.gpu?.requestAdapter()
    if (!card || card.info?.isFallbackAdapter) return        // what imitates one is slower than the processor
    const choose = tag('select', {'aria-label': 'what computes', onchange: () => {
      const q = new URLSearchParams(location.search)
      choose.value === 'webgpu' ? q.set('engine', 'webgpu') : q.delete('engine')
      location.assign(`${location.pathname}${q.size ? `?${q}` : ''}${this.host.address()}`)
    }}, tag('option', {value: 'wasm'}, 'processor'), tag('option', {value: 'webgpu'},
      `graphics card (loads ${mb(this.manifest.engines.webgpu.bytes)} MB)`))
    choose.value = this.engine
    $('tools').append(tag('label', {class: 'soft'}, 'computed by ', choose))
  }
  save() {
    const {sample} = this.host.state
    canvasOf(this.host.pictures[sample].rgb, this.manifest.size).toBlob(blob => {
      const a = tag('a', {href: URL.createObjectURL(blob), download: 'picture.png'})
      a.click()
      setTimeout(() => URL.revokeObjectURL(a.href), 10_000)
    })
  }
  changed() {
    const {sample} = this.host.state
    for (const b of $('strip').children) b.setAttribute('aria-pressed', +b.dataset.number === sample)
    $('cell').textContent = this.host.python()
    $('explorer').classList.toggle('own', !!this.host.pictures[sample]?.own)
  }
}

async function start() {
  let manifest
  try {
    const r = await fetch(new URL('./manifest.json', import.meta.url))
    if (!r.ok) throw Error(`manifest.json could not be read (${r.status})`)
    manifest = await r.json()
  } catch (e) {
    $('progress').hidden = true
    $('status').textContent = `This page could not start: ${e.message}`
    return
  }
  const page = window.live = new LivePage(manifest)
  try { await page.start() } catch (e) { page.fallBack(e.message) }
}
start()
