// Tells Mayfly which generations to delete and when, by their ids; their webhooks stay where they are.
// node add.ts ID…

type Options = { ttl?: string; expires?: string; hold?: string; labels?: Record<string, string> };
type Added = { id: string; state: string; dueAt: string | null };

/** Schedules one generation, as soon as it is created. If it throws, call it again: the later due time counts. */
async function add(id: string, options: Options = {}): Promise<Added> {
  const answer = await fetch(`${process.env.MAYFLY_PUBLIC_URL}/api/records`, {
    method: "POST",
    headers: { Authorization: `Bearer ${process.env.MAYFLY_INTAKE_TOKEN}`, "Content-Type": "application/json" },
    body: JSON.stringify({ id, ...options }),
    signal: AbortSignal.timeout(10_000),
  });
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  return (await answer.json()) as Added;
}

for (const id of process.argv.slice(2)) {
  const record = await add(id, { ttl: "72h", labels: { customer: "acme" } });
  console.log(record.id, record.state, record.dueAt);
}
