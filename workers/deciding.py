"""What an attempt decides about the retention once the API shows the generation, before anything is deleted."""

from datetime import datetime

from service.core.generation import Generation
from service.core.refining import decide_ended_retention
from service.core.retention import Policy, Retention, reconsider_retention
from service.core.rules import read_facts
from service.ledger.claiming import Claim


def decide_again(policy: Policy, claim: Claim, generation: Generation, *, now: datetime) -> Retention | None:
    """Return what keeps the generation of *claim*, which has ended, longer than until now; None if nothing does.

    One that was added by its id is not deleted when it is first seen to have ended: nobody has known it until now.
    """
    facts = read_facts(policy.rules, claim.key.account, generation, is_complete=True, labels=claim.labels)
    if claim.has_ended:
        return reconsider_retention(
            policy,
            facts,
            rule=claim.rule,
            due_at=claim.due_at,
            ttl=claim.ttl,
            webhook_url=generation.webhook_url,
        )
    later = decide_ended_retention(
        policy,
        facts,
        rule=claim.rule,
        due_at=claim.due_at,
        ttl=claim.ttl,
        webhook_url=generation.webhook_url,
        sent_at=claim.sent_at or claim.due_at,
        now=now,
    )
    if later is None:
        raise ValueError("a claim has a due time")
    return later
