"""What trainloop costs on one GPU: `python -m benchmarks --gpu`."""
