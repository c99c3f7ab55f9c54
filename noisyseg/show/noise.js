/* Noise in the weights of a network, the same as in Python to the last bit: the generator of noisyseg.perturb.counter
   and the laws of noisyseg.perturb.laws and .quantization. One ES module, no build step.

   All arithmetic is float64 on numbers that are float32, rounded to float32 after each operation where PyTorch works
   in float32: for sums, products and quotients that is the same as having computed in float32. */

// ---------------------------------------------------------------- random bits

const LOW = 0xffff, M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85

function high(a, b) {                                        // the upper 32 bits of a product of two words
  const a0 = a & LOW, a1 = a >>> 16, b0 = b & LOW, b1 = b >>> 16
  const low = a0 * b0, middle = a1 * b0 + (low >>> 16), other = a0 * b1 + middle % 65536
  return (a1 * b1 + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0
}

/** Philox4x32 with ten rounds (Salmon et al., SC 2011): four words of the counter and two of the key, into `out`. */
export function philox(c0, c1, c2, c3, k0, k1, out) {
  for (let i = 0; i < 10; i++) {
    const h0 = high(M0, c0), l0 = Math.imul(M0, c0), h1 = high(M1, c2), l1 = Math.imul(M1, c2)
    c0 = (h1 ^ c1 ^ k0) >>> 0; c1 = l1 >>> 0; c2 = (h0 ^ c3 ^ k1) >>> 0; c3 = l0 >>> 0
    k0 = (k0 + W0) >>> 0; k1 = (k1 + W1) >>> 0
  }
  out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3
}

// ---------------------------------------------------------------- normal numbers

const LN2 = 0.6931471805599453

function log(x) {                                            // of a number between 2^-33 and 1, by a series
  let e = Math.ceil(Math.log2(x)), m = x / 2 ** e            // brought into [0.5, 1), whatever log2 rounded to
  while (m >= 1) { m /= 2; e++ }
  while (m < .5) { m *= 2; e-- }
  if (m < 0.7071067811865476) { m += m; e-- }
  const s = (m - 1) / (m + 1), s2 = s * s
  let series = 1 / 23
  for (let k = 21; k > 0; k -= 2) series = series * s2 + 1 / k
  return e * LN2 + 2 * s * series
}

/** The standard normal quantile of (k + ½) / 2³² (Wichura 1988, AS 241). */
export function normalQuantile(k) {
  const q = (k - 2147483647.5) / 4294967296
  if (Math.abs(q) <= .425) {
    const r = 0.180625 - q * q
    return q * ((((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r
      + 4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r
      + 1.3314166789178437745e2) * r + 3.3871328727963666080e0)
      / (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r
      + 2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r
      + 4.2313330701600911252e1) * r + 1))
  }
  const r = Math.sqrt(-log((Math.min(k, 4294967295 - k) + .5) / 4294967296)) - 1.6
  const z = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r
    + 1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r
    + 4.63033784615654529590e0) * r + 1.42343711074968357734e0)
    / (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r
    + 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r
    + 2.05319162663775882187e0) * r + 1)
  return q < 0 ? -z : z
}

/** The draw of one weight: `n` standard normal numbers, float32. `stream` are the two words that stand for its name,
    `seed` is a whole number up to 2^53. */
export function counterNormals(seed, stream, n, draw = 0) {
  const out = new Float32Array(n), words = new Uint32Array(4), k0 = seed % 4294967296,
    k1 = Math.floor(seed / 4294967296)
  for (let i = 0, block = 0; i < n; i += 4, block++) {
    philox(block, draw, stream[0], stream[1], k0, k1, words)
    for (let j = 0; j < 4 && i + j < n; j++) out[i + j] = normalQuantile(words[j])
  }
  return out
}

// ---------------------------------------------------------------- laws

const f = Math.fround

/** How many neighbouring numbers share a maximum at a grain: a kernel is all but the first two dimensions. */
function groupSize(shape, per, n) {
  const from = per === 'tensor' ? 0 : per === 'channel' ? 1 : shape.length > 2 ? 2 : 0
  return from === 0 ? n : shape.slice(from).reduce((a, b) => a * b, 1)
}

function roundHalfEven(v) {
  const low = Math.floor(v), rest = v - low
  return rest < .5 || (rest === .5 && low % 2 === 0) ? low : low + 1
}

function maxGaussian(w, z, out, weight, level, {alpha = 2, per = 'kernel'}) {
  const size = groupSize(weight.shape, per, w.length), n = f(level), bound = alpha === 'inf' ? Infinity : f(alpha)
  for (let start = 0; start < w.length; start += size) {
    let top = 0
    for (let i = start; i < start + size; i++) top = Math.max(top, Math.abs(w[i]))
    const sigma = f(n * top)
    for (let i = start; i < start + size; i++) {
      out[i] = w[i] + f(Math.min(bound, Math.max(-bound, z[i])) * sigma)
    }
  }
}

function additive(noise) {                                   // of one weight at a time
  return (w, z, out, weight, level) => {
    const of = noise(f(level), weight)
    for (let i = 0; i < w.length; i++) out[i] = w[i] + of(w[i], z[i])
  }
}

function quantize(w, z, out, weight, bits, {per = 'channel', scheme = 'symmetric'}) {
  if (!bits) { out.set(w); return }
  const values = roundHalfEven(2 ** bits), minmax = scheme === 'minmax', q = Math.max(Math.floor((values - 1) / 2), 1)
  const low = minmax ? 0 : -q, high = minmax ? Math.max(values, 2) - 1 : q, tiny = 2 ** -126
  const size = groupSize(weight.shape, per, w.length)
  for (let start = 0; start < w.length; start += size) {
    let bottom = 0, top = 0
    for (let i = start; i < start + size; i++) { bottom = Math.min(bottom, w[i]); top = Math.max(top, w[i]) }
    let step = minmax ? f(f(top - bottom) / (high - low)) : f(Math.max(top, -bottom) / high)
    if (step < tiny) step = 0
    const inverse = step ? f(1 / step) : 0
    const zero = minmax && step ? Math.min(high, Math.max(low, low - roundHalfEven(f(bottom / step)))) : 0
    for (let i = start; i < start + size; i++) {
      const number = Math.min(high, Math.max(low, roundHalfEven(f(w[i] * inverse)) + zero))
      out[i] = (number - zero) * step
    }
  }
}

/** Name -> (clean, draw, out, weight: {shape, std}, level, settings): the perturbed weight into `out`. `std` is the
    weight's own standard deviation, as PyTorch computed it. */
export const LAWS = {
  MaxGaussian: maxGaussian,
  AbsoluteGaussian: additive(s => (w, z) => f(s * z)),
  RelativeGaussian: additive((s, {std}) => { const sigma = f(s * std); return (w, z) => f(sigma * z) }),
  MultiplicativeGaussian: additive(s => (w, z) => f(f(s * w) * z)),
  Quantize: quantize,
}
export const drawn = law => law !== 'Quantize'                // does it depend on the draw?
