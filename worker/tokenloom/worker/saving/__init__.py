"""`tokenloom quantize`: a quantized copy of a checkpoint, as transformers would save it."""
