"""The known traps of the protocol, by number: one named test each against a live gateway."""
