"""One home file per op: formula, schema, reference, autograd, public function.

Kernels give an op and its first derivative in reverse. Every other derivative (create_graph, forward mode, torch.func) is the
reference's, in plain PyTorch, whatever backend is in the slot: exact to any order, at the reference's speed and memory, which
for attention is a matrix of scores.
"""
