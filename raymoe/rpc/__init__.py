"""The gRPC interface: raymoe.proto, the code made of it, the services and their server."""
