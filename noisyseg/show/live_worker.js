/* Where the live page computes: a module worker that holds the networks, draws noise into their weights and runs them
   with onnxruntime-web. The page (live.js) stays free for the hand on the slider.

   It is told    open     {engine, state}: load everything; answers with progress, and then ready
                 picture  {number, rgb}: a picture to add, uint8 (height, width, 3)
                 frame    {id, state}: run the networks; answers with frame or error of the same id */
import {LAWS, counterNormals, drawn} from './noise.js'

const BINS = 48                                              // of the weights' histogram, as in noisyseg.show.predictor
let manifest, ort, networks, pictures

const url = name => new URL(name, import.meta.url).href
const size = () => manifest.size[0] * manifest.size[1]

// ---------------------------------------------------------------- loading, with progress

async function read(name, count) {                           // a file's bytes; count(n) hears of each piece
  const r = await fetch(url(name))
  if (!r.ok) throw Error(`${name} could not be read (${r.status})`)
  const reader = r.body.getReader(), pieces = []
  let n = 0
  for (;;) {
    const {done, value} = await reader.read()
    if (done) break
    pieces.push(value); n += value.length; count(value.length)
  }
  const bytes = new Uint8Array(n)
  let at = 0
  for (const p of pieces) { bytes.set(p, at); at += p.length }
  return bytes
}

async function unpacked(bytes) {                             // of gzip, unless the server has unpacked it already
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

function halves(bytes) {                                     // float16 to float32
  const from = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2), to = new Float32Array(from.length)
  for (let i = 0; i < from.length; i++) {
    const h = from[i], e = (h >> 10) & 31, m = h & 1023, sign = h & 32768 ? -1 : 1
    to[i] = sign * (e ? 2 ** (e - 15) * (1 + m / 1024) : m * 2 ** -24)
  }
  return to
}

async function loadEngine(kind, count) {
  const engine = manifest.engines[kind]
  ort = await import(url(engine.module))
  ort.env.logLevel = 'error'
  // one thread: more need a server that isolates the page
  Object.assign(ort.env.wasm, {numThreads: 1, wasmBinary: (await unpacked(await read(engine.binary, count))).buffer})
  return kind === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm']
}

async function loadNetwork(facts, providers, count) {
  const [graph, bytes] = await Promise.all([read(facts.graph, count), read(facts.weights, count)])
  const all = facts.precision === 'half' ? halves(bytes) : new Float32Array(bytes.buffer)
  let at = 0
  const weights = facts.inputs.map(({name, shape, stream, std}, i) => {
    const n = shape.reduce((a, b) => a * b, 1), clean = all.subarray(at, at += n)
    return {input: `w${i}`, name, shape, stream, std, clean, noisy: new Float32Array(n), z: null, seed: null}
  })
  const session = await ort.InferenceSession.create(graph, {executionProviders: providers,
    logSeverityLevel: 3})                                    // errors
  return {...facts, weights, session, references: new Map()}
}

async function open({engine, state}) {
  manifest = JSON.parse(new TextDecoder().decode(await read('manifest.json', () => {})))
  const total = manifest.engines[engine].bytes + [...manifest.networks, ...manifest.pictures].reduce((n, m) => n + m.bytes, 0)
  let loaded = 0, told = 0
  const count = n => {
    loaded += n
    if (performance.now() - told < 50 && loaded < total) return
    told = performance.now()
    postMessage({kind: 'progress', loaded: Math.min(loaded, total), total})
  }
  const providers = await loadEngine(engine, count)
  networks = []
  pictures = []
  for (const facts of manifest.networks) networks.push(await loadNetwork(facts, providers, count))
  const shown = await Promise.all(manifest.pictures.map((facts, i) => loadPicture(facts, i, count)))
  await check(engine)
  postMessage({kind: 'ready', engine, pictures: shown})
}

/** Does this browser compute what PyTorch computed? A few hundred logits under noise, for each network. */
async function check(engine) {
  const {state, logits, tolerance} = manifest.check
  for (const [i, network] of networks.entries()) {
    const got = (await run(network, i, state)).data, {values, step, top} = logits[i]
    const worst = values.reduce((a, v, k) => Math.max(a, Math.abs(v - got[k * step])), 0)
    if (!(worst <= tolerance * top)) {
      throw Error(`${network.name}: the logits differ from PyTorch's by up to ${worst.toPrecision(2)} (${engine}), so ` +
        'nothing is shown')
    }
  }
}

// ---------------------------------------------------------------- pictures

function normalised(rgb) {                                   // uint8 (height, width, 3) as the networks take it
  const n = size(), x = new Float32Array(3 * n), {mean, std} = manifest.stats
  for (let c = 0; c < 3; c++) {
    const m = Math.fround(mean[c]), s = Math.fround(std[c])
    for (let i = 0; i < n; i++) x[c * n + i] = Math.fround(Math.fround(rgb[3 * i + c] / 255) - m) / s
  }
  return x
}

