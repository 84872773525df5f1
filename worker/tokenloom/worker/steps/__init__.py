"""Steps: from the core's message to sampled tokens, in fixed shapes where they are captured."""
