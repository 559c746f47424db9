// Tells Mayfly which generations to delete and when, by their ids; their webhooks stay where they are.
// node add.ts ID…     (before Node 22.18: npx tsx add.ts ID…)

type Options = { ttl?: string; expires?: string; hold?: string; labels?: Record<string, string> };

/** Schedules one generation, as soon as it is created. A second call changes nothing; if it throws, call it again. */
async function add(id: string, options: Options = {}): Promise<unknown> {
  const answer = await fetch(`${process.env.MAYFLY_PUBLIC_URL}/api/records`, {
    method: "POST",
    headers: { Authorization: `Bearer ${process.env.MAYFLY_INTAKE_TOKEN}`, "Content-Type": "application/json" },
    body: JSON.stringify({ id, ...options }),
    signal: AbortSignal.timeout(10_000),
  });
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  return answer.json();
}

for (const id of process.argv.slice(2)) {
  console.log(JSON.stringify(await add(id, { ttl: "72h", labels: { customer: "acme" } })));
}
