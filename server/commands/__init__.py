"""One module for each command of `lorry`."""
