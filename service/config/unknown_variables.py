"""Variables that look like settings and are none: ignored, MAYFLY_DRY would let Mayfly really delete."""

import difflib
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Final

# Planned for a later release. Ignoring one of these could delete what it is meant to keep.
NOT_SUPPORTED: Final = frozenset({"MAYFLY_ARCHIVE_URL"})
# What Kubernetes and container links set for a service called mayfly-something.
_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_[0-9]+_(TCP|UDP).*)?$|_ENV_|_NAME$")


def find_unknown(environment: Mapping[str, str], known: AbstractSet[str], named: AbstractSet[str]) -> list[str]:
    """Return a sentence for each variable that looks like a setting and is not one of those *known*.

    *named* are those that the rules file names.
    """
    problems = []
    for name in sorted(environment.keys() - known - named):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if name.startswith("MAYFLY_") else 0.88)
        if name in NOT_SUPPORTED:
            problems.append(f"{name} is set, but this release does not support it yet: unset it")
        elif name.startswith("MAYFLY_") and not _LINK.search(name):
            problems.append(f"{name} is not an option" + (f": did you mean {near[0]}?" if near else ""))
        elif name.startswith("SYNC_") and near:
            problems.append(f"{name} is not an option: did you mean {near[0]}?")
    return problems
