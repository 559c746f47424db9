// Takes the webhooks of sync.so at the app's own webhookUrl, and relays each to Mayfly as it came.
// node relay.ts

import { createHmac, timingSafeEqual } from "node:crypto";
import { appendFileSync } from "node:fs";
import { createServer, type IncomingMessage } from "node:http";
import { buffer } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";

const SYNC_SECRET = process.env.SYNC_WEBHOOK_SECRET ?? ""; // the whole value, whsec_ included
const MAYFLY = `${process.env.MAYFLY_PUBLIC_URL}/webhooks/sync`;
const RELAY_SECONDS = 270; // Mayfly takes a webhook for five minutes after sync.so sent it

/** Returns when sync.so sent the body, in seconds since 1970; throws if it did not, or over five minutes ago. */
function verify(signature: string, body: Buffer): number {
  const [, sentAt, digest] = /^t=(\d+),v1=([0-9a-f]{64})/.exec(signature) ?? [];
  if (!SYNC_SECRET || !sentAt || !digest) throw new Error("Sync-Signature is missing or malformed");
  const expected = createHmac("sha256", SYNC_SECRET).update(`${sentAt}.`).update(body).digest();
  if (!timingSafeEqual(expected, Buffer.from(digest, "hex"))) throw new Error("sync.so did not sign this body");
  if (Math.abs(Date.now() / 1000 - Number(sentAt)) > 300) throw new Error("sync.so sent it too long ago");
  return Number(sentAt);
}

/** Sends the bytes and headers of sync.so until Mayfly has them; a body parsed and written anew would be refused. */
async function relay(body: Buffer, headers: Record<string, string>, sentAt: number): Promise<void> {
  for (let pause = 1; ; pause = Math.min(2 * pause, 30)) {
    const status = await fetch(MAYFLY, {
      method: "POST",
      body: new Uint8Array(body),
      headers,
      redirect: "manual",
      signal: AbortSignal.timeout(10_000),
    }).then(
      (answer) => answer.status,
      () => 503,
    );
    if (status === 202) return;
    const isFinal = status < 500 && status !== 408 && status !== 429;
    if (isFinal || Date.now() / 1000 + pause > sentAt + RELAY_SECONDS) break;
    await sleep(pause * 1000);
  }
  appendFileSync("not-relayed.txt", `${JSON.parse(`${body}`).id}\n`); // later: mayfly records add - < not-relayed.txt
}

async function receive(request: IncomingMessage): Promise<number> {
  if (!(Number(request.headers["content-length"]) <= 2 ** 20)) return 413;
  const body = await buffer(request);
  const signature = `${request.headers["sync-signature"]}`;
  let sentAt: number;
  try {
    sentAt = verify(signature, body);
  } catch {
    return 401;
  }
  // Here your app does what it always did with the webhook.
  const type = request.headers["content-type"] ?? "application/json";
  void relay(body, { "Content-Type": type, "Sync-Signature": signature }, sentAt);
  return 204;
}

const server = createServer(async (request, response) => {
  response.statusCode = await receive(request).catch(() => 500);
  response.end();
});

server.listen(Number(process.env.PORT ?? 8000), "127.0.0.1");
