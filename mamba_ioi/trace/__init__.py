"""What runs inside a trace and travels to servers: where values are, operations as chains, the walk through layers."""
