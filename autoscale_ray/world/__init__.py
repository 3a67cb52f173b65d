"""The built-in driving world: roads, traffic, a privileged expert, and pools with a known gap."""
