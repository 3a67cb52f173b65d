"""The loop on Ray: the only room of the package that imports ray."""
