// Receives webhooks, verifies their signatures as of Standard Webhooks, and prints them.
import { createHmac, timingSafeEqual } from 'node:crypto'
import { createServer } from 'node:http'

const key = Buffer.from(process.env.WEBHOOK_SECRET.replace(/^whsec_/, ''), 'base64')

function verified(headers, body) {
  const { 'webhook-id': id, 'webhook-timestamp': sent, 'webhook-signature': signatures = '' } = headers
  if (!(Math.abs(Date.now() / 1000 - sent) < 300)) return false // a replay, or a clock that is wrong
  const want = createHmac('sha256', key).update(`${id}.${sent}.`).update(body).digest()
  return signatures.split(' ').some((signature) => {
    const [version, value = ''] = signature.split(',')
    const got = Buffer.from(value, 'base64')
    return version === 'v1' && got.length === want.length && timingSafeEqual(got, want)
  })
}

const server = createServer(async (request, response) => {
  const chunks = []
  for await (const chunk of request) chunks.push(chunk)
  if (request.method !== 'POST') return response.end('ok\n')
  const body = Buffer.concat(chunks)
  const good = verified(request.headers, body)
  console.log(good ? '✓ verified' : '✗ refused', request.headers['webhook-id'], body.toString())
  response.writeHead(good ? 204 : 401).end()
})
server.listen(process.env.PORT, () => console.log(`receiver on port ${server.address().port}`))
process.on('SIGTERM', () => process.exit())
