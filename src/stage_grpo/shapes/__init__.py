"""The embedded world: flat shapes on a quiet background, their prompts, detector and tiny policy."""
