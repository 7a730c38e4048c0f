"""The neurons in other frameworks: snnTorch's calling convention, and the way to NIR."""
