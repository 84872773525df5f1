"""The scheduler: fronts that speak gRPC and text, and one core that decides."""
