// Takes the webhooks that Mayfly forwards: verifies each one, stores it once, answers.
// npm install standardwebhooks && node receive.ts

import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import { existsSync, mkdirSync, renameSync, writeFileSync } from "node:fs";
import { createServer, type IncomingHttpHeaders, type IncomingMessage } from "node:http";
import { buffer } from "node:stream/consumers";
import { Webhook } from "standardwebhooks";

const SYNC_SECRETS = (process.env.SYNC_WEBHOOK_SECRET ?? "").split(",").filter(Boolean); // whole, whsec_ included
// The secret that secret_env of the [[forward]] names. Without one, late deliveries are refused.
const FORWARD = process.env.FORWARD_SECRET ? new Webhook(process.env.FORWARD_SECRET) : undefined;
const TOLERANCE_SECONDS = 300;
const MAX_BYTES = 2 ** 20;
const INBOX = "inbox";

/** Returns if sync.so signed the body and it was sent just now: by sync.so, or by Mayfly in this attempt. */
function verify(headers: IncomingHttpHeaders, body: Buffer): void {
  const [, sentAt, digest] = /^t=(\d+),v1=([0-9a-f]{64})/.exec(`${headers["sync-signature"]}`) ?? [];
  if (!sentAt || !digest) throw new Error("Sync-Signature is missing or malformed");
  const isSigned = SYNC_SECRETS.some((key) =>
    timingSafeEqual(createHmac("sha256", key).update(`${sentAt}.`).update(body).digest(), Buffer.from(digest, "hex")),
  );
  if (!isSigned) throw new Error("sync.so did not sign this body");
  if (FORWARD && headers["webhook-signature"]) {
    FORWARD.verify(body, headers as Record<string, string>); // checks webhook-timestamp, too: that of the attempt
  } else if (Math.abs(Date.now() / 1000 - Number(sentAt)) > TOLERANCE_SECONDS) {
    throw new Error("sync.so sent it too long ago");
  }
}

/** A file for each delivery; in your app this is a table with a unique column. A worker of yours reads it. */
function store(delivery: string, body: Buffer): void {
  const file = `${INBOX}/${createHash("sha256").update(delivery).digest("hex")}.json`; // no path from a header
  if (existsSync(file)) return;
  mkdirSync(INBOX, { recursive: true });
  writeFileSync(`${file}.part`, body);
  renameSync(`${file}.part`, file);
}

async function receive(request: IncomingMessage): Promise<number> {
  if (!(Number(request.headers["content-length"]) <= MAX_BYTES)) return 413;
  const body = await buffer(request);
  try {
    verify(request.headers, body);
  } catch {
    return 401;
  }
  // Without Mayfly-Delivery it comes from sync.so itself.
  store(`${request.headers["mayfly-delivery"] ?? createHash("sha256").update(body).digest("hex")}`, body);
  return 204; // only now: it is stored
}

const server = createServer(async (request, response) => {
  response.statusCode = await receive(request).catch(() => 500); // then Mayfly sends it again
  response.end();
});

server.listen(Number(process.env.PORT ?? 8000), "127.0.0.1");
