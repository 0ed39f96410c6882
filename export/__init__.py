"""From a trained checkpoint, or an ONNX file, to a verified and published release. CLI: `python -m export`."""
