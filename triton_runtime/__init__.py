"""How Triton is run on this machine: the server binary from a wheel, with ONNX Runtime on the CPU."""
