"""The wire: one .proto per border, generated code committed beside it (`python -m protos.generate`)."""