async function loadPicture(facts, number, count) {           // gives what the page shows: the picture and its mask
  const bytes = await read(facts.file, count), n = size(), rgb = bytes.slice(0, 3 * n)
  pictures[number] = facts.exact ? normalised(rgb)
    : new Float32Array(bytes.slice(4 * n, 4 * n + 4 * manifest.channels * n).buffer)
  return {rgb, mask: facts.truth ? bytes.slice(3 * n, 4 * n) : null}
}

// ---------------------------------------------------------------- a frame

async function run(network, i, state) {                      // the logits of one network under one state
  const picked = new Set(manifest.wheres[state.where]?.[i])
  const {field, low, high} = manifest.disturbances.find(d => d.id === state.disturbance) || {}
  if (!picked.size) throw Error(`there are no layers ${state.where}`)
  if (!LAWS[state.disturbance] || !field) throw Error(`no disturbance is called ${state.disturbance}`)
  if (!(state.level >= low && state.level <= high)) {
    throw Error(`${state.disturbance}: ${field} is a number from ${low} to ${high}, got ${state.level}`)
  }
  if (!Number.isSafeInteger(state.seed) || state.seed < 0) throw Error(`seed: a whole number, got ${state.seed}`)
  const {alpha} = state.params
  if (alpha !== undefined && alpha !== 'inf' && !(alpha > 0)) {
    throw Error(`${state.disturbance}: alpha is a number above 0, or inf, got ${alpha}`)
  }
  const feeds = {picture: new ort.Tensor('float32', pictures[state.sample],
    [1, manifest.channels, ...manifest.size])}
  network.weights.forEach((w, k) => {
    let values = w.clean
    if (picked.has(k) && state.level > 0) {
      if (drawn(state.disturbance) && w.seed !== state.seed) {
        w.z = counterNormals(state.seed, w.stream, w.clean.length)
        w.seed = state.seed
      }
      LAWS[state.disturbance](w.clean, w.z, w.noisy, w, state.level, state.params)
      values = w.noisy
    }
    feeds[w.input] = new ort.Tensor('float32', values, w.shape)
  })
  const {logits} = await network.session.run(feeds)
  return logits
}

function decide({data, dims}) {                              // class and confidence × 255 of each pixel
  const n = size(), channels = dims[1], classes = new Uint8Array(n), sure = new Uint8Array(n)
  let finite = true
  for (let i = 0; i < n; i++) {
    let best = 0, top = data[i], sum = 0
    if (channels === 1) {
      best = top > 0 ? 1 : 0
      sum = 1 + Math.exp(-Math.abs(top))
    } else {
      for (let c = 1; c < channels; c++) if (data[c * n + i] > top) { top = data[c * n + i]; best = c }
      for (let c = 0; c < channels; c++) sum += Math.exp(data[c * n + i] - top)
    }
    finite &&= Number.isFinite(sum)
    classes[i] = best
    sure[i] = Math.round(255 / sum)
  }
  if (!finite) throw Error('a network predicts numbers that are not finite under this noise')
  return {classes, confidence: sure}
}

function histogram(values, edge) {                           // as torch.histc
  const counts = new Array(BINS).fill(0)
  for (const v of values) {
    if (v < -edge || v > edge) continue
    counts[Math.min(BINS - 1, Math.floor((v + edge) / (2 * edge) * BINS))]++
  }
  return counts
}

function counted(network, i, state) {                        // the histogram of the layer that is looked at
  const k = network.weights.findIndex(w => w.name === state.layer), w = network.weights[k]
  if (!w) return null
  const edge = Math.max(1e-12, 1.4 * w.clean.reduce((a, v) => Math.max(a, Math.abs(v)), 0))
  const noisy = state.level > 0 && manifest.wheres[state.where][i].includes(k)
  return {edge, before: histogram(w.clean, edge), after: histogram(noisy ? w.noisy : w.clean, edge)}
}

async function frame(state) {
  const truth = manifest.pictures[state.sample]?.truth
  const preds = [], hists = []
  for (const [i, network] of networks.entries()) {
    let reference = null
    if (!truth) {                                            // then masks are compared with the clean ones
      if (!network.references.has(state.sample)) {
        network.references.set(state.sample, decide(await run(network, i, {...state, level: 0})).classes)
      }
      reference = network.references.get(state.sample)
    }
    preds.push({...decide(await run(network, i, state)), reference: reference && reference.slice()})
    const counts = counted(network, i, state)
    if (counts) hists.push(counts)
  }
  return {preds, hists}
}

// ---------------------------------------------------------------- messages

async function logitsOf(state) {                             // for tests: what the networks say, number by number
  const found = []
  for (const [i, network] of networks.entries()) found.push((await run(network, i, state)).data.slice())
  return {logits: found}
}

const told = {frame, logits: logitsOf}
let last = Promise.resolve()                                 // one after the other: a session runs once at a time
self.onmessage = ({data: m}) => {
  last = last.then(async () => {
    try {
      if (m.kind === 'open') await open(m)
      else if (m.kind === 'picture') { pictures[m.number] = normalised(m.rgb); networks.forEach(n =>
        n.references.delete(m.number)) }
      else postMessage({kind: m.kind, id: m.id, ...await told[m.kind](m.state)})
    } catch (e) { postMessage({kind: 'error', id: m.id, message: e?.message || String(e)}) }
  })
}
