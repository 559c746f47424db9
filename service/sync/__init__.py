"""Everything that speaks to sync.so."""
