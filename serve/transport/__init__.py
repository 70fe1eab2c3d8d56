"""Private sockets between our own processes: frames, connections, the step channel."""
