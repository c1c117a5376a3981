"""Export of a student to a folder that runs without fairseq and torch, on ONNX Runtime."""
