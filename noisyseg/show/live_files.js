/* How the live page and its workers read files: with progress, unpacked, and from half precision. */

/** A file's bytes; count(n) hears of each piece. */
export async function read(address, count = () => {}) {
  const r = await fetch(address)
  if (!r.ok) throw Error(`${address.split('/').pop()} could not be read (${r.status})`)
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

/** What was packed with gzip, unless the server has unpacked it already. */
export async function unpacked(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

/** float16 to float32 */
export function halves(bytes) {
  const from = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2), to = new Float32Array(from.length)
  for (let i = 0; i < from.length; i++) {
    const h = from[i], e = (h >> 10) & 31, m = h & 1023, sign = h & 32768 ? -1 : 1
    to[i] = sign * (e ? 2 ** (e - 15) * (1 + m / 1024) : m * 2 ** -24)
  }
  return to
}
