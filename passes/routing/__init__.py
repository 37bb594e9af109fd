"""Routed feed-forwards: what a folder of routers holds, and a dense feed-forward taken apart."""
