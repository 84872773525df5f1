"""The operators' process: the Admin service on an address of its own, beside the fronts."""
