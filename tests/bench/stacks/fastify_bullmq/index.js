// What a user of Node would write instead: Fastify and BullMQ with the same contract and no ledger.
// `node index.js web` listens on PORT, `node index.js worker` deletes.
import { createHmac, timingSafeEqual } from 'node:crypto'
import Fastify from 'fastify'
import { Queue, Worker } from 'bullmq'
import { Redis } from 'ioredis'

const connection = new Redis({ path: process.env.BENCH_REDIS_SOCKET, maxRetriesPerRequest: null })
const secret = process.env.SYNC_WEBHOOK_SECRET
const TOLERANCE_SECONDS = 300
const DAY_MS = 24 * 60 * 60 * 1000

async function web() {
  const queue = new Queue('deletions', { connection })
  const app = Fastify()
  // The signature is over the raw bytes.
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_, body, done) => done(null, body))
  app.post('/webhooks/sync', async (request, reply) => {
    const [, at, given] = /^t=(\d+),v1=([0-9a-f]{64})$/.exec(request.headers['sync-signature'] ?? '') ?? []
    if (!at || Math.abs(Date.now() / 1000 - Number(at)) > TOLERANCE_SECONDS) return reply.code(401).send()
    const expected = createHmac('sha256', secret).update(`${at}.`).update(request.body).digest()
    if (!timingSafeEqual(expected, Buffer.from(given, 'hex'))) return reply.code(401).send()
    const generation = JSON.parse(request.body)
    const expires = new URL(generation.webhookUrl).searchParams.get('expires')
    const dueAt = expires ? Date.parse(expires) : Date.now() + DAY_MS
    await queue.add('delete', generation, {
      jobId: generation.id, delay: Math.max(0, dueAt - Date.now()), removeOnComplete: true,
    })
    return reply.code(202).send({ id: generation.id, state: 'scheduled', dueAt: new Date(dueAt).toISOString() })
  })
  await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
}

function worker() {
  new Worker('deletions', async (job) => {
    const response = await fetch(`${process.env.SYNC_BASE_URL}/v2/generations/${job.data.id}`, {
      method: 'DELETE', headers: { 'x-api-key': process.env.SYNC_API_KEY },
    })
    await response.arrayBuffer()
    if (!response.ok) throw new Error(`the API answered ${response.status}`)
  }, { connection, concurrency: Number(process.env.BENCH_CONCURRENCY ?? 50) })
}

if (process.argv[2] === 'worker') worker()
else await web()
