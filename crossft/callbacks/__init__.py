"""Methods and monitors: every one a Lightning callback, a folder an axis."""
