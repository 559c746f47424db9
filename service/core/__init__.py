"""Pure decisions: the standard library and msgspec, no clock, no environment, no I/O."""
