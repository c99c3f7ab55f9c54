/* Where the live page computes: a module worker that holds networks, draws noise into their weights and runs them with
   onnxruntime-web. The page (live.js) stays free for the hand on the slider. Where there are several networks there are
   several workers, which compute side by side: each is told which networks are `mine`.

   It is told    open     {manifest, mine, engine, threads, binary, pictures}: load its networks; answers with progress,
                          and then ready
                 picture  {number, rgb}: a picture to add, uint8 (height, width, 3)
                 frame    {id, state}: run the networks; answers with frame or error of the same id */
import {halves, read} from './live_files.js'
import {LAWS, counterNormals, drawn} from './noise.js'

const BINS = 48                                              // of the weights' histogram, as in noisyseg.show.predictor
let manifest, ort, networks, pictures

const url = name => new URL(name, import.meta.url).href
const size = () => manifest.size[0] * manifest.size[1]

// ---------------------------------------------------------------- loading

async function loadEngine(engine, threads, binary) {
  ort = await import(url(manifest.engines[engine].module))
  ort.env.logLevel = 'error'
  Object.assign(ort.env.wasm, {numThreads: threads, wasmBinary: binary.buffer})
  return engine === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm']
}

async function loadNetwork(i, providers) {
  const facts = manifest.networks[i], count = n => postMessage({kind: 'progress', n})
  const [graph, bytes] = await Promise.all([read(url(facts.graph), count), read(url(facts.weights), count)])
  const all = facts.precision === 'half' ? halves(bytes) : new Float32Array(bytes.buffer)
  let at = 0
  const weights = facts.inputs.map(({name, shape, stream, std}, k) => {
    const n = shape.reduce((a, b) => a * b, 1), clean = all.subarray(at, at += n), noisy = new Float32Array(n)
    // a tensor is a view of its array, and is read anew at each run
    const tensors = {clean: new ort.Tensor('float32', clean, shape), noisy: new ort.Tensor('float32', noisy, shape)}
    return {input: `w${k}`, name, shape, stream, std, clean, noisy, tensors, z: null, seed: null}
  })
  const session = await ort.InferenceSession.create(graph, {executionProviders: providers,
    logSeverityLevel: 3})                                    // errors
  return {...facts, number: i, weights, session, references: new Map()}
}

async function open({manifest: told, mine, engine, threads, binary, pictures: shown}) {
  manifest = told
  const providers = await loadEngine(engine, threads, binary)
  networks = []
  for (const i of mine) networks.push(await loadNetwork(i, providers))
  ort.env.wasm.wasmBinary = undefined                        // it is compiled, and would be kept for nothing
  pictures = shown.map((bytes, i) => input(bytes, manifest.pictures[i]))
  await check(engine)
  postMessage({kind: 'ready'})
}

/** Does this browser compute what PyTorch computed? A few hundred logits under noise, for each network. */
async function check(engine) {
  const {state, logits, tolerance} = manifest.check
  for (const network of networks) {
    const got = (await run(network, state)).data, {values, step, top} = logits[network.number]
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

function input(bytes, {exact}) {                             // of a picture that came with the page
  const n = size()
  return exact ? normalised(bytes) : new Float32Array(bytes.slice(4 * n, 4 * n + 4 * manifest.channels * n).buffer)
}

// ---------------------------------------------------------------- a frame

const took = {noise: 0, run: 0, rest: 0}                     // milliseconds of a frame, for those who measure
async function timed(what, f) {
  const start = performance.now()
  try { return await f() } finally { took[what] += performance.now() - start }
}

async function run(network, state) {                         // the logits of one network under one state
  const feeds = await timed('noise', () => feedsOf(network, state))
  return (await timed('run', () => network.session.run(feeds))).logits
}

function feedsOf(network, state) {                           // the picture, and weights with noise in them
  const picked = new Set(manifest.wheres[state.where]?.[network.number])
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
    feeds[w.input] = w.tensors.clean
    if (picked.has(k) && state.level > 0) {
      if (drawn(state.disturbance) && w.seed !== state.seed) {
        w.z = counterNormals(state.seed, w.stream, w.clean.length)
        w.seed = state.seed
      }
      LAWS[state.disturbance](w.clean, w.z, w.noisy, w, state.level, state.params)
      feeds[w.input] = w.tensors.noisy
    }
  })
  return feeds
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

function counted(network, state) {                           // the histogram of the layer that is looked at
  const k = network.weights.findIndex(w => w.name === state.layer), w = network.weights[k]
  if (!w) return null
  const edge = Math.max(1e-12, 1.4 * w.clean.reduce((a, v) => Math.max(a, Math.abs(v)), 0))
  const noisy = state.level > 0 && manifest.wheres[state.where][network.number].includes(k)
  return {edge, before: histogram(w.clean, edge), after: histogram(noisy ? w.noisy : w.clean, edge)}
}

async function prediction(network, state) {
  let reference = null
  if (!manifest.pictures[state.sample]?.truth) {             // then masks are compared with the clean ones
    if (!network.references.has(state.sample)) {
      network.references.set(state.sample, decide(await run(network, {...state, level: 0})).classes)
    }
    reference = network.references.get(state.sample).slice()
  }
  const logits = await run(network, state)
  return timed('rest', () => ({...decide(logits), reference}))
}

async function frame(state) {
  Object.assign(took, {noise: 0, run: 0, rest: 0})
  const preds = [], hists = []
  for (const network of networks) {
    preds.push(await prediction(network, state))
    hists.push(await timed('rest', () => counted(network, state)))
  }
  return {preds, hists, took}
}

// ---------------------------------------------------------------- messages

async function logitsOf(state) {                             // for tests: what the networks say, number by number
  const found = []
  for (const network of networks) found.push((await run(network, state)).data.slice())
  return {logits: found}
}

const answers = {frame, logits: logitsOf}
let last = Promise.resolve()                                 // one after the other: a session runs once at a time
self.onmessage = ({data: m}) => {
  last = last.then(async () => {
    try {
      if (m.kind === 'open') await open(m)
      else if (m.kind === 'picture') { pictures[m.number] = normalised(m.rgb); networks.forEach(n =>
        n.references.delete(m.number)) }
      else postMessage({kind: m.kind, id: m.id, ...await answers[m.kind](m.state)})
    } catch (e) { postMessage({kind: 'error', id: m.id, message: e?.message || String(e)}) }
  })
}
